"""From our spelling to torchao's configuration: the inverse of `config.scheme_of`, where torchao has one.

What is asked for is a configuration whose scheme is exactly the one given, so that a checkpoint says truly what is in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..errors import LowpError
from ..numerics import Scheme
from .config import CONFIGS, AOBaseConfig, scheme_of
from .spelling import dtype_of, granularity_of
from .words import MappingType, ScaleCalculationMode

_SCALES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def config_of(scheme: str, dtype: torch.dtype = torch.bfloat16) -> AOBaseConfig | None:
    """The configuration whose scheme this is, for weights of a dtype; None where torchao has none.

    >>> type(config_of("int8/row@int8/row")).__name__
    'Int8DynamicActivationInt8WeightConfig'
    """
    wanted = Scheme.parse(scheme)
    for name, fields in _candidates(wanted):
        try:
            config = CONFIGS[name](**fields)
            if scheme_of(config, dtype) == str(wanted):
                return config
        except LowpError:  # a configuration that refuses this scheme is not the one
            continue
    return None


def _candidates(scheme: Scheme) -> Iterator[tuple[str, dict[str, Any]]]:
    weight, act = scheme.weight, scheme.act
    if weight.is_identity or (act is not None and act.is_identity):
        return
    by = granularity_of(weight)
    mapping = MappingType.ASYMMETRIC if weight.zero_point else MappingType.SYMMETRIC
    if weight.element.name == "e2m1" and weight.scale != "e8m0":
        two = {"use_dynamic_per_tensor_scale": weight.nested is not None}
        yield ("NVFP4DynamicActivationNVFP4WeightConfig" if act else "NVFP4WeightOnlyConfig"), two
        return
    try:
        element = dtype_of(weight.element.name)
    except StopIteration:
        return
    if act is None:
        yield "Int8WeightOnlyConfig", {"granularity": by}
        yield "Int4WeightOnlyConfig", {"group_size": getattr(by, "group_size", -1)}
        scale = _SCALES.get(str(weight.scale))
        yield (
            "IntxWeightOnlyConfig",
            {"weight_dtype": element, "granularity": by, "mapping_type": mapping, "scale_dtype": scale},
        )
        yield "Float8WeightOnlyConfig", {"weight_dtype": element, "granularity": by}
        return
    both, asymmetric = [granularity_of(act), by], MappingType.ASYMMETRIC if act.zero_point else MappingType.SYMMETRIC
    act_element = dtype_of(act.element.name)
    yield "Int8DynamicActivationInt8WeightConfig", {"granularity": both, "act_mapping_type": asymmetric}
    yield (
        "Float8DynamicActivationFloat8WeightConfig",
        {"weight_dtype": element, "activation_dtype": act_element, "granularity": both},
    )
    yield "Float8DynamicActivationInt4WeightConfig", {}
    yield (
        "Int8DynamicActivationIntxWeightConfig",
        {
            "weight_dtype": element,
            "weight_granularity": by,
            "weight_mapping_type": mapping,
            "act_mapping_type": asymmetric,
        },
    )
    if weight.scale == "e8m0" and act.scale == "e8m0":
        size, mode = int(weight.block.split("x")[1]), ScaleCalculationMode(weight.rule)
        yield (
            "MXDynamicActivationMXWeightConfig",
            {"weight_dtype": element, "activation_dtype": act_element, "block_size": size, "scaling_mode": mode},
        )
