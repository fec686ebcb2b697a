"""torchao's small words: how a range is mapped, how large a block is, where a kernel comes from.

They carry no behaviour. What they mean here is one spelling: `spelling.py` turns a granularity into a block and a mapping into
a rule. Field names and defaults are torchao's, so that code which spells them by name or by position goes on working.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch


class MappingType(enum.Enum):
    """How a range of floats is laid over the integers; the names of our rules are "symmetric", "noclip" and "asymmetric"."""

    SYMMETRIC = enum.auto()
    SYMMETRIC_NO_CLIPPING_ERR = enum.auto()
    ASYMMETRIC = enum.auto()


class ZeroPointDomain(enum.Enum):
    """Whether a zero point is an integer, a float in units of the value, or not there."""

    INT = enum.auto()
    FLOAT = enum.auto()
    NONE = enum.auto()


class TorchAODType(enum.Enum):
    """Integers below 8 bits, from before torch had them."""

    INT1 = enum.auto()
    INT2 = enum.auto()
    INT3 = enum.auto()
    INT4 = enum.auto()
    INT5 = enum.auto()
    INT6 = enum.auto()
    INT7 = enum.auto()


class _Spelled(str, enum.Enum):
    """An enum whose members equal their strings."""

    def __str__(self) -> str:
        return self.value


class PackingFormat(_Spelled):
    """Where bytes lie. Our layouts are chosen for the device, so these are read and kept, and change nothing."""

    PLAIN = "plain"
    PRESHUFFLED = "preshuffled"
    OPAQUE = "opaque"
    SPARSE_CUTLASS = "sparse_cutlass"
    TILE_PACKED_TO_4D = "tile_packed_to_4d"
    PLAIN_INT32 = "plain_int32"
    MARLIN_SPARSE = "marlin_sparse"
    UNPACKED_TO_INT8 = "unpacked_to_int8"


class Int4PackingFormat(_Spelled):
    """Where the bytes of int4 weights lie in torchao; see `PackingFormat`."""

    PLAIN = "plain"
    PRESHUFFLED = "preshuffled"
    PLAIN_INT32 = "plain_int32"
    TILE_PACKED_TO_4D = "tile_packed_to_4d"
    OPAQUE = "opaque"


class IntxPackingFormat(_Spelled):
    """Where the bytes of int1 to int8 weights lie in torchao; see `PackingFormat`."""

    UNPACKED_TO_INT8 = "unpacked_to_int8"
    OPAQUE_ATEN_KLEIDIAI = "opaque_aten_kleidiai"
    OPAQUE_TORCHAO_AUTO = "opaque_torchao_auto"
    OPAQUE_TORCHAO_KLEIDIAI = "opaque_torchao_kleidiai"
    OPAQUE_TORCHAO_LOWBIT = "opaque_torchao_lowbit"


class Float8PackingFormat(_Spelled):
    """Where the bytes of float8 weights lie in torchao; the sparse ones want a sparse layout."""

    PLAIN = "plain"
    SPARSE_2D_DATA_2D_METADATA = "sparse_2d_data_2d_metadata"
    SPARSE_1D_DATA_1D_METADATA = "sparse_1d_data_1d_metadata"
    SPARSE_CUTLASS = "sparse_cutlass"
    OPAQUE = "opaque"


class Int4ChooseQParamsAlgorithm(_Spelled):
    """How the scales of int4 weights are chosen: by the range, or by HQQ."""

    TINYGEMM = "tinygemm"
    HQQ = "hqq"


class IntxChooseQParamsAlgorithm(_Spelled):
    """How the scales of int1 to int8 weights are chosen: by the range, or by least squares on the scale alone."""

    AFFINE = "affine"
    HQQ_SCALE_ONLY = "hqq_scale_only"


class KernelPreference(_Spelled):
    """Whose kernel runs. Ours are picked by `lowp.explain`; this is read and kept, and changes nothing."""

    AUTO = "auto"
    TORCH = "torch"
    MSLK = "mslk"
    EMULATED = "emulated"
    FBGEMM = "fbgemm"


class ScaleCalculationMode(enum.Enum):
    """How the power-of-two scale of an MX block follows from its largest magnitude: our rules of the same names."""

    FLOOR = "floor"
    RCEIL = "rceil"
    CEIL = "ceil"
    EVEN = "even"


class QuantizationStep(_Spelled):
    """The steps of a method that watches activations first."""

    PREPARE = "prepare"
    CONVERT = "convert"
    PREPARE_FOR_LOADING = "prepare_for_loading"


# -- granularity: how many elements share a scale -----------------------------------------------------------------------


@dataclass(frozen=True)
class Granularity:
    """How many elements share a scale; the base of the others."""


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the tensor."""


@dataclass(frozen=True)
class PerAxis(Granularity):
    """One scale for each index of an axis."""

    axis: int


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for each `group_size` elements of the last axis."""

    group_size: int


@dataclass(frozen=True)
class PerRow(Granularity):
    """One scale for each row: all of the axis `dim` shares it."""

    dim: int = -1


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale for each token of an activation."""


@dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale for each block of these sizes."""

    block_size: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", tuple(self.block_size))


@dataclass(frozen=True)
class Float8MMConfig:
    """How torch's float8 product accumulates; read and kept, and changes nothing here."""

    emulate: bool = False
    use_fast_accum: bool = False
    pad_inner_dim: bool = False


# -- how an activation is quantized, as tensors tell it -------------------------------------------------------------------


class QuantizeTensorKwargs:
    """How an activation is quantized on its way into a linear layer: the base of the others."""


@dataclass
class QuantizeTensorToInt8Kwargs(QuantizeTensorKwargs):
    """int8 activations."""

    granularity: Granularity = dataclasses.field(default_factory=PerRow)
    mapping_type: MappingType = MappingType.SYMMETRIC
    reduce_range: bool = False


@dataclass
class QuantizeTensorToFloat8Kwargs(QuantizeTensorKwargs):
    """float8 activations."""

    float8_dtype: torch.dtype = torch.float8_e4m3fn
    granularity: Granularity = dataclasses.field(default_factory=PerRow)
    mm_config: Float8MMConfig | None = None
    hp_value_lb: float | None = None
    hp_value_ub: float | None = None
    kernel_preference: KernelPreference = KernelPreference.AUTO


@dataclass
class QuantizeTensorToMXKwargs(QuantizeTensorKwargs):
    """MX activations."""

    elem_dtype: Any = torch.float8_e4m3fn
    block_size: int = 32
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.FLOOR
    kernel_preference: KernelPreference = KernelPreference.EMULATED
    is_swizzled_scales: bool = False


@dataclass
class QuantizeTensorToNVFP4Kwargs(QuantizeTensorKwargs):
    """NVFP4 activations."""

    block_size: int = 16
    is_swizzled_scales: bool = False
    use_triton_kernel: bool = False
    use_dynamic_per_tensor_scale: bool = False


# -- what hosts ask of tensors and configurations -------------------------------------------------------------------------


@runtime_checkable
class SupportsActivationPreScaling(Protocol):
    """A weight whose input is multiplied by act_pre_scale first."""

    act_pre_scale: torch.Tensor | None


@runtime_checkable
class IsStaticQuantizationConfig(Protocol):
    """A configuration with a scale for the activation."""

    act_quant_scale: torch.Tensor | None

    def get_act_quant_kwargs(self) -> QuantizeTensorKwargs:
        """How the activation is quantized."""
        ...


class IntxUnpackedToInt8TensorActivationQuantization(_Spelled):
    """How the activation of an IntxUnpackedToInt8Tensor is quantized."""

    INT8_ASYM_PER_TOKEN = "int8_asym_per_token"
