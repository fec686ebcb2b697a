"""Which tensor gets which scheme: rules, targets and the plan.

Rules are an ordered mapping; the first that matches a tensor wins:

    {"*.mlp.*": "int4/1x128*bf16",        a glob on the module's name or the parameter's
     "re:.*\\.(q|k)_proj": "int8",         a regular expression on the whole name
     lambda name, module: ...: "fp8",      a predicate
     "lm_head": None,                      None: stays as it is
     "*": lowp.INT8}                       a bare "*": every layer that multiplies (linear layers, stacks of experts)

A bare "*" leaves embeddings and convolutions alone, because quantizing them saves memory and no time: name them to get them.
A rule that matches nothing is an error, since it is nearly always a typing mistake.

`plan` is pure: it changes nothing and works on a model without data (device "meta").
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowpError, MisfitError, QuantizedError, SpellingError
from ..layouts import LAYOUTS
from ..numerics import Scheme
from ..ops import Case, best_layout
from ..ops.registry import device_capability
from ..tensor import QTensor
from .method import Method, method_of

Predicate = Callable[[str, nn.Module], bool]
Rules = str | Mapping[str | Predicate, str | None]


# A stack of experts is read by torch's grouped product, tokens sorted by expert, or by a batched one. A loop over experts calls
# linear for one matrix at a time, in the layout that serves the stack.
_OPS = {"embedding": ("embedding",), "experts": ("grouped", "matmul"), "conv": ("matmul",)}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A tensor that can be quantized: where it is, what kind of layer reads it, its matrix shape, and the ops that read it."""

    fqn: str
    tied: tuple[str, ...]
    kind: str
    weight: Tensor
    module: nn.Module
    matrix_shape: tuple[int, ...]
    ops: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All parameter names and their modules' names."""
        fqns = (self.fqn, *self.tied)
        return (*fqns, *(name.rpartition(".")[0] for name in fqns))


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """What will happen to one tensor.

    Args:
        fqn: the parameter's name; tied: other names of the same tensor.
        kind: "linear", "embedding", "experts", "conv" or "conv1d".
        shape, dtype: of the float tensor.
        scheme: spelling, or None where it stays.
        layout, kernel: how it will be stored and what will run it, "" where it stays.
        fallback: True where only a slow kernel can run it.
        why: the rule that matched and the reason.
    """

    fqn: str
    tied: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    scheme: str | None
    layout: str
    kernel: str
    fallback: bool
    why: str


@dataclass(frozen=True)
class Plan:
    """What `quantize_` will do, row by row; printable."""

    rows: tuple[PlanRow, ...]

    def __str__(self) -> str:
        header = ("tensor", "shape", "scheme", "layout", "kernel", "why")
        body = [
            (r.fqn, "x".join(map(str, r.shape)), r.scheme or "-", r.layout or "-", r.kernel or "-", r.why)
            for r in self.rows
        ]
        return table(header, body)


def table(header: tuple[str, ...], body: Sequence[tuple[str, ...]]) -> str:
    """Plain-text columns; the last one is not padded."""
    rows = [header, *body]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


# -- targets ----------------------------------------------------------------------------------------------------------


def targets(model: nn.Module) -> list[Target]:
    """Every tensor of the model that some scheme could hold, in the order of the model; tied ones once."""
    found: dict[int, list[tuple[str, str, Tensor, nn.Module]]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            kind = _kind(module, name, parameter)
            if kind:
                fqn = f"{module_name}.{name}" if module_name else name
                found.setdefault(id(parameter), []).append((fqn, kind, parameter, module))
    return [_target(list({entry[0]: entry for entry in entries}.values())) for entries in found.values()]


def _target(entries: list[tuple[str, str, Tensor, nn.Module]]) -> Target:
    fqn, kind, weight, module = entries[0]
    kinds = {entry[1] for entry in entries}
    return Target(
        fqn=fqn,
        tied=tuple(entry[0] for entry in entries[1:]),
        kind="linear" if kinds == {"embedding", "linear"} else kind,
        weight=weight,
        module=module,
        matrix_shape=_matrix_shape(kind, tuple(weight.shape)),
        ops=tuple(dict.fromkeys(op for _, k, _, _ in entries for op in _OPS.get(k, ("linear",)))),
    )


def _kind(module: nn.Module, name: str, parameter: Tensor) -> str:
    if not parameter.is_floating_point():
        return ""
    if name == "weight":
        if isinstance(module, nn.Linear):
            return "linear"
        if isinstance(module, nn.Embedding):
            return "embedding"
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return "conv"
        if type(module).__name__ == "Conv1D" and parameter.dim() == 2:
            return "conv1d"  # GPT-2's linear layer, whose weight is (in, out)
    if parameter.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd):
        return "experts"
    return ""


def _matrix_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if kind == "conv":
        return (shape[0], int(torch.Size(shape[1:]).numel()))
    return (shape[1], shape[0]) if kind == "conv1d" else shape


# -- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of the rules: a pattern, and what it gives (what `matched` reads it as; None: the tensor stays as it is)."""

    pattern: str | Predicate
    scheme: Any

    def matches(self, target: Target) -> bool:
        """Whether it names a tensor."""
        if not isinstance(self.pattern, str):
            return any(self.pattern(name.rpartition(".")[0], target.module) for name in (target.fqn, *target.tied))
        if self.pattern == "*":
            return target.kind in ("linear", "experts", "conv1d")
        return any(self._expression.fullmatch(name) for name in target.names)

    @functools.cached_property
    def _expression(self) -> re.Pattern[str]:
        pattern = str(self.pattern)  # compiled once: the caches of re and fnmatch are smaller than a model has layers
        return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))

    def __str__(self) -> str:
        """As reports show it: each of a model's rows has one, so a long expression is cut."""
        if not isinstance(self.pattern, str):
            return getattr(self.pattern, "__name__", "predicate")
        return self.pattern if len(self.pattern) <= 72 else f"{self.pattern[:68]} ..."


def matched(
    model: nn.Module,
    rules: Mapping[Any, Any] | str,
    read: Callable[[Any], Any] = lambda scheme: str(Scheme.parse(scheme)),
) -> list[tuple[Target, Rule | None]]:
    """Every target of the model with the first rule that matches it.

    Args:
        read: checks what a rule gives, and answers what `Rule.scheme` shall be: its canonical spelling, or an object.

    Raises:
        SpellingError: what `read` refuses; a rule that matches nothing.
    """
    rows, found = _read_rules(rules, read), targets(model)
    _check_used(rows, found)
    return [(target, next((rule for rule in rows if rule.matches(target)), None)) for target in found]


def _read_rules(rules: Mapping[Any, Any] | str, parse: Callable[[Any], Any]) -> list[Rule]:
    pairs = {"*": rules} if isinstance(rules, str) else rules
    if not isinstance(pairs, Mapping) or not pairs:
        raise SpellingError(f"rules want a scheme such as 'int4' or a mapping from patterns to schemes, got {rules!r}.")
    read = []
    for pattern, scheme in pairs.items():
        if isinstance(pattern, str) and pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise SpellingError(f"rule {pattern!r} is not a regular expression: {error}.") from None
        read.append(Rule(pattern=pattern, scheme=None if scheme is None else parse(scheme)))
    return read


def _check_used(rules: list[Rule], found: list[Target]) -> None:
    for rule in rules:
        if not any(rule.matches(target) for target in found):
            names = [name for target in found for name in (target.fqn.rpartition(".")[0],)]
            near = SpellingError.of(
                "pattern", str(rule), names[:64] or ["(the model has no layer that can be quantized)"]
            )
            raise SpellingError(f"rule {str(rule)!r} matches no layer: {near}")


# -- the plan ---------------------------------------------------------------------------------------------------------


def plan(
    model: nn.Module,
    rules: Rules,
    *,
    method: str | Method = "absmax",
    device: torch.device | str | None = None,
    on_misfit: str = "error",
) -> Plan:
    """What `quantize_` would do, without doing it.

    Args:
        model: any nn.Module, also on the meta device. rules: a scheme, or patterns with schemes (see the top of this file).
        method: name of a method, or one of your own. device: where the model will run; its own if absent.
        on_misfit: "error", or "skip" to leave a layer that cannot take its scheme as it is, with the reason in the plan.

    Raises:
        SpellingError: an unknown scheme or method, a rule that matches nothing.
        MisfitError: a layer that cannot take its scheme. QuantizedError: a layer that is quantized already.

    >>> [(row.fqn, row.scheme) for row in plan(torch.nn.Sequential(torch.nn.Linear(64, 64)), "int8").rows]
    [('0.weight', 'int8/row')]
    """
    return Plan(rows=tuple(row for _, row in planned(model, rules, method=method, device=device, on_misfit=on_misfit)))


def planned(
    model: nn.Module, rules: Rules, *, method: str | Method, device: torch.device | str | None, on_misfit: str
) -> Iterator[tuple[Target, PlanRow]]:
    """The plan's rows with their targets."""
    if on_misfit not in ("error", "skip"):
        raise SpellingError.of("on_misfit", on_misfit, ("error", "skip"))
    method_of(method)
    for target, rule in matched(model, rules):
        yield target, _row(target, rule, method, device, on_misfit)


def _row(
    target: Target, rule: Rule | None, method: str | Method, device: torch.device | str | None, on_misfit: str
) -> PlanRow:
    if rule is None or rule.scheme is None:
        why = "no rule matches" if rule is None else f"rule {str(rule)!r} keeps it"
        return _plan_row(target, None, why)
    try:
        reason = _misfit(target, rule.scheme)
    except QuantizedError:
        raise
    except LowpError as error:
        reason = str(error)
    if reason and on_misfit == "error":
        raise MisfitError(
            f"{target.fqn} cannot take {rule.scheme}: {reason} Give it a rule of its own before {str(rule)!r} "
            "(None keeps it), or pass on_misfit='skip'."
        )
    if reason:
        return _plan_row(target, None, f"skipped: {reason}")
    refusal = method_of(method).why_not(Scheme.parse(rule.scheme).weight)
    how = f"; by absmax, because {refusal}" if refusal else ""
    layout, kernels, why = best_layout(target.ops, _case(target, rule.scheme, device))
    return _plan_row(
        target,
        rule.scheme,
        f"rule {str(rule)!r}: {why}{how}",
        layout=layout,
        kernel="+".join(dict.fromkeys(kernel.name for kernel in kernels)),
        fallback=any(kernel.fallback for kernel in kernels),
    )


def _misfit(target: Target, scheme: str) -> str:
    if isinstance(target.weight, QTensor):
        raise QuantizedError(
            f"{target.fqn} is quantized already ({target.weight.scheme}): call lowp.dequantize_ first, or give it a rule None."
        )
    fmt = Scheme.parse(scheme).weight
    if fmt.element.name == "int1" and not fmt.zero_point:
        return (
            f"int1 holds only -1 and 0, so half of the weights would vanish: write {fmt.element.name}/{fmt.block}+bf16."
        )
    if 0 in target.matrix_shape:
        return "it has no elements."
    act = Scheme.parse(scheme).act
    if act is not None and target.kind in ("embedding", "conv"):
        return f"an {target.kind} has no activation to quantize: drop '@{act}'."
    if act is not None and not act.is_identity:
        act.block_dims((16 * 128, target.matrix_shape[-1]))
    return LAYOUTS["plain"].why_not(fmt, target.matrix_shape, target.weight.device.type)


def _case(target: Target, scheme: str, device: torch.device | str | None) -> Case:
    where = torch.device(device) if device is not None else target.weight.device
    return Case(
        op="linear",
        scheme=scheme,
        device=where.type if where.type != "meta" else "cpu",
        sm=device_capability(where.type, where.index),
        dtype=str(target.weight.dtype).removeprefix("torch."),
        shape=target.matrix_shape,
    )


def _plan_row(
    target: Target, scheme: str | None, why: str, *, layout: str = "", kernel: str = "", fallback: bool = False
) -> PlanRow:
    return PlanRow(
        fqn=target.fqn,
        tied=target.tied,
        kind=target.kind,
        shape=tuple(target.weight.shape),
        dtype=target.weight.dtype,
        scheme=scheme,
        layout=layout,
        kernel=kernel,
        fallback=fallback,
        why=why,
    )
