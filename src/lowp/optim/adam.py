"""Adam and AdamW with states in any format, and under the names that people know.

    AdamW(params, state="dyn8/1x256")        2.03 bytes of state a parameter instead of 8
    AdamW8bit(params)                        the same
    AdamW4bit(params)                        1.06: a signed map for the first moment, an unsigned one without zero for the second
    AdamWFp8(params)                         2.03: e4m3 for both

Adam adds weight decay to the gradient, AdamW shrinks the parameter. The equations stand in `lowp.ops.update`.

Sources: Dettmers et al., arXiv 2110.02861 (8 bits); Li et al., arXiv 2309.01507 (4 bits); Peng et al., arXiv 2310.18313 (float8).
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from ..errors import MisfitError
from ..ops.update import Settings
from .base import LowBitOptimizer
from .state import State

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Adam(LowBitOptimizer):
    """Adam.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as torch.optim.Adam has them; lr may be a tensor.
        state: format of the moments, such as "dyn8/1x256", "e4m3/1x256", "bf16" or "fp32", or a pair for first and second.
        stochastic_rounding: bf16 parameters take each step with the right mean instead of losing the small ones; no fp32 copy.
        seed: of that noise, its low 32 bits. Parameters of one optimizer draw noise of their own; optimizers of one seed draw the
            same, so give each its own seed where there are many.
        foreach, fused: taken for torch's sake. Parameters are always updated together, in one kernel where there is a GPU.

    Raises:
        SpellingError: an unknown format. MisfitError: options out of range.

    >>> layer = torch.nn.Linear(64, 64)
    >>> Adam(layer.parameters(), lr=1e-3, state="dyn8/1x256").explain()[1][2:]
    ('fp32', 'wants at least 4096 elements, got 64')
    """

    rule = "adam"
    decoupled = False

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, amsgrad: bool = False, *, state: State = "dyn8/1x256", maximize: bool = False,
        capturable: bool = False, stochastic_rounding: bool = False, seed: int = 0, foreach: bool | None = None,
        fused: bool | None = None, differentiable: bool = False,
    ) -> None:  # fmt: skip
        in_range("lr", lr, 0, None)
        in_range("eps", eps, 0, None)
        in_range("weight_decay", weight_decay, 0, None)
        check_betas(betas)
        if differentiable:
            raise MisfitError("differentiable=True wants float states that keep their graph: use torch.optim there.")
        defaults = dict(
            lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize,
            capturable=capturable, state=state, stochastic_rounding=stochastic_rounding, seed=seed,
        )  # fmt: skip
        super().__init__(params, defaults)

    def moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return _MOMENTS if group["amsgrad"] else _MOMENTS[:2]

    def settings(self, group: dict[str, Any]) -> Settings:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        return Settings(
            beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"], decoupled=self.decoupled,
            maximize=group["maximize"], amsgrad=group["amsgrad"],
            seed=group["seed"] if group["stochastic_rounding"] else None,
        )  # fmt: skip


class AdamW(Adam):
    """Adam with decoupled weight decay; arguments as `Adam`.

    >>> parameter = torch.nn.Parameter(torch.zeros(64, 256))
    >>> optimizer = AdamW([parameter], state="dyn4/1x128")
    >>> parameter.grad = torch.ones(64, 256)
    >>> optimizer.step()
    >>> optimizer.state[parameter]["exp_avg_sq"].scheme
    'ulin4/1x128'
    """

    decoupled = True

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, amsgrad: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        check_options(self, options)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


def in_range(name: str, value: Any, low: float, below: float | None) -> None:
    """A MisfitError unless low <= value (< below)."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return  # looking would wait for the device
    if not low <= float(value) or (below is not None and not float(value) < below):
        upper = "" if below is None else f" and below {below}"
        raise MisfitError(f"{name} wants a number of at least {low}{upper}, got {value}.")


def check_betas(betas: Any) -> None:
    """A MisfitError unless these are two numbers of [0, 1)."""
    if len(betas) != 2:
        raise MisfitError(f"betas wants two numbers, got {betas!r}.")
    for beta in betas:
        in_range("a beta", beta, 0, 1)


_ELSEWHERE = {  # options of torchao's and bitsandbytes' optimizers
    "bf16_stochastic_round": "say stochastic_rounding=True",
    "optim_bits": "say state='dyn8/1x256', or 'fp32' for 32 bits",
    "min_8bit_size": "states of fewer than 4096 elements are float32; put others that shall be into a group with state='fp32'",
    "is_paged": "use lowp.optim.CPUOffloadOptimizer where states do not fit",
}


def check_options(optimizer: LowBitOptimizer, options: dict[str, Any]) -> None:
    """A TypeError that names the class which was asked for, where there is no such option."""
    spelled = next(kind for kind in type(optimizer).__mro__ if LowBitOptimizer in kind.__bases__)
    known = inspect.signature(spelled.__init__).parameters  # type: ignore[misc]
    for name in options:
        if name not in known:
            known_as = _ELSEWHERE.get(name, f"it has {', '.join(list(known)[2:])}")
            raise TypeError(f"{type(optimizer).__name__} has no option {name}: {known_as}.")


def named(name: str, base: type, element: str, block: int, module: str = __name__) -> type:
    """A subclass of `base` whose states are in `element`, with blocks of `block` unless block_size says otherwise."""

    def __init__(self: Any, params: Any, *args: Any, block_size: int | None = None, **options: Any) -> None:
        if block_size is not None and "state" in options:
            raise MisfitError(f"{name} wants block_size or state, which names its block, got both.")
        check_options(self, options)
        base.__init__(self, params, *args, **{"state": f"{element}/1x{block_size or block}", **options})

    doc = f"`{base.__name__}` with states in {element}/1x{block}. block_size: elements that share a scale."
    return type(name, (base,), {"__init__": __init__, "__doc__": doc, "__module__": module, "__qualname__": name})


Adam8bit = named("Adam8bit", Adam, "dyn8", 256)
Adam4bit = named("Adam4bit", Adam, "dyn4", 128)
AdamFp8 = named("AdamFp8", Adam, "e4m3", 256)
AdamW8bit = named("AdamW8bit", AdamW, "dyn8", 256)
AdamW4bit = named("AdamW4bit", AdamW, "dyn4", 128)
AdamWFp8 = named("AdamWFp8", AdamW, "e4m3", 256)
