"""CPUOffloadOptimizer: states, and gradients if wanted, in the host's memory; the step on the CPU, copies behind the backward.

    backward   a gradient is whole -> its own stream copies it into pinned memory, while the GPU goes on with earlier layers.
               With offload_gradients few are on the GPU at a time: beyond `ahead` bytes the GPU, not the host, waits for the
               oldest copy before it takes that gradient's memory for another
    step       parameter by parameter, in the order in which gradients came: wait for that one copy, step on the CPU (torch's
               fused AdamW uses all cores), and let another stream copy the parameter back while the CPU steps the next

Nothing waits for the whole backward pass: `step` is reached while the GPU still computes, and the parameters of the last layers
are stepped by then. A parameter is written as soon as the last use of it in this pass is over.

On a machine without a GPU the parameters lie on the CPU and have a second copy there: the same way, without streams.

    accumulation   several backward passes before a step add up, with `offload_gradients` too (one more buffer a parameter)
    clipping       `max_norm=` or `clip_grad_norm_` of this class. With offload_gradients=False torch's function works as well:
                   a gradient that was changed after its copy is copied again. With True there is no .grad left for it
    weights        that someone else wrote (load_state_dict of the model) are noticed and taken over

Source: Ren et al., "ZeRO-Offload", arXiv 2101.06840.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import MisfitError
from .state import local


@dataclass(kw_only=True, eq=False)
class _Host:
    """The copy of one parameter on the host.

    Args:
        param: of the model. copy: its twin, whose .grad is the gradient's. optimizer: of the twin alone.
        pending: a gradient was copied, or is being copied, into the twin's .grad, since the last step.
        more: a buffer for the gradient of a further backward pass, `added` once it is in .grad.
        event: of the last copy; None on a CPU. version: of the parameter's memory after our last write. grad_version: of the
            gradient that was copied. stepped: the gradient, and its version, of a step that another parameter's error cut short.
    """

    param: Tensor
    copy: torch.nn.Parameter
    optimizer: torch.optim.Optimizer
    pending: bool = False
    more: Tensor | None = None
    added: bool = True
    event: Any = None
    version: int = -1
    grad_version: int = -1
    stepped: tuple[Tensor, int] | None = field(default=None, repr=False)


class CPUOffloadOptimizer(torch.optim.Optimizer):
    """An optimizer whose states are on the CPU.

    Args:
        params: parameters or groups, on a GPU or a CPU. optimizer_class: torch.optim.AdamW or any other that runs on a CPU.
        offload_gradients: free each gradient once it is copied.
        ahead: bytes of gradients that may be on a GPU because their copies are not over; the largest alone may be more.
        minimal_size: parameters of fewer elements are stepped where they are.
        max_norm: clip the norm of all gradients to it, on the CPU, at each step.
        options: of optimizer_class; `fused=True` is added where torch has it for the CPU.

    Raises:
        MisfitError: a sparse gradient, when it comes.

    >>> layer = torch.nn.Linear(64, 64)
    >>> optimizer = CPUOffloadOptimizer(layer.parameters(), torch.optim.AdamW, offload_gradients=True, lr=0.1)
    >>> layer(torch.ones(2, 64)).sum().backward()
    >>> optimizer.step()
    >>> layer.weight.grad is None
    True
    """

    def __init__(
        self, params: Any, optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW, *, offload_gradients: bool = False,
        ahead: int = 1 << 28, minimal_size: int = 4096, max_norm: float | None = None, **options: Any,
    ) -> None:  # fmt: skip
        if optimizer_class in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD) and not options.get("foreach"):
            options.setdefault("fused", True)
        self._class, self._options, self._offload = optimizer_class, options, offload_gradients
        self._smallest, self.max_norm, self._ahead = minimal_size, max_norm, ahead
        self._hosts: dict[Tensor, _Host] = {}
        self._queue: deque[_Host] = deque()
        self._streams: dict[torch.device, tuple[Any, Any]] = {}
        self._leaving: dict[torch.device, deque[tuple[Tensor, Any]]] = {}  # gradients and the events of their copies
        probe = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **options)
        super().__init__(params, dict(probe.defaults))

    # -- parameters -----------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            hosts = [self._host(param, group) for param in group["params"]]
        except Exception:
            self.param_groups.pop()
            raise
        for host in hosts:
            self._hosts[host.param] = host
            self.state[host.param] = host.optimizer.state[host.copy]
            if not _shares(host):
                host.param.register_post_accumulate_grad_hook(_weakly(self))

    def _host(self, param: Tensor, group: dict[str, Any]) -> _Host:
        held = local(param).detach()
        twin = torch.nn.Parameter(_pinned_like(held) if param.numel() >= self._smallest else held)
        return _Host(param=param, copy=twin, optimizer=self._class([_with(group, [twin])], **self._options))

    @property
    def host_nbytes(self) -> int:
        """Bytes of pinned copies and states on the host."""
        twins = [host.copy for host in self._hosts.values() if not _shares(host)]
        states = [
            v for host in self._hosts.values() if not _shares(host) for v in host.optimizer.state[host.copy].values()
        ]
        return sum(t.numel() * t.element_size() for t in (*twins, *states) if isinstance(t, Tensor))

    # -- backward -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        """The gradient of a parameter is whole: copy it to the host, on a stream of its own."""
        host = self._hosts[param]
        grad = local(param.grad)  # type: ignore[arg-type]
        if grad.is_sparse:
            raise MisfitError(
                f"CPUOffloadOptimizer wants dense gradients, got a sparse one for {tuple(param.shape)}: "
                "make its layer with sparse=False, or leave its parameters to an optimizer of their own."
            )
        if host.copy.grad is None:
            host.copy.grad = _pinned_like(grad)
        if host.pending and self._offload:  # a further pass before the step
            self._add(host)
            host.more = _pinned_like(grad) if host.more is None else host.more
            target, host.added = host.more, False
        else:
            target = host.copy.grad
        self._copy(host, target, grad)
        if not host.pending:
            host.pending = True
            self._queue.append(host)
        if self._offload:
            param.grad = None
            if grad.device.type == "cuda":
                self._leave(grad, host.event)

    def _copy(self, host: _Host, target: Tensor, grad: Tensor) -> None:
        if grad.device.type != "cuda":
            target.copy_(grad)
        else:
            down = self._stream(grad.device)[0]
            down.wait_stream(torch.cuda.current_stream(grad.device))
            with torch.cuda.stream(down):
                target.copy_(grad, non_blocking=True)
                host.event = down.record_event()
            if not self._offload:
                grad.record_stream(down)
        host.grad_version = grad._version

    def _leave(self, grad: Tensor, event: Any) -> None:
        """Keep a gradient until `ahead` bytes came after it; what its stream does from then on waits for the copy.

        `record_stream` would give the memory back only once the host sees the copy done, and the host is far ahead: all
        gradients would be on the GPU at once."""
        leaving = self._leaving.setdefault(grad.device, deque())
        leaving.append((grad, event))
        nbytes = sum(held.numel() * held.element_size() for held, _ in leaving)
        while len(leaving) > 1 and nbytes > self._ahead:
            oldest, copied = leaving.popleft()
            torch.cuda.current_stream(grad.device).wait_event(copied)
            nbytes -= oldest.numel() * oldest.element_size()

    def _stream(self, device: torch.device) -> tuple[Any, Any]:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams[device]

    def _add(self, host: _Host) -> None:
        """Add what a further pass brought."""
        if not host.added and host.more is not None:
            self._wait(host)
            host.copy.grad.add_(host.more)  # type: ignore[union-attr]
            host.added = True

    def _wait(self, host: _Host) -> None:
        if host.event is not None:
            host.event.synchronize()

    # -- step -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. closure: evaluates the model again and returns the loss, as torch's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                self._hosts[param].optimizer.param_groups[0].update(_host_options(group))
        self._settle()
        factor = self._factor(self.max_norm) if self.max_norm is not None else None
        try:
            while self._queue:  # one that was stepped leaves it: whatever the next one raises, it is not stepped again
                self._step(self._queue[0], factor)
                _was_stepped(self._queue.popleft())
            self._step_in_place(factor)
            for host in self._hosts.values():
                host.stepped = None
        finally:
            for device, (_, up) in self._streams.items():
                torch.cuda.current_stream(device).wait_stream(up)
        self._leaving.clear()  # every copy has been waited for
        return loss

    def _step_in_place(self, factor: Tensor | None) -> None:
        """The small ones."""
        for host in self._hosts.values():
            if _shares(host) and not _is_stepped(host):
                host.copy.grad = None if host.param.grad is None else local(host.param.grad)
                if factor is not None and host.copy.grad is not None:
                    host.copy.grad.mul_(factor.to(host.copy.device))
                host.optimizer.step()
                torch.autograd.graph.increment_version(host.param)
                _was_stepped(host)

    def _settle(self) -> None:
        """Gradients that were changed after their copy are copied again; weights that were written are taken over."""
        for host in self._hosts.values():
            if _shares(host):
                continue
            grad = host.param.grad
            if (
                grad is not None
                and not self._offload
                and not _is_stepped(host)
                and (not host.pending or local(grad)._version != host.grad_version)
            ):
                host.copy.grad = _pinned_like(local(grad)) if host.copy.grad is None else host.copy.grad
                self._copy(host, host.copy.grad, local(grad))
                if not host.pending:
                    host.pending = True
                    self._queue.append(host)
            elif grad is None and not self._offload and host.pending:  # set to None after the pass
                host.pending = False
                self._queue.remove(host)
            if host.version != host.param._version and host.pending:
                host.copy.data.copy_(local(host.param))

    def _step(self, host: _Host, factor: Tensor | None) -> None:
        self._wait(host)
        self._add(host)
        if factor is not None:
            host.copy.grad.mul_(factor)  # type: ignore[union-attr]
        host.optimizer.step()
        held = local(host.param)
        stream: Any = contextlib.nullcontext()
        if held.device.type == "cuda":
            up = self._stream(held.device)[1]
            if host.event is not None:
                up.wait_event(host.event)  # after the last use of the parameter in this pass
            stream = torch.cuda.stream(up)
        with stream:
            held.detach().copy_(host.copy.detach(), non_blocking=True)
        torch.autograd.graph.increment_version(host.param)
        host.version, host.pending = host.param._version, False

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is at most max_norm; waits for the backward pass. Returns the norm before.

        Use it where `offload_gradients=True` leaves torch.nn.utils.clip_grad_norm_ no gradients to look at.
        """
        self._settle()
        factor = self._factor(max_norm)
        for host in self._queue:
            host.copy.grad.mul_(factor)  # type: ignore[union-attr]
            if not self._offload and host.param.grad is not None:
                local(host.param.grad).mul_(factor.to(host.param.device))
                host.grad_version = local(host.param.grad)._version
        for host in self._hosts.values():
            if _shares(host) and host.param.grad is not None:
                local(host.param.grad).mul_(factor.to(host.param.device))
        return self._norm

    def _factor(self, max_norm: float) -> Tensor:
        norms = []
        for host in self._queue:
            self._wait(host)
            self._add(host)
            norms.append(host.copy.grad.float().norm())  # type: ignore[union-attr]
        small = [local(h.param.grad) for h in self._hosts.values() if _shares(h) and h.param.grad is not None]
        norms += [grad.float().norm().cpu() for grad in small]
        self._norm = torch.stack(norms).norm() if norms else torch.zeros(())
        return (max_norm / (self._norm + 1e-6)).clamp(max=1.0)  # torch's own formula

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, those on the host too."""
        super().zero_grad(set_to_none)
        for host in self._queue:
            self._wait(host)
            host.pending, host.added = False, True
        self._queue.clear()
        self._leaving.clear()

    # -- checkpoints ----------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over states and options: of this class, or of optimizer_class itself, whose form it is."""
        given: dict[str, Any] = {}

        def take(optimizer: Any, found: dict[str, Any]) -> dict[str, Any]:
            given.update(found)
            return {**found, "state": {}}

        handle = self.register_load_state_dict_pre_hook(take)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, saved in zip(self.param_groups, given["param_groups"], strict=True):
            for param, number in zip(group["params"], saved["params"], strict=True):
                host, held = self._hosts[param], given["state"].get(number) or {}
                own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in held.items()}
                one = _with({**saved, **_host_options(group)}, [0])
                host.optimizer.load_state_dict({"state": {0: own} if own else {}, "param_groups": [one]})
                self.state[param] = host.optimizer.state[host.copy]

    def __getstate__(self) -> dict[str, Any]:
        raise MisfitError("CPUOffloadOptimizer holds hooks and streams: save its state_dict() instead of the object.")


def _weakly(optimizer: CPUOffloadOptimizer) -> Callable[[Tensor], None]:
    """A parameter's hook that does not keep the optimizer, which keeps the parameter: no collector sees through such a ring."""
    held = weakref.ref(optimizer)

    def arrived(param: Tensor) -> None:
        found = held()
        if found is not None:
            found._arrived(param)

    return arrived


def _pinned_like(x: Tensor) -> Tensor:
    """Uninitialised memory for x on the host, that a GPU can copy to and from by itself."""
    return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.device.type == "cuda")


def _shares(host: _Host) -> bool:
    """Whether a parameter is stepped where it is."""
    return host.copy.data_ptr() == local(host.param).data_ptr()


def _was_stepped(host: _Host) -> None:
    grad = host.param.grad
    host.stepped = None if grad is None else (grad, local(grad)._version)


def _is_stepped(host: _Host) -> bool:
    """Whether this very gradient was stepped, in a step that did not end."""
    if host.stepped is None or host.param.grad is not host.stepped[0]:
        return False
    return local(host.param.grad)._version == host.stepped[1]


def _with(group: dict[str, Any], params: Iterable[Any]) -> dict[str, Any]:
    return {**{name: value for name, value in group.items() if name != "param_names"}, "params": list(params)}


def _host_options(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options for the host: tensors such as a learning rate lie there."""
    options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in options.items()}
