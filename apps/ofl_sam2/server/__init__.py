"""The HTTP server: MONAI Label's own, with the routes replaced that would block it or answer without a reason.

    request -> keys checked -> route -> queue -> app (infer, save, train) -> answer, or a sentence that says what to do

`python -m monailabel.main start_server --uvicorn_app server.app:app` runs it, with the app folder on PYTHONPATH.
"""
