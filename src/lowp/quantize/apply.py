"""quantize_: carry a plan out on a model, in place, and report what happened to every tensor.

    for each planned weight:   method(weight, format) -> parts -> layout.pack -> QTensor -> module.weight

Tied weights become one QTensor under all their names. What stays in floats is in the report too, with its reason.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import KernelError, SpellingError
from ..numerics.compare import relative_error
from ..ops import device_of
from ..tensor import QTensor
from .activations import Activations
from .blocks import Batch
from .calibrate import How, Outcome, Progress, calibrate
from .edit import edit_, edit_proved_
from .match import PlanRow, Rules, Target, planned, table
from .memory import bytes_of
from .method import Method, method_of
from .weight import check_finite, float_weight, quantize_weight


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """What happened to one tensor.

    Args:
        fqn, tied, kind, shape: as in the plan.
        scheme: spelling, or None where it stayed. layout, kernel: how it is stored and what runs it.
        bytes_before, bytes_after: of the tensor.
        error: ||weight - quantized|| / ||weight||, 0.0 where it stayed.
        why: the rule, the choice and its reason.
        rounding_error, output_error: ||x (W - Q)^T|| / ||x W^T|| on the calibration data, by plain rounding and by the method;
            NaN where no data was given.
    """

    fqn: str
    tied: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    scheme: str | None
    layout: str
    kernel: str
    bytes_before: int
    bytes_after: int
    error: float
    why: str
    rounding_error: float = math.nan
    output_error: float = math.nan


@dataclass(frozen=True)
class Report:
    """What `quantize_` did: printable, and a dict for JSON."""

    rows: tuple[ReportRow, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors in the report, before."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors in the report, after."""
        return sum(row.bytes_after for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "rows": [_plain(row) for row in self.rows],
        }

    def __str__(self) -> str:
        seen = any(not math.isnan(row.output_error) for row in self.rows)
        header = ("tensor", "shape", "scheme", "kernel", "MB before", "MB after", "error")
        body = [
            (
                row.fqn,
                "x".join(map(str, row.shape)),
                row.scheme or "-",
                row.kernel or "-",
                f"{row.bytes_before / 1e6:.2f}",
                f"{row.bytes_after / 1e6:.2f}",
                f"{row.error:.4f}" if row.scheme else "-",
                *((_shown(row.rounding_error), _shown(row.output_error)) if seen else ()),
                row.why,
            )
            for row in self.rows
        ]
        header = (*header, *(("output, rounded", "calibrated") if seen else ()), "why")
        ratio = self.bytes_after / max(self.bytes_before, 1)
        return (
            f"{table(header, body)}\n{self.bytes_before / 1e6:.2f} MB -> {self.bytes_after / 1e6:.2f} MB ({ratio:.2f}x)"
        )


def _shown(error: float) -> str:
    return "-" if math.isnan(error) else f"{error:.4f}"


def _plain(row: ReportRow) -> dict[str, Any]:
    """A row for JSON, which has no NaN."""
    value = dataclasses.asdict(row) | {"tied": list(row.tied), "shape": list(row.shape)}
    return {name: None if isinstance(one, float) and math.isnan(one) else one for name, one in value.items()}


def quantize_(
    model: nn.Module,
    rules: Rules,
    *,
    method: str | Method = "absmax",
    device: torch.device | str | None = None,
    strict: bool = False,
    on_misfit: str = "error",
    data: Iterable[Batch] | None = None,
    static: str | None = None,
    propagate: str = "quantized",
    sequential: bool = True,
    max_ram: int | str | None = None,
    max_vram: int | str | None = None,
    distributed: bool = False,
    progress: Progress = lambda name, done, total: None,
) -> Report:
    """Quantize a model in place.

    Args:
        model: any nn.Module. rules: a scheme ("int4", "int8/row@int8/row"), or patterns with schemes; see `lowp.quantize.match`.
        method: "absmax", "mse", "hqq"; with data also "gptq", "awq", "smoothquant", "autoround", "rotate+gptq" and other
            compositions; or a Method of your own.
        device: move the model there, one weight (or block) at a time, quantizing on it.
        strict: a layer that only a slow fallback kernel can run is a KernelError, before anything is changed.
        on_misfit: "error", or "skip" to keep a layer that cannot take its scheme, with the reason in the report.
        data: calibration batches to run the model on: token ids (B, T), mappings of keyword arguments, or tuples of arguments.
        static: with data, how schemes with quantized activations get static scales: "minmax", "average", "percentile" or "mse".
        propagate: what a block sees of those before it: "quantized" (their answers as they will be) or "float".
        sequential: layers see what those before them in their block have become; False runs each block fewer times.
        max_ram, max_vram: bytes or "8GB": hidden states go to files where they would not fit; a layer that cannot is an error.
        distributed: each rank of torch.distributed's default group brings its part of the data; all get the same model.
        progress: called with a block's name, blocks done, and blocks in all.

    Returns:
        A Report: for each tensor its scheme, layout, kernel, bytes, error and reason; with data its output error too.

    Raises:
        SpellingError, MisfitError, QuantizedError, KernelError: whatever fails, and whenever, the model is as it was before.

    >>> model = torch.nn.Sequential(torch.nn.Linear(128, 64))
    >>> report = quantize_(model, "int4")
    >>> model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    >>> report = quantize_(model, "int4/1x32", method="gptq", data=[torch.randn(256, 128)])
    >>> report.rows[0].output_error < report.rows[0].rounding_error
    True
    """
    device = None if device is None else device_of(device)
    chosen, batches = method_of(method), _batches(data)
    if batches is None and (chosen.wants_data or static is not None):
        what = f"method {chosen.name!r}" if chosen.wants_data else "static="
        raise SpellingError(f"{what} wants data, got none: pass data=, batches to run the model on.")
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    on = home if device is None else torch.device(device)
    ram, vram = bytes_of(max_ram, "max_ram"), bytes_of(max_vram, "max_vram")
    how = How(
        method=chosen, device=on, home=home, static=static, propagate=propagate, sequential=sequential,
        limit=ram if on.type == "cpu" else vram, reduce=distributed, progress=progress,
    )  # fmt: skip
    how.check()
    rows = list(planned(model, rules, method=method, device=device, on_misfit=on_misfit))
    if strict:
        _refuse_fallbacks([row for _, row in rows])
    for target, row in rows:
        if row.scheme is not None and target.weight.device.type != "meta" and not chosen.takes_any:
            check_finite(target.weight, target.fqn)
    place = _InPlace(model, on, copies=chosen.smooth is not None)  # nothing was changed before this line
    try:
        if chosen.edit is not None:
            edits = chosen.edit(model)
            edit_proved_(model, edits, batches[0]) if batches else edit_(model, edits)
            rows = list(planned(model, rules, method=method, device=device, on_misfit=on_misfit))
        if batches is not None:
            _calibrate(model, [one for one in rows if one[1].scheme is not None], batches, how, ram, place)
        done = [_carry_out(model, target, row, method, device, place.outcomes.get(target.fqn)) for target, row in rows]
        if device is not None:
            model.to(device)
    except BaseException:  # Ctrl-C too
        place.restore()
        raise
    return Report(rows=tuple(done))


def _batches(data: Iterable[Batch] | None) -> list[Batch] | None:
    """The data as a list; what is one batch and not several is an error."""
    if isinstance(data, (Tensor, str, Mapping)):
        raise SpellingError(f"data wants a list of batches, got one {type(data).__name__}: write data=[batch].")
    batches = None if data is None else list(data)
    if batches and any(isinstance(batch, str) for batch in batches):
        raise SpellingError(
            "data wants batches of token ids (B, T), got text: tokenize it, data=[tokenizer(text, return_tensors='pt')]."
        )
    return batches


class _InPlace:
    """The model itself as the place of its weights: all of them change at the end, or none.

    A block that is done gets its own parameters back, where they were; what calibration made of it waits in `outcomes` and
    `changed`. So a run that fails leaves the model as it was, and one block at a time is on the device.

    Args:
        model, device: where blocks run. copies: the method writes into parameters: it is given copies.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, copies: bool) -> None:
        self.model, self.device, self.copies = model, device, copies
        self.outcomes: dict[str, Outcome] = {}
        self.changed: dict[str, nn.Parameter] = {}
        self.done: set[nn.Module] = set()
        self.originals = dict(model.named_parameters(remove_duplicate=False))
        self.homes = {name: parameter.device for name, parameter in self.originals.items()}
        self.buffers = {child: dict(child._buffers) for child in model.modules()}
        self.tied = getattr(getattr(model, "config", None), "tie_word_embeddings", None)

    @property
    def blocks_done(self) -> int:
        """Nothing is kept of an earlier run."""
        return 0

    def load(self, module: nn.Module) -> None:
        """Bring a block to the device; at last, for the model, what is in no block."""
        copied: dict[nn.Parameter, nn.Parameter] = {}
        for child in module.modules():
            if child in self.done:
                continue
            child._apply(lambda tensor: tensor.to(self.device), recurse=False)
            for name, parameter in child._parameters.items():
                if self.copies and parameter is not None and type(parameter) is nn.Parameter:
                    fresh = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                    child._parameters[name] = copied.setdefault(parameter, fresh)

    def finished(self, name: str, module: nn.Module, outcomes: Mapping[str, Outcome], hidden: Activations) -> None:
        """Keep what became of a block's weights, and give it back its own."""
        self.outcomes |= outcomes
        for fqn, parameter in list(module.named_parameters(prefix=name, remove_duplicate=False)):
            if fqn not in outcomes and not self._is_original(fqn, parameter):
                self.changed[fqn] = parameter
            self._put_back(fqn)
        self.done |= set(module.modules())
        if not name:
            for fqn, parameter in self.changed.items():
                _set(self.model, fqn, parameter)

    def restore(self) -> None:
        """The model as it was."""
        for fqn in self.originals:
            self._put_back(fqn)
        for child, buffers in self.buffers.items():
            child._buffers.update(buffers)
        config: Any = getattr(self.model, "config", None)
        if self.tied is not None:
            config.tie_word_embeddings = self.tied

    def _is_original(self, fqn: str, parameter: Tensor) -> bool:
        own = self.originals[fqn]
        return parameter is own or (parameter.dtype == own.dtype and torch.equal(parameter, own.to(parameter.device)))

    def _put_back(self, fqn: str) -> None:
        own = self.originals[fqn]
        if own.device != self.homes[fqn]:
            own.data = own.data.to(self.homes[fqn])
        _set(self.model, fqn, own)


def _set(model: nn.Module, fqn: str, parameter: nn.Parameter) -> None:
    module_name, _, name = fqn.rpartition(".")
    model.get_submodule(module_name)._parameters[name] = parameter


def _calibrate(
    model: nn.Module,
    rows: list[tuple[Target, PlanRow]],
    batches: list[Batch],
    how: How,
    max_ram: int | None,
    place: _InPlace,
) -> None:
    """Calibrate in eval mode; modules are in their own mode afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    with tempfile.TemporaryDirectory(prefix="lowp-calibrate-") as folder:
        hidden = Activations(Path(folder) if max_ram is not None else None, how.limit)
        try:
            calibrate(model, rows, batches, place, hidden, how)
        finally:
            for module, mode in training.items():
                module.training = mode


def _refuse_fallbacks(rows: list[PlanRow]) -> None:
    slow = [row for row in rows if row.fallback]
    if slow:
        named = "; ".join(f"{row.fqn} {row.scheme} ({row.kernel})" for row in slow[:5])
        raise KernelError(
            f"strict mode wants a fast kernel for every layer, got only a fallback for {len(slow)}: {named}. "
            f"`lowp explain linear {slow[0].scheme}` says why; choose another scheme for them, or strict=False."
        )


def _carry_out(
    model: nn.Module,
    target: Target,
    row: PlanRow,
    method: str | Method,
    device: torch.device | str | None,
    outcome: Outcome | None,
) -> ReportRow:
    before = target.weight.numel() * target.weight.element_size()
    after, error = before, 0.0
    if row.scheme is not None:
        weight = target.weight.detach()
        weight = weight if device is None else weight.to(device)
        if outcome is None:
            quantized = quantize_weight(weight, row.scheme, method=method, name=target.fqn, kind=target.kind)
            error = _error(weight, quantized)
        else:
            quantized, error = outcome.quantized, outcome.error
        quantized = quantized if row.layout == "plain" else quantized.to_layout(row.layout)
        after = quantized.packed_nbytes
        parameter = nn.Parameter(quantized, requires_grad=False)
        for fqn in (target.fqn, *target.tied):
            module_name, _, name = fqn.rpartition(".")
            setattr(model.get_submodule(module_name), name, parameter)
    return ReportRow(
        fqn=target.fqn,
        tied=target.tied,
        kind=target.kind,
        shape=row.shape,
        scheme=row.scheme,
        layout=row.layout,
        kernel=row.kernel,
        bytes_before=before,
        bytes_after=after,
        error=error,
        why="; ".join(filter(None, (row.why, outcome.why if outcome else ""))),
        rounding_error=outcome.rounding_error if outcome else math.nan,
        output_error=outcome.output_error if outcome else math.nan,
    )


def _error(weight: Tensor, quantized: QTensor) -> float:
    if weight.device.type == "meta":
        return 0.0
    return relative_error(weight, quantized.dequantize(torch.float32))


def dequantize_(model: nn.Module) -> nn.Module:
    """Turn every quantized weight back into floats of its dtype, in place; tied weights stay tied.

    What the input was multiplied by (`act_pre_scale`) and rotated by goes into the weight: the layer says the same.

    Returns:
        The model.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if isinstance(parameter, QTensor):
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(float_weight(parameter).contiguous(), requires_grad=False)
                setattr(module, name, made[id(parameter)])
    return model
