"""Errors a user can act on: the message says what was wrong, where, and what to do."""


class OFLError(Exception):
    """Base of all errors this package raises on purpose."""


class InputError(OFLError, ValueError):
    """Images, labels, options or files that cannot be used as given."""


class WeightsError(OFLError, RuntimeError):
    """Weights that are absent, damaged, or of another layout than the backbone."""


class ModelError(OFLError, RuntimeError):
    """A saved model folder that is damaged, newer than this version, or made for another backbone."""


class Cancelled(OFLError):
    """The user cancelled; everything finished before is kept."""
