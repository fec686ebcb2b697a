"""From torchao's words to our spelling, and back: one weight format, one activation format, and no class for each pair.

torch.int4, PerGroup(128), bfloat16            "int4/1x128*bf16"
PerRow() PerAxis(0) PerToken()                 "row"
PerTensor()                                    "tensor"
PerBlock([128, 128])                           "128x128"
"""

from __future__ import annotations

import re
from typing import Any

import torch

from ..errors import MisfitError
from ..numerics import Format
from .words import (
    Granularity,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    TorchAODType,
)

_FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ELEMENT_OF: dict[Any, str] = {
    **{getattr(torch, f"{u}int{bits}"): f"{u}int{bits}" for u in ("", "u") for bits in range(1, 9)},
    **{TorchAODType[f"INT{bits}"]: f"int{bits}" for bits in range(1, 8)},
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
    torch.float8_e4m3fnuz: "e4m3fnuz",
    torch.float8_e5m2fnuz: "e5m2fnuz",
    torch.float4_e2m1fn_x2: "e2m1",
    "fp6_e2m3": "e2m3",
    "fp6_e3m2": "e3m2",
}


def element_of(dtype: Any) -> str:
    """Our element for torchao's dtype.

    >>> element_of(torch.float8_e4m3fn)
    'e4m3'
    """
    if dtype not in ELEMENT_OF:
        known = ", ".join(sorted({str(key) for key in ELEMENT_OF if isinstance(key, torch.dtype)}))
        raise MisfitError(f"a weight or activation dtype is one of {known}, got {dtype}.")
    return ELEMENT_OF[dtype]


def dtype_of(element: str) -> Any:
    """torchao's dtype for our element, the inverse of `element_of`."""
    return next(dtype for dtype, name in ELEMENT_OF.items() if name == element and not isinstance(dtype, TorchAODType))


def block_of(granularity: Granularity) -> str:
    """Our block for a granularity.

    >>> block_of(PerGroup(128))
    '1x128'
    """
    if isinstance(granularity, PerTensor):
        return "tensor"
    if isinstance(granularity, PerGroup):
        return "row" if granularity.group_size == -1 else f"1x{granularity.group_size}"
    if isinstance(granularity, PerBlock) and len(granularity.block_size) == 2:
        rows, columns = granularity.block_size
        return f"{rows}x{columns}"
    whole_row = (isinstance(granularity, PerAxis) and granularity.axis == 0) or (
        isinstance(granularity, PerRow) and granularity.dim == -1
    )
    if whole_row or isinstance(granularity, PerToken):
        return "row"
    raise MisfitError(
        f"a granularity is PerTensor(), PerRow(), PerAxis(0), PerGroup(n), PerToken() or PerBlock((n, m)), got {granularity!r}."
    )


def granularity_of(fmt: Format) -> Granularity:
    """The granularity of a format's block, the inverse of `block_of`."""
    if fmt.block == "tensor":
        return PerTensor()
    if fmt.block == "row":
        return PerRow()
    rows, columns = (int(size) for size in fmt.block.split("x"))
    return PerGroup(columns) if rows == 1 else PerBlock((rows, columns))


def scale_of(dtype: torch.dtype) -> str:
    """The suffix that says how scales are stored.

    >>> scale_of(torch.bfloat16)
    '*bf16'
    """
    if dtype not in _FLOATS:
        raise MisfitError(f"a scale is stored as float32, bfloat16 or float16, got {dtype}.")
    return "" if dtype is torch.float32 else f"*{_FLOATS[dtype]}"


def block_size_of(fmt: Format, shape: tuple[int, ...]) -> list[int]:
    """torchao's block_size for a tensor of this shape.

    >>> block_size_of(Format.parse("int4/1x32"), (8, 64))
    [1, 32]
    """
    return [*(1,) * (len(shape) - 2), *fmt.block_dims(shape)][-len(shape) :]


def format_of(
    element: str, block_size: list[int] | tuple[int, ...], shape: tuple[int, ...], scale: str = "", zero_point: str = ""
) -> str:
    """The spelling of a format from torchao's block_size: the shortest block that says the same.

    >>> format_of("int8", [1, 64], (8, 64))
    'int8/row'
    """
    if len(block_size) != len(shape) or len(shape) < 2 or any(size != 1 for size in block_size[:-2]):
        raise MisfitError(
            f"block_size wants a number for each axis, 1 before the last two, got {block_size} for {shape}."
        )
    rows, columns = block_size[-2:]
    block = "tensor" if (rows, columns) == tuple(shape[-2:]) and shape[-2] != 1 else f"{rows}x{columns}"
    return one_spelling(f"{element}/{block}{scale}{f'+{zero_point}' if zero_point else ''}", shape)


def one_spelling(scheme: str, shape: tuple[int, ...]) -> str:
    """A scheme spelled in one way where a group is a whole row of this shape: as groups for the int4 kernels, else "row".

    A file says the size of a group alone; what was quantized by rows and what is read again then run in the same kernel.

    >>> one_spelling("int4/row*bf16", (8, 64)), one_spelling("int8/1x64", (8, 64))
    ('int4/1x64*bf16', 'int8/row')
    """
    weight, at, act = scheme.partition("@")
    columns = shape[-1]
    as_group = weight.startswith("int4/") and columns in (32, 64, 128, 256)
    old, new = ("/row", f"/1x{columns}") if as_group else (f"/1x{columns}", "/row")
    weight = re.sub(f"{old}(?![0-9])", new, weight, count=1)
    return f"{weight}{at}{act}"
