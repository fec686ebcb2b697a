"""Muon: matrices move along the rotation nearest to their momentum, all other parameters by AdamW.

    Muon(params, lr=1e-3, state="dyn8/1x256")       momentum of matrices, moments of the others: in any format

The steps of a matrix have all their singular values near 1, whatever those of the gradient are, so that rare directions are
learned as fast as common ones. That is meant for the matrices of hidden layers: embeddings and the output layer, matrices though
they are, go with the vectors to AdamW, in a group of their own:

    Muon([{"params": hidden}, {"params": [embedding, head], "use_muon": False}])

With `adjust_lr_fn="match_rms_adamw"` (Liu et al.) the elements of a step are as large as AdamW's, so one learning rate and one
weight decay serve both; "original" is Jordan's own scale, whose learning rates are ten to a hundred times larger.

The equations stand in `lowp.ops.update`. Sources: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024;
Liu et al., "Muon is scalable for LLM training", arXiv 2502.16982 (scale by shape, weight decay).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import MisfitError
from ..ops.update import Settings
from .adam import check_betas, in_range
from .base import LowBitOptimizer
from .state import State, is_dtensor, is_shard

_SCALES = ("match_rms_adamw", "original", None)  # None: original, as in torch


class Muon(LowBitOptimizer):
    """Muon for matrices, AdamW for the rest.

    Args:
        params: parameters or groups. A group may say `use_muon`; where it does not, its parameters of two or more axes are
            Muon's (axes behind the first count as columns) and the others become a group of their own.
        lr, weight_decay: of both, decoupled. betas, eps: of AdamW.
        momentum, nesterov, ns_steps, adjust_lr_fn: of matrices, as torch.optim.Muon has them.
        state, maximize, capturable, stochastic_rounding, seed, foreach, fused: as `lowp.optim.Adam`; the momentum is kept in the
            format of first moments.

    Raises:
        MisfitError: `use_muon=True` for a parameter without rows and columns, or for a shard of one; options out of range.

    >>> layer = torch.nn.Linear(64, 64)
    >>> [(group["use_muon"], len(group["params"])) for group in Muon(layer.parameters()).param_groups]
    [(True, 1), (False, 1)]
    """

    rule = "muon"

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95, nesterov: bool = True, *,
        ns_steps: int = 5, adjust_lr_fn: str | None = "match_rms_adamw", betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8, state: State = "dyn8/1x256", maximize: bool = False, capturable: bool = False,
        stochastic_rounding: bool = False, seed: int = 0, foreach: bool | None = None, fused: bool | None = None,
    ) -> None:  # fmt: skip
        in_range("lr", lr, 0, None)
        in_range("weight_decay", weight_decay, 0, None)
        in_range("eps", eps, 0, None)
        in_range("momentum", momentum, 0, 1)
        check_betas(betas)
        defaults = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn,
            betas=tuple(betas), eps=eps, maximize=maximize, capturable=capturable, state=state,
            stochastic_rounding=stochastic_rounding, seed=seed,
        )  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time: two of them where it holds matrices and others and does not say `use_muon`."""
        _check_options(self.defaults | param_group)
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        if "use_muon" in param_group:
            parts = {param_group["use_muon"]: given}
        else:
            parts = {which: [one for one in given if (_tensor(one).dim() >= 2) == which] for which in (True, False)}
        for one in parts.get(True, ()):
            _check_matrix(_tensor(one))
        before = len(self.param_groups)
        try:
            for which, members in parts.items():
                if members or not given:
                    super().add_param_group({**param_group, "params": members, "use_muon": which})
                if not given:
                    return
        except Exception:  # all of it or nothing
            del self.param_groups[before:]
            raise

    def rule_of(self, group: dict[str, Any]) -> str:
        return "muon" if group["use_muon"] else "adam"

    def moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["use_muon"] else ("exp_avg", "exp_avg_sq")

    def settings(self, group: dict[str, Any]) -> Settings:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        return Settings(
            beta1=group["momentum"] if group["use_muon"] else beta1, beta2=beta2, eps=group["eps"],
            weight_decay=group["weight_decay"], decoupled=True, maximize=group["maximize"], nesterov=group["nesterov"],
            iterations=group["ns_steps"], by_shape=group["adjust_lr_fn"] or "original",
            seed=group["seed"] if group["stochastic_rounding"] else None,
        )  # fmt: skip


def _tensor(one: Any) -> Tensor:
    """A parameter, given alone or with its name."""
    found: Tensor = one[1] if isinstance(one, tuple) else one
    return found


def _check_options(group: dict[str, Any]) -> None:
    """A MisfitError for options that are a matrix's alone."""
    if group["adjust_lr_fn"] not in _SCALES:
        raise MisfitError(f"adjust_lr_fn wants one of {', '.join(map(str, _SCALES))}, got {group['adjust_lr_fn']!r}.")
    if not isinstance(group["ns_steps"], int) or group["ns_steps"] < 1:
        raise MisfitError(f"ns_steps wants a whole number from 1 on, got {group['ns_steps']!r}.")


def _check_matrix(param: Tensor) -> None:
    if param.dim() < 2:
        raise MisfitError(
            f"Muon wants matrices, got a parameter {tuple(param.shape)}: put it into a group with use_muon=False."
        )
    if is_dtensor(param) and any(map(is_shard, param.placements)):  # type: ignore[attr-defined]
        raise MisfitError(
            f"Muon turns whole matrices, got a shard of {tuple(param.shape)}: replicate it, or put it into a group with "
            "use_muon=False."
        )
