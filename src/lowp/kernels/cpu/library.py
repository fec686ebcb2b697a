"""Load the C++ library, once, and say why it is not there.

It is compiled when lowp is installed (`native/CMakeLists.txt`), by any C++17 compiler, without torch: its operators are written
against torch's stable C interface, so one file serves every torch from 2.10 on. Loading it registers the operators.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from ...errors import KernelError

PATH = Path(__file__).parent / "built" / "lowp_cpu.so"


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not PATH.exists():
        return "wants lowp's C++ library, which was not built: install a C++ compiler (g++), then install lowp again"
    try:
        torch.ops.load_library(str(PATH))
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        return f"wants lowp's C++ library, which does not load: {error}"
    library.lowp_cpu_use.restype = ctypes.c_char_p
    library.lowp_cpu_use.argtypes = [ctypes.c_char_p]
    if library.lowp_cpu_use(b"") is None:
        return "wants a CPU with AVX2 and FMA, or AArch64, got an older one"
    return library


def missing() -> str:
    """ "" where the library runs here, else one sentence why not."""
    found = _library()
    return found if isinstance(found, str) else ""


def use(name: str = "") -> str:
    """Choose the instruction set of all products from now on, for tests and measurements; "" is the best that this CPU has.

    Args:
        name: "avx2", "avxvnni", "avx512vnni", "avx512bf16", "neon", "neondot" or "neoni8mm".

    Returns:
        The name in use.

    Raises:
        KernelError: this CPU lacks it, or the library is not there.
    """
    found = _library()
    if isinstance(found, str):
        raise KernelError(f"use: {found}.")
    chosen = found.lowp_cpu_use(name.encode())
    if chosen is None:
        raise KernelError(f"use wants an instruction set that this CPU has, got {name!r}.")
    return str(chosen.decode())
