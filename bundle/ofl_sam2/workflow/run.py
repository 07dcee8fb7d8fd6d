"""A run of `python -m monai.bundle`: unknown options are refused, and a mistake is one line, not a traceback."""

import difflib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from monai.bundle import ConfigParser
from monai.bundle.scripts import run

from ofl_sam2.errors import InputError, OFLError

_OPTION = re.compile(r"--([A-Za-z_][\w-]*)")
_PROGRAM = re.compile(r"monai[/\\]bundle[/\\]__main__\.py$")


@contextmanager
def config_key(name: str) -> Iterator[None]:
    """Put the name of the config key in front of what goes wrong inside."""
    try:
        yield
    except OFLError as error:
        raise type(error)(f"{name}: {error}") from error


def prepare() -> None:
    """First step of a workflow: check the command line, and print mistakes as one line.

    Raises:
        InputError: an option of the command line is no key of the config files.
    """
    sys.excepthook = report
    if _PROGRAM.search(sys.argv[0]):
        check_options(sys.argv[1:])


def check_options(arguments: Sequence[str]) -> None:
    """Refuse options that neither `monai.bundle run` nor the config files know; MONAI would ignore them in silence.

    Raises:
        InputError: names the closest key.
    """
    given = {match[1].replace("-", "_"): value for match, value in _options(arguments)}
    if "config_file" not in given or "args_file" in given:
        return
    files = re.findall(r"[^\[\](),'\"\s]+", given["config_file"])
    keys = ConfigParser.load_config_files(files)
    for name in given:
        if name not in keys and name not in inspect.signature(run).parameters:
            close = difflib.get_close_matches(name, keys, 1)
            hint = f"Did you mean {close[0]}?" if close else f"Keys: {', '.join(sorted(keys))}."
            raise InputError(f"{name}: {' and '.join(files)} hold no such key. {hint}")


def report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an uncaught error: one line where the user can act on it, the traceback elsewhere."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OFLError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"Error: {' '.join(str(cause).split())}", file=sys.stderr)


def _options(arguments: Sequence[str]) -> Iterator[tuple[re.Match[str], str]]:
    """Each option with its value, given as `--name value` or `--name=value`."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if match := _OPTION.match(argument):
            yield match, argument.partition("=")[2] or following
