"""The options a client can choose for a segmentation."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ofl_sam2.errors import InputError
from ofl_sam2.settings import Order, Settings

ALL, BY_POSITION = "all", "by_position"
_SWITCHES = {"on": True, "off": False, "true": True, "false": False}


@dataclass(frozen=True)
class InferOptions:
    """What one request asks for.

    Attributes:
        structure: the only structure wanted; None means all.
        changes: fields of `Settings` that differ from those of the snapshot.
        quality_threshold: structures estimated worse than this are left out of the result.
        by_position: what is found is numbered 1, 2, ... in the order of its values, instead of by its values.
    """

    structure: str | None
    changes: dict[str, Any]
    quality_threshold: float
    by_position: bool


def offered(structures: Iterable[str], settings: Settings, device: str) -> dict[str, list[str]]:
    """The choices that `/info/` shows, the default first."""
    gammas = sorted({settings.gamma, 0.5, 0.7, 0.8, 0.9}, key=lambda gamma: (gamma != settings.gamma, gamma))
    return {
        "structures": [ALL, *structures],
        "gamma": [f"{gamma:g}" for gamma in gammas],
        "online_update": ["on", "off"] if settings.online_update else ["off", "on"],
        "quality_threshold": ["0", "0.3", "0.5", "0.7", "0.9"],
        "order": sorted((order.value for order in Order), key=lambda order: order != settings.order.value),
        "device": [device],
    }


def read_options(request: dict[str, Any], settings: Settings, device: str) -> InferOptions:
    """Read the options of a request; a list of choices stands for its first.

    Raises:
        InputError: a value that is none of the option, or another device than the server's.
    """
    chosen = {key: value[0] if isinstance(value, list) and value else value for key, value in request.items()}
    wanted = chosen.get("device") or device
    if str(wanted).partition(":")[0] != device.partition(":")[0]:
        raise InputError(f"The device '{wanted}' is not the server's ('{device}'). Start it with --conf device.")
    given: dict[str, Any] = {}
    if chosen.get("gamma") is not None:
        given["gamma"] = _number("gamma", chosen["gamma"])
    if chosen.get("order"):
        given["order"] = chosen["order"]
    if chosen.get("online_update") is not None:
        given["online_update"] = _switch("online_update", chosen["online_update"])
    saved = settings.to_dict()
    structure = chosen.get("structures") or ALL
    return InferOptions(
        structure=None if structure == ALL else str(structure),
        changes={name: value for name, value in given.items() if value != saved[name]},
        quality_threshold=_number("quality_threshold", chosen.get("quality_threshold") or 0),
        by_position=chosen.get(BY_POSITION) is True,
    )


def wants_draft(request: dict[str, Any]) -> bool:
    """Whether the result is to be stored on the DICOMweb server as well, as a draft.

    Raises:
        InputError: the option `store_draft` is neither on nor off.
    """
    value = request.get("store_draft") or "off"
    return _switch("store_draft", value[0] if isinstance(value, list) else value)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {value!r}; it must be a number between 0 and 1.") from error
    if not 0 <= number <= 1:
        raise InputError(f"{name} is {value}; it must be between 0 and 1.")
    return number


def _switch(name: str, value: Any) -> bool:
    switch = _SWITCHES.get(str(value).strip().lower())
    if switch is None:
        raise InputError(f"{name} is {value!r}; it must be on or off.")
    return switch
