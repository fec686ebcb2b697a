"""linear: y = x W^T + b with a quantized weight, and an activation that may be quantized on the way in.

    y_MN = act_quantize(rotated(x_MK) * act_pre_scale_K) @ ((qdata_NK - zero_point) * scale).T + bias_N

That line is the reference, for every format. Where the weight brings signs (`act_rotation`) the activation is rotated before any
kernel sees it, so that kernels know nothing of it. Without an activation format act_quantize is the identity; with one it is
quantize then dequantize, each token's scale taken from the token itself (dynamic) or from `act_scale` (static).

Legend: M tokens, N output channels, K input channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts import Spec, layout_of
from ..layouts.base import Packed
from ..numerics import Parts, dequantize
from ..numerics.hadamard import rotated
from .cast import cast
from .cast import reference as cast_reference
from .registry import picked


def linear(x: Tensor, packed: Packed, spec: Spec, bias: Tensor | None = None) -> Tensor:
    """Linear layer with a packed weight.

    Args:
        x: (..., K), any float dtype. packed, spec: the weight (N, K). bias: (N,) or None.

    Returns:
        (..., N), in x's dtype.

    Raises:
        KernelError: in strict mode, where only a fallback can run.
    """
    if "act_rotation" in packed:
        x, packed = turn(x, packed), {name: tensor for name, tensor in packed.items() if name != "act_rotation"}
    kernel = picked("linear", x, packed, spec)
    if x.dim() == 2:
        return kernel.run(x, packed, spec, bias)
    y = kernel.run(x.reshape(-1, x.shape[-1]), packed, spec, bias)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def turn(x: Tensor, packed: Packed) -> Tensor:
    """The activation, rotated where the weight asks for it."""
    return rotated(x, packed["act_rotation"]) if "act_rotation" in packed else x


def prescale(x_MK: Tensor, packed: Packed) -> Tensor:
    """The activation times act_pre_scale, in its own dtype, where the weight brings one (AWQ, SmoothQuant)."""
    return x_MK * packed["act_pre_scale"].to(x_MK.dtype) if "act_pre_scale" in packed else x_MK


def quantized_input(x_MK: Tensor, packed: Packed, spec: Spec) -> tuple[Parts, Tensor]:
    """What a kernel with a quantized activation begins with: its parts, and their scale."""
    act = spec.act
    assert act is not None
    parts = cast(x_MK, act, packed.get("act_scale"), packed.get("act_pre_scale"))
    assert parts.scale is not None
    return parts, parts.scale


def act_values(x_MK: Tensor, packed: Packed, spec: Spec, dtype: torch.dtype) -> Tensor:
    """What the matrix product sees of the activation: pre-scaled, quantized and dequantized."""
    x = prescale(turn(x_MK.to(dtype), packed), packed)
    if spec.act is None:
        return x
    return dequantize(cast_reference(x, spec.act, packed.get("act_scale")), spec.act, dtype)


def weight_values(packed: Packed, spec: Spec, dtype: torch.dtype) -> Tensor:
    """The weight's values (..., N, K), whatever its layout."""
    return dequantize(layout_of(spec.layout).unpack(packed, spec), spec.weight, dtype)


def reference(
    x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The meaning of linear, for every format, layout and device; `dtype` is what it computes in."""
    y_MN = act_values(x_MK, packed, spec, dtype) @ weight_values(packed, spec, dtype).mT
    y_MN = y_MN if bias is None else y_MN + bias.to(dtype)
    return y_MN.to(x_MK.dtype)
