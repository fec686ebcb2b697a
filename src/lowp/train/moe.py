"""A mixture of experts in low precision: the grouped products of a module run by a recipe, forward and backward.

    y_TN = x_TK w_E^T       dx_TK = g_TN w_E       dw_E = g_T^T x_T        tokens sorted by expert, groups of any size

A module that holds a stack of experts as a parameter of three axes and multiplies it with `torch._grouped_mm` (transformers',
torchtitan's) is converted as a whole: while its forward runs, a mode answers that function. The parameter stays plain, whatever
the forward does with it on the way (a cast, a transpose), gradients flow through that as ever.

Legend: T tokens, E experts, N output channels, K input channels.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from ..errors import MisfitError
from ..ops.cast import cast_both
from ..ops.cast_groups import cast_groups, stack_form
from ..ops.grouped_product import grouped_product
from .recipes import Recipe, recipe_of


def grouped_linear(x_TK: Tensor, weight_ENK: Tensor, offs: Tensor, recipe: str | Recipe = "float8_rowwise") -> Tensor:
    """Each token times its expert's matrix, with gradients.

    Args:
        x_TK: (T, K) sorted by expert. weight_ENK: (E, N, K), any strides. offs: (E,) int32, where each expert's tokens end.
        recipe: one with scales by row or in blocks of a row, such as "float8_rowwise" or "mxfp8".

    Returns:
        (T, N) in x's dtype. Rows from offs[-1] on are undefined, and so are those of x's gradient.

    Raises:
        MisfitError: shapes that do not go together, or a recipe with one scale for the tensor.
    """
    recipe = recipe_of(recipe)
    if recipe.not_for_experts:
        raise MisfitError(recipe.not_for_experts)
    if (
        x_TK.dim() != 2
        or weight_ENK.dim() != 3
        or x_TK.shape[1] != weight_ENK.shape[2]
        or offs.shape != weight_ENK.shape[:1]
    ):
        raise MisfitError(
            f"grouped_linear wants (T, K), (E, N, K) and (E,), got {tuple(x_TK.shape)}, {tuple(weight_ENK.shape)} and "
            f"{tuple(offs.shape)}."
        )
    y_TN: Tensor = _Grouped.apply(x_TK, weight_ENK, offs.to(torch.int32), recipe, torch.is_grad_enabled())
    return y_TN


class _Grouped(torch.autograd.Function):
    """x_TK, w_ENK, offs -> y_TN, and both gradients."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, w_ENK: Tensor, offs: Tensor, recipe: Recipe, training: bool) -> Tensor:  # type: ignore[override]
        of = recipe.operands
        ctx.recipe, ctx.w_dtype = recipe, w_ENK.dtype
        keep = training and ctx.needs_input_grad[1]
        x_row, kept = _cast(x_TK, offs, of.x_row, of.x_column if keep else None, of.counts[0])
        ctx.save_for_backward(offs, w_ENK, *(kept or [x_TK] if keep else ()))
        return grouped_product(x_row, stack_form(w_ENK, str(of.w_row)), offs, recipe.output, x_TK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TN: Tensor) -> Any:  # type: ignore[override]
        recipe, of = ctx.recipe, ctx.recipe.operands
        offs, w_ENK, *kept = ctx.saved_tensors
        dx = dw = None
        need_x, need_w = ctx.needs_input_grad[:2]
        g_row, g_column = _cast(g_TN, offs, of.g_row if need_x else None, of.g_column if need_w else None, of.counts[4])
        if need_x:
            w_EKN = stack_form(w_ENK.mT, str(of.w_column))
            dx = grouped_product(g_row, w_EKN, offs, recipe.grad_input, g_TN.dtype)
            del w_EKN, g_row  # their memory serves the product below
        if need_w and not recipe.grad_weight:
            g_NT, x_TK = g_TN.to(torch.bfloat16).t(), kept[0].to(torch.bfloat16)
            dw = torch._grouped_mm(g_NT.contiguous(), x_TK.contiguous(), offs=offs).to(ctx.w_dtype)
        elif need_w:
            dw = grouped_product(g_column[:-1], kept[:-1], kept[-1], recipe.grad_weight, g_TN.dtype).to(ctx.w_dtype)
        return dx, dw, None, None, None


def _cast(
    x: Tensor, offs: Tensor, rows: str | None, columns: str | None, count: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of both forms, where they are asked for; those of columns with the ends of their groups."""
    if columns is None:
        return cast_both(x.detach(), rows, None) if rows else [], []
    made = cast_groups(x.detach(), offs, rows, columns)
    return (made[:count], made[count:]) if rows else ([], made)


# -- modules ------------------------------------------------------------------------------------------------------------------


class _ByRecipe(TorchFunctionMode):
    """Answers torch's grouped product of tokens and experts."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.seen = recipe, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(func is function for function in _FUNCTIONS):
            call = dict(zip(("x", "w", "offs", "bias", "out_dtype"), args, strict=False)) | {
                {"mat_a": "x", "input": "x", "mat_b": "w", "mat2": "w"}.get(name, name): value
                for name, value in kwargs.items()
            }
            x, w, offs = call.get("x"), call.get("w"), call.get("offs")
            if offs is not None and x.dim() == 2 and w.dim() == 3 and call.get("bias") is None:
                self.seen += 1
                y = grouped_linear(x, w.mT, offs, self.recipe)
                return y if call.get("out_dtype") is None else y.to(call["out_dtype"])
        return func(*args, **kwargs)


_FUNCTIONS = tuple(
    function for function in (torch._grouped_mm, getattr(nn.functional, "grouped_mm", None)) if function is not None
)


class _Experts:
    """In front of a module's own class: its forward under `_ByRecipe`."""

    lowp_recipe: Recipe

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mode = _ByRecipe(self.lowp_recipe)
        with mode:
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
        stacks = sum(p.dim() == 3 for p in self.parameters(recurse=False))  # type: ignore[attr-defined]
        if not torch.compiler.is_compiling() and mode.seen < stacks:
            warnings.warn(
                f"{type(self).__name__} was converted to {self.lowp_recipe.name}, but its forward multiplied {mode.seen} of its "
                f"{stacks} stacks of experts by torch._grouped_mm with offs and without a bias: the others compute in floats. "
                "Give them a rule None.",
                stacklevel=2,
            )
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        return _rebuilt, (type(self).__mro__[2], self.lowp_recipe), *state


@functools.cache
def _class_of(kind: type) -> type:
    return type(kind.__name__, (_Experts, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def unknown(module: nn.Module) -> str:
    """ "" or why a module with a stack of experts cannot be converted."""
    if isinstance(module, _Experts) or type(module).forward is not nn.Module.forward:
        return ""
    return f"{type(module).__name__} has no forward of its own, so who multiplies its experts is not known."


def is_converted(module: nn.Module) -> bool:
    """Whether `adopt` was done."""
    return isinstance(module, _Experts)


def adopt(module: nn.Module, recipe: Recipe) -> None:
    """Let a module's grouped products run by a recipe."""
    # torch.compile asks a mode about the functions of this set alone, and torch's list leaves out the one with an underscore.
    from torch._dynamo.variables.torch import get_overridable_functions

    get_overridable_functions().update(_FUNCTIONS)
    if not is_converted(module):
        module.__class__ = _class_of(type(module))
    module.lowp_recipe = recipe  # type: ignore[assignment]


def _rebuilt(kind: type[nn.Module], recipe: Recipe) -> nn.Module:
    """What a pickle and a copy begin with: an empty module of the user's class, adopted."""
    module = kind.__new__(kind)
    adopt(module, recipe)
    return module


def revert(module: nn.Module) -> None:
    """Undo `adopt`, where it was done."""
    if isinstance(module, _Experts):
        module.__class__ = type(module).__mro__[2]
        module.__dict__.pop("lowp_recipe", None)
