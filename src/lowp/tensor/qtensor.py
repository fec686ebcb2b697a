"""QTensor: a quantized tensor that torch takes for a float one.

It has the shape and dtype of the float tensor that it stands for, and holds packed plain tensors beside strings and sizes:

    scheme   "int4/1x128*bf16@int8/row"     how to read the numbers          (floor 0)
    layout   "plain"                        where the bytes lie              (floor 1)
    shape as quantized (..., N, K), and whether the last two axes are shown swapped

What an operation means for it is written in `rules.py`, once for all formats. What has no rule is an error; nothing is
turned back into floats behind the user's back. Because the metadata is strings and sizes only, torch.save needs one safe
global and torch.compile sees through it (`__tensor_flatten__`).

Source of the mechanism: torch's wrapper subclasses, https://docs.pytorch.org/docs/stable/notes/extending.html
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..errors import MisfitError, TensorRuleError
from ..layouts import Spec, layout_of
from ..layouts.base import Packed
from ..numerics import Format, Parts, Scheme, dequantize, quantize
from .sharding import from_gathered, to_gather

if TYPE_CHECKING:
    from typing_extensions import Self

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with its last two axes exchanged."""
    return (*shape[:-2], shape[-1], shape[-2])


class QTensor(Tensor):
    """A tensor in low precision: the one class for every format.

    Args:
        packed: the packed tensors by name, as the layout gives them.
        spec: scheme, layout and shape as quantized.
        dtype: the float dtype that it stands for, that of `dequantize()` and of results.
        shape: the shape shown; spec.shape if absent. Any other shape of as many elements is a lazy view.
        transposed: show the last two axes swapped.

    Use `QTensor.quantize(weight, "int4/1x128*bf16")` or `lowp.quantize_` rather than this constructor.

    >>> weight = QTensor.quantize(torch.randn(8, 64), "int8/row")
    >>> torch.nn.functional.linear(torch.randn(2, 64), weight).shape
    torch.Size([2, 8])
    """

    spec: Spec
    transposed: bool
    is_lazy_view: bool  # the shape shown is not the one that was quantized: kernels then read it through floats
    shared_names: frozenset[str] = frozenset()  # of a view: packed tensors that belong to the rest of the parent too
    _names: tuple[str, ...]
    # Before the names of packed tensors as attributes. A subclass that shows other tensors under those names sets it.
    _prefix = ""

    @staticmethod
    def __new__(
        cls: type[QTensor],
        packed: Packed,
        spec: Spec,
        *,
        dtype: torch.dtype,
        shape: tuple[int, ...] | None = None,
        transposed: bool = False,
    ) -> QTensor:
        shown = tuple(shape if shape is not None else swapped(spec.shape) if transposed else spec.shape)
        strides = _contiguous_strides(swapped(shown) if transposed else shown)
        strides = swapped(strides) if transposed else strides
        self = torch.Tensor._make_wrapper_subclass(
            cls, shown, strides=strides, dtype=dtype, device=packed["qdata"].device, requires_grad=False
        )
        self.spec = spec
        self.transposed = transposed
        self.is_lazy_view = shown != (swapped(spec.shape) if transposed else spec.shape)
        self._names = tuple(packed)
        for name, tensor in packed.items():
            setattr(self, cls._prefix + name, tensor)
        return self

    # The arguments belong to __new__; nothing is left to do.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    # -- making one ---------------------------------------------------------------------------------------------------

    @classmethod
    def quantize(cls, x: Tensor, scheme: str, *, layout: str = "plain") -> Self:
        """Quantize a float tensor by the format's own rule.

        Args:
            x: (..., N, K) or (K,), floating point. scheme: spelling or preset. layout: where the bytes go.

        Raises:
            SpellingError, MisfitError: an unknown scheme; blocks that do not divide the shape.
        """
        parsed = Scheme.parse(scheme)
        return cls.from_parts(quantize(x.detach(), parsed.weight), str(parsed), dtype=x.dtype).to_layout(layout)

    @classmethod
    def from_parts(cls, parts: Parts, scheme: str, *, dtype: torch.dtype, layout: str = "plain") -> Self:
        """Wrap parts that were computed elsewhere (HQQ, GPTQ, a foreign checkpoint). dtype: the float dtype to stand for."""
        spec = Spec(scheme=str(Scheme.parse(scheme)), layout="plain", shape=tuple(parts.qdata.shape))
        return cls.of(layout_of("plain").pack(parts, spec), spec, dtype=dtype).to_layout(layout)

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def scheme(self) -> str:
        """Spelling of the weight's format and, after "@", the activation's."""
        return self.spec.scheme

    @property
    def format(self) -> Format:
        """The weight's format."""
        return self.spec.weight

    @property
    def packed(self) -> Packed:
        """The packed tensors by name."""
        return {name: getattr(self, self._prefix + name) for name in self._names}

    @property
    def packed_nbytes(self) -> int:
        """Bytes of all packed tensors: what it really occupies."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.packed.values())

    def parts(self) -> Parts:
        """The unpacked parts, in the shape that was quantized."""
        return layout_of(self.spec.layout).unpack(self.packed, self.spec)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """The values as a plain tensor of the shape shown, in `dtype` (its own if absent)."""
        values = dequantize(self.parts(), self.format, dtype or self.dtype)
        if self.transposed:
            return values.mT
        return values.reshape(self.shape)

    # -- changing what it is, never what it says ----------------------------------------------------------------------

    def to_layout(self, layout: str) -> Self:
        """The same numbers in another layout.

        Raises:
            MisfitError: that layout cannot hold this format, shape or device.
        """
        if layout == self.spec.layout:
            return self
        target = layout_of(layout)
        reason = target.why_not(self.format, self.spec.shape, self.device.type)
        if target.device and target.device != self.device.type:
            reason = f"wants a {target.device} device, got {self.device.type}"
        if reason:
            raise MisfitError(f"layout {layout} cannot hold {self.spec.scheme} {tuple(self.spec.shape)}: {reason}")
        spec = self.spec.with_layout(layout)
        return self.like(target.pack(self.parts(), spec), spec)

    def like(self, packed: Packed, spec: Spec | None = None, *, dtype: torch.dtype | None = None) -> Self:
        """A QTensor of the same shape and view with other packed tensors."""
        shape = tuple(self.shape)
        other = self.remade(packed, spec or self.spec, dtype=dtype, shape=shape, transposed=self.transposed)
        other.shared_names = self.shared_names
        return other

    @classmethod
    def of(
        cls,
        packed: Packed,
        spec: Spec,
        *,
        dtype: torch.dtype,
        shape: tuple[int, ...] | None = None,
        transposed: bool = False,
    ) -> Self:
        """What the constructor of QTensor makes, as this class: a subclass may have a constructor of its own."""
        return cast("Self", QTensor.__new__(cls, packed, spec, dtype=dtype, shape=shape, transposed=transposed))

    def remade(
        self,
        packed: Packed,
        spec: Spec,
        *,
        dtype: torch.dtype | None = None,
        shape: tuple[int, ...] | None = None,
        transposed: bool = False,
    ) -> Self:
        """A tensor of this class from other packed tensors: whatever an operation makes keeps the class of its operand."""
        return type(self).of(packed, spec, dtype=dtype or self.dtype, shape=shape, transposed=transposed)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A QTensor of the same shape, with `function` applied to each packed tensor."""
        return self.like({name: function(tensor) for name, tensor in self.packed.items()})

    def share_memory_(self) -> Self:
        """Move the packed tensors to memory that other processes see, as `nn.Module.share_memory` asks of each parameter."""
        for tensor in self.packed.values():
            tensor.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether other processes see the packed tensors."""
        return all(tensor.is_shared() for tensor in self.packed.values())

    # -- what torch asks ----------------------------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        names = [self._prefix + name for name in self._names]
        return names, (self.spec.scheme, self.spec.layout, self.spec.shape, self.dtype, self.transposed)

    @classmethod
    def __tensor_unflatten__(
        cls, packed: Packed, context: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> QTensor:
        scheme, layout, shape, dtype, transposed = context
        spec = Spec(scheme=scheme, layout=layout, shape=tuple(shape))
        named = {name.removeprefix(cls._prefix): tensor for name, tensor in packed.items()}
        return cls.of(named, spec, dtype=dtype, shape=tuple(outer_size), transposed=transposed)

    def _stable_hash_for_caching(self) -> str:
        """What torch.compile's cache on disk keys on: the metadata, not the numbers, and the code that chose the kernels."""
        return repr((self.__tensor_flatten__(), tuple(self.shape), _installed()))

    # Functions decompose into aten operators first; dynamo has nothing of ours to trace.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        rule = RULES.get(func)
        if rule is None:
            raise TensorRuleError(
                f"{func} has no rule for a quantized tensor ({_describe(args)}): "
                "call .dequantize() on it first if floats are what you want."
            )
        if func.is_view and torch.is_inference_mode_enabled() and not args[0].is_inference():
            with torch.inference_mode(False):  # a view of a tensor that has a version counter has one too
                return rule(func, args, kwargs or {})
        return rule(func, args, kwargs or {})

    def fsdp_pre_all_gather(self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any) -> Any:
        """What FSDP2 gathers: the packed bytes (see `sharding.py`)."""
        return to_gather(self, tuple(outer_size))

    def fsdp_post_all_gather(
        self, gathered: Any, known: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """The whole parameter, a view of what FSDP2 gathered; with `out` it is the one made before, in the same memory."""
        if out is not None:
            return None
        packed, spec, dtype = from_gathered(tuple(gathered), known, param_dtype)
        return self.remade(packed, spec, dtype=dtype), tuple(gathered)

    def __reduce_ex__(self, protocol: Any) -> Any:
        spec, is_parameter = self.spec, isinstance(self, nn.Parameter)
        metadata = (spec.scheme, spec.layout, spec.shape, self.dtype, tuple(self.shape), self.transposed, is_parameter)
        return _rebuild, (self.packed, metadata, type(self))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        where = f"dtype={self.dtype}, device={self.device}, layout={self.spec.layout}"
        return f"{type(self).__name__}({self.spec.scheme}, shape={tuple(self.shape)}, {where})"


@functools.cache
def _installed() -> str:
    """Which lowp this is, by the size and time of its files: a graph that torch.compile kept on disk has its kernels and what
    they are told written into it, and must not outlive them."""
    folder = Path(__file__).parents[1]
    files = sorted(path for kind in ("*.py", "*.cu", "*.so") for path in folder.rglob(kind))
    seen = [
        (str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns) for path in files for stat in (path.stat(),)
    ]
    return hashlib.sha256(repr(seen).encode()).hexdigest()


def _rebuild(packed: Packed, metadata: tuple[Any, ...], kind: type[QTensor]) -> Tensor:
    """What torch.load calls: the one function to allow besides torch's own."""
    scheme, layout, base_shape, dtype, shape, transposed, is_parameter = metadata
    spec = Spec(scheme=scheme, layout=layout, shape=tuple(base_shape))
    made = kind.of(dict(packed), spec, dtype=dtype, shape=tuple(shape), transposed=transposed)
    return nn.Parameter(made, requires_grad=False) if is_parameter else made


torch.serialization.add_safe_globals([_rebuild, QTensor])


def _describe(args: Any) -> str:
    found = [arg for arg in args if isinstance(arg, QTensor)] if isinstance(args, (tuple, list)) else []
    return repr(found[0]) if found else "in a list"


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 2:
        return (max(shape[1], 1) if isinstance(shape[1], int) else shape[1], 1)
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step = step * max(size, 1) if isinstance(size, int) else step * size
    return tuple(reversed(strides))
