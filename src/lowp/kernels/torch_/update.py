"""Optimizer steps in torch: on a CPU the reference in pieces that stay in a core's cache; muon's, which is products, anywhere.

    for each 128 Ki elements of a parameter: adam(piece)

A step reads and writes a parameter some twenty times in torch's operators; by pieces only the first and last of these go to
memory. Blocks do not depend on one another, so the bytes are the reference's own.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

from ...ops.registry import Case, Kernel
from ...ops.update import ELEMENTWISE, Step, flat, formats_of, piece, reference, why_not_flat

_PIECE = 1 << 17  # elements: half a MB of float32


def _why_not(case: Case) -> str:
    if case.device != "cpu":
        return f"wants cpu, got {case.device}"
    return next((why for why in map(why_not_flat, formats_of(case.scheme)) if why), "")


def _run(rule: str, step: Step) -> None:
    if step.found_inf is not None and bool(step.found_inf):
        return
    blocks = [1 if fmt.is_identity else int(fmt.block[2:]) for fmt in step.slots[0].formats]
    size = max(1, _PIECE // math.lcm(8, *blocks)) * math.lcm(8, *blocks)
    for slot, grad in zip(step.slots, step.grads, strict=True):
        whole, g = flat(slot), grad.view(-1)
        for start in range(0, g.numel(), size):
            stop = min(start + size, g.numel())
            part = dataclasses.replace(step, slots=[piece(whole, start, stop)], grads=[g[start:stop]], found_inf=None)
            reference(rule, part)


def _how(case: Case) -> str:
    names = dict.fromkeys(fmt.element.name for fmt in formats_of(case.scheme))
    return f"states in {' and '.join(names)} decoded, updated in fp32 and encoded by torch's operators, in pieces of 128 Ki"


def _how_muon(case: Case) -> str:
    return f"momentum in {formats_of(case.scheme)[0].element.name}, torch's operators and bf16 products"


_CASES = ("dyn8/1x256@udyn8/1x256", "dyn4/1x128@ulin4/1x128", "e4m3/1x256", "fp32")

KERNELS = tuple(
    Kernel(
        op=rule, name="pieces", rank=100, layout="", why_not=_why_not, run=partial(_run, rule), how=_how, cases=_CASES,
        about="the definition, by pieces that a core's cache holds",
    )
    for rule in ELEMENTWISE
) + (
    Kernel(
        op="muon", name="products", rank=100, layout="", why_not=lambda case: "", run=partial(reference, "muon"),
        how=_how_muon, cases=_CASES, about="the definition: torch's operators, and its products in bf16",
    ),
)  # fmt: skip
