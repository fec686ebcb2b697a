"""An x86 quantizer for inductor: unsigned 8-bit activations by tensor, int8 weights by channel, products alone.

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())

oneDNN multiplies u8 x s8; the output of a product stays in floats unless the next product reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from ...errors import MisfitError
from . import patterns, watch
from .spec import QuantizationConfig, QuantizationSpec
from .xnnpack import XNNPACKQuantizer

_EPS = 2.0**-12
OPERATORS = patterns.Operators(
    products=frozenset(patterns.LINEAR | patterns.CONV),
    sums=frozenset(),
    joins=frozenset(),
    passes_on=frozenset(),
    outputs=False,
)
_FUNCTIONS: dict[Any, tuple[Any, ...]] = {
    F.linear: (torch.ops.aten.linear.default,),
    F.conv1d: (torch.ops.aten.conv1d.default,),
    F.conv2d: (torch.ops.aten.conv2d.default,),
    F.conv3d: (torch.ops.aten.conv3d.default,),
}


def get_default_x86_inductor_quantization_config(
    is_qat: bool = False, is_dynamic: bool = False, reduce_range: bool = False
) -> QuantizationConfig:
    """uint8 activations by tensor, asymmetric, int8 weights by channel, symmetric.

    Args:
        reduce_range: 7 bits for activations, for CPUs without VNNI.
    """
    if is_dynamic and not is_qat:
        act_ctr: Any = watch.PlaceholderObserver.with_args(eps=_EPS)
    elif is_qat:
        act_ctr = watch.FusedMovingAvgObsFakeQuantize.with_args(eps=_EPS, observer=watch.MovingAverageMinMaxObserver)
    else:
        act_ctr = watch.HistogramObserver.with_args(eps=_EPS)
    high = 127 if reduce_range else 255
    act = QuantizationSpec(torch.uint8, act_ctr, 0, high, torch.per_tensor_affine, is_dynamic=is_dynamic)
    if is_qat:
        found = watch.MovingAveragePerChannelMinMaxObserver
        weight_ctr: Any = watch.FusedMovingAvgObsFakeQuantize.with_args(eps=_EPS, observer=found)
    else:
        weight_ctr = watch.PerChannelMinMaxObserver.with_args(eps=_EPS)
    weight = QuantizationSpec(torch.int8, weight_ctr, -128, 127, torch.per_channel_symmetric, 0)
    return QuantizationConfig(act, None if is_dynamic else act, weight, None, is_qat)


class X86InductorQuantizer(XNNPACKQuantizer):
    """Annotates the inputs and weights of convolutions and linear layers."""

    def get_global_quantization_config(self) -> QuantizationConfig | None:
        """The configuration of what nothing else is said about."""
        return self.global_config

    def set_function_type_qconfig(
        self, function_type: Callable[..., Any], quantization_config: QuantizationConfig | None
    ) -> X86InductorQuantizer:
        """The configuration of a function such as torch.nn.functional.linear.

        Raises:
            MisfitError: a function that is not annotated.
        """
        operators = _FUNCTIONS.get(function_type)
        if operators is None:
            raise MisfitError(
                f"set_function_type_qconfig wants torch.nn.functional.linear or a convolution, got {function_type}."
            )
        for operator in operators:
            self.set_operator_type(operator, quantization_config)
        return self

    def set_module_type_qconfig(
        self, module_type: Callable[..., Any], quantization_config: QuantizationConfig | None
    ) -> X86InductorQuantizer:
        """`set_module_type` under this quantizer's own name."""
        self.set_module_type(module_type, quantization_config)
        return self

    def set_module_name_qconfig(
        self, module_name: str, quantization_config: QuantizationConfig | None
    ) -> X86InductorQuantizer:
        """`set_module_name` under this quantizer's own name."""
        self.set_module_name(module_name, quantization_config)
        return self

    def annotate(self, model: GraphModule) -> GraphModule:
        for takes, config in self.steps():
            if config is None:
                patterns.keep(model, takes)
            else:
                patterns.annotate(model, config, OPERATORS, takes)
        return model
