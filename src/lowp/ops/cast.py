"""cast: an activation into a low-precision format, on the way into a product.

    cast            x_MK -> Parts                          codes and scales, as `quantize` answers them
    fake_cast       x_MK -> values in x's dtype            quantized and dequantized: what a float product wants to see
    cast_codes_as   x_MK -> codes in bf16 or fp16, scale_M    for a float product that multiplies by the token's scale after
    cast_interleaved    x_MK -> codes of 8 bits, scale_M      for a product that wants the halves of each 16 columns interleaved;
                                                              math in float32, as fake_cast

All four first multiply by `pre_scale` (AWQ, SmoothQuant) where there is one, and take the scale from the token itself
(dynamic) or from `act_scale` (static). The references below are `numerics`; a kernel answers the same bytes and scales, in one
pass over memory.

Codes of int8, e4m3 and e5m2 are exact in bf16 and in fp16, and so is an int8 code less its zero point, at most 255.

Legend: M tokens, K input channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..numerics import Format, Parts, dequantize, quantize
from ..numerics.math import quantize_given, to_blocks
from .registry import Case, Kernel, device_capability, pick


def cast(x_MK: Tensor, fmt: Format, act_scale: Tensor | None = None, pre_scale: Tensor | None = None) -> Parts:
    """Quantize an activation.

    Args:
        x_MK: (..., M, K), any float dtype. fmt: the activation's format. act_scale: () or None, a static scale.
        pre_scale: (K,) or None; x is multiplied by it, in x's dtype.

    Returns:
        Parts, as `numerics.quantize` answers them (with `act_scale`: as `quantize_given`).

    Raises:
        MisfitError: blocks that do not divide the shape.
    """
    parts: Parts = _kernel("cast", x_MK, fmt, act_scale, pre_scale).run(x_MK, fmt, act_scale, pre_scale)
    return parts


def fake_cast(x_MK: Tensor, fmt: Format, act_scale: Tensor | None = None, pre_scale: Tensor | None = None) -> Tensor:
    """Quantize an activation and dequantize it again: arguments as for `cast`, math in float32 (the pre-scaling too).

    Returns:
        x's shape and dtype: bit for bit `act_values(x_MK, packed, spec, torch.float32).to(x_MK.dtype)`.
    """
    values: Tensor = _kernel("fake_cast", x_MK, fmt, act_scale, pre_scale).run(x_MK, fmt, act_scale, pre_scale)
    return values


def cast_codes_as(
    x_MK: Tensor, fmt: Format, dtype: torch.dtype, act_scale: Tensor | None = None, pre_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize an activation to codes that stand in `dtype`, and its scales apart: value = codes * scale_M[:, None].

    Args:
        x_MK: (M, K). fmt: a format with a scale for each row or for the tensor. dtype: torch.bfloat16 or torch.float16.

    Returns:
        (M, K) codes less their zero point, in `dtype`; (M,) scales, float32, contiguous.
    """
    kernel = _kernel("cast_codes_as", x_MK, fmt, act_scale, pre_scale)
    answer: tuple[Tensor, Tensor] = kernel.run(x_MK, fmt, dtype, act_scale, pre_scale)
    return answer


def cast_interleaved(
    x_MK: Tensor, fmt: Format, act_scale: Tensor | None = None, pre_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize an activation for `kernels/cuda_/multiply8.cu`: column 8 h + i of each 16 stands at 2 i + h.

    Args:
        x_MK: (M, K), K a multiple of 16. fmt: codes of 8 bits without a zero point, a float32 scale for each row.

    Returns:
        (M, K) codes in that order, in the element's dtype; (M,) scales, float32, contiguous. The codes are those of x in float32
        times pre_scale, like the values of `fake_cast`.

    Raises:
        KernelError: another format or shape.
    """
    kernel = _kernel("cast_interleaved", x_MK, fmt, act_scale, pre_scale)
    answer: tuple[Tensor, Tensor] = kernel.run(x_MK, fmt, act_scale, pre_scale)
    return answer


def case_of_cast(op: str, x_MK: Tensor, fmt: Format, act_scale: Tensor | None, pre_scale: Tensor | None) -> Case:
    """The case of a cast: its scheme is the activation's format, its shape (K,), whatever the number of tokens."""
    device = x_MK.device
    named = (("act_pre_scale", pre_scale), ("act_scale", act_scale))
    return Case(
        op=op,
        scheme=str(fmt),
        device=device.type,
        sm=device_capability(device.type, device.index),
        dtype=str(x_MK.dtype).removeprefix("torch."),
        shape=(int(x_MK.shape[-1]),),
        extras=tuple(name for name, tensor in named if tensor is not None),
    )


_KERNELS: dict[
    Any, tuple[Kernel, Format]
] = {}  # by what a case is made of; it holds the format, so that its id stays its own


def _kernel(op: str, x: Tensor, fmt: Format, act_scale: Tensor | None, pre_scale: Tensor | None) -> Kernel:
    if type(x) is not Tensor or torch.compiler.is_compiling():  # a traced size cannot be looked up
        return pick(case_of_cast(op, x, fmt, act_scale, pre_scale))
    key = (op, id(fmt), x.dtype, x.device, x.shape[-1], act_scale is None, pre_scale is None)
    found = _KERNELS.get(key)
    if found is None or found[0].fallback:  # a fallback is picked anew: strict mode may have begun
        found = _KERNELS[key] = pick(case_of_cast(op, x, fmt, act_scale, pre_scale)), fmt
    return found[0]


# -- the references ---------------------------------------------------------------------------------------------------


def reference(x_MK: Tensor, fmt: Format, act_scale: Tensor | None = None, pre_scale: Tensor | None = None) -> Parts:
    """The meaning of cast. What integers cannot hold, a NaN, makes the scale of its block NaN, a static one too."""
    x = x_MK if pre_scale is None else x_MK * pre_scale.to(x_MK.dtype)
    if act_scale is None:
        return quantize(x, fmt)
    scale = act_scale.expand(fmt.scale_shape(tuple(x.shape)))
    if fmt.element.kind == "int":
        lost = to_blocks(x.isnan(), fmt.block_dims(tuple(x.shape))).any(dim=-1).any(dim=-2)
        scale = torch.where(lost, torch.nan, scale)
    return quantize_given(x, fmt, scale)


def fake_reference(
    x_MK: Tensor, fmt: Format, act_scale: Tensor | None = None, pre_scale: Tensor | None = None
) -> Tensor:
    """The meaning of fake_cast."""
    return dequantize(reference(x_MK.to(torch.float32), fmt, act_scale, pre_scale), fmt).to(x_MK.dtype)


def codes_reference(
    x_MK: Tensor, fmt: Format, dtype: torch.dtype, act_scale: Tensor | None = None, pre_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The meaning of cast_codes_as."""
    parts = reference(x_MK, fmt, act_scale, pre_scale)
    assert parts.scale is not None
    codes = fmt.element.decode(parts.qdata)
    codes = codes if parts.zero_point is None else codes - parts.zero_point.to(torch.float32)
    return codes.to(dtype), parts.scale.to(torch.float32).reshape(-1).expand(x_MK.shape[0]).contiguous()


def why_not_interleaved(case: Case) -> str:
    """ "" or why `cast_interleaved` has no answer for a case."""
    fmt = case.weight
    if fmt.element.bits != 8 or fmt.block != "row" or fmt.scale != "fp32" or fmt.zero_point:
        return f"wants codes of 8 bits with an fp32 scale for each token, got {fmt}"
    return "" if case.shape[-1] % 16 == 0 else f"wants K in multiples of 16, got {case.shape[-1]}"


def interleaved_reference(
    x_MK: Tensor, fmt: Format, act_scale: Tensor | None = None, pre_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The meaning of cast_interleaved."""
    parts = reference(x_MK.to(torch.float32), fmt, act_scale, pre_scale)
    assert parts.scale is not None
    codes = parts.qdata.view(torch.uint8).unflatten(-1, (-1, 2, 8)).mT.flatten(-3).contiguous()
    return codes.view(parts.qdata.dtype), parts.scale.reshape(-1).expand(x_MK.shape[0]).contiguous()
