"""Measured choices: what `lowp tune` found to be fastest on this machine, where kernels look it up.

A kernel with a knob (a tile's size, the number of splits) has a rule that chooses well without being asked. Where it declares
`candidates` as well, `lowp tune` times each of them on the shapes that a user cares about, and keeps the fastest on disk:

    $LOWP_CACHE, else $XDG_CACHE_HOME/lowp, else ~/.cache/lowp
        tuned/NVIDIA-H200-lowp-0.1.0-torch-2.11.0-triton-3.6.0.json       a file for each GPU and set of versions

    config = choice("w4a16", key_of(spec.scheme, x_MK.dtype, spec.shape, x_MK.shape[0])) or rule(...)

`choice` is one look-up in a dict: the file is read once, at the first question. Nothing is ever measured at run time. A file that
is broken or was made by another machine or version is ignored with a warning; the rule then decides. On a machine with several
kinds of GPU the one that is current at the first question counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

Key = tuple[str | int, ...]
Config = dict[str, Any]

_T = TypeVar("_T")
_MOST = 65536  # decisions that are kept

_TABLE: dict[tuple[str, Key], Config] | None = None


def choice(kernel: str, key: Key) -> Config | None:
    """The measured configuration of a kernel for a key, or None where nothing was measured.

    Args:
        kernel: its name. key: as `key_of` makes it; any tuple of strings and integers.
    """
    found = _TABLE if _TABLE is not None else _read_once()
    return found.get((kernel, key))


def record_of(kind: type[_T], config: Config | None) -> _T | None:
    """The dataclass that a configuration was made from; None where it has other fields, because another version measured it."""
    if config is None or set(config) != {field.name for field in dataclasses.fields(kind)}:  # type: ignore[arg-type]
        return None
    return kind(**config)


def kept(decide: Callable[..., _T]) -> Callable[..., _T]:
    """Keep what a function decides, by its positional arguments, until `choice` answers from another table.

    >>> kept(lambda tokens: choice("w4a16", ("int4/row", tokens)) or {"tile": 64})(16)
    {'tile': 64}
    """
    found: dict[tuple[Hashable, ...], _T] = {}
    seen: object = None

    @functools.wraps(decide)
    def decided(*key: Hashable) -> _T:
        nonlocal seen
        now = _TABLE if _TABLE is not None else _read_once()
        if now is not seen or len(found) > _MOST:
            found.clear()
            seen = now
        try:
            return found[key]
        except KeyError:
            made = found[key] = decide(*key)
            return made

    return decided


def key_of(scheme: str, dtype: torch.dtype, shape: tuple[int, ...], batch: int) -> Key:
    """The key of a case: batches are taken together up to the next power of two.

    >>> key_of("int8/row", torch.bfloat16, (4096, 4096), 20)
    ('int8/row', 'bfloat16', 4096, 4096, 32)
    """
    return (scheme, _dtype_name(dtype), *shape, 1 << max(batch - 1, 0).bit_length())


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def forced(kernel: str, config: Config | None) -> Iterator[None]:
    """Inside this context `choice` answers `config` for a kernel, whatever the key; None: as if nothing had been measured."""
    global _TABLE
    before = _TABLE
    _TABLE = _Forced(kernel, config)
    try:
        yield
    finally:
        _TABLE = before


class _Forced(dict[tuple[str, Key], Config]):
    """A table with one answer."""

    def __init__(self, kernel: str, config: Config | None) -> None:
        super().__init__()
        self._kernel, self._config = kernel, config

    def get(self, key: Any, default: Any = None) -> Any:
        return self._config if key[0] == self._kernel else default


# -- on disk ----------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where lowp keeps what it can find again by itself."""
    if given := os.environ.get("LOWP_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lowp"


def machine() -> dict[str, str]:
    """What a measured choice depends on: the processor and the versions of what compiles and runs kernels."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {name: _version(name) for name in ("lowp", "torch", "triton")}
    return {"device": gpu, **versions}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def path() -> Path:
    """The file of this machine."""
    words = machine()
    stem = "-".join([words.pop("device"), *(f"{name}-{version}" for name, version in words.items())])
    return cache_folder() / "tuned" / f"{re.sub(r'[^A-Za-z0-9.+]+', '-', stem)}.json"


def store(found: Mapping[tuple[str, Key], Config | None]) -> Path:
    """Add choices to the file of this machine, replacing those of the same kernel and key; None takes one out.

    The file is written beside its place and then moved there, so that a reader sees the old one or the new one.

    Raises:
        OSError: the folder cannot be written.
    """
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    table = {**_read(target), **found}
    entries = [
        {"kernel": kernel, "key": list(key), "config": config}
        for (kernel, key), config in sorted(table.items(), key=lambda item: (item[0][0], str(item[0][1])))
        if config is not None
    ]
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".partial")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump({"machine": machine(), "choices": entries}, file, indent=1)
        os.replace(partial, target)
    except BaseException:
        os.unlink(partial)
        raise
    forget()
    return target


def forget() -> None:
    """Read the file again at the next question."""
    global _TABLE
    _TABLE = None


def _read_once() -> dict[tuple[str, Key], Config]:
    global _TABLE
    _TABLE = _read(path())
    return _TABLE


def _read(file: Path) -> dict[tuple[str, Key], Config]:
    """The choices of a file; none, and a warning, where it is not what `store` writes."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        return _ignored(file, str(error))
    try:
        content = json.loads(text)
        if content["machine"] != machine():
            return _ignored(file, f"it was made by {content['machine']}, this is {machine()}")
        return dict(_entries(content["choices"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return _ignored(file, f"{type(error).__name__}: {error}")


def _entries(choices: Iterable[Any]) -> Iterator[tuple[tuple[str, Key], Config]]:
    for entry in choices:
        kernel, key, config = entry["kernel"], tuple(entry["key"]), entry["config"]
        if not (isinstance(kernel, str) and isinstance(config, dict) and all(isinstance(k, (str, int)) for k in key)):
            raise ValueError(f"no choice: {entry!r}")
        yield (kernel, key), config


def _ignored(file: Path, why: str) -> dict[tuple[str, Key], Config]:
    warnings.warn(
        f"lowp ignores the measured choices in {file}: {why}. Remove the file, or run `lowp tune` again.", stacklevel=4
    )
    return {}
