"""Say something in the log, but not again each time the studies are looked at."""

import logging
from functools import lru_cache

logger = logging.getLogger(__name__)


@lru_cache(maxsize=10_000)
def warn_once(sentence: str) -> None:
    """Log a sentence that was not logged before."""
    logger.warning("%s", sentence)
