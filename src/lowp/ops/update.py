"""adam, sgd, lion, muon: one step of an optimizer whose states are in low precision, for a list of parameters at once.

One pass for each parameter: read param, gradient, codes and scales; update in float32; requantize; write, all in place.

    state  = (qdata - zero_point) * scale                      decoded
    g      = +-grad / grad_scale                               (+ weight_decay * p, where it is not decoupled)
    adam   m = m + (1 - b1) (g - m)      v = b2 v + (1 - b2) g g      p = decay p - rate m / (root sqrt(v) + eps)
    sgd    m = momentum m + first g      d = g + momentum m  (nesterov)  or  m               p = decay p - rate d
    lion   d = sign(b1 m + (1 - b1) g)   m = b2 m + (1 - b2) g                               p = decay p - rate d
    muon   m = m + (1 - momentum) (g - m)   d = g + momentum (m - g)  (nesterov)  or  m      p = decay p - rate a(shape) U V'
           where d = U S V', by Newton and Schulz' iteration: the rotation nearest to d, in bf16
    codes, scales = quantize(m), quantize(v)                   the very bytes of `numerics.quantize`

    decay = 1 - lr weight_decay (decoupled) or 1      rate = lr / (1 - b1**step) for adam, else lr
    root  = 1 / sqrt(1 - b2**step)                    first = 1 at the first step of sgd, else 1 - dampening

with amsgrad a third state holds the largest v so far, and stands in v's place under the root. `rate`, `root` ... are computed in
float64 and rounded once (`Coefficients`).

Stochastic rounding of a bf16 parameter takes 16 bits of noise for each element from Philox4x32 with 7 rounds, counted by
(element // 8, key of the parameter) under the key (seed, step): the same on every device, and again after a checkpoint.

A case's scheme is "first moment's format@second moment's", such as dyn8/1x256@udyn8/1x256. A state in fp32, bf16 or fp16 is a
plain tensor, its codes are the floats themselves.

Sources: Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101 (decoupled); Reddi et al., arXiv 1904.09237
(amsgrad); Chen et al., arXiv 2302.06675 (Lion); Dettmers et al., arXiv 2110.02861 (states in 8 bits); Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011 (Philox); Jordan et al., "Muon: an optimizer for hidden layers in neural networks",
2024; Liu et al., arXiv 2502.16982 (its scale by shape).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layouts import Spec, layout_of
from ..layouts.base import Packed
from ..numerics import ELEMENTS, Format, Scheme, dequantize, quantize
from .registry import Case, device_capability, pick

_ROUNDS = 7  # of Philox4x32; the fewest that pass BigCrush (Salmon et al., table 2)
WORDS = (0, 2, 1, 3)  # of Philox, in the order in which 8 elements take their halves, the lower first


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a group of parameters has in common, besides its learning rate.

    Args:
        beta1, beta2, eps: of adam and lion; beta1 is sgd's momentum. weight_decay: as torch's.
        decoupled: weight decay shrinks the parameter instead of joining the gradient.
        maximize: climb. amsgrad: keep the largest second moment. nesterov, dampening: of sgd, nesterov of muon.
        iterations: of Newton and Schulz for muon. by_shape: how muon's step is scaled, see `scale_by_shape`.
        seed: of the noise that bf16 parameters are rounded with; None rounds them to nearest.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    maximize: bool = False
    amsgrad: bool = False
    nesterov: bool = False
    dampening: float = 0.0
    iterations: int = 5
    by_shape: str = "match_rms_adamw"
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """What changes from step to step: plain floats, or float32 tensors of one number where the device counts the steps."""

    decay: float | Tensor
    rate: float | Tensor
    root: float | Tensor
    first: float | Tensor
    step: int | Tensor


_NAMES = tuple(field.name for field in dataclasses.fields(Coefficients))


@dataclass(frozen=True, kw_only=True, eq=False)
class Slot:
    """One parameter and its states; it may serve many steps, so its gradient is not in it.

    Args:
        param: contiguous floats. states: packed (layout plain) by name, in the order of the rule's moments.
        scheme: the formats of the first and the other moments. shape: of the states as quantized, as many elements as param.
        key: the parameter's own number for its noise. start: how many elements of the parameter lie before this slot.
    """

    param: Tensor
    states: tuple[Packed, ...]
    scheme: str
    shape: tuple[int, ...]
    key: int = 0
    start: int = 0

    @property
    def formats(self) -> tuple[Format, ...]:
        """The format of each state."""
        return formats_of(self.scheme)[: len(self.states)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What one call of adam, sgd or lion does: one step of a list of parameters.

    Args:
        slots: parameters with their states: of one scheme, dtype and device. grads: contiguous, in the shapes of the parameters,
            of one dtype.
        settings: what they have in common. numbers: of this step, see `coefficients` and `coefficients_on_device`.
        grad_scale: () or None, what gradients were multiplied by. found_inf: () or None; where it is not 0, nothing is written.
    """

    slots: Sequence[Slot]
    grads: Sequence[Tensor]
    settings: Settings
    numbers: Coefficients | Tensor
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


@functools.lru_cache(maxsize=256)
def formats_of(scheme: str) -> tuple[Format, Format, Format]:
    """The formats of first, second and largest second moment."""
    parsed = Scheme.parse(scheme)
    second = parsed.act or parsed.weight
    return parsed.weight, second, second


# -- coefficients -----------------------------------------------------------------------------------------------------


def coefficients(rule: str, settings: Settings, lr: float, step: int) -> Coefficients:
    """The numbers of one step, `step` counted from 1.

    >>> coefficients("adam", Settings(beta1=0.5), 1.0, 1).rate
    2.0
    """
    adam = rule == "adam"
    return Coefficients(
        decay=1 - lr * settings.weight_decay if settings.decoupled else 1.0,
        rate=lr / (1 - settings.beta1**step) if adam else lr,
        root=1 / math.sqrt(1 - settings.beta2**step) if adam else 1.0,
        first=1.0 if step == 1 else 1 - settings.dampening,
        step=step,
    )


def coefficients_on_device(rule: str, settings: Settings, lr: float | Tensor, step: Tensor) -> Tensor:
    """The same without asking the device for a number: (decay, rate, root, first, step), float32, from a step of shape ()."""
    step = step.to(torch.float64)
    lr = (
        lr.to(device=step.device, dtype=torch.float64).view(()) if isinstance(lr, Tensor) else torch.full_like(step, lr)
    )
    one = torch.ones_like(step)
    adam = rule == "adam"
    numbers = (
        1 - lr * settings.weight_decay if settings.decoupled else one,
        lr / (1 - settings.beta1**step) if adam else lr,
        (1 - settings.beta2**step).rsqrt() if adam else one,
        torch.where(step == 1, one, 1 - settings.dampening),
        step,
    )
    return torch.stack(numbers).to(torch.float32)


def coefficients_of(numbers: Coefficients | Tensor) -> Coefficients:
    """The numbers of a step by name; those of `coefficients_on_device` as tensors of one number."""
    if isinstance(numbers, Coefficients):
        return numbers
    return Coefficients(**dict(zip(_NAMES, numbers.unbind(), strict=True)))


# -- the meaning ------------------------------------------------------------------------------------------------------

Update = Callable[[Tensor, Tensor, list[Tensor], Settings, Coefficients], tuple[Tensor, list[Tensor]]]


def _adam(p: Tensor, g: Tensor, states: list[Tensor], s: Settings, c: Coefficients) -> tuple[Tensor, list[Tensor]]:
    m = states[0] + (g - states[0]) * (1 - s.beta1)
    v = states[1] * s.beta2 + g * g * (1 - s.beta2)
    largest = [torch.maximum(states[2], v)] if s.amsgrad else []
    denominator = (largest or [v])[0].sqrt() * c.root + s.eps
    return p * c.decay - m / denominator * c.rate, [m, v, *largest]


def _sgd(p: Tensor, g: Tensor, states: list[Tensor], s: Settings, c: Coefficients) -> tuple[Tensor, list[Tensor]]:
    m = states[0] * s.beta1 + g * c.first
    return p * c.decay - (g + m * s.beta1 if s.nesterov else m) * c.rate, [m]


def _lion(p: Tensor, g: Tensor, states: list[Tensor], s: Settings, c: Coefficients) -> tuple[Tensor, list[Tensor]]:
    direction = (states[0] * s.beta1 + g * (1 - s.beta1)).sign()
    return p * c.decay - direction * c.rate, [states[0] * s.beta2 + g * (1 - s.beta2)]


def _muon(p: Tensor, g: Tensor, states: list[Tensor], s: Settings, c: Coefficients) -> tuple[Tensor, list[Tensor]]:
    m = states[0] + (g - states[0]) * (1 - s.beta1)
    direction = g + (m - g) * s.beta1 if s.nesterov else m
    rotation = orthogonal(direction.flatten(1), s.iterations).view(p.shape).to(torch.float32)
    return p * c.decay - rotation * (c.rate * scale_by_shape(p.flatten(1).shape, s.by_shape)), [m]


def orthogonal(x_MN: Tensor, iterations: int = 5) -> Tensor:
    """About U V' of x = U S V', bf16: singular values of 0.7 to 1.2 after 5 iterations of an odd polynomial.

    >>> orthogonal(torch.diag(torch.tensor([4.0, 0.5]))).float().diagonal().round(decimals=1)
    tensor([0.7000, 0.7000])
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's: the steepest at 0 that keeps [0, 1] within 0.7 to 1.2
    x = x_MN.mT if x_MN.shape[0] > x_MN.shape[1] else x_MN
    x = (x / (x.norm() + 1e-7)).to(torch.bfloat16)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if x_MN.shape[0] > x_MN.shape[1] else x


def scale_by_shape(shape: Sequence[int], how: str) -> float:
    """What a rotation of a shape is multiplied by.

    "match_rms_adamw": 0.2 sqrt(max(M, N)), its elements are then as large as AdamW's steps (Liu et al.). "original":
    sqrt(max(1, M / N)) (Jordan et al.).

    >>> scale_by_shape((16, 4), "original"), scale_by_shape((100, 4), "match_rms_adamw")
    (2.0, 2.0)
    """
    rows, columns = shape
    return math.sqrt(max(1.0, rows / max(1, columns))) if how == "original" else 0.2 * math.sqrt(max(rows, columns))


ELEMENTWISE: dict[str, Update] = {"adam": _adam, "sgd": _sgd, "lion": _lion}
RULES = ELEMENTWISE | {"muon": _muon}


def reference(rule: str, step: Step) -> None:
    """The meaning of the four ops, slot by slot."""
    settings, found_inf, c = step.settings, step.found_inf, coefficients_of(step.numbers)
    for slot, grad in zip(step.slots, step.grads, strict=True):
        p, g = slot.param.to(torch.float32), grad.to(torch.float32)
        if step.grad_scale is not None:
            g = g * step.grad_scale.to(torch.float32).reciprocal()
        if settings.maximize:
            g = -g
        if settings.weight_decay and not settings.decoupled:
            g = g + p * settings.weight_decay
        specs = [Spec(scheme=str(fmt), layout="plain", shape=slot.shape) for fmt in slot.formats]
        values = [read(packed, spec).view(p.shape) for packed, spec in zip(slot.states, specs, strict=True)]
        new, states = RULES[rule](p, g, values, settings, c)
        _write(slot.param, _rounded(new, slot, settings, c), found_inf)
        for packed, spec, state in zip(slot.states, specs, states, strict=True):
            parts = quantize(state.view(slot.shape), spec.weight)
            for name, tensor in layout_of("plain").pack(parts, spec).items():
                _write(packed[name], tensor, found_inf)


def read(packed: Packed, spec: Spec) -> Tensor:
    """The values of a state, float32."""
    return dequantize(layout_of("plain").unpack(packed, spec), spec.weight)


def _write(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    if found_inf is None:
        target.copy_(value)
    elif target.element_size() == 1:  # as bytes: not every 8-bit dtype can be chosen from
        old = target.view(torch.uint8)
        old.copy_(torch.where(found_inf.to(old.device) != 0, old, value.contiguous().view(torch.uint8)))
    else:
        target.copy_(torch.where(found_inf.to(target.device) != 0, target, value.to(target.dtype)))


def _rounded(p: Tensor, slot: Slot, settings: Settings, c: Coefficients) -> Tensor:
    if settings.seed is None or slot.param.dtype != torch.bfloat16:
        return p
    drawn = noise(p.numel(), slot.start, settings.seed, c.step, slot.key, p.device)
    rounded = ELEMENTS["bf16"].encode_stochastic(p, ((65535 - drawn) / 65536).view(p.shape))
    return torch.where(p.isfinite(), rounded, p.to(torch.bfloat16))


def noise(count: int, start: int, seed: int, step: int | Tensor, key: int, device: torch.device) -> Tensor:
    """16 random bits for each of `count` elements, the first being number `start`, a multiple of 8; (count,), int32.

    >>> noise(3, 0, 7, 1, 0, torch.device("cpu"))
    tensor([63136,  4742, 60793], dtype=torch.int32)
    """
    low32 = 0xFFFFFFFF
    group = torch.arange(start // 8, (start + count + 7) // 8, dtype=torch.int64, device=device)
    at = [group & low32, group >> 32, torch.full_like(group, key), torch.zeros_like(group)]
    keys = [torch.full_like(group, seed & low32), torch.zeros_like(group) + torch.as_tensor(step, device=device).long()]
    for _ in range(_ROUNDS):
        a, b = at[0] * 0xD2511F53, at[2] * 0xCD9E8D57  # 64 bits of a product wrap as they should: only bits are read
        at = [(b >> 32 & low32) ^ at[1] ^ keys[0], b & low32, (a >> 32 & low32) ^ at[3] ^ keys[1], a & low32]
        keys = [(keys[0] + 0x9E3779B9) & low32, (keys[1] + 0xBB67AE85) & low32]
    words = torch.stack([at[i] for i in WORDS], dim=1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return halves.flatten()[:count].to(torch.int32)


# -- the ops ----------------------------------------------------------------------------------------------------------


def case_of_update(rule: str, slot: Slot, grad: Tensor, settings: Settings) -> Case:
    """What a kernel may look at: formats, the parameter's dtype, its shape as quantized, and the gradient's dtype."""
    device = slot.param.device
    extras = [str(grad.dtype).removeprefix("torch.")]
    extras += [word for word, there in (("amsgrad", settings.amsgrad), ("noise", settings.seed is not None)) if there]
    return Case(
        op=rule,
        scheme=slot.scheme,
        device=device.type,
        sm=device_capability(device.type, device.index),
        dtype=str(slot.param.dtype).removeprefix("torch."),
        shape=slot.shape,
        extras=tuple(extras),
    )


def _op(rule: str, what: str) -> Callable[[Step], None]:
    def run(step: Step) -> None:
        if step.slots:
            pick(case_of_update(rule, step.slots[0], step.grads[0], step.settings)).run(step)

    run.__name__ = run.__qualname__ = rule
    run.__doc__ = f"""One step of {what}, in place.

    Raises:
        KernelError: in strict mode, where only the fallback can run it.
    """
    return run


adam = _op("adam", "Adam or AdamW")
sgd = _op("sgd", "gradient descent with momentum")
lion = _op("lion", "Lion")
muon = _op("muon", "Muon, of matrices (further axes count as columns)")


# -- slots in pieces --------------------------------------------------------------------------------------------------


def why_not_flat(fmt: Format) -> str:
    """ "" or why the states of a format cannot be cut anywhere between blocks: they must lie one block after the other."""
    if fmt.is_identity:
        return ""
    if fmt.nested is not None or fmt.zero_point or fmt.element.bits not in (4, 8):
        return f"wants codes of 4 or 8 bits under one plain scale a block, got {fmt}"
    return "" if fmt.block.startswith("1x") else f"wants blocks of a row such as 1x256, got {fmt}"


def flat(slot: Slot) -> Slot:
    """The same slot with every tensor in one axis; its formats must be flat."""
    return dataclasses.replace(
        slot,
        param=slot.param.view(-1),
        states=tuple({name: tensor.view(-1) for name, tensor in packed.items()} for packed in slot.states),
        shape=(slot.param.numel(),),
    )


def piece(slot: Slot, start: int, stop: int) -> Slot:
    """The elements [start, stop) of a flat slot, both multiples of its blocks or its end; views."""
    states = []
    for packed, fmt in zip(slot.states, slot.formats, strict=True):
        width, block = (1, 1) if fmt.is_identity else (8 // fmt.element.bits, int(fmt.block[2:]))
        cut = {"qdata": packed["qdata"][start // width : -(-stop // width)]}
        if "scale" in packed:
            cut["scale"] = packed["scale"][start // block : -(-stop // block)]
        states.append(cut)
    return dataclasses.replace(
        slot,
        param=slot.param[start:stop],
        states=tuple(states),
        shape=(stop - start,),
        start=slot.start + start,
    )
