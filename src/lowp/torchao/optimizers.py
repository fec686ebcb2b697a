"""torchao.optim under its names: optimizers whose states show themselves as OptimState8bit, OptimState4bit, OptimStateFp8.

What steps is `lowp.optim`, what is stored is a QTensor (`dyn8/1x256` ...), what is shown is torchao's:

    OptimState8bit   codes uint8 (shape), scale (blocks,), qmap (256,), signed
    OptimState4bit   codes uint8 (elements / 2,), the even element in the high nibble, scale, qmap (16,), signed, shape
    OptimStateFp8    codes float8_e4m3fn (shape), scale

State dicts that the real torchao saved are read under the redirect, code for code. Unlike there a learning rate may be set as a
plain number, nothing is compiled at the first step, and a block of zeros has a scale of 2**-126 instead of 1e-12.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import optim
from ..numerics import ELEMENTS, Format, Parts, quantize
from ..numerics.formats.dynamic import dynamic_map
from ..optim import CPUOffloadOptimizer as CPUOffloadOptimizer
from ..optim.load import from_codes
from ..optim.state import zeros
from ..tensor import QTensor
from .views import View, require

_SIGNED = {8: ("udyn8", "dyn8"), 4: ("ulin4", "dyn4")}


# -- states -----------------------------------------------------------------------------------------------------------


class _OptimState(View):
    """What the three have in common: blocks over all elements, shown in the parameter's shape."""

    tensor_attrs: list[str]

    @classmethod
    def _from_torchao(cls, given: dict[str, Any]) -> Any:
        codes, scale = require(given, "codes", "scale")
        shape = tuple(given["shape"]) if given.get("shape") is not None else tuple(codes.shape)
        made = from_codes(codes, scale, given.get("qmap"), shape, high_first=True)
        if not isinstance(made, QTensor):
            made = optim.state.quantized(made, Format.parse(f"dyn8/1x{made.numel() // scale.numel()}"), (made.numel(),))
        return cls.of(made.packed, made.spec, dtype=given.get("dtype") or torch.float32, shape=shape)

    def __setstate__(self, state: Any) -> None:
        """What torch.load gives to a tensor that the real torchao saved: its attributes."""
        held = state[0] if isinstance(state, tuple) else state
        made = type(self)._from_torchao(held | {"shape": tuple(self.shape), "dtype": self.dtype})
        self.spec, self.transposed, self._names = made.spec, False, made._names
        self.is_lazy_view = tuple(self.shape) != made.spec.shape
        self._restore(made.packed, made.spec)

    @property
    def signed(self) -> bool:
        """Whether the map holds negative values."""
        return self.format.element.signed

    @property
    def block_size(self) -> int:
        """How many elements share a scale."""
        return int(self.format.block[2:])

    def _exchange(self, name: str, tensor: Tensor | None) -> None:
        given = {"shape": tuple(self.shape), "dtype": self.dtype} | self._shown() | {name: tensor}
        made = type(self)._from_torchao(given)
        self._restore(made.packed, made.spec)

    @classmethod
    def _zeros(cls, shape: Sequence[int], element: str, block_size: int, device: Any, dtype: Any) -> Any:
        flat = torch.Size(shape).numel()
        made = zeros(torch.empty(flat, device=device or "cpu"), Format.parse(f"{element}/1x{block_size}"), (flat,))
        assert isinstance(made, QTensor)
        return cls.of(made.packed, made.spec, dtype=dtype or torch.float32, shape=tuple(shape))


class OptimState8bit(_OptimState):
    """A state in the 8-bit dynamic map, signed or not."""

    tensor_attrs = tensor_data_names = ["codes", "scale", "qmap"]
    tensor_attribute_names = ["signed"]
    _arguments = ("codes", "scale", "qmap", "signed", "dtype")

    def _shown(self) -> dict[str, Tensor]:
        packed = self.packed
        return {"codes": packed["qdata"].view(self.shape), "scale": packed["scale"].view(-1), "qmap": _map(self)}

    @classmethod
    def zeros(
        cls, shape: Sequence[int], signed: bool = True, block_size: int = 256, device: Any = None, dtype: Any = None
    ) -> Any:
        """A state of zeros."""
        return cls._zeros(shape, _SIGNED[8][signed], block_size, device, dtype)


class OptimState4bit(_OptimState):
    """A state in the signed 4-bit dynamic map, or in the unsigned linear one without zero."""

    tensor_attrs = tensor_data_names = ["codes", "scale", "qmap"]
    tensor_attribute_names = ["signed"]
    _arguments = ("codes", "scale", "qmap", "signed", "shape", "dtype")

    def _shown(self) -> dict[str, Tensor]:
        packed = self.packed
        codes = packed["qdata"].reshape(-1)
        return {"codes": codes << 4 | codes >> 4, "scale": packed["scale"].view(-1), "qmap": _map(self)}

    @classmethod
    def zeros(
        cls, shape: Sequence[int], signed: bool = True, block_size: int = 128, device: Any = None, dtype: Any = None
    ) -> Any:
        """A state of zeros."""
        return cls._zeros(shape, _SIGNED[4][signed], block_size, device, dtype)


class OptimStateFp8(_OptimState):
    """A state in e4m3."""

    tensor_attrs = tensor_data_names = ["codes", "scale"]
    tensor_attribute_names: list[str] = []
    _arguments = ("codes", "scale", "dtype")

    def _shown(self) -> dict[str, Tensor]:
        return {"codes": self.packed["qdata"].view(self.shape), "scale": self.packed["scale"].view(-1)}

    @classmethod
    def zeros(cls, shape: Sequence[int], block_size: int = 256, device: Any = None, dtype: Any = None) -> Any:
        """A state of zeros."""
        return cls._zeros(shape, "e4m3", block_size, device, dtype)


def _map(state: QTensor) -> Tensor:
    return state.format.element.table(state.device)


_STATES: dict[str, type[_OptimState]] = {
    "dyn8": OptimState8bit, "udyn8": OptimState8bit, "dyn4": OptimState4bit, "ulin4": OptimState4bit, "e4m3": OptimStateFp8,
}  # fmt: skip


def _held(state: Tensor) -> Tensor:
    return _STATES[state.format.element.name].of_qtensor(state) if isinstance(state, QTensor) else state


# -- optimizers -------------------------------------------------------------------------------------------------------


def _optimizer(name: str, base: type, element: str | None, block: int) -> type:
    decay = 1e-2 if base.decoupled else 0.0

    def __init__(
        self: Any, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = decay, amsgrad: bool = False, *, block_size: int = block, bf16_stochastic_round: bool = False,
    ) -> None:  # fmt: skip
        state = "fp32" if element is None else f"{element}/1x{block_size}"
        options = dict(state=state, stochastic_rounding=bf16_stochastic_round)
        base.__init__(self, params, lr, betas, eps, weight_decay, amsgrad, **options)

    def add_param_group(self: Any, param_group: dict[str, Any]) -> None:
        """As torch's; the learning rate becomes a tensor on the CPU, as scripts for torchao expect that write `lr.fill_(...)`."""
        base.add_param_group(self, param_group)
        group = self.param_groups[-1]
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)

    doc = f"torchao's {name}: `lowp.optim.{base.__name__}` with torchao's arguments."
    more = {
        "__init__": __init__,
        "add_param_group": add_param_group,
        "__doc__": doc,
        "held": staticmethod(_held),
        "__module__": __name__,
    }
    return type(name, (base,), more)


Adam8bit = _optimizer("Adam8bit", optim.Adam, "dyn8", 256)
Adam4bit = _optimizer("Adam4bit", optim.Adam, "dyn4", 128)
AdamFp8 = _optimizer("AdamFp8", optim.Adam, "e4m3", 256)
AdamW8bit = _optimizer("AdamW8bit", optim.AdamW, "dyn8", 256)
AdamW4bit = _optimizer("AdamW4bit", optim.AdamW, "dyn4", 128)
AdamWFp8 = _optimizer("AdamWFp8", optim.AdamW, "e4m3", 256)
_AdamW = _optimizer("_AdamW", optim.AdamW, None, 256)


# -- numbers ----------------------------------------------------------------------------------------------------------


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> list[float]:
    """The values of a dynamic map, rising.

    >>> create_dynamic_map(True, 3, 4)[-2:]
    [0.8875, 1.0]
    """
    return list(dynamic_map(signed=signed, exponent_bits=max_exponent_bits, bits=total_bits))


def scale_tensor(input: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """input / scale and the scales (blocks,): the largest magnitude of each block, at least 1e-12."""
    blocks = input.view(-1, block_size)
    scale = blocks.abs().amax(dim=-1).clamp(min=1e-12)
    return (blocks / scale.view(-1, 1)).view(input.shape), scale


def _nearest(input: Tensor, qmap: Tensor) -> Tensor:
    for name in ("dyn8", "udyn8", "dyn4", "ulin4"):
        element = ELEMENTS[name]
        if qmap.numel() == 1 << element.bits and torch.allclose(
            qmap.cpu(), element.table(torch.device("cpu")), 1e-6, 0
        ):
            return element.encode(input)
    middles = (qmap[:-1] + qmap[1:]) / 2
    return torch.bucketize(input.float(), middles.float(), right=True).to(torch.uint8)


def quantize_8bit_with_qmap(input: Tensor, qmap: Tensor) -> Tensor:
    """Codes (uint8, input's shape) of the nearest of 256 values; ties go up."""
    return _nearest(input, qmap)


def quantize_4bit_with_qmap(input: Tensor, qmap: Tensor) -> Tensor:
    """Codes (uint8, input's shape, one a byte) of the nearest of 16 values; ties go up."""
    return _nearest(input, qmap)


def dequant_with_qmap(codes: Tensor, qmap: Tensor, scale: Tensor) -> Tensor:
    """The values of codes under one scale a block, in the shape of codes."""
    return (qmap[codes.long()].view(scale.numel(), -1) * scale.view(-1, 1)).view(codes.shape)


def quantize_fp8(input: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes (float8_e4m3fn, input's shape) and scales (blocks,)."""
    parts: Parts = quantize(input.reshape(-1), Format.parse(f"e4m3/1x{block_size}"))
    assert parts.scale is not None
    return parts.qdata.view(input.shape), parts.scale


def _fp32_to_bf16_sr(_x_f32: Tensor) -> Tensor:
    """float32 to bfloat16 at random, up or down, with the right mean."""
    return ELEMENTS["bf16"].encode_stochastic(_x_f32.float(), torch.rand(_x_f32.shape, device=_x_f32.device))
