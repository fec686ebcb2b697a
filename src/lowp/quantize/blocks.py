"""A model as a chain of blocks, so that one block at a time is all that must be in memory.

Every decoder is the same shape: something that makes hidden states (embedding), a ModuleList whose members turn hidden states
into hidden states, one after the other, and something that reads them (norm, head). The chain is found by watching, not by names:

    1. the largest ModuleList is taken for the chain
    2. the model runs with each member replaced by a stub that notes its arguments and passes the hidden states on
    3. members that were called once each, in order, each with what the one before it returned, are a chain

A model that is not built so is one block: right, only not one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MisfitError

Batch = Tensor | Mapping[str, Any] | tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a block: its arguments but the hidden states, which are first or named `hidden_states`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool

    def answer(self, block: nn.Module, hidden: Tensor) -> Any:
        """What the block answers."""
        if self.named:
            return block(*self.args, **self.kwargs, hidden_states=hidden)
        return block(hidden, *self.args, **self.kwargs)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states after the block."""
        with torch.no_grad():
            return first_tensor(self.answer(block, hidden))

    def to(self, device: torch.device) -> Call:
        """The call with its tensors on a device."""
        return Call(args=mapped(self.args, device), kwargs=mapped(self.kwargs, device), named=self.named)

    def shared(self, pool: list[Tensor]) -> Call:
        """The call with tensors out of the pool where they are equal; those that are new enter it."""

        def share(tensor: Tensor) -> Tensor:
            for known in pool:
                if known.dtype == tensor.dtype and known.device == tensor.device and torch.equal(known, tensor):
                    return known
            pool.append(tensor)
            return tensor

        return Call(args=_each(self.args, share), kwargs=_each(self.kwargs, share), named=self.named)


class _Reached(Exception):
    """The first block has been called: nothing behind it is wanted."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The blocks of a model by name, in order; none: the model is one block."""

    model: nn.Module
    names: tuple[str, ...]
    returns_tuple: bool = False

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks."""
        return tuple(self.model.get_submodule(name) for name in self.names)

    def calls(self, batch: Batch) -> tuple[Tensor, list[Call]]:
        """The hidden states before the first block, and how each block is called."""
        seen: list[tuple[Tensor, Call]] = []
        with self._stubs(lambda index, hidden, call: seen.append((hidden, call)) or hidden):  # type: ignore[func-returns-value]
            run_model(self.model, batch)
        return seen[0][0], [call for _, call in seen]

    def finish(self, batch: Batch, hidden: Tensor) -> Any:
        """What the model answers when its last block returns `hidden`."""
        last = len(self.names) - 1
        with self._stubs(lambda index, given, call: hidden if index == last else given):
            return run_model(self.model, batch)

    @contextmanager
    def _stubs(self, answer: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = answer(index, *_split(args, kwargs))
                return (hidden,) if self.returns_tuple else hidden

            return forward

        with _forwards({block: stub(i) for i, block in enumerate(self.blocks)}):
            yield


def chain_of(
    model: nn.Module, batch: Batch, device: torch.device, ready: Callable[[nn.Module], Any] = lambda block: None
) -> Chain:
    """Find the chain of a model by running it on one batch.

    Args:
        model, batch: what to run. device: where blocks run. ready: called with the first block, to give it its weights there.

    Returns:
        A Chain; without names where the model is built in another way.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in lists.items()}
    for name in sorted(sizes, key=lambda name: -sizes[name])[:1]:
        names = tuple(f"{name}.{key}" if name else key for key, _ in lists[name].named_children())
        found = _try(model, names, batch, device, ready)
        if found is not None:
            return found
    return Chain(model=model, names=())


def _try(
    model: nn.Module, names: tuple[str, ...], batch: Batch, device: torch.device, ready: Callable[[nn.Module], Any]
) -> Chain | None:
    first = model.get_submodule(names[0])
    caught: list[tuple[Tensor, Call]] = []

    def catch(*args: Any, **kwargs: Any) -> Any:
        caught.append(_split(args, kwargs))
        raise _Reached

    try:
        with _forwards({first: catch}):
            run_model(model, batch)
    except (_Reached, MisfitError):
        pass
    if not caught:
        return None
    hidden, call = mapped(caught[0][0], device), caught[0][1].to(device)
    ready(first)
    with torch.no_grad():
        answer = call.answer(first, hidden)
    if isinstance(answer, (tuple, list)) and not answer:
        return None
    returned = answer[0] if isinstance(answer, (tuple, list)) else answer
    if not isinstance(returned, Tensor) or returned.shape != hidden.shape:
        return None
    chain = Chain(model=model, names=names, returns_tuple=isinstance(answer, (tuple, list)))
    return chain if _runs_in_order(chain, batch) else None


def _runs_in_order(chain: Chain, batch: Batch) -> bool:
    """Whether each member is called once, in order, with what the one before it returned."""
    seen: list[tuple[int, int]] = []

    def note(index: int, hidden: Tensor, call: Call) -> Tensor:
        seen.append((index, hidden.data_ptr()))
        return hidden

    try:
        with chain._stubs(note):
            run_model(chain.model, batch)
    except Exception:  # whatever a foreign model raises among stubs, it says that its blocks are no chain
        return False
    return [index for index, _ in seen] == list(range(len(chain.names))) and len({at for _, at in seen}) == 1


def run_model(model: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch: token ids (B, T), a mapping of keyword arguments, or a tuple of arguments."""
    with torch.no_grad(), _without_cache(model):
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def real_tokens(batch: Batch) -> Tensor | None:
    """(B, T), bool: the tokens of a batch that are no padding, by its `attention_mask`; None where it leaves none out."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask != 0


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """No module keeps keys and values from one run to the next, wherever in the model its configuration hangs."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    found = {id(config): config for config in configs if hasattr(config, "use_cache")}
    before = [(config, config.use_cache) for config in found.values()]
    for config in found.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    named = "hidden_states" in kwargs
    hidden = kwargs["hidden_states"] if named else (args[0] if args else None)
    if not isinstance(hidden, Tensor):
        raise MisfitError(f"a block wants hidden states first, got {type(hidden).__name__}.")
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return hidden, Call(args=args if named else args[1:], kwargs=rest, named=named)


def every_tensor(answer: Any) -> list[Tensor]:
    """All tensors of what a module answers."""
    if isinstance(answer, Tensor):
        return [answer]
    inside = answer.values() if isinstance(answer, Mapping) else answer if isinstance(answer, (tuple, list)) else ()
    return [tensor for one in inside for tensor in every_tensor(one)]


def first_tensor(answer: Any) -> Tensor:
    """The first tensor of what a module answers: a tensor, a tuple, or a mapping that can be indexed (a ModelOutput)."""
    while not isinstance(answer, Tensor):
        answer = next(iter(answer.values())) if isinstance(answer, Mapping) else answer[0]
    return answer


def mapped(value: Any, device: torch.device) -> Any:
    """The same with its tensors on a device, in memory of their own: a block may work in place."""
    return _each(value, lambda tensor: tensor.to(device, copy=True))


def _each(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _each(one, function) for key, one in value.items()}
    return type(value)(_each(one, function) for one in value) if type(value) in (tuple, list) else value


@contextmanager
def _forwards(replaced: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules whose forward is another while this is entered."""
    before: dict[nn.Module, Any] = {module: module.__dict__.get("forward") for module in replaced}
    for module, forward in replaced.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward
