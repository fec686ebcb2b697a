"""autoquant, of torchao before 0.16: each linear layer in the candidate that is fastest on the inputs that it really gets.

    model = torchao.autoquant(model)          or of torch.compile(model, mode="max-autotune")
    model(x)                                  the first call looks, times, quantizes, and then runs

1. look: one run of the model; for each linear layer the shapes of what came in, and one such input
2. time: F.linear of every candidate on every shape, once for layers that are alike
3. take: the candidate with the smallest sum, calls counted; the float layer is a candidate too

Candidates are configurations of torchao's; None is the layer as it is. `model.autoquant_choices` says what was timed and taken.
torchao's own classes for candidates (`AQInt8WeightOnlyQuantizedLinearWeight` ...) are not there: pass configurations instead.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from ..errors import LowpError, MisfitError
from .apply import is_linear, quantize_
from .config import CONFIGS, AOBaseConfig
from .predicates import compute_error
from .words import PerRow

Candidate = AOBaseConfig | None

DEFAULT_AUTOQUANT_CLASS_LIST: list[Candidate] = [
    None, CONFIGS["Int8WeightOnlyConfig"](), CONFIGS["Int8DynamicActivationInt8WeightConfig"](),
]  # fmt: skip
DEFAULT_INT4_AUTOQUANT_CLASS_LIST: list[Candidate] = [
    *DEFAULT_AUTOQUANT_CLASS_LIST, CONFIGS["Int4WeightOnlyConfig"](group_size=64),
]  # fmt: skip
OTHER_AUTOQUANT_CLASS_LIST: list[Candidate] = [
    CONFIGS["Float8WeightOnlyConfig"](), CONFIGS["Float8DynamicActivationFloat8WeightConfig"](granularity=PerRow()),
]  # fmt: skip
ALL_AUTOQUANT_CLASS_LIST: list[Candidate] = [*DEFAULT_INT4_AUTOQUANT_CLASS_LIST, *OTHER_AUTOQUANT_CLASS_LIST]
_SECONDS = 0.02  # of timing a candidate on a shape


@dataclass(kw_only=True)
class Choice:
    """What was timed of one layer. times: candidate -> seconds for one run of the model; refused: candidate -> why not."""

    taken: str
    times: dict[str, float]
    refused: dict[str, str] = field(default_factory=dict)


def autoquant(
    model: nn.Module,
    example_input: Any = None,
    qtensor_class_list: Sequence[Candidate] = DEFAULT_AUTOQUANT_CLASS_LIST,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    mode: Any = None,
    manual: bool = False,
    set_inductor_config: bool = True,
    supress_autoquant_errors: bool = True,
    min_sqnr: float | None = None,
) -> nn.Module:
    """Quantize each linear layer, in place, as runs fastest on what it gets.

    Args:
        example_input: a tensor, or the model's arguments; without one the first call of the model is the example.
        qtensor_class_list: the candidates: configurations, and None for the layer as it is. filter_fn: the layers.
        manual: look at all calls until `model.finalize_autoquant()`.
        supress_autoquant_errors: leave out a candidate that fails; else raise. min_sqnr: the least SQNR of its output, in dB.
        mode, set_inductor_config: taken for torchao's sake; every shape is timed.

    Raises:
        MisfitError: a candidate that is no configuration, no layer to choose for.

    >>> model = autoquant(nn.Sequential(nn.Linear(64, 64)), torch.randn(1, 64))
    >>> list(model.autoquant_choices)
    ['0']
    """
    strange = [one for one in qtensor_class_list if not (one is None or isinstance(one, AOBaseConfig))]
    if strange:
        raise MisfitError(
            f"autoquant wants configurations such as Int8WeightOnlyConfig(), or None, got {strange[0]!r:.120}."
        )
    inner: nn.Module = getattr(model, "_orig_mod", model)
    layers = {
        name: m for name, m in inner.named_modules() if (filter_fn or is_linear)(m, name) and isinstance(m, nn.Linear)
    }
    if not layers:
        raise MisfitError("autoquant found no linear layer to choose for: see filter_fn.")
    seen: dict[str, _Seen] = {name: _Seen() for name in layers}
    looking = [layer.register_forward_pre_hook(seen[name]) for name, layer in layers.items()]

    def finalize() -> None:
        for hook in looking:
            hook.remove()
        candidates = {_name(one): one for one in qtensor_class_list}
        model.autoquant_choices = _take(inner, layers, seen, candidates, min_sqnr, not supress_autoquant_errors)  # type: ignore[assignment]

    if manual:
        model.finalize_autoquant = finalize  # type: ignore[assignment]
    elif example_input is not None:
        arguments = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
        with torch.no_grad():
            inner(*arguments)
        finalize()
    else:

        def first(module: nn.Module, args: Any, kwargs: Any) -> None:
            hook.remove()
            with torch.no_grad():
                inner(*args, **kwargs)
            finalize()

        hook = model.register_forward_pre_hook(first, with_kwargs=True)
    return model


class _Seen:
    """What came into a layer: how often each shape, and the last input of each."""

    def __init__(self) -> None:
        self.calls: collections.Counter[tuple[int, ...]] = collections.Counter()
        self.inputs: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, module: nn.Module, args: Any) -> None:
        x = args[0].detach()
        self.calls[tuple(x.shape)] += 1
        self.inputs[tuple(x.shape)] = x


def _name(candidate: Candidate) -> str:
    return "float" if candidate is None else repr(candidate)


def _take(
    model: nn.Module, layers: dict[str, nn.Linear], seen: dict[str, _Seen], candidates: dict[str, Candidate],
    min_sqnr: float | None, strict: bool,
) -> dict[str, Choice]:  # fmt: skip
    alike: dict[Any, Choice] = {}
    chosen: dict[str, Choice] = {}
    for name, layer in layers.items():
        if not seen[name].calls:
            chosen[name] = Choice(
                taken="float", times={}, refused=dict.fromkeys(candidates, "the layer was never called")
            )
            continue
        w = layer.weight
        key = w.shape, w.dtype, w.device, frozenset(seen[name].calls.items())
        if key not in alike or min_sqnr is not None:  # the error is each layer's own
            alike[key] = _timed(layer, seen[name], candidates, min_sqnr, strict)
        chosen[name] = alike[key]
    for one, config in candidates.items():
        names = {name for name, choice in chosen.items() if choice.taken == one}
        if config is not None and names:
            quantize_(model, config, lambda module, fqn, names=names: fqn in names)  # type: ignore[misc]
    return chosen


def _timed(
    layer: nn.Linear, seen: _Seen, candidates: dict[str, Candidate], min_sqnr: float | None, strict: bool
) -> Choice:
    choice = Choice(taken="float", times={})
    with torch.no_grad():
        for name, config in candidates.items():
            try:
                one = _as(layer, config)
                far = [x for x in seen.inputs.values() if min_sqnr is not None and _sqnr(layer, one, x) < min_sqnr]
                if far:
                    choice.refused[name] = f"below {min_sqnr} dB"
                    continue
                timers = {
                    shape: Timer("f(x, w, b)", globals={"f": F.linear, "x": x, "w": one.weight, "b": one.bias})
                    for shape, x in seen.inputs.items()
                }
                each = {shape: timer.blocked_autorange(min_run_time=_SECONDS).median for shape, timer in timers.items()}
            except (LowpError, RuntimeError, NotImplementedError) as error:
                if strict:
                    raise
                choice.refused[name] = str(error)
                continue
            choice.times[name] = sum(each[shape] * count for shape, count in seen.calls.items())
    if choice.times:
        choice.taken = min(choice.times, key=choice.times.__getitem__)
    return choice


def _as(layer: nn.Linear, config: Candidate) -> nn.Linear:
    """A layer with the same weight, quantized by a candidate."""
    one = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    one.weight, one.bias = nn.Parameter(layer.weight.detach(), requires_grad=False), layer.bias
    if config is not None:
        quantize_(one, config)
    return one


def _sqnr(layer: nn.Linear, one: nn.Linear, x: Tensor) -> float:
    return float(compute_error(layer(x).float(), one(x).float()))
