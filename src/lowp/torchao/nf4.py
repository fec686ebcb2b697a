"""NF4 as torchao and torchtune spell it: to_nf4, NF4Tensor, linear_nf4.

The format is `nf4/1x64*int8/1x256`: sixteen quantiles of a normal distribution, 64 elements to a scale, the scales themselves in
int8 by blocks of 256 after their mean is taken off. Ours has no rule that the number of elements be a multiple of 64 * 256; a
weight's last axis is a multiple of 64.

Source: QLoRA, arXiv 2305.14314, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MisfitError, TensorRuleError
from ..numerics import ELEMENTS, Scheme, quantize
from ..numerics.bits import pack_bits
from ..tensor.qtensor import RULES
from .views import View

aten = torch.ops.aten


class NF4Tensor(View):
    """A weight in NF4. `.to(dtype)` gives floats, as torchao's does: what QLoRA's state dicts rely on."""

    tensor_data_names = ["quantized_scalers", "quantization_factor", "scaler_mean", "quantized_data", "nf4"]
    tensor_attribute_names = ["block_size", "n_blocks", "scaler_block_size"]
    _arguments = ()

    def _shown(self) -> dict[str, Tensor]:
        parts = self.parts()
        assert parts.scale is not None and parts.scale_scale is not None and parts.scale_zero_point is not None
        codes = ELEMENTS["nf4"].to_codes(parts.qdata).flatten()
        table = torch.tensor(ELEMENTS["nf4"].values, dtype=self.dtype, device=self.device)
        return {
            "quantized_scalers": parts.scale.flatten(),
            "quantization_factor": parts.scale_scale.flatten().reciprocal(),
            "scaler_mean": (-parts.scale_zero_point * parts.scale_scale).flatten()[0],
            "quantized_data": pack_bits(
                codes.view(-1, 2).flip(-1).flatten(), 4
            ),  # their even element lies in the high nibble
            "nf4": table,
        }

    @property
    def block_size(self) -> int:
        """How many elements share a scale."""
        return self.format.block_dims(tuple(self.spec.shape))[1]

    @property
    def n_blocks(self) -> int:
        """How many scales there are."""
        return self.numel() // self.block_size

    @property
    def scaler_block_size(self) -> int:
        """How many scales share a scale."""
        nested = self.format.nested
        assert nested is not None
        return int(nested.block.split("x")[1])

    def get_original_weight(self) -> Tensor:
        """The values, as floats of its dtype."""
        return self.dequantize()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As torch's; `.to(dtype)` gives floats, also in the dtype that this stands for, which torch would answer with itself."""
        dtype = kwargs.get("dtype") or next((a for a in args[:1] if isinstance(a, torch.dtype)), None)
        if dtype is not None and dtype == self.dtype and "device" not in kwargs:
            return self.dequantize()
        return super().to(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except (MisfitError, TensorRuleError) as error:
            what = _refused(func, *args)
            if what is None:
                raise
            raise TensorRuleError(f"{func.overloadpacket}(NF4Tensor) {what}: {error}") from error

    @classmethod
    def from_tensor(cls, input_tensor: Tensor, block_size: int = 64, scaler_block_size: int = 256) -> NF4Tensor:
        """Quantize a float tensor whose last axis is a multiple of block_size."""
        scheme = f"nf4/1x{block_size}*int8/1x{scaler_block_size}"
        with torch.no_grad():
            parts = quantize(input_tensor.detach(), Scheme.parse(scheme).weight)
            return cls.from_parts(parts, scheme, dtype=input_tensor.dtype)


@NF4Tensor.implements(aten._to_copy.default)
def _to_copy(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    dtype = kwargs.get("dtype")
    if dtype is None:
        return RULES[func](func, args, kwargs)
    return args[0].dequantize(dtype).to(kwargs.get("device") or args[0].device)


@NF4Tensor.implements(aten.copy_.default)
def _copy_(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    target, source = args[:2]
    other = isinstance(source, NF4Tensor) and source.scheme != target.scheme  # as a checkpoint of other blocks
    return RULES[func](func, (target, source.dequantize() if other else source), kwargs)


def _refused(func: Any, x: Any, *args: Any) -> str | None:
    """What of an operation NF4Tensor does not have, in torchao's words."""
    if func is aten.new_zeros.default:
        return f"with new size {tuple(args[0])}"
    if func is aten.as_strided.default:
        size, stride, offset = (*args, 0)[:3]
        if math.prod(size) != x.numel():
            return f"different numel={x.numel()} and size={tuple(size)}"
        return (
            "only support original storage offset" if offset else f"only support continuous stride, got {tuple(stride)}"
        )
    if func is aten.slice.Tensor:
        dim, start, _, step = (*args, *(0, 0, None, 1)[len(args) :])
        return (
            "with customized step" if step != 1 else f"with dim={dim}" if dim else "with start" if start else "with end"
        )
    return None


def to_nf4(tensor: Tensor, block_size: int = 64, scaler_block_size: int = 256) -> NF4Tensor:
    """Quantize a float tensor to NF4.

    >>> to_nf4(torch.randn(64, 256)).shape
    torch.Size([64, 256])
    """
    return NF4Tensor.from_tensor(tensor, block_size, scaler_block_size)


def linear_nf4(input: Tensor, weight: Tensor) -> Tensor:
    """input @ weight.T; the gradient flows to the input alone."""
    return F.linear(input, weight)


def implements(aten_ops: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: what an operator means for NF4Tensor; called with (func, args, kwargs), as torchtune's are."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        NF4Tensor.implements(aten_ops)(lambda func, types, args, kwargs: function(func, args, kwargs))
        return function

    return register
