"""What MONAI Label has no address for: state of learning, running work, snapshots, structures."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, HTTPException

from ofl_sam2.service.snapshots import Snapshot
from server.forms import Admin, AnyUser
from server.inference import queue
from server.lookup import app

router = APIRouter(prefix="/ofl", tags=["OFL-SAM2"])


@router.get("/status", summary="Snapshot, learning, flagged labels, queue and running work")
def status(user: AnyUser) -> dict[str, Any]:
    """Everything an annotator may want to know before the next case."""
    return {**app().status(), "queue": vars(queue.status())}


@router.get("/jobs", summary="Running work and how far it is")
def jobs(user: AnyUser) -> list[dict[str, Any]]:
    """Each with the id that DELETE takes."""
    return [job.to_dict() for job in app().jobs.list()]


@router.delete("/jobs/{id}", summary="Cancel running work", responses={404: {"description": "No such job"}})
def cancel(user: AnyUser, id: str) -> dict[str, Any]:
    """It stops at the next slice; its request is answered with 409."""
    if not app().jobs.cancel(id):
        raise HTTPException(404, f"There is no running job '{id}'. GET /ofl/jobs lists them.")
    return {"id": id, "cancelled": True}


@router.get("/snapshots", summary="Published states of the model, oldest first")
def snapshots(user: AnyUser) -> list[dict[str, Any]]:
    """`current` is the one that segments."""
    current = app().snapshots.current()
    return [{**describe(snapshot), "current": snapshot == current} for snapshot in app().snapshots.list()]


@router.delete(
    "/snapshots/{version}",
    summary="Remove an old state, and with it the features of labels that were deleted since",
    responses={400: {"description": "It is the current or the newest one"}, 404: {"description": "No such snapshot"}},
)
def remove_snapshot(user: Admin, version: int) -> dict[str, Any]:
    """The current one stays because it segments, the newest one because its number must not be given again."""
    _require_version(version)
    app().snapshots.remove(version)
    return {"version": version, "removed": True}


def _require_version(version: int) -> None:
    kept = [snapshot.version for snapshot in app().snapshots.list()]
    if version not in kept:
        known = ", ".join(map(str, kept)) or "none"
        raise HTTPException(404, f"There is no snapshot {version}. The kept ones are: {known}.")


def describe(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot as plain values for JSON."""
    return {"version": snapshot.version, "created": snapshot.created, "notes": snapshot.notes}


@router.post("/snapshots/{version}/rollback", summary="Segment with an older state again")
def rollback(user: Admin, version: int) -> dict[str, Any]:
    """Labels stay; the next saved label is learned on top of the older state."""
    _require_version(version)
    snapshot = app().snapshots.rollback(version)
    app().workspace.scores.forget_newer(version)
    return {"version": snapshot.version}


@router.get("/structures", summary="Names of the structures and their label values")
def structures(user: AnyUser) -> dict[str, int]:
    """Values are given once and never reused."""
    return app().registry.names()


@router.post("/structures/rename", summary="Give a structure another name")
def rename(user: Admin, old: Annotated[str, Body()], new: Annotated[str, Body()]) -> dict[str, int]:
    """Its value and everything learned about it stay."""
    app().registry.rename(old, new)
    app().service.structures_changed()
    return structures(user)


@router.post("/structures/merge", summary="Make two structures one")
def merge(user: Admin, name: Annotated[str, Body()], into: Annotated[str, Body()]) -> dict[str, int]:
    """Labels of `name` count as labels of `into` from now on."""
    app().registry.merge(name, into)
    app().service.structures_changed()
    return structures(user)
