"""convert_pt2e: quantize and dequantize where observers were, with the scales that they found.

    static        quantize_per_tensor(x, scale, zero_point, qmin, qmax, dtype) -> dequantize_per_tensor(...)
    per channel   quantize_per_channel(w, scales, zero_points, axis, ...)        weights are folded: only their dequantize remains
    dynamic       choose_qparams(x, ...) -> quantize_per_tensor.tensor -> dequantize_per_tensor.tensor

Each consumer gets a dequantize of its own, as backends want to see it beside their operator.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...errors import MisfitError
from .graph_edits import attribute, constant_before, tidy
from .watch import PlaceholderObserver, is_watcher

_CHANNELS = (torch.per_channel_affine, torch.per_channel_symmetric, torch.per_channel_affine_float_qparams)
_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
_EPS = 2.0**-12  # the smallest dynamic scale where an observer names none


def convert_pt2e(
    model: GraphModule, use_reference_representation: bool = False, fold_quantize: bool = True
) -> GraphModule:
    """Put the scales that observers found into the graph of `prepare_pt2e`, in place.

    Args:
        fold_quantize: store weights as integers. use_reference_representation: integer arithmetic spelled out, not there.
    """
    if use_reference_representation:
        raise MisfitError("use_reference_representation=True is not there: the graph of q and dq runs as it is.")
    import torch.ao.quantization.fx._decomposed  # noqa: F401  (defines the operators)

    for node in list(model.graph.nodes):
        if node.op == "call_module" and is_watcher(attribute(model, node.target)):
            _replace(model, node, attribute(model, node.target))
    _one_dequantize_each(model)
    if fold_quantize:
        _fold(model)
    return tidy(model)


def _replace(model: GraphModule, node: Node, watcher: Any) -> None:
    x = node.args[0]
    watched = getattr(watcher, "activation_post_process", watcher)  # a fake quantizer holds an observer
    dtype = watcher.dtype
    if dtype in (torch.float32, None) or type(watched).__name__ in ("NoopObserver", "RecordingObserver"):
        made: Node | None = x
    elif dtype in (torch.float16, torch.bfloat16):
        made = _call(
            model, node, torch.ops.aten.to.dtype, _call(model, node, torch.ops.aten.to.dtype, x, dtype), torch.float32
        )
    else:
        dtype = {torch.quint8: torch.uint8, torch.qint8: torch.int8, torch.qint32: torch.int32}.get(dtype, dtype)
        made = _quantized(model, node, x, watcher, watched, dtype)
    made.meta = {**node.meta, **made.meta}
    node.replace_all_uses_with(made)
    model.graph.erase_node(node)


def _call(model: GraphModule, before: Node, function: Any, *args: Any) -> Node:
    with model.graph.inserting_before(before):
        return model.graph.call_function(function, args)


def _quantized(model: GraphModule, node: Node, x: Any, watcher: Any, watched: Any, dtype: torch.dtype) -> Node:
    ops = torch.ops.quantized_decomposed
    qmin, qmax = watcher.quant_min, watcher.quant_max
    if qmin is None or qmax is None:
        info = torch.iinfo(dtype)
        qmin, qmax = info.min, info.max
    scheme = getattr(watched, "qscheme", None) or torch.per_tensor_affine
    if (
        getattr(watched, "is_dynamic", False)
        or getattr(watcher, "is_dynamic", False)
        or isinstance(watched, PlaceholderObserver)
    ):
        choose = ops.choose_qparams_symmetric.tensor if scheme in _SYMMETRIC else ops.choose_qparams.tensor
        eps = getattr(watched, "eps", None)
        eps = float(eps) if eps is not None else _EPS
        both = _call(model, node, choose, x, qmin, qmax, eps, dtype)
        scale, zero = (_call(model, node, operator.getitem, both, at) for at in (0, 1))
        q = _call(model, node, ops.quantize_per_tensor.tensor, x, scale, zero, qmin, qmax, dtype)
        return _call(model, node, ops.dequantize_per_tensor.tensor, q, scale, zero, qmin, qmax, dtype)
    scale, zero = watcher.calculate_qparams()
    if scheme in _CHANNELS:
        kind = zero.dtype if zero.dtype.is_floating_point else torch.int64
        stored = [
            constant_before(model, node, f"_{what}_", value.detach().to(to).reshape(-1))
            for what, value, to in (("scale", scale, scale.dtype), ("zero_point", zero, kind))
        ]
        axis = getattr(watched, "ch_axis", 0)
        q = _call(model, node, ops.quantize_per_channel.default, x, *stored, axis, qmin, qmax, dtype)
        return _call(model, node, ops.dequantize_per_channel.default, q, *stored, axis, qmin, qmax, dtype)
    numbers = (float(scale), int(zero), qmin, qmax, dtype)
    q = _call(model, node, ops.quantize_per_tensor.default, x, *numbers)
    return _call(model, node, ops.dequantize_per_tensor.default, q, *numbers)


def _is(node: Any, what: str) -> bool:
    return (
        isinstance(node, Node)
        and node.op == "call_function"
        and str(node.target).startswith(f"quantized_decomposed.{what}")
    )


def _one_dequantize_each(model: GraphModule) -> None:
    for node in list(model.graph.nodes):
        if _is(node, "dequantize"):
            for user in list(node.users)[1:]:
                with model.graph.inserting_before(user):
                    own = model.graph.node_copy(node)
                user.replace_input_with(node, own)


def _fold(model: GraphModule) -> None:
    """Weights and what is computed from them alone, as integers."""
    for node in list(model.graph.nodes):
        given = [arg for arg in node.args if isinstance(arg, Node)]
        if not _is(node, "quantize_") or not all(arg.op == "get_attr" for arg in given):
            continue
        values = [attribute(model, arg.target).detach() if isinstance(arg, Node) else arg for arg in node.args]
        folded = constant_before(model, node, f"{node.args[0].target}_frozen", node.target(*values))
        folded.meta = dict(node.meta)
        node.replace_all_uses_with(folded)
        model.graph.erase_node(node)
