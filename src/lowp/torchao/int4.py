"""torchao's classes for int4 weights, one for each place where its bytes may lie; ours differ in what they show alone.

    value = q * scale + zero_point        q in -8..7, the even element in the low nibble; scale and zero_point (K / group, N)

See `numbers.py` for the way from this zero point, in units of the value, to ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import MisfitError
from ..layouts import layout_of
from ..layouts.int4pack import codes_of_tinygemm
from ..numerics import Parts
from ..numerics.bits import pack_bits
from . import numbers
from .spelling import dtype_of, element_of, format_of, scale_of
from .views import View, from_nibbles, nibbles, or_none, quantized, require
from .words import (
    Int4ChooseQParamsAlgorithm,
)


class _Int4(View):
    """int4 weights by groups with a zero in units of the value, under one of torchao's names for where the bytes lie."""

    tensor_data_names = ["qdata", "scale", "zero_point"]
    optional_tensor_data_names = ["act_pre_scale"]
    tensor_attribute_names = ["block_size", "shape"]
    optional_tensor_attribute_names = ["activation_dtype"]
    _arguments = ("qdata", "scale", "zero_point", "block_size", "shape", "act_pre_scale", "activation_dtype")

    def _shown(self) -> dict[str, Tensor]:
        parts = self.parts()
        assert parts.scale is not None
        zero = numbers.to_value_zero(parts.zero_point, parts.scale)
        plain = self.spec.layout == "plain"  # whose bytes are torchao's
        qdata = self.packed["qdata"] if plain else nibbles(parts, "int4")
        shown = {"qdata": qdata, "scale": parts.scale.mT, "zero_point": zero.mT}
        return shown | ({} if parts.act_pre_scale is None else {"act_pre_scale": parts.act_pre_scale})

    @classmethod
    def _stored(cls, given: dict[str, Any]) -> tuple[Parts, str, torch.dtype]:
        qdata, scale, block_size = require(given, "qdata", "scale", "block_size")
        codes, kept = from_nibbles(qdata, "int4"), scale.mT.contiguous()
        zero = or_none(given["zero_point"])
        fmt = format_of("int4", block_size, codes.shape, scale_of(scale.dtype), "" if zero is None else "fp32")
        parts = Parts(
            qdata=codes,
            scale=kept,
            zero_point=None if zero is None else numbers.from_value_zero(zero.mT, kept),
            act_pre_scale=given["act_pre_scale"],
        )
        act = given["activation_dtype"]
        tail = f"@{element_of(act)}/row" if act is not None and act.itemsize == 1 else ""
        return parts, fmt + tail, scale.dtype

    @property
    def activation_dtype(self) -> torch.dtype:
        """The dtype that activations are brought to."""
        return torch.bfloat16 if self.act_format is None else dtype_of(self.act_format.element.name)

    @classmethod
    def from_hp(cls, w: Tensor, block_size: list[int], activation_dtype: torch.dtype = torch.bfloat16) -> Any:
        """Quantize a float tensor. activation_dtype: bfloat16, or float8_e4m3fn for a symmetric weight and float8 activations."""
        float8 = activation_dtype.itemsize == 1
        tail = f"@{element_of(activation_dtype)}/row" if float8 else ""
        scheme = format_of("int4", block_size, w.shape, scale_of(w.dtype), "" if float8 else "fp32") + tail
        return quantized(cls, w, scheme, numbers.int4_symmetric if float8 else numbers.int4)


def _bmm(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """torch.bmm(x, weight) where the weight lies as linear layers have it, (B, N, K), as torchao's int4 tensors mean it."""
    x, weight = args
    return torch.matmul(x, weight if weight.transposed else weight.transpose(-2, -1))


class Int4Tensor(_Int4):
    """int4 weights by groups, bytes as mslk has them."""


class Int4PlainInt32Tensor(_Int4):
    """int4 weights by groups; torchao's for XPU and NPU, here as Int4Tensor."""


class Int4OpaqueTensor(_Int4):
    """int4 weights by groups; torchao's for CPUs, here as Int4Tensor."""


class Int4PreshuffledTensor(_Int4):
    """int4 weights by groups; torchao's for Hopper, here as Int4Tensor with its names for scale and zero."""

    tensor_data_names = ["qdata", "group_scale"]
    optional_tensor_data_names = ["group_zero", "row_scale"]
    _arguments = ("qdata", "group_scale", "block_size", "shape", "group_zero", "row_scale", "activation_dtype")

    def _shown(self) -> dict[str, Tensor]:
        shown = super()._shown()
        return {"qdata": shown["qdata"], "group_scale": shown["scale"], "group_zero": shown["zero_point"]}

    @classmethod
    def _stored(cls, given: dict[str, Any]) -> tuple[Parts, str, torch.dtype]:
        if given["row_scale"] is not None:
            raise MisfitError("bytes that were shuffled for mslk cannot be read: save an Int4Tensor.")
        renamed = {"scale": given["group_scale"], "zero_point": given["group_zero"]}
        return super()._stored(dict.fromkeys(_Int4._arguments) | given | renamed)

    @classmethod
    def from_int4_tensor(cls, tensor: Int4Tensor) -> Int4PreshuffledTensor:
        """The same weight under this name."""
        return cls.of_qtensor(tensor)


class Int4TilePackedTo4dTensor(_Int4):
    """int4 weights by groups for tinygemm: its tiles on CUDA, plain nibbles elsewhere; scale and zero side by side, bf16."""

    tensor_data_names = ["qdata", "scale_and_zero"]
    optional_tensor_attribute_names = []
    _arguments = ("qdata", "scale_and_zero", "block_size", "shape", "act_pre_scale")

    def _shown(self) -> dict[str, Tensor]:
        shown = super()._shown()
        if self.spec.layout == "tinygemm":
            shown["qdata"] = self.packed["qdata"]
        pair = torch.stack((shown.pop("scale"), shown.pop("zero_point")), dim=-1)
        return {"qdata": shown.pop("qdata"), "scale_and_zero": pair} | shown

    @classmethod
    def _stored(cls, given: dict[str, Any]) -> tuple[Parts, str, torch.dtype]:
        qdata, pair, block_size, shape = require(given, "qdata", "scale_and_zero", "block_size", "shape")
        if qdata.dim() == 4:
            if qdata.device.type != "cuda":
                raise MisfitError("tinygemm's tiles are read on CUDA: move the tensors there, or save an Int4Tensor.")
            codes = pack_bits((codes_of_tinygemm(qdata, tuple(shape)) ^ 8).to(torch.uint8), 4)
        else:
            codes = qdata
        renamed = {"qdata": codes, "scale": pair[..., 0], "zero_point": pair[..., 1], "block_size": block_size}
        return super()._stored(dict.fromkeys(_Int4._arguments) | given | renamed)

    @classmethod
    def from_hp(
        cls,
        hp_tensor: Tensor,
        block_size: list[int],
        int4_choose_qparams_algorithm: Int4ChooseQParamsAlgorithm = Int4ChooseQParamsAlgorithm.TINYGEMM,
        ntile_size: int | None = 8,
    ) -> Any:
        """Quantize a float tensor. ntile_size: read and not used, tiles are the device's."""
        scheme = format_of("int4", block_size, hp_tensor.shape, "*bf16", "fp32")
        hqq = int4_choose_qparams_algorithm == Int4ChooseQParamsAlgorithm.HQQ
        made = quantized(cls, hp_tensor, scheme, numbers.hqq_asymmetric if hqq else numbers.tinygemm)
        layout = layout_of("tinygemm")
        fits = hp_tensor.device.type == "cuda" and not layout.why_not(made.format, tuple(made.shape), "cuda")
        return made.to_layout("tinygemm") if fits else made


for _kind in (Int4Tensor, Int4PlainInt32Tensor, Int4OpaqueTensor, Int4PreshuffledTensor, Int4TilePackedTo4dTensor):
    _kind.implements(torch.ops.aten.bmm.default)(_bmm)
