"""The optimizer below all others: it keeps the books, and leaves the numbers to the ops of floor 2.

    step      parameters with gradients -> batches of one scheme, dtype, device and step count -> ops.adam(batch)
    state     {"step", "exp_avg": QTensor, ...}, made at a parameter's first step, under torch's names
    load      every state is brought into this optimizer's own formats: from torch's, torchao's, bitsandbytes' or our own

Batches are kept as long as parameters and states stay where they are, so that a step of a thousand small parameters costs few
calls. The parameters of a batch share one tensor that counts their steps; it is on the CPU, unless the device has to count: with
`capturable`, with a learning rate on the device, or where a GradScaler may skip a step that the host must not wait for.

Gradients are read, never changed: with a GradScaler they stay scaled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MisfitError
from ..numerics import Format
from ..ops import update
from .load import loaded
from .state import is_dtensor, like_parameter, local, packed_of, scheme_of, shape_of_states, zeros

_OWN = ("state", "stochastic_rounding", "seed", "capturable")  # options of a group that a checkpoint does not decide
FLOAT32 = "fp32@fp32"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """Parameters that one call of an op updates, and the count of their steps."""

    params: list[Tensor]
    slots: list[update.Slot]
    step: Tensor
    grad_dtype: torch.dtype


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
        self._keys: dict[Tensor, int] = {}
        self._plans: dict[int, list[_Batch]] = {}
        super().__init__(params, defaults)

    # -- what a rule says of itself -----------------------------------------------------------------------------------

    def moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of a group's states, in the order of the op."""
        raise NotImplementedError

    def settings(self, group: dict[str, Any]) -> update.Settings:
        """What the op is told of a group."""
        raise NotImplementedError

    def held(self, state: Tensor) -> Tensor:
        """A new state as it is kept: a subclass may show it under another class of tensor."""
        return state

    # -- groups -------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time; its options may differ in everything, the format of its states included."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        scheme_of(group["state"])  # a wrong spelling is told now
        for param in group["params"]:
            self._keys[param] = len(self._keys)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._keys = {param: i for i, param in enumerate(p for group in self.param_groups for p in group["params"])}
        self._plans = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over states and options.

        Args:
            state_dict: of this class, of torch's optimizer of the same name, of torchao's or bitsandbytes' 8-bit ones. States are
                copied bit for bit where the format is the same, else through float32. The format of the states, noise and
                `capturable` stay those of this optimizer.

        Raises:
            MisfitError: states that do not belong to these parameters.
        """
        given: dict[str, Any] = {}

        def take(optimizer: Any, found: dict[str, Any]) -> dict[str, Any]:
            given.update(found)
            own = [{name: group[name] for name in _OWN if name in group} for group in self.param_groups]
            groups = [old | new for old, new in zip(found["param_groups"], own, strict=False)]
            groups += found["param_groups"][len(own) :]  # too many: torch says so
            return {**found, "state": {}, "param_groups": groups}

        handle = self.register_load_state_dict_pre_hook(take)  # the last, so it sees what others made of it
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        steps: dict[tuple[float, torch.device], Tensor] = {}
        for group, saved in zip(self.param_groups, given["param_groups"], strict=True):
            for param, number in zip(group["params"], saved["params"], strict=True):
                held = given["state"].get(number)
                if held:
                    self.state[param] = self._loaded(param, group, held, steps)
        for key, held in given["state"].items():
            if not isinstance(key, int):
                self.state[key] = held
        self._plans = {}

    def _loaded(
        self,
        param: Tensor,
        group: dict[str, Any],
        held: dict[str, Any],
        steps: dict[tuple[float, torch.device], Tensor],
    ) -> dict[str, Any]:
        shape, formats = self._formats(param, group)
        state = loaded(held, param, self.moments(group), formats, shape, self.held)
        count = float(state.get("step", 0))
        device = local(param).device if group["capturable"] else torch.device("cpu")
        if (count, device) not in steps:
            steps[count, device] = torch.tensor(count, dtype=torch.float32, device=device)
        state["step"] = steps[count, device]
        return state

    def _formats(self, param: Tensor, group: dict[str, Any]) -> tuple[tuple[int, ...], list[Format | None]]:
        """The shape and the format of each state of a parameter; None for float32."""
        scheme = scheme_of(group["state"])
        shape, _ = shape_of_states(param, scheme)
        if shape is None:
            return tuple(local(param).shape), [None] * len(self.moments(group))
        return shape, list(update.formats_of(scheme)[: len(self.moments(group))])

    def explain(self) -> list[tuple[str, tuple[int, ...], str, str]]:
        """For each parameter: name (or number), shape, the format of its states, and why they stay float32 ("" if not)."""
        rows = []
        for group in self.param_groups:
            names = group.get("param_names") or [str(self._keys[param]) for param in group["params"]]
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
        for i, group in enumerate(self.param_groups):
            params = [param for param in group["params"] if param.grad is not None]
            batches = self._plans.get(i)
            if batches is None or not _still(batches, params):
                batches = self._plans[i] = self._plan(params, group)
            settings = self.settings(group)
            for batch in batches:
                self._run(batch, group, settings, scale, found)
        return loss

    def _run(
        self,
        batch: _Batch,
        group: dict[str, Any],
        settings: update.Settings,
        scale: Tensor | None,
        found: Tensor | None,
    ) -> None:
        numbers = self._numbers(batch, group, settings, found)
        grads = [_gradient(param) for param in batch.params]
        slots = batch.slots
        loose = [i for i, param in enumerate(batch.params) if not local(param).is_contiguous()]
        if loose:
            slots = [_gathered(slot) if i in loose else slot for i, slot in enumerate(slots)]
        getattr(update, self.rule)(slots, grads, settings, numbers, scale, found)
        for i in loose:
            batch.slots[i].param.copy_(slots[i].param)
        for param in batch.params:
            torch.autograd.graph.increment_version(param)

    def _numbers(
        self, batch: _Batch, group: dict[str, Any], settings: update.Settings, found: Tensor | None
    ) -> update.Coefficients | Tensor:
        lr, step = group["lr"], batch.step
        step += 1
        if step.device.type == "cpu":
            if found is not None and bool(found):
                step -= 1
            return update.coefficients(self.rule, settings, float(lr), max(int(step), 1))
        numbers = update.coefficients_on_device(self.rule, settings, lr, step)
        if found is not None:
            step -= found.to(step.device)
        return numbers

    # -- batches ------------------------------------------------------------------------------------------------------

    def _plan(self, params: list[Tensor], group: dict[str, Any]) -> list[_Batch]:
        on_device = group["capturable"] or getattr(self, "found_inf", None) is not None or _is_on_device(group["lr"])
        found: dict[Any, list[tuple[Tensor, update.Slot]]] = {}
        fresh: dict[torch.device, Tensor] = {}
        moved: dict[int, Tensor] = {}
        for param in params:
            _check(param)
            state, device = self.state[param], local(param).device
            if not state:
                self._make(param, group, state)
                counts = device if on_device else torch.device("cpu")
                state["step"] = fresh.setdefault(counts, torch.zeros((), dtype=torch.float32, device=counts))
            elif on_device and state["step"].device != device:
                state["step"] = moved.setdefault(id(state["step"]), state["step"].to(device))
            slot, grad = self._slot(param, group, state), local(param.grad)
            key = (slot.scheme, len(slot.shape), slot.param.dtype, device, id(state["step"]), grad.dtype)
            found.setdefault(key, []).append((param, slot))
        batches = []
        for key, rows in found.items():
            members, slots = [param for param, _ in rows], [slot for _, slot in rows]
            step = self.state[members[0]]["step"].clone()  # of these alone: others may not step with them
            for param in members:
                self.state[param]["step"] = step
            batches.append(_Batch(params=members, slots=slots, step=step, grad_dtype=key[-1]))
        return batches

    def _make(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        shape, formats = self._formats(param, group)
        for name, fmt in zip(self.moments(group), formats, strict=True):
            state[name] = like_parameter(self.held(zeros(param, fmt, shape)), param)

    def _slot(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> update.Slot:
        shape, formats = self._formats(param, group)
        for name, fmt in zip(self.moments(group), formats, strict=True):
            if name not in state:  # amsgrad that was switched on later
                state[name] = like_parameter(self.held(zeros(param, fmt, shape)), param)
        return update.Slot(
            param=local(param).detach(),
            states=tuple(packed_of(state[name]) for name in self.moments(group)),
            scheme=FLOAT32 if formats[0] is None else scheme_of(group["state"]),
            shape=shape,
            key=self._keys[param] | _shard(param) << 20,
        )

    def state_nbytes(self) -> int:
        """Bytes that all states occupy on this rank, the counts of steps aside."""
        found = (value for state in self.state.values() for name, value in state.items() if name != "step")
        return sum(t.numel() * t.element_size() for value in found for t in packed_of(value).values())


_health_check = getattr(  # that a graph is captured with capturable=True alone; before torch 2.13 under its older name
    torch.optim.Optimizer,
    "_accelerator_graph_capture_health_check",
    torch.optim.Optimizer._cuda_graph_capture_health_check,
)


def _still(batches: list[_Batch], params: list[Tensor]) -> bool:
    """Whether the batches hold these very parameters, where they were."""
    if sum(len(batch.params) for batch in batches) != len(params):
        return False
    known = {id(param) for batch in batches for param in batch.params}
    if any(id(param) not in known for param in params):
        return False
    return all(
        local(param).data_ptr() == slot.param.data_ptr() and local(param.grad).dtype == batch.grad_dtype
        for batch in batches
        for param, slot in zip(batch.params, batch.slots, strict=True)
    )


def _gradient(param: Tensor) -> Tensor:
    grad = local(param.grad)  # type: ignore[arg-type]
    return grad if grad.is_contiguous() else grad.contiguous()


def _gathered(slot: update.Slot) -> update.Slot:
    return dataclasses.replace(slot, param=slot.param.contiguous())


def _is_on_device(lr: Any) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def _check(param: Tensor) -> None:
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
        number = number * size + at if placement.is_shard() else number
    return number
