"""Calibration: quantize a model block by block, each layer with what it sees of the calibration data.

    for each block:                                     its weights on the device, all others where they were
        run it on every batch, and sum up each layer's inputs          statistics
        smooth     inputs times a factor, weights divided by it        (AWQ, SmoothQuant)
        round      method.run(weight, statistics, format)              layers that share an input share its statistics
        run it again: what comes out, quantized, is what the next block sees

What lies outside the blocks (a head) comes last, and runs on the last block's answers. A model without a chain of blocks is one
block. The work on one block is in `block.py`; where weights come from and go to is a `Place`: the model itself (`apply.py`) or
files (`calibrate_files.py`).

Memory: one block's weights, the sums of one group of layers, a batch, and what the method needs for its largest layer. The hidden
states lie in files where they would not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import MisfitError, SpellingError
from ..tensor import QTensor
from .activations import Activations
from .blocks import Batch, Call, Chain, chain_of, mapped, real_tokens, run_model
from .match import PlanRow, Target
from .method import Method
from .statistics import STATIC

Planned = tuple[Target, PlanRow]
Progress = Callable[[str, int, int], None]
PROPAGATE = ("quantized", "float")


@dataclass(frozen=True, kw_only=True)
class How:
    """How to calibrate.

    Args:
        method: which. device: where blocks run and weights are rounded. home: where the model's own inputs belong.
        static: how static scales of activations are chosen (see `statistics.STATIC`); None: activations keep dynamic ones.
        propagate: "quantized": a block sees what the quantized ones before it answer; "float": what the float ones do.
        sequential: layers of a block see what those before them in the block have become, at the price of one more run of the
            block for each group of layers; else all see the float block's numbers.
        limit: bytes that may be in use on the device, None for no limit.
        reduce: sum statistics over the ranks of torch.distributed's default group, each with its part of the data.
        progress: called with a block's name, blocks done and blocks in all.
    """

    method: Method
    device: torch.device
    home: torch.device
    static: str | None = None
    propagate: str = "quantized"
    sequential: bool = True
    limit: int | None = None
    reduce: bool = False
    progress: Progress = lambda name, done, total: None

    def check(self) -> None:
        """A SpellingError for a word that is not known."""
        if self.propagate not in PROPAGATE:
            raise SpellingError.of("propagate", self.propagate, PROPAGATE)
        if self.static is not None and self.static not in STATIC:
            raise SpellingError.of("static scale", self.static, STATIC)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one weight.

    Args:
        quantized: the weight. error: ||W - Q|| / ||W||, of the weight as it was rounded (smoothed, rotated).
        rounding_error, output_error: ||x (W - Q)^T|| / ||x W^T|| by plain rounding and by the method; NaN without data.
        why: what the report should say about it, "" for nothing.
    """

    quantized: QTensor
    error: float
    rounding_error: float
    output_error: float
    why: str


class Place(Protocol):
    """Where the weights of a model come from and go to."""

    @property
    def blocks_done(self) -> int:
        """By an earlier run."""

    def load(self, module: nn.Module) -> None:
        """Give a block, or at last the model, its weights on the device."""

    def finished(self, name: str, module: nn.Module, outcomes: Mapping[str, Outcome], hidden: Activations) -> None:
        """A block ("" for all that is in no block) is done: keep it, and let go of its memory."""


def calibrate(
    model: nn.Module, rows: Sequence[Planned], batches: Sequence[Batch], place: Place, hidden: Activations, how: How
) -> None:
    """Quantize the planned weights of a model; `place` gets them block by block.

    Args:
        model: in eval mode, weights where `place` finds them. rows: of the weights that get a scheme.
        batches: what the model is run on: token ids (B, T), mappings of keyword arguments, or tuples of arguments. Tokens that
            a mapping's `attention_mask` (B, T) leaves out are no data.
        hidden: empty, or what an earlier run has left. how: the rest.

    Raises:
        MisfitError: no data, data that is not finite, or a limit of memory that one layer alone exceeds.
    """
    from .block import Block

    how.check()
    if not all(agreed(len(batches), how)):
        raise MisfitError(f"method {how.method.name!r} wants data, got none: pass data=, batches to run the model on.")
    at_home = [mapped(batch, how.home) for batch in batches]
    chain = chain_of(model, at_home[0], how.device, ready=place.load)
    calls = _calls(chain, at_home, hidden)
    real = [real_tokens(batch) for batch in at_home]
    total, left = len(chain.names) + 1, list(rows)
    for index, (name, block) in enumerate(zip(chain.names, chain.blocks, strict=True)):
        inside = [row for row in left if row[0].fqn.startswith(f"{name}.")]
        left = [row for row in left if not row[0].fqn.startswith(f"{name}.")]
        if index < place.blocks_done:
            continue
        how.progress(name, index, total)
        place.load(block)

        def run(batch: int, index: int = index, block: nn.Module = block) -> Any:
            return calls[batch][index].to(how.device).answer(block, hidden.read(batch, how.device))

        work = Block(block, inside, run, real, how)
        place.finished(name, block, work.quantize(hidden), hidden)
    how.progress("the rest", len(chain.names), total)
    place.load(model)

    def rest(batch: int) -> Any:
        given = mapped(batches[batch], how.device)
        return chain.finish(given, hidden.read(batch, how.device)) if chain.names else run_model(model, given)

    place.finished("", model, Block(model, left, rest, real, how).quantize(None), hidden)
    how.progress("", total, total)


def agreed(mine: Any, how: How) -> list[Any]:
    """What every rank says, by rank; this process alone where ranks do not work together."""
    if not how.reduce:
        return [mine]
    import torch.distributed as dist

    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return said


def _calls(chain: Chain, batches: Sequence[Batch], hidden: Activations) -> list[list[Call]]:
    """How each batch calls each block; the hidden states before the first block go to `hidden`, unless it has some."""
    found: list[list[Call]] = []
    pool: list[Any] = []
    fill = not len(hidden)
    for batch in batches if chain.names else ():
        before, calls = chain.calls(batch)
        found.append([call.shared(pool) for call in calls])
        if fill:
            hidden.append(before)
    return found
