"""SGD with momentum and Lion: one state, in any format.

    SGD(params, lr, momentum=0.9, state="dyn8/1x256")        Lion(params, lr=1e-4, state="dyn8/1x256")

The equations stand in `lowp.ops.update`. Lion's steps have one size, so its learning rate is a third to a tenth of Adam's and its
weight decay as much larger.

Sources: Sutskever et al., ICML 2013 (momentum); Chen et al., arXiv 2302.06675 (Lion).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import MisfitError
from ..ops.update import Settings
from .adam import check_betas, in_range, named
from .base import LowBitOptimizer
from .state import State


class SGD(LowBitOptimizer):
    """Gradient descent with momentum.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as torch.optim.SGD has them; without momentum there is
            no state, and torch's own is as good.
        state, capturable, stochastic_rounding, seed, foreach, fused: as `lowp.optim.Adam`.

    >>> SGD([torch.nn.Parameter(torch.zeros(8))], lr=0.1, momentum=0.9).rule
    'sgd'
    """

    rule = "sgd"

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0,
        nesterov: bool = False, *, state: State = "dyn8/1x256", maximize: bool = False, capturable: bool = False,
        stochastic_rounding: bool = False, seed: int = 0, foreach: bool | None = None, fused: bool | None = None,
    ) -> None:  # fmt: skip
        in_range("lr", lr, 0, None)
        in_range("weight_decay", weight_decay, 0, None)
        if not momentum > 0:
            raise MisfitError(
                f"lowp.optim.SGD wants momentum > 0, got {momentum}: without a state use torch.optim.SGD."
            )
        if nesterov and dampening:
            raise MisfitError("nesterov wants no dampening, as torch's does.")
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize,
            capturable=capturable, state=state, stochastic_rounding=stochastic_rounding, seed=seed,
        )  # fmt: skip
        super().__init__(params, defaults)

    def moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def settings(self, group: dict[str, Any]) -> Settings:
        return Settings(
            beta1=group["momentum"], dampening=group["dampening"], nesterov=group["nesterov"],
            weight_decay=group["weight_decay"], maximize=group["maximize"],
            seed=group["seed"] if group["stochastic_rounding"] else None,
        )  # fmt: skip


class Lion(LowBitOptimizer):
    """Lion: the sign of an average of gradients.

    Args:
        params, lr, betas, weight_decay: lr of a third to a tenth of Adam's, weight_decay decoupled.
        state, maximize, capturable, stochastic_rounding, seed, foreach, fused: as `lowp.optim.Adam`.

    >>> Lion([torch.nn.Parameter(torch.zeros(8))]).param_groups[0]["betas"]
    (0.9, 0.99)
    """

    rule = "lion"

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0, *,
        state: State = "dyn8/1x256", maximize: bool = False, capturable: bool = False, stochastic_rounding: bool = False,
        seed: int = 0, foreach: bool | None = None, fused: bool | None = None,
    ) -> None:  # fmt: skip
        in_range("lr", lr, 0, None)
        in_range("weight_decay", weight_decay, 0, None)
        check_betas(betas)
        defaults = dict(
            lr=lr, betas=tuple(betas), weight_decay=weight_decay, maximize=maximize, capturable=capturable, state=state,
            stochastic_rounding=stochastic_rounding, seed=seed,
        )  # fmt: skip
        super().__init__(params, defaults)

    def moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def settings(self, group: dict[str, Any]) -> Settings:
        beta1, beta2 = group["betas"]
        return Settings(
            beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], decoupled=True, maximize=group["maximize"],
            seed=group["seed"] if group["stochastic_rounding"] else None,
        )  # fmt: skip


SGD8bit = named("SGD8bit", SGD, "dyn8", 256, __name__)
SGD4bit = named("SGD4bit", SGD, "dyn4", 128, __name__)
Lion8bit = named("Lion8bit", Lion, "dyn8", 256, __name__)
Lion4bit = named("Lion4bit", Lion, "dyn4", 128, __name__)
