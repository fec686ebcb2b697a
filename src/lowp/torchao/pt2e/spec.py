"""What a quantizer writes on a graph: for each tensor that a node reads or gives, in which integers it is seen.

    node.meta["quantization_annotation"] = QuantizationAnnotation(
        input_qspec_map={weight_node: QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -127, 127, ...)},
        output_qspec=SharedQuantizationSpec((input_node, node)),
    )

A spec is the integers and the observer that finds their scale, or a scale that is given, or the one of another tensor, or one
that follows from others (a bias, whose scale is that of activation times weight).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

Q_ANNOTATION_KEY = "quantization_annotation"
EdgeOrNode = tuple[Node, Node] | Node
OperatorPatternType = list[Callable[..., Any]]


class QuantizationSpecBase(ABC):  # noqa: B024  (abstract by being the base; it has no methods)
    """The base of the ways to say how a tensor is seen."""


@dataclass(eq=True, frozen=True)
class QuantizationSpec(QuantizationSpecBase):
    """Integers, and what makes the observer that finds their scale.

    Args:
        dtype: of the codes. observer_or_fake_quant_ctr: a class, or one with arguments (`.with_args`). quant_min, quant_max: the
        codes. qscheme: torch's, per tensor or per channel. ch_axis: the channels' axis. is_dynamic: the scale of each call.
    """

    dtype: torch.dtype
    observer_or_fake_quant_ctr: Any
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    ch_axis: int | None = None
    is_dynamic: bool = False

    def __post_init__(self) -> None:
        if self.quant_min is not None and self.quant_max is not None and self.quant_min > self.quant_max:
            raise ValueError(f"quant_min is at most quant_max, got {self.quant_min} and {self.quant_max}.")


@dataclass(eq=True, frozen=True)
class FixedQParamsQuantizationSpec(QuantizationSpecBase):
    """Integers with a scale that is known, such as 1/256 for a sigmoid."""

    dtype: torch.dtype
    scale: float
    zero_point: int
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    is_dynamic: bool = False


@dataclass(eq=True, frozen=True)
class SharedQuantizationSpec(QuantizationSpecBase):
    """The same observer as another node's output, or as an edge (producer, consumer)."""

    edge_or_node: EdgeOrNode


@dataclass(eq=True, frozen=True)
class DerivedQuantizationSpec(QuantizationSpecBase):
    """A scale that follows from those of others: derive_qparams_fn(their observers) -> (scale, zero_point)."""

    derived_from: list[EdgeOrNode]
    derive_qparams_fn: Callable[[list[Any]], tuple[torch.Tensor, torch.Tensor]]
    dtype: torch.dtype
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    ch_axis: int | None = None
    is_dynamic: bool = False


@dataclass
class QuantizationAnnotation:
    """How a node's inputs and its output are seen; `_annotated` says that a pattern has it already."""

    input_qspec_map: dict[Node, QuantizationSpecBase | None] = field(default_factory=dict)
    output_qspec: QuantizationSpecBase | None = None
    allow_implicit_sharing: bool = True
    _annotated: bool = False


class Quantizer(ABC):
    """What knows a backend: it annotates a graph."""

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Change the graph before it is annotated; nothing by default."""
        return model

    @abstractmethod
    def annotate(self, model: GraphModule) -> GraphModule:
        """Write a QuantizationAnnotation on the nodes that are to be quantized."""

    @abstractmethod
    def validate(self, model: GraphModule) -> None:
        """Refuse an annotated graph that the backend does not run."""

    def prepare_obs_or_fq_callback(  # noqa: B027  (a hook: most quantizers have none)
        self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]
    ) -> None:
        """Look at, or exchange, the observers before they are put into the graph."""


class ComposableQuantizer(Quantizer):
    """Several quantizers one after the other; an earlier one's annotations stand."""

    def __init__(self, quantizers: list[Quantizer]) -> None:
        super().__init__()
        self.quantizers = quantizers

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        for quantizer in self.quantizers:
            model = quantizer.transform_for_annotation(model)
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        for quantizer in self.quantizers:
            before = {node: node.meta[Q_ANNOTATION_KEY] for node in model.graph.nodes if Q_ANNOTATION_KEY in node.meta}
            quantizer.annotate(model)
            for node, annotation in before.items():
                if node.meta.get(Q_ANNOTATION_KEY) is not annotation:
                    raise RuntimeError(
                        f"{type(quantizer).__name__} annotates {node.name} again: a node has one quantizer."
                    )
        return model

    def validate(self, model: GraphModule) -> None:
        for quantizer in self.quantizers:
            quantizer.validate(model)


@dataclass(eq=True, frozen=True)
class QuantizationConfig:
    """The specs of an operator's activation, output, weight and bias."""

    input_activation: QuantizationSpec | None
    output_activation: QuantizationSpec | None
    weight: QuantizationSpec | None
    bias: QuantizationSpec | None
    is_qat: bool = False


class OperatorConfig(NamedTuple):
    """A configuration and the patterns of operators that it is for."""

    config: QuantizationConfig
    operators: list[OperatorPatternType]


def get_input_act_qspec(quantization_config: QuantizationConfig | None) -> QuantizationSpec | None:
    """The spec of activations that come in."""
    return quantization_config.input_activation if quantization_config else None


def get_output_act_qspec(quantization_config: QuantizationConfig | None) -> QuantizationSpec | None:
    """The spec of what goes out."""
    return quantization_config.output_activation if quantization_config else None


def get_weight_qspec(quantization_config: QuantizationConfig | None) -> QuantizationSpec | None:
    """The spec of weights."""
    return quantization_config.weight if quantization_config else None


def get_bias_qspec(quantization_config: QuantizationConfig | None) -> QuantizationSpec | None:
    """The spec of biases."""
    return quantization_config.bias if quantization_config else None


def annotate_input_qspec_map(node: Node, input_node: Node, qspec: QuantizationSpecBase | None) -> None:
    """Say how a node sees one of its inputs."""
    annotation = node.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation())
    annotation.input_qspec_map[input_node] = qspec


def annotate_output_qspec(node: Node, qspec: QuantizationSpecBase | None) -> None:
    """Say how a node's output is seen."""
    node.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation()).output_qspec = qspec


def is_annotated(nodes: list[Node]) -> bool:
    """Whether a pattern has one of the nodes already."""
    return any(Q_ANNOTATION_KEY in node.meta and node.meta[Q_ANNOTATION_KEY]._annotated for node in nodes)


def is_valid_annotation(annotation: QuantizationAnnotation | None) -> bool:
    """Whether an annotation says anything."""
    return annotation is not None and (bool(annotation.input_qspec_map) or annotation.output_qspec is not None)


def get_module_name_filter(module_name: str) -> Callable[[Node], bool]:
    """Whether a node comes from the module of this name, or from inside it.

    >>> callable(get_module_name_filter("blocks.0"))
    True
    """

    def inside(node: Node) -> bool:
        stack = node.meta.get("nn_module_stack", {}).values()
        names = [name.removeprefix("L['self'].").removeprefix("L__self__.") for name, _ in stack]
        return any(name == module_name or name.startswith(f"{module_name}.") for name in names)

    return inside


def get_module_type_filter(module_type: Any) -> Callable[[Node], bool]:
    """Whether a node comes from a module of this class."""
    wanted = module_type if isinstance(module_type, str) else f"{module_type.__module__}.{module_type.__qualname__}"

    def inside(node: Node) -> bool:
        kinds = [kind for _, kind in node.meta.get("nn_module_stack", {}).values()]
        return any(
            wanted in (kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}",) for kind in kinds
        )

    return inside
