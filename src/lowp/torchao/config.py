"""torchao's configurations: a row of a table each, which answers one of our schemes.

    Int4WeightOnlyConfig(group_size=128)                    "int4/1x128*bf16+fp32"
    Int8DynamicActivationInt8WeightConfig()                 "int8/row@int8/row"
    Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())    "e4m3/row@e4m3/row"

A row says the fields with torchao's names, order and defaults; the scheme, which may follow from the weight's dtype; the class
under which the weight shows itself; and how its numbers are chosen (`numbers.py`). The dataclasses are made from the rows.

Fields that say where torchao's bytes lie or which of its kernels runs (`int4_packing_format`, `kernel_preference`, `mm_config`,
`set_inductor_config` ...) are kept, written to and read from JSON, and change nothing: layouts and kernels are picked for the
device, and the report of `quantize_` names them.

JSON: {"_type": name, "_version": n, "_data": {field: value}}; dtypes and enums as {"_type": ..., "_data": name}.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import MisfitError, SpellingError
from ..numerics import Scheme
from . import numbers, words
from .numbers import Numbers
from .spelling import block_of, element_of, scale_of
from .words import (
    Float8MMConfig,
    Float8PackingFormat,
    Granularity,
    Int4ChooseQParamsAlgorithm,
    Int4PackingFormat,
    IntxChooseQParamsAlgorithm,
    IntxPackingFormat,
    KernelPreference,
    MappingType,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    ScaleCalculationMode,
)

_E4M3 = torch.float8_e4m3fn
_TINY = (
    1e-6  # a lower bound as small as this only keeps tokens of zeros from becoming NaN, which they do not become here
)


class AOBaseConfig:
    """The base of every configuration. Third parties extend it and register a handler with `register_quantize_module_handler`."""

    version: int = 1


@dataclass(frozen=True, kw_only=True)
class ConfigRow:
    """One configuration.

    Args:
        name: of the dataclass. fields: name -> default, in torchao's order; a type stands for what it makes.
        scheme: (configuration, dtype of the weight) -> spelling.
        tensor: (configuration) -> name of the class under which the weight shows itself.
        numbers: (configuration) -> how the numbers are chosen.
        settle: what is filled in or refused when one is made. methods: what it answers besides.
        version: of the JSON, where it is no field. about: one line.
    """

    name: str
    fields: Mapping[str, Any]
    scheme: Callable[[Any, torch.dtype], str]
    tensor: Callable[[Any], str]
    numbers: Callable[[Any], Numbers]
    settle: Callable[[Any], None] = lambda config: None
    methods: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    version: int = 1
    about: str = ""


def _int8_act(config: Any, granularity: Granularity) -> str:
    element = "int7" if config.reduce_range else "int8"
    zero_point = "+int8" if config.act_mapping_type is MappingType.ASYMMETRIC else ""
    return f"{element}/{block_of(granularity)}{zero_point}"


def _pair(granularity: Any, default: Granularity) -> tuple[Granularity, Granularity]:
    """(activation, weight) of one granularity, of two, or of none."""
    if granularity is None:
        return default, default
    if isinstance(granularity, (list, tuple)):
        if len(granularity) != 2:
            raise MisfitError(f"granularity is one, or [activation, weight], got {granularity!r}.")
        return tuple(granularity)
    return granularity, granularity


def _int8_scheme(config: Any, dtype: torch.dtype) -> str:
    act, weight = _pair(config.granularity, PerRow())
    return f"int8/{block_of(weight)}@{_int8_act(config, act)}"


def _act_quant_kwargs(self: Any) -> words.QuantizeTensorToInt8Kwargs:
    """How the activation is quantized."""
    granularity, _ = _pair(self.granularity, PerRow())
    return words.QuantizeTensorToInt8Kwargs(granularity, self.act_mapping_type, self.reduce_range)


def _float8(dtype: Any) -> str:
    if not isinstance(dtype, torch.dtype) or not str(dtype).startswith("torch.float8"):
        raise MisfitError(f"a float8 configuration wants a float8 dtype such as torch.float8_e4m3fn, got {dtype}.")
    return element_of(dtype)


def _float8_settle(config: Any) -> None:
    config.granularity = list(_pair(config.granularity, PerTensor()))
    if config.mm_config is None:
        blocks = isinstance(config.granularity[0], words.PerBlock)
        config.mm_config = Float8MMConfig(use_fast_accum=not blocks)
    if config.activation_value_ub is not None or (config.activation_value_lb or 0) > _TINY:
        warnings.warn(
            f"{type(config).__name__}: the range of an activation is always its own here, activation_value_lb="
            f"{config.activation_value_lb} and activation_value_ub={config.activation_value_ub} change nothing.",
            stacklevel=4,
        )


def _float8_scheme(config: Any, dtype: torch.dtype) -> str:
    if config.packing_format != Float8PackingFormat.PLAIN:
        raise MisfitError(f"{config.packing_format} wants a sparse layout, which is not there yet: use PLAIN.")
    act, weight = config.granularity
    return f"{_float8(config.weight_dtype)}/{block_of(weight)}@{_float8(config.activation_dtype)}/{block_of(act)}"


def _intx_weight(dtype: Any, granularity: Granularity, mapping: MappingType, scale_dtype: torch.dtype) -> str:
    if "int" not in element_of(dtype):
        raise MisfitError(
            f"weight_dtype is an integer of 1 to 8 bits, got {dtype}: use Float8WeightOnlyConfig for float8."
        )
    zero_point = "+int8" if mapping is MappingType.ASYMMETRIC else ""
    return f"{element_of(dtype)}/{block_of(granularity)}{scale_of(scale_dtype)}{zero_point}"


def _intx_numbers(config: Any, mapping: MappingType) -> Numbers:
    if config.intx_choose_qparams_algorithm == IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY:
        return numbers.hqq_scale_only
    return numbers.intx(mapping)


_INT4_TENSORS = {
    Int4PackingFormat.PLAIN: "Int4Tensor",
    Int4PackingFormat.PRESHUFFLED: "Int4PreshuffledTensor",
    Int4PackingFormat.TILE_PACKED_TO_4D: "Int4TilePackedTo4dTensor",
    Int4PackingFormat.PLAIN_INT32: "Int4PlainInt32Tensor",
    Int4PackingFormat.OPAQUE: "Int4OpaqueTensor",
}


def _int4_numbers(config: Any) -> Numbers:
    if config.int4_choose_qparams_algorithm == Int4ChooseQParamsAlgorithm.HQQ:
        return numbers.hqq_asymmetric
    tiles = config.int4_packing_format == Int4PackingFormat.TILE_PACKED_TO_4D
    return numbers.tinygemm if tiles else numbers.int4


def _mx(element: Any, config: Any) -> str:
    mode = config.scaling_mode.value
    return f"{element_of(element)}/1x{config.block_size}*e8m0~{mode}"


def _nvfp4(config: Any) -> str:
    return "e2m1/1x16*e4m3/tensor" if config.use_dynamic_per_tensor_scale else "e2m1/1x16*e4m3"


def _static_int8(config: Any) -> None:
    act, _ = _pair(config.granularity, PerRow())
    if isinstance(act, PerRow) and act.dim != -1:
        raise MisfitError(f"a static activation scale is one for each token, PerRow(dim=-1), or one: got {act}.")


def _no_step(config: Any) -> None:
    if config.step is not None:
        raise MisfitError(
            f"{type(config).__name__}(step={config.step!r}) wants an observer, not there yet: leave it out."
        )


CONFIG_ROWS = (
    ConfigRow(
        name="Int4WeightOnlyConfig", about="int4 by groups, asymmetric",
        fields={
            "group_size": 128, "set_inductor_config": True, "int4_packing_format": Int4PackingFormat.PLAIN,
            "int4_choose_qparams_algorithm": Int4ChooseQParamsAlgorithm.TINYGEMM, "int4_tile_packed_ntile": 8, "version": 2,
        },
        scheme=lambda c, dtype: f"int4/{block_of(PerGroup(c.group_size))}{scale_of(dtype)}+fp32",
        tensor=lambda c: _INT4_TENSORS[Int4PackingFormat(c.int4_packing_format)], numbers=_int4_numbers,
    ),
    ConfigRow(
        name="PrototypeInt4WeightOnlyConfig", about="int4 by groups, asymmetric: torchao's for CPUs",
        fields={
            "group_size": 128, "int4_choose_qparams_algorithm": Int4ChooseQParamsAlgorithm.TINYGEMM, "set_inductor_config": True,
        },
        scheme=lambda c, dtype: f"int4/{block_of(PerGroup(c.group_size))}{scale_of(dtype)}+fp32",
        tensor=lambda c: "Int4OpaqueTensor",
        numbers=lambda c: (
            numbers.hqq_asymmetric if c.int4_choose_qparams_algorithm == Int4ChooseQParamsAlgorithm.HQQ else numbers.tinygemm
        ),
    ),
    ConfigRow(
        name="Float8DynamicActivationInt4WeightConfig", about="int4 weights, float8 activations",
        fields={"int4_packing_format": "preshuffled"},
        scheme=lambda c, dtype: f"int4/1x128{scale_of(dtype)}@e4m3/row",
        tensor=lambda c: _INT4_TENSORS[Int4PackingFormat(c.int4_packing_format)], numbers=lambda c: numbers.int4_symmetric,
    ),
    ConfigRow(
        name="Int8WeightOnlyConfig", about="int8 by rows",
        fields={"group_size": None, "granularity": PerRow, "set_inductor_config": True, "version": 2},
        scheme=lambda c, dtype: f"int8/{block_of(PerGroup(c.group_size) if c.group_size else c.granularity)}",
        tensor=lambda c: "Int8Tensor", numbers=lambda c: numbers.int8,
    ),
    ConfigRow(
        name="Int8DynamicActivationInt8WeightConfig", about="int8 weights and activations",
        fields={
            "act_mapping_type": MappingType.SYMMETRIC, "weight_only_decode": False, "granularity": PerRow,
            "set_inductor_config": True, "version": 2, "reduce_range": False,
        },
        scheme=_int8_scheme, tensor=lambda c: "Int8Tensor", numbers=lambda c: numbers.int8,
    ),
    ConfigRow(
        name="Int8StaticActivationInt8WeightConfig", about="int8 weights, activations by a scale that is given",
        fields={
            "act_quant_scale": None, "act_quant_zero_point": None, "granularity": PerRow,
            "act_mapping_type": MappingType.SYMMETRIC, "set_inductor_config": True, "version": 1, "reduce_range": False,
        },
        scheme=_int8_scheme, tensor=lambda c: "Int8Tensor", numbers=lambda c: numbers.int8, settle=_static_int8,
        methods={"get_act_quant_kwargs": _act_quant_kwargs},
    ),
    ConfigRow(
        name="Float8WeightOnlyConfig", about="float8 by rows",
        fields={"weight_dtype": _E4M3, "set_inductor_config": True, "version": 2, "granularity": PerRow},
        scheme=lambda c, dtype: f"{_float8(c.weight_dtype)}/{block_of(c.granularity)}",
        tensor=lambda c: "Float8Tensor", numbers=lambda c: numbers.float8,
    ),
    ConfigRow(
        name="Float8DynamicActivationFloat8WeightConfig", about="float8 weights and activations",
        fields={
            "activation_dtype": _E4M3, "weight_dtype": _E4M3, "granularity": None,
            "packing_format": Float8PackingFormat.PLAIN, "mm_config": None, "activation_value_lb": None,
            "activation_value_ub": None, "kernel_preference": KernelPreference.AUTO, "set_inductor_config": True,
            "version": 2, "alg_id": 0,
        },
        scheme=_float8_scheme, tensor=lambda c: "Float8Tensor", numbers=lambda c: numbers.float8, settle=_float8_settle,
    ),
    ConfigRow(
        name="IntxWeightOnlyConfig", about="int1 to int8, for linear layers, embeddings and convolutions",
        fields={
            "weight_dtype": torch.int8, "granularity": lambda: PerAxis(0), "mapping_type": MappingType.SYMMETRIC,
            "scale_dtype": None, "intx_packing_format": IntxPackingFormat.UNPACKED_TO_INT8,
            "intx_choose_qparams_algorithm": IntxChooseQParamsAlgorithm.AFFINE, "version": 2,
        },
        scheme=lambda c, dtype: _intx_weight(c.weight_dtype, c.granularity, c.mapping_type, c.scale_dtype or dtype),
        tensor=lambda c: "IntxUnpackedToInt8Tensor", numbers=lambda c: _intx_numbers(c, c.mapping_type),
    ),
    ConfigRow(
        name="Int8DynamicActivationIntxWeightConfig", about="int1 to int8 weights, int8 activations: phones",
        fields={
            "weight_dtype": torch.int8, "weight_granularity": lambda: PerGroup(32),
            "weight_mapping_type": MappingType.SYMMETRIC, "weight_scale_dtype": None,
            "act_mapping_type": MappingType.ASYMMETRIC, "intx_packing_format": IntxPackingFormat.UNPACKED_TO_INT8,
            "intx_choose_qparams_algorithm": IntxChooseQParamsAlgorithm.AFFINE, "version": 2,
        },
        scheme=lambda c, dtype: _intx_weight(
            c.weight_dtype, c.weight_granularity, c.weight_mapping_type, c.weight_scale_dtype or dtype
        ) + f"@int8/row{'+int8' if c.act_mapping_type is MappingType.ASYMMETRIC else ''}",
        tensor=lambda c: "IntxUnpackedToInt8Tensor", numbers=lambda c: _intx_numbers(c, c.weight_mapping_type),
    ),
    ConfigRow(
        name="MXDynamicActivationMXWeightConfig", about="MXFP8, MXFP6 and MXFP4",
        fields={
            "block_size": 32, "activation_dtype": _E4M3, "weight_dtype": _E4M3,
            "kernel_preference": KernelPreference.AUTO, "scaling_mode": ScaleCalculationMode.RCEIL,
        },
        scheme=lambda c, dtype: f"{_mx(c.weight_dtype, c)}@{_mx(c.activation_dtype, c)}",
        tensor=lambda c: "MXTensor", numbers=lambda c: numbers.own,
    ),
    ConfigRow(
        name="NVFP4DynamicActivationNVFP4WeightConfig", about="NVFP4 weights and activations",
        fields={"use_triton_kernel": True, "use_dynamic_per_tensor_scale": True, "step": None},
        scheme=lambda c, dtype: f"{_nvfp4(c)}@{_nvfp4(c)}", settle=_no_step,
        tensor=lambda c: "NVFP4Tensor", numbers=lambda c: numbers.own,
    ),
    ConfigRow(
        name="NVFP4WeightOnlyConfig", about="NVFP4 weights",
        fields={"use_dynamic_per_tensor_scale": True},
        scheme=lambda c, dtype: _nvfp4(c), tensor=lambda c: "NVFP4Tensor", numbers=lambda c: numbers.own,
    ),
    ConfigRow(
        name="NF4WeightOnlyConfig", about="NF4 by QLoRA, double quantized",
        fields={"block_size": 64, "scaler_block_size": 256},
        scheme=lambda c, dtype: f"nf4/1x{c.block_size}*int8/1x{c.scaler_block_size}",
        tensor=lambda c: "NF4Tensor", numbers=lambda c: numbers.own,
    ),
    ConfigRow(
        name="Int8DynamicActivationInt4WeightConfig", about="int4 weights by groups of 32, int8 activations",
        fields={
            "group_size": 32, "act_mapping_type": MappingType.ASYMMETRIC, "mapping_type": MappingType.SYMMETRIC,
            "set_inductor_config": True,
        },
        scheme=lambda c, dtype: _intx_weight(torch.int4, PerGroup(c.group_size), c.mapping_type, dtype)
        + f"@int8/row{'+int8' if c.act_mapping_type is MappingType.ASYMMETRIC else ''}",
        tensor=lambda c: "IntxUnpackedToInt8Tensor", numbers=lambda c: numbers.intx(c.mapping_type),
    ),
    ConfigRow(
        name="UIntxWeightOnlyConfig", about="uint1 to uint8 by groups, asymmetric",
        fields={"group_size": 128, "bit_width": 4, "packing_bitwidth": None, "set_inductor_config": True},
        scheme=lambda c, dtype: f"uint{c.bit_width}/{block_of(PerGroup(c.group_size or -1))}{scale_of(dtype)}+uint8",
        tensor=lambda c: "IntxUnpackedToInt8Tensor", numbers=lambda c: numbers.intx(MappingType.ASYMMETRIC),
    ),
    ConfigRow(
        name="Int8DynamicActivationUIntxWeightConfig", about="uint1 to uint8 weights, int8 activations",
        fields={"group_size": 128, "bit_width": 4, "packing_bitwidth": None, "set_inductor_config": True},
        scheme=lambda c, dtype: f"uint{c.bit_width}/{block_of(PerGroup(c.group_size or -1))}{scale_of(dtype)}+uint8@int8/row",
        tensor=lambda c: "IntxUnpackedToInt8Tensor", numbers=lambda c: numbers.intx(MappingType.ASYMMETRIC),
    ),
    ConfigRow(
        name="GGUFWeightOnlyConfig", about="4 bits in blocks of 32, their scales in 6 bits by superblocks",
        fields={"dtype": torch.uint4, "n_blocks_per_superblock": 8},
        scheme=lambda c, dtype: f"{element_of(c.dtype)}/1x32*uint6/1x{c.n_blocks_per_superblock}+fp16",
        tensor=lambda c: "GGUFQuantizedTensor", numbers=lambda c: numbers.own,
    ),
    ConfigRow(
        name="UIntXWeightOnlyConfig", about="uint1 to uint8 by groups, of torchao before 0.16",
        fields={"dtype": torch.uint4, "group_size": 64, "pack_dim": -1, "use_hqq": False, "set_inductor_config": True},
        scheme=lambda c, dtype: f"{element_of(c.dtype)}/{block_of(PerGroup(c.group_size))}{scale_of(dtype)}+uint8",
        tensor=lambda c: "IntxUnpackedToInt8Tensor", numbers=lambda c: numbers.intx(MappingType.ASYMMETRIC),
    ),
    ConfigRow(
        name="GemliteUIntXWeightOnlyConfig", about="uint1 to uint8 by groups, of torchao before 0.16",
        fields={
            "group_size": 128, "bit_width": 4, "packing_bitwidth": None, "mode": "weight_only", "set_inductor_config": True,
        },
        scheme=lambda c, dtype: f"uint{c.bit_width}/{block_of(PerGroup(c.group_size or -1))}{scale_of(dtype)}+uint8",
        tensor=lambda c: "IntxUnpackedToInt8Tensor", numbers=lambda c: numbers.intx(MappingType.ASYMMETRIC),
    ),
    ConfigRow(
        name="Int4DynamicActivationInt4WeightConfig", about="int4 weights and activations by rows, of torchao before 0.16",
        fields={
            "mapping_type": MappingType.SYMMETRIC, "act_mapping_type": MappingType.SYMMETRIC, "set_inductor_config": True,
        },
        scheme=lambda c, dtype: f"int4/row{scale_of(dtype)}@int4/row",
        tensor=lambda c: "IntxUnpackedToInt8Tensor", numbers=lambda c: numbers.intx(c.mapping_type),
    ),
    ConfigRow(
        name="FPXWeightOnlyConfig", about="float6 and float4 by rows, of torchao before 0.16",
        fields={"ebits": 3, "mbits": 2, "set_inductor_config": True},
        scheme=lambda c, dtype: f"e{c.ebits}m{c.mbits}/row", tensor=lambda c: "FloatxTensor", numbers=lambda c: numbers.own,
    ),
)  # fmt: skip
ROW_OF = {row.name: row for row in CONFIG_ROWS}


def _made(default: Any) -> Any:
    """A field's default: what a factory makes, or the value itself."""
    return dataclasses.field(default_factory=default) if callable(default) else dataclasses.field(default=default)


def _dataclass_of(row: ConfigRow) -> type[AOBaseConfig]:
    def __post_init__(self: Any) -> None:
        row.settle(self)

    fields = [(name, Any, _made(default)) for name, default in row.fields.items()]
    namespace: dict[str, Any] = {
        "__post_init__": __post_init__,
        "__doc__": f"{row.about}. See the row of this name.",
        "__module__": __name__,
    }
    namespace |= row.methods
    if "version" not in row.fields:
        namespace["version"] = row.version
    return dataclasses.make_dataclass(row.name, fields, bases=(AOBaseConfig,), namespace=namespace)


CONFIGS = {row.name: _dataclass_of(row) for row in CONFIG_ROWS}
globals().update(CONFIGS)


def row_of(config: AOBaseConfig) -> ConfigRow | None:
    """The row of a configuration, or of the one that it extends; None for a third party's."""
    return next((ROW_OF[kind.__name__] for kind in type(config).__mro__ if CONFIGS.get(kind.__name__) is kind), None)


def scheme_of(config: AOBaseConfig, dtype: torch.dtype = torch.bfloat16) -> str:
    """Our scheme for a configuration and the dtype of the weight.

    >>> scheme_of(CONFIGS["Int8DynamicActivationInt8WeightConfig"]())
    'int8/row@int8/row'
    """
    row = row_of(config)
    if row is None:
        raise MisfitError(f"{type(config).__name__} is no configuration of torchao's: register a handler for it.")
    return str(Scheme.parse(row.scheme(config, dtype)))


# -- by name ----------------------------------------------------------------------------------------------------------


@dataclass
class FqnToConfig(AOBaseConfig):
    """A configuration for each module or parameter by its full name, by "re:" and a regular expression, or by "_default".

    None keeps what matches as it is. `module_fqn_to_config` is the older name of the same mapping.
    """

    fqn_to_config: OrderedDict[str, AOBaseConfig | None] = dataclasses.field(default_factory=OrderedDict)
    module_fqn_to_config: OrderedDict[str, AOBaseConfig | None] = dataclasses.field(default_factory=OrderedDict)
    version: int = 1

    def __post_init__(self) -> None:
        if self.fqn_to_config and self.module_fqn_to_config and self.fqn_to_config != self.module_fqn_to_config:
            raise MisfitError(
                "fqn_to_config and module_fqn_to_config are one mapping under two names: pass one of them."
            )
        given = OrderedDict(self.fqn_to_config or self.module_fqn_to_config)
        self.fqn_to_config = self.module_fqn_to_config = given
        if "_default" in given:
            warnings.warn(
                "the key '_default' is deprecated: name the layers, or use a regular expression such as 're:.*'.",
                DeprecationWarning,
                stacklevel=3,
            )

    def __str__(self) -> str:
        lines = "\n".join(f"  {name!r}: {config}," for name, config in self.fqn_to_config.items())
        return f"FqnToConfig({{\n{lines}\n}})"


# -- JSON -------------------------------------------------------------------------------------------------------------

_WORDS = {name: value for name, value in vars(words).items() if isinstance(value, type) and name[0] != "_"}


def classes() -> dict[str, type]:
    """What may be named in JSON: our configurations and torchao's small words, and nothing that would have to be imported."""
    return {
        **_WORDS,
        **CONFIGS,
        "FqnToConfig": FqnToConfig,
        "ModuleFqnToConfig": FqnToConfig,
        "AOPerModuleConfig": FqnToConfig,
    }


_OWN_MODULES = frozenset({"torchao.quantization", "torchao.prototype.mx_formats", "torchao.prototype.quantization"})
ALLOWED_AO_MODULES = set(_OWN_MODULES)  # a third party adds the module of its configurations


def config_to_dict(config: AOBaseConfig) -> dict[str, Any]:
    """A configuration as plain values, ready for JSON.

    Raises:
        TypeError: what JSON does not hold, such as a tensor.

    >>> config_to_dict(CONFIGS["NVFP4WeightOnlyConfig"]())["_data"]
    {'use_dynamic_per_tensor_scale': True}
    """
    if not isinstance(config, AOBaseConfig):
        raise TypeError(f"config_to_dict wants a configuration, got {type(config).__name__}.")
    return json.loads(json.dumps(plain(config)))


def plain(value: Any, *, versions: bool = True) -> Any:
    """A configuration or an attribute of a tensor as plain values; `versions`: beside each record, as configurations have them.

    Raises:
        TypeError: what JSON does not hold, such as a tensor.
    """
    if isinstance(value, torch.dtype):
        return {"_type": "torch.dtype", "_data": str(value).removeprefix("torch.")}
    if isinstance(value, enum.Enum):
        return {"_type": type(value).__name__, "_data": value.name}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.name != "version"]
        version = {"_version": getattr(value, "version", 1)} if versions else {}
        data = {name: plain(getattr(value, name), versions=versions) for name in fields}
        return {"_type": type(value).__name__, **version, "_data": data}
    if isinstance(value, Mapping):
        return {key: plain(item, versions=versions) for key, item in value.items()}
    if isinstance(value, (list, tuple, torch.Size)):
        return [plain(item, versions=versions) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"JSON does not hold a {type(value).__name__}: {value!r:.80}")


def config_from_dict(data: Mapping[str, Any]) -> AOBaseConfig:
    """The inverse of `config_to_dict`.

    Raises:
        SpellingError: an unknown configuration or field. MisfitError: no configuration at all.
    """
    if not isinstance(data, Mapping) or "_type" not in data or "_data" not in data:
        raise MisfitError(f"a configuration in JSON wants the keys _type and _data, got {data!r:.120}.")
    made = from_plain(data)
    if not isinstance(made, AOBaseConfig):
        raise SpellingError.of("configuration", str(data["_type"]), [*CONFIGS, "FqnToConfig"])
    return made


def from_plain(value: Any) -> Any:
    """The inverse of `plain`; what is not known is a SpellingError that names the nearest."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if "_type" not in value:
        return OrderedDict((key, from_plain(item)) for key, item in value.items())
    name, data = str(value["_type"]), value["_data"]
    if name == "torch.dtype":
        dtype = getattr(torch, str(data), None)
        if not isinstance(dtype, torch.dtype):
            raise SpellingError.of("dtype", str(data), [str(d).removeprefix("torch.") for d in _dtypes()])
        return dtype
    kind = classes().get(name) or _allowed(name)
    if kind is None:
        near = SpellingError.of("configuration", name, classes())
        raise SpellingError(f"Failed to find class {name} in any of the allowed modules: {near}")
    if issubclass(kind, enum.Enum):
        if data not in kind.__members__:
            raise SpellingError.of(name, str(data), kind.__members__)
        return kind[data]
    fields = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - fields)
    if unknown:
        raise SpellingError.of(f"field of {name}", unknown[0], fields)
    version = {"version": value["_version"]} if "version" in fields and "_version" in value else {}
    return kind(**{key: from_plain(item) for key, item in data.items()}, **version)


def _allowed(name: str) -> type | None:
    """A third party's configuration, from the modules that it added to ALLOWED_AO_MODULES."""
    allowed = importlib.import_module(f"{__package__}.core.config").ALLOWED_AO_MODULES  # as seen, and set, from outside
    for module in sorted(set(allowed) - _OWN_MODULES):
        kind = getattr(importlib.import_module(module), name, None)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind
    return None


def _dtypes() -> list[torch.dtype]:
    return [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
