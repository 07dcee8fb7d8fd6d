"""All routes of our own."""

from server import inference, labels, models, ofl, tasks

ROUTERS = [inference.router, labels.router, models.router, ofl.router, tasks.router]
