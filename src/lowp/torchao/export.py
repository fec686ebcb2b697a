"""Weights of 1 to 8 bits as exporters look for them: torchao's operators in the graph, on plain tensors of one code to a byte.

    weight       dequantize_affine(qdata int8 (N, K), [1, g], scale, zero_point, int8, qmin, qmax)
    activation   choose_qparams_affine -> quantize_affine -> dequantize_affine, int8, a scale and a zero point for each token
    linear       aten.linear of the two

A backend (ExecuTorch's XNNPACK) recognises these nodes and puts its own int8 x int4 product in their place; the numbers are those
of the quantized model. Our own weights are stored packed, which no backend reads: `Exported` is what stands for one in a graph.
`Unwrapped` stands for every other weight: one operator of ours on the packed tensors.

Source: ExecuTorch's `backends/xnnpack/partition/config`, which names the operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import TensorRuleError
from ..layouts import Spec
from ..numerics import ELEMENTS
from ..tensor.qtensor import RULES, QTensor
from . import redirect
from .base import TorchAOBaseTensor
from .spelling import element_of

aten = torch.ops.aten
_ACT = "int8_asym_per_token"


class Exported(TorchAOBaseTensor):
    """A quantized matrix as codes, scales and zero points, which multiplies by torchao's operators.

    Args:
        qdata: int8 (N, K), one code to a byte. scale: (N, K / group), floating point. zero_point: int8, like scale.
        target_dtype: the integer that the codes are, such as torch.int4. block_size: elements of each axis that share a scale.
        dtype: the float dtype that it stands for. activation_quantization: "int8_asym_per_token" or None.
    """

    tensor_data_names = ["qdata", "scale", "zero_point"]
    tensor_attribute_names = ["target_dtype", "block_size", "dtype", "activation_quantization"]

    @staticmethod
    def __new__(
        cls: type[Exported],
        qdata: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        target_dtype: torch.dtype,
        block_size: tuple[int, ...],
        dtype: torch.dtype,
        activation_quantization: str | None,
    ) -> Exported:
        self = torch.Tensor._make_wrapper_subclass(
            cls, qdata.shape, dtype=dtype, device=qdata.device, requires_grad=False
        )
        self.qdata, self.scale, self.zero_point = qdata, scale, zero_point
        self.target_dtype, self.block_size = target_dtype, tuple(block_size)
        self.activation_quantization = activation_quantization
        return self

    @classmethod
    def of(cls, weight: Any) -> Exported:
        """From one of torchao's tensors that shows its codes one to a byte."""
        parts = weight.torchao_tensors()
        return cls(
            parts["qdata"].contiguous(),
            parts["scale"],
            parts["zero_point"],
            weight.target_dtype,
            weight.block_size,
            weight.dtype,
            weight.activation_quantization,
        )

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The values, by torchao's operator."""
        element = ELEMENTS[element_of(self.target_dtype)]
        return torch.ops.torchao.dequantize_affine(
            self.qdata, list(self.block_size), self.scale, self.zero_point, torch.int8, int(element.qmin), int(element.qmax),
            output_dtype=output_dtype or self.dtype,
        )  # fmt: skip


def can_export(weight: Any) -> bool:
    """Whether a weight has this form and the redirect stands, which defines the operators. A real torchao that something imported
    defines them too: it must not change our numbers."""
    shows = getattr(type(weight), "exports", False) and weight.activation_quantization in (None, _ACT)
    return bool(shows) and redirect.standing() is not None


def quantized_and_back(x: Tensor) -> Tensor:
    """An activation (..., K) through asymmetric int8, a scale for each token, by torchao's operators."""
    ops, block = torch.ops.torchao, [*([1] * (x.dim() - 1)), x.shape[-1]]
    eps = torch.finfo(torch.float32).eps
    scale, zero = ops.choose_qparams_affine(
        x, "ASYMMETRIC", block, torch.int8, -128, 127, eps, torch.float32, torch.int8
    )
    q = ops.quantize_affine(x, block, scale, zero, torch.int8, -128, 127)
    return ops.dequantize_affine(q, block, scale, zero, torch.int8, -128, 127, output_dtype=x.dtype)


@Exported.implements_torch_function(
    torch.nn.functional.linear
)  # before it is taken apart into a transposition and a product
@Exported.implements(aten.linear.default)
def _linear(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, weight, bias = (*args, kwargs.get("bias"))[:3]
    if isinstance(x, Exported):
        raise TensorRuleError("linear wants a float activation, got a quantized one: dequantize it first.")
    x = x if weight.activation_quantization is None else quantized_and_back(x)
    return func(x, weight.dequantize(x.dtype), bias)


@Exported.implements(aten.embedding.default)
def _embedding(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return func(args[0].dequantize(), *args[1:], **kwargs)


@Exported.implements_torch_function(torch.nn.functional.embedding)
def _looked_up(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return func(args[0], args[1].dequantize(), *args[2:], **kwargs)


class Unwrapped(TorchAOBaseTensor):
    """A quantized weight while torch.export records a model that `unwrap_tensor_subclass` took apart: plain tensors and what they
    are. A tracer has no rule for a QTensor that is put together under its eyes; this one answers before it is asked.

    Args:
        packed: name -> tensor. spec: scheme, layout and shape. dtype: the float dtype that it stands for.
    """

    weight: QTensor

    @staticmethod
    def __new__(cls: type[Unwrapped], packed: dict[str, Tensor], spec: Spec, dtype: torch.dtype) -> Unwrapped:
        device = packed["qdata"].device
        self = torch.Tensor._make_wrapper_subclass(cls, spec.shape, dtype=dtype, device=device, requires_grad=False)
        self.weight = QTensor(packed, spec, dtype=dtype)
        return self

    @classmethod
    def of(cls, tensors: dict[str, Tensor], kind: type[QTensor], context: tuple[Any, ...]) -> Unwrapped:
        """From what a weight of this kind was taken apart into."""
        scheme, layout, shape, dtype, _ = context
        packed = {name.removeprefix(kind._prefix): tensor for name, tensor in tensors.items()}
        return cls(packed, Spec(scheme=scheme, layout=layout, shape=tuple(shape)), dtype)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The values as a plain tensor."""
        return self.weight.dequantize(output_dtype or self.dtype)


@Unwrapped.implements_torch_function(torch.nn.functional.linear)
def _linear_of_packed(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, weight, bias = (*args, kwargs.get("bias"))[:3]
    return RULES[aten.linear.default](aten.linear.default, (x, weight.weight, bias), {})


@Unwrapped.implements_torch_function(torch.nn.functional.embedding)
def _embedding_of_packed(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return RULES[aten.embedding.default](aten.embedding.default, (args[1].weight, args[0]), {})
