"""torchao's configurations of fake quantization: how one tensor is seen while a model trains.

    IntxFakeQuantizeConfig(torch.int4, group_size=32)      "int4/1x32", numbers by torchao's affine rule
    Float8FakeQuantizeConfig()                             "e4m3/row"

Each says a spelling of ours for a dtype, and how the numbers of a weight are chosen (`numbers.py`). What is not there is refused
when one is made, not dropped.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import MisfitError
from ..numerics import Format
from ..qat.fake import Choose
from . import numbers
from .spelling import block_of, element_of, scale_of
from .words import (
    Granularity,
    KernelPreference,
    MappingType,
    PerAxis,
    PerGroup,
    PerRow,
    PerToken,
    ScaleCalculationMode,
    TorchAODType,
    ZeroPointDomain,
)

_E4M3 = torch.float8_e4m3fn
_NAMED = {"per_token": PerToken(), "per_channel": PerAxis(0)}


class FakeQuantizeConfigBase:
    """How one tensor is fake-quantized: `spelling` says the format for a dtype, `choose` how its numbers are chosen."""

    def spelling(self, dtype: torch.dtype) -> str:
        """Our format for a tensor of that dtype."""
        raise NotImplementedError(f"{type(self).__name__} wants a spelling method.")

    def choose(self) -> Choose | None:
        """How the numbers of a weight are chosen; None: by the format's own rule."""
        return None


@dataclass(init=False)
class IntxFakeQuantizeConfig(FakeQuantizeConfigBase):
    """Integers of 1 to 8 bits. `granularity` is a Granularity, "per_token", "per_channel" or "per_group" with `group_size`."""

    dtype: torch.dtype | TorchAODType
    granularity: Granularity
    mapping_type: MappingType
    scale_precision: torch.dtype
    zero_point_precision: torch.dtype
    zero_point_domain: ZeroPointDomain
    is_dynamic: bool
    range_learning: bool
    eps: float | None

    def __init__(
        self,
        dtype: torch.dtype | TorchAODType,
        granularity: Granularity | str | None = None,
        mapping_type: MappingType | None = None,
        scale_precision: torch.dtype = torch.float32,
        zero_point_precision: torch.dtype = torch.int32,
        zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
        is_dynamic: bool = True,
        range_learning: bool = False,
        eps: float | None = None,
        *,
        group_size: int | None = None,
        is_symmetric: bool | None = None,
    ) -> None:
        if "int" not in element_of(dtype):
            raise MisfitError(
                f"dtype wants an integer of 1 to 8 bits, got {dtype}: Float8FakeQuantizeConfig is for float8."
            )
        if is_dynamic and range_learning:
            raise MisfitError(
                "range_learning wants is_dynamic=False, got is_dynamic=True: ranges are learned or measured."
            )
        if not is_dynamic and not range_learning:
            raise MisfitError(
                "is_dynamic=False wants range_learning=True: a range that the first batch fixes is not there."
            )
        if eps is not None:
            raise MisfitError(
                f"eps is not there, got {eps}: leave it out, no scale is below the smallest normal float32."
            )
        if zero_point_domain is ZeroPointDomain.FLOAT and element_of(dtype) != "int4":
            raise MisfitError(f"a zero point in the FLOAT domain is tinygemm's, for torch.int4, got {dtype}.")
        if mapping_type is not None and is_symmetric is not None:
            raise MisfitError("mapping_type and is_symmetric say the same thing: pass one of them.")
        if is_symmetric is not None:
            mapping_type = MappingType.SYMMETRIC if is_symmetric else MappingType.ASYMMETRIC
        self.dtype, self.granularity = dtype, _granularity(granularity, group_size)
        self.mapping_type = mapping_type or MappingType.SYMMETRIC
        self.scale_precision, self.zero_point_precision = scale_precision, zero_point_precision
        self.zero_point_domain, self.eps = zero_point_domain, eps
        self.is_dynamic, self.range_learning = is_dynamic, range_learning

    @property
    def group_size(self) -> int:
        """Of PerGroup."""
        if not isinstance(self.granularity, PerGroup):
            raise MisfitError(f"group_size is of PerGroup, got {self.granularity}.")
        return self.granularity.group_size

    @property
    def is_symmetric(self) -> bool:
        """Whether there is no zero point."""
        return self.mapping_type is not MappingType.ASYMMETRIC

    def spelling(self, dtype: torch.dtype) -> str:
        """Our format."""
        element, block = element_of(self.dtype), block_of(self.granularity)
        if self.zero_point_domain is ZeroPointDomain.FLOAT:
            return f"int4/{block}{scale_of(self.scale_precision)}+fp32"
        zero_point = "" if self.is_symmetric else "+int8" if element[0] == "i" else "+uint8"
        return f"{element}/{block}{scale_of(self.scale_precision)}{zero_point}"

    def choose(self) -> Choose | None:
        """torchao's affine numbers, or tinygemm's."""
        return numbers.tinygemm if self.zero_point_domain is ZeroPointDomain.FLOAT else numbers.intx(self.mapping_type)


def _granularity(given: Granularity | str | None, group_size: int | None) -> Granularity:
    if group_size is not None and given in (None, "per_group"):
        return PerGroup(group_size)
    if group_size is not None:
        raise MisfitError(f"group_size is of granularity 'per_group', got {given!r}.")
    if isinstance(given, Granularity):
        return given
    if given not in _NAMED:
        raise MisfitError(
            f"granularity is a Granularity, 'per_token', 'per_channel', or 'per_group' with group_size, got {given!r}."
        )
    return _NAMED[given]


@dataclass
class Float8FakeQuantizeConfig(FakeQuantizeConfigBase):
    """float8 by rows or for the tensor. Bounds on the range (`hp_value_lb`, `hp_value_ub`) are refused."""

    dtype: torch.dtype = _E4M3
    granularity: Granularity = dataclasses.field(default_factory=PerRow)
    hp_value_lb: float | None = None
    hp_value_ub: float | None = None

    def __post_init__(self) -> None:
        if self.hp_value_lb is not None or self.hp_value_ub is not None:
            raise MisfitError("bounds on the range of float8 are not there: leave hp_value_lb and hp_value_ub out.")
        if "float8" not in str(self.dtype):
            raise MisfitError(f"dtype wants a float8 dtype, got {self.dtype}: IntxFakeQuantizeConfig is for integers.")

    def spelling(self, dtype: torch.dtype) -> str:
        """Our format."""
        return f"{element_of(self.dtype)}/{block_of(self.granularity)}"

    def choose(self) -> Choose | None:
        """torchao's float8 scale."""
        return numbers.float8


@dataclass
class Int4WeightFakeQuantizeConfig(FakeQuantizeConfigBase):
    """int4 weights as the int4 kernels want them: symmetric beside float8 activations, asymmetric beside bf16."""

    group_size: int = 128
    activation_dtype: torch.dtype = _E4M3

    def spelling(self, dtype: torch.dtype) -> str:
        """Our format."""
        zero_point = "" if self.activation_dtype == _E4M3 else "+fp32"
        return f"int4/{block_of(PerGroup(self.group_size))}{scale_of(dtype)}{zero_point}"

    def choose(self) -> Choose | None:
        """mslk's numbers."""
        return numbers.int4_symmetric if self.activation_dtype == _E4M3 else numbers.int4


@dataclass
class MXFakeQuantizeConfig(FakeQuantizeConfigBase):
    """MX: a power of two for each 32."""

    dtype: Any = torch.float4_e2m1fn_x2
    block_size: int = 32
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL
    kernel_preference: KernelPreference = KernelPreference.EMULATED

    def spelling(self, dtype: torch.dtype) -> str:
        """Our format."""
        return str(Format.parse(f"{element_of(self.dtype)}/1x{self.block_size}*e8m0~{self.scaling_mode.value}"))


@dataclass
class NVFP4FakeQuantizeConfig(FakeQuantizeConfigBase):
    """NVFP4: an e4m3 scale for each 16, and one for the tensor."""

    use_per_tensor_scale: bool = True
    use_swizzled_scales: bool = False
    use_triton_kernel: bool = False

    def spelling(self, dtype: torch.dtype) -> str:
        """Our format."""
        return "e2m1/1x16*e4m3/tensor" if self.use_per_tensor_scale else "e2m1/1x16*e4m3"
