"""fake_quantize: quantize and dequantize with a gradient, so that a model learns with the numbers it will be served in.

    forward      y = (q - zero_point) * scale,   q = clamp(round(x / scale + zero_point))        bit for bit what `convert` keeps
    backward     dL/dx = dL/dy      where v = x / scale + zero_point lies in the element's reach, its ends included
                         0          beyond it, where x was clamped (clamp="pass": dL/dy there too)

The reach goes half a step beyond the outermost values (`numerics/reach.py`): what rounding alone would have brought to them. The
scale of a block is a constant in this gradient. With clamp="zero" a number that is stuck at the bound gets no push; BitNet's
straight-through estimator is clamp="pass".

With a scale (and zero point) that is learned, `fake_quantize_given`, the block's sum of

    dy/dscale       = q - zero_point - v'     inside, v' = x / scale        the rounding error in steps
                      q - zero_point          outside
    dy/dzero_point  = 0 inside,  -scale outside

Both are operators of their own, `lowp::fake_quantize...`, under torch.compile too: fused into its neighbours, a scale's visit to
bf16 would be optimised away, and the numbers would no longer be those that are served. Nothing is saved for the backward but x,
and not even that where no number can be clamped; scales are computed again.

Sources: Bengio et al., arXiv 1308.3432 (straight-through); Esser et al., LSQ, arXiv 1902.08153; Bhalgat et al., LSQ+, arXiv
2004.09576 (zero points); Ma et al., BitNet b1.58, arXiv 2402.17764.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import SpellingError
from ..numerics import Format, dequantize, quantize
from ..numerics.math import _spread, quantize_given, read_scale, to_blocks
from ..numerics.reach import clamps, inside
from .cast import case_of_cast
from .registry import pick

CLAMPS = ("zero", "pass")


def fake_quantize(x: Tensor, fmt: Format, *, clamp: str = "zero") -> Tensor:
    """Quantize and dequantize, with a straight-through gradient.

    Args:
        x: (..., N, K), any float dtype. fmt: its blocks must divide the shape. clamp: "zero" or "pass", see the top of this file.

    Returns:
        x's shape and dtype: bit for bit `dequantize(quantize(x, fmt), fmt, x.dtype)`.

    Raises:
        MisfitError: blocks that do not divide the shape.

    >>> x = torch.tensor([[1.4, -7.0]], requires_grad=True)
    >>> fake_quantize(x, Format.parse("int4/row")).detach()
    tensor([[ 1., -7.]])
    """
    check_clamp(clamp)
    y: Tensor = torch.ops.lowp.fake_quantize(x, str(fmt), clamp)
    return y


def fake_quantize_again(x: Tensor, fmt: Format) -> Tensor:
    """The values of `fake_quantize`, without a gradient: made anew in a backward rather than kept from the forward.

    An operator of another name, so that a compiler does not find it in the forward's graph and keep that result after all.
    """
    y: Tensor = torch.ops.lowp.fake_quantize_again(x, str(fmt))
    return y


def fused(x: Tensor, fmt: Format) -> Tensor | None:
    """The values of `fake_quantize` as torch's own operations, for a compiler to fuse with what makes x; None where not.

    While a graph is traced, and for one float32 scale a row: there a compiler can lose nothing but the visit of x itself to
    bf16 and the last bit of a quotient. A norm or an activation function then writes quantized numbers at once: they take
    the place of x in memory, and layers that read the same x share them.
    """
    if not torch.compiler.is_compiling() or fmt.block != "row" or str(fmt.scale) != "fp32" or fmt.rule == "mse":
        return None
    return reference(x, fmt)


def fake_quantize_merged(
    base: Tensor, b: Tensor, a: Tensor, scaling: float, fmt: Format, *, again: bool = False
) -> Tensor:
    """The values of `fake_quantize` of a weight merged with its adapters, base + scaling * b @ a, without a gradient.

    One operator for both steps: made again in a backward, it needs the parameters and nothing that a forward would have to keep.

    Args:
        base: (N, K). b: (N, r). a: (r, K), in b's dtype. again: of another name, see `fake_quantize_again`.

    Returns:
        (N, K) in b's dtype.
    """
    op = torch.ops.lowp.fake_quantize_merged_again if again else torch.ops.lowp.fake_quantize_merged
    y: Tensor = op(base, b, a, scaling, str(fmt))
    return y


def merged(base: Tensor, b: Tensor, a: Tensor, scaling: float) -> Tensor:
    """(N, K): a weight plus its adapters, in their dtype."""
    return torch.addmm(base.to(b.dtype), b, a, alpha=scaling)


def stopped(grad: Tensor, x: Tensor, fmt: Format, clamp: str) -> Tensor:
    """The gradient of `fake_quantize` at x: `grad`, zero where x was clamped unless clamp is "pass"."""
    if clamp == "pass" or not clamps(fmt):
        return grad
    answer: Tensor = torch.ops.lowp.fake_quantize_grad(grad, x, str(fmt))
    return answer


def fake_quantize_given(
    x: Tensor, fmt: Format, scale: Tensor, zero_point: Tensor | None = None, *, clamp: str = "zero"
) -> Tensor:
    """As `fake_quantize`, with a scale that is learned.

    Args:
        scale, zero_point: float, `fmt.scale_shape(x.shape)` or broadcast to it; rounded as they are stored, straight through.

    Returns:
        Bit for bit `dequantize(quantize_given(x, fmt, scale, zero_point), fmt, x.dtype)`, with gradients for x, scale and
        zero_point.

    Raises:
        MisfitError: blocks that do not divide the shape, scales of another shape.
    """
    check_clamp(clamp)
    shape = fmt.scale_shape(tuple(x.shape))
    zero_point = None if zero_point is None else zero_point.expand(shape)
    y: Tensor = torch.ops.lowp.fake_quantize_given(x, str(fmt), scale.expand(shape), zero_point, clamp)
    return y


def check_clamp(clamp: str) -> None:
    """A SpellingError unless it is one of `CLAMPS`."""
    if clamp not in CLAMPS:
        raise SpellingError.of("clamp", clamp, CLAMPS)


# -- the references ---------------------------------------------------------------------------------------------------


def reference(x: Tensor, fmt: Format) -> Tensor:
    """The meaning of fake_quantize."""
    return dequantize(quantize(x, fmt), fmt, x.dtype)


def grad_reference(grad: Tensor, x: Tensor, fmt: Format) -> Tensor:
    """The meaning of its gradient: dL/dx from dL/dy, numbers that were clamped stopped."""
    return torch.where(inside(x, quantize(x, fmt), fmt), grad, 0)


def given_reference(x: Tensor, fmt: Format, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """The meaning of fake_quantize_given."""
    return dequantize(quantize_given(x, fmt, scale, zero_point), fmt, x.dtype)


def given_grad_reference(
    grad: Tensor, x: Tensor, fmt: Format, scale: Tensor, zero_point: Tensor | None, clamp: str
) -> list[Tensor]:
    """The meaning of its gradient: dL/dx, dL/dscale and, where there is one, dL/dzero_point."""
    parts = quantize_given(x, fmt, scale, zero_point)
    rounded = inside(x, parts, fmt)
    block, shape = fmt.block_dims(tuple(x.shape)), fmt.scale_shape(tuple(x.shape))
    kept, per_block = to_blocks(rounded, block), _spread(read_scale(parts, fmt), fmt, x.shape)
    g = to_blocks(grad.to(torch.float32), block)
    steps = to_blocks(fmt.element.decode(parts.qdata), block)
    if parts.zero_point is not None:
        steps = steps - _spread(parts.zero_point.to(torch.float32), fmt, x.shape)
    slope = steps - torch.where(kept, to_blocks(x.to(torch.float32), block) / per_block, 0.0)
    grads = [grad.clone() if clamp == "pass" else torch.where(rounded, grad, 0)]
    grads.append((g * slope).sum(dim=(-3, -1)).reshape(shape).to(scale.dtype))
    if zero_point is not None:
        pushed = torch.where(kept, 0.0, -g * per_block)
        grads.append(pushed.sum(dim=(-3, -1)).reshape(shape).to(zero_point.dtype))
    return grads


# -- operators --------------------------------------------------------------------------------------------------------


def _kernel(op: str, x: Tensor, fmt: Format) -> Callable[..., Any]:
    return pick(case_of_cast(op, x, fmt, None, None)).run


def _run(x: Tensor, fmt: str, clamp: str = "zero") -> Tensor:
    parsed = Format.parse(fmt)
    y = _kernel("fake_quantize", x, parsed)(x, parsed).contiguous()
    return y.clone() if parsed.is_identity else y  # an operator answers no alias


def _merged_run(base: Tensor, b: Tensor, a: Tensor, scaling: float, fmt: str) -> Tensor:
    return _run(merged(base, b, a, scaling), fmt)


def _merged_fake(base: Tensor, b: Tensor, a: Tensor, scaling: float, fmt: str) -> Tensor:
    return b.new_empty(base.shape)


def _grad_run(grad: Tensor, x: Tensor, fmt: str) -> Tensor:
    parsed = Format.parse(fmt)
    return _kernel("fake_quantize_grad", x, parsed)(grad, x, parsed).contiguous()


def _given_run(x: Tensor, fmt: str, scale: Tensor, zero_point: Tensor | None, clamp: str) -> Tensor:
    parsed = Format.parse(fmt)
    return _kernel("fake_quantize_given", x, parsed)(x, parsed, scale, zero_point).contiguous()


def _given_grad_run(
    grad: Tensor, x: Tensor, fmt: str, scale: Tensor, zero_point: Tensor | None, clamp: str
) -> list[Tensor]:
    parsed = Format.parse(fmt)
    answers = _kernel("fake_quantize_given_grad", x, parsed)(grad, x, parsed, scale, zero_point, clamp)
    return [one.contiguous() for one in answers]


def _given_grad_fake(
    grad: Tensor, x: Tensor, fmt: str, scale: Tensor, zero_point: Tensor | None, clamp: str
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (x, scale, zero_point) if t is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, fmt, clamp = inputs
    ctx.fmt = fmt
    if clamp == "zero" and clamps(Format.parse(fmt)):
        ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    saved = ctx.saved_tensors
    return (torch.ops.lowp.fake_quantize_grad(grad, saved[0], ctx.fmt) if saved else grad), None, None


def _given_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.fmt, scale, zero_point, ctx.clamp = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _given_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    answer = torch.ops.lowp.fake_quantize_given_grad(grad, x, ctx.fmt, scale, zero_point, ctx.clamp)
    return answer[0], None, answer[1], answer[2] if len(answer) > 2 else None, None


def _like_first(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


_LIBRARY = torch.library.Library("lowp", "FRAGMENT")


def _define() -> None:
    rows: tuple[tuple[str, str, Callable[..., Any], Callable[..., Any]], ...] = (
        ("fake_quantize", "(Tensor x, str fmt, str clamp) -> Tensor", _run, _like_first),
        ("fake_quantize_again", "(Tensor x, str fmt) -> Tensor", _run, _like_first),
        *(
            (name, "(Tensor base, Tensor b, Tensor a, float scaling, str fmt) -> Tensor", _merged_run, _merged_fake)
            for name in ("fake_quantize_merged", "fake_quantize_merged_again")
        ),
        ("fake_quantize_grad", "(Tensor grad, Tensor x, str fmt) -> Tensor", _grad_run, _like_first),
        (
            "fake_quantize_given",
            "(Tensor x, str fmt, Tensor scale, Tensor? zero_point, str clamp) -> Tensor",
            _given_run,
            _like_first,
        ),
        (
            "fake_quantize_given_grad",
            "(Tensor grad, Tensor x, str fmt, Tensor scale, Tensor? zero_point, str clamp) -> Tensor[]",
            _given_grad_run,
            _given_grad_fake,
        ),
    )
    for name, schema, run, fake in rows:
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lowp::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd("lowp::fake_quantize", _backward, setup_context=_setup, lib=_LIBRARY)
    torch.library.register_autograd(
        "lowp::fake_quantize_given", _given_backward, setup_context=_given_setup, lib=_LIBRARY
    )


_define()
