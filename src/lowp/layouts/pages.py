"""Packed weights on huge pages of memory, for products that stream them.

A product of few tokens reads each byte of a weight once, as fast as memory gives it. Behind pages of 4 KB that is not as fast as
it can be: every page wants an entry of its own in the tables of addresses (more than the processor holds), and the fetching ahead
that the hardware does ends at its edge. On pages of 2 MB a core reads a fifth to a third more a second.

Linux gives them to fresh anonymous memory that asks (`madvise(MADV_HUGEPAGE)`; the setting "madvise" or "always" of
`/sys/kernel/mm/transparent_hugepage/enabled`), where an aligned piece of 2 MB is mapped whole. So all tensors of a weight go into
one mapping, side by side; each is a tensor with a storage of its own, and the memory goes when the last one does. Where there is
nothing to gain (small weights, other devices, other systems, a kernel without huge pages, a limit on memory that is reached) the
tensors stay where they are.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from .base import Packed

_HUGE = 1 << 21
_LINE = 64
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)
# A piece of a page at the end becomes a whole one where at least so much of it is used: at most a quarter of a page is lost.
_WORTH = _HUGE * 3 // 4


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _LINE) * _LINE


def _mapping(size: int) -> tuple[mmap.mmap, int]:
    """Fresh memory that holds `size` bytes from an edge of a huge page on, and where in it that edge is.

    Raises:
        OSError: the system has no such memory, or no huge pages.
    """
    whole = mmap.mmap(-1, -(-size // _HUGE) * _HUGE + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(whole, dtype=torch.uint8).data_ptr() % _HUGE
    pages = size // _HUGE + (size % _HUGE >= _WORTH)
    whole.madvise(_ADVICE, start, pages * _HUGE)  # type: ignore[arg-type]
    return whole, start


def on_huge_pages(packed: Packed) -> Packed:
    """The same contiguous tensors in memory of huge pages, where they are on a CPU and fill one together.

    >>> on_huge_pages({"qdata": torch.zeros(4)})["qdata"]
    tensor([0., 0., 0., 0.])
    """
    size = sum(map(_room, packed.values()))
    plain = all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in packed.values())
    if _ADVICE is None or size < _HUGE or not plain:
        return packed
    try:
        memory, place = _mapping(size)
    except OSError:
        return packed
    moved: Packed = {}
    for name, tensor in packed.items():
        moved[name] = tensor
        if tensor.numel():
            storage = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=place).untyped_storage()
            moved[name] = tensor.new_empty(0).set_(storage, 0, tensor.shape, tensor.stride()).copy_(tensor)
            place += _room(tensor)
    return moved
