"""Weights in 1 to 8 bits times bf16 or fp16 on Hopper's tensor cores: for every element, and for every batch.

    y_MN = x_MK @ ((qdata_NK - zero_point) * scale).T + bias_N

Where the scheme quantizes the activation too, x is quantized and dequantized first: the same meaning, in the same kernel.

What depends on the batch M is decided here: the tile (how many tokens, how many rows), over how many blocks the columns are
split, and from where on the weight is decoded once, to a workspace, and cuBLAS multiplies. `candidates` lists what may be chosen,
`choose` says what is, by a model of the time: bytes over bandwidth, products over the rate of the tensor cores, rounds of tiles.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layouts import Spec
from ...layouts.base import Packed
from ...layouts.fragments import by_group, planes
from ...numerics import Format, Scheme
from ...ops.linear import act_values, prescale
from ...ops.registry import Case, Kernel
from .. import nvrtc

_SCALES = {"bf16": 0, "fp16": 1, "fp32": 2, "e8m0": 3}
_ZEROS = {"int8": 1, "uint8": 2, "bf16": 3, "fp16": 4, "fp32": 5}
_SHARED = 227 * 1024  # of one block, on sm90
_SHARED_OF_SM = 228 * 1024
_PARAMS = struct.Struct("128s11Q5i")  # as `Params` in fragments.cu
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
    scale = (4 if nested.element.kind == "float" else 5) if nested else 4 if fmt.scale == "e4m3" else _SCALES[str(fmt.scale)]
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


def compile_product(tiling: Tiling, numbers: dict[str, int], token: bool) -> bytes:
    """The cubin of a product."""
    sizes = {name: getattr(tiling, name.lower()) for name in ("MT", "WGS", "BM", "KC", "STAGES", "SPLIT", "BLOCKS", "STREAM", "BAND")}
    return _compile("product", numbers | sizes | {"TOKEN": int(token)})


def compile_decoder(numbers: dict[str, int], e4m3: bool) -> bytes:
    """The cubin that decodes a whole weight."""
    sizes = {"MT": 1, "WGS": 1, "BM": 8, "KC": 1, "BAND": 1, "TOKEN": 0, "FROM_GLOBAL": 1, "E4M3": int(e4m3)}
    return _compile("weight", numbers | sizes)


@functools.cache
def _product(tiling: Tiling, scheme: str, shape: tuple[int, ...], dtype: torch.dtype, token: bool, device: int) -> nvrtc.Function:
    numbers = _numbers(scheme, shape, dtype)
    return nvrtc.load_function(
        compile_product(tiling, numbers, token), "product", device=device, threads=tiling.threads, shared=shared_bytes(tiling, numbers)
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
    """What does not change from call to call for all weights of one scheme, shape, dtype and device."""

    numbers: dict[str, int]
    table: int
    stride: int
    nest: int
    processors: int


@functools.cache
def _weight(scheme: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _Weight:
    fmt = Scheme.parse(scheme).weight
    nest = math.prod(fmt.nested.block_dims(fmt.scale_shape(shape))) if fmt.nested else 1
    return _Weight(
        numbers=_numbers(scheme, shape, dtype),
        table=_table(scheme, dtype, device).data_ptr() if fmt.element.kind == "codebook" else 0,
        stride=0 if fmt.block == "tensor" else 1,
        nest=nest,
        processors=torch.cuda.get_device_properties(device).multi_processor_count,
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
        found = _MAPS[key] = nvrtc.tensor_map(x_MK, bm, 64)
    return found


def product(
    x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None, tiling: Tiling, token_scale_M: Tensor | None = None
) -> Tensor:
    """The product by one tiling. x_MK: contiguous, bf16 or fp16, on CUDA."""
    tokens, columns = x_MK.shape
    rows, device = spec.shape[0], x_MK.device
    weight = _weight(spec.scheme, spec.shape, x_MK.dtype, device)
    function = _product(tiling, spec.scheme, spec.shape, x_MK.dtype, token_scale_M is not None, device.index)
    y_MN = torch.empty((tokens, rows), dtype=x_MK.dtype, device=device)
    grid = tiling.grid(tokens, rows, columns, weight.processors)
    partial = left = None
    if tiling.stream:
        partial = torch.empty((grid, tiling.rows * tiling.bm), dtype=torch.float32, device=device)
        left = torch.zeros((grid, tiling.wgs), dtype=torch.int32, device=device)
    _PARAMS.pack_into(
        _ARGUMENTS, 0, _map_of(x_MK, tiling.bm), packed["qdata"].data_ptr(), _pointer(packed, "scale"), _pointer(packed, "zero_point"),
        _pointer(packed, "scale_scale"), _pointer(packed, "scale_zero_point"), 0 if token_scale_M is None else token_scale_M.data_ptr(),
        0 if bias is None else bias.data_ptr(), weight.table, y_MN.data_ptr(), 0 if partial is None else partial.data_ptr(), 0 if left is None else left.data_ptr(),
        tokens, rows, columns, weight.stride, weight.nest,
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
    tiles = -(-rows // 64)
    pieces = min(columns // 64, max(1, -(-weight.processors * 16 // tiles)))
    _PARAMS.pack_into(
        _ARGUMENTS, 0, bytes(128), packed["qdata"].data_ptr(), _pointer(packed, "scale"), _pointer(packed, "zero_point"),
        _pointer(packed, "scale_scale"), _pointer(packed, "scale_zero_point"), 0, 0, weight.table, w_NK.data_ptr(), 0, 0, 0, rows,
        columns, weight.stride, weight.nest,
    )  # fmt: skip
    function.launch((tiles, pieces), _ARGUMENTS, torch._C._cuda_getCurrentRawStream(device.index))
    return w_NK


KERNELS = ()
