"""torchao.float8: training in float8 by torchao's names, over `lowp.train`.

    convert_to_float8_training(module, config=...)      a configuration becomes a Recipe, and `convert` does the rest
    Float8Linear                                        the layer that comes out: a `lowp.train.Linear` with its configuration
    precompute_float8_dynamic_scale_for_fsdp(model)     one all-reduce for the scales of all weights

A cast of a configuration is a format: tensorwise is "e4m3/tensor", axiswise is "e4m3/row", a gradient by tensor is e5m2, a
disabled cast is a float, and scales rounded to powers of two are "*e8m0". torchao's scales multiply (x * scale is stored), ours
divide.

Layers that no tensor core takes (rows or columns that 16 does not divide) stay in floats; torchao fails in their first forward.
`emulate`, `pad_inner_dim` and `use_fast_accum` are read and kept: what a device lacks is emulated, the product forward sums fast.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..errors import MisfitError
from ..numerics import ELEMENTS
from ..train import Linear, Recipe, gather_codes, precompute_scales
from ..train.convert import misfit, too_small
from ..train.parallel import ColwiseParallel, RowwiseParallel
from ..train.recipes import RECIPES
from ..train.sharded import ShardedWeight
from .words import PerRow, PerTensor

_NAMES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
WeightWithDynamicFloat8CastTensor = ShardedWeight
FP8Granularity = Union[PerTensor, PerRow]  # noqa: UP007 -- a value at run time


class ScalingType(enum.Enum):
    """Whether an operand is cast, by a scale from its own numbers, or left as it is."""

    DYNAMIC = "dynamic"
    DISABLED = "disabled"

    def short_str(self) -> str:
        """Three letters."""
        return "dyn" if self is ScalingType.DYNAMIC else "dis"


class ScalingGranularity(enum.Enum):
    """How many numbers share a scale: the tensor, or those that a product sums."""

    TENSORWISE = "tensorwise"
    AXISWISE = "axiswise"

    def short_str(self) -> str:
        """Three letters."""
        return "ten" if self is ScalingGranularity.TENSORWISE else "axs"


class Float8LinearRecipeName(str, enum.Enum):
    """torchao's recipes: rows of `lowp.train.RECIPES`, "float8_" before them; ROWWISE_WITH_GW_HP in powers of two."""

    TENSORWISE = "tensorwise"
    ROWWISE = "rowwise"
    ROWWISE_WITH_GW_HP = "rowwise_with_gw_hp"


@dataclass(frozen=True)
class Float8TypeConfig:
    """The two float8 dtypes."""

    e4m3_dtype: torch.dtype = torch.float8_e4m3fn
    e5m2_dtype: torch.dtype = torch.float8_e5m2


@dataclass(frozen=True)
class CastConfig:
    """How one operand is cast."""

    scaling_type: ScalingType = ScalingType.DYNAMIC
    scaling_granularity: ScalingGranularity = ScalingGranularity.TENSORWISE
    target_dtype: torch.dtype | None = None

    def short_str(self) -> str:
        """What a layer's repr shows."""
        dtype = "" if self.target_dtype is None else f"_{_NAMES[self.target_dtype]}"
        return f"{self.scaling_type.short_str()}_{self.scaling_granularity.short_str()}{dtype}"


@dataclass(frozen=True)
class Float8GemmConfig:
    """How one product sums."""

    use_fast_accum: bool = False


@dataclass(frozen=True)
class Float8LinearConfig:
    """How a linear layer trains; None for an operand of a gradient's product: as in the other product that it is in."""

    cast_config_input: CastConfig = CastConfig()
    cast_config_input_for_grad_weight: CastConfig | None = None
    cast_config_weight: CastConfig = CastConfig()
    cast_config_weight_for_grad_input: CastConfig | None = None
    cast_config_grad_output: CastConfig = CastConfig()
    cast_config_grad_output_for_grad_weight: CastConfig | None = None
    gemm_config_output: Float8GemmConfig = Float8GemmConfig(use_fast_accum=True)
    gemm_config_grad_input: Float8GemmConfig = Float8GemmConfig()
    gemm_config_grad_weight: Float8GemmConfig = Float8GemmConfig()
    enable_fsdp_float8_all_gather: bool = False
    pad_inner_dim: bool = False
    emulate: bool = False
    force_recompute_fp8_weight_in_bwd: bool = False
    round_scales_to_power_of_2: bool = False

    def __post_init__(self) -> None:
        x, w, g = self.cast_config_input, self.cast_config_weight, self.cast_config_grad_output
        for name, fallback in (
            ("input_for_grad_weight", x),
            ("weight_for_grad_input", w),
            ("grad_output_for_grad_weight", g),
        ):
            if getattr(self, f"cast_config_{name}") is None:
                object.__setattr__(self, f"cast_config_{name}", fallback)
        for name in ("input", "input_for_grad_weight", "weight", "weight_for_grad_input"):
            self._settle(f"cast_config_{name}", torch.float8_e4m3fn)
        axiswise = g.scaling_granularity is ScalingGranularity.AXISWISE
        for name in ("grad_output", "grad_output_for_grad_weight"):
            self._settle(f"cast_config_{name}", torch.float8_e4m3fn if axiswise else torch.float8_e5m2)
        pairs = (
            ("input", "weight"),
            ("grad_output", "weight_for_grad_input"),
            ("input_for_grad_weight", "grad_output_for_grad_weight"),
        )
        for pair in pairs:
            kinds = {getattr(self, f"cast_config_{name}").scaling_type for name in pair}
            if len(kinds) > 1:
                raise MisfitError(
                    f"Float8LinearConfig wants both operands of a product cast or neither, got {' and '.join(pair)} apart."
                )

    def _settle(self, name: str, dtype: torch.dtype) -> None:
        cast = getattr(self, name)
        if cast.target_dtype is None:
            object.__setattr__(self, name, dataclasses.replace(cast, target_dtype=dtype))
        elif cast.target_dtype not in _NAMES:
            raise MisfitError(f"{name} wants float8_e4m3fn or float8_e5m2, got {cast.target_dtype}.")

    @staticmethod
    def from_recipe_name(recipe_name: Float8LinearRecipeName | str) -> Float8LinearConfig:
        """A configuration by torchao's name of it.

        >>> Float8LinearConfig.from_recipe_name("rowwise").recipe() == RECIPES["float8_rowwise"]
        True
        """
        name = Float8LinearRecipeName(recipe_name)
        if name is Float8LinearRecipeName.TENSORWISE:
            return Float8LinearConfig()
        axis = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE, target_dtype=torch.float8_e4m3fn)
        if name is Float8LinearRecipeName.ROWWISE:
            return Float8LinearConfig(
                cast_config_input=axis,
                cast_config_weight=axis,
                cast_config_grad_output=axis,
                round_scales_to_power_of_2=True,
            )
        off = CastConfig(scaling_type=ScalingType.DISABLED)
        return Float8LinearConfig(
            cast_config_input=axis,
            cast_config_input_for_grad_weight=off,
            cast_config_weight=axis,
            cast_config_weight_for_grad_input=CastConfig(target_dtype=torch.float8_e4m3fn),
            cast_config_grad_output=axis,
            cast_config_grad_output_for_grad_weight=off,
            round_scales_to_power_of_2=True,
        )

    def recipe(self) -> Recipe:
        """The same as a Recipe of `lowp.train`: a row of its table where there is one."""
        made = Recipe(
            name="float8",
            output=self._product("weight", "input"),
            grad_input=self._product("weight_for_grad_input", "grad_output"),
            grad_weight=self._product("input_for_grad_weight", "grad_output_for_grad_weight"),
        )
        same = (
            row
            for row in RECIPES.values()
            if dataclasses.replace(made, name=row.name, least=row.least, about=row.about) == row
        )
        return next(same, made)

    def _product(self, right: str, left: str) -> str:
        formats = [self._format(getattr(self, f"cast_config_{name}")) for name in (right, left)]
        return "" if None in formats else "@".join(map(str, formats))

    def _format(self, cast: CastConfig) -> str | None:
        if cast.scaling_type is ScalingType.DISABLED:
            return None
        block = "row" if cast.scaling_granularity is ScalingGranularity.AXISWISE else "tensor"
        return f"{_NAMES[cast.target_dtype]}/{block}{'*e8m0' if self.round_scales_to_power_of_2 else ''}"  # type: ignore[index]


class Float8Linear(Linear):
    """A linear layer that trains in float8; `config` is torchao's, `recipe` what it means here."""

    config: Float8LinearConfig = Float8LinearConfig()

    def __init__(self, *args: Any, config: Float8LinearConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = config or Float8LinearConfig()
        self.recipe = self.config.recipe()

    @classmethod
    def from_float(cls, mod: nn.Linear, config: Float8LinearConfig | None = None) -> Float8Linear:
        """The layer itself, its class changed: its parameters stay the same objects."""
        if not isinstance(mod, nn.Linear):
            raise MisfitError(f"Float8Linear.from_float wants an nn.Linear, got {type(mod).__name__}.")
        config = config or Float8LinearConfig()
        mod.__class__ = cls
        mod.recipe, mod.config = config.recipe(), config  # type: ignore[assignment]
        return mod  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """The casts of the product forward, and those of the gradients' products that differ."""
        c = self.config
        casts = {"i": c.cast_config_input, "w": c.cast_config_weight, "go": c.cast_config_grad_output}
        backward = {
            "i_gw": c.cast_config_input_for_grad_weight,
            "w_gi": c.cast_config_weight_for_grad_input,
            "go_gw": c.cast_config_grad_output_for_grad_weight,
        }
        casts |= {name: cast for name, cast in backward.items() if cast != casts[name.partition("_")[0]]}
        shown = ",".join(f"{name}:{cast.short_str()}" for name, cast in casts.items())
        return f"{nn.Linear.extra_repr(self)}, cast_configs={shown}"


def convert_to_float8_training(
    module: nn.Module,
    *,
    module_filter_fn: Callable[[nn.Module, str], bool] | None = None,
    config: Float8LinearConfig | None = None,
) -> nn.Module:
    """Train a model's linear layers in float8, in place.

    Args:
        module_filter_fn: (module, name) -> whether a linear layer is converted; all that fit, if absent.
        config: torchao's configuration; tensorwise, if absent.

    Returns:
        The module.

    >>> type(convert_to_float8_training(nn.Linear(32, 32))).__name__
    'Float8Linear'
    """
    config = config or Float8LinearConfig()
    recipe = config.recipe()

    def taken(name: str, layer: nn.Module) -> bool:
        return type(layer) is nn.Linear and (module_filter_fn is None or module_filter_fn(layer, name))

    found = [
        layer
        for name, layer in module.named_modules()
        if taken(name, layer) and not misfit(recipe, *layer.weight.shape)
    ]  # type: ignore[misc]
    for layer in found:
        Float8Linear.from_float(layer, config)  # type: ignore[arg-type]
    if config.enable_fsdp_float8_all_gather:
        gather_codes(module)
    return module


def swap_linear_layers(
    module: nn.Module,
    from_float_func: Callable[[nn.Linear], nn.Linear],
    *,
    module_filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Replace linear layers by what a function makes of them."""
    if isinstance(module, nn.Linear) and (module_filter_fn is None or module_filter_fn(module, "")):
        return from_float_func(module)
    for name, layer in list(module.named_modules()):
        if name and isinstance(layer, nn.Linear) and (module_filter_fn is None or module_filter_fn(layer, name)):
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, from_float_func(layer))
    return module


def _auto_filter_for_recipe(
    recipe: Float8LinearRecipeName | str, filter_fqns: list[str]
) -> Callable[[nn.Module, str], bool]:
    """A filter that leaves out the named layers, those that no tensor core takes, and those too small to gain."""
    chosen = RECIPES[f"float8_{Float8LinearRecipeName(recipe).value}".replace("_with", "")]

    def keep(module: nn.Module, fqn: str) -> bool:
        if not isinstance(module, nn.Linear) or any(part in fqn for part in filter_fqns):
            return False
        rows, columns = module.weight.shape
        return not misfit(chosen, rows, columns) and not too_small(chosen, rows, columns)

    return keep


def precompute_float8_dynamic_scale_for_fsdp(module: nn.Module) -> None:
    """Find the scales of all weights that FSDP2 gathers as codes, in one all-reduce; after optimizer.step()."""
    precompute_scales(module)


class Float8ColwiseParallel(ColwiseParallel):
    """Tensor parallel by output channels; an input that is sharded by tokens is gathered as codes."""

    def __init__(self, *, input_layouts: Any = None, output_layouts: Any = None, use_local_output: bool = True) -> None:
        super().__init__(sequence=_by_tokens(input_layouts))
        self.output_layouts, self.use_local_output = output_layouts, use_local_output

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        return _laid_out(super()._apply(module, device_mesh), self.output_layouts, self.use_local_output)


class Float8RowwiseParallel(RowwiseParallel):
    """Tensor parallel by input channels; an output that is sharded by tokens is scattered, its gradient gathered as codes."""

    def __init__(self, *, input_layouts: Any = None, output_layouts: Any = None, use_local_output: bool = True) -> None:
        if input_layouts not in (None, Shard(-1)):
            raise MisfitError(f"Float8RowwiseParallel wants input_layouts Shard(-1), got {input_layouts}.")
        super().__init__(sequence=_by_tokens(output_layouts))
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        return _laid_out(super()._apply(module, device_mesh), None, self.use_local_output)


def _laid_out(module: nn.Module, layout: Any, local: bool) -> nn.Module:
    """Let a split layer's output lie as asked: another placement, or as a DTensor."""
    split: Any = module.split

    def hook(_module: nn.Module, _inputs: Any, y: Tensor) -> Tensor:
        made = DTensor.from_local(y, split.mesh, [split.gives(y)], run_check=False)
        made = made if layout is None else made.redistribute(placements=[layout])
        return made.to_local() if local else made

    if not local or layout not in (None, Shard(-1)):
        module.register_forward_hook(hook)
    return module


def _by_tokens(layout: Any) -> bool:
    dim = getattr(layout, "dim", None)
    if dim is not None and dim < 0:
        raise MisfitError(f"float8 tensor parallel wants whole inputs and outputs, or shards of tokens, got {layout}.")
    return dim is not None


# -- scales, in torchao's convention -----------------------------------------------------------------------------------------


def tensor_to_amax(
    x: Tensor, reduce_amax: bool = False, device_mesh: Any = None,
    scaling_granularity: ScalingGranularity = ScalingGranularity.TENSORWISE, axiswise_dim: int | None = None,
) -> Tensor:  # fmt: skip
    """The largest magnitude of a tensor, or along an axis (kept); with `reduce_amax` of all ranks."""
    if scaling_granularity is ScalingGranularity.AXISWISE:
        return x.abs().amax(dim=axiswise_dim, keepdim=True)
    amax = x.abs().amax()
    if reduce_amax and torch.distributed.is_initialized():
        group = device_mesh.get_group() if device_mesh is not None else None
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group)
    return amax


@torch.no_grad()
def amax_to_scale(amax: Tensor, float8_dtype: torch.dtype, round_scales_to_power_of_2: bool = False) -> Tensor:
    """What a tensor is multiplied by before it is cast, float32: largest / amax, the power of two below it if asked for.

    >>> amax_to_scale(torch.tensor(7.0), torch.float8_e4m3fn).item()
    64.0
    """
    largest = ELEMENTS[_NAMES[float8_dtype]].max
    scale = largest / amax.to(torch.float64).clamp(min=1e-12)
    if round_scales_to_power_of_2:  # of the float64: rounded to float32 first, it could be the power above
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    return scale.to(torch.float32)


@torch.no_grad()
def tensor_to_scale(
    hp_tensor: Tensor, float8_dtype: torch.dtype, reduce_amax: bool = False, device_mesh: Any = None,
    scaling_granularity: ScalingGranularity = ScalingGranularity.TENSORWISE, axiswise_dim: int | None = None,
    round_scales_to_power_of_2: bool = False,
) -> Tensor:  # fmt: skip
    """`amax_to_scale` of a tensor."""
    amax = tensor_to_amax(hp_tensor, reduce_amax, device_mesh, scaling_granularity, axiswise_dim)
    return amax_to_scale(amax, float8_dtype, round_scales_to_power_of_2)


def to_fp8_saturated(x: Tensor, float8_dtype: torch.dtype) -> Tensor:
    """Cast; what is beyond the largest value becomes it."""
    largest = torch.finfo(float8_dtype).max
    return x.clamp(-largest, largest).to(float8_dtype)


def is_row_major(stride: tuple[int, int]) -> bool:
    """Whether a matrix with these strides lies row by row."""
    if len(stride) != 2:
        raise MisfitError(f"is_row_major wants the strides of a matrix, got {stride}.")
    return stride[0] > stride[1] and stride[1] == 1
