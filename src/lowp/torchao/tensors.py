"""torchao's tensor classes of 8 bits and of 1 to 8 bits as views of QTensor: what each shows, and how it is built from that.

    class                      holds                                              ours
    Int8Tensor                 qdata int8 (N, K), scale fp32, zero_point int8     int8/block[@int8/block]
    Float8Tensor               qdata float8 (N, K), scale fp32                    e4m3/block[@e4m3/block]
    IntxUnpackedToInt8Tensor   qdata int8 (N, K), scale, zero_point int8          int4/1xg*bf16[+int8][@int8/row+int8]

The others are in `int4.py`, `microscale.py` and `nf4.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import MisfitError
from ..numerics import ELEMENTS, Parts, Scheme
from . import affine, numbers
from .spelling import block_of, dtype_of, element_of, format_of, granularity_of, scale_of
from .views import View, or_none, require
from .words import (
    Float8MMConfig,
    IntxChooseQParamsAlgorithm,
    KernelPreference,
    MappingType,
    PerRow,
    QuantizeTensorToFloat8Kwargs,
    QuantizeTensorToInt8Kwargs,
)

# -- 8 bits -----------------------------------------------------------------------------------------------------------


class Int8Tensor(View):
    """int8 weights by rows, groups or the whole, with int8 activations or without."""

    tensor_data_names = ["qdata", "scale"]
    optional_tensor_data_names = ["zero_point", "act_quant_scale", "act_quant_zero_point", "act_pre_scale"]
    tensor_attribute_names = ["block_size", "dtype"]
    optional_tensor_attribute_names = ["act_quant_kwargs", "reduce_range"]
    _arguments = (
        "qdata", "scale", "block_size", "dtype", "zero_point", "act_quant_scale", "act_quant_zero_point", "act_pre_scale",
        "act_quant_kwargs", "reduce_range",
    )  # fmt: skip

    def _shown(self) -> dict[str, Tensor]:
        parts = self.parts()
        assert parts.scale is not None
        zero = torch.zeros_like(parts.scale, dtype=torch.int8) if parts.zero_point is None else parts.zero_point
        shown = {"qdata": parts.qdata, "scale": parts.scale, "zero_point": zero}
        if parts.act_scale is not None:
            shown["act_quant_scale"] = parts.act_scale.view((1,) * self.dim())
        if parts.act_pre_scale is not None:
            shown["act_pre_scale"] = parts.act_pre_scale
        return shown

    @classmethod
    def _stored(cls, given: dict[str, Any]) -> tuple[Parts, str, torch.dtype]:
        qdata, scale, block_size = require(given, "qdata", "scale", "block_size")
        act, act_scale = given["act_quant_kwargs"], given["act_quant_scale"]
        if act_scale is not None and act_scale.numel() != 1:
            raise MisfitError(
                f"a static activation scale is one number, got {tuple(act_scale.shape)}: use PerTensor()."
            )
        if or_none(given["act_quant_zero_point"]) is not None:
            raise MisfitError("a static activation has no zero point here: use MappingType.SYMMETRIC.")
        zero_point = or_none(given["zero_point"])
        fmt = format_of("int8", block_size, qdata.shape, scale_of(scale.dtype), "" if zero_point is None else "int8")
        parts = Parts(
            qdata=qdata,
            scale=scale.view(Scheme.parse(fmt).weight.scale_shape(tuple(qdata.shape))),
            zero_point=zero_point,
            act_pre_scale=given["act_pre_scale"],
            act_scale=None if act_scale is None else act_scale.reshape(()),
        )
        return parts, fmt + (f"@{_int8_act(act)}" if act else ""), given["dtype"] or torch.bfloat16

    @property
    def act_quant_kwargs(self) -> QuantizeTensorToInt8Kwargs | None:
        """How the activation is quantized; None for weight-only."""
        act = self.act_format
        if act is None:
            return None
        mapping = MappingType.ASYMMETRIC if act.zero_point else MappingType.SYMMETRIC
        return QuantizeTensorToInt8Kwargs(granularity_of(act), mapping, act.element.name == "int7")

    @property
    def reduce_range(self) -> bool:
        """Whether the activation keeps to 7 bits."""
        return self.act_format is not None and self.act_format.element.name == "int7"

    @classmethod
    def from_hp(
        cls,
        hp_tensor: Tensor,
        granularity: Any = None,
        mapping_type: MappingType = MappingType.SYMMETRIC,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        act_quant_kwargs: QuantizeTensorToInt8Kwargs | None = None,
        act_quant_scale: Tensor | None = None,
        act_quant_zero_point: Tensor | None = None,
        act_pre_scale: Tensor | None = None,
        reduce_range: bool | None = False,
    ) -> Any:
        """Quantize a float tensor, with a scale of its own or one that is given."""
        mapping = "+int8" if mapping_type is MappingType.ASYMMETRIC else ""
        fmt = Scheme.parse(f"int8/{block_of(granularity or PerRow())}{mapping}").weight
        block = numbers.blocks_of(fmt, hp_tensor)
        if scale is None:
            run = numbers.intx(mapping_type) if mapping else numbers.int8
            parts = run(hp_tensor.detach(), fmt)
        else:
            zero = torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point
            codes = affine.quantize_affine(hp_tensor.detach(), block, scale, zero, torch.int8)
            parts = Parts(qdata=codes, scale=scale.to(torch.float32), zero_point=zero)
        return cls(
            parts.qdata, parts.scale, list(block), hp_tensor.dtype, parts.zero_point, act_quant_scale, act_quant_zero_point,
            act_pre_scale, act_quant_kwargs, reduce_range,
        )  # fmt: skip


def _int8_act(kwargs: QuantizeTensorToInt8Kwargs) -> str:
    zero_point = "+int8" if kwargs.mapping_type is MappingType.ASYMMETRIC else ""
    return f"{'int7' if kwargs.reduce_range else 'int8'}/{block_of(kwargs.granularity)}{zero_point}"


class Float8Tensor(View):
    """float8 weights by rows, blocks, groups or the whole, with float8 activations or without."""

    tensor_data_names = ["qdata", "scale"]
    optional_tensor_attribute_names = ["block_size", "mm_config", "act_quant_kwargs", "kernel_preference", "dtype"]
    _arguments = ("qdata", "scale", "block_size", "mm_config", "act_quant_kwargs", "kernel_preference", "dtype")

    def _shown(self) -> dict[str, Tensor]:
        parts = self.parts()
        assert parts.scale is not None
        shown = {"qdata": parts.qdata, "scale": parts.scale}
        return {name: tensor.mT for name, tensor in shown.items()} if self.transposed else shown

    @property
    def block_size(self) -> list[int]:
        """How many elements of each axis share a scale."""
        size = super().block_size
        return [*size[:-2], size[-1], size[-2]] if self.transposed else size

    @classmethod
    def _stored(cls, given: dict[str, Any]) -> tuple[Parts, str, torch.dtype]:
        qdata, scale = require(given, "qdata", "scale")
        block_size = given["block_size"] or [n // s for n, s in zip(qdata.shape, scale.shape, strict=True)]
        fmt = format_of(element_of(qdata.dtype), block_size, qdata.shape, scale_of(scale.dtype))
        act = given["act_quant_kwargs"]
        scale = scale.view(Scheme.parse(fmt).weight.scale_shape(tuple(qdata.shape)))
        tail = f"@{element_of(act.float8_dtype)}/{block_of(act.granularity)}" if act else ""
        return Parts(qdata=qdata, scale=scale), fmt + tail, given["dtype"] or torch.bfloat16

    @property
    def act_quant_kwargs(self) -> QuantizeTensorToFloat8Kwargs | None:
        """How the activation is quantized; None for weight-only."""
        act = self.act_format
        if act is None:
            return None
        return QuantizeTensorToFloat8Kwargs(dtype_of(act.element.name), granularity_of(act), self.mm_config)

    @property
    def mm_config(self) -> Float8MMConfig | None:
        """How torch's float8 product accumulates; None for weight-only."""
        if self.act_format is None:
            return None
        return Float8MMConfig(use_fast_accum="x" not in self.act_format.block)

    @property
    def kernel_preference(self) -> KernelPreference:
        """Always AUTO: `lowp.explain` says which kernel runs."""
        return KernelPreference.AUTO

    @classmethod
    def from_hp(
        cls,
        hp_tensor: Tensor,
        float8_dtype: torch.dtype = torch.float8_e4m3fn,
        granularity: Any = None,
        mm_config: Float8MMConfig | None = None,
        hp_value_lb: float | None = None,
        hp_value_ub: float | None = None,
        kernel_preference: KernelPreference = KernelPreference.AUTO,
        act_quant_kwargs: QuantizeTensorToFloat8Kwargs | None = None,
    ) -> Any:
        """Quantize a float tensor. hp_value_lb, hp_value_ub: bounds of amax."""
        fmt = Scheme.parse(f"{element_of(float8_dtype)}/{block_of(granularity or PerRow())}").weight
        block = numbers.blocks_of(fmt, hp_tensor)
        weight = hp_tensor.detach()
        scale = affine.choose_scale_float8(
            weight, block, float8_dtype, hp_value_lb=hp_value_lb, hp_value_ub=hp_value_ub
        )
        qdata = affine.quantize_affine_float8(weight, scale, float8_dtype)
        return cls(qdata, scale, list(block), mm_config, act_quant_kwargs, kernel_preference, dtype=hp_tensor.dtype)


# -- 1 to 8 bits ------------------------------------------------------------------------------------------------------


class IntxUnpackedToInt8Tensor(View):
    """int1 to int8 weights, shown one to a byte and stored at their true width."""

    exports = True  # in the form of `export.py`
    tensor_data_names = ["qdata", "scale", "zero_point"]
    tensor_attribute_names = ["target_dtype", "block_size", "dtype", "activation_quantization"]
    _arguments = ("qdata", "scale", "zero_point", "target_dtype", "block_size", "dtype", "activation_quantization")

    def _shown(self) -> dict[str, Tensor]:
        parts = self.parts()
        assert parts.scale is not None
        zero = torch.zeros_like(parts.scale, dtype=torch.int8) if parts.zero_point is None else parts.zero_point
        return {"qdata": parts.qdata, "scale": parts.scale, "zero_point": zero}

    @classmethod
    def _stored(cls, given: dict[str, Any]) -> tuple[Parts, str, torch.dtype]:
        qdata, scale, target, block_size = require(given, "qdata", "scale", "target_dtype", "block_size")
        zero, element = or_none(given["zero_point"]), element_of(target)
        kinds = {torch.int8: "int8", torch.uint8: "uint8", torch.int32: "int32"}
        kind = "" if zero is None else kinds.get(zero.dtype, "fp32")
        fmt = format_of(element, block_size, qdata.shape, scale_of(scale.dtype), kind)
        shape = Scheme.parse(fmt).weight.scale_shape(tuple(qdata.shape))
        zero = None if zero is None else zero.reshape(shape)
        zero = zero.to(torch.float32) if kind == "fp32" and zero is not None else zero
        act = given["activation_quantization"]
        element_of_act = str(act).partition("_")[0]
        tail = "" if act is None else f"@{element_of_act}/row{'+int8' if 'asym' in str(act) else ''}"
        parts = Parts(qdata=qdata, scale=scale.reshape(shape), zero_point=zero)
        return parts, fmt + tail, given["dtype"] or torch.bfloat16

    @property
    def target_dtype(self) -> torch.dtype:
        """The integer that the codes are."""
        return dtype_of(self.format.element.name)

    @property
    def block_size(self) -> tuple[int, ...]:
        """How many elements of each axis share a scale."""
        return tuple(super().block_size)

    @property
    def activation_quantization(self) -> str | None:
        """How the activation is quantized; None for weight-only."""
        if self.act_format is None:
            return None
        return f"{self.act_format.element.name}_{'asym' if self.act_format.zero_point else 'sym'}_per_token"

    @classmethod
    def from_hp(
        cls,
        hp_tensor: Tensor,
        block_size: tuple[int, ...],
        target_dtype: torch.dtype,
        *,
        mapping_type: MappingType = MappingType.SYMMETRIC,
        activation_quantization: Any = None,
        intx_choose_qparams_algorithm: Any = IntxChooseQParamsAlgorithm.AFFINE,
        custom_scale: Tensor | None = None,
        custom_zero_point: Tensor | None = None,
    ) -> Any:
        """Quantize a float tensor, with a scale of its own or one that is given."""
        weight, element = hp_tensor.detach(), ELEMENTS[element_of(target_dtype)]
        if custom_scale is None:
            zero_point = "int8" if mapping_type is MappingType.ASYMMETRIC else ""
            scheme = format_of(element.name, block_size, weight.shape, scale_of(weight.dtype), zero_point)
            least_squares = intx_choose_qparams_algorithm == IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
            run = numbers.hqq_scale_only if least_squares else numbers.intx(mapping_type)
            parts = run(weight, Scheme.parse(scheme).weight)
        else:
            zero = torch.zeros_like(custom_scale, dtype=torch.int8) if custom_zero_point is None else custom_zero_point
            args = (weight, block_size, custom_scale, zero, torch.int8, element.qmin, element.qmax)
            parts = Parts(qdata=affine.quantize_affine(*args), scale=custom_scale, zero_point=zero)
        return cls(
            parts.qdata,
            parts.scale,
            parts.zero_point,
            target_dtype,
            tuple(block_size),
            hp_tensor.dtype,
            activation_quantization,
        )


class GGUFQuantizedTensor(View):
    """4 bits in blocks of 32 whose scales are 6 bits, by superblocks."""

    tensor_data_names = ["qdata", "scale", "zero_point", "scale_scale"]
    _arguments = ()

    def _shown(self) -> dict[str, Tensor]:
        return self.parts().tensors()


class FloatxTensor(View):
    """float6 and float4 by rows."""

    tensor_data_names = ["qdata", "scale"]
    _arguments = ()

    def _shown(self) -> dict[str, Tensor]:
        return self.parts().tensors()
