"""prepare_pt2e: an observer wherever an annotation asks for one.

A spec belongs to a node (its output) or to an edge (producer, consumer). Those that must agree are one group with one observer:

    SharedQuantizationSpec(x)                          the group of x
    an edge whose spec equals its producer's output    the producer's group, unless a node says allow_implicit_sharing=False
    edges of one producer with equal specs             one group likewise
"""

from __future__ import annotations

import warnings
from typing import Any

from torch.fx import GraphModule, Node

from ...errors import MisfitError
from .graph_edits import add_attribute, fold_batch_norm
from .spec import (
    Q_ANNOTATION_KEY,
    DerivedQuantizationSpec,
    EdgeOrNode,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)


def prepare_pt2e(model: GraphModule, quantizer: Quantizer) -> GraphModule:
    """Annotate an exported graph and put observers into it; run it on data next, then `convert_pt2e`.

    Args:
        model: of `torch.export.export(m, inputs).module()`, in eval. quantizer: what knows the backend.

    Raises:
        MisfitError: no exported graph, a spec that is shared with nothing.
    """
    return _prepare(model, quantizer)


def prepare_qat_pt2e(model: GraphModule, quantizer: Quantizer) -> GraphModule:
    """The same with fake quantizers, to be trained; batch norms are folded first, with the statistics that they have."""
    return _prepare(model, quantizer, training=True)


def _prepare(model: GraphModule, quantizer: Quantizer, training: bool = False) -> GraphModule:
    if not isinstance(model, GraphModule):
        raise MisfitError(
            f"prepare_pt2e wants an exported graph, got {type(model).__name__}: torch.export.export(model, inputs).module()."
        )
    if fold_batch_norm(model) and training:
        warnings.warn("batch norms are folded into their convolutions: their statistics train no more.", stacklevel=3)
    model = quantizer.transform_for_annotation(model)
    quantizer.annotate(model)
    quantizer.validate(model)
    watchers = _watchers(_specs(model))
    quantizer.prepare_obs_or_fq_callback(model, watchers)
    _insert(model, watchers)
    model.graph.lint()
    model.recompile()
    return model


def _specs(model: GraphModule) -> dict[EdgeOrNode, QuantizationSpecBase]:
    """Each node and edge that is annotated, with its spec; nodes before the edges that leave them."""
    found: dict[EdgeOrNode, QuantizationSpecBase] = {}
    for node in model.graph.nodes:
        annotation = node.meta.get(Q_ANNOTATION_KEY)
        if annotation is None:
            continue
        for producer, spec in annotation.input_qspec_map.items():
            if spec is not None:
                found[(producer, node)] = spec
        if annotation.output_qspec is not None:
            found[node] = annotation.output_qspec
    return found


def _watchers(specs: dict[EdgeOrNode, QuantizationSpecBase]) -> dict[EdgeOrNode, Any]:
    """An observer for each node and edge, one object for each group."""
    head: dict[EdgeOrNode, EdgeOrNode] = {place: place for place in specs}

    def find(place: EdgeOrNode) -> EdgeOrNode:
        while head[place] != place:
            place = head[place]
        return place

    def join(one: EdgeOrNode, other: EdgeOrNode) -> None:
        if other not in head:
            raise MisfitError(f"{one} shares its observer with {other}, which no annotation quantizes.")
        head[find(one)] = find(other)

    by_producer: dict[Node, list[EdgeOrNode]] = {}
    for place, spec in specs.items():
        if isinstance(spec, SharedQuantizationSpec):
            join(place, spec.edge_or_node)
        producer = place if isinstance(place, Node) else place[0]
        by_producer.setdefault(producer, []).append(place)
    for places in by_producer.values():
        for place in places[1:]:
            first = next((p for p in places if p != place and _equal(specs, find(p), find(place))), None)
            if first is not None and _shares(place) and _shares(first) and find(first) != find(place):
                join(place, first)
    made: dict[EdgeOrNode, Any] = {}
    answer: dict[EdgeOrNode, Any] = {}
    derived = [place for place in specs if isinstance(specs[find(place)], DerivedQuantizationSpec)]
    for place in [*(p for p in specs if p not in derived), *derived]:
        root = find(place)
        if root not in made:
            made[root] = _make(specs[root], root, lambda other: answer[other])
        answer[place] = made[root]
    return answer


def _equal(specs: dict[EdgeOrNode, QuantizationSpecBase], one: EdgeOrNode, other: EdgeOrNode) -> bool:
    return specs[one] == specs[other]


def _shares(place: EdgeOrNode) -> bool:
    node = place if isinstance(place, Node) else place[1]
    return node.meta[Q_ANNOTATION_KEY].allow_implicit_sharing


def _make(spec: QuantizationSpecBase, place: EdgeOrNode, known: Any) -> Any:
    from . import watch

    if isinstance(spec, QuantizationSpec):
        kwargs = {
            "dtype": spec.dtype, "qscheme": spec.qscheme, "quant_min": spec.quant_min, "quant_max": spec.quant_max,
            "ch_axis": spec.ch_axis, "is_dynamic": spec.is_dynamic,
        }  # fmt: skip
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if not spec.is_dynamic:
            kwargs.pop("is_dynamic")
        return spec.observer_or_fake_quant_ctr.with_args(**kwargs)()
    if isinstance(spec, FixedQParamsQuantizationSpec):
        kwargs = {"quant_min": spec.quant_min, "quant_max": spec.quant_max, "qscheme": spec.qscheme}
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        return watch.FixedQParamsObserver(scale=spec.scale, zero_point=spec.zero_point, dtype=spec.dtype, **kwargs)
    if isinstance(spec, DerivedQuantizationSpec):
        return watch.DerivedObserverOrFakeQuantize(
            spec.dtype, [known(other) for other in spec.derived_from], spec.derive_qparams_fn,
            spec.quant_min, spec.quant_max, spec.qscheme, spec.ch_axis,
        )  # fmt: skip
    raise MisfitError(f"{place} shares its observer in a circle: one of them wants a spec of its own.")


def _insert(model: GraphModule, watchers: dict[EdgeOrNode, Any]) -> None:
    """A call of each observer, after the tensor that it sees; consumers read what it passes on."""
    names: dict[int, str] = {}
    calls: dict[tuple[Node, int], Node] = {}  # (what is seen, whose observer) -> the call

    def call(seen: Node, watcher: Any) -> Node:
        key = (seen, id(watcher))
        if key not in calls:
            if id(watcher) not in names:
                names[id(watcher)] = add_attribute(model, "activation_post_process_", watcher)
            with model.graph.inserting_after(seen):
                calls[key] = model.graph.create_node("call_module", names[id(watcher)], (seen,), {})
            calls[key].meta = {
                name: seen.meta[name] for name in ("val", "tensor_meta", "nn_module_stack") if name in seen.meta
            }
        return calls[key]

    consumers = {node: list(node.users) for node in model.graph.nodes}
    for node in list(model.graph.nodes):
        if node not in watchers and not any((node, user) in watchers for user in consumers[node]):
            continue
        for user in consumers[node]:
            watcher = watchers.get((node, user), watchers.get(node))
            if watcher is not None:
                user.replace_input_with(node, call(node, watcher))
