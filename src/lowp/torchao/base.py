"""TorchAOBaseTensor: what third parties extend to write a tensor subclass of their own.

A subclass names its inner tensors and its attributes, in the order of its constructor:

    class Mine(TorchAOBaseTensor):
        tensor_data_names = ["qdata", "scale"]
        tensor_attribute_names = ["block_size"]
        def __new__(cls, qdata, scale, block_size): return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, ...)

    @Mine.implements(aten.linear.default)
    def _(func, types, args, kwargs): ...

It gets flattening, detach, clone, alias, contiguous, copy_ and .to for that; every other operation is what it implements. Our own
tensors (`tensors.py`) are QTensors under these names: their operations are the rules of `lowp.tensor`, `implements` goes before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import MisfitError, TensorRuleError

aten = torch.ops.aten


class TorchAOBaseTensor(Tensor):
    """A tensor subclass of named inner tensors and attributes."""

    tensor_data_names: list[str]
    tensor_attribute_names: list[str]
    optional_tensor_data_names: list[str]
    optional_tensor_attribute_names: list[str]
    _ATEN_OP_TABLE: dict[type, dict[Any, Callable[..., Any]]] = {}
    _TORCH_FN_TABLE: dict[type, dict[Any, Callable[..., Any]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for table in ("_ATEN_OP_TABLE", "_TORCH_FN_TABLE"):
            inherited: dict[Any, Callable[..., Any]] = {}
            for parent in cls.__bases__:  # a parent's table holds its own parents'; of two parents the later one wins
                inherited.update(parent.__dict__.get(table, {}).get(parent, {}))
            setattr(cls, table, {cls: inherited})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    # -- operations -----------------------------------------------------------------------------------------------------

    @classmethod
    def implements(cls, aten_ops: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A decorator: what an aten operator, or a list of them, means here; called with (func, types, args, kwargs)."""
        return _into(cls, cls._ATEN_OP_TABLE, aten_ops)

    @classmethod
    def implements_torch_function(cls, torch_fns: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """The same for a torch function, such as torch.nn.functional.linear, above autograd."""
        return _into(cls, cls._TORCH_FN_TABLE, torch_fns)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = cls._TORCH_FN_TABLE.get(cls, {}).get(func)
        if own is not None:
            return own(func, types, args, kwargs or {})
        if func is Tensor.contiguous and _named(
            cls, "tensor_data_names"
        ):  # torch sees a wrapper, whose strides say nothing
            return args[0]._apply_fn_to_data(lambda tensor: tensor.contiguous(*args[1:], **(kwargs or {})))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = cls._ATEN_OP_TABLE.get(cls, {}).get(func)
        if own is not None:
            return own(func, types, args, kwargs or {})
        common = _COMMON.get(func) if _named(cls, "tensor_data_names") else None
        if common is not None:
            return common(func, args, kwargs or {})
        raise TensorRuleError(
            f"{cls.__name__} does not implement {func}: add it with @{cls.__name__}.implements({func}), or dequantize first. "
            f"It was called with arg_types={tuple(map(type, args))}, kwarg_types={_types(kwargs or {})}."
        )

    # -- inner tensors ----------------------------------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        cls = type(self)
        names = [*_named(cls, "tensor_data_names")]
        names += [name for name in _named(cls, "optional_tensor_data_names") if getattr(self, name, None) is not None]
        attributes = _named(cls, "tensor_attribute_names"), _named(cls, "optional_tensor_attribute_names")
        return names, tuple([getattr(self, name, None) for name in group] for group in attributes)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any) -> Any:
        return cls._from_inner(inner, *context)

    @classmethod
    def _from_inner(cls, inner: dict[str, Tensor], attributes: list[Any], optional: list[Any]) -> Any:
        required = [inner[name] for name in _named(cls, "tensor_data_names")]
        more = {name: inner.get(name) for name in _named(cls, "optional_tensor_data_names")}
        more |= dict(zip(_named(cls, "optional_tensor_attribute_names"), optional, strict=True))
        return cls(*required, *attributes, **more)

    def _apply_fn_to_data(self, fn: Callable[[Tensor], Tensor]) -> Any:
        """The same tensor with a function applied to each inner one."""
        names, context = self.__tensor_flatten__()
        return self._from_inner({name: fn(getattr(self, name)) for name in names}, *context)

    def _get_to_kwargs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The device, dtype and non_blocking that `.to(...)` was given; a layout, the one there is, is passed over."""
        args = tuple(arg for arg in args if not isinstance(arg, torch.layout))
        kwargs.pop("layout", None)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        return {
            "device": self.device if device is None else torch.device(device),
            "dtype": self.dtype if dtype is None else dtype,
            "non_blocking": non_blocking,
        }

    def get_layout(self) -> Any:
        """Where torchao's bytes lay before 0.16; None where a tensor does not say."""
        return getattr(self, "_layout", None)

    def _quantization_type(self) -> str:
        return f"shape={tuple(self.shape)}, device={self.device}"

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        names, (attributes, optional) = self.__tensor_flatten__()
        cls = type(self)
        told = [f"{name}={getattr(self, name)}" for name in names]
        told += [
            f"{name}={value}" for name, value in zip(_named(cls, "tensor_attribute_names"), attributes, strict=True)
        ]
        told += [
            f"{name}={value}"
            for name, value in zip(_named(cls, "optional_tensor_attribute_names"), optional, strict=True)
        ]
        return f"{cls.__name__}({', '.join(told)})"


def _named(cls: type, what: str) -> list[str]:
    return getattr(cls, what, None) or []


def _types(given: dict[str, Any]) -> dict[str, type]:
    return {name: type(value) for name, value in given.items()}


def _into(
    cls: type, tables: dict[type, dict[Any, Any]], operators: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for operator in operators if isinstance(operators, (list, tuple)) else [operators]:
            tables.setdefault(cls, {})[operator] = function
        return function

    return register


# -- what every subclass gets -------------------------------------------------------------------------------------------


def _each(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]._apply_fn_to_data(lambda tensor: func(tensor, *args[1:], **kwargs))


def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    names, (attributes, optional) = x.__tensor_flatten__()
    device = kwargs.get("device")
    inner = {name: getattr(x, name).to(device) if device is not None else getattr(x, name).clone() for name in names}
    dtype = kwargs.get("dtype")
    if dtype is not None:
        cls = type(x)
        attributes = _with_dtype(_named(cls, "tensor_attribute_names"), attributes, dtype)
        optional = _with_dtype(_named(cls, "optional_tensor_attribute_names"), optional, dtype)
    return x._from_inner(inner, attributes, optional)


def _with_dtype(names: Sequence[str], values: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    return [dtype if name in ("dtype", "orig_dtype") else value for name, value in zip(names, values, strict=True)]


def _copy_(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[:2]
    different = differences(target, source)
    if different:
        raise MisfitError(f"copy_ wants two tensors alike, got a metadata mismatch: {', '.join(different)}")
    for name in target.__tensor_flatten__()[0]:
        getattr(target, name).copy_(getattr(source, name))
    return target


def differences(target: Any, source: Any) -> list[str]:
    """What keeps `target.copy_(source)` from being a copy of the inner tensors, each as "what: its own vs the other's"."""
    cls = type(target)
    if cls is not type(source):
        return [f"type: {cls.__name__} vs {type(source).__name__}"]
    found = [] if target.shape == source.shape else [f"shape: {target.shape} vs {source.shape}"]
    for name in [*_named(cls, "tensor_data_names"), *_named(cls, "optional_tensor_data_names")]:
        ours, theirs = getattr(target, name, None), getattr(source, name, None)
        if (ours is None) != (theirs is None):
            found.append(f"{name}: {_tensor_or_none(ours)} vs {_tensor_or_none(theirs)}")
        elif ours is not None and ours.shape != theirs.shape:
            found.append(f"{name}.shape: {ours.shape} vs {theirs.shape}")
    for name in [*_named(cls, "tensor_attribute_names"), *_named(cls, "optional_tensor_attribute_names")]:
        ours, theirs = getattr(target, name, None), getattr(source, name, None)
        if ours != theirs:
            found.append(f"{name}: {ours!r} vs {theirs!r}")
    return found


def _tensor_or_none(x: Any) -> str:
    return "None" if x is None else "Tensor"


_COMMON: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _each,
    aten.clone.default: _each,
    aten.alias.default: _each,
    aten.contiguous.default: _each,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
}
