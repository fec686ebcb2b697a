"""The hidden states of the calibration set between two blocks: in memory, or in files where they would not fit.

In memory they lie where the blocks run while that device is less than half full, and with the host beyond that.

One block reads what the block before it has written. In files the two never overlap: blocks read `hidden-0.bin` and write
`hidden-1.bin`, then the other way round, so that a run that is killed finds the input of the block it was in. Reads and writes
are plain ones, a batch at a time: what is resident is one batch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from . import shards as files
from .memory import has_room


class Activations:
    """One tensor a batch, with a shape and dtype of its own.

    Args:
        folder: where the files go; None keeps all in memory. limit: bytes that may be in use on the device that blocks run on.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder, self.limit = folder, limit
        self._kept: tuple[dict[int, Tensor], dict[int, Tensor]] = (
            {},
            {},
        )  # what is read and what is written take turns
        self._shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._next: dict[int, tuple[tuple[int, ...], torch.dtype]] = {}
        self._current = 0

    def __len__(self) -> int:
        return len(self._shapes)

    def append(self, hidden: Tensor) -> None:
        """Add the next batch's, before the first block."""
        self._shapes.append((tuple(hidden.shape), hidden.dtype))
        if self.folder is None:
            self._kept[self._current][len(self) - 1] = self._copy(hidden)
        else:
            with open(self._path(self._current), "wb" if len(self) == 1 else "ab") as file:
                file.write(files.as_bytes(hidden))

    def read(self, index: int, device: torch.device | str) -> Tensor:
        """What goes into the block, in memory of its own: a block may work in place."""
        if self.folder is None:
            return self._kept[self._current][index].to(device, copy=True)
        shape, dtype = self._shapes[index]
        data = files.read_bytes(self._path(self._current), self._offset(index), self._bytes(index))
        return data.view(dtype).view(shape).to(device)

    def write(self, index: int, hidden: Tensor) -> None:
        """What comes out of the block; in the order of the batches. The block goes on reading its own input."""
        self._next[index] = (tuple(hidden.shape), hidden.dtype)
        if self.folder is None:
            self._kept[1 - self._current][index] = self._copy(hidden)
            return
        with open(self._path(1 - self._current), "wb" if index == 0 else "ab") as file:
            file.write(files.as_bytes(hidden))

    def _copy(self, hidden: Tensor) -> Tensor:
        """In memory of its own, where there is room."""
        return hidden.detach().to(hidden.device if has_room(hidden, self.limit) else "cpu", copy=True)

    def turn(self) -> None:
        """What was written is read from now on."""
        if self.folder is not None:
            files.sync(self._path(1 - self._current))
        self._kept[self._current].clear()
        self._shapes = [self._next.get(index, shape) for index, shape in enumerate(self._shapes)]
        self._current, self._next = 1 - self._current, {}

    def resume(self, blocks: int) -> None:
        """Go on behind so many blocks, from the files of an earlier run."""
        self._current = blocks % 2

    def remember(self, shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
        """The shapes of an earlier run."""
        self._shapes = shapes

    @property
    def shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each batch."""
        return list(self._shapes)

    def remove(self) -> None:
        """Delete the files."""
        if self.folder is not None:
            for path in (self._path(0), self._path(1)):
                path.unlink(missing_ok=True)

    def _path(self, which: int) -> Path:
        assert self.folder is not None
        return self.folder / f"hidden-{which}.bin"

    def _bytes(self, index: int) -> int:
        shape, dtype = self._shapes[index]
        return torch.Size(shape).numel() * dtype.itemsize

    def _offset(self, index: int) -> int:
        return sum(self._bytes(i) for i in range(index))
