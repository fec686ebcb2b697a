"""The optimizer below all others: it keeps the books, and leaves the numbers to the ops of floor 2.

    step      parameters with gradients -> batches of one scheme, dtype, device and step count -> ops.adam(batch)
    state     {"step", "exp_avg": QTensor, ...}, made at a parameter's first step, under torch's names
    load      every state is brought into this optimizer's own formats: from torch's, torchao's, bitsandbytes' or our own

Batches are kept as long as parameters and states stay where they are and the group's options stay, so that a step of a thousand
small parameters costs few calls. The parameters of a batch have made equally many steps; their counts are elements of one tensor.
It is on the CPU, unless the device has to count: with `capturable`, with a learning rate on the device, or where a GradScaler may
skip a step that the host must not wait for.

Gradients are read, never changed: with a GradScaler they stay scaled.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LowpError, MisfitError
from ..numerics import Format
from ..ops import kernels_of, update
from .load import converted, loaded
from .state import (
    is_dtensor,
    is_kept_as,
    is_shard,
    like_parameter,
    local,
    packed_of,
    scheme_of,
    shape_of_states,
    zeros,
)

_OWN = (
    "state",
    "stochastic_rounding",
    "seed",
    "capturable",
    "use_muon",
)  # options of a group that a checkpoint does not decide
FLOAT32 = "fp32@fp32"


@dataclass(kw_only=True, eq=False)
class _Batch:
    """Parameters that one call of an op updates, and the counts of their steps, which are equal.

    Args:
        held: each parameter's entry of `state` and the tensors in it. counts: (parameters,), float32; an element of it is each
            parameter's "step". version: of its memory after our last write.
        on_device: the numbers of a step are made from the counts where these lie, and the host is not told.
    """

    params: list[Tensor]
    slots: list[update.Slot]
    held: list[tuple[dict[str, Any], tuple[Any, ...]]]
    counts: Tensor
    version: int
    on_device: bool
    grad_dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """The batches of a group, and what they were made from."""

    params: list[Tensor]
    options: tuple[Any, ...]
    batches: list[_Batch]


class LowBitOptimizer(torch.optim.Optimizer):
    """What the optimizers of this room have in common.

    Args:
        params: parameters or groups, as torch's. defaults: the options of a group; "state" is the format of its states.

    Raises:
        SpellingError: an unknown format.
    """

    rule: str
    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf, and does not wait

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._plans: dict[int, _Plan] = {}
        self._captured: list[_Plan] = []  # that graphs replay, as long as this optimizer lives
        kernels_of(self.rule)  # their modules are imported now, not in the first step
        super().__init__(params, defaults)

    # -- what a rule says of itself -----------------------------------------------------------------------------------

    def moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of a group's states, in the order of the op."""
        raise NotImplementedError

    def settings(self, group: dict[str, Any]) -> update.Settings:
        """What the op is told of a group."""
        raise NotImplementedError

    def rule_of(self, group: dict[str, Any]) -> str:
        """The op that steps a group."""
        return self.rule

    def held(self, state: Tensor) -> Tensor:
        """A new state as it is kept: a subclass may show it under another class of tensor."""
        return state

    # -- groups -------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time; its options may differ in everything, the format of its states included."""
        super().add_param_group(param_group)
        try:
            scheme_of(self.param_groups[-1]["state"])  # a wrong spelling is told now
            for param in self.param_groups[-1]["params"]:
                _check_dtype(param)
        except LowpError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._plans, self._captured = {}, getattr(self, "_captured", [])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over states and options.

        Args:
            state_dict: of this class, of torch's optimizer of the same name, of torchao's or bitsandbytes' 8-bit ones. States are
                copied bit for bit where the format is the same, else through float32. The format of the states, noise and
                `capturable` stay those of this optimizer.

        Raises:
            MisfitError: states that do not belong to these parameters; the optimizer stays as it was.
        """
        made: dict[Any, Any] = {}

        def convert(optimizer: Any, found: dict[str, Any]) -> dict[str, Any]:
            saved = found["param_groups"]
            own = [{name: group[name] for name in _OWN if name in group} for group in self.param_groups]
            groups = [self.defaults | old | new for old, new in zip(saved, own, strict=False)]
            groups += saved[len(own) :]  # too many: torch says so
            if [len(group["params"]) for group in saved] == [len(group["params"]) for group in self.param_groups]:
                made.update(self._converted(groups, found["state"]))
            return {**found, "state": {}, "param_groups": groups}

        handles = [
            self.register_load_state_dict_pre_hook(convert),  # the last, so it sees what others made of it
            self.register_load_state_dict_post_hook(lambda _: self.state.update(made), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _converted(self, groups: list[dict[str, Any]], given: dict[Any, Any]) -> dict[Any, Any]:
        """The states of a checkpoint by parameter, those that belong to none under their own keys."""
        numbers = {number for group in groups for number in group["params"]}
        states = {key: held for key, held in given.items() if key not in numbers}
        for group, mine in zip(groups, self.param_groups, strict=True):
            for number, param in zip(group["params"], mine["params"], strict=True):
                if state := self._loaded(param, group, given.get(number) or {}):
                    states[param] = state
        return states

    def _loaded(self, param: Tensor, group: dict[str, Any], held: dict[str, Any]) -> dict[str, Any]:
        shape, formats = self._formats(param, group)
        state = loaded(held, param, self.moments(group), formats, shape, self.held)
        if not state:
            return state
        if "step" not in state and self.rule_of(group) == "adam":
            raise MisfitError(f"a state of {type(self).__name__} wants step, got {', '.join(map(str, held))} alone.")
        count = float(state.get("step", 1))  # torch's SGD keeps none: its buffer is there from the first step on
        device = local(param).device if group["capturable"] else torch.device("cpu")
        return state | {"step": torch.tensor(count, dtype=torch.float32, device=device)}

    def _formats(self, param: Tensor, group: dict[str, Any]) -> tuple[tuple[int, ...], list[Format | None]]:
        """The shape and the format of each state of a parameter; None for float32."""
        scheme = scheme_of(group["state"])
        shape, _ = shape_of_states(param, scheme)
        if shape is None:
            return tuple(local(param).shape), [None] * len(self.moments(group))
        return shape, list(update.formats_of(scheme)[: len(self.moments(group))])

    def explain(self) -> list[tuple[str, tuple[int, ...], str, str]]:
        """For each parameter: name (or number), shape, the format of its states, and why they stay float32 ("" if not)."""
        rows: list[tuple[str, tuple[int, ...], str, str]] = []
        for group in self.param_groups:
            names = group.get("param_names") or [str(len(rows) + i) for i in range(len(group["params"]))]
            scheme = scheme_of(group["state"])
            for name, param in zip(names, group["params"], strict=True):
                shape, why = shape_of_states(param, scheme)
                rows.append((name, tuple(param.shape), "fp32" if shape is None else scheme, why))
        return rows

    # -- a step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. closure: evaluates the model again and returns the loss, as torch's.

        Raises:
            MisfitError: a sparse or complex gradient.
        """
        _health_check(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        first = 0
        for i, group in enumerate(self.param_groups):
            params = [param for param in group["params"] if param.grad is not None]
            on_device = group["capturable"] or found is not None or _is_on_device(group["lr"])
            options = self.moments(group), group["state"], on_device, first
            plan = self._plans.get(i)
            if plan is None or not self._still(plan, params, options):
                plan = self._plans[i] = self._plan(params, group, options)
            if group["capturable"] and _is_capturing():
                self._captured.append(plan)
            settings = self.settings(group)
            for batch in plan.batches:
                self._run(batch, group, settings, scale, found)
            first += len(group["params"])
        return loss

    def _run(
        self,
        batch: _Batch,
        group: dict[str, Any],
        settings: update.Settings,
        scale: Tensor | None,
        found: Tensor | None,
    ) -> None:
        device = batch.slots[0].param.device
        scale, found = (None if x is None else x.to(device) for x in (scale, found))
        numbers = self._numbers(batch, group, settings, found)
        grads = [_gradient(param) for param in batch.params]
        slots = batch.slots
        loose = [i for i, param in enumerate(batch.params) if not local(param).is_contiguous()]
        if loose:
            slots = [_gathered(slot) if i in loose else slot for i, slot in enumerate(slots)]
        op = getattr(update, self.rule_of(group))
        op(update.Step(slots=slots, grads=grads, settings=settings, numbers=numbers, grad_scale=scale, found_inf=found))
        for i in loose:
            batch.slots[i].param.copy_(slots[i].param)
        for param in batch.params:
            torch.autograd.graph.increment_version(param)

    def _numbers(
        self, batch: _Batch, group: dict[str, Any], settings: update.Settings, found: Tensor | None
    ) -> update.Coefficients | Tensor:
        batch.counts += 1
        if batch.on_device:
            numbers: update.Coefficients | Tensor = update.coefficients_on_device(
                self.rule_of(group), settings, group["lr"], batch.counts[0]
            )
            if found is not None:
                batch.counts -= (found != 0).to(batch.counts.dtype)  # torch adds up what several devices found
        else:
            numbers = update.coefficients(self.rule_of(group), settings, float(group["lr"]), int(batch.counts[0]))
        batch.version = batch.counts._version
        return numbers

    # -- batches ------------------------------------------------------------------------------------------------------

    def _still(self, plan: _Plan, params: list[Tensor], options: tuple[Any, ...]) -> bool:
        """Whether a plan holds these very parameters and states, where they were, under the same options."""
        return (
            plan.options == options
            and _same(plan.params, params)
            and all(batch.counts._version == batch.version for batch in plan.batches)
            and all(
                local(param).data_ptr() == slot.param.data_ptr()
                and local(param.grad).dtype == batch.grad_dtype  # type: ignore[arg-type]
                and self.state.get(param) is entry
                and _same(entry.values(), tensors)
                for batch in plan.batches
                for param, slot, (entry, tensors) in zip(batch.params, batch.slots, batch.held, strict=True)
            )
        )

    def _plan(self, params: list[Tensor], group: dict[str, Any], options: tuple[Any, ...]) -> _Plan:
        *_, on_device, first = options
        numbers = {id(param): first + i for i, param in enumerate(group["params"])}
        found: dict[Any, list[tuple[Tensor, update.Slot]]] = {}
        for param in params:
            _check(param)
            self._prepare(param, group)
        for param, count in zip(params, _counts([self.state[param]["step"] for param in params]), strict=True):
            slot = self._slot(param, group, numbers[id(param)])
            key = (slot.scheme, len(slot.shape), slot.param.dtype, slot.param.device, count, local(param.grad).dtype)  # type: ignore[arg-type]
            found.setdefault(key, []).append((param, slot))
        batches = []
        for (_, _, _, device, count, grad_dtype), rows in found.items():
            counts = torch.full((len(rows),), count, dtype=torch.float32, device=device if on_device else "cpu")
            held = []
            for i, (param, _) in enumerate(rows):
                entry = self.state[param]
                entry["step"] = counts[i]
                held.append((entry, tuple(entry.values())))
            members, slots = [param for param, _ in rows], [slot for _, slot in rows]
            batches.append(
                _Batch(
                    params=members, slots=slots, held=held, counts=counts, version=counts._version, on_device=on_device,
                    grad_dtype=grad_dtype,
                )
            )  # fmt: skip
        return _Plan(params=params, options=options, batches=batches)

    def _prepare(self, param: Tensor, group: dict[str, Any]) -> None:
        """Make the states that are missing, and bring the others into the formats of the group."""
        state = self.state[param]
        state.setdefault("step", torch.zeros((), dtype=torch.float32))
        shape, formats = self._formats(param, group)
        for name, fmt in zip(self.moments(group), formats, strict=True):
            if name not in state:
                state[name] = like_parameter(self.held(zeros(param, fmt, shape)), param)
            elif not is_kept_as(state[name], fmt, shape):
                state[name] = like_parameter(self.held(converted(state[name], param, fmt, shape, name)), param)

    def _slot(self, param: Tensor, group: dict[str, Any], number: int) -> update.Slot:
        shape, formats = self._formats(param, group)
        return update.Slot(
            param=local(param).detach(),
            states=tuple(packed_of(self.state[param][name]) for name in self.moments(group)),
            scheme=FLOAT32 if formats[0] is None else scheme_of(group["state"]),
            shape=shape,
            key=number | _shard(param) << 20,
        )

    def state_nbytes(self) -> int:
        """Bytes that all states occupy on this rank, the counts of steps aside."""
        found = (value for state in self.state.values() for name, value in state.items() if name != "step")
        return sum(t.numel() * t.element_size() for value in found for t in packed_of(value).values())


# that a graph is captured with capturable=True alone; before torch 2.13 under its older name
_health_check = (
    getattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", None)
    or torch.optim.Optimizer._cuda_graph_capture_health_check
)


def _same(one: Collection[Any], other: Collection[Any]) -> bool:
    """Whether two collections hold the same objects in the same order."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _counts(steps: list[Tensor]) -> list[float]:
    """The numbers in tensors of one number each; every GPU is waited for once."""
    counts: dict[int, float] = {}
    for device in dict.fromkeys(step.device for step in steps):
        here = [i for i, step in enumerate(steps) if step.device == device]
        counts |= zip(here, torch.stack([steps[i].view(()) for i in here]).tolist(), strict=True)
    return [counts[i] for i in range(len(steps))]


def _gradient(param: Tensor) -> Tensor:
    grad = local(param.grad)  # type: ignore[arg-type]
    return grad if grad.is_contiguous() else grad.contiguous()


def _gathered(slot: update.Slot) -> update.Slot:
    return dataclasses.replace(slot, param=slot.param.contiguous())


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _is_on_device(lr: Any) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def _check_dtype(param: Tensor) -> None:
    if param.dtype == torch.float64:
        raise MisfitError(
            f"a low-bit optimizer computes in float32, got a float64 parameter {tuple(param.shape)}: use torch.optim for it."
        )


def _check(param: Tensor) -> None:
    _check_dtype(param)
    grad = param.grad
    if grad.is_sparse:  # type: ignore[union-attr]
        raise MisfitError(
            f"a low-bit optimizer wants dense gradients, got a sparse one for a parameter {tuple(param.shape)}: "
            "make its layer with sparse=False, or use torch.optim.SparseAdam for it."
        )
    if not grad.is_floating_point():  # type: ignore[union-attr]
        raise MisfitError(
            f"a low-bit optimizer wants floats, got a gradient of {grad.dtype}: step it with torch.optim."
        )  # type: ignore[union-attr]


def _shard(param: Tensor) -> int:
    """The number of this rank's shard, the same for all replicas of it."""
    if not is_dtensor(param):
        return 0
    number = 0
    coordinate: Iterable[int] = param.device_mesh.get_coordinate() or ()
    for placement, size, at in zip(param.placements, param.device_mesh.shape, coordinate, strict=False):
        number = number * size + at if is_shard(placement) else number
    return number
