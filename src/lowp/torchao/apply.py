"""quantize_ by torchao's configurations: which layers, which scheme, and then ours.

    names of weights   from filter_fn, or from the mapping of an FqnToConfig
    scheme, numbers    from the configuration's row (`config.py`)
    lowp.quantize_     plan, numbers, layout, report
    class              the weight shows itself as torchao's (`tensors.py`)

What torchao does in silence is said here: a group that does not divide a layer keeps that layer in floats and warns (int4; all
other configurations refuse, as there); tied weights stay tied; the report names the kernel of each layer.

A third party's configuration brings a handler: `register_quantize_module_handler(Mine)`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MisfitError, TensorRuleError
from ..numerics import Parts, Scheme
from ..ops import Case, best_layout
from ..ops.registry import device_capability
from ..quantize import Report, ReportRow
from ..quantize import quantize_ as quantize_by_rules
from ..quantize.match import targets
from ..tensor import QTensor
from . import int4, microscale, nf4, numbers, tensors
from .base import TorchAOBaseTensor
from .config import CONFIGS, AOBaseConfig, ConfigRow, FqnToConfig, row_of  # noqa: F401  (CONFIGS: the example)
from .spelling import one_spelling
from .views import View

Filter = Callable[[nn.Module, str], bool]
Handler = Callable[..., nn.Module]
HANDLERS: dict[type, Handler] = {}
TENSORS: dict[str, type[View]] = {
    kind.__name__: kind
    for module in (tensors, int4, microscale, nf4)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, View) and kind.__name__[0] != "_" and kind is not View
}
_SKIPS = ("Int4WeightOnlyConfig", "Float8DynamicActivationInt4WeightConfig")


def is_linear(mod: nn.Module, *args: Any) -> bool:
    """Whether a module is a linear layer in floats, which is what is quantized where nothing else is said."""
    weight = getattr(mod, "weight", None)
    return (
        isinstance(mod, nn.Linear)
        and isinstance(weight, Tensor)
        and not isinstance(weight, (QTensor, TorchAOBaseTensor))
        and not isinstance(mod, nn.modules.linear.NonDynamicallyQuantizableLinear)
    )


def register_quantize_module_handler(config_type: type) -> Callable[[Handler], Handler]:
    """A decorator: the function (module, config) -> module that carries out a configuration of a third party."""

    def register(handler: Handler) -> Handler:
        HANDLERS[config_type] = handler
        return handler

    return register


def quantize_(
    model: nn.Module,
    config: AOBaseConfig,
    filter_fn: Filter | None = is_linear,
    device: torch.device | str | int | None = None,
) -> Report:
    """Quantize a model in place by one of torchao's configurations.

    Args:
        model: any nn.Module. config: a configuration, or an FqnToConfig with one for each name.
        filter_fn: (module, name) -> whether its weight is quantized; None: linear layers. An FqnToConfig says it itself.
        device: move the model there.

    Returns:
        The report: each layer's scheme, kernel, bytes, error and reason. (torchao answers None.)

    Raises:
        MisfitError: no configuration, blocks that do not divide a layer.

    >>> model = nn.Sequential(nn.Linear(64, 64))
    >>> _ = quantize_(model, CONFIGS["Int8WeightOnlyConfig"]())
    >>> type(model[0].weight).__name__
    'Int8Tensor'
    """
    if not isinstance(config, AOBaseConfig):
        raise MisfitError(
            f"quantize_ wants a configuration such as Int8WeightOnlyConfig(), got {config!r:.120}: "
            "a spelling goes to lowp.quantize_."
        )
    where = torch.device(device) if device is not None else None
    if isinstance(config, FqnToConfig) and filter_fn not in (None, is_linear):
        raise MisfitError("an FqnToConfig names what it is for: pass filter_fn=None.")
    handler = _handler(config)
    if handler is not None:
        _by_handler(model, config, handler, filter_fn or is_linear, where)
        return Report(rows=())
    if isinstance(config, FqnToConfig):
        chosen = list(_by_name(model, config))
    else:
        chosen = [(_weights(model, filter_fn or is_linear), config, False)]
    rows: dict[str, ReportRow] = {}
    for names, one, by_parameter in chosen:
        for row in _carry_out(model, names, one, where, by_parameter):
            if row.scheme is not None or row.fqn not in rows:
                rows[row.fqn] = row
    if where is not None:
        model.to(where)
    return Report(rows=tuple(rows.values()))


# -- which weights ------------------------------------------------------------------------------------------------------


def _weights(model: nn.Module, filter_fn: Filter) -> list[str]:
    """The full names of the weights of the modules that the filter takes."""
    names = []
    for name, module in model.named_modules():
        if filter_fn(module, name):
            if not isinstance(getattr(module, "weight", None), Tensor):
                if list(module.children()):
                    continue
                raise MisfitError(
                    f"filter_fn takes {name or 'the model'} ({type(module).__name__}), which has no weight."
                )
            names.append(f"{name}.weight" if name else "weight")
    return names


def _by_name(model: nn.Module, config: FqnToConfig) -> Iterator[tuple[list[str], AOBaseConfig, bool]]:
    """For each configuration of a mapping the weights that it is for, and whether the key named them or their modules."""
    found: dict[tuple[int, bool], tuple[list[str], AOBaseConfig, bool]] = {}
    known = {fqn for target in targets(model) for fqn in (target.fqn, *target.tied)}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            fqn = f"{module_name}.{name}" if module_name else name
            weight = name == "weight" or fqn in known
            key, by_parameter = _key(config.fqn_to_config, module_name, fqn, weight, is_linear(module))
            one = config.fqn_to_config.get(key) if key is not None else None
            if one is not None and isinstance(parameter, Tensor):
                found.setdefault((id(one), by_parameter), ([], one, by_parameter))[0].append(fqn)
    yield from found.values()


def _key(given: Mapping[str, Any], module_name: str, fqn: str, weight: bool, linear: bool) -> tuple[str | None, bool]:
    """The key of a mapping that decides about a parameter, and whether it names the parameter itself.

    In this order: its own name, its module's, an expression that fits its name and not its module's, one that fits its
    module's, the default. A module's key is for its weights, not for a bias.
    """
    if fqn in given:
        return fqn, True
    if module_name in given:
        return (module_name if weight else None), False
    expressions = [key for key in given if key.startswith("re:")]
    of_module = [key for key in expressions if re.fullmatch(key[3:], module_name)]
    own = next((key for key in expressions if key not in of_module and re.fullmatch(key[3:], fqn)), None)
    if own is not None:
        return own, True
    if not weight:
        return None, False
    return of_module[0] if of_module else "_default" if linear and "_default" in given else None, False


def fqn_matches_fqn_config(fqn: str, config: FqnToConfig) -> bool:
    """Whether a name is a key of the mapping, or matches one of its regular expressions.

    >>> fqn_matches_fqn_config("layers.0.q", FqnToConfig({"re:layers\\\\..*": None}))
    True
    """
    keys = config.fqn_to_config
    return fqn in keys or any(key.startswith("re:") and re.fullmatch(key[3:], fqn) for key in keys)


# -- carry out ----------------------------------------------------------------------------------------------------------


def _carry_out(
    model: nn.Module, names: list[str], config: AOBaseConfig, device: torch.device | None, by_parameter: bool
) -> tuple[ReportRow, ...]:
    handler, row = _handler(config), row_of(config)
    if handler is not None and by_parameter:
        _parameters_by_handler(model, names, config, handler)
        return ()
    if handler is not None:
        modules = {name.rpartition(".")[0] for name in names}
        _by_handler(model, config, handler, lambda module, name: name in modules, device)
        return ()
    if row is None:
        raise MisfitError(
            f"{type(config).__name__} has no handler: register one with register_quantize_module_handler."
        )
    _as_parameters(model, names)
    known = {fqn: target for target in targets(model) for fqn in (target.fqn, *target.tied)}
    strange = [name for name in names if name not in known]
    alone = tuple(_by_itself(model, name, config, row) for name in strange) if by_parameter else ()
    names = [name for name in names if name in known]
    if strange and not by_parameter:
        module = model.get_submodule(strange[0].rpartition(".")[0])
        raise MisfitError(
            f"{strange[0]} of {type(module).__name__} is no weight that multiplies or looks up: leave it out of filter_fn."
        )
    by_scheme: dict[str, list[str]] = {}
    for name in names:
        scheme = one_spelling(row.scheme(config, known[name].weight.dtype), known[name].matrix_shape)
        if known[name].kind == "conv" and "@" in scheme:
            warnings.warn(
                f"{name} is a convolution: its weight is quantized, its activation stays in floats.", stacklevel=4
            )
            scheme = scheme.partition("@")[0]
        by_scheme.setdefault(scheme, []).append(name)
    if not names:
        return alone
    rules = {f"re:{'|'.join(re.escape(name) for name in group)}": scheme for scheme, group in by_scheme.items()}
    report = quantize_by_rules(
        model, rules, method=numbers.method(row.name, with_static(row.numbers(config), config)), device=device,
        on_misfit="skip" if row.name in _SKIPS else "error",
    )  # fmt: skip
    show(model, report, TENSORS[row.tensor(config)])
    _warn_of_skipped(report, row.name)
    return alone + report.rows


def _by_itself(model: nn.Module, fqn: str, config: AOBaseConfig, row: ConfigRow) -> ReportRow:
    """Quantize a matrix that belongs to no layer that we know, as its key asks for."""
    module_name, _, name = fqn.rpartition(".")
    module = model.get_submodule(module_name)
    weight = getattr(module, name).detach()
    if weight.dim() < 2 or not weight.is_floating_point():
        raise MisfitError(f"{fqn} {tuple(weight.shape)} is no matrix of floats: give it None in the mapping.")
    scheme = one_spelling(row.scheme(config, weight.dtype), tuple(weight.shape))
    with torch.no_grad():
        parts = with_static(row.numbers(config), config)(weight, Scheme.parse(scheme).weight)
        made: Any = TENSORS[row.tensor(config)].from_parts(parts, scheme, dtype=weight.dtype)
        made = in_best_layout(made)
        error = (made.dequantize(torch.float32) - weight).norm() / weight.float().norm().clamp(min=1e-30)
    setattr(module, name, nn.Parameter(made, requires_grad=False))
    _describe(module)
    return ReportRow(
        fqn=fqn, tied=(), kind="parameter", shape=tuple(weight.shape), scheme=scheme, layout=made.spec.layout, kernel="",
        bytes_before=weight.nbytes, bytes_after=sum(t.nbytes for t in made.packed.values()), error=float(error),
        why="a key names it; what it multiplies is not known",
    )  # fmt: skip


def _as_parameters(model: nn.Module, names: list[str]) -> None:
    """Weights that were set as plain tensors (PEFT does so when it merges) become parameters, which is what is quantized."""
    for fqn in names:
        module_name, _, name = fqn.rpartition(".")
        module = model.get_submodule(module_name)
        if name in module.__dict__:
            tensor = module.__dict__.pop(name)
            module.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))


def with_static(run: numbers.Numbers, config: Any) -> numbers.Numbers:
    """The same numbers, with the activation's scale where the configuration is one that brings it."""
    if not hasattr(config, "act_quant_scale"):
        return run
    given = config.act_quant_scale
    if given is None:
        raise MisfitError(
            f"{type(config).__name__} wants act_quant_scale, the scale of the activations: pass it, or let "
            "SmoothQuantConfig(base_config=...) find it, or use Int8DynamicActivationInt8WeightConfig."
        )
    if given.numel() != 1:
        raise MisfitError(f"act_quant_scale is one number for all tokens, got {tuple(given.shape)}: use PerTensor().")

    def with_scale(weight: Tensor, fmt: Any) -> Parts:
        return dataclasses.replace(
            run(weight, fmt), act_scale=given.detach().to(weight.device, torch.float32).reshape(())
        )

    return with_scale


def show(model: nn.Module, report: Report, kind: type[View]) -> None:
    """Give the weights of a report their class; tied ones stay one."""
    for row in report.rows:
        if row.scheme is None:
            continue
        q = model.get_parameter(row.fqn)
        if isinstance(q, View) or not isinstance(q, QTensor):
            continue
        shown = nn.Parameter(kind.of_qtensor(q), requires_grad=False)
        for fqn in (row.fqn, *row.tied):
            module_name, _, name = fqn.rpartition(".")
            module = model.get_submodule(module_name)
            setattr(module, name, shown)
            _describe(module)


def _describe(module: nn.Module) -> None:
    """Let `print(model)` say how a module is quantized."""
    module.extra_repr = types.MethodType(_extra_repr, module)  # type: ignore[method-assign]


def _extra_repr(self: nn.Module) -> str:
    told = [type(self).extra_repr(self)]
    for name, parameter in self.named_parameters(recurse=False):
        if isinstance(parameter, View):
            told.append(f"{name}={type(parameter).__name__}({parameter._quantization_type()})")
    return ", ".join(part for part in told if part)


def _warn_of_skipped(report: Report, name: str) -> None:
    skipped = [row for row in report.rows if row.why.startswith("skipped")]
    if skipped:
        first = f"{skipped[0].fqn} {skipped[0].shape}: {skipped[0].why}"
        warnings.warn(f"{name} leaves {len(skipped)} layers in floats. {first}", stacklevel=4)


def in_best_layout(tensor: Tensor) -> Tensor:
    """A quantized weight in the layout that linear layers run fastest from where it is, as if quantized here."""
    if not isinstance(tensor, QTensor) or tensor.dim() != 2 or tensor.device.type == "meta":
        return tensor
    case = Case(
        op="linear",
        scheme=tensor.scheme,
        device=tensor.device.type,
        sm=device_capability(tensor.device.type, tensor.device.index),
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.spec.shape),
    )
    return tensor.to_layout(best_layout(("linear",), case)[0])


# -- handlers of third parties --------------------------------------------------------------------------------------------


def _handler(config: AOBaseConfig) -> Handler | None:
    return next((HANDLERS[kind] for kind in type(config).__mro__ if kind in HANDLERS), None)


def _by_handler(
    model: nn.Module, config: AOBaseConfig, handler: Handler, filter_fn: Filter, device: torch.device | None
) -> None:
    replace_modules(model, lambda module: handler(module.to(device) if device else module, config), filter_fn)


def _parameters_by_handler(model: nn.Module, names: list[str], config: AOBaseConfig, handler: Handler) -> None:
    if "parameter_name" not in inspect.signature(handler).parameters:
        raise TensorRuleError(
            f"{type(config).__name__} does not yet support parameter quantization, which {names[0]!r} asks for: name its module, "
            "or let its handler take parameter_name."
        )
    for fqn in names:
        module_name, _, name = fqn.rpartition(".")
        handler(model.get_submodule(module_name), config, parameter_name=name)


def replace_modules(
    model: nn.Module,
    replacement_fn: Callable[..., nn.Module],
    filter_fn: Filter,
    cur_fqn: str = "",
    device: Any = None,
    extra_args: tuple[Any, ...] = (),
) -> nn.Module:
    """Replace, in place, each module that the filter takes by what a function makes of it; what is inside it is not visited.

    Args:
        replacement_fn: (module, *extra_args) -> module. cur_fqn: the name of `model` with a dot after it, for the filter.
    """
    if filter_fn(model, cur_fqn[:-1]):
        return replacement_fn(model if device is None else model.to(device), *extra_args)
    for name, child in list(model.named_children()):
        made = replace_modules(child, replacement_fn, filter_fn, f"{cur_fqn}{name}.", device, extra_args)
        if made is not child:
            setattr(model, name, made)
    return model


def swap_conv2d_1x1_to_linear(model: nn.Module, filter_fn: Filter | None = None) -> None:
    """Turn convolutions of 1 x 1 into linear layers over the last axis, in place, so that they can be quantized as such."""

    def one_by_one(module: nn.Module, name: str) -> bool:
        plain = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        fits = plain and module.stride == (1, 1) and module.padding in ((0, 0), "valid", "same", 0)
        return bool(fits and (filter_fn is None or filter_fn(module, name)))

    replace_modules(model, _Conv1x1, one_by_one)


class _Conv1x1(nn.Module):
    """A 1 x 1 convolution as a linear layer: channels go last, and back."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        weight = convolution.weight
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], convolution.bias is not None, device="meta")
        self.linear.weight = nn.Parameter(weight.detach().flatten(1), requires_grad=weight.requires_grad)
        self.linear.bias = convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(-3, -1)).movedim(-1, -3)
