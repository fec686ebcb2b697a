"""prepare: layers learn with the numbers they will be served in.  convert: those numbers become quantized weights.

    prepare(model, {"lm_head": None, "*": "int4/1x32*bf16@int8/row"})      rules, as of lowp.quantize_
    ... train as ever: the parameters are the model's own, under their own names ...
    convert(model)                                                         a Report, as of lowp.quantize_

Both work in place. A prepared model's state_dict is the float model's (but for scales that are learned), so checkpoints go either
way. What `convert` stores is bit for bit what the last forward multiplied with. Tied weights stay tied and are quantized once.
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MisfitError, QuantizedError, SpellingError
from ..numerics import Format, Parts, Scheme
from ..quantize import Method, Plan, Report, quantize_, quantize_weight
from ..quantize.apply import check_finite
from ..quantize.match import PlanRow, Rules, Target, planned
from ..quantize.statistics import Statistics
from .fake import FakeQuantize, FakeQuantized, is_prepared, prepare_module, restore_module
from .learn import LearnedQuantize, LearnedRange
from .lora import Adapted, AdaptedQuantize, Lora

LEARN = ("weight", "act")


def prepare(
    model: nn.Module,
    rules: Rules,
    *,
    clamp: str = "zero",
    learn: str | Sequence[str] = (),
    lora: Lora | None = None,
    enabled: bool = True,
    on_misfit: str = "error",
) -> Plan:
    """Let a model learn with quantized numbers, in place.

    Args:
        model: any nn.Module with float weights. rules: a scheme, or patterns with schemes; see `lowp.quantize.match`.
        clamp: "zero": a weight that was clamped gets no gradient; "pass": it gets its own. See `lowp.ops.fake_quantize`.
        learn: what is learned beside the weights: "weight" (their scales, LSQ), "act" (one static scale for each activation).
        lora: freeze the weights of linear layers and learn them through adapters, merged before they are quantized.
        enabled: False to train in floats until `enable`, or `start_after`.
        on_misfit: "error", or "skip" to leave a layer that cannot take its scheme in floats, with the reason in the plan.

    Returns:
        The plan: each layer's scheme, and the kernel that will run it once converted.

    Raises:
        QuantizedError: prepared already, or quantized. SpellingError, MisfitError: as of lowp.quantize_; NaN among the weights.

    >>> model = nn.Sequential(nn.Linear(64, 64))
    >>> _ = prepare(model, "int4/1x32@int8/row")
    >>> model[0]
    FakeQuantizedLinear(
      in_features=64, out_features=64, bias=True
      (fake_weight): FakeQuantize(int4/1x32)
      (fake_act): FakeQuantize(int8/row)
    )
    """
    learn = (learn,) if isinstance(learn, str) else tuple(learn)
    for what in learn:
        if what not in LEARN:
            raise SpellingError.of("learn", what, LEARN)
    done = [name for name, module in model.named_modules() if is_prepared(module)]
    if done:
        raise QuantizedError(
            f"{done[0] or 'the model'} is prepared already, and {len(done) - 1} more: train it, then call lowp.qat.convert."
        )
    elsewhere = _read_elsewhere(model)
    rows = [
        _refused(target, row, on_misfit, elsewhere)
        for target, row in planned(model, rules, method="absmax", device=None, on_misfit=on_misfit)
    ]
    for target, row in rows:
        if row.scheme is not None and target.weight.device.type != "meta":
            _check_whole(target.weight, target.fqn, "prepared", "prepare the model before it is sharded.")
    made = [(target, row, *_fakes(target, row, clamp, learn, lora)) for target, row in rows if row.scheme is not None]
    if "act" in learn and not any(Scheme.parse(str(row.scheme)).act for _, row, *_ in made):
        raise MisfitError("learn='act' wants a scheme with an activation, such as int4/1x32@int8/row, got none.")
    layers = list(_by_module(model, made))
    frozen = [
        _frozen(module, lora.base if lora else None) if isinstance(weight, AdaptedQuantize) else None
        for module, _, _, weight, _ in layers
    ]
    for (module, names, scheme, weight, act), kept in zip(layers, frozen, strict=True):  # nothing below refuses
        if kept is not None:
            module.weight = kept
        prepare_module(module, names, scheme, weight, act, FakeQuantized if kept is None else Adapted)
    if not enabled:
        disable(model)
    return Plan(rows=tuple(row for _, row in rows))


def _read_elsewhere(model: nn.Module) -> dict[int, str]:
    """Layers whose weights others read without calling them, by id: fake quantization would not be seen there."""
    found = {}
    for module in model.modules():
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            found[id(module)] = "nn.MultiheadAttention reads this weight without calling the layer"
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in (module.linear1, module.linear2):
                found[id(layer)] = (
                    "nn.TransformerEncoderLayer reads this weight without calling the layer when it evaluates"
                )
        if "forward" in vars(module):
            found[id(module)] = (
                "the layer has a forward of its own (a hook of another library), which stands before any class's"
            )
    return found


def _refused(target: Target, row: PlanRow, on_misfit: str, elsewhere: dict[int, str]) -> tuple[Target, PlanRow]:
    reason, module = "", target.module
    if row.scheme is not None and id(module) in elsewhere:
        reason = f"{elsewhere[id(module)]}, so it cannot be fake-quantized."
    elif row.scheme is not None and isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        reason = "an embedding with max_norm or sparse gradients writes into or cuts out of its table while it is read."
    elif row.scheme is not None and target.kind == "experts" and Scheme.parse(row.scheme).act is not None:
        reason = (
            "a stack of experts sorts its tokens inside, where they cannot be fake-quantized: use a weight-only scheme."
        )
    elif row.scheme is not None and target.kind == "experts" and target.tied:
        reason = "a stack of experts cannot be tied."
    if not reason:
        return target, row
    if on_misfit == "error":
        raise MisfitError(f"{target.fqn} cannot be prepared for {row.scheme}: {reason} Give it a rule None.")
    return target, dataclasses.replace(row, scheme=None, layout="", kernel="", fallback=False, why=f"skipped: {reason}")


def _frozen(module: nn.Module, base: str | None) -> nn.Parameter:
    """A weight as it is, quantized where `base` says so."""
    weight = module.get_parameter("weight")
    if weight.device.type == "meta":
        raise MisfitError("adapters want a base with numbers, got one on the device meta: load the model first.")
    return nn.Parameter(weight.detach() if base is None else quantize_weight(weight, base), requires_grad=False)


def _fakes(
    target: Target, row: PlanRow, clamp: str, learn: tuple[str, ...], lora: Lora | None
) -> tuple[FakeQuantize, Callable[[], FakeQuantize | None]]:
    """The FakeQuantize of a weight, and what makes that of an activation: each layer of tied ones has its own."""
    scheme = Scheme.parse(str(row.scheme))
    matrix = target.weight.detach()
    matrix = matrix.flatten(1) if target.kind == "conv" else matrix.t() if target.kind == "conv1d" else matrix
    by_rule = "weight" not in learn or scheme.weight.is_identity
    if lora is not None and target.kind == "linear" and not target.tied:
        if not by_rule:
            raise MisfitError(
                "lora and learn='weight' exclude each other: a merged weight takes its scales from itself."
            )
        weight: FakeQuantize = AdaptedQuantize(scheme.weight, matrix, lora, clamp=clamp)
    elif by_rule:
        weight = FakeQuantize(scheme.weight, clamp=clamp)
    else:
        weight = LearnedQuantize(scheme.weight, matrix, clamp=clamp)
    weight.to(target.weight.device)

    def act() -> FakeQuantize | None:
        if scheme.act is None:
            return None
        if "act" in learn and not scheme.act.is_identity:
            return LearnedRange(scheme.act, target.matrix_shape[-1], clamp=clamp).to(target.weight.device)
        return FakeQuantize(scheme.act, clamp=clamp)

    return weight, act


def _by_module(model: nn.Module, made: list[Any]) -> Iterator[tuple[nn.Module, tuple[str, ...], str, nn.Module, Any]]:
    """Each layer with all of its parameters that are prepared: a stack of experts has several."""
    found: dict[int, tuple[nn.Module, list[str], str, nn.Module, Any]] = {}
    for target, row, weight, act in made:
        for fqn in (target.fqn, *target.tied):
            path, _, name = fqn.rpartition(".")
            module = model.get_submodule(path)
            if id(module) in found:
                known = found[id(module)]
                if known[2] != row.scheme or isinstance(weight, LearnedQuantize):
                    raise MisfitError(
                        f"{fqn} wants {row.scheme}, another parameter of its layer {known[2]}: give both one scheme, and "
                        "leave learn='weight' out."
                    )
                known[1].extend([] if name in known[1] else [name])
                continue
            reads = isinstance(module, nn.Embedding)
            fake_act = None if reads else act()
            if isinstance(fake_act, LearnedRange) and sum(other[3] is weight for other in found.values() if other[4]):
                raise MisfitError(
                    f"{fqn} is tied to another linear layer, and one weight keeps one range: leave learn='act' out."
                )
            found[id(module)] = (module, [name], str(row.scheme), weight, fake_act)
    for module, names, scheme, weight, act in found.values():
        yield module, tuple(names), scheme, weight, act


# -- switching on and off ---------------------------------------------------------------------------------------------


def enable(model: nn.Module, on: bool = True) -> None:
    """Switch the fake quantization of a prepared model on (or off): floats first, quantized numbers later."""
    for fake in _fakes_of(model):
        fake.enabled = on


def disable(model: nn.Module) -> None:
    """Let a prepared model compute in floats until `enable`."""
    enable(model, False)


def start_after(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> Any:
    """Delayed start: fake quantization goes on once the optimizer has made that many steps.

    Returns:
        The hook's handle: `.remove()` takes it back.
    """
    disable(model)
    left = [steps]
    if steps <= 0:
        enable(model)

    def count(*args: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            enable(model)

    return optimizer.register_step_post_hook(count)


def _fakes_of(model: nn.Module) -> list[FakeQuantize]:
    fakes = [module for module in model.modules() if isinstance(module, FakeQuantize)]
    if not fakes:
        raise MisfitError("this wants a model that lowp.qat.prepare prepared, got one without fake-quantized layers.")
    return fakes


# -- convert ----------------------------------------------------------------------------------------------------------


def convert(model: nn.Module, *, strict: bool = False) -> Report:
    """Turn a prepared model into the quantized one that it learned to be, in place.

    Args:
        model: after `prepare` and training. strict: as of lowp.quantize_.

    Returns:
        A Report: each layer's scheme, layout, kernel, bytes and error.

    Raises:
        MisfitError: not prepared; NaN among the weights; weights that are sharded (FSDP): before anything is changed.

    >>> model = nn.Sequential(nn.Linear(64, 64))
    >>> _ = prepare(model, "int4/1x32")
    >>> _ = convert(model)
    >>> model[0].weight.scheme
    'int4/1x32'
    """
    found = [(name, module) for name, module in model.named_modules() if is_prepared(module)]
    if not found:
        raise MisfitError(
            "convert wants a model that lowp.qat.prepare prepared, got one without fake-quantized layers: "
            "call prepare(model, rules) and train it first, or lowp.quantize_ for rounding without training."
        )
    rules: dict[Any, str | None] = {}
    chosen: dict[int, Callable[[Tensor], Parts]] = {}
    learned: list[tuple[Any, str, Tensor]] = []
    for path, module in found:
        act = _act_scale(module)
        if isinstance(module.fake_weight, LearnedQuantize):
            module.fake_weight.check(path)
        for name in module.fake_names:
            weight, fqn = _learned(module, name), f"{path}.{name}" if path else name
            _check_whole(weight, fqn, "converted", _GATHER)
            rules[glob.escape(fqn)] = module.scheme
            if weight.data_ptr() not in chosen or act is not None:
                chosen[weight.data_ptr()] = _run(module.fake_weight, act)
            learned.append((module, name, weight))
    before = [(module, type(module), _contents(module)) for _, module in found]

    def run(matrix: Tensor, statistics: Statistics | None, fmt: Format) -> Parts:
        return chosen[matrix.data_ptr()](matrix)

    method = Method(name="qat", about="what training chose", run=run, why_not=lambda fmt: "", takes_any=True)
    try:
        for module, name, weight in learned:
            if module._parameters[name] is not weight:
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)
        for _, module in found:
            restore_module(module)
        return quantize_(model, rules, method=method, strict=strict)
    except BaseException:
        for module, kind, contents in before:  # as if nothing had been asked
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(contents)
        raise


def _contents(module: nn.Module) -> dict[str, Any]:
    """What a module holds, to be put back."""
    return vars(module) | {"_parameters": dict(module._parameters), "_modules": dict(module._modules)}


def _learned(module: Any, name: str) -> Tensor:
    """The float weight that training came to: the parameter, or the base with its adapters merged."""
    weight: Tensor = module._parameters[name]
    if isinstance(module, nn.modules.conv._ConvNd):
        return weight.contiguous()  # channels last is an order of bytes that no quantized weight has
    if not isinstance(module, Adapted):
        return weight
    with torch.no_grad():
        return module.fake_weight.merged(weight)


def _run(fake: Any, act: Tensor | None) -> Callable[[Tensor], Parts]:
    if isinstance(fake, AdaptedQuantize):
        fake = FakeQuantize(fake.format)  # what comes in is merged
    return lambda matrix: fake.parts(matrix) if act is None else fake.parts(matrix).replace(act_scale=act)


def _act_scale(module: Any) -> Tensor | None:
    return module.fake_act.act_scale() if isinstance(module.fake_act, LearnedRange) else None


_GATHER = "gather the state_dict into an unsharded prepared model, and convert that."


def _check_whole(weight: Any, fqn: str, done: str, advice: str) -> None:
    if weight.device.type == "meta":
        raise MisfitError(f"{fqn} wants numbers to be {done}, got a weight on the device meta: load it first.")
    if type(weight.data) is not Tensor:
        raise MisfitError(f"{fqn} wants its whole weight to be {done}, got a {type(weight.data).__name__}: {advice}")
    check_finite(weight, fqn)
