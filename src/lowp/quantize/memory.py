"""How much memory is in use now: what `max_ram` and `max_vram` are held against.

On a CPU it is the process's resident set, as /proc has it; on a GPU what torch has allocated there. Memory that was freed but is
kept by C's allocator for later counts as resident, so it is given back before it is counted.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from ..errors import SpellingError

_UNITS = ("", "K", "M", "G", "T")  # each a thousand of the one before; with an i, as in GiB, 1024


def in_use(device: torch.device) -> int:
    """Bytes in use on a device; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    _give_back()
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.is_file() else 0


def has_room(tensor: Tensor, limit: int | None) -> bool:
    """Whether a copy of a tensor leaves at least half of its device free; limit: bytes that may be in use there."""
    if tensor.device.type != "cuda":
        return True
    whole = torch.cuda.get_device_properties(tensor.device).total_memory
    return torch.cuda.memory_allocated(tensor.device) + tensor.nbytes <= min(whole, limit or whole) // 2


def _give_back() -> None:
    """Free pages back to the system, where the C library can (glibc)."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, or none to ask (Windows)
        return
    trim(ctypes.c_size_t(0))


def bytes_of(given: int | float | str | None, name: str) -> int | None:
    """A number of bytes, or a spelling such as "2GB" or "800M".

    >>> bytes_of("1.5GB", "max_ram")
    1500000000
    """
    if given is None or isinstance(given, (int, float)):
        return None if given is None else int(given)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", given, re.IGNORECASE)
    if match is None:
        raise SpellingError(f"{name} wants a number of bytes or a spelling such as '2GB', got {given!r}.")
    power = list(_UNITS).index(match[2].upper())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
