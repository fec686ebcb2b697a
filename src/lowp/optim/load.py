"""States from elsewhere, brought into an optimizer's own formats, and out of them into torch's.

    torch.optim        float tensors under the same names                                   quantized here
    ours               QTensors                                                             bit for bit, or through float32
    torchao            OptimState8bit(codes, scale, qmap), ...4bit, ...Fp8                  bit for bit where the map is ours
    bitsandbytes       state1, absmax1, qmap1, state2 ... ; uint8 or float32                the same

A tensor of torchao's is known by its attributes, so torchao need not be installed. Its 4-bit codes hold the even element in the
high nibble, ours in the low one. bitsandbytes also quantizes what its blocks do not divide: such states become float32.

Sources: Dettmers et al., arXiv 2110.02861 (bitsandbytes' maps, which torchao and lowp share); torchao.optim; bitsandbytes.optim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import MisfitError
from ..layouts.plain import tensor_shapes
from ..numerics import ELEMENTS, Format
from ..tensor import QTensor
from .state import floats, is_dtensor, like_parameter, local, quantized, shown

_MAPS = ("dyn8", "udyn8", "dyn4", "ulin4")
_WRAPPED = "__bnb_optimizer_quant_state__"  # under which newer bitsandbytes keep all but step
_OWN_OPTIONS = ("state", "stochastic_rounding", "seed")


def loaded(
    held: dict[str, Any],
    param: Tensor,
    names: tuple[str, ...],
    formats: list[Format | None],
    shape: tuple[int, ...],
    keep: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """The state of one parameter in these formats, on its device, in memory of its own; `keep`: what each is kept as.

    Raises:
        MisfitError: a state of another shape than the parameter, or one whose moments are not there.
    """
    if all(value is None for value in held.values()):
        return {}
    held = _without_bitsandbytes(held, param, names)
    if any(held.get(name) is None for name in names if name != "max_exp_avg_sq"):
        raise MisfitError(
            f"a state wants {', '.join(names)}, got {', '.join(map(str, held))}: load its own optimizer's."
        )
    state = {name: value for name, value in held.items() if name not in names}
    for name, fmt in zip(names, formats, strict=True):
        if name in held and held[name] is not None:
            state[name] = like_parameter(keep(converted(held[name], param, fmt, shape, name)), param)
    return state


def converted(value: Tensor, param: Tensor, fmt: Format | None, shape: tuple[int, ...], name: str) -> Tensor:
    """A state of a parameter (local part) in a format, None for float32, in memory of its own; `name` for errors."""
    if is_dtensor(param) != is_dtensor(value) and param.dim():
        one, other = ("a DTensor", "none") if is_dtensor(value) else ("no DTensor", "one")
        raise MisfitError(
            f"{name} is {one}, its parameter {other}: load with torch.distributed.checkpoint, which shards states as parameters."
        )
    mine, device = local(value), local(param).device
    _check_shape(name, mine, param)
    if hasattr(mine, "codes") and hasattr(mine, "scale") and not isinstance(mine, QTensor):
        mine = from_codes(
            mine.codes, mine.scale, getattr(mine, "qmap", None), tuple(local(param).shape), high_first=True
        )
    if fmt is None or fmt.is_identity:
        dtype = torch.float32 if fmt is None else fmt.element.native
        return floats(mine).to(device=device, dtype=dtype, copy=True).reshape(local(param).shape).contiguous()
    if isinstance(mine, QTensor) and mine.spec.layout == "plain" and str(mine.format) == str(fmt):
        wanted = tensor_shapes(fmt, shape)
        packed = mine.packed
        if all(packed[key].numel() == torch.Size(size).numel() for key, (size, _) in wanted.items()):
            moved = {key: packed[key].detach().to(device, copy=True).reshape(size) for key, (size, _) in wanted.items()}
            return shown(moved, fmt, shape, tuple(local(param).shape))
    return quantized(floats(mine).to(device).reshape(local(param).shape), fmt, shape)


def _check_shape(name: str, state: Tensor, param: Tensor) -> None:
    """The shape of the parameter, or all elements in one axis."""
    held = local(param)
    if tuple(state.shape) not in (tuple(held.shape), (held.numel(),)):
        raise MisfitError(
            f"{name} wants {held.numel()} elements as its parameter {tuple(held.shape)} has, in that shape or flat, "
            f"got {tuple(state.shape)}: load it into the model that it was saved from."
        )


def from_codes(
    codes: Tensor, scale: Tensor, values: Tensor | None, shape: tuple[int, ...], *, high_first: bool = False
) -> Tensor:
    """A state from codes, the scale of each block and the map of values, as torchao and bitsandbytes keep them.

    Args:
        codes: uint8 or float8_e4m3fn, one a number, or two 4-bit ones in a byte. scale: (blocks,), float32.
        values: the map, (256,) or (16,); None for float8. shape: of the state.
        high_first: the even element lies in the high nibble of a byte.

    Returns:
        A QTensor with the same codes where the map is one of ours, in rising order; else float32.

    Raises:
        MisfitError: more or fewer codes than the shape has elements.
    """
    count = torch.Size(shape).numel()
    codes, scale = codes.detach().flatten(), scale.detach().flatten().to(torch.float32)
    half = values is not None and values.numel() == 16
    if codes.numel() != (-(-count // 2) if half else count) or not 0 < scale.numel() <= max(count, 1):
        each = "half a byte" if half else "a byte"
        raise MisfitError(
            f"a state {shape} wants {count} codes of {each} and a scale a block, "
            f"got {codes.numel()} bytes and {scale.numel()} scales: load it into the model that it was saved from."
        )
    if half and codes.numel() * 2 == count:
        codes = codes if not high_first else codes << 4 | codes >> 4
    block = _block(count, scale.numel())
    name = "e4m3" if values is None else _map_of(values)
    if name and count % block == 0:
        fmt = Format.parse(f"{name}/1x{block}")
        sizes = tensor_shapes(fmt, (count,))
        return shown({"qdata": codes.view(sizes["qdata"][0]), "scale": scale}, fmt, (count,), shape)
    if half:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten()
    numbers = codes.to(torch.float32) if values is None else values.to(torch.float32)[codes.long()]
    return (numbers * scale.repeat_interleave(block)[:count]).reshape(shape)


def _block(count: int, blocks: int) -> int:
    """How many elements share a scale: a power of two, whose last block may hold fewer, else equal blocks."""
    sizes = (1 << i for i in range(count.bit_length() + 1))
    return next((size for size in sizes if -(-count // size) == blocks), -(-count // blocks))


def _map_of(values: Tensor) -> str:
    for name in _MAPS:
        own = ELEMENTS[name].table(torch.device("cpu"))
        if own.numel() == values.numel() and torch.allclose(own, values.detach().float().cpu(), rtol=1e-6, atol=0):
            return name
    return ""


def _without_bitsandbytes(held: dict[str, Any], param: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """state1, absmax1 and qmap1 as a state under torch's name; other states unchanged."""
    held = {name: value for name, value in held.items() if name != _WRAPPED} | held.get(_WRAPPED, {})
    if "state1" not in held:
        return held
    out: dict[str, Any] = {"step": held.get("step", 0)}
    for i, name in enumerate(names, 1):
        codes = held.get(f"state{i}")
        if codes is None:
            continue
        _check_shape(name, codes, param)
        if codes.dtype == torch.uint8:
            if held.get(f"absmax{i}") is None or held.get(f"qmap{i}") is None:
                raise MisfitError(
                    f"bitsandbytes' {name} wants absmax{i} and qmap{i} of its blocks, got {', '.join(held)}: "
                    "its states with one scale a tensor are not read, save them with block_wise=True."
                )
            codes = from_codes(codes, held[f"absmax{i}"], held[f"qmap{i}"], tuple(local(param).shape))
        out[name] = codes
    return out


def to_torch(state_dict: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """A state dict of ours as one that torch's optimizer of the same name loads: floats instead of codes.

    Args:
        state_dict: of an optimizer of this room. dtype: of the floats; float32 if absent. torch itself casts them to the
            parameter's dtype when it loads them.

    The other way needs no function: `load_state_dict` of an optimizer of this room takes torch's state dict as it is.

    >>> to_torch({"state": {}, "param_groups": [{"lr": 0.1, "state": "dyn8/1x256", "params": []}]})["param_groups"]
    [{'lr': 0.1, 'params': []}]
    """
    state = {
        number: {name: _plain(name, value, dtype or torch.float32) for name, value in held.items()}
        for number, held in state_dict["state"].items()
    }
    groups = [
        {name: value for name, value in group.items() if name not in _OWN_OPTIONS}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "state": state, "param_groups": groups}


def _plain(name: str, value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or name == "step":
        return value.clone() if isinstance(value, Tensor) else value
    return like_parameter(floats(value).to(dtype, copy=True), value)
