"""transformers' public hooks: `from_pretrained(..., quantization_config=LowpConfig("int4/1x128*bf16"))`.

    LowpConfig     rules as `lowp.quantize_` takes them, and a method
    quantizer      asks for the plan of the empty model, then quantizes each weight as it is read

What `save_pretrained` writes is torchao's form, with `quant_method: torchao` in config.json: transformers with torchao, vLLM, and
transformers with `lowp.torchao` load it. A name of our own there would be worse than useless: where it is not known, transformers
warns and goes on with random weights. A model with a scheme that torchao has no configuration for is saved by `lowp.save`.

transformers is imported when one of these classes is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowpError, MisfitError
from ..ops import Case, best_layout
from ..ops.registry import device_capability
from ..quantize import plan, quantize_weight
from ..tensor import QTensor
from ..torchao.apply import TENSORS
from ..torchao.config import AOBaseConfig, FqnToConfig, config_to_dict, row_of
from ..torchao.config_of import config_of
from ..torchao.flatten import flatten_tensor_state_dict
from ..torchao.spelling import one_spelling

NAME = "lowp"


def torchao_config(schemes: Mapping[str, str | None], dtype: torch.dtype) -> AOBaseConfig:
    """One of torchao's configurations for what was planned, by the weights' names.

    Raises:
        MisfitError: torchao has none for a scheme.
    """
    made = {scheme: config_of(scheme, dtype) for scheme in set(schemes.values()) if scheme is not None}
    lost = sorted(scheme for scheme, config in made.items() if config is None)
    if lost:
        raise MisfitError(
            f"torchao has no configuration for {', '.join(lost)}, so no config.json can say what this model is: "
            "save it with lowp.save, or choose another scheme (docs/torchao.md lists those that have one)."
        )
    found = [config for config in made.values() if config is not None]
    if len(found) == 1 and all(schemes.values()):
        return found[0]
    return FqnToConfig({name: made[scheme] if scheme is not None else None for name, scheme in schemes.items()})


@functools.cache
def classes() -> tuple[type, type]:
    """LowpConfig and its quantizer, registered with transformers."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Quantize(ConversionOps):
        """What happens to a weight that the plan has a scheme for."""

        def __init__(self, quantizer: Any) -> None:
            self.quantizer = quantizer

        def convert(
            self,
            input_dict: dict[str, Any],
            model: nn.Module | None = None,
            full_layer_name: str | None = None,
            missing_keys: Any = None,
            **kwargs: Any,
        ) -> dict[str, Tensor]:
            (value,) = input_dict.values()
            value = value[0] if isinstance(value, list) else value
            self.quantizer.take(model, full_layer_name, value)
            if missing_keys is not None:
                missing_keys.discard(full_layer_name)
            return {}

    @register_quantization_config(NAME)
    class LowpConfig(QuantizationConfigMixin):
        """Quantize while loading, by rules of lowp's.

        Args:
            rules: a scheme ("int4/1x128*bf16"), a preset, or patterns with schemes; a scheme alone leaves the head in floats.
            method: "absmax", "mse" or "hqq".
        """

        def __init__(self, rules: Any = "int4", method: str = "absmax", **kwargs: Any) -> None:
            self.quant_method = NAME
            self.rules, self.method = rules, method
            self.written: AOBaseConfig | None = None

        def to_dict(self) -> dict[str, Any]:
            """What config.json says: torchao's, once the model is quantized."""
            if self.written is None:
                return {"quant_method": NAME, "rules": self.rules, "method": self.method}
            return {
                "quant_method": "torchao",
                "quant_type": {"default": config_to_dict(self.written)},
                "modules_to_not_convert": None,
                "include_input_output_embeddings": True,
                "untie_embedding_weights": False,
            }

        def get_apply_tensor_subclass(self) -> AOBaseConfig | None:
            """What PEFT quantizes a merged weight with."""
            return self.written

    @register_quantizer(NAME)
    class LowpQuantizer(HfQuantizer):
        """Reads the plan of the empty model, and quantizes each weight as it comes."""

        requires_calibration = False

        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            """Nothing but lowp is needed."""

        def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
            given, config = self.quantization_config.rules, self.quantization_config
            kept = self.get_modules_to_not_convert(model, None, getattr(model, "_keep_in_fp32_modules", None))
            rules = given if isinstance(given, Mapping) else {**_kept(model, kept), "*": given}
            rows = plan(model, rules, method=config.method).rows
            self.schemes = {row.fqn: row.scheme for row in rows}
            self.kinds = {row.fqn: row.kind for row in rows}
            try:
                self.why_not = ""
                config.written = torchao_config(self._planned(rows), rows[0].dtype if rows else torch.bfloat16)
            except MisfitError as error:
                self.why_not = str(error)

        def _planned(self, rows: Any) -> dict[str, str | None]:
            linear = {row.fqn: row for row in rows if row.kind == "linear"}
            return {
                name: None if row.scheme is None else one_spelling(row.scheme, row.shape)
                for name, row in linear.items()
            }

        def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
            return self.schemes.get(param_name) is not None

        def get_quantize_ops(self) -> Any:
            return Quantize(self)

        def take(self, model: Any, name: str, value: Tensor) -> None:
            """Quantize one weight and put it in its place."""
            scheme = one_spelling(self.schemes[name], tuple(value.shape))
            q = quantize_weight(value, scheme, method=self.quantization_config.method, name=name, kind=self.kinds[name])
            module_name, _, parameter = name.rpartition(".")
            module = model.get_submodule(module_name)
            setattr(module, parameter, nn.Parameter(_shown(q, scheme), requires_grad=False))
            module._is_hf_initialized = True
            for inner in module.parameters(recurse=False):
                inner._is_hf_initialized = True

        def get_state_dict_and_metadata(self, model: nn.Module) -> Any:
            return flatten_tensor_state_dict(model.state_dict())

        def is_serializable(self) -> bool:
            if self.why_not:
                raise LowpError(self.why_not)
            return True

        @property
        def is_trainable(self) -> bool:
            return True

        @property
        def is_compileable(self) -> bool:
            return True

    return LowpConfig, LowpQuantizer


def _kept(model: nn.Module, names: list[str]) -> dict[str, None]:
    """Rules that keep layers, by those names that a layer has."""
    own = {name for name, _ in model.named_modules()}
    return {name: None for name in names if name in own}


def _shown(q: QTensor, scheme: str) -> Tensor:
    """The weight in its fastest layout, under torchao's class of its scheme where there is one."""
    case = Case(
        op="linear", scheme=q.scheme, device=q.device.type, sm=device_capability(q.device.type, q.device.index),
        dtype=str(q.dtype).removeprefix("torch."), shape=tuple(q.spec.shape),
    )  # fmt: skip
    fast = q.to_layout(best_layout(("linear",), case)[0]) if q.dim() == 2 else q
    config = config_of(scheme, q.dtype)
    row = None if config is None else row_of(config)
    return fast if row is None else TENSORS[row.tensor(config)].of_qtensor(fast)
