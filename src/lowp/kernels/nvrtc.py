"""CUDA C++ kept as text, compiled at first use by NVRTC, kept on disk, launched through the driver.

torch for CUDA brings NVRTC along, and the driver is there wherever torch sees a GPU: no toolkit, no ABI, no wheel per version.

    source text + options --NVRTC--> cubin --disk--> module of a device --> function --> launch on torch's current stream

A cubin is named by a hash of the text, the options and the compiler's version, written under a temporary name and renamed. The
folder is that of `lowp.ops.tuned`; where none can be written, each process compiles anew.

A kernel takes one struct: its bytes are packed by the caller, so that a launch costs one call through ctypes.

Sources: NVRTC documentation, "Basic Usage"; CUDA Driver API, "Execution Control" and "Tensor Map Object Management".
"""

from __future__ import annotations

import ctypes
import functools
import glob
import hashlib
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import KernelError
from ..ops.tuned import cache_folder

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_BYTES, _TWO_BYTES = 0, 1  # CU_TENSOR_MAP_DATA_TYPE_UINT8, _UINT16: what is copied is not computed with
_SWIZZLE_128B, _L2_PROMOTION_256B = 3, 3


class _Missing(ImportError):
    """A library of the system or of torch that is not there."""


def _load(kind: type[ctypes.CDLL], *names: str) -> ctypes.CDLL:
    for name in names:
        try:
            return kind(name)
        except OSError:
            continue
    raise _Missing(f"none of {', '.join(names)} could be loaded", name=names[0])


@functools.cache
def _driver() -> ctypes.CDLL:
    # PyDLL keeps Python's lock during a call: the buffer of arguments cannot change under a launch.
    return _load(ctypes.PyDLL, "libcuda.so.1", "nvcuda.dll")


@functools.cache
def _compiler() -> ctypes.CDLL:
    major = (torch.version.cuda or "").partition(".")[0]
    packages = Path(torch.__file__).parents[1] / "nvidia"
    found = [Path(one) for one in sorted(glob.glob(str(packages / "*" / "lib" / "libnvrtc.so.*")))]
    lib = _load(ctypes.CDLL, f"libnvrtc.so.{major}", *map(str, found), "libnvrtc.so")
    for beside in (builtins for one in found for builtins in sorted(one.parent.glob("libnvrtc-builtins.so.*"))):
        ctypes.CDLL(str(beside))  # NVRTC looks for it by name, and pip's folder is not on the loader's path
    return lib


def missing_compiler() -> str:
    """An empty string where text can be compiled, else one sentence why not."""
    try:
        _compiler()
    except ImportError as error:
        return f"wants NVRTC, got: {error}"
    return ""


def missing() -> str:
    """An empty string where text can be compiled and launched, else one sentence why not."""
    if torch.version.cuda is None:
        return f"wants torch for CUDA, got torch {torch.__version__}"
    try:
        _driver()
    except ImportError as error:
        return f"wants the CUDA driver, got: {error}"
    return missing_compiler()


@functools.cache
def _compiler_version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _compiler().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_text(source: str, options: Sequence[str]) -> bytes:
    """CUDA C++ to a cubin, from the disk where the same text was compiled before.

    Raises:
        KernelError: the compiler refuses the text; its log is in the message.
    """
    key = hashlib.sha256("\0".join((source, *options, _compiler_version())).encode()).hexdigest()[:32]
    path = cache_folder() / "cubin" / f"{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    cubin = _compile(source, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)
    except OSError:
        pass  # no place to keep it
    return cubin


def _compile(source: str, options: Sequence[str]) -> bytes:
    lib, program = _compiler(), ctypes.c_void_p()
    lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"lowp.cu", 0, None, None)
    try:
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status, size = lib.nvrtcCompileProgram(program, len(options), words), ctypes.c_size_t()
        if status:
            lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            lib.nvrtcGetProgramLog(program, log)
            raise KernelError(f"NVRTC {_compiler_version()} refuses a kernel of lowp:\n{log.value.decode()[:4000]}")
        lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _check(status: int, what: str) -> None:
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(name))
        raise KernelError(f"{what}: the CUDA driver answers {status} ({(name.value or b'?').decode()}).")


@dataclass(frozen=True, kw_only=True, eq=False)
class Function:
    """A compiled kernel on one device. handle: CUfunction; threads: of a block; shared: dynamic shared memory in bytes."""

    handle: ctypes.c_void_p
    threads: int
    shared: int

    def launch(
        self, grid: tuple[int, int], params: ctypes.Array[ctypes.c_char], stream: int, early: bool = False
    ) -> None:
        """Run it on a stream; `params` holds the bytes of its one argument.

        early: it may begin while the kernel before it still runs. It must then wait (griddepcontrol.wait) before it reads what
        that one wrote, or writes anything.
        """
        config = _LOCAL.config
        config.grid_x, config.grid_y, config.threads, config.shared = *grid, self.threads, self.shared
        config.stream, config.attributes = stream, int(early)
        pointer = ctypes.c_void_p(ctypes.addressof(params))
        arguments = _LOCAL.config_at, self.handle, ctypes.byref(pointer), None
        status = _driver().cuLaunchKernelEx(*arguments)
        if status == _NO_CONTEXT:  # the first call on a thread: torch makes its context current
            torch.cuda.synchronize()
            status = _driver().cuLaunchKernelEx(*arguments)
        if status:
            _check(status, f"launch of {grid} blocks of {self.threads} threads")


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("name", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid_x", ctypes.c_uint), ("grid_y", ctypes.c_uint), ("grid_z", ctypes.c_uint),
        ("threads", ctypes.c_uint), ("threads_y", ctypes.c_uint), ("threads_z", ctypes.c_uint), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attribute", ctypes.POINTER(_Attribute)), ("attributes", ctypes.c_uint),
    )  # fmt: skip


class _Local(threading.local):
    """What a launch is told, for each thread its own."""

    def __init__(self) -> None:
        early = _Attribute(name=6, value=(1,))  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        self.config = _Config(grid_z=1, threads_y=1, threads_z=1, attribute=ctypes.pointer(early))
        self.config_at = ctypes.byref(self.config)


_LOCAL = _Local()


def load_function(cubin: bytes, name: str, *, device: int, threads: int, shared: int) -> Function:
    """Load a cubin on a device and find a kernel in it."""
    driver, module, handle = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # torch's context is current on this thread from here on
        torch.empty(1, device="cuda")
        _check(driver.cuModuleLoadData(ctypes.byref(module), cubin), f"loading {name}")
        _check(driver.cuModuleGetFunction(ctypes.byref(handle), module, name.encode()), f"finding {name}")
        _check(
            driver.cuFuncSetAttribute(handle, _MAX_DYNAMIC_SHARED, shared),
            f"{shared} bytes of shared memory for {name}",
        )
    return Function(handle=handle, threads=threads, shared=shared)


def tensor_map(x_MK: torch.Tensor, rows: int) -> bytes:
    """A CUtensorMap (128 bytes) of a contiguous matrix of 8- or 16-bit numbers, for boxes of rows x 128 bytes, swizzled so.

    What lies outside of the matrix reads as zero. The address, and the bytes of a row, must be multiples of 16.
    """
    buffer = ctypes.create_string_buffer(128 + 64)
    at, size = -ctypes.addressof(buffer) % 64, x_MK.element_size()
    kind, columns = (_BYTES, 128) if size == 1 else (_TWO_BYTES, 64)
    sizes = (ctypes.c_uint64 * 2)(x_MK.shape[1], x_MK.shape[0])
    strides = (ctypes.c_uint64 * 1)(x_MK.shape[1] * size)  # a single row may say any stride
    box, steps = (ctypes.c_uint32 * 2)(columns, rows), (ctypes.c_uint32 * 2)(1, 1)
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(buffer) + at), kind, 2, ctypes.c_void_p(x_MK.data_ptr()), sizes, strides, box, steps,
        0, _SWIZZLE_128B, _L2_PROMOTION_256B, 0,
    )  # fmt: skip
    _check(status, f"a tensor map of {tuple(x_MK.shape)} in boxes of {rows} x {columns}")
    return buffer.raw[at : at + 128]
