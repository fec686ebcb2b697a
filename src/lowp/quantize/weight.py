"""One weight: check it, choose its numbers by a method, wrap them.

weight, statistics, format  ->  method.run  ->  parts  ->  QTensor in the plain layout
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import MisfitError, QuantizedError, SpellingError
from ..numerics import Format, Parts, Scheme
from ..numerics.hadamard import unrotated
from ..tensor import QTensor
from .method import METHODS, Method, method_of
from .statistics import Statistics


def quantize_weight(
    weight: Tensor,
    scheme: str,
    *,
    method: str | Method = "absmax",
    name: str = "weight",
    kind: str = "linear",
    statistics: Sequence[Statistics] = (),
) -> QTensor:
    """Quantize one weight, in the plain layout.

    Args:
        weight: (N, K), (E, N, K), or as `kind` has it ("conv": (O, C, ...), "conv1d": (K, N)); float.
        scheme: spelling or preset. method: name of a method, or one of your own. name: for errors.
        statistics: of its inputs, where calibration has seen some: one, or one for each matrix of a stack.

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
    if chosen.wants_data and not statistics:
        raise SpellingError(
            f"{name}: method {chosen.name!r} wants statistics of the inputs, got none: give lowp.quantize_ data=, or the "
            "command line --data."
        )
    if chosen.why_not(parsed.weight):
        chosen = METHODS["absmax"]
    with torch.no_grad():
        parts = _parts_of(matrix, chosen, parsed.weight, statistics)
        quantized = QTensor.from_parts(parts, str(parsed), dtype=weight.dtype)
    if kind == "conv":
        return quantized.view(weight.shape)  # type: ignore[return-value]
    return quantized.t() if kind == "conv1d" else quantized  # type: ignore[return-value]


def _parts_of(matrix: Tensor, method: Method, fmt: Format, statistics: Sequence[Statistics]) -> Parts:
    """The parts of a matrix, or of a stack of matrices whose inputs were seen one by one."""
    if matrix.dim() != 3 or not statistics:
        return method.run(matrix, statistics[0] if statistics else None, fmt)
    each = [method.run(one, seen, fmt).tensors() for one, seen in zip(matrix, statistics, strict=True)]
    return Parts.of({name: torch.stack([parts[name] for parts in each]) for name in each[0]})


def float_weight(weight: QTensor) -> Tensor:
    """The float weight that says the same: what happens to the input before it is quantized is undone in the columns."""
    factor_K, signs_K = weight.packed.get("act_pre_scale"), weight.packed.get("act_rotation")
    if factor_K is None and signs_K is None:
        return weight.dequantize()
    values = weight.dequantize(torch.float32)
    values = values.mT if weight.transposed else values
    values = values if factor_K is None else values * factor_K.to(torch.float32)
    values = values if signs_K is None else unrotated(values, signs_K)
    return (values.mT if weight.transposed else values).to(weight.dtype)


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
