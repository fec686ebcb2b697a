"""What each torch operation means for a QTensor: one rule an operation, for all formats and layouts.

Three kinds:
    1. the same for each packed tensor: detach, clone, to another device, pin ...
    2. views: the packed tensors are cut or reshaped in place where the blocks allow it, so that writing to a view writes to
       its parent. A reshape that splits blocks only changes the shape shown ("lazy view"). A cut through a block is an error.
    3. math: linear, matmul, embedding, the ops of floor 2.

Every rule commutes with dequantize: rule(q).dequantize() == operation(q.dequantize()). The tests say so for every format.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import MisfitError, TensorRuleError
from ..layouts import LAYOUTS, Spec, layout_of
from ..layouts.base import Packed
from ..layouts.plain import tensor_shapes
from ..numerics import Format, quantize
from ..numerics.hadamard import unrotated
from ..ops.embedding import embedding
from ..ops.grouped import grouped
from ..ops.linear import linear
from ..ops.matmul import matmul
from .qtensor import RULES, QTensor

aten = torch.ops.aten


def rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a rule for torch operators; it is called with (operator, args, kwargs)."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for operator in functions:
            RULES[operator] = function
        return function

    return register


# -- the same for each packed tensor ----------------------------------------------------------------------------------


@rule(
    aten.detach.default,
    aten.alias.default,
    aten.view_as.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
)
def _each(func: Any, args: Any, kwargs: Any) -> QTensor:
    return args[0].map(lambda tensor: func(tensor, *args[1:], **kwargs))


@rule(aten.clone.default)
def _clone(func: Any, args: Any, kwargs: Any) -> QTensor:
    return args[0].map(torch.clone)  # a memory format is about floats: codes keep their own


@rule(aten.contiguous.default)
def _contiguous(func: Any, args: Any, kwargs: Any) -> QTensor:
    return args[0].map(torch.Tensor.contiguous)


@rule(aten._pin_memory.default)
def _pin_memory(func: Any, args: Any, kwargs: Any) -> QTensor:
    return args[0].map(torch.Tensor.pin_memory)


@rule(aten.is_pinned.default)
def _is_pinned(func: Any, args: Any, kwargs: Any) -> bool:
    return all(tensor.is_pinned() for tensor in args[0].packed.values())


@rule(aten.record_stream.default)
def _record_stream(func: Any, args: Any, kwargs: Any) -> None:
    for tensor in args[0].packed.values():
        tensor.record_stream(args[1])


@rule(aten.equal.default)
def _equal(func: Any, args: Any, kwargs: Any) -> bool:
    a, b = args[:2]
    if not (isinstance(a, QTensor) and isinstance(b, QTensor)) or a.spec != b.spec:
        a, b = (one.dequantize() if isinstance(one, QTensor) else one for one in (a, b))
        dtype = torch.promote_types(a.dtype, b.dtype)
        return a.shape == b.shape and bool(torch.equal(a.to(dtype), b.to(dtype)))
    if a.shape != b.shape:
        return False
    return all(torch.equal(_bytes(x), _bytes(y)) for x, y in zip(a.packed.values(), b.packed.values(), strict=True))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


@rule(aten._to_copy.default)
def _to_copy(func: Any, args: Any, kwargs: Any) -> QTensor | Tensor:
    x: QTensor = args[0]
    dtype, device = kwargs.get("dtype") or x.dtype, kwargs.get("device")
    if not dtype.is_floating_point:
        raise TensorRuleError(
            f"a quantized tensor stands for a float dtype, got .to({dtype}): read .packed for its codes."
        )
    if device is None or torch.device(device) == x.device:
        return x.map(torch.clone).like(x.map(torch.clone).packed, dtype=dtype)
    elsewhere = torch.device(device).type
    bound = layout_of(x.spec.layout).device
    if (bound and bound != elsewhere) or elsewhere not in (x.device.type, "meta"):
        x = x.to_layout("plain")  # other layouts serve the kernels of the device that they were chosen for
    moved = {
        name: tensor.to(device, non_blocking=kwargs.get("non_blocking", False)) for name, tensor in x.packed.items()
    }
    return x.like(moved, dtype=dtype)


# -- views ------------------------------------------------------------------------------------------------------------


def _axis(x: QTensor, dim: int) -> int:
    """The axis of the shape as quantized that the shown axis `dim` is, counted from the end."""
    if x.is_lazy_view:
        raise TensorRuleError(
            f"{x!r} is a lazy view of {x.spec.shape}: cut it in that shape, or call .dequantize() first."
        )
    axis = dim % x.dim() - x.dim()
    return {-1: -2, -2: -1}.get(axis, axis) if x.transposed else axis


def _has_cuts(x: QTensor) -> bool:
    return layout_of(x.spec.layout).cut is not None


def _cut(what: str, packed: Packed, spec: Spec, axis: int, start: int, stop: int) -> Packed:
    cut = layout_of(spec.layout).cut
    if cut is None:
        known = " or ".join(f"the layout {name}" for name, layout in sorted(LAYOUTS.items()) if layout.cut)
        raise TensorRuleError(
            f"{what} wants {known}, which can be cut in place, got {spec.layout}: "
            "call .to_layout('plain') first, or dequantize()."
        )
    return cut(packed, spec, axis, start, stop)


def _narrow(x: QTensor, dim: int, start: int, stop: int) -> QTensor:
    size = x.shape[dim]
    start, stop = (max(0, min(i + size if i < 0 else i, size)) for i in (start, stop))
    stop = max(start, stop)
    if start == 0 and stop == size:
        return x.like(x.packed)
    axis = _axis(x, dim)
    shape = list(x.spec.shape)
    shape[axis] = stop - start
    packed = _cut("a slice", x.packed, x.spec, axis, start, stop)
    view = x.remade(packed, x.spec.with_shape(tuple(shape)), transposed=x.transposed)
    view.shared_names = x.shared_names | {
        name for name, tensor in packed.items() if tensor is x.packed[name] and name != "qdata"
    }
    return view


@rule(aten.slice.Tensor)
def _slice(func: Any, args: Any, kwargs: Any) -> QTensor:
    return _slice_of(*args, **kwargs)


def _slice_of(x: QTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> QTensor:
    if step != 1:
        raise TensorRuleError(f"a slice of a quantized tensor wants step 1, got {step}: call .dequantize() first.")
    return _narrow(x, dim, 0 if start is None else start, x.shape[dim] if end is None else min(end, x.shape[dim]))


@rule(aten.narrow.default)
def _narrow_rule(func: Any, args: Any, kwargs: Any) -> QTensor:
    x, dim, start, length = args
    return _narrow(x, dim, start, start + length)


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def _split(func: Any, args: Any, kwargs: Any) -> list[QTensor]:
    x, sizes, dim = (*args, 0)[:3] if "dim" not in kwargs else (*args, kwargs["dim"])
    size = x.shape[dim]
    if func is aten.chunk.default:
        sizes = -(-size // sizes)
    if isinstance(sizes, int):
        sizes = [min(sizes, size - start) for start in range(0, size, sizes)] or [0]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_narrow(x, dim, start, start + length) for start, length in zip(starts, sizes, strict=True)]


@rule(aten.select.int)
def _select(func: Any, args: Any, kwargs: Any) -> QTensor | Tensor:
    x, dim, index = args
    size = x.shape[dim]
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of range for axis {dim} of size {size}")
    index %= size
    if x.is_lazy_view or not _has_cuts(x) or _axis(x, dim) >= -2:
        return func(x.dequantize(), dim, index)  # a row or a column is a read: it comes as floats
    dim %= x.dim()
    packed = {name: tensor if _is_shared(name) else tensor.select(dim, index) for name, tensor in x.packed.items()}
    shape = x.spec.shape[:dim] + x.spec.shape[dim + 1 :]
    return x.remade(packed, x.spec.with_shape(shape), transposed=x.transposed)


def _is_shared(name: str) -> bool:
    return name.startswith("act_")  # it belongs to the activation and has no batch axes


@rule(
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.mT.default if hasattr(aten, "mT") else aten.t.default,
    aten.numpy_T.default,
)
def _transpose(func: Any, args: Any, kwargs: Any) -> QTensor:
    x, rank = args[0], args[0].dim()
    if func is aten.t.default and rank == 2 and not x.is_lazy_view:  # what every linear layer asks
        return x.remade(x.packed, x.spec, transposed=not x.transposed)
    order = list(range(rank))
    if func is aten.permute.default:
        order = [dim % rank for dim in args[1]]
    elif func is aten.transpose.int:
        a, b = args[1] % rank, args[2] % rank
        order[a], order[b] = order[b], order[a]
    elif rank >= 2:
        order[-1], order[-2] = order[-2], order[-1]
    if order == list(range(rank)):
        return x.like(x.packed)
    if order != [*range(rank - 2), rank - 1, rank - 2] or x.is_lazy_view:
        raise TensorRuleError(
            f"{func} on {x!r}: only the last two axes can be swapped in place; call .dequantize() first."
        )
    return x.remade(x.packed, x.spec, transposed=not x.transposed)


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(func: Any, args: Any, kwargs: Any) -> QTensor:
    return _reshape(args[0], tuple(args[1]))


def _reshape(x: QTensor, shape: Sequence[int]) -> QTensor:
    new = tuple(torch.empty(x.shape, device="meta").view(tuple(shape)).shape)
    if new == tuple(x.shape):
        return x.like(x.packed)
    if x.transposed:
        raise TensorRuleError(
            f"view {new} of {x!r}: a transposed quantized tensor cannot be viewed; call .dequantize() first."
        )
    if new == x.spec.shape:
        return x.remade(x.packed, x.spec)
    if not x.is_lazy_view and _has_cuts(x) and _rows_regroup(x.spec, new):
        rows = x.dim() - 2  # the axis of rows, or of units of them, in every packed tensor
        packed = {
            name: tensor if _is_shared(name) else tensor.view(*new[:-2], -1, *tensor.shape[rows + 1 :])
            for name, tensor in x.packed.items()
        }
        return x.remade(packed, x.spec.with_shape(new))
    return x.remade(x.packed, x.spec, shape=new)


def _rows_regroup(spec: Spec, new: tuple[int, ...]) -> bool:
    """Whether a reshape only regroups whole rows (or whole matrices), so that each packed tensor can be viewed alike."""
    old, fmt = spec.shape, spec.weight
    if len(old) < 2 or len(new) < 2 or 0 in old:
        return False
    if old[-2:] == new[-2:]:
        return True
    by_row = fmt.is_identity or (fmt.block != "tensor" and fmt.block_dims(old)[0] == 1)
    whole = not any(shape[-2] % layout_of(spec.layout).unit for shape in (old, new))
    return old[-1] == new[-1] and by_row and whole and fmt.nested is None


@rule(aten.unsqueeze.default)
def _unsqueeze(func: Any, args: Any, kwargs: Any) -> QTensor:
    x, dim = args
    rank = x.dim() + 1
    dim %= rank
    if dim <= x.dim() - 2 and not x.is_lazy_view and _has_cuts(x):
        packed = {name: tensor if _is_shared(name) else tensor.unsqueeze(dim) for name, tensor in x.packed.items()}
        shape = (*x.spec.shape[:dim], 1, *x.spec.shape[dim:])
        return x.remade(packed, x.spec.with_shape(shape), transposed=x.transposed)
    return _reshape(x, (*x.shape[:dim], 1, *x.shape[dim:]))


@rule(aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims)
def _squeeze(func: Any, args: Any, kwargs: Any) -> QTensor:
    x = args[0]
    dims = range(x.dim()) if len(args) == 1 else [args[1]] if isinstance(args[1], int) else args[1]
    gone = sorted(dim % x.dim() for dim in dims if x.shape[dim] == 1)
    if any(dim >= x.dim() - 2 for dim in gone) or x.is_lazy_view or not _has_cuts(x):
        return _reshape(x, [size for dim, size in enumerate(x.shape) if dim not in gone])
    for dim in reversed(gone):
        x = _select(aten.select.int, (x, dim, 0), {})
    return x.like(x.packed)


@rule(aten.expand.default)
def _expand(func: Any, args: Any, kwargs: Any) -> QTensor:
    x, sizes = args[0], list(args[1])
    lead = len(sizes) - 2
    if (
        x.is_lazy_view
        or not _has_cuts(x)
        or lead < x.dim() - 2
        or any(new not in (-1, old) for new, old in zip(sizes[lead:], x.shape[-2:], strict=True))
    ):
        raise TensorRuleError(
            f"expand {sizes} of {x!r}: only axes before the matrix can be expanded; call .dequantize() first."
        )
    packed = {
        name: tensor if _is_shared(name) else tensor.expand(*sizes[:lead], *[-1] * (tensor.dim() - x.dim() + 2))
        for name, tensor in x.packed.items()
    }
    shape = (*packed["qdata"].shape[:lead], *x.spec.shape[-2:])
    return x.remade(packed, x.spec.with_shape(shape), transposed=x.transposed)


@rule(aten.as_strided.default)
def _as_strided(func: Any, args: Any, kwargs: Any) -> QTensor:
    x, size, stride = args[:3]
    if tuple(size) == tuple(x.shape) and tuple(stride) == tuple(x.stride()) and not (args[3:] and args[3]):
        return x.like(x.packed)
    raise TensorRuleError(
        f"as_strided {tuple(size)} of {x!r}: a quantized tensor has no strides of elements; call .dequantize() first."
    )


@rule(aten.cat.default)
def _cat(func: Any, args: Any, kwargs: Any) -> QTensor:
    tensors = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = next(x for x in tensors if isinstance(x, QTensor))
    for x in tensors:
        if not isinstance(x, QTensor) or x.spec.scheme != first.spec.scheme or x.transposed != first.transposed:
            raise TensorRuleError(
                f"cat wants quantized tensors of one scheme, got {first!r} and {x!r}: dequantize() them first."
            )
        if x.spec.layout != first.spec.layout:
            raise TensorRuleError(f"cat wants one layout, got {first!r} and {x!r}: call .to_layout('plain') first.")
    axis = _axis(first, dim)
    empty = _cut(
        "cat", first.packed, first.spec, axis, 0, 0
    )  # its axis of no elements is the one that the pieces follow on
    packed = {name: _cat_one(name, [x.packed[name] for x in tensors], empty[name], axis) for name in first.packed}
    ends = [0, *itertools.accumulate(x.spec.shape[axis] for x in tensors)]
    shape = list(first.spec.shape)
    shape[axis] = ends[-1]
    spec = first.spec.with_shape(tuple(shape))
    for start, stop in itertools.pairwise(ends):  # what was put together where no cut may fall is not the whole
        _cut("cat", packed, spec, axis, start, stop)
    return first.remade(packed, spec, transposed=first.transposed)


def _cat_one(name: str, tensors: list[Tensor], empty: Tensor, axis: int) -> Tensor:
    if empty is not tensors[0]:
        along = next(i for i, size in enumerate(empty.shape) if size == 0)
        if tensors[0].element_size() == 1:  # as bytes: torch cannot concatenate every 8-bit dtype on every device
            return torch.cat([t.view(torch.uint8) for t in tensors], dim=along).view(tensors[0].dtype)
        return torch.cat(tensors, dim=along)
    if all(torch.equal(_bytes(t), _bytes(tensors[0])) for t in tensors[1:]):
        return tensors[0]  # one scale for all of them, and it is the same
    raise MisfitError(
        f"cat along axis {axis} wants one {name} for all pieces, got different ones: quantize the concatenated floats instead."
    )


@rule(aten.constant_pad_nd.default)
def _pad(func: Any, args: Any, kwargs: Any) -> QTensor:
    """Rows of zeros behind the others, where shards are not equal."""
    x, pad = args[:2]
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    if value or len(pad) != 2 * x.dim() or any(pad[:-1]) or pad[-1] < 0:
        raise TensorRuleError(
            f"pad wants rows of zeros behind {x!r}, got {tuple(pad)} and {value}: dequantize() it first."
        )
    rows = _new(aten.new_zeros.default, (x, (pad[-1], *x.shape[1:])), {})
    one, more = (tensor_shapes(x.format, (n, *x.shape[1:])) for n in (x.shape[0], x.shape[0] + pad[-1]))
    for name in rows.packed:
        if one[name] == more[name]:  # serves all rows
            rows.packed[name].copy_(x.packed[name])
            if name == "zero_point":
                raise TensorRuleError(
                    f"pad wants a zero point for each row, got one for all of {x!r}: dequantize() it first."
                )
    return _cat(aten.cat.default, ([x, rows],), {})


@rule(aten.stack.default)
def _stack(func: Any, args: Any, kwargs: Any) -> QTensor:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return _cat(aten.cat.default, ([_unsqueeze(aten.unsqueeze.default, (x, dim), {}) for x in args[0]], dim), {})


# -- making and writing -----------------------------------------------------------------------------------------------


@rule(
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.new_empty.default,
    aten.new_zeros.default,
)
def _new(func: Any, args: Any, kwargs: Any) -> QTensor:
    """A tensor of zeros (also for empty: uninitialised scales could be NaN), of the same format; sizes may differ."""
    x: QTensor = args[0]
    shape = tuple(args[1]) if len(args) > 1 else tuple(x.shape)
    device, dtype = kwargs.get("device") or x.device, kwargs.get("dtype") or x.dtype
    if shape == tuple(x.shape) and torch.device(device).type == x.device.type and _zero_code(x.format) == 0:
        return x.like({name: torch.zeros_like(tensor, device=device) for name, tensor in x.packed.items()}, dtype=dtype)
    if x.is_lazy_view and shape == tuple(x.shape):
        return _reshape(_new(func, (x.like(x.packed).view(x.spec.shape),), kwargs), shape)
    if x.transposed and shape == tuple(x.shape):
        return _new(func, (x.t(),), kwargs).t()
    if x.transposed or any(_is_shared(name) for name in x.packed):
        raise TensorRuleError(f"{func} of another shape or device from {x!r}: make it from the float tensor instead.")
    packed = {
        name: torch.zeros(size, dtype=kind, device=device)
        for name, (size, kind) in tensor_shapes(x.format, shape).items()
    }
    if code := _zero_code(x.format):
        bits = x.format.element.bits
        packed["qdata"].fill_(code if bits == 8 else code << 4 | code)
    return x.remade(packed, Spec(scheme=x.spec.scheme, layout="plain", shape=shape), dtype=dtype)


def _zero_code(fmt: Format) -> int:
    """The code of 0.0, where the element has one (codebooks put it in the middle); all codebooks have 4 or 8 bits."""
    return fmt.element.values.index(0.0) if fmt.element.kind == "codebook" and 0.0 in fmt.element.values else 0


@rule(aten.copy_.default)
def _copy_(func: Any, args: Any, kwargs: Any) -> Tensor:
    target, source = args[:2]
    if not isinstance(target, QTensor):
        return target.copy_(source.dequantize(target.dtype))
    if not isinstance(source, QTensor):
        fitting = source.mT if target.transposed else source
        if target.is_lazy_view:
            raise TensorRuleError(
                f"copy_ of floats into {target!r}: it is a lazy view; copy into the shape {target.spec.shape}."
            )
        parts = quantize(fitting.expand(target.spec.shape).to(target.device), target.format)
        source = QTensor.from_parts(parts, target.spec.scheme, dtype=target.dtype)
        source = source.t() if target.transposed else source
    if (
        source.spec.scheme != target.spec.scheme
        or source.shape != target.shape
        or source.transposed != target.transposed
    ):
        raise MisfitError(f"copy_ wants the same scheme and shape, got {source!r} into {target!r}.")
    source = (
        source if source.spec.layout == target.spec.layout else source.to_layout("plain").to_layout(target.spec.layout)
    )
    if set(source.packed) != set(target.packed):
        raise MisfitError(f"copy_ wants the same tensors, got {list(source.packed)} into {list(target.packed)}.")
    for name in target.shared_names:
        held, coming = target.packed[name], source.packed[name]
        if _bytes(held).any() and not torch.equal(_bytes(held), _bytes(coming)):
            raise MisfitError(
                f"copy_ into a part of a tensor whose {name} serves the other parts too, and differs: it would change them. "
                f"Load the pieces as floats, or quantize with a {name} for each row."
            )
    for name, tensor in target.packed.items():
        tensor.copy_(source.packed[name], *args[2:])
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)  # below autograd nothing else counts the write
    return target


@rule(aten.zero_.default)
def _zero_(func: Any, args: Any, kwargs: Any) -> QTensor:
    x = args[0]
    return _copy_(aten.copy_.default, (x, torch.zeros(x.shape, dtype=x.dtype, device=x.device)), {})  # type: ignore[return-value]


# -- math -------------------------------------------------------------------------------------------------------------


def _is_weight(w: Any) -> bool:
    """A matrix (N, K) as quantized, shown as (K, N): the right-hand side of a linear layer."""
    return isinstance(w, QTensor) and w.transposed and len(w.spec.shape) == 2


def _times(x: Tensor, w: QTensor) -> Tensor:
    if w.is_lazy_view:
        return x @ w.dequantize(x.dtype)
    y = matmul(x, w.packed, w.spec, transposed=w.transposed)
    return y if w.transposed else _to_input(y, w)


def _to_input(y: Tensor, w: QTensor) -> Tensor:
    """What is along the columns of a weight, a gradient for one, as the layer's input has it: before scale and rotation."""
    factor_K, signs_K = w.packed.get("act_pre_scale"), w.packed.get("act_rotation")
    y = y if factor_K is None else y * factor_K.to(y.dtype)
    return y if signs_K is None else unrotated(y, signs_K)


@rule(aten.linear.default)
def _linear(func: Any, args: Any, kwargs: Any) -> Tensor:
    x, w, bias = (*args, None)[:3]
    if not isinstance(w, QTensor):
        return func(x.dequantize(), w, bias)
    if w.transposed or len(w.spec.shape) != 2 or w.is_lazy_view:
        return func(x, w.dequantize(x.dtype), bias)
    return linear(x, w.packed, w.spec, bias)


@rule(aten.mm.default, aten.matmul.default)
def _mm(func: Any, args: Any, kwargs: Any) -> Tensor:
    x, w = args
    if isinstance(x, QTensor):
        return func(x.dequantize(w.dtype), w.dequantize() if isinstance(w, QTensor) else w)
    return linear(x, w.packed, w.spec) if _is_weight(w) else _times(x, w)


@rule(aten.addmm.default)
def _addmm(func: Any, args: Any, kwargs: Any) -> Tensor:
    bias, x, w = args
    if (
        isinstance(w, QTensor)
        and not isinstance(x, QTensor)
        and kwargs.get("beta", 1) == 1
        and kwargs.get("alpha", 1) == 1
    ):
        if _is_weight(w) and bias.dim() == 1:
            return linear(x, w.packed, w.spec, bias)
        return _times(x, w) + bias
    floats = [a.dequantize() if isinstance(a, QTensor) else a for a in args]
    return func(*floats, **kwargs)


@rule(aten.bmm.default)
def _bmm(func: Any, args: Any, kwargs: Any) -> Tensor:
    x, w = args
    if not isinstance(w, QTensor) or isinstance(x, QTensor):
        return func(*(a.dequantize() if isinstance(a, QTensor) else a for a in args))
    if w.transposed and not w.is_lazy_view and _is_expanded(w):
        one = _select(aten.select.int, (w, 0, 0), {})
        return linear(x, one.packed, one.spec)
    return _times(x, w)


def _is_expanded(w: QTensor) -> bool:
    return w.dim() == 3 and all(_is_shared(name) or tensor.stride(0) == 0 for name, tensor in w.packed.items())


@rule(aten._grouped_mm.default)
def _grouped_mm(func: Any, args: Any, kwargs: Any) -> Tensor:
    x, w, offs, *rest = (*args, None, None, None)[: max(3, len(args))]
    offs, (bias, out_dtype) = kwargs.get("offs", offs), (rest + [None, None])[:2]
    bias, out_dtype = kwargs.get("bias", bias), kwargs.get("out_dtype", out_dtype)
    fits = isinstance(w, QTensor) and w.transposed and not w.is_lazy_view and w.dim() == 3
    if isinstance(x, QTensor) or not fits or x.dim() != (3 if offs is None else 2) or bias is not None:
        floats = [a.dequantize() if isinstance(a, QTensor) else a for a in (x, w)]
        return func(*floats, offs=offs, bias=bias, out_dtype=out_dtype)
    y = grouped(x, w.packed, w.spec, offs)
    return y if out_dtype is None else y.to(out_dtype)


@rule(aten.embedding.default)
def _embedding(func: Any, args: Any, kwargs: Any) -> Tensor:
    w, ids = args[:2]
    if w.transposed or w.is_lazy_view:
        return func(w.dequantize(), ids, *args[2:], **kwargs)
    return embedding(ids, w.packed, w.spec, w.dtype)


@rule(aten.convolution.default)
def _convolution(func: Any, args: Any, kwargs: Any) -> Tensor:
    x, w, *rest = args
    return func(x, w.dequantize(x.dtype), *rest)  # a convolution reads its weight as floats: the saving is in memory
