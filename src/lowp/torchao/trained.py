"""torchao's prototypes of training: int8, BitNet, MXFP8 and experts, as configurations that `quantize_` takes and as functions.

    Int8MixedPrecisionTrainingConfig    the recipe "int8" with the products that were asked for, the gradient rounded to nearest
    BitNetTrainingConfig                the recipe "bitnet"
    MXFP8TrainingOpConfig               "mxfp8"; with wgrad_with_hp its grad_weight in floats
    Float8TrainingOpConfig              "float8_rowwise" for experts and layers

A layer becomes a `lowp.train.Linear` and keeps its plain parameter, where torchao wraps the weight in a class of its own.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MisfitError
from ..numerics import Format, quantize
from ..train import RECIPES, Linear, Recipe, grouped_linear, precompute_scales
from ..train import moe as experts
from ..train.convert import misfit
from .apply import HANDLERS
from .config import AOBaseConfig
from .words import KernelPreference, ScaleCalculationMode


def _train(module: nn.Module, recipe: Recipe) -> nn.Module:
    """One module by a recipe: a linear layer, or one that multiplies experts."""
    if isinstance(module, nn.Linear):
        if reason := misfit(recipe, *module.weight.shape):
            raise MisfitError(
                f"a layer {tuple(module.weight.shape)} cannot be trained by {reason} Leave it out with filter_fn."
            )
        module.__class__ = Linear
        module.recipe = recipe  # type: ignore[assignment]
        return module
    if recipe.not_for_experts:
        raise MisfitError(recipe.not_for_experts)
    for inner in module.modules():
        if isinstance(inner, nn.Linear) and not misfit(recipe, *inner.weight.shape):
            _train(inner, recipe)
        elif any(parameter.dim() == 3 for parameter in inner.parameters(recurse=False)):
            experts.adopt(inner, recipe)
    return module


# -- int8 and BitNet ---------------------------------------------------------------------------------------------------------


@dataclass
class Int8MixedPrecisionTrainingConfig(AOBaseConfig):
    """Which products of a layer are int8."""

    output: bool = True
    grad_input: bool = True
    grad_weight: bool = True
    module_swap: bool = False

    def recipe(self) -> Recipe:
        """The same as a Recipe."""
        chosen = {
            name: RECIPES["int8"].output if getattr(self, name) else ""
            for name in ("output", "grad_input", "grad_weight")
        }
        return dataclasses.replace(RECIPES["int8"], stochastic=False, **chosen)


@dataclass
class BitNetTrainingConfig(AOBaseConfig):
    """Ternary weights, int8 activations."""

    def recipe(self) -> Recipe:
        """The same as a Recipe."""
        return RECIPES["bitnet"]


int8_mixed_precision_training = Int8MixedPrecisionTrainingConfig
bitnet_training = BitNetTrainingConfig


def precompute_bitnet_scale_for_fsdp(module: nn.Module) -> None:
    """Find the scales of all ternary weights that FSDP2 gathers as codes, in one all-reduce; after optimizer.step()."""
    precompute_scales(module)


def get_bitnet_scale(x: Tensor) -> Tensor:
    """The mean magnitude of a weight, the scale of its ternary codes.

    >>> get_bitnet_scale(torch.tensor([1.0, -3.0])).item()
    2.0
    """
    return x.abs().mean()


def quantize_bitnet_weight(w: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """Codes -1, 0 and 1 of a weight, int8, for a scale as `get_bitnet_scale` answers it."""
    return (w / scale.clamp(min=eps)).round().clamp(-1, 1).to(torch.int8)


@torch.no_grad()
def quantize_int8_rowwise(
    tensor: Tensor, stochastic_rounding: bool = False, eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """int8 codes and a scale for each row, amax / 127, in the tensor's dtype.

    >>> quantize_int8_rowwise(torch.tensor([[1.0, -2.0]]))[0]
    tensor([[  64, -127]], dtype=torch.int8)
    """
    parts = quantize(tensor, Format.parse("int8/row"), stochastic=stochastic_rounding)
    assert parts.scale is not None
    return parts.qdata, parts.scale.squeeze(-1).clamp(min=eps / 127).to(tensor.dtype)


# -- MXFP8 and experts -------------------------------------------------------------------------------------------------------


class MXFP8TrainingRecipe(enum.Enum):
    """torchao's names of its MXFP8 configurations."""

    MXFP8_RCEIL = "mxfp8_rceil"
    MXFP8_RCEIL_WGRAD_WITH_HP = "mxfp8_rceil_wgrad_with_hp"
    MXFP8_EMULATED_RCEIL = "mxfp8_emulated_rceil"


class Float8TrainingRecipe(enum.Enum):
    """torchao's names of its float8 configurations for experts."""

    FP8_ROWWISE = "fp8_rowwise"


@dataclass
class TrainingOpBaseConfig(AOBaseConfig):
    """The base of the configurations of experts and layers."""


@dataclass
class MXFP8TrainingOpConfig(TrainingOpBaseConfig):
    """MXFP8 for experts and layers."""

    kernel_preference: KernelPreference = KernelPreference.AUTO
    out_dtype: torch.dtype | None = torch.bfloat16
    wgrad_with_hp: bool = False
    scale_calculation_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL
    pad_token_groups_for_grouped_mm: bool = False

    @classmethod
    def from_recipe(cls, recipe: MXFP8TrainingRecipe) -> MXFP8TrainingOpConfig:
        """A configuration by torchao's name of it."""
        return cls(wgrad_with_hp=MXFP8TrainingRecipe(recipe) is MXFP8TrainingRecipe.MXFP8_RCEIL_WGRAD_WITH_HP)

    def recipe(self) -> Recipe:
        """The same as a Recipe."""
        recipe = RECIPES["mxfp8"]
        mode = ScaleCalculationMode(self.scale_calculation_mode).value
        if mode != "rceil":
            products = {
                name: _with_rule(getattr(recipe, name), mode) for name in ("output", "grad_input", "grad_weight")
            }
            recipe = dataclasses.replace(recipe, **products)
        return dataclasses.replace(recipe, grad_weight="") if self.wgrad_with_hp else recipe


@dataclass
class Float8TrainingOpConfig(TrainingOpBaseConfig):
    """float8 for experts (by row) and layers.

    Args:
        out_dtype: of a grouped product called by its name; layers answer in the dtype of what they are given.
    """

    float8_dtype: torch.dtype = torch.float8_e4m3fn
    out_dtype: torch.dtype | None = torch.bfloat16
    pad_token_groups_for_grouped_mm: bool = False
    float8_linear_recipe: str = "rowwise"

    @classmethod
    def from_recipe(cls, recipe: Float8TrainingRecipe) -> Float8TrainingOpConfig:
        """A configuration by torchao's name of it."""
        Float8TrainingRecipe(recipe)
        return cls()

    def recipe(self) -> Recipe:
        """The same as a Recipe."""
        if self.float8_dtype != torch.float8_e4m3fn:
            raise MisfitError(
                f"Float8TrainingOpConfig wants float8_dtype torch.float8_e4m3fn, got {self.float8_dtype}."
            )
        if self.float8_linear_recipe not in ("rowwise", "tensorwise"):
            raise MisfitError(
                f"Float8TrainingOpConfig wants float8_linear_recipe 'rowwise' or 'tensorwise', got {self.float8_linear_recipe!r}."
            )
        return RECIPES[f"float8_{self.float8_linear_recipe}"]


class MXFP8Linear(Linear):
    """A linear layer that trains in MXFP8, made as nn.Linear is; others extend it."""

    def __init__(
        self, *args: Any, kernel_preference: KernelPreference = KernelPreference.AUTO,
        scale_calculation_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL, wgrad_with_hp: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.recipe = MXFP8TrainingOpConfig(
            kernel_preference, wgrad_with_hp=wgrad_with_hp, scale_calculation_mode=scale_calculation_mode
        ).recipe()


def _with_rule(scheme: str, rule: str) -> str:
    return "@".join(str(Format.parse(part).with_rule(rule)) for part in scheme.split("@"))


def _to_mxfp8_then_scaled_grouped_mm(A: Tensor, B_t: Tensor, offs: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Tokens (T, K) by expert times (E, K, N), in MXFP8."""
    return _grouped(A, B_t, offs, MXFP8TrainingOpConfig(), kwargs)


def _to_fp8_rowwise_then_scaled_grouped_mm(A: Tensor, B_t: Tensor, offs: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Tokens (T, K) by expert times (E, K, N), in float8 by row."""
    return _grouped(A, B_t, offs, Float8TrainingOpConfig(), kwargs)


def _quantize_then_scaled_grouped_mm(
    A: Tensor, B_t: Tensor, config: TrainingOpBaseConfig, offs: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Tokens (T, K) by expert times (E, K, N), as a configuration says."""
    if bias is not None:
        raise MisfitError(f"a grouped product has no bias here, got {tuple(bias.shape)}: add it to the result.")
    return _grouped(A, B_t, offs, config, {})


def unwrap_weight(wrapper_tensor: Tensor) -> Tensor:
    """The weight itself: nothing wraps it here."""
    return wrapper_tensor


def _grouped(A: Tensor, B_t: Tensor, offs: Tensor | None, config: Any, given: dict[str, Any]) -> Tensor:
    if offs is None:
        raise MisfitError("a grouped product of torchao's wants offs, where each expert's tokens end; got None.")
    fields = {f.name for f in dataclasses.fields(config)}
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if name in fields})
    return grouped_linear(A, B_t.transpose(-2, -1), offs, config.recipe()).to(config.out_dtype or A.dtype)


for _kind in (Int8MixedPrecisionTrainingConfig, BitNetTrainingConfig, TrainingOpBaseConfig):
    HANDLERS[_kind] = lambda module, config: _train(module, config.recipe())
