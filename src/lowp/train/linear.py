"""The linear layer in low precision: one function of autograd's, three products, a format for each operand of each.

    forward     y  = x w^T        x cast by row (along K) and by column (along M) in one go, w by row
    backward    dx = g w          g cast by row (along N) and by column (along M) in one go, w by column
                dw = g^T x        both operands are there

What is kept from forward to backward is the column form of x, in 8 bits, where it is quantized at all: half the bytes of bf16.
The weight is not kept twice: backward casts it anew from the parameter, unless `cached_weights` holds both forms for the
microbatches of a step, FSDP gathered its codes (a QTensor; see `sharded.py`), or a graph compiled for one process keeps them
from forward: that reads the weight once less, and a partitioner would do so anyway, for codes are smaller than the weight.

The parameter stays what it was: a plain tensor, in its own dtype, for the optimizer and the state_dict alike.

Legend: M tokens, N output channels, K input channels.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import MisfitError
from ..layouts import layout_of
from ..ops.cast import cast_both, cast_turned
from ..ops.operator import plain
from ..ops.product import product
from ..tensor import QTensor
from .recipes import Operands, Recipe, recipe_of

_FLOATS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    recipe: str | Recipe = "float8_tensorwise",
    *,
    codes: Any = (),
) -> Tensor:
    """A linear layer by a recipe, with gradients.

    Args:
        x: (..., K), any float dtype; under autocast it is cast first, as torch's linear would. weight: (N, K), any float dtype;
            or a QTensor that holds the codes of a weight. bias: (N,) or None.
        recipe: a name of `RECIPES`, or a Recipe. codes: what `weight_codes` made of this weight.

    Returns:
        (..., N), in x's dtype.

    Raises:
        MisfitError: blocks of the recipe that do not divide the shapes.

    >>> linear(torch.ones(2, 32), torch.ones(16, 32)).shape
    torch.Size([2, 16])
    """
    recipe = recipe_of(recipe)
    if x.shape[-1] != weight.shape[-1]:
        raise MisfitError(
            f"linear wants x of (..., {weight.shape[-1]}) for a weight {tuple(weight.shape)}, got {tuple(x.shape)}."
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if isinstance(weight, QTensor) and weight.scheme != recipe.operands.w_row:
        raise MisfitError(
            f"{recipe.name} wants a weight in floats or in {recipe.operands.w_row}, got {weight.scheme}: call "
            "lowp.train.revert(model) before lowp.quantize_, and give tied weights one recipe."
        )
    has = "codes by row" if isinstance(weight, QTensor) else "codes" if codes and recipe.operands.w_column else "floats"
    codes = codes_of(weight) if isinstance(weight, QTensor) else codes
    y = _Linear.apply(x, weight, recipe, recipe.operands, has, torch.is_grad_enabled(), *codes)
    return y if bias is None else y + bias.to(y.dtype)


def codes_of(weight: QTensor) -> tuple[Tensor, ...]:
    """The tensors of a weight's codes, read by attribute: torch.compile follows no method of a tensor that answers Parts."""
    packed = {name: getattr(weight, weight._prefix + name) for name in weight._names}
    if weight.spec.layout == "plain" and packed["qdata"].shape == weight.shape:  # codes of 8 bits lie as they are
        return tuple(packed.values())
    return tuple(layout_of(weight.spec.layout).unpack(packed, weight.spec).tensors().values())


class _Linear(torch.autograd.Function):
    """x (..., K), w_NK -> y (..., N), and both gradients.

    has: what is there of w for backward: its "floats", its "codes" by column after those by row, or "codes by row" alone.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, w_NK: Tensor, recipe: Recipe, of: Operands, has: str, training: bool, *codes: Tensor
    ) -> Tensor:
        x_MK, ctx.shape = x.reshape(-1, x.shape[-1]), x.shape
        ctx.recipe, ctx.of, ctx.has, ctx.w_dtype = recipe, of, has, w_NK.dtype
        keep_x, keep_w = training and ctx.needs_input_grad[1], training and ctx.needs_input_grad[0]
        n_x, n_w = of.counts[0], of.counts[2]
        x_parts = _cast_input(x, x_MK, of.x_row, of.x_column if keep_x else None, of.multiple)
        if has == "floats" and keep_w and of.w_column and torch.compiler.is_compiling() and _alone():
            codes, ctx.has = tuple(_cast(w_NK, of.w_row, of.w_column)), "codes"
        w_row = list(codes[:n_w]) if codes else _cast(w_NK, of.w_row, None)
        y_MN = multiply(x_parts[:n_x] or [x_MK], w_row or [w_NK], recipe, "output", x_MK.dtype)
        kept_x = (x_parts[n_x:] or [x_MK]) if keep_x else []
        if ctx.has == "floats":
            kept_w = [w_NK, *w_row[1:2]] if of.reuses_scale else [w_NK]
        else:
            kept_w = w_row if ctx.has == "codes by row" else list(codes[n_w:])
        ctx.n_x = len(kept_x)
        ctx.save_for_backward(*kept_x, *(kept_w if keep_w else ()))
        # As torch's linear: no view, so that FSDP's hooks and operations in place see a tensor of its own.
        return torch.ops.aten._unsafe_view.default(y_MN, [*x.shape[:-1], y_MN.shape[1]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        recipe, of, g_MN = ctx.recipe, ctx.of, g.reshape(-1, g.shape[-1])
        need_x, need_w = ctx.needs_input_grad[:2]
        kept = list(ctx.saved_tensors)  # read once: checkpointing answers no second time
        kept_x, kept_w = kept[: ctx.n_x], kept[ctx.n_x :]
        g_row, g_column = of.g_row if need_x else None, of.g_column if need_w else None
        g_parts = _cast(g_MN, g_row, g_column, of.multiple, recipe.stochastic)
        n_g = of.counts[4] if g_row else 0
        dx = dw = None
        if need_x:
            w_column = _by_column(kept_w, of, ctx.has, g_MN)
            dx = multiply(g_parts[:n_g] or [g_MN], w_column, recipe, "grad_input", g_MN.dtype).view(ctx.shape)
        if need_w:
            g_T = g_parts[n_g:] or [filled(g_MN, of).t()]
            x_T = kept_x if of.x_column else [filled(kept_x[0], of).t()]
            dw = multiply(g_T, x_T, recipe, "grad_weight", g_MN.dtype).to(ctx.w_dtype)
        return (dx, dw, None, None, None, None, *(None for _ in ctx.needs_input_grad[6:]))


def _alone() -> bool:
    """Whether no other process trains this model: where FSDP shards it, codes kept from forward would be a second whole model."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def _by_column(kept: list[Tensor], of: Operands, has: str, g: Tensor) -> list[Tensor]:
    """The column form of the weight: kept, turned from the codes by row, or cast from the parameter."""
    if has == "codes by row":
        return cast_turned(kept, of.w_row or "", of.w_column or "", g.dtype)
    if has == "codes":
        return kept
    if of.w_column is None:
        return [kept[0].t()]
    return _cast(kept[0], None, of.w_column, act_scale=kept[1] if len(kept) > 1 else None, after=g)


def _cast(
    x: Tensor, rows: str | None, columns: str | None, multiple: int = 1, stochastic: bool = False,
    act_scale: Tensor | None = None, after: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    if rows is None and columns is None:
        return []
    more: dict[str, Any] = dict(act_scale=act_scale, multiple=multiple, stochastic=stochastic, after=after)
    return cast_both(x.detach(), rows, columns, **more)


class _Last(threading.local):
    """The input that was cast last, weakly, what its codes are good for, and they: q, k and v read one x, so do gate and up.

    One tuple, replaced and never changed: x may go in another thread, which autograd's are."""

    held: tuple[weakref.ref[Tensor], Any, list[Tensor]] | None = None


_LAST = _Last()


def _cast_input(x: Tensor, x_MK: Tensor, rows: str | None, columns: str | None, multiple: int) -> list[Tensor]:
    """The cast of an input, once for layers that read the same tensor one after another (a compiled graph finds them itself).

    The codes go when x goes, or when another input is cast. Only tensors that a differentiable operation just made: what a user
    fills anew between steps is never taken for the same. Writes to `x.data`, which autograd does not see, are not seen here."""
    if not plain(x) or x.grad_fn is None or (rows is None and columns is None):
        return _cast(x_MK, rows, columns, multiple)
    # another stream would have to wait for the codes, as it did for x; a graph that is captured has a stream of its own
    stream = torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0
    key = (x._version, x.data_ptr(), stream, rows, columns, multiple)
    held = _LAST.held
    if held is not None and held[0]() is x and held[1] == key:
        return held[2]
    del held
    _LAST.held = None  # before the new codes take their room
    parts, last = _cast(x_MK, rows, columns, multiple), _LAST.__dict__

    def gone(ref: weakref.ref[Tensor]) -> None:
        now = last.get("held")
        if now is not None and now[0] is ref:
            last["held"] = None

    _LAST.held = weakref.ref(x, gone), key, parts
    return parts


def filled(x_MK: Tensor, of: Operands) -> Tensor:
    """Rows of zeros below a float, where the other operand of its product has them."""
    if of.x_column is None and of.g_column is None:
        return x_MK
    return torch.nn.functional.pad(x_MK, (0, 0, 0, -x_MK.shape[0] % of.multiple))


def multiply(a: list[Tensor], b: list[Tensor], recipe: Recipe, name: str, dtype: torch.dtype) -> Tensor:
    """a b^T, as a recipe has its product `name`; operands in floats are themselves."""
    scheme: str = getattr(recipe, name)
    if not scheme:
        return a[0].to(dtype) @ b[0].to(dtype).t()
    whole = scheme if "@" in scheme else f"{scheme}@{_FLOATS.get(dtype, 'fp32')}"
    return product(a, b, whole, dtype, fast=name in recipe.fast)


# -- the module ---------------------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """nn.Linear whose three products run by a recipe: what `convert` turns a layer into.

    Its parameters are those of nn.Linear, under their names.
    """

    recipe: Recipe = recipe_of("float8_tensorwise")
    codes: tuple[Tensor, ...] = ()  # of the weight, inside of `cached_weights`
    split: Any = None  # over which ranks, where a style of `parallel.py` split it

    def forward(self, input: Tensor) -> Tensor:
        """input (..., K) -> (..., N), in its dtype."""
        if self.split is not None:
            from .parallel import split_linear

            return split_linear(input, self.weight, self.bias, self.recipe, self.split)
        return linear(input, self.weight, self.bias, self.recipe, codes=self.codes)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy and a pickle take: not the codes of `cached_weights`, which nobody would take from them again."""
        return {name: value for name, value in self.__dict__.items() if name != "codes"}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}"


def weight_codes(weight: Tensor, recipe: str | Recipe) -> tuple[Tensor, ...]:
    """Both forms of a weight, as `linear` takes them."""
    of = recipe_of(recipe).operands
    return tuple(_cast(weight.detach(), of.w_row, of.w_column))


@contextlib.contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Inside, every weight of the model is cast once, for all microbatches of a step; the optimizer steps outside.

    Weights that are sharded or split are left alone, with a warning: a rank has no whole one to cast.

    It costs a byte an element for each form (two for float8), and saves two casts a microbatch.

    Raises:
        MisfitError: on leaving, where a weight was changed inside: the products after that used its old numbers.

    >>> with cached_weights(Linear(32, 32)):
    ...     pass
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, Linear)]
    layers = [(name, m) for name, m in found if type(m.weight) is nn.Parameter]
    if left := [name for name, m in found if type(m.weight) is not nn.Parameter]:
        warnings.warn(
            f"cached_weights wants plain weights, {len(left)} are sharded or split ({', '.join(left[:5])}): they are cast "
            "in each microbatch.",
            stacklevel=3,
        )
    states = [_state(layer.weight) for _, layer in layers]
    try:
        for _, layer in layers:
            layer.codes = weight_codes(layer.weight, layer.recipe)
        yield
    finally:
        for _, layer in layers:
            layer.codes = ()
    stale = [name for (name, layer), before in zip(layers, states, strict=True) if _state(layer.weight) != before]
    if stale:
        raise MisfitError(
            f"cached_weights wants weights that stay as they are inside, {', '.join(stale[:5])} changed: "
            "step the optimizer after the block."
        )


def _state(weight: Tensor) -> tuple[int, int]:
    """Another one, if the numbers were written to or replaced."""
    return weight._version, weight.data_ptr()
