"""The journal of a run that may be killed: what is finished and durable, line by line.

    {"job": "..."}                                  a fingerprint of all that decides the result
    {"done": "model.layers.0", ...}                 one line for each finished piece of work, with what the report needs of it

It lies in the work directory `.NAME.partial`. The same call goes on behind the last whole line; a line that was cut short counts
for nothing. Only one process works in a directory.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import CheckpointError, LowpError
from . import shards as files

JOURNAL = "journal.jsonl"
_DURABLE = 1 << 27  # bytes written (128 MiB) or seconds passed between two entries of finished work
_SECONDS = 5.0
_OURS = ("model*.safetensors", "hidden-?.bin")


@dataclass
class Journal:
    """The record of finished work. An entry is written after its bytes are durable, never before.

    Args:
        path: of the file. done: entries by key, as an earlier run or this one has made them durable.
    """

    path: Path
    file: IO[str]
    done: dict[str, Mapping[str, Any]]
    waiting: list[tuple[Sequence[Path], str, dict[str, Any]]] = field(default_factory=list)
    written: int = 0
    last: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, work: Path, job: str, prepare: Callable[[Path], None], overwrite: bool) -> Journal:
        """The journal of a work directory, which is made if it is not there.

        Args:
            work: the directory. job: a fingerprint of all that decides the result; another one there is an error.
            prepare: called with a new directory, to reserve what will be written. overwrite: replace other unfinished work.
        """
        path = work / JOURNAL
        if work.exists():
            found = _read_journal(path)
            if found is not None and found[0] == job:
                file = open(path, "r+", encoding="utf-8")  # noqa: SIM115  (closed by __exit__)
                _only_one(file, work)
                file.truncate(found[2])
                file.seek(found[2])
                return cls(path, file, found[1])
            if not overwrite and found is not None:
                raise CheckpointError(
                    f"{work} holds unfinished work of another kind (other options or other input): "
                    "finish that, remove the directory, or pass overwrite (--overwrite)."
                )
            _check_own(work)
            shutil.rmtree(work)
        work.mkdir()
        try:
            prepare(work)
        except (LowpError, OSError):
            shutil.rmtree(work, ignore_errors=True)
            raise
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115  (closed by __exit__)
        _only_one(file, work)
        file.write(json.dumps({"job": job}) + "\n")
        file.flush()
        return cls(path, file, {})

    def finished(self, key: str, entry: dict[str, Any], paths: Sequence[Path], size: int) -> None:
        """Note a piece of work, `size` bytes written to `paths`; it enters the journal when they are durable."""
        self.waiting.append((paths, key, entry))
        self.written += size
        if self.written >= _DURABLE or time.monotonic() - self.last >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Make what is waiting durable, and say so."""
        for path in {path for paths, _, _ in self.waiting for path in paths}:
            files.sync(path)
        for _, key, entry in self.waiting:
            self.file.write(json.dumps({"done": key, **entry}) + "\n")
            self.done[key] = entry
        self.file.flush()
        os.fsync(self.file.fileno())
        self.waiting, self.written, self.last = [], 0, time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.flush()
        finally:
            self.file.close()


def _check_own(work: Path) -> None:
    """Nothing is removed that this file has not made."""
    strange = [
        p.name for p in work.iterdir() if p.name != JOURNAL and not any(fnmatch.fnmatch(p.name, one) for one in _OURS)
    ]
    if strange and not (work / JOURNAL).is_file():
        raise CheckpointError(
            f"{work} is wanted for unfinished work, got one that holds {strange[0]}: remove it yourself."
        )


def _read_journal(path: Path) -> tuple[str, dict[str, Mapping[str, Any]], int] | None:
    """The job, the finished work, and where the last whole line ends; None where there is no readable journal."""
    if not path.is_file():
        return None
    job, end = "", 0
    done: dict[str, Mapping[str, Any]] = {}
    for line in _whole_lines(path):
        try:
            entry = json.loads(line)
            if end == 0:
                job = str(entry["job"])
            else:
                done[str(entry.pop("done"))] = entry
        except (ValueError, KeyError, TypeError, AttributeError):
            break
        end += len(line)
    return (job, done, end) if job else None


def _whole_lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _only_one(file: IO[str], work: Path) -> None:
    """Refuse to work beside another process in the same directory."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise CheckpointError(
            f"{work} is being written by another process: wait for it, or choose another directory."
        ) from None
