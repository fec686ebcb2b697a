"""Monitor: what the formats do to the numbers of a training run, layer by layer and operand by operand.

    amax          the largest magnitude of x, w and g (the gradient of the output), of all microbatches of the step
    underflow     the share of numbers other than zero that their format makes zero
    saturation    the share of codes that are the format's largest

amax of every operand is looked at in each step, one read of it, and stays on the device; what the format does, a cast more,
every so many steps. Nothing waits for the device but `flush`, `check` and `write`.

    monitor = Monitor(model, every=100)
    ... monitor.check(loss) ...          a loss that is NaN: an error that names the layer where numbers first were not finite
    monitor.write("run.json")            or monitor.to_tensorboard("runs/")
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..numerics import Format
from ..ops.cast import cast_both, parts_of
from ..tensor import QTensor
from .linear import Linear
from .moe import is_converted
from .sharded import local_of

_NAMES = ("amax", "underflow", "saturation")


class Monitor:
    """Watches the converted linear layers of a model; of experts it says that they are not watched.

    A model that torch.compile traces is watched too, but not in one graph: fullgraph=True is an error of torch's.

    Args:
        model: converted by `convert`. every: steps between two looks at underflow and saturation; a step ends at `flush`.
        recent: steps whose rows are all kept; of older ones those of a look alone, so that a long run does not fill the memory.

    Attributes:
        history: rows {"step", "layer", "operand", "amax", "underflow", "saturation"}; the last two are None between two looks.

    Example:
        >>> model = nn.Sequential(Linear(32, 32))
        >>> monitor = Monitor(model, every=1)
        >>> model(torch.ones(2, 32)).sum().backward()
        >>> [(row["layer"], row["operand"]) for row in monitor.flush()]
        [('0', 'x'), ('0', 'w'), ('0', 'g')]
    """

    def __init__(self, model: nn.Module, *, every: int = 100, recent: int = 1000) -> None:
        self.every, self.recent, self.step, self.history = every, recent, 0, []  # type: ignore[var-annotated]
        self._now: dict[tuple[str, str], tuple[Tensor, ...]] = {}
        self._hooks = []
        for name, layer in model.named_modules():
            if isinstance(layer, Linear):
                self._hooks += self._watch(name, layer)
        if experts := [name for name, module in model.named_modules() if is_converted(module)]:
            warnings.warn(
                f"Monitor watches linear layers: the products of {len(experts)} modules of experts ({', '.join(experts[:5])}) "
                "are not looked at.",
                stacklevel=2,
            )

    def _watch(self, name: str, layer: Linear) -> list[Any]:
        def forward(layer: nn.Module, args: Any) -> None:
            of = layer.recipe.operands
            self._look(name, "x", args[0], of.x_row)
            if not isinstance(local_of(layer.weight), QTensor):  # gathered codes: their floats are on other ranks
                self._look(name, "w", layer.weight, of.w_row)

        def after(layer: nn.Module, args: Any, y: Tensor) -> None:
            of = layer.recipe.operands
            if y.requires_grad:
                y.register_hook(lambda g: self._look(name, "g", g, of.g_row or of.g_column))

        return [layer.register_forward_pre_hook(forward), layer.register_forward_hook(after)]

    @torch.no_grad()
    def _look(self, name: str, operand: str, t: Tensor | None, fmt: str | None) -> None:
        if t is None or t.numel() == 0:
            return
        t = (t.to_local() if hasattr(t, "to_local") else t).detach()
        found = [t.abs().amax().to(torch.float32)]
        if self.step % self.every == 0 and fmt is not None:
            found += _shares(t.reshape(-1, t.shape[-1]), fmt)
        top, *shares = self._now.get((name, operand), tuple(found))  # of several microbatches: the shares of the first
        self._now[name, operand] = (torch.maximum(top, found[0]), *shares)  # of NaN too

    def flush(self) -> list[dict[str, Any]]:
        """End a step: its rows, which go to `history`. It waits for the device."""
        kept, self._now = self._now, {}
        values = torch.stack([t.cpu() for found in kept.values() for t in found]).tolist() if kept else []
        rows, at = [], 0
        for (name, operand), found in kept.items():
            numbers = values[at : at + len(found)] + [None] * (3 - len(found))
            at += len(found)
            rows.append(
                {"step": self.step, "layer": name, "operand": operand, **dict(zip(_NAMES, numbers, strict=True))}
            )
        self.history += rows
        if self.step % self.every == 0:
            oldest = self.step - self.recent
            self.history = [row for row in self.history if row["step"] > oldest or row["step"] % self.every == 0]
        self.step += 1
        return rows

    def check(self, loss: Tensor | float) -> None:
        """End a step, and look at its loss.

        Raises:
            TrainingError: it is NaN or infinite.
        """
        value, rows = float(loss.detach() if isinstance(loss, Tensor) else loss), self.flush()
        if math.isfinite(value):
            return
        lost = next((row for row in rows if not math.isfinite(row["amax"])), None)
        if lost is None:
            raise TrainingError(
                f"the loss of step {self.step - 1} is {value}, and every operand of the {len({r['layer'] for r in rows})} "
                "watched layers was finite: look at what follows the last of them (the loss itself, a norm, a softmax)."
            )
        before = [
            r for r in self.history[: -len(rows)] if (r["layer"], r["operand"]) == (lost["layer"], lost["operand"])
        ]
        was = f", {before[-1]['amax']:.4g} the step before" if before else ""
        what = {"x": "the input", "w": "the weight", "g": "the gradient of the output"}[lost["operand"]]
        raise TrainingError(
            f"the loss of step {self.step - 1} is {value}: first not finite was {what} of layer {lost['layer']!r} "
            f"(amax {lost['amax']}{was}). Lower the learning rate, clip gradients, or keep the layers before it in floats."
        )

    def write(self, path: str | Path) -> None:
        """The history as JSON; what is not finite is written as a string."""
        rows = [
            {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            for row in self.history
        ]
        Path(path).write_text(json.dumps({"every": self.every, "rows": rows}, indent=1), encoding="utf-8")

    def to_tensorboard(self, folder: str | Path) -> None:
        """The history as scalars "layer/operand/what"; it wants the package tensorboard."""
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder)) as writer:
            for row in self.history:
                for name in _NAMES:
                    if row[name] is not None:
                        writer.add_scalar(f"{row['layer']}/{row['operand']}/{name}", row[name], row["step"])

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _shares(t: Tensor, fmt: str) -> list[Tensor]:
    """The shares of numbers that become zero, and that become the largest."""
    parsed = Format.parse(fmt)
    codes = parsed.element.decode(parts_of(cast_both(t, fmt, None), parsed).qdata)
    there = t != 0
    underflow = ((codes == 0) & there).sum() / there.sum().clamp(min=1)
    return [underflow, (codes.abs() >= parsed.element.largest).to(torch.float32).mean()]
