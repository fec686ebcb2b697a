"""Weights in 1 to 8 bits times bf16 or fp16 on Hopper's tensor cores: for every element, and for every batch.

    y_MN = x_MK @ ((qdata_NK - zero_point) * scale).T + bias_N

Where the scheme quantizes the activation too, x is quantized and dequantized first: the same meaning, in the same kernel.

What depends on the batch M is decided here: the tile (how many tokens, how many rows), over how many blocks the columns are
split, and from where on the weight is decoded once, to a workspace, and cuBLAS multiplies. `candidates` lists what may be chosen,
`choose` says what is, by a model of the time: bytes over bandwidth, products over the rate of the tensor cores, rounds of tiles.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layouts import LAYOUTS, Spec
from ...layouts.base import Packed
from ...layouts.fragments import UNIT, by_group, planes
from ...numerics import Scheme, known_formats
from ...ops import tuned
from ...ops.linear import act_values, prescale
from ...ops.registry import Case, Kernel
from .. import nvrtc

_SCALES = {"bf16": 0, "fp16": 1, "fp32": 2, "e8m0": 3}
_ZEROS = {"int8": 1, "uint8": 2, "bf16": 3, "fp16": 4, "fp32": 5}
_SHARED = 227 * 1024  # of one block, on sm90
_SHARED_OF_SM = 228 * 1024
_PARAMS = struct.Struct("128s10Q5i")  # as `Params` in fragments.cu
_FOLDER = Path(__file__).parent
_OUT_PITCH = 72 * 2  # bytes between tokens, as OUT_PITCH in fragments.cu


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a product is cut.

    Args:
        mt: tiles of 64 rows of a warpgroup. wgs: warpgroups that multiply. bm: tokens of a tile. kc: chunks of 64 columns of a stage.
        stages: of the pipeline. split: blocks of a cluster that share the columns of a tile. blocks: resident on one processor.
        stream: 1 where what does not fill a last round of tiles is cut into equal parts for all blocks. band: see tile_at in fragments.cu.
    """

    mt: int = 1
    wgs: int = 1
    bm: int = 8
    kc: int = 4
    stages: int = 4
    split: int = 1
    blocks: int = 1
    stream: int = 0
    band: int = 16

    @property
    def rows(self) -> int:
        """Rows of the weight of a block."""
        return 64 * self.mt * self.wgs

    @property
    def threads(self) -> int:
        """Of a block, as THREADS in product.cu."""
        return 128 * self.wgs + (128 if self.wgs == 2 and self.mt * self.bm >= 128 else 32)

    def grid(self, tokens: int, rows: int, columns: int, processors: int) -> int:
        """Number of blocks; where they stream each gets at least four turns of two chunks."""
        tiles = -(-rows // self.rows) * -(-tokens // self.bm)
        if self.stream:
            return max(1, min(processors, tiles * columns // 512))
        return tiles * self.split if self.split > 1 else min(tiles, processors * self.blocks)


@functools.cache
def _numbers(scheme: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    """What fragments.cu is told about a weight format, by the names of its page."""
    fmt = Scheme.parse(scheme).weight
    element, widths = fmt.element, planes(fmt.element.bits)
    nested = fmt.nested
    scale = (
        (4 if nested.element.kind == "float" else 5)
        if nested
        else 4
        if fmt.scale == "e4m3"
        else _SCALES[str(fmt.scale)]
    )
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
    }


def _bytes(tiling: Tiling, numbers: dict[str, int]) -> tuple[int, int]:
    """Dynamic shared memory of a block: of one stage, and of all else. As the constants of product.cu."""
    bits, group = numbers["PW0"] + numbers["PW1"] + numbers["PW2"], numbers["GROUP"]
    scale = (2, 2, 4, 1, 1, 1)[numbers["SCALE"]] + (0, 1, 1, 2, 2, 4)[numbers["ZERO"]]
    groups = 0 if not group else max(1, 64 * tiling.kc // group)
    codes = tiling.mt * tiling.wgs * (tiling.kc * 512 * bits + groups * 64 * scale)
    table, out = 32768 if numbers["KIND"] == 2 else 0, tiling.wgs * min(tiling.bm, 64) * _OUT_PITCH
    return -(-(tiling.kc * tiling.bm * 128 + codes) // 1024) * 1024, 1024 + table + (out if tiling.split == 1 else 0)


def shared_bytes(tiling: Tiling, numbers: dict[str, int]) -> int:
    """Dynamic shared memory of a block."""
    stage, rest = _bytes(tiling, numbers)
    sums = tiling.bm * (tiling.rows + 4) * 4 if tiling.split > 1 else 0
    return rest + max(tiling.stages * stage, sums)


_SHAPES = (  # mt, wgs, kc, most stages, blocks on a processor: for up to so many tokens in a tile
    (16, ((1, 1, 4, 4, 4), (1, 2, 4, 4, 2), (2, 1, 4, 4, 3))),
    (64, ((1, 1, 2, 4, 3), (1, 2, 2, 4, 2), (2, 2, 2, 4, 1))),
    (128, ((1, 2, 2, 4, 1), (2, 2, 1, 6, 1))),
    (256, ((1, 2, 1, 6, 1),)),
)


def candidates(tokens: int, columns: int, numbers: dict[str, int]) -> list[Tiling]:
    """Tilings worth asking about for a batch: the smallest tile that holds it, and for large batches those below."""
    holds = min(256, max(8, 1 << (tokens - 1).bit_length()))
    found = []
    for bm in (holds,) if holds <= 32 else (holds, holds // 2) if holds <= 128 else (256, 128, 64):
        for mt, wgs, kc, most, blocks in next(shapes for limit, shapes in _SHAPES if bm <= limit):
            for split in (0, 1) if bm > 64 else (1, 2, 4, 8):  # 0: streamed
                tiling = Tiling(
                    mt=mt, wgs=wgs, bm=bm, kc=kc, stages=2, split=max(split, 1), blocks=blocks, stream=int(not split), band=4 if bm == 256 else 16
                )  # fmt: skip
                fitted = _fitted(tiling, most, columns, numbers)
                if fitted is not None:
                    found.append(fitted)
    return found


def _fitted(tiling: Tiling, most: int, columns: int, numbers: dict[str, int]) -> Tiling | None:
    """The tiling with as many stages as fit, or None where it does not suit these columns."""
    chunks, group = columns // 64, numbers["GROUP"]
    while tiling.kc > 1 and (chunks % tiling.kc or (group and group % (64 * tiling.kc) and (64 * tiling.kc) % group)):
        tiling = dataclasses.replace(tiling, kc=tiling.kc // 2)
    turns = 2 if tiling.mt == 1 and tiling.kc == 1 else 1
    if chunks % (tiling.kc * turns) or chunks // (tiling.kc * turns) < 2 * tiling.split:
        return None
    stage, rest = _bytes(tiling, numbers)
    for blocks in range(tiling.blocks, 0, -1):
        stages = min(most, ((_SHARED_OF_SM // blocks - 1024 if blocks > 1 else _SHARED) - rest) // stage)
        fitted = dataclasses.replace(tiling, stages=stages, blocks=blocks)
        if stages >= min(3, most) and shared_bytes(fitted, numbers) <= _SHARED:
            return fitted
    return None


@functools.cache
def _file(name: str) -> str:
    return (_FOLDER / f"{name}.cu").read_text(encoding="utf-8")


def _wgmma(tokens: int, f16: int) -> str:
    """The one instruction whose text depends on its size."""
    n, kind = tokens // 2, "f16" if f16 else "bf16"
    sums, a = ", ".join(f"%{i}" for i in range(n)), ", ".join(f"%{n + i}" for i in range(4))
    outputs, inputs = ", ".join(f'"+f"(d[{i}])' for i in range(n)), ", ".join(f'"r"(a[{i}])' for i in range(4))
    return (
        f"DEVICE void wgmma(float (&d)[{n}], const u32 (&a)[4], u64 b, int accumulate) {{\n"
        f'  asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{n + 5}, 0;\\n"\n'
        f'    "wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{kind}.{kind} {{{sums}}}, {{{a}}}, %{n + 4}, p, 1, 1, 0; }}"\n'
        f'    : {outputs} : {inputs}, "l"(b), "r"(accumulate));\n}}\n'
    )


def text_of(kernel: str, defines: dict[str, int]) -> str:
    """The whole text of a kernel: "product" or "weight"."""
    return _file("fragments") + _file(kernel).replace("//@WGMMA@", _wgmma(defines["BM"], defines["F16"]))


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


def compile_decoder(numbers: dict[str, int], e4m3: bool) -> bytes:
    """The cubin that decodes a whole weight."""
    sizes = {"MT": 1, "WGS": 1, "BM": 8, "KC": 1, "BAND": 1, "FROM_GLOBAL": 1, "E4M3": int(e4m3)}
    return _compile("weight", numbers | sizes)


@functools.cache
def _product(tiling: Tiling, scheme: str, shape: tuple[int, ...], dtype: torch.dtype, device: int) -> nvrtc.Function:
    numbers = _numbers(scheme, shape, dtype)
    return nvrtc.load_function(
        compile_product(tiling, numbers),
        "product",
        device=device,
        threads=tiling.threads,
        shared=shared_bytes(tiling, numbers),
    )


@functools.cache
def _decoder(scheme: str, shape: tuple[int, ...], dtype: torch.dtype, e4m3: bool, device: int) -> nvrtc.Function:
    numbers = _numbers(scheme, shape, torch.float16 if e4m3 else dtype)
    if e4m3:
        numbers = numbers | {"GROUP": 0}
    return nvrtc.load_function(compile_decoder(numbers, e4m3), "weight", device=device, threads=128, shared=0)


@functools.cache
def _table(scheme: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return Scheme.parse(scheme).weight.element.table(device).to(dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Weight:
    """What all weights of one scheme, shape, dtype and device have in common, and the tilings chosen so far."""

    numbers: dict[str, int]
    table: int
    stride: int
    nest: int
    chip: Chip
    quantized_input: bool
    chosen: dict[int, Tiling | None]


@functools.cache
def _weight(scheme: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _Weight:
    parsed = Scheme.parse(scheme)
    fmt = parsed.weight
    return _Weight(
        numbers=_numbers(scheme, shape, dtype),
        table=_table(scheme, dtype, device).data_ptr() if fmt.element.kind == "codebook" else 0,
        stride=0 if fmt.block == "tensor" else 1,
        nest=math.prod(fmt.nested.block_dims(fmt.scale_shape(shape))) if fmt.nested else 1,
        chip=Chip.of(device),
        quantized_input=parsed.act is not None,
        chosen={},
    )


def _pointer(packed: Packed, name: str) -> int:
    return packed[name].data_ptr() if name in packed else 0


_MAPS: dict[tuple[int, int, int, int], bytes] = {}  # tensor maps by address and size
_BUFFER = ctypes.create_string_buffer(256 + 64)
_ARGUMENTS = (ctypes.c_char * 256).from_buffer(_BUFFER, -ctypes.addressof(_BUFFER) % 64)


def _map_of(x_MK: Tensor, bm: int) -> bytes:
    key = (x_MK.data_ptr(), x_MK.shape[0], x_MK.shape[1], bm if x_MK.dtype is torch.bfloat16 else -bm)
    found = _MAPS.get(key)
    if found is None:
        if len(_MAPS) > 16384:
            _MAPS.clear()
        found = _MAPS[key] = nvrtc.tensor_map(x_MK, bm, UNIT)
    return found


def product(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None, tiling: Tiling) -> Tensor:
    """The product by one tiling. x_MK, bias: contiguous, of one dtype, bf16 or fp16, on CUDA; x_MK at an address of 16 bytes."""
    tokens, columns = x_MK.shape
    rows, device = spec.shape[0], x_MK.device
    weight = _weight(spec.scheme, spec.shape, x_MK.dtype, device)
    function = _product(tiling, spec.scheme, spec.shape, x_MK.dtype, device.index)
    y_MN = torch.empty((tokens, rows), dtype=x_MK.dtype, device=device)
    grid = tiling.grid(tokens, rows, columns, weight.chip.processors)
    partial = left = None
    if tiling.stream:
        partial = torch.empty((grid, tiling.rows * tiling.bm), dtype=torch.float32, device=device)
        left = torch.zeros((grid, tiling.wgs), dtype=torch.int32, device=device)
    _PARAMS.pack_into(
        _ARGUMENTS, 0, _map_of(x_MK, tiling.bm), packed["qdata"].data_ptr(), _pointer(packed, "scale"), _pointer(packed, "zero_point"),
        _pointer(packed, "scale_scale"), _pointer(packed, "scale_zero_point"), 0 if bias is None else bias.data_ptr(), weight.table,
        y_MN.data_ptr(), 0 if partial is None else partial.data_ptr(), 0 if left is None else left.data_ptr(), tokens, rows, columns,
        weight.stride, weight.nest,
    )  # fmt: skip
    function.launch((grid, 1), _ARGUMENTS, torch._C._cuda_getCurrentRawStream(device.index))
    return y_MN


def decode(packed: Packed, spec: Spec, dtype: torch.dtype, e4m3: bool = False) -> Tensor:
    """The weight (N, K) in `dtype`, or its elements without scales in e4m3."""
    rows, columns = spec.shape
    device = packed["qdata"].device
    weight = _weight(spec.scheme, spec.shape, dtype, device)
    function = _decoder(spec.scheme, spec.shape, dtype, e4m3, device.index)
    w_NK = torch.empty((rows, columns), dtype=torch.float8_e4m3fn if e4m3 else dtype, device=device)
    tiles = -(-rows // UNIT)
    pieces = min(columns // UNIT, max(1, -(-weight.chip.processors * 16 // tiles)))
    _PARAMS.pack_into(
        _ARGUMENTS, 0, bytes(128), packed["qdata"].data_ptr(), _pointer(packed, "scale"), _pointer(packed, "zero_point"),
        _pointer(packed, "scale_scale"), _pointer(packed, "scale_zero_point"), 0, weight.table, w_NK.data_ptr(), 0, 0, 0, rows, columns,
        weight.stride, weight.nest,
    )  # fmt: skip
    function.launch((tiles, pieces), _ARGUMENTS, torch._C._cuda_getCurrentRawStream(device.index))
    return w_NK


# -- what is chosen ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A processor as the model of the time sees it. bandwidth: bytes a second; processors: multiprocessors."""

    processors: int = 132
    bandwidth: float = 3.0e12

    @staticmethod
    def of(device: torch.device) -> Chip:
        """The GPU at hand: 0.92 of what its memory's clock and width promise is what reading reaches."""
        found = torch.cuda.get_device_properties(device)
        promised = 2e3 * getattr(found, "memory_clock_rate", 2_619_000) * getattr(found, "memory_bus_width", 5120) / 8
        return Chip(processors=found.multi_processor_count, bandwidth=0.92 * promised)


def estimate_us(
    tiling: Tiling | None, tokens: int, shape: tuple[int, int], numbers: dict[str, int], chip: Chip
) -> float:
    """A model of the time of a product, in microseconds; None: decode once, then cuBLAS. Good for choosing, not for promising."""
    rows, columns = shape
    bits = numbers["PW0"] + numbers["PW1"] + numbers["PW2"]
    weight_bytes = rows * columns * bits / 8
    if tiling is None:
        cublas = max(2 * tokens * rows * columns / _CUBLAS, 2 * rows * columns / chip.bandwidth)
        return 1e6 * ((weight_bytes + 2 * rows * columns) / (_DECODES * chip.bandwidth) + cublas) + 6
    chunks, tiles = columns / UNIT, -(-rows // tiling.rows) * -(-tokens // tiling.bm)
    # Cycles of a chunk of one block: tensor cores, reading from the L2 cache, decoding.
    multiply = tiling.rows * tiling.bm / 32 / _TENSOR
    read = (tiling.bm * 128 + tiling.rows * 8 * bits) / _L2_BYTES
    work = tiling.rows / 64 * _DECODE_CYCLES
    cycles = max(multiply, read, work)
    share = tiles / chip.processors if tiling.stream else -(-tiles * tiling.split // chip.processors) / tiling.split
    alone = chunks / tiling.split * (_LATENCY + work)  # a block cannot be faster than its chain of stages
    of_processor = share * chunks * cycles
    ends = (
        _START
        + (_ADD * tiling.bm * tiling.rows if tiling.split > 1 or tiling.stream else 0)
        + _STORE * tiling.bm * tiling.rows * math.ceil(share)
    )
    memory = weight_bytes / chip.bandwidth * 1e6
    return max(max(of_processor, 0 if tiling.stream else alone) / _MHZ, memory) + ends / _MHZ


# Found by fitting `estimate_us` to sweeps on an H100 (benchmarks/results/linear_gpu.csv is what came of it).
_MHZ = 1700.0
_TENSOR = 0.85
_L2_BYTES = 30.0
_DECODE_CYCLES = 130.0
_LATENCY = 120.0
_START = 6000.0
_ADD = 0.05
_STORE = 0.05
_CUBLAS = 7.9e14
_DECODES = 0.78


def _chosen(weight: _Weight, spec: Spec, dtype: torch.dtype, tokens: int) -> Tiling | None:
    measured = tuned.choice("mixed", tuned.key_of(spec.scheme, dtype, spec.shape, tokens))
    if measured is not None:
        return None if measured.get("decode") else Tiling(**measured)
    if tokens not in weight.chosen:
        shape = (spec.shape[0], spec.shape[1])
        found = [*candidates(tokens, shape[1], weight.numbers), None]
        weight.chosen[tokens] = min(found, key=lambda one: estimate_us(one, tokens, shape, weight.numbers, weight.chip))
    return weight.chosen[tokens]


def _candidates(case: Case, tokens: int) -> list[dict[str, Any]]:
    """For `lowp tune`: every tiling, and decoding first."""
    numbers = _numbers(case.scheme, case.shape, getattr(torch, case.dtype))
    return [*(dataclasses.asdict(one) for one in candidates(tokens, case.shape[1], numbers)), {"decode": True}]


# -- the op -----------------------------------------------------------------------------------------------------------


def _linear(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None) -> Tensor:
    tokens, dtype = x_MK.shape[0], x_MK.dtype
    if tokens == 0:
        return x_MK.new_empty((0, spec.shape[0]))
    weight = _weight(spec.scheme, spec.shape, dtype, x_MK.device)
    if weight.quantized_input:
        x_MK = act_values(x_MK, packed, spec, torch.float32).to(dtype)
    elif "act_pre_scale" in packed:
        x_MK = prescale(x_MK, packed)
    if bias is not None and (bias.dtype is not dtype or not bias.is_contiguous()):
        bias = bias.to(dtype).contiguous()
    if not x_MK.is_contiguous() or x_MK.data_ptr() % 16:
        x_MK = x_MK.clone(memory_format=torch.contiguous_format)
    with (
        torch.cuda.device(x_MK.device) if x_MK.device.index != torch.cuda.current_device() else contextlib.nullcontext()
    ):
        tiling = _chosen(weight, spec, dtype, tokens)
        if tiling is None:
            return F.linear(x_MK, decode(packed, spec, dtype), bias)
        return product(x_MK, packed, spec, bias, tiling)


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
    return nvrtc.available()


def _why_not(case: Case) -> str:
    weight, act = case.weight, case.act
    if case.device != "cuda":
        return f"wants cuda, got {case.device}"
    if case.sm != 90:
        return f"wants sm90, got sm{case.sm}"
    if case.dtype not in ("bfloat16", "float16"):
        return f"wants bfloat16 or float16 activations, got {case.dtype}"
    if len(case.shape) != 2:
        return f"wants a matrix, got shape {case.shape}"
    if not by_group(weight) and (weight.zero_point or weight.scale not in ("fp32", "bf16", "fp16")):
        return f"wants scales of rows that are floats, and no zero point beside them, got {weight}"
    if act is not None and weight.element.bits == 8 and not by_group(weight) and act.block in ("row", "tensor"):
        return f"wants weights below 8 bits or with scales of groups where activations are quantized too, got {case.scheme}"
    return _compiler_missing()


KERNELS = (
    Kernel(
        op="linear",
        name="mixed",
        rank=50,
        layout="fragments",
        why_not=_why_not,
        run=_run,
        about="decoded in registers, between Hopper's copy engine and its tensor cores (CUDA text)",
        cases=tuple(
            known.spelling
            for known in known_formats()
            if not LAYOUTS["fragments"].why_not(Scheme.parse(known.spelling).weight, (256, 256), "cuda")
        ),
        candidates=_candidates,
    ),
)
