"""View: a QTensor that shows itself under torchao's names.

What is stored is ours: a scheme, a layout, packed tensors. What is shown is computed when it is asked for, from those alone:

    w.qdata, w.scale, w.zero_point ...     the tensors that torchao's class of that name holds, same shapes, dtypes and bytes
    w.block_size, w.act_quant_kwargs ...   what follows from the scheme

Setting one of the tensors (`w.qdata = ...`, as offloading does) reads all of them, exchanges one and stores the result in
the layout "plain". A class of torchao is one subclass with `_shown`, `_stored` and the attributes that follow from the scheme.

A cut that a layout made for one kernel does not allow turns the tensor into the plain layout first, and all its aliases with it
(`param.data`, `detach()`), so that writing to a slice still writes to its parent; that costs the fast kernel, a warning says so.
Aliases share a `_Memory` and follow it when they are next looked at.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError, MisfitError, TensorRuleError
from ..layouts import Spec, layout_of
from ..numerics import ELEMENTS, Format, Parts, Scheme
from ..numerics.bits import pack_bits, unpack_bits
from ..tensor import QTensor
from ..tensor.qtensor import _rebuild
from . import numbers
from .base import TorchAOBaseTensor
from .spelling import block_size_of

if TYPE_CHECKING:
    from typing_extensions import Self

aten = torch.ops.aten
_CUTTING = {
    aten.slice.Tensor, aten.narrow.default, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
    aten.cat.default,
    aten.stack.default, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default,
}  # fmt: skip

_ALIASING = {aten.detach.default, aten.alias.default, aten.view_as.default, aten.lift_fresh.default}


@dataclass
class _Memory:
    """What aliases share: where their numbers lie since they were laid out anew, or None while they were not."""

    moved: tuple[dict[str, Tensor], Spec] | None = None


class Shown:
    """A descriptor: one of torchao's tensors, or None where this weight does not have it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, view: Any, owner: Any = None) -> Any:
        if view is None:
            return self
        view._follow()
        return view._shown().get(self.name)

    def __set__(self, view: Any, tensor: Tensor | float | None) -> None:
        if isinstance(tensor, (int, float)) and self.name == "act_pre_scale":
            tensor = torch.full((view.spec.shape[-1],), float(tensor), dtype=view.dtype, device=view.device)
        view._exchange(self.name, tensor)


class View(QTensor, TorchAOBaseTensor):
    """The base of torchao's tensor classes.

    A subclass gives `_arguments` (names of its constructor's arguments), `_shown` and `_stored`.
    """

    _prefix = "_kept_"
    _memory: _Memory | None = None  # shared with aliases, in a layout other than plain
    _arguments: ClassVar[tuple[str, ...]]
    tensor_data_names: ClassVar[list[str]]
    tensor_attribute_names: ClassVar[list[str]] = []
    optional_tensor_data_names: ClassVar[list[str]] = []
    optional_tensor_attribute_names: ClassVar[list[str]] = []
    _home: ClassVar[str]  # the module that it is in, whatever it says while the redirect stands

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._home = cls.__module__
        for name in (*cls.__dict__.get("tensor_data_names", ()), *cls.__dict__.get("optional_tensor_data_names", ())):
            setattr(cls, name, Shown(name))
        torch.serialization.add_safe_globals([cls])

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        signature = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in cls._arguments]
        )
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        return cls._from_torchao(given.arguments)

    # -- what a class gives -----------------------------------------------------------------------------------------------

    def _shown(self) -> dict[str, Tensor]:
        """torchao's tensors, by name."""
        raise NotImplementedError

    @classmethod
    def _stored(cls, given: dict[str, Any]) -> tuple[Parts, str, torch.dtype]:
        """Parts, scheme and float dtype from the constructor's arguments; None stands for what was not given."""
        raise NotImplementedError

    # -- what follows from it -----------------------------------------------------------------------------------------------

    @classmethod
    def _from_torchao(cls, given: dict[str, Any]) -> Self:
        parts, scheme, dtype = cls._stored(given)
        return cls.from_parts(parts, scheme, dtype=dtype)

    @classmethod
    def of_qtensor(cls, q: QTensor) -> Self:
        """A QTensor under this class: the same packed tensors."""
        return cls.of(q.packed, q.spec, dtype=q.dtype, shape=tuple(q.shape), transposed=q.transposed)

    def dequantize(self, output_dtype: torch.dtype | None = None, *, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """The values as a plain tensor; `dtype` is our name of `output_dtype`."""
        self._follow()
        return super().dequantize(output_dtype or dtype)

    def torchao_tensors(self) -> dict[str, Tensor]:
        """torchao's tensors that this weight has, in the order of its class."""
        self._follow()
        shown = self._shown()
        names = (*self.tensor_data_names, *self.optional_tensor_data_names)
        return {name: shown[name] for name in names if shown.get(name) is not None}

    def torchao_attributes(self) -> dict[str, Any]:
        """torchao's attributes, as the class names them."""
        names = (*self.tensor_attribute_names, *self.optional_tensor_attribute_names)
        return {name: getattr(self, name) for name in names}

    def _exchange(self, name: str, tensor: Tensor | None) -> None:
        given = dict.fromkeys(self._arguments) | self.torchao_attributes() | self._shown() | {name: tensor}
        parts, scheme, _ = self._stored({key: given[key] for key in self._arguments})
        spec = Spec(scheme=scheme, layout="plain", shape=self.spec.shape)
        self._restore(layout_of("plain").pack(parts, spec), spec)

    def _restore(self, packed: dict[str, Tensor], spec: Spec) -> None:
        self.spec, self._names = spec, tuple(packed)
        for name, tensor in packed.items():
            setattr(self, self._prefix + name, tensor)

    @property
    def block_size(self) -> Any:
        """How many elements of each axis share a scale."""
        return block_size_of(self.format, tuple(self.spec.shape))

    @property
    def act_format(self) -> Format | None:
        """The activation's format, None for weight-only."""
        return self.spec.act

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = cls._ATEN_OP_TABLE.get(cls, {}).get(func)
        for x in args[0] if args and isinstance(args[0], (list, tuple)) else args[:3]:
            if isinstance(x, View):
                x._follow()
        if own is not None:
            return own(func, types, args, kwargs or {})
        if func is aten.select.int and isinstance(args[0], View):
            row = args[0]._row(*args[1:])
            if row is not None:
                return row
        try:
            made = super().__torch_dispatch__(func, types, args, kwargs)
        except (MisfitError, TensorRuleError):
            given = args[0] if args and isinstance(args[0], (list, tuple)) else args[:1]
            bound = [x for x in given if isinstance(x, View) and x.spec.layout != "plain" and not x.transposed]
            if func not in _CUTTING or not bound:
                raise
            for x in bound:
                x._make_plain()
            return super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(made, View) and args and isinstance(args[0], View) and made.spec.layout != "plain":
            args[0]._share_with(made, func)
        return made

    def _share_with(self, other: View, func: Any) -> None:
        """Let an alias know when the memory of both is laid out anew."""
        same = all(tensor is self.packed.get(name) for name, tensor in other.packed.items())
        if other is not self and not other.transposed and (func in _ALIASING or same):
            self._memory = other._memory = self._memory or _Memory()

    def _follow(self) -> None:
        """Lie where the memory that is shared lies now."""
        memory = self._memory
        if memory is not None and memory.moved is not None:
            self._memory = None
            self._restore(*memory.moved)

    @property
    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        self._follow()
        return super().packed

    def parts(self) -> Parts:
        """The unpacked parts, in the shape that was quantized."""
        self._follow()
        return super().parts()

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        self._follow()
        return super().__tensor_flatten__()

    def _row(self, dim: int, index: int) -> Self | None:
        """One row of a matrix as a quantized vector; None where its blocks hold more rows than one."""
        size = self.shape[0]
        if self.dim() != 2 or dim % 2 or self.transposed or self.is_lazy_view or not -size <= index < size:
            return None
        if "x" in self.format.block and not self.format.block.startswith("1x"):
            return None
        one = self.to_layout("plain").narrow(0, index % size, 1)  # a read: the weight itself stays where it is
        packed = {name: tensor.select(0, 0) if tensor.dim() == 2 else tensor for name, tensor in one.packed.items()}
        return self.remade(packed, one.spec.with_shape(tuple(one.spec.shape[1:])))

    def _make_plain(self) -> None:
        """Lie in the layout plain from now on, in place: what is cut from it is then a part of it."""
        warnings.warn(
            f"{type(self).__name__} {tuple(self.shape)} was cut and lies in the layout plain now, not in {self.spec.layout}: "
            "quantize after cutting to keep its kernel.",
            stacklevel=4,
        )
        plain = self.to_layout("plain")
        if self._memory is not None:
            self._memory.moved = (plain.packed, plain.spec)
        self._memory = None
        self._restore(plain.packed, plain.spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file names the class by where it is, so that it is read with and without the redirect, beside a real torchao too."""
        rebuild, (packed, metadata, kind) = super().__reduce_ex__(protocol)
        if not self._home.startswith(f"{__package__}."):
            return rebuild, (packed, metadata, kind)  # somebody else's
        return _rebuild_view, (packed, metadata, self._home.rpartition(".")[2], kind.__name__)

    @classmethod
    def implements_torch_function(cls, torch_fns: Any) -> Any:
        """As of TorchAOBaseTensor; a class without any stays out of the way of torch.compile."""
        cls.__torch_function__ = classmethod(TorchAOBaseTensor.__torch_function__.__func__)  # type: ignore[assignment]
        return super().implements_torch_function(torch_fns)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return QTensor.__repr__(self)

    def _quantization_type(self) -> str:
        act = getattr(self, "act_quant_kwargs", None)
        told = f"scheme={self.scheme}, shape={tuple(self.shape)}, device={self.device}, layout={self.spec.layout}"
        return told + (f", act_quant_kwargs={act}" if act is not None else "")


def _rebuild_view(packed: dict[str, Tensor], metadata: tuple[Any, ...], file: str, name: str) -> Tensor:
    """What torch.load calls for a class of a file of this folder."""
    kind = getattr(importlib.import_module(f"{__package__}.{file}"), name, None) if file.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, View)):
        raise CheckpointError(f"{file}.{name} is no class of a quantized tensor: was the file written by a newer lowp?")
    return _rebuild(packed, metadata, kind)


torch.serialization.add_safe_globals([_rebuild_view])


def require(given: dict[str, Any], *names: str) -> tuple[Any, ...]:
    """The arguments that a constructor cannot do without."""
    missing = [name for name in names if given.get(name) is None]
    if missing:
        raise MisfitError(f"the constructor wants {', '.join(names)}, got no {missing[0]}.")
    return tuple(given[name] for name in names)


def nibbles(parts: Parts, element: str) -> Tensor:
    return pack_bits(ELEMENTS[element].to_codes(parts.qdata), 4)


def from_nibbles(qdata: Tensor, element: str) -> Tensor:
    return ELEMENTS[element].from_codes(unpack_bits(qdata.view(torch.uint8), 4, qdata.shape[-1] * 2))


def or_none(zero_point: Tensor | None) -> Tensor | None:
    """A zero point that says something; all zeros say nothing."""
    if zero_point is None or zero_point.device.type == "meta" or not bool(zero_point.any()):
        return None
    return zero_point


def quantized(cls: type[View], weight: Tensor, scheme: str, run: numbers.Numbers) -> Any:
    with torch.no_grad():
        parts = run(weight.detach(), Scheme.parse(scheme).weight)
        return cls.from_parts(parts, scheme, dtype=weight.dtype)
