"""An XNNPACK-style quantizer: int8 everywhere, signed, activations by tensor, weights by tensor or channel.

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))

Settings are looked up by name of module, then class of module, then operator, then globally.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from . import patterns, watch
from .spec import QuantizationConfig, QuantizationSpec, Quantizer, get_module_name_filter, get_module_type_filter

_EPS = 2.0**-12
OPERATORS = patterns.Operators(
    products=frozenset(patterns.LINEAR | patterns.CONV | patterns.CONV_TRANSPOSE),
    sums=frozenset(patterns.ADD | patterns.MUL),
    joins=frozenset(patterns.CAT | patterns.POOL),
    passes_on=frozenset(patterns.PASSES_ON),
)
DYNAMIC = patterns.Operators(
    products=frozenset(patterns.LINEAR), sums=frozenset(), joins=frozenset(), passes_on=frozenset(), outputs=False
)


def get_symmetric_quantization_config(
    is_per_channel: bool = False,
    is_qat: bool = False,
    is_dynamic: bool = False,
    act_qmin: int = -128,
    act_qmax: int = 127,
    weight_qmin: int = -127,
    weight_qmax: int = 127,
) -> QuantizationConfig:
    """int8 activations by tensor, asymmetric; int8 weights, symmetric.

    Args:
        is_per_channel: a scale for each output channel of a weight. is_qat: fake quantizers that train. is_dynamic: the scale of
        an activation from itself, at each call.
    """
    moving = watch.MovingAverageMinMaxObserver
    if is_dynamic and not is_qat:
        act_ctr: Any = watch.PlaceholderObserver.with_args(eps=_EPS)
    elif is_qat:
        averaging = moving.with_args(averaging_constant=1) if is_dynamic else moving
        act_ctr = watch.FusedMovingAvgObsFakeQuantize.with_args(eps=_EPS, observer=averaging)
    else:
        act_ctr = watch.HistogramObserver.with_args(eps=_EPS)
    act = QuantizationSpec(torch.int8, act_ctr, act_qmin, act_qmax, torch.per_tensor_affine, is_dynamic=is_dynamic)
    channels, tensor = watch.PerChannelMinMaxObserver, watch.MinMaxObserver
    if is_qat:
        found = watch.MovingAveragePerChannelMinMaxObserver if is_per_channel else moving
        weight_ctr: Any = watch.FusedMovingAvgObsFakeQuantize.with_args(eps=_EPS, observer=found)
    else:
        weight_ctr = (channels if is_per_channel else tensor).with_args(eps=_EPS)
    scheme = torch.per_channel_symmetric if is_per_channel else torch.per_tensor_symmetric
    weight = QuantizationSpec(torch.int8, weight_ctr, weight_qmin, weight_qmax, scheme, 0 if is_per_channel else None)
    return QuantizationConfig(act, None if is_dynamic else act, weight, None, is_qat)


class XNNPACKQuantizer(Quantizer):
    """Annotates convolutions, linear layers, sums, products, concatenations and what passes numbers on."""

    def __init__(self) -> None:
        super().__init__()
        self.global_config: QuantizationConfig | None = None
        self.operator_type_config: dict[Any, QuantizationConfig | None] = {}
        self.module_type_config: dict[Any, QuantizationConfig | None] = {}
        self.module_name_config: dict[str, QuantizationConfig | None] = {}

    def set_global(self, quantization_config: QuantizationConfig) -> XNNPACKQuantizer:
        """The configuration of what nothing else is said about."""
        self.global_config = quantization_config
        return self

    def set_operator_type(self, operator_type: Any, quantization_config: QuantizationConfig | None) -> XNNPACKQuantizer:
        """The configuration of an operator such as torch.ops.aten.linear.default."""
        self.operator_type_config[operator_type] = quantization_config
        return self

    def set_module_type(
        self, module_type: Callable[..., Any], quantization_config: QuantizationConfig | None
    ) -> XNNPACKQuantizer:
        """The configuration of what comes from modules of a class."""
        self.module_type_config[module_type] = quantization_config
        return self

    def set_module_name(self, module_name: str, quantization_config: QuantizationConfig | None) -> XNNPACKQuantizer:
        """The configuration of what comes from a module; None leaves it in floats."""
        self.module_name_config[module_name] = quantization_config
        return self

    def steps(self) -> list[tuple[Any, QuantizationConfig | None]]:
        """Which nodes, and their configuration, in the order in which they are looked up."""
        steps: list[tuple[Any, QuantizationConfig | None]] = []
        steps += [(get_module_name_filter(name), config) for name, config in self.module_name_config.items()]
        steps += [(get_module_type_filter(kind), config) for kind, config in self.module_type_config.items()]
        steps += [(_of_operator(operator), config) for operator, config in self.operator_type_config.items()]
        if self.global_config is not None:
            steps.append((lambda node: True, self.global_config))
        return steps

    def annotate(self, model: GraphModule) -> GraphModule:
        for takes, config in self.steps():
            if config is None:
                patterns.keep(model, takes)
                continue
            dynamic = config.input_activation is not None and config.input_activation.is_dynamic
            patterns.annotate(model, config, DYNAMIC if dynamic else OPERATORS, takes)
        patterns.pass_on(model, OPERATORS.passes_on)
        return model

    def validate(self, model: GraphModule) -> None:
        """XNNPACK runs all that is annotated here."""


def _of_operator(operator: Any) -> Any:
    packet = str(getattr(operator, "overloadpacket", operator))
    return lambda node: str(getattr(node.target, "overloadpacket", node.target)) == packet
