"""What each layer costs and gains: its error, its bytes, the kernel that runs it, and why.

    weight error   ||W - W_q|| / ||W||                       of the weight alone
    output error   ||f(x) - f_q(x)|| / ||f(x)||              of the layer, on the inputs x that the original model feeds it

The output error weighs each column of the weight by what really flows through it, and counts a quantized activation too. It
is local: every layer gets the original's input, so a layer's figure does not hold the errors of those before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics.compare import relative_error
from ..ops import Case, pick
from ..ops.registry import device_capability
from ..quantize import ReportRow
from ..quantize.match import Target, targets
from ..tensor import QTensor
from .evaluate import Quality
from .results import plain


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that is known of one quantized model beside its original.

    Args:
        name: what it is called in tables. scheme: of most of its quantized weights, "" where none is quantized.
        bytes_before, bytes_after: of all parameters, as stored. bits: a weight in that scheme, scales included, as stored.
        quality: on the text. rows: layer by layer. output_errors: by the layer's name, where they were asked for.
    """

    name: str
    scheme: str
    bytes_before: int
    bytes_after: int
    bits: float
    quality: Quality
    rows: tuple[ReportRow, ...]
    output_errors: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: what is not finite becomes None."""
        return plain(dataclasses.asdict(self))


def evaluation(
    name: str,
    model: nn.Module,
    original: nn.Module,
    quality: Quality,
    *,
    floats: torch.dtype | None = None,
    rows: tuple[ReportRow, ...] | None = None,
    output_errors: dict[str, float] | None = None,
) -> Evaluation:
    """Put what was measured about one model together.

    Args:
        floats: count plain float tensors as stored in this dtype, whatever they are computed in; None: as they are.
        rows: from `quantize_`, where it was just called; None: read off the two models.
    """
    rows = layer_rows(model, original, floats) if rows is None else rows
    by_scheme: dict[str, int] = {}
    for row in rows:
        if row.scheme:
            by_scheme[row.scheme] = by_scheme.get(row.scheme, 0) + math.prod(row.shape)
    scheme = max(by_scheme, key=lambda name: by_scheme[name], default="")
    held = sum(row.bytes_after for row in rows if row.scheme == scheme)
    return Evaluation(
        name=name,
        scheme=scheme,
        bytes_before=model_bytes(original, floats),
        bytes_after=model_bytes(model, floats),
        bits=8 * held / by_scheme[scheme] if scheme else math.nan,
        quality=quality,
        rows=rows,
        output_errors=output_errors or {},
    )


def model_bytes(model: nn.Module, floats: torch.dtype | None = None) -> int:
    """Bytes of all parameters, tied ones once; plain floats counted in the dtype `floats` where given.

    >>> model_bytes(torch.nn.Linear(4, 4, bias=False), torch.bfloat16)
    32
    """
    return sum(_bytes(parameter, floats) for parameter in model.parameters())


def _bytes(tensor: Tensor, floats: torch.dtype | None) -> int:
    if isinstance(tensor, QTensor):
        return tensor.packed_nbytes
    counted = floats if floats is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.numel() * counted.itemsize


def counted_as(rows: tuple[ReportRow, ...], floats: torch.dtype) -> tuple[ReportRow, ...]:
    """The rows of a report with float tensors counted as stored in `floats`, whatever they were computed in."""

    def one(row: ReportRow) -> ReportRow:
        stored = math.prod(row.shape) * floats.itemsize
        return dataclasses.replace(row, bytes_before=stored, bytes_after=row.bytes_after if row.scheme else stored)

    return tuple(map(one, rows))


def layer_rows(model: nn.Module, original: nn.Module, floats: torch.dtype | None = None) -> tuple[ReportRow, ...]:
    """The rows of a report, read off a model that is quantized already and the one it came from."""
    before = dict(original.named_parameters(remove_duplicate=False))
    return tuple(_row(target, before[target.fqn], floats) for target in targets(model) if target.fqn in before)


def _row(target: Target, before: Tensor, floats: torch.dtype | None) -> ReportRow:
    weight = target.weight
    layout = kernel = scheme = ""
    error, why = 0.0, "stays in floats"
    if isinstance(weight, QTensor):
        scheme, layout = weight.scheme, weight.spec.layout
        kernel, why = _kernel(target, weight)
        error = relative_error(before.to(weight.device), weight.dequantize(torch.float32))
    return ReportRow(
        fqn=target.fqn,
        tied=target.tied,
        kind=target.kind,
        shape=tuple(weight.shape),
        scheme=scheme or None,
        layout=layout,
        kernel=kernel,
        bytes_before=_bytes(before, floats),
        bytes_after=_bytes(weight, floats),
        error=error,
        why=why,
    )


def _kernel(target: Target, weight: QTensor) -> tuple[str, str]:
    """The kernels that run a quantized weight, and the sentence that says so."""
    case = Case(
        op="linear",
        scheme=weight.scheme,
        layout=weight.spec.layout,
        device=weight.device.type,
        sm=device_capability(weight.device.type, weight.device.index),
        dtype=str(weight.dtype).removeprefix("torch."),
        shape=weight.spec.shape,
        extras=tuple(name for name in ("act_pre_scale", "act_scale") if name in weight.packed),
    )
    chosen = {op: pick(dataclasses.replace(case, op=op)) for op in target.ops}
    why = ", ".join(f"{op} by {kernel.name}{' (fallback)' if kernel.fallback else ''}" for op, kernel in chosen.items())
    return "+".join(dict.fromkeys(kernel.name for kernel in chosen.values())), why


# -- output error -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def output_errors(model: nn.Module, original: nn.Module, ids: Tensor, *, window: int = 512) -> dict[str, float]:
    """The output error of each quantized layer, by the module's name.

    Args:
        model: quantized, on the original's device. ids: (n,) token ids of the text, read in windows one after the other.

    No activation is kept: while the original runs, each layer of the quantized model is called on the same input.
    """
    sums: dict[str, list[float]] = {}
    hooks = []
    for name, module in _quantized_modules(model).items():
        twin = original.get_submodule(name)
        hooks.append(twin.register_forward_hook(_compare(module, sums.setdefault(name, [0.0, 0.0])), with_kwargs=True))
    try:
        device = next(original.parameters()).device
        for start in range(0, len(ids), window):
            original(input_ids=ids[start : start + window].unsqueeze(0).to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: math.sqrt(noise / signal) for name, (noise, signal) in sums.items() if signal > 0}


def _quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if any(isinstance(parameter, QTensor) for parameter in module.parameters(recurse=False))
    }


def _compare(quantized: nn.Module, sums: list[float]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        other = quantized(*args, **kwargs)
        if isinstance(output, Tensor):
            sums[0] += (output.double() - other.double()).square().sum().item()
            sums[1] += output.double().square().sum().item()

    return hook
