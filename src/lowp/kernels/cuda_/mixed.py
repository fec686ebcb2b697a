"""Weights in 1 to 8 bits times bf16, fp16 or e4m3 on Hopper's tensor cores: for every element, and for every batch.

    y_MN = x_MK @ ((qdata_NK - zero_point) * scale).T + bias_N

Where the scheme quantizes the activation to e4m3 by row, and the weight's elements are e4m3 numbers too, float8 tensor cores
multiply the codes, at twice the rate (`multiply8.cu`). Other activation formats are quantized and dequantized first: the same
meaning, with floats (`multiply16.cu`).

What depends on the batch M is decided here: the tile (how many tokens, how many rows), over how many blocks the columns are
split, and whether the weight is decoded once, to a workspace of at most 256 MiB, and cuBLAS multiplies. `tiling.py` lists what
may be chosen and chooses by rule; `lowp tune` measures instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
import struct
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import KernelError
from ...layouts import LAYOUTS, Spec
from ...layouts.base import Packed
from ...layouts.fragments import UNIT
from ...layouts.tiled import by_group, planes
from ...numerics import Format, Scheme, known_formats
from ...ops import tuned
from ...ops.cast import cast_interleaved, fake_cast
from ...ops.how import decoded, float_units, native, with_activation
from ...ops.linear import prescale
from ...ops.registry import Case, Kernel
from .. import nvrtc
from .tiling import WORKSPACE, Decoded, Tiling, by_decoding, candidates, decoded_from, plan, shared_bytes

_SCALES = {"bf16": 0, "fp16": 1, "fp32": 2, "e8m0": 3, "e4m3": 4}
_ZEROS = {"int8": 1, "uint8": 2, "bf16": 3, "fp16": 4, "fp32": 5}
_PARAMS = struct.Struct("128s11Q6i")  # as `Params` in fragments.cu
_TENSORS = ("scale", "zero_point", "scale_scale", "scale_zero_point")
_FOLDER = Path(__file__).parent


@functools.cache
def _numbers(scheme: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    """What fragments.cu is told about a weight format, by the names of its page."""
    fmt = Scheme.parse(scheme).weight
    element, widths = fmt.element, planes(fmt.element.bits)
    if fmt.nested:  # scales that are codes themselves
        scale = 4 if fmt.nested.element.kind == "float" else 5
    else:
        scale = _SCALES[str(fmt.scale)]
    return {
        "NPLANES": len(widths),
        **{f"PW{i}": widths[i] if i < len(widths) else 0 for i in range(3)},
        "KIND": {"int": 0, "float": 1, "codebook": 2}[element.kind],
        "SIGNED": int(element.signed),
        "EBITS": element.ebits,
        "EBIAS": element.bias,
        "GROUP": fmt.block_dims(shape)[1] if by_group(fmt) else 0,
        "SCALE": scale,
        "ZERO": _ZEROS[fmt.zero_point] if fmt.zero_point else 0,
        "F16": int(dtype == torch.float16),
        "X_BITS": 8 if _in_float8(scheme, shape) else 16,
    }


@functools.cache
def _file(name: str) -> str:
    return (_FOLDER / f"{name}.cu").read_text(encoding="utf-8")


def _wgmma(tokens: int, numbers: dict[str, int]) -> str:
    """The one instruction whose text depends on its size."""
    n, float8 = tokens // 2, numbers["X_BITS"] == 8
    kind = "e4m3" if float8 else "f16" if numbers["F16"] else "bf16"
    sums, a = ", ".join(f"%{i}" for i in range(n)), ", ".join(f"%{n + i}" for i in range(4))
    outputs, inputs = ", ".join(f'"+f"(d[{i}])' for i in range(n)), ", ".join(f'"r"(a[{i}])' for i in range(4))
    shape, signs = f"m64n{tokens}k{32 if float8 else 16}", "1, 1" if float8 else "1, 1, 0"
    return (
        f"DEVICE void wgmma(float (&d)[{n}], const u32 (&a)[4], u64 b, int accumulate) {{\n"
        f'  asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{n + 5}, 0;\\n"\n'
        f'    "wgmma.mma_async.sync.aligned.{shape}.f32.{kind}.{kind} {{{sums}}}, {{{a}}}, %{n + 4}, p, {signs}; }}"\n'
        f'    : {outputs} : {inputs}, "l"(b), "r"(accumulate));\n}}\n'
    )


def text_of(kernel: str, defines: dict[str, int]) -> str:
    """The whole text of a kernel: "product" or "weight"."""
    text = _file("fragments") + _file(kernel)
    if kernel != "product":
        return text
    return text.replace("//@MULTIPLY@", _wgmma(defines["BM"], defines) + _file(f"multiply{defines['X_BITS']}"))


def _compile(kernel: str, defines: dict[str, int]) -> bytes:
    options = ["--gpu-architecture=sm_90a", "--std=c++17", *(f"-D{name}={value}" for name, value in defines.items())]
    return nvrtc.compile_text(text_of(kernel, defines), options)


def compile_product(tiling: Tiling, numbers: dict[str, int]) -> bytes:
    """The cubin of a product."""
    sizes = {
        name: getattr(tiling, name.lower())
        for name in ("MT", "WGS", "BM", "KC", "STAGES", "SPLIT", "BLOCKS", "STREAM", "BAND")
    }
    return _compile("product", numbers | sizes)


def compile_decoder(numbers: dict[str, int]) -> bytes:
    """The cubin that decodes a whole weight."""
    sizes = {"MT": 1, "WGS": 1, "BM": 8, "KC": 1, "BAND": 1, "FROM_GLOBAL": 1}
    return _compile("weight", numbers | sizes)


Numbers = tuple[tuple[str, int], ...]


@functools.cache
def _product(tiling: Tiling, numbers: Numbers, device: int) -> nvrtc.Function:
    told = dict(numbers)
    return nvrtc.load_function(
        compile_product(tiling, told),
        "product",
        device=device,
        threads=tiling.threads,
        shared=shared_bytes(tiling, told),
    )


@functools.cache
def _decoder(numbers: Numbers, device: int) -> nvrtc.Function:
    told = dict(numbers)
    table = 32768 if told["KIND"] == 2 else 0
    return nvrtc.load_function(compile_decoder(told), "weight", device=device, threads=128, shared=table)


@functools.cache
def _table(scheme: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return Scheme.parse(scheme).weight.element.table(device).to(dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Weight:
    """What all weights of one scheme, shape, dtype and device have in common. It is its own key: compared by identity."""

    scheme: str
    shape: tuple[int, int]
    dtype: torch.dtype

    numbers: dict[str, int]
    key: Numbers
    table: int
    stride: int
    nest: int
    processors: int
    act: Format | None
    float8: bool  # the product's x is e4m3


@functools.cache
def _weight(scheme: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _Weight:
    parsed = Scheme.parse(scheme)
    fmt, numbers = parsed.weight, _numbers(scheme, shape, dtype)
    return _Weight(
        scheme=scheme,
        shape=(shape[0], shape[1]),
        dtype=dtype,
        numbers=numbers,
        key=tuple(numbers.items()),
        table=_table(scheme, dtype, device).data_ptr() if fmt.element.kind == "codebook" else 0,
        stride=0 if fmt.block == "tensor" else 1,
        nest=math.prod(fmt.nested.block_dims(fmt.scale_shape(shape))) if fmt.nested else 1,
        processors=torch.cuda.get_device_properties(device).multi_processor_count,
        act=parsed.act,
        float8=numbers["X_BITS"] == 8,
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _fill(
    x_map: bytes,
    packed: Packed,
    weight: _Weight,
    bias: Tensor | None,
    x_scale: Tensor | None,
    out: Tensor,
    partial: Tensor | None,
    left: Tensor | None,
    sizes: tuple[int, int, int],
    first: int = 0,
) -> None:
    """Write the one argument of a kernel, `Params` in fragments.cu."""
    tensors = (packed["qdata"], *(packed.get(name) for name in _TENSORS), bias)
    for name, address in zip(("qdata", "scale", "zero_point"), map(_address, tensors), strict=False):
        if address & 15:  # bulk copies start at multiples of 16 bytes
            raise KernelError(
                f"the mixed product wants {name} at a multiple of 16 bytes, got {address}: clone() the weight."
            )
    _PARAMS.pack_into(
        _LOCAL.arguments, 0, x_map, *map(_address, tensors), weight.table,
        *map(_address, (x_scale, out, partial, left)), *sizes, weight.stride, weight.nest, first,
    )  # fmt: skip


_MAPS: dict[tuple[int, int, int, int, torch.dtype], bytes] = {}  # tensor maps by address and size


class _Local(threading.local):
    """What a launch is written into, for each thread its own."""

    def __init__(self) -> None:
        buffer = ctypes.create_string_buffer(256 + 64)
        self.arguments = (ctypes.c_char * 256).from_buffer(buffer, -ctypes.addressof(buffer) % 64)


_LOCAL = _Local()


def _map_of(x_MK: Tensor, bm: int) -> bytes:
    key = (x_MK.data_ptr(), x_MK.shape[0], x_MK.shape[1], bm, x_MK.dtype)
    found = _MAPS.get(key)
    if found is None:
        if len(_MAPS) > 16384:
            _MAPS.clear()
        found = _MAPS[key] = nvrtc.tensor_map(x_MK, bm)
    return found


def product(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None, tiling: Tiling) -> Tensor:
    """The product by one tiling.

    Args:
        x_MK: bf16 or fp16, on CUDA. Where float8 is multiplied it is cast here; else it is contiguous, at an address of 16 bytes.
        bias: contiguous, of x's dtype.
    """
    (tokens, columns), dtype = x_MK.shape, x_MK.dtype
    rows, device = spec.shape[0], x_MK.device
    weight = _weight(spec.scheme, spec.shape, dtype, device)
    function = _product(tiling, weight.key, device.index)
    x_scale = partial = left = None
    if weight.float8:
        assert weight.act is not None
        x_MK, x_scale = cast_interleaved(x_MK, weight.act, packed.get("act_scale"), packed.get("act_pre_scale"))
    y_MN = torch.empty((tokens, rows), dtype=dtype, device=device)
    grid = tiling.grid(tokens, rows, columns, weight.processors)
    if tiling.stream:
        partial = torch.empty((grid, tiling.rows * tiling.bm), dtype=torch.float32, device=device)
        left = torch.zeros((grid, tiling.wgs), dtype=torch.int32, device=device)
    _fill(_map_of(x_MK, tiling.bm), packed, weight, bias, x_scale, y_MN, partial, left, (tokens, rows, columns))
    early = _unchanged(packed, dtype)
    function.launch((grid, 1), _LOCAL.arguments, torch._C._cuda_getCurrentRawStream(device.index), early)
    return y_MN


# Codes that a product has read, by identity, and what they were then.
_READ: dict[int, tuple[weakref.ref[Tensor], Any]] = {}


def _unchanged(packed: Packed, dtype: torch.dtype) -> bool:
    """Whether a product has read these very codes and scales before: then no kernel still at work is writing them, and the next
    product may begin while that one ends. Writes that torch does not count (`.data`, another library's) must be waited for."""
    qdata = packed["qdata"]
    if qdata.is_inference():  # it counts no writes
        return False
    now = (dtype, *(packed[name]._version for name in ("qdata", "scale", "zero_point") if name in packed))
    key = id(qdata)
    found = _READ.get(key)
    if found is not None and found[1] == now and found[0]() is qdata:
        return True
    if not torch.cuda.is_current_stream_capturing():  # what is captured was not read yet
        _READ[key] = weakref.ref(qdata, lambda _: _READ.pop(key, None)), now
    return False


def decode(packed: Packed, spec: Spec, dtype: torch.dtype, first: int = 0, out: Tensor | None = None) -> Tensor:
    """The weight (N, K) in `dtype`; or as many of its rows as `out` has, from `first` on, a multiple of 64."""
    rows, columns = spec.shape
    device = packed["qdata"].device
    weight = _weight(spec.scheme, spec.shape, dtype, device)
    function = _decoder(weight.key, device.index)
    w_NK = torch.empty((rows, columns), dtype=dtype, device=device) if out is None else out
    tiles = -(-w_NK.shape[0] // UNIT)
    pieces = min(columns // UNIT, max(1, -(-weight.processors * 16 // tiles)))
    _fill(bytes(128), packed, weight, None, None, w_NK, None, None, (0, first + w_NK.shape[0], columns), first // UNIT)
    function.launch((tiles, pieces), _LOCAL.arguments, torch._C._cuda_getCurrentRawStream(device.index), early=True)
    return w_NK


def _multiply_decoded(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None, rows: int) -> Tensor:
    """Decode so many rows at a time to a workspace and let cuBLAS multiply."""
    (every, columns), dtype = spec.shape, x_MK.dtype
    if rows >= every:
        return F.linear(x_MK, decode(packed, spec, dtype), bias)
    y_MN = torch.empty((x_MK.shape[0], every), dtype=dtype, device=x_MK.device)
    workspace = torch.empty((rows, columns), dtype=dtype, device=x_MK.device)
    with torch.no_grad():  # as every other way here; what writes to `out` refuses to be asked for gradients
        for first in range(0, every, rows):
            last = min(every, first + rows)
            w_NK = decode(packed, spec, dtype, first, workspace[: last - first])
            if bias is None:
                torch.mm(x_MK, w_NK.t(), out=y_MN[:, first:last])
            else:
                torch.addmm(bias[first:last], x_MK, w_NK.t(), out=y_MN[:, first:last])
    return y_MN


@tuned.kept
def _tiling(weight: _Weight, tokens: int) -> Tiling | Decoded:
    """What a batch runs by, what was measured or else the rule's."""
    measured = tuned.choice("mixed", tuned.key_of(weight.scheme, weight.dtype, weight.shape, tokens))
    if decoded := tuned.record_of(Decoded, measured):
        return decoded
    tiling = tuned.record_of(Tiling, measured)
    if tiling in candidates(tokens, weight.shape[1], weight.numbers):  # another version may have had others
        return tiling
    return plan(tokens, *weight.shape, weight.numbers, weight.processors)


def _candidates(case: Case, tokens: int) -> list[dict[str, Any]]:
    """For `lowp tune`: every tiling, and decoding first."""
    numbers = _numbers(case.scheme, case.shape, getattr(torch, case.dtype))
    rows, columns = case.shape
    found: list[Tiling | Decoded] = [*candidates(tokens, columns, numbers), by_decoding(rows, columns)]
    return [dataclasses.asdict(one) for one in found]


def _in_float8(scheme: str, shape: tuple[int, ...]) -> bool:
    """Whether float8 tensor cores multiply: elements that e4m3 holds, scales that are floats, of rows or of whole k32 columns."""
    parsed = Scheme.parse(scheme)
    weight, act = parsed.weight, parsed.act
    if str(act) != "e4m3/row" or weight.nested or weight.zero_point or shape[-1] % 128 or shape[-1] < 512:
        return False  # with fewer columns no tiling has two turns
    element = weight.element
    exact = max(abs(element.min), abs(element.max)) <= 16 if element.kind == "int" else element.name in _WITHIN_E4M3
    columns = weight.block_dims(shape)[1] if by_group(weight) else 128
    return exact and (columns in (32, 64) or columns % 128 == 0)


_WITHIN_E4M3 = ("e2m1", "e2m3", "e3m2", "e4m3")


# -- the op -----------------------------------------------------------------------------------------------------------


def _linear(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None) -> Tensor:
    tokens, dtype = x_MK.shape[0], x_MK.dtype
    if tokens == 0:
        return x_MK.new_empty((0, spec.shape[0]))
    device = x_MK.device
    for name, tensor in (("a weight", packed["qdata"]), ("a bias", bias)):
        if tensor is not None and tensor.device != device:
            raise KernelError(
                f"linear wants {name} on {device}, where x is, got one on {tensor.device}: move it with .to()."
            )
    with torch.cuda.device(device) if device.index != torch.cuda.current_device() else contextlib.nullcontext():
        weight = _weight(spec.scheme, spec.shape, dtype, device)
        tiling = _tiling(weight, tokens)
        if bias is not None and (bias.dtype is not dtype or not bias.is_contiguous()):
            bias = bias.to(dtype).contiguous()
        if isinstance(tiling, Decoded):
            return _multiply_decoded(_floats(x_MK, packed, weight), packed, spec, bias, tiling.decoded_rows)
        return product(x_MK if weight.float8 else _floats(x_MK, packed, weight), packed, spec, bias, tiling)


def _floats(x_MK: Tensor, packed: Packed, weight: _Weight) -> Tensor:
    """What a product of floats multiplies: pre-scaled, quantized and dequantized where the scheme says so, contiguous."""
    if weight.act is not None:
        x_MK = fake_cast(x_MK, weight.act, packed.get("act_scale"), packed.get("act_pre_scale"))
    elif "act_pre_scale" in packed:
        x_MK = prescale(x_MK, packed)
    if not x_MK.is_contiguous() or x_MK.data_ptr() % 16:
        x_MK = x_MK.clone(memory_format=torch.contiguous_format)
    return x_MK


_OPS = torch.library.Library("lowp", "FRAGMENT")
_OPS.define("mixed(Tensor x, Tensor[] packed, str names, Tensor? bias, str scheme, int[] shape) -> Tensor")


def _op(x_MK: Tensor, tensors: list[Tensor], names: str, bias: Tensor | None, scheme: str, shape: list[int]) -> Tensor:
    spec = Spec(scheme=scheme, layout="fragments", shape=tuple(shape))
    return _linear(x_MK, dict(zip(names.split(","), tensors, strict=True)), spec, bias)


_OPS.impl("mixed", _op, "CUDA")
torch.library.register_fake(
    "lowp::mixed", lambda x, packed, names, bias, scheme, shape: x.new_empty((x.shape[0], shape[0])), lib=_OPS
)


def _run(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None) -> Tensor:
    if type(x_MK) is Tensor and not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0:
        return _linear(
            x_MK, packed, spec, bias
        )  # nobody traces: the op's own way round would cost more than the launch
    return torch.ops.lowp.mixed(x_MK, list(packed.values()), ",".join(packed), bias, spec.scheme, list(spec.shape))


@functools.cache
def _compiler_missing() -> str:
    return nvrtc.missing()


def _why_not_scheme(scheme: Scheme) -> str:
    weight, act = scheme.weight, scheme.act
    if not by_group(weight) and (weight.zero_point or weight.scale not in ("fp32", "bf16", "fp16")):
        return f"wants scales of rows that are floats, and no zero point beside them, got {weight}"
    if act is not None and weight.element.bits == 8 and not by_group(weight) and act.block in ("row", "tensor"):
        return f"wants weights below 8 bits or with scales of groups where activations are quantized too, got {scheme}"
    if weight.nested and not _reads_nested(weight.nested):
        return f"wants scales that are floats, e4m3/tensor, or signed integers in blocks of one row, got {weight}"
    if weight.zero_point and weight.zero_point not in _ZEROS:
        return f"wants a zero point in {', '.join(_ZEROS)}, got {weight}"
    return ""


def _reads_nested(nested: Format) -> bool:
    """Whether fragments.cu reads a scale that is itself quantized so: SCALE 4 or 5 there."""
    if nested.element.kind == "float":
        return nested.element.name == "e4m3" and nested.block == "tensor"
    return bool(nested.zero_point) and nested.element.name == "int8" and not nested.block.partition("x")[0].strip("1")


def _why_not(case: Case) -> str:
    if case.device != "cuda":
        return f"wants cuda, got {case.device}"
    if case.sm != 90:
        return f"wants sm90, got sm{case.sm}"
    if case.dtype not in ("bfloat16", "float16"):
        return f"wants bfloat16 or float16 activations, got {case.dtype}"
    if len(case.shape) != 2:
        return f"wants a matrix, got shape {case.shape}"
    return _why_not_scheme(Scheme.parse(case.scheme)) or _compiler_missing()


def _how(case: Case) -> str:
    if _in_float8(case.scheme, case.shape):
        return native(case, f"{decoded(case, 'in registers', 'e4m3')}, float8 tensor cores")
    rows, columns = case.shape
    least = decoded_from(rows, columns, _numbers(case.scheme, case.shape, getattr(torch, case.dtype)))
    many = f"; from {least} tokens on once, to at most {WORKSPACE >> 20} MiB, for cuBLAS" if least else ""
    return with_activation(case, f"{decoded(case, 'in registers')}, {float_units(case)}{many}")


def _cases() -> tuple[str, ...]:
    schemes = [(known.spelling, Scheme.parse(known.spelling)) for known in known_formats()]
    fits = LAYOUTS["fragments"].why_not
    return tuple(name for name, one in schemes if not fits(one.weight, (256, 256), "cuda") and not _why_not_scheme(one))


KERNELS = (
    Kernel(
        op="linear",
        name="mixed",
        rank=50,
        layout="fragments",
        why_not=_why_not,
        run=_run,
        how=_how,
        about="decoded in registers, between Hopper's copy engine and its tensor cores (CUDA text)",
        cases=_cases(),
        candidates=_candidates,
    ),
)
