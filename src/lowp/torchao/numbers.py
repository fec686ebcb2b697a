"""How torchao chooses the numbers of a weight, one function a family: weight (N, K) and our format -> Parts.

Our formats say what is stored; these say what torchao 0.18 would have stored, bit for bit, so that a checkpoint is the same
whichever of the two wrote it. Each is a `run` of a Method. Where torchao's answer is a NaN (all-zero rows) ours is zeros.

    int8      scale = amax / 127.5 in the weight's dtype, at least float32's eps, kept in float32
    float8    scale = amax / largest, in the weight's dtype, kept in float32
    intx      `affine.py` with the mapping's rule; scale in the weight's dtype or as asked
    int4      scale = (max - min) / 15, at least 1e-6 / 15; zero = min + 8 scale; q = round((x - min) / scale) - 8
    tinygemm  the FLOAT domain of `affine.py`
    MX, NVFP4 our own rules, which are torchao's (tests/guest/test_torchao_numerics.py)

int4's zero is in units of the value; ours, in units of the code, is -zero / scale. Kept in float32 it gives the zero back exactly
when it is rounded to the scale's dtype again: its relative error is below 2**-22, the zero has at most 11 bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import MisfitError
from ..methods.hqq import hqq
from ..numerics import ELEMENTS, Format, Parts, quantize
from ..numerics.math import ZERO_POINT_DTYPES
from ..quantize import Method
from . import affine
from .words import MappingType

Numbers = Callable[[Tensor, Format], Parts]
_FLOAT32_EPS = torch.finfo(torch.float32).eps
_MSLK_SMALLEST = 1e-6  # the smallest range of a group


def method(name: str, run: Numbers) -> Method:
    """A method that carries a family's numbers out.

    Hosts quantize memory that nothing has been written to yet, as the place for weights that they load afterwards (vLLM does), so
    NaN and infinity are no error here: they count as 0, with a warning.
    """

    def of_finite(weight: Tensor, statistics: object, fmt: Format) -> Parts:
        if weight.device.type != "meta" and not weight.isfinite().all():
            bad = int((~weight.isfinite()).sum())
            warnings.warn(
                f"{name} takes {bad} NaN or infinite numbers of a weight {tuple(weight.shape)} for 0: right for memory that is "
                "filled later, a damaged checkpoint otherwise.",
                stacklevel=2,
            )
            weight = weight.nan_to_num(0.0, 0.0, 0.0)
        return run(weight, fmt)

    about = "the numbers of torchao 0.18"
    return Method(name=f"torchao's {name}", about=about, run=of_finite, why_not=lambda fmt: "", takes_any=True)


def blocks_of(fmt: Format, weight: Tensor) -> tuple[int, ...]:
    """torchao's block_size for a format: of the weight's rank, with a block of one for stacked matrices."""
    bn, bk = fmt.block_dims(tuple(weight.shape))
    return (bk,) if weight.dim() == 1 else (*(1,) * (weight.dim() - 2), bn, bk)


def _scale_dtype(fmt: Format) -> torch.dtype:
    dtype = ELEMENTS[str(fmt.scale)].dtype
    return dtype


def _affine(weight: Tensor, fmt: Format, mapping: MappingType, eps: float | None) -> Parts:
    element, block = fmt.element, blocks_of(fmt, weight)
    dtype = torch.int8 if element.signed else torch.uint8
    zero_dtype = ZERO_POINT_DTYPES[fmt.zero_point] if fmt.zero_point else torch.int32
    scale, zero_point = affine.choose_qparams_affine(
        weight, mapping, block, dtype, element.qmin, element.qmax, eps, _scale_dtype(fmt), zero_dtype, keepdim=True
    )
    qdata = affine.quantize_affine(weight, block, scale, zero_point, dtype, element.qmin, element.qmax)
    return Parts(qdata=qdata, scale=scale, zero_point=zero_point if fmt.zero_point else None)


def int8(weight: Tensor, fmt: Format) -> Parts:
    """Int8Tensor's: symmetric, with float32's eps as the smallest scale whatever the dtype."""
    return _affine(weight, fmt, MappingType.SYMMETRIC, _FLOAT32_EPS)


def intx(mapping: MappingType) -> Numbers:
    """IntxUnpackedToInt8Tensor's, for a mapping."""

    def run(weight: Tensor, fmt: Format) -> Parts:
        return _affine(weight, fmt, mapping, None)

    return run


def float8(weight: Tensor, fmt: Format) -> Parts:
    """Float8Tensor's."""
    dtype = fmt.element.dtype
    scale = affine.choose_scale_float8(weight, blocks_of(fmt, weight), dtype)
    return Parts(qdata=affine.quantize_affine_float8(weight, scale, dtype), scale=scale)


def int4(weight: Tensor, fmt: Format) -> Parts:
    """Int4Tensor's, asymmetric: mslk's int4_row_quantize_zp."""
    groups = weight.to(torch.float32).unflatten(-1, (-1, blocks_of(fmt, weight)[-1]))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low).clamp(min=_MSLK_SMALLEST) / 15
    zero = low + scale * 8
    codes = ((groups - low.unsqueeze(-1)) / scale.unsqueeze(-1)).round().clamp(0, 15) - 8
    kept = scale.to(_scale_dtype(fmt))
    return Parts(
        qdata=codes.flatten(-2).to(torch.int8), scale=kept, zero_point=from_value_zero(zero.to(kept.dtype), kept)
    )


def int4_symmetric(weight: Tensor, fmt: Format) -> Parts:
    """Int4Tensor's for float8 activations: scale = amax / 8."""
    groups = weight.to(torch.float32).unflatten(-1, (-1, blocks_of(fmt, weight)[-1]))
    scale = groups.abs().amax(-1).clamp(min=_MSLK_SMALLEST) / 8
    codes = (groups / scale.unsqueeze(-1)).round().clamp(-8, 7)
    return Parts(qdata=codes.flatten(-2).to(torch.int8), scale=scale.to(_scale_dtype(fmt)))


def tinygemm(weight: Tensor, fmt: Format) -> Parts:
    """Int4TilePackedTo4dTensor's: the range as it is, zero included or not."""
    block, dtype = blocks_of(fmt, weight), _scale_dtype(fmt)
    scale, zero = affine.choose_qparams_affine_tinygemm(
        weight, MappingType.ASYMMETRIC, block, torch.int32, 0, 15, eps=1e-6, scale_dtype=dtype, zero_point_dtype=dtype
    )
    codes = affine.quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, 0, 15)
    scale, zero = (t.view(fmt.scale_shape(tuple(weight.shape))) for t in (scale, zero))
    return Parts(qdata=(codes - 8).to(torch.int8), scale=scale, zero_point=from_value_zero(zero, scale))


def hqq_asymmetric(weight: Tensor, fmt: Format) -> Parts:
    """HQQ, which searches the zero: our own solver, as `method="hqq"`; the zero is one that torchao's files can hold."""
    parts = hqq(weight, fmt)
    assert parts.scale is not None
    zero = to_value_zero(parts.zero_point, parts.scale)
    return parts.replace(zero_point=from_value_zero(zero, parts.scale))


def hqq_scale_only(weight: Tensor, fmt: Format) -> Parts:
    """HQQ without a zero point: the scale by least squares."""
    qdata, scale = choose_scale_only_hqq(weight, blocks_of(fmt, weight), fmt.element.qmin, fmt.element.qmax)
    shape = fmt.scale_shape(tuple(weight.shape))
    return Parts(qdata=qdata.to(torch.int8), scale=scale.view(shape).to(_scale_dtype(fmt)))


def own(weight: Tensor, fmt: Format) -> Parts:
    """The format's own rule."""
    return quantize(weight, fmt)


def choose_affine_hqq(
    tensor: Tensor,
    nbits: float = 4,
    group_size: int = 64,
    optimize: bool = True,
    axis: int = 1,
    compute_dtype: torch.dtype = torch.float16,
    device: str = "cuda",
    verbose: bool = False,
    raw_output: bool = False,
    optimize_weights: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """HQQ of a matrix by our solver: codes 0 .. 2**nbits - 1, scale and zero for each group, and the shape.

    Args:
        tensor: (N, K). axis: 1, groups along K. raw_output: the zero in units of the code; else of the value, as tinygemm's.
        device, verbose, optimize_weights: read and not used; it runs where the tensor is.
    """
    if axis != 1:
        raise MisfitError(f"groups run along the last axis, axis=1, got axis={axis}: transpose the matrix.")
    fmt = Format.parse(f"uint{int(nbits)}/1x{group_size}+fp32")
    parts = hqq(tensor, fmt) if optimize else quantize(tensor, fmt)
    assert parts.scale is not None and parts.zero_point is not None
    middle = 2 ** (int(nbits) - 1)
    zero = parts.zero_point if raw_output else (middle - parts.zero_point) * parts.scale
    return parts.qdata, parts.scale.to(compute_dtype), zero.to(compute_dtype), tensor.shape


# -- zeros in units of the value ----------------------------------------------------------------------------------------


def from_value_zero(zero: Tensor, scale: Tensor) -> Tensor:
    """Our zero point, in units of the code and float32, of a zero in units of the value."""
    return -zero.to(scale.device, torch.float32) / scale.to(torch.float32)


def to_value_zero(zero_point: Tensor | None, scale: Tensor) -> Tensor:
    """A zero in units of the value, in the scale's dtype, of our zero point."""
    if zero_point is None:
        return torch.zeros_like(scale)
    return (-zero_point.to(scale.device, torch.float32) * scale.to(torch.float32)).to(scale.dtype)


# -- HQQ on the scale alone ---------------------------------------------------------------------------------------------


@torch.no_grad()
def choose_scale_only_hqq(
    hp_tensor: Tensor,
    block_size: list[int] | tuple[int, ...],
    qmin: int,
    qmax: int,
    *,
    iters: int = 20,
    stochastic: bool = False,
    early_stop_tol: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix, the scale of each block found by turns: codes by rounding, scale by least squares.

        q = clamp(round(w / s), qmin, qmax),   s = <w, q> / <q, q>

    Args:
        hp_tensor: (N, K). block_size: (1, group). stochastic: round up or down at random.
        iters, early_stop_tol: stop after so many turns, or when no scale moves by more than this share of itself.

    Returns:
        qdata (N, K) int32, scale (N, K / group) in hp_tensor's dtype.
    """
    group = block_size[-1]
    w = hp_tensor.to(torch.float32).unflatten(-1, (-1, group))
    scale = (w.abs().amax(-1, keepdim=True) / max(abs(qmin), abs(qmax))).clamp(min=_FLOAT32_EPS)

    def codes() -> Tensor:
        scaled = w / scale
        rounded = torch.floor(scaled + torch.rand_like(scaled)) if stochastic else torch.round(scaled)
        return rounded.clamp(qmin, qmax)

    for _ in range(iters):
        q = codes()
        power = (q * q).sum(-1, keepdim=True)
        fitted = torch.where(power > 0, (w * q).sum(-1, keepdim=True) / power.clamp(min=1e-30), scale)
        fitted = fitted.abs().clamp(min=_FLOAT32_EPS)
        moved = ((fitted - scale).abs() / scale).max() if scale.numel() else torch.zeros(())
        scale = fitted
        if moved < early_stop_tol:
            break
    return codes().flatten(-2).to(torch.int32), scale.squeeze(-1).to(hp_tensor.dtype)
