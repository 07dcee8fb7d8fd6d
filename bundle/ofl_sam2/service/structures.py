"""Names of structures and their label values, given once: what was learned about value 3 stays true of value 3."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from ofl_sam2.atomic import atomic_write_text
from ofl_sam2.errors import InputError, ModelError

_BACKGROUND = "background"
_MAX_VALUE = 255
MOST_UNNAMED = 128
_MAX_NAME = 100


class StructureRegistry:
    """The structures of one app, kept in a JSON file that several processes may share.

    A new name takes the value after the largest one, where that is 255 the smallest that is free. Names are compared
    without case and outer blanks, and kept as first written. A renamed structure goes by its former names too, so
    labels saved under them still mean the same; a merged one goes by the value it was merged into.

    Args:
        path: the file; created by the first name.
        labels: names that must be there, in the order of their values.

    Raises:
        InputError: a name in `labels` that cannot be one.
        ModelError: the file is damaged.

    Example:
        >>> import tempfile
        >>> registry = StructureRegistry(Path(tempfile.mkdtemp()) / "structures.json", ["liver"])
        >>> label = np.array([0, 7, 9], np.uint8)
        >>> registry.remap(label, [{"name": "Spleen", "idx": 7}, {"name": "Liver", "idx": 9}])
        array([0, 2, 1], dtype=uint8)
        >>> registry.names()
        {'liver': 1, 'Spleen': 2}
    """

    def __init__(self, path: Path, labels: Iterable[str] = ()) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_suffix(".lock"))
        with self._lock:
            names = _Names.read(path)
            before = len(names.values)
            for label in labels:
                names.value_of(_structure_name(label))
            if len(names.values) > before:
                names.write(path)

    def names(self) -> dict[str, int]:
        """Name -> label value, in the order of the values."""
        names = _Names.read(self._path)
        return dict(sorted(names.current.items(), key=lambda item: item[1]))

    def remap(self, labels: NDArray[Any], label_info: Sequence[dict[str, Any]] | None = None) -> NDArray[np.uint8]:
        """Replace the values of a client's label by those of the registry; names it does not know are added.

        Args:
            labels: integers in any shape.
            label_info: `[{"name": ..., "idx": ...}, ...]`, the client's names of its values; entries for values that
                do not occur are checked but add nothing. None or empty: the values are the registry's own, and unknown
                ones, 128 at most, are named `structure_<value>`.

        Raises:
            InputError: a value without a name, two names of one value or two values of one name, more than 255
                structures, too many unknown ones; nothing was added.
        """
        values = [int(value) for value in np.unique(labels) if value]
        given = _client_names(label_info) if label_info else None
        with self._lock:
            names = _Names.read(self._path)
            before = len(names.values)
            target = names.own_values(values) if given is None else names.values_for(values, given)
            if len(names.values) > before:
                names.write(self._path)
        remapped = np.zeros(labels.shape, np.uint8)
        for value in values:
            remapped[labels == value] = target[value]
        return remapped

    def rename(self, old: str, new: str) -> None:
        """Give a structure another name; its value stays, and labels saved under the old name still mean it.

        Raises:
            InputError: `old` is unknown, or `new` cannot be a name or is taken by another structure.
        """
        new = _structure_name(new)
        with self._lock:
            names = _Names.read(self._path)
            value = names.known(old)
            if names.values.get(_key(new), value) != value:
                raise InputError(f"There is another structure '{new}'. Choose another name, or merge the two.")
            names.current = {name: v for name, v in names.current.items() if v != value} | {new: value}
            names.values[_key(new)] = value
            names.write(self._path)

    def merge(self, name: str, into: str) -> None:
        """Make labels of `name` count as labels of `into`; the value of `name` is not used again.

        Raises:
            InputError: one of them is unknown, or both are the same structure.
        """
        with self._lock:
            names = _Names.read(self._path)
            value, target = names.known(name), names.known(into)
            if value == target:
                raise InputError(f"'{name}' and '{into}' are the same structure already.")
            names.current = {kept: v for kept, v in names.current.items() if v != value}
            names.values = {key: target if v == value else v for key, v in names.values.items()}
            names.merged = {v: target if t == value else t for v, t in names.merged.items()} | {value: target}
            names.write(self._path)


class _Names:
    """The content of the file.

    Attributes:
        current: name as written -> value, one for each structure.
        values: every name a structure ever had, as `_key` -> value.
        merged: value that was merged -> value that took it in.
    """

    def __init__(self, current: dict[str, int], values: dict[str, int], merged: dict[int, int]) -> None:
        self.current, self.values, self.merged = current, values, merged

    @classmethod
    def read(cls, path: Path) -> "_Names":
        if not path.exists():
            return cls({}, {}, {})
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            current = {str(name): int(value) for name, value in content["structures"].items()}
            values = {str(name): int(value) for name, value in content["names"].items()}
            return cls(current, values, {int(value): int(target) for value, target in content["merged"].items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{path} is damaged ({error}). Restore it from a copy: the values of the structures are in it."
            ) from error

    def write(self, path: Path) -> None:
        content = {"structures": self.current, "names": self.values, "merged": self.merged}
        atomic_write_text(path, json.dumps(content, indent=1))

    def known(self, name: str) -> int:
        """The value of a structure under its current name."""
        values = {_key(current): value for current, value in self.current.items()}
        if _key(name) not in values:
            raise InputError(f"There is no structure '{name}'. There are: {_listed(self.current) or 'none'}.")
        return values[_key(name)]

    def value_of(self, name: str) -> int:
        """The value of a structure, which is added if it is new."""
        if _key(name) not in self.values:
            taken = {*self.current.values(), *self.values.values(), *self.merged}
            after = max(taken, default=0) + 1
            free = (value for value in range(1, _MAX_VALUE + 1) if value not in taken)
            self._add(name, after if after <= _MAX_VALUE else next(free, after))
        return self.values[_key(name)]

    def values_for(self, values: Sequence[int], given: dict[int, str]) -> dict[int, int]:
        unnamed = [value for value in values if value not in given]
        if unnamed:
            raise InputError(
                f"The label holds the value(s) {_listed(unnamed)}, which its label_info does not name. "
                "Send a name and an idx for each value."
            )
        return {value: self.value_of(given[value]) for value in values}

    def own_values(self, values: Sequence[int]) -> dict[int, int]:
        """What the registry's own values mean now; unknown ones become structures."""
        unknown = sorted(set(values) - set(self.current.values()) - set(self.merged))
        if len(unknown) > MOST_UNNAMED:
            raise InputError(
                f"The label holds {len(unknown)} unknown values without a name. Is it an image instead of a label? "
                "Else send label_info with a name for each value."
            )
        for value in unknown:
            name = f"structure_{value}"
            if name in self.values:
                raise InputError(
                    f"The label holds the unnamed value {value}, but '{name}' is {self.values[name]} here. "
                    "Send label_info with a name for each value."
                )
            self._add(name, value)
        return {value: self.merged.get(value, value) for value in values}

    def _add(self, name: str, value: int) -> None:
        if not 0 < value <= _MAX_VALUE:
            raise InputError(
                f"'{name}' would get the value {value}; values go from 1 to {_MAX_VALUE}. "
                "Is it an image instead of a label?"
            )
        self.current[name] = self.values[_key(name)] = value


def _client_names(label_info: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Value -> name of a client's `label_info`, without the background."""
    names: dict[int, str] = {}
    for entry in label_info:
        try:
            name, idx = _checked_name(entry["name"]), entry["idx"]
        except (KeyError, TypeError) as error:
            raise InputError(
                f'label_info holds {entry!r}. Give each structure as {{"name": ..., "idx": ...}}.'
            ) from error
        if _key(name) == _BACKGROUND:
            continue
        if isinstance(idx, bool) or not isinstance(idx, int | float) or not float(idx).is_integer() or idx < 1:
            raise InputError(f"label_info gives '{name}' the idx {idx!r}. Use integers from 1; 0 is the background.")
        if _key(names.get(int(idx), name)) != _key(name):
            raise InputError(f"label_info gives the value {idx} two names: '{names[int(idx)]}' and '{name}'.")
        names[int(idx)] = name
    keys = [_key(name) for name in names.values()]
    twice = sorted({name for name in names.values() if keys.count(_key(name)) > 1}, key=_key)
    if twice:
        raise InputError(f"label_info gives several values one name: {_listed(twice)}. Give each structure its own.")
    return names


def _checked_name(name: Any) -> str:
    """A structure's name without outer blanks; TypeError if it is no text."""
    if not isinstance(name, str):
        raise TypeError(name)
    name = name.strip()
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise InputError(f"{name[:80]!r} is no name of a structure. Use 1 to {_MAX_NAME} printable characters.")
    return name


def _structure_name(name: str) -> str:
    name = _checked_name(name)
    if _key(name) == _BACKGROUND:
        raise InputError(f"'{name}' is the value 0, not a structure. Choose another name.")
    return name


def _key(name: str) -> str:
    return name.strip().casefold()


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items))
