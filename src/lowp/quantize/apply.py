"""quantize_: carry a plan out on a model, in place, and report what happened to every tensor.

    for each planned weight:   method(weight, format) -> parts -> layout.pack -> QTensor -> module.weight

Tied weights become one QTensor under all their names. What stays in floats is in the report too, with its reason.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import KernelError, MisfitError, QuantizedError
from ..numerics import Parts, Scheme
from ..numerics.compare import relative_error
from ..ops import device_of
from ..tensor import QTensor
from .match import PlanRow, Rules, Target, planned, table
from .method import METHODS, Method, method_of


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """What happened to one tensor.

    Args:
        fqn, tied, kind, shape: as in the plan.
        scheme: spelling, or None where it stayed. layout, kernel: how it is stored and what runs it.
        bytes_before, bytes_after: of the tensor.
        error: ||weight - quantized|| / ||weight||, 0.0 where it stayed.
        why: the rule, the choice and its reason.
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
            "rows": [dataclasses.asdict(row) | {"tied": list(row.tied), "shape": list(row.shape)} for row in self.rows],
        }

    def __str__(self) -> str:
        header = ("tensor", "shape", "scheme", "kernel", "MB before", "MB after", "error", "why")
        body = [
            (
                row.fqn,
                "x".join(map(str, row.shape)),
                row.scheme or "-",
                row.kernel or "-",
                f"{row.bytes_before / 1e6:.2f}",
                f"{row.bytes_after / 1e6:.2f}",
                f"{row.error:.4f}" if row.scheme else "-",
                row.why,
            )
            for row in self.rows
        ]
        ratio = self.bytes_after / max(self.bytes_before, 1)
        return (
            f"{table(header, body)}\n{self.bytes_before / 1e6:.2f} MB -> {self.bytes_after / 1e6:.2f} MB ({ratio:.2f}x)"
        )


def quantize_weight(
    weight: Tensor, scheme: str, *, method: str | Method = "absmax", name: str = "weight", kind: str = "linear"
) -> QTensor:
    """Quantize one weight, in the plain layout.

    Args:
        weight: (N, K), (E, N, K), or as `kind` has it ("conv": (O, C, ...), "conv1d": (K, N)); float.
        scheme: spelling or preset. method: name of a method, or one of your own. name: for errors.

    Raises:
        QuantizedError: it is quantized already. MisfitError: NaN or infinity, or blocks that do not divide the shape.

    >>> quantize_weight(torch.randn(64, 64), "int8").packed_nbytes
    4352
    """
    if isinstance(weight, QTensor):
        raise QuantizedError(f"{name} is quantized already ({weight.scheme}): dequantize() it first.")
    chosen = method_of(method)
    if not chosen.takes_any:
        check_finite(weight, name)
    parsed = Scheme.parse(scheme)
    matrix = weight.detach()
    if kind == "conv":
        matrix = matrix.flatten(1)
    elif kind == "conv1d":
        matrix = matrix.t()
    if chosen.why_not(parsed.weight):
        chosen = METHODS["absmax"]
    with torch.no_grad():
        parts: Parts = chosen.run(matrix, parsed.weight)
        quantized = QTensor.from_parts(parts, str(parsed), dtype=weight.dtype)
    if kind == "conv":
        return quantized.view(weight.shape)  # type: ignore[return-value]
    return quantized.t() if kind == "conv1d" else quantized  # type: ignore[return-value]


def check_finite(weight: Tensor, name: str) -> None:
    """Raise a MisfitError that names the tensor and counts its NaN and infinite elements, if there are any."""
    if not weight.numel() or all(bound.isfinite() for bound in torch.aminmax(weight)):  # both are NaN if any element is
        return
    bad = weight.numel() - int(weight.isfinite().sum())
    if bad:
        nans = int(weight.isnan().sum())
        raise MisfitError(
            f"{name} {tuple(weight.shape)} wants finite numbers, got {nans} NaN and {bad - nans} infinite of {weight.numel()}: "
            "repair the checkpoint, or keep this layer with a rule None."
        )


def quantize_(
    model: nn.Module,
    rules: Rules,
    *,
    method: str | Method = "absmax",
    device: torch.device | str | None = None,
    strict: bool = False,
    on_misfit: str = "error",
) -> Report:
    """Quantize a model in place.

    Args:
        model: any nn.Module. rules: a scheme ("int4", "int8/row@int8/row"), or patterns with schemes; see `lowp.quantize.match`.
        method: "absmax", "mse", "hqq", or a Method of your own.
        device: move the model there, one weight at a time, quantizing on it.
        strict: a layer that only a slow fallback kernel can run is a KernelError, before anything is changed.
        on_misfit: "error", or "skip" to keep a layer that cannot take its scheme, with the reason in the report.

    Returns:
        A Report: for each tensor its scheme, layout, kernel, bytes, error and reason.

    Raises:
        SpellingError, MisfitError, QuantizedError, KernelError: before anything is changed, but for a non-finite weight, which is
        found when its turn comes (the layers before it are quantized then; the message names the one).

    >>> model = torch.nn.Sequential(torch.nn.Linear(128, 64))
    >>> report = quantize_(model, "int4")
    """
    device = None if device is None else device_of(device)
    rows = list(planned(model, rules, method=method, device=device, on_misfit=on_misfit))
    if strict:
        _refuse_fallbacks([row for _, row in rows])
    for target, row in rows:
        if row.scheme is not None and target.weight.device.type != "meta" and not method_of(method).takes_any:
            check_finite(target.weight, target.fqn)
    done = [_carry_out(model, target, row, method, device) for target, row in rows]
    if device is not None:
        model.to(device)
    return Report(rows=tuple(done))


def _refuse_fallbacks(rows: list[PlanRow]) -> None:
    slow = [row for row in rows if row.fallback]
    if slow:
        named = "; ".join(f"{row.fqn} {row.scheme} ({row.kernel})" for row in slow[:5])
        raise KernelError(
            f"strict mode wants a fast kernel for every layer, got only a fallback for {len(slow)}: {named}. "
            f"`lowp explain linear {slow[0].scheme}` says why; choose another scheme for them, or strict=False."
        )


def _carry_out(
    model: nn.Module, target: Target, row: PlanRow, method: str | Method, device: torch.device | str | None
) -> ReportRow:
    before = target.weight.numel() * target.weight.element_size()
    after, error = before, 0.0
    if row.scheme is not None:
        weight = target.weight.detach()
        weight = weight if device is None else weight.to(device)
        quantized = quantize_weight(weight, row.scheme, method=method, name=target.fqn, kind=target.kind)
        error = _error(weight, quantized)
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
        why=row.why,
    )


def _error(weight: Tensor, quantized: QTensor) -> float:
    if weight.device.type == "meta":
        return 0.0
    return relative_error(weight, quantized.dequantize(torch.float32))


def dequantize_(model: nn.Module) -> nn.Module:
    """Turn every quantized weight back into floats of its dtype, in place; tied weights stay tied.

    Returns:
        The model.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if isinstance(parameter, QTensor):
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(parameter.dequantize().contiguous(), requires_grad=False)
                setattr(module, name, made[id(parameter)])
    return model
