"""All routes of our own."""

from server import drafts, images, inference, labels, models, ofl, ohif, proxy, studies, tasks

ROUTERS = [module.router for module in (drafts, images, inference, labels, models, ofl, ohif, proxy, studies, tasks)]
