"""Rounded or clamped: which numbers a format reaches.

    v = x / scale + zero_point          what is about to be encoded
    inside:  min - h_low <= v <= max + h_high,      h half a step of the element at either end (`Element.reach`)

A number inside is brought to its value by rounding alone, one outside by clamping. A straight-through gradient passes the one
and stops the other (`ops/fake_quantize.py`): the rule is stated here, on numbers, and depends on no derivative of torch's clamp,
which differs between versions at the bounds themselves.

Source: Esser et al., Learned Step Size Quantization, arXiv 1902.08153, equation 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .format import Format
from .math import _spread, read_scale, to_blocks
from .parts import Parts


def inside(x: Tensor, parts: Parts, fmt: Format) -> Tensor:
    """Which numbers were rounded and not clamped when x became `parts`: those whose x / scale + zero_point is within
    `Element.reach`. NaN counts as inside.

    Args:
        x: (..., N, K), float. parts: of x, in that format.

    Returns:
        bool, x's shape.

    >>> from lowp.numerics.math import quantize_given
    >>> fmt = Format.parse("int4/row")
    >>> inside(torch.tensor([[7.5, 8.0]]), quantize_given(torch.tensor([[7.5, 8.0]]), fmt, torch.ones(1, 1)), fmt)
    tensor([[ True, False]])
    """
    if fmt.is_identity or not x.numel():
        return torch.ones_like(x, dtype=torch.bool)
    steps = to_blocks(x.to(torch.float32), fmt.block_dims(tuple(x.shape))) / _spread(
        read_scale(parts, fmt), fmt, x.shape
    )
    if parts.zero_point is not None:
        steps = steps + _spread(parts.zero_point.to(torch.float32), fmt, x.shape)
    low, high = fmt.element.reach
    return ((steps < low) | (steps > high)).logical_not_().reshape(x.shape)


def clamps(fmt: Format) -> bool:
    """Whether a scale that the format's own rule chose can leave a finite number outside (`inside`); False is a promise.

    By absmax the largest quotient is the element's largest value, off by what storing the scale adds (bf16: less than 2**-8; e4m3
    under a scale of its own 2**-4); by rceil and ceil it is at most that value.

    >>> clamps(Format.parse("int4/1x128*bf16")), clamps(Format.parse("int2/row~mse"))
    (False, True)
    """
    if fmt.is_identity:
        return False
    if fmt.scale == "e8m0":
        return fmt.rule not in ("rceil", "ceil")
    if fmt.nested is not None and fmt.nested.element.kind == "float":
        stored: float | None = 2.0 ** -(fmt.nested.element.mbits + 1)
    else:
        stored = {"fp32": 2.0**-22, "bf16": 2.0**-8}.get(str(fmt.scale))
    if fmt.rule not in ("absmax", "noclip") or fmt.zero_point or stored is None:
        return True
    low, high = fmt.element.reach
    return fmt.element.largest * (1 + stored) > min(high, -low)
