"""Which nodes a quantizer annotates: a product with its activation function, sums, and operators that only pass numbers on.

    product     conv, linear [-> relu, hardtanh]      input and weight at the product, output at the last node
    sum         add, mul [-> relu]                    both inputs, output
    passes on   max_pool2d, view, permute, cat ...    output shared with the input

A quantizer is `annotate(model, config, which nodes)` over a table of these; XNNPACK's and x86's differ in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.utils.source_matcher_utils import get_source_partitions  # noqa: F401  (a name of torchao's)

from .spec import (
    Q_ANNOTATION_KEY,
    QuantizationAnnotation,
    QuantizationConfig,
    SharedQuantizationSpec,
    get_bias_qspec,
    get_input_act_qspec,
    get_output_act_qspec,
    get_weight_qspec,
    is_annotated,
)

LINEAR = {"aten.linear.default"}
CONV = {"aten.conv1d.default", "aten.conv2d.default"}
CONV_TRANSPOSE = {"aten.conv_transpose1d.default", "aten.conv_transpose2d.input"}
ADD = {"aten.add.Tensor", "aten.add_.Tensor"}
MUL = {"aten.mul.Tensor", "aten.mul_.Tensor"}
CAT = {"aten.cat.default"}
POOL = {"aten.adaptive_avg_pool2d.default"}
RELU = {"aten.relu.default", "aten.relu_.default", "aten.hardtanh.default", "aten.hardtanh_.default"}
PASSES_ON = {
    f"aten.{name}"
    for name in [
        "max_pool2d.default",
        "avg_pool2d.default",
        "mean.dim",
        "mean.default",
        "permute.default",
        "view.default",
        "reshape.default",
        "flatten.using_ints",
        "slice.Tensor",
        "slice_copy.Tensor",
        "transpose.int",
        "squeeze.dim",
        "squeeze_copy.dim",
        "unsqueeze.default",
        "pixel_shuffle.default",
        "hardtanh.default",
        "hardtanh_.default",
        "contiguous.default",
        "dropout.default",
        "expand.default",
    ]
}
Filter = Callable[[Node], bool]


@dataclass(frozen=True)
class Operators:
    """What a backend runs in integers.

    Args:
        products, sums, joins: operators with a weight, of two tensors, of a list. passes_on: what only moves numbers.
        outputs: whether the outputs of products are quantized too.
    """

    products: frozenset[str]
    sums: frozenset[str]
    joins: frozenset[str]
    passes_on: frozenset[str]
    outputs: bool = True


def annotate(
    model: GraphModule, config: QuantizationConfig | None, operators: Operators, takes: Filter = lambda node: True
) -> None:
    """Annotate the nodes that the filter takes; what has an annotation keeps it."""
    if config is None:
        return
    for node in model.graph.nodes:
        if node.op != "call_function" or not takes(node):
            continue
        if str(node.target) in operators.products:
            _product(node, config, operators.outputs)
        elif (
            str(node.target) in operators.sums
            and config.input_activation is not None
            and not config.input_activation.is_dynamic
        ):
            _sum(node, config)
        elif (
            str(node.target) in operators.joins
            and config.input_activation is not None
            and not config.input_activation.is_dynamic
        ):
            _join(node, config)


def keep(model: GraphModule, takes: Filter) -> None:
    """Leave the nodes that the filter takes in floats."""
    for node in model.graph.nodes:
        if takes(node) and not is_annotated([node]):
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(_annotated=True)


def _last(node: Node) -> Node:
    """The activation function that alone reads a node, or the node."""
    user = next(iter(node.users), None)
    return user if user is not None and len(node.users) == 1 and str(user.target) in RELU else node


def _product(node: Node, config: QuantizationConfig, outputs: bool) -> None:
    last = _last(node)
    if is_annotated([node, last]):
        return
    x, weight = node.args[:2]
    inputs: dict[Node, Any] = {}
    if isinstance(x, Node) and get_input_act_qspec(config) is not None:
        inputs[x] = get_input_act_qspec(config)
    if isinstance(weight, Node) and get_weight_qspec(config) is not None:
        inputs[weight] = get_weight_qspec(config)
    bias = node.args[2] if len(node.args) > 2 else None
    if isinstance(bias, Node) and get_bias_qspec(config) is not None:
        inputs[bias] = get_bias_qspec(config)
    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)
    if last is not node:
        last.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(_annotated=True)
    output = get_output_act_qspec(config)
    if outputs and output is not None and not output.is_dynamic:
        last.meta[Q_ANNOTATION_KEY].output_qspec = output


def _is_float_tensor(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _sum(node: Node, config: QuantizationConfig) -> None:
    last = _last(node)
    given = [arg for arg in node.args[:2] if isinstance(arg, Node)]
    if is_annotated([node, last]) or len(given) < 2 or not all(map(_is_float_tensor, given)):
        return
    spec = get_input_act_qspec(config)
    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map=dict.fromkeys(given, spec), _annotated=True)
    if last is not node:
        last.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(_annotated=True)
    last.meta[Q_ANNOTATION_KEY].output_qspec = get_output_act_qspec(config)


def _join(node: Node, config: QuantizationConfig) -> None:
    if is_annotated([node]):
        return
    first, *others = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
    shared = SharedQuantizationSpec((first, node))
    inputs = {first: get_input_act_qspec(config), **{other: shared for other in others if other is not first}}
    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map=inputs, output_qspec=shared, _annotated=True)


def pass_on(model: GraphModule, operators: Iterable[str]) -> None:
    """What only moves numbers has the integers of its input: annotate it behind a node that is quantized."""
    for node in model.graph.nodes:
        if (
            str(node.target) not in operators
            or is_annotated([node])
            or not node.args
            or not isinstance(node.args[0], Node)
        ):
            continue
        before = node.args[0].meta.get(Q_ANNOTATION_KEY)
        if before is None or before.output_qspec is None:
            continue
        shared = SharedQuantizationSpec(node.args[0])
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
            input_qspec_map={node.args[0]: shared},
            output_qspec=SharedQuantizationSpec((node.args[0], node)),
            _annotated=True,
        )
