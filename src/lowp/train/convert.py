"""convert: nn.Linear becomes `Linear`, in place, by rules; what stays in floats is in the report with its reason.

A layer keeps its object, parameters, hooks and names: only its class changes, and `revert` changes it back. So an optimizer made
before, a state_dict and a checkpoint fit before and after.

A bare "*" leaves the layers alone whose casts would cost more than their products gain (`too_small`); a rule that names a layer
gets it. A stack of experts, a parameter (E, N, K) or (E, K, N) of a module that multiplies it with torch._grouped_mm, is
converted with its module: see `moe.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import LowpError, MisfitError
from ..numerics import Format
from ..ops.product import case_of_product
from ..ops.registry import pick
from ..quantize.match import Predicate, Rule, Target, matched, table
from . import moe
from .linear import Linear
from .recipes import Recipe, recipe_of
from .sharded import ShardedWeight, local_of


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """What happened to one weight.

    Args:
        fqn, tied, shape: the parameter. recipe: its name, or None where it stayed.
        how: what the device multiplies in the product forward, native or emulated. fallback: only a slow way is there.
        why: the rule and the reason.
    """

    fqn: str
    tied: tuple[str, ...]
    shape: tuple[int, ...]
    recipe: str | None
    how: str
    fallback: bool
    why: str


@dataclass(frozen=True)
class TrainReport:
    """What `convert` did: printable, and a dict for JSON."""

    rows: tuple[TrainRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "rows": [dataclasses.asdict(row) | {"tied": list(row.tied), "shape": list(row.shape)} for row in self.rows]
        }

    def __str__(self) -> str:
        header = ("weight", "shape", "recipe", "how", "why")
        body = [(r.fqn, "x".join(map(str, r.shape)), r.recipe or "-", r.how or "-", r.why) for r in self.rows]
        return table(header, body)


def convert(
    model: nn.Module,
    recipe: str | Recipe = "float8_rowwise",
    *,
    rules: Mapping[str | Predicate, str | Recipe | None] | None = None,
    power_of_two: bool = False,
    keep_small: bool = True,
    on_misfit: str = "skip",
) -> TrainReport:
    """Train a model's linear layers in low precision.

    Args:
        model: any nn.Module, also on the meta device. recipe: a name of `RECIPES`, or a Recipe of your own.
        rules: patterns as for `lowp.quantize_`, with a recipe or its name, or None to keep a layer in floats. The first that
            matches wins; layers that none matches get `recipe`.
        power_of_two: scales are rounded up to powers of two, in every recipe.
        keep_small: leave layers in floats that are too small to gain, unless a rule names them.
        on_misfit: "skip", or "error" for a layer whose shape the recipe's blocks do not divide.

    Returns:
        A report, row by row.

    Raises:
        SpellingError: an unknown recipe, or a rule that matches nothing. MisfitError: with on_misfit="error".

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
    >>> [row.recipe for row in convert(model, "mxfp8", keep_small=False).rows]
    ['mxfp8', None]
    """
    if on_misfit not in ("skip", "error"):
        raise MisfitError(f"on_misfit wants 'skip' or 'error', got {on_misfit!r}.")
    chosen = recipe_of(recipe)
    named: dict[Any, Any] = {**(rules or {})}
    named.setdefault("*", chosen)
    rows = matched(model, named, read=recipe_of)
    plans = [_planned(target, rule, power_of_two, keep_small, on_misfit) for target, rule in rows]
    done = []
    for (target, _), (row, made) in zip(rows, plans, strict=True):
        if made is not None:
            _carry_out(model, target, made)
        if row is not None:
            done.append(row)
    return TrainReport(tuple(done))


def revert(model: nn.Module) -> nn.Module:
    """Every converted layer back to a plain nn.Linear or the class of its experts, in place; returns the model.

    Raises:
        MisfitError: layers that were split or sharded since; nothing is changed.

    >>> type(revert(torch.nn.Sequential(Linear(16, 16)))[0]).__name__
    'Linear'
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    bound = [n for n, m in layers.items() if m.split is not None or isinstance(local_of(m.weight), ShardedWeight)]
    if bound:
        raise MisfitError(
            f"revert wants layers whose weights are whole and plain, got {', '.join(bound[:5])}: call it before gather_codes and "
            "parallelize_module, or load the checkpoint into a model that was not converted."
        )
    for module in model.modules():
        if isinstance(module, Linear):
            module.__class__ = nn.Linear
            for name in ("recipe", "codes", "split", "config"):
                module.__dict__.pop(name, None)
        else:
            moe.revert(module)
    return model


def too_small(recipe: Recipe, rows: int, columns: int) -> bool:
    """Whether a layer's casts cost more than its products gain, by the recipe's measured pairs.

    >>> too_small(recipe_of("float8_rowwise"), 2048, 8192)
    True
    """
    return any(rows <= least_rows and columns <= least_columns for least_rows, least_columns in recipe.least)


def misfit(recipe: Recipe, rows: int, columns: int) -> str:
    """ "" or why a weight (rows, columns) cannot be trained by a recipe: what its products sum must be whole blocks."""
    of = recipe.operands
    for size, what, formats in ((columns, "columns", (of.x_row, of.w_row)), (rows, "rows", (of.g_row, of.w_column))):
        blocks = [Format.parse(fmt).block.partition("x")[2] for fmt in formats if fmt]
        wanted = max([16, *(int(block) for block in blocks if block.isdigit())])
        if size % wanted:
            return f"{recipe.name} wants {what} in multiples of {wanted}, got {size}."
    return ""


def _planned(
    target: Target, rule: Rule | None, power_of_two: bool, keep_small: bool, on_misfit: str
) -> tuple[TrainRow | None, Recipe | None]:
    if rule is None:
        return None, None
    if rule.scheme is None:
        return _row(target, None, f"rule {str(rule)!r} keeps it"), None
    recipe = rule.scheme.power_of_two() if power_of_two else rule.scheme
    rows, columns = target.matrix_shape[-2:]
    reason = (
        _unknown(target)
        or misfit(recipe, rows, columns)
        or (recipe.not_for_experts if target.kind == "experts" else "")
    )
    if reason and on_misfit == "error":
        raise MisfitError(
            f"{target.fqn} cannot be trained by {recipe.name}: {reason} Give it a rule None, or on_misfit='skip'."
        )
    if reason:
        return _row(target, None, f"skipped: {reason}"), None
    if keep_small and rule.pattern == "*" and too_small(recipe, rows, columns):
        return _row(target, None, f"kept: {rows}x{columns} is too small to gain by {recipe.name}"), None
    return _row(target, recipe, f"rule {str(rule)!r}"), recipe


def _unknown(target: Target) -> str:
    """Why a module is not one whose product is known."""
    if target.kind == "experts":
        return moe.unknown(target.module)
    if target.kind != "linear":
        return f"{type(target.module).__name__} is no nn.Linear."
    if isinstance(target.module, nn.Embedding):  # tied to a linear layer
        return ""
    if type(target.module) not in (nn.Linear, Linear):
        return f"{type(target.module).__name__} is a linear layer with a forward of its own."
    return ""


def _row(target: Target, recipe: Recipe | None, why: str) -> TrainRow:
    how, fallback = "", False
    if recipe is not None:
        device = target.weight.device if target.weight.device.type != "meta" else torch.device("cpu")
        rows, columns = target.matrix_shape[-2:]
        try:
            kernel = pick(case := case_of_product(recipe.output, device, torch.bfloat16, rows, columns))
            how, fallback = kernel.how(case) if kernel.how else kernel.name, kernel.fallback
        except LowpError as error:
            how, fallback = str(error), True
    return TrainRow(
        fqn=target.fqn,
        tied=target.tied,
        shape=tuple(target.weight.shape),
        recipe=None if recipe is None else recipe.name,
        how=how,
        fallback=fallback,
        why=why,
    )


def _carry_out(model: nn.Module, target: Target, recipe: Recipe) -> None:
    for fqn in (target.fqn, *target.tied):
        module = model.get_submodule(fqn.rpartition(".")[0])
        if target.kind == "experts":
            moe.adopt(module, recipe)
        elif isinstance(module, nn.Linear):
            module.__class__ = Linear
            module.recipe = recipe
