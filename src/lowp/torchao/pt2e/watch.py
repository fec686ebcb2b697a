"""Observers and fake quantizers of exported graphs: torch's own (torch.ao.quantization), which torchao names again.

`DerivedObserverOrFakeQuantize` is ours: it observes nothing, its scale follows from other observers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization import fake_quantize as _fake
from torch.ao.quantization import observer as _observer

FROM_NODE_KEY, CUSTOM_KEY, NUMERIC_DEBUG_HANDLE_KEY = "from_node", "custom", "numeric_debug_handle"
ObserverBase, FakeQuantizeBase = _observer.ObserverBase, _fake.FakeQuantizeBase
ObserverOrFakeQuantize = ObserverBase | FakeQuantizeBase
ObserverOrFakeQuantizeConstructor = Any
PartialWrapper = _observer._PartialWrapper


def __getattr__(name: str) -> Any:
    for module in (_observer, _fake):
        if name in vars(module):
            return vars(module)[name]
    if name in ("LearnableFakeQuantize", "_LearnableFakeQuantize"):
        from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

        return _LearnableFakeQuantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_watcher(module: Any) -> bool:
    """Whether a module is an observer or a fake quantizer."""
    return isinstance(module, (ObserverBase, FakeQuantizeBase))


class DerivedObserverOrFakeQuantize(ObserverBase):
    """A scale that follows from the observers of other tensors."""

    def __init__(
        self,
        dtype: torch.dtype,
        obs_or_fqs: list[Any],
        derive_qparams_fn: Callable[[list[Any]], tuple[Tensor, Tensor]],
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        ch_axis: int | None = None,
    ) -> None:
        super().__init__(dtype)
        self.obs_or_fqs, self.derive_qparams_fn = obs_or_fqs, derive_qparams_fn
        self.quant_min, self.quant_max, self.qscheme, self.ch_axis = quant_min, quant_max, qscheme, ch_axis

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """What the function answers for the others' observers."""
        return self.derive_qparams_fn(self.obs_or_fqs)
