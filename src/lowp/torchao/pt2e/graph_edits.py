"""Small changes of an exported graph: train and eval, batch norm folded into the convolution before it, new attributes.

Operators are known by their names: a library that is loaded in between can make torch hand out new objects for them.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

_CONVS = ("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")
_NORM = "aten.batch_norm.default"
_TRAIN_FLAG = {"aten.dropout.default": 2, "aten.dropout_.default": 2, _NORM: 5}  # which argument says "training"


def _set_training(model: GraphModule, training: bool) -> GraphModule:
    for node in model.graph.nodes:
        at = _TRAIN_FLAG.get(str(node.target))
        if node.op == "call_function" and at is not None and len(node.args) > at:
            node.update_arg(at, training)
    model.recompile()
    return model


def move_exported_model_to_eval(model: GraphModule) -> GraphModule:
    """Turn dropout off and let batch norm use what it has gathered, in an exported graph, where `.eval()` cannot."""
    return _set_training(model, False)


def move_exported_model_to_train(model: GraphModule) -> GraphModule:
    """Turn dropout on and let batch norm use the batch, in an exported graph, where `.train()` cannot."""
    return _set_training(model, True)


def allow_exported_model_train_eval(model: GraphModule) -> GraphModule:
    """Let `.train()` and `.eval()` of an exported graph do what they do elsewhere."""

    def train(self: GraphModule, mode: bool = True) -> GraphModule:
        return _set_training(self, mode)

    model.train = types.MethodType(train, model)  # type: ignore[method-assign]
    model.eval = types.MethodType(lambda self: _set_training(self, False), model)  # type: ignore[method-assign]
    return model


def attribute(obj: nn.Module, fqn: str) -> Any:
    """The object of a get_attr node: what stands under a dotted name."""
    found: Any = obj
    for part in fqn.split("."):
        found = getattr(found, part)
    return found


class WrapperModule(nn.Module):
    """A function as a module, which is what torch.export takes."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


def graph_of_pattern(
    pattern: Callable[..., Any], example_inputs: tuple[Any, ...], is_cuda: bool = False, **kwargs: Any
) -> GraphModule:
    """A function as an exported graph, for a matcher of subgraphs."""
    if is_cuda:
        example_inputs = tuple(x.cuda() if isinstance(x, torch.Tensor) else x for x in example_inputs)
    module = pattern if isinstance(pattern, nn.Module) else WrapperModule(pattern)
    graph: GraphModule = torch.export.export(module, example_inputs, kwargs).module(check_guards=False)  # type: ignore[assignment]
    for node in list(graph.graph.nodes):
        if (
            str(node.target) == "aten.copy_.default" and not node.users
        ):  # what a batch norm writes back is not in the pattern
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def new_name(prefix: str) -> Callable[[nn.Module], str]:
    """A function that answers the first free name of this prefix in a module."""

    def first_free(module: nn.Module) -> str:
        number = 0
        while hasattr(module, f"{prefix.replace('.', '_')}{number}"):
            number += 1
        return f"{prefix.replace('.', '_')}{number}"

    return first_free


def add_attribute(model: GraphModule, prefix: str, value: Any) -> str:
    """Register a tensor or module under the first free name of this prefix; its name."""
    name = new_name(prefix)(model)
    if isinstance(value, nn.Module):
        model.add_submodule(name, value)
    else:
        model.register_buffer(name, value)
    return name


def constant_before(model: GraphModule, node: Node, prefix: str, value: torch.Tensor) -> Node:
    """A get_attr node of a new buffer, before a node."""
    name = add_attribute(model, prefix, value)
    with model.graph.inserting_before(node):
        made = model.graph.create_node("get_attr", name, (), {})
    made.meta["val"] = value
    return made


def fold_batch_norm(model: GraphModule) -> int:
    """Fold each batch norm into the convolution that it follows alone; how many there were.

    w' = w * gamma / sqrt(var + eps), b' = (b - mean) * gamma / sqrt(var + eps) + beta
    """
    folded = 0
    for norm in list(model.graph.nodes):
        conv = norm.args[0] if norm.op == "call_function" and str(norm.target) == _NORM else None
        if not isinstance(conv, Node) or str(conv.target) not in _CONVS or len(conv.users) != 1:
            continue
        if any(not isinstance(n, Node) or n.op != "get_attr" for n in (conv.args[1], *norm.args[1:5])):
            continue
        gamma, beta, mean, var = (attribute(model, n.target).detach() for n in norm.args[1:5])
        weight = attribute(model, conv.args[1].target).detach()
        had = conv.args[2] if len(conv.args) > 2 else None
        bias = torch.zeros_like(mean) if had is None else attribute(model, had.target).detach()
        factor = gamma * torch.rsqrt(var + norm.args[7])
        values = weight * factor.reshape(-1, *[1] * (weight.dim() - 1)), (bias - mean) * factor + beta
        made = zip(("_folded_weight_", "_folded_bias_"), values, strict=True)
        nodes = [constant_before(model, conv, name, value) for name, value in made]
        conv.args = (conv.args[0], *nodes, *conv.args[3:])
        norm.replace_all_uses_with(conv)
        model.graph.erase_node(norm)
        folded += 1
    tidy(model)
    return folded


def tidy(model: GraphModule) -> GraphModule:
    """Take out what nothing reads, and compile the graph anew."""
    for node in reversed(list(model.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            model.graph.erase_node(node)
    model.graph.lint()
    model.delete_all_unused_submodules()
    model.recompile()
    return model
