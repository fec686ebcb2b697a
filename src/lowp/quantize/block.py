"""The work on one block of a model: who shares an input, what the inputs are, smoothing, rounding.

Layers that are given the same tensor (query, key and value; gate and up) are one group: one set of statistics, one factor. Groups
are taken in the order in which they run. Once a group is rounded its layers hold what was rounded, so the statistics of the next
group are of what it will see.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MisfitError
from ..numerics import Scheme
from ..numerics.compare import relative_error
from ..numerics.hadamard import rotated
from ..tensor import QTensor
from .activations import Activations
from .blocks import every_tensor, first_tensor
from .calibrate import How, Outcome, Planned, agreed
from .memory import in_use
from .smooth import find_taker, give
from .statistics import Statistics, static_scale
from .watch import Watch
from .weight import check_finite, float_weight, quantize_weight

_BLIND = "padding counts as data, it cannot be told from other tokens here"
_UNSEEN = "no token reached it, or not by a product that calibration sees, so by absmax"


@dataclass
class Group:
    """Layers that are multiplied with the same input.

    Args:
        rows: them, with their plan. before: modules that ran before them in the block, the latest first.
        factor_K: what the input is multiplied by at run time, where no operation before it took the factor over.
        signs_K: what it is rotated by at run time, before that.
        note: for the report. batch: the first that reaches them.
    """

    rows: list[Planned]
    before: list[nn.Module] = field(default_factory=list)
    factor_K: Tensor | None = None
    signs_K: Tensor | None = None
    note: str = ""
    batch: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first layer's matrix, or stack of matrices."""
        return self.rows[0][0].matrix_shape

    @property
    def matrices(self) -> int:
        """How many have statistics of their own."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def nbytes(self) -> int:
        """Of the statistics, and of rounding the largest layer.

        Rounding goes in two steps: H is factored, in three matrices of float64 at most; then codes, values and their errors
        stand beside one another, 44 bytes for each weight.
        """
        columns = self.shape[-1]
        weights = max(columns * target.matrix_shape[-2] for target, _ in self.rows)
        rounding = max(24 * columns**2 + 12 * weights, 4 * columns**2 + 44 * weights)
        return 4 * self.matrices * (columns**2 + 4 * columns) + rounding


class Block:
    """One block, while it is worked on.

    Args:
        module: it, with its weights on the device. rows: its layers that get a scheme. run: what it answers on a batch.
        real: for each batch which tokens (B, T) are no padding, None for all. how: to calibrate.
    """

    def __init__(
        self,
        module: nn.Module,
        rows: Sequence[Planned],
        run: Callable[[int], Any],
        real: Sequence[Tensor | None],
        how: How,
    ) -> None:
        self.module, self.run, self.real, self.how = module, torch.no_grad()(run), real, how
        self.count = len(real)
        self.rows = [(dataclasses.replace(target, weight=_weight_of(target)), row) for target, row in rows]
        self.exact: dict[str, Tensor] = {}  # float32 weights that smoothing has changed, before any rounding
        self.outcomes: dict[str, Outcome] = {}

    @torch.no_grad()
    def quantize(self, hidden: Activations | None) -> dict[str, Outcome]:
        """Quantize the layers; `hidden`, where given, becomes what the block answers.

        Returns:
            An Outcome for each parameter's name. The modules hold stand-ins afterwards.
        """
        if hidden is not None and self.how.propagate == "float":
            self._pass_on(hidden)
        for target, _ in self.rows:
            check_finite(target.weight, target.fqn)
        groups = self._groups()
        if self.how.method.turn is not None:
            for group in groups:
                self._turn(group)
        if self.how.method.smooth is not None:
            for group in groups:
                self._smooth(group)
        for together in [[group] for group in groups] if self.how.sequential else [groups]:
            self._check_memory(together)  # it also gives freed memory back
            for group, statistics in zip(together, self._collect(together), strict=True):
                self._round(group, statistics)
        for target, row in self.rows:
            if target.fqn not in self.outcomes:
                self._round(Group(rows=[(target, row)], note=_UNSEEN), [])
        if hidden is not None and self.how.propagate != "float":
            self._pass_on(hidden)
        if hidden is not None:
            hidden.turn()
        return self.outcomes

    def _pass_on(self, hidden: Activations) -> None:
        for batch in range(self.count):
            hidden.write(batch, first_tensor(self.run(batch)))

    # -- who shares an input ------------------------------------------------------------------------------------------

    def _groups(self) -> list[Group]:
        """The layers by shared input, in the order in which they run. Batches are run until every layer was reached."""
        by_name = {target.fqn: (target, row) for target, row in self.rows}
        found: dict[tuple[Any, ...], Group] = {}
        kept: list[Tensor] = []  # so that no memory is used again while addresses are compared
        ran: list[nn.Module] = []
        seen: set[str] = set()

        def see(name: str, index: int, x: Tensor) -> None:
            if name in seen or not x.numel():
                return
            kept.append(x)
            seen.add(name)
            stack = len(by_name[name][0].matrix_shape) == 3
            group = found.setdefault((name,) if stack else (x.data_ptr(), x.shape, x.stride()), Group(rows=[]))
            group.before, group.batch = group.before or ran[::-1], group.batch if group.rows else batch
            group.rows.append(by_name[name])

        def note(module: nn.Module, args: Any, answer: Any) -> None:
            ran.append(module)

        leaves = [module for module in self.module.modules() if not any(True for _ in module.children())]
        handles = [module.register_forward_hook(note) for module in leaves]
        try:
            for batch in range(self.count):
                ran.clear()
                if len(seen) < len(by_name):
                    with Watch([target for target, _ in self.rows], see):
                        self.run(batch)
        finally:
            for handle in handles:
                handle.remove()
        return self._merged(list(found.values())) if self.how.reduce else list(found.values())

    def _merged(self, own: list[Group]) -> list[Group]:
        """The groups that ranks agree on: each layer in that of the first rank whose data reached it, in the model's order."""
        said = agreed([[target.fqn for target, _ in group.rows] for group in own], self.how)
        by_name = {target.fqn: (target, row) for target, row in self.rows}
        mine = {target.fqn: group for group in own for target, _ in group.rows}
        merged, taken = [], set()
        for names in (names for rank in said for names in rank):
            left = [name for name in names if name not in taken]
            if left:
                taken |= set(left)
                known = mine.get(left[0], Group(rows=[], batch=-1))
                merged.append(dataclasses.replace(known, rows=[by_name[name] for name in left]))
        place = {name: index for index, name in enumerate(by_name)}
        return sorted(merged, key=lambda group: place[group.rows[0][0].fqn])

    # -- statistics ---------------------------------------------------------------------------------------------------

    def _check_memory(self, groups: Sequence[Group]) -> None:
        limit = self.how.limit
        if limit is None or not groups:
            return
        used, wanted = in_use(self.how.device), sum(group.nbytes for group in groups)
        if used + wanted > limit:
            raise MisfitError(
                f"{groups[0].rows[0][0].fqn} {groups[0].shape} wants {wanted / 1e9:.2f} GB to be calibrated beside "
                f"{used / 1e9:.2f} GB in use, got a limit of {limit / 1e9:.2f} GB: raise max_ram or max_vram, "
                "or use smaller batches."
            )

    def _collect(self, groups: Sequence[Group]) -> list[list[Statistics]]:
        """Statistics of the inputs of groups, one for each matrix, over all batches."""
        found: dict[str, tuple[Group, list[Statistics]]] = {}
        for group in groups:
            quantized = any(Scheme.parse(row.scheme or "").act is not None for _, row in group.rows)
            histogram = quantized and self.how.static in ("percentile", "mse")
            empty = [
                Statistics.empty(group.shape[-1], histogram=histogram, device=self.how.device)
                for _ in range(group.matrices)
            ]
            found[group.rows[0][0].fqn] = group, empty

        def see(name: str, index: int, x: Tensor) -> None:
            group, statistics = found[name]
            x = x if group.signs_K is None else rotated(x, group.signs_K)
            statistics[index].update(x if group.factor_K is None else x * group.factor_K.to(x.dtype))

        with Watch([group.rows[0][0] for group in groups], see) as watch:
            for batch, real in enumerate(self.real):
                watch.real = None if real is None else real.to(self.how.device)
                self.run(batch)
        for group in groups:
            if group.rows[0][0].fqn in watch.blind:
                group.note = "; ".join(filter(None, (group.note, _BLIND)))
        if self.how.reduce:
            for _, statistics in found.values():
                for one in statistics:
                    one.reduce()
        return [statistics for _, statistics in found.values()]

    # -- rotating an input at run time --------------------------------------------------------------------------------

    def _turn(self, group: Group) -> None:
        """Where the method asks for it: layers that share an input are rotated as one."""
        turn = self.how.method.turn
        assert turn is not None
        signs = [turn(target.fqn, group.shape[-1]) for target, _ in group.rows]
        if any(one is None for one in signs):
            return
        if len(group.shape) != 2 or any(target.tied or target.kind != "linear" for target, _ in group.rows):
            group.note = "input not rotated: it is tied, or no plain linear layer"
            return
        assert signs[0] is not None
        group.signs_K, group.note = signs[0].to(self.how.device), "input rotated at run time"
        for target, _ in group.rows:
            self.exact[target.fqn] = rotated(self._exact(target), group.signs_K)

    # -- smoothing ----------------------------------------------------------------------------------------------------

    def _smooth(self, group: Group) -> None:
        smooth = self.how.method.smooth
        assert smooth is not None
        if group.signs_K is not None:
            return  # there is nothing left to share: a rotation evens columns out
        if len(group.shape) == 3 or any(target.tied or target.kind != "linear" for target, _ in group.rows):
            group.note = "no factor: it is tied, or no plain linear layer"
            return
        statistics = self._collect([group])[0][0]
        weights = [self._exact(target) for target, _ in group.rows]
        schemes = [Scheme.parse(row.scheme or "") for _, row in group.rows]
        factor_K = smooth(weights, statistics, schemes) if statistics.tokens else None
        if factor_K is None:
            return
        targets = [target for target, _ in group.rows]
        taker = self._taker(group)
        if taker is None:
            factor_K = factor_K.to(targets[0].weight.dtype).to(torch.float32)  # as the product at run time reads it
            group.factor_K, group.note = factor_K, "factor kept as act_pre_scale"
        else:
            takes = {target.fqn: self._exact(target).clone() for target, _ in self.rows if target.module is taker}
            factor_K = give(taker, factor_K)
            group.note = f"factor folded into {self._name_of(taker)}"
            for name, exact in takes.items():  # a layer that is rounded itself: its exact weight takes the factor too
                self.exact[name] = exact * factor_K.unsqueeze(1)
        for target in targets:
            self.exact[target.fqn] = self._exact(target) / factor_K
            if taker is not None:
                target.weight.data.copy_(self.exact[target.fqn])

    def _taker(self, group: Group) -> nn.Module | None:
        """The operation that can take the group's factor over; ranks that work together must find the same."""
        targets = [target for target, _ in group.rows]
        seen: list[Tensor] = []

        def run() -> tuple[Tensor, list[Tensor]]:
            seen.clear()
            with Watch(targets[:1], lambda name, index, x: seen.append(x.clone())):
                answers = every_tensor(self.run(group.batch))
            return seen[0], [answer.clone() for answer in answers]

        found = find_taker(targets, group.before, run) if group.batch >= 0 else None
        names = agreed(None if found is None else self._name_of(found), self.how)
        return found if len(set(names)) == 1 else None

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, found in self.module.named_modules() if found is module)

    def _exact(self, target: Any) -> Tensor:
        return self.exact.get(target.fqn, target.weight.detach().to(torch.float32))

    # -- rounding -----------------------------------------------------------------------------------------------------

    def _round(self, group: Group, statistics: Sequence[Statistics]) -> None:
        for target, row in group.rows:
            weight, note = self._exact(target), group.note
            seen = statistics if sum(one.tokens for one in statistics) else []
            note = note or ("" if seen else _UNSEEN)
            note = "; ".join(filter(None, (note, _coverage(seen))))
            chosen = self.how.method if seen or not self.how.method.wants_data else "absmax"
            quantized, rounded = (
                quantize_weight(weight, row.scheme or "", method=m, name=target.fqn, kind=target.kind, statistics=s)
                for m, s in ((chosen, seen), ("absmax", ()))
            )
            quantized = self._with_activation(_as(quantized, target.weight.dtype), group, row.scheme or "", seen)
            values = quantized.dequantize(torch.float32)
            self.outcomes[target.fqn] = Outcome(
                quantized=quantized,
                error=relative_error(weight, values),
                rounding_error=_output_error(seen, _matrix(weight, target), _matrix(rounded.dequantize(), target)),
                output_error=_output_error(seen, _matrix(weight, target), _matrix(values, target)),
                why=note,
            )
            self.exact.pop(target.fqn, None)
            self._stand_in(target, quantized, values)

    def _with_activation(
        self, quantized: QTensor, group: Group, scheme: str, statistics: Sequence[Statistics]
    ) -> QTensor:
        """The weight with what its activation is multiplied by, and its static scale."""
        act, packed = Scheme.parse(scheme).act, quantized.packed
        if group.signs_K is not None:
            packed = packed | {"act_rotation": group.signs_K.to(torch.int8)}
        if group.factor_K is not None:
            packed = packed | {"act_pre_scale": group.factor_K}
        if self.how.static is not None and act is not None and statistics:
            if len(statistics) > 1:
                raise MisfitError(f"{group.rows[0][0].fqn}: a stack of experts takes no static scale: drop static=.")
            packed = packed | {"act_scale": static_scale(statistics[0], act, self.how.static)}
        return quantized.like(packed)

    def _stand_in(self, target: Any, quantized: QTensor, values: Tensor) -> None:
        """What the block multiplies with from now on: floats where they mean the same, since they are faster."""
        same = quantized.spec.act is None and "act_pre_scale" not in quantized.packed
        if same and "act_rotation" in quantized.packed:
            values = float_weight(quantized)
        tensor = values.to(target.weight.dtype).contiguous() if same else quantized
        parameter = nn.Parameter(tensor, requires_grad=False)
        target.module._parameters[target.fqn.rpartition(".")[2]] = parameter


def _as(quantized: QTensor, dtype: torch.dtype) -> QTensor:
    return quantized.like(quantized.packed, dtype=dtype)


def _weight_of(target: Any) -> Tensor:
    return target.module._parameters[target.fqn.rpartition(".")[2]]  # type: ignore[no-any-return]


def _matrix(weight: Tensor, target: Any) -> Tensor:
    if target.kind == "conv":
        return weight.flatten(1)
    return weight.mT if target.kind == "conv1d" else weight


def _output_error(statistics: Sequence[Statistics], weight: Tensor, values: Tensor) -> float:
    """Of all matrices together: each one's relative error counts by its share of the output's square."""
    if not statistics:
        return math.nan
    pairs = zip(weight, values, strict=True) if weight.dim() == 3 else [(weight, values)]
    squares = [one.output_squares(w, v) for one, (w, v) in zip(statistics, pairs, strict=True)]
    noise, signal = sum(n for n, _ in squares), sum(s for _, s in squares)
    return math.sqrt(noise / signal) if signal > 0 else 0.0


def _coverage(statistics: Sequence[Statistics]) -> str:
    """What a layer lacks, or the experts of a stack: those that no token reached, and those with fewer tokens than columns."""
    if len(statistics) == 1 and 0 < statistics[0].tokens < statistics[0].columns:
        return f"saw {statistics[0].tokens} tokens, fewer than its {statistics[0].columns} columns"
    if len(statistics) < 2:
        return ""
    without = [index for index, one in enumerate(statistics) if not one.tokens]
    few = [index for index, one in enumerate(statistics) if 0 < one.tokens < one.columns]
    said = [f"{len(which)} of {len(statistics)} experts ({_first(which)}) saw {what}"
            for which, what in ((without, "no token, so by absmax"), (few, "fewer tokens than columns")) if which]  # fmt: skip
    return "; ".join(said)


def _first(which: Sequence[int]) -> str:
    return ", ".join(map(str, which[:8])) + (" ..." if len(which) > 8 else "")
