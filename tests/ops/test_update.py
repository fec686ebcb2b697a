"""The ops adam, sgd and lion: against torch's optimizers in float32, and every kernel against the reference, byte for byte.

Triton's kernels run in its interpreter on a CPU, which plays an sm90, and for real on a GPU. Codes and scales are compared bit
for bit. So is the parameter, but for adam: the hardware's square root and quotient are each off by a bit or two of the movement,
which is as much as many bits of a parameter that it nearly cancels.
"""

import dataclasses
import gc
import itertools
import math
import weakref

import numpy as np
import pytest
import torch

from lowp.kernels.cpu.library import missing
from lowp.kernels.triton_ import interpreted
from lowp.layouts import Spec, layout_of
from lowp.numerics import ELEMENTS, Format, quantize
from lowp.ops import kernels_of, update
from lowp.ops.update import (
    Settings,
    Slot,
    Step,
    coefficients,
    coefficients_on_device,
    formats_of,
    noise,
    piece,
    read,
    reference,
)

RULES = ("adam", "sgd", "lion")
MOMENTS = {"adam": 2, "sgd": 1, "lion": 1}
SCHEMES = (
    "dyn8/1x256@udyn8/1x256",
    "dyn4/1x128@ulin4/1x128",
    "e4m3/1x256",
    "fp32",
    "bf16",
    "dyn8/1x256@fp32",
    "e5m2/1x64",
)
SETTINGS = {
    "plain": Settings(),
    "decoupled": Settings(weight_decay=0.1, decoupled=True),
    "coupled, up, amsgrad, nesterov": Settings(
        weight_decay=0.1, maximize=True, amsgrad=True, nesterov=True, dampening=0.0
    ),
    "noise": Settings(seed=11),
}


def slots_of(rule, scheme, sizes, dtype, device, settings, steps=1):
    """Parameters, and states that a few steps have filled."""
    slots = []
    count = 3 if rule == "adam" and settings.amsgrad else MOMENTS[rule]
    for key, size in enumerate(sizes):
        states = []
        for i, fmt in enumerate(formats_of(scheme)[:count]):
            value = torch.randn(size) * 10.0 ** torch.randint(-6, 0, (size,)) * steps
            parts = quantize(value if i == 0 else value.square(), fmt)
            packed = layout_of("plain").pack(parts, Spec(scheme=str(fmt), layout="plain", shape=(size,)))
            states.append({name: tensor.to(device) for name, tensor in packed.items()})
        param = torch.randn(size).to(device, dtype)
        slots.append(Slot(param=param, states=tuple(states), scheme=scheme, shape=(size,), key=key))
    return slots


def copied(slots):
    return [
        dataclasses.replace(
            slot,
            param=slot.param.clone(),
            states=tuple({name: tensor.clone() for name, tensor in packed.items()} for packed in slot.states),
        )
        for slot in slots
    ]


def step_of(slots, grads, settings, numbers, grad_scale=None, found_inf=None):
    return Step(
        slots=slots, grads=grads, settings=settings, numbers=numbers, grad_scale=grad_scale, found_inf=found_inf
    )


def able(rule, slots, grads, settings):
    """The kernels that can run these slots, the reference aside; Triton's as if for an sm90 where its interpreter runs them."""
    case = update.case_of_update(rule, slots[0], grads[0], settings)
    found = []
    for kernel in kernels_of(rule):
        run = getattr(kernel.run, "func", kernel.run)
        asked = case
        if run.__module__.startswith("lowp.kernels.triton_.") and case.device == "cpu" and interpreted():
            asked = dataclasses.replace(case, device="cuda", sm=90)
        why = kernel.why_not(asked)
        assert not why or why.startswith("wants"), why
        if not why and not kernel.fallback:
            found.append(kernel)
    return found


def is_exact(rule, device):
    """Whether the parameter is compared bit for bit too: adam has a square root, and torch's own on a CPU is not IEEE's."""
    return device.type == "cpu" and rule != "adam"


MOVEMENT = (
    4 * 2.0**-23
)  # square root 2 bits, inverse 1, three roundings that a fused multiply-add leaves out: see PTX ISA 9.7.3


def assert_same_slots(got, wanted, exact, before=None):
    """before: the parameters before the step, where these may differ by a share of their movement."""
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        for mine, theirs in zip(a.states, b.states, strict=True):
            for name in theirs:
                x, y = (t[name].contiguous().view(torch.uint8) for t in (mine, theirs))
                assert torch.equal(x, y), (name, (x != y).sum().item())
        if exact:
            assert torch.equal(a.param, b.param)
        else:
            mine, theirs = a.param.double(), b.param.double()
            moved = theirs - (before or wanted)[i].param.double()
            allowed = 2 * torch.finfo(a.param.dtype).eps * theirs.abs() + MOVEMENT * moved.abs()
            assert ((mine - theirs).abs() <= allowed).all(), ((mine - theirs).abs() / allowed).max().item()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("rule", "settings"), list(itertools.product(RULES, SETTINGS)), ids=str)
def test_every_kernel_writes_the_bytes_of_the_reference(rule, settings, scheme, device, poison):
    settings = SETTINGS[settings]
    on_device = coefficients_on_device(rule, settings, 1e-2, torch.tensor(3.0, device=device))
    for dtype, number in ((torch.bfloat16, coefficients(rule, settings, 1e-2, 3)), (torch.float32, on_device)):
        slots = slots_of(rule, scheme, (512, 1280), dtype, device, settings)
        grads = [torch.randn(slot.param.numel(), device=device).mul_(0.1).to(dtype) for slot in slots]
        expected = copied(slots)
        reference(rule, step_of(expected, grads, settings, number))
        for kernel in able(rule, slots, grads, settings):
            mine = copied(slots)
            kernel.run(step_of(mine, grads, settings, number))
            assert_same_slots(mine, expected, exact=is_exact(rule, device), before=slots)


def test_the_kernels_are_those_that_the_formats_want(device):
    settings, device_kernel = Settings(), {"cpu": "pieces", "cuda": "fused"}[device.type]
    names = {}
    for scheme in (*SCHEMES, "int8/row", "nf4/1x64"):
        slots = slots_of("adam", scheme, (512,), torch.bfloat16, device, settings)
        names[scheme] = [kernel.name for kernel in able("adam", slots, [slots[0].param], settings)]
    assert all(device_kernel in names[scheme] for scheme in SCHEMES), names
    in_cpp = {scheme for scheme in names if "native" in names[scheme]}
    assert in_cpp == (set() if device.type != "cpu" or missing() else {*SCHEMES[:2], "fp32", SCHEMES[5], "nf4/1x64"})
    assert names["int8/row"] == []


@pytest.mark.parametrize("rule", RULES)
def test_scaled_gradients_and_a_step_that_is_skipped(rule, device):
    settings = Settings()
    scheme = "dyn8/1x256@udyn8/1x256"
    slots = slots_of(rule, scheme, (512,), torch.float32, device, settings)
    grads = [torch.randn(512, device=device)]
    number = coefficients(rule, settings, 1e-2, 2)
    expected = copied(slots)
    reference(rule, step_of(expected, grads, settings, number))
    scale, zero, one = (torch.tensor(value, device=device) for value in (1024.0, 0.0, 1.0))
    run = [kernel.run for kernel in able(rule, slots, grads, settings)]
    for kernel in (*run, lambda step: reference(rule, step)):
        scaled, skipped = copied(slots), copied(slots)
        kernel(step_of(scaled, [grads[0] * 1024], settings, number, scale, zero))
        assert_same_slots(scaled, expected, exact=is_exact(rule, device), before=slots)
        kernel(step_of(skipped, [grads[0] * math.inf], settings, number, scale, one))
        assert_same_slots(skipped, slots, exact=True)


def test_a_quotient_in_two_instructions_is_ieees():
    """What the kernel does on a GPU, in NumPy's widest float: 1 / scale in two floats, the first off by up to a bit."""
    count, wide = 1 << 20, np.longdouble
    if np.finfo(wide).nmant < 63:
        pytest.skip("needs a long double of 64 bits")
    rng = np.random.default_rng(0)
    scale = (rng.random(count) + 1).astype(np.float32) * np.exp2(rng.integers(-90, 90, count)).astype(np.float32)
    x = (scale * rng.random(count).astype(np.float32)).astype(np.float32)
    for off in (-1, 0, 1):
        high = ((np.float32(1) / scale).view(np.int32) + off).view(np.float32)
        high = (wide(high) + wide((1 - wide(high) * wide(scale)).astype(np.float32)) * wide(high)).astype(np.float32)
        low = (1 - wide(high) * wide(scale)).astype(np.float32) * high
        quotient = (wide(x) * wide(high) + wide(x * low)).astype(np.float32)
        assert (quotient == x / scale).all()
    inverse = np.float32(1 / 448)
    rest = np.float32(1 / 448 - float(inverse))
    assert ((wide(x) * wide(inverse) + wide(x * rest)).astype(np.float32) == x / np.float32(448)).all()


def test_pieces_are_the_whole(device):
    settings = Settings(seed=3)
    slots = slots_of("adam", "dyn4/1x128@ulin4/1x128", (1024,), torch.bfloat16, device, settings)
    grad, number = torch.randn(1024, device=device), coefficients("adam", settings, 1e-2, 1)
    parts = copied(slots)
    reference("adam", step_of(slots, [grad], settings, number))
    for start, stop in ((0, 384), (384, 896), (896, 1024)):
        reference("adam", step_of([piece(parts[0], start, stop)], [grad[start:stop]], settings, number))
    assert_same_slots(parts, slots, exact=True)


def test_noise_is_philox():

    drawn = noise(1 << 16, 0, 5, 9, 2, torch.device("cpu")).double()
    assert drawn.min() >= 0 and drawn.max() < 65536
    assert abs(drawn.mean() / 32767.5 - 1) < 0.01 and abs(drawn.std() / (65536 / 12**0.5) - 1) < 0.01
    assert not torch.equal(drawn, noise(1 << 16, 0, 5, 10, 2, torch.device("cpu")).double())
    assert not torch.equal(drawn, noise(1 << 16, 0, 5, 9, 3, torch.device("cpu")).double())
    assert torch.equal(noise(64, 128, 5, 9, 2, torch.device("cpu")).double(), drawn[128:192])
    pairs = torch.corrcoef(torch.stack([drawn[i::8] for i in range(8)]))
    assert (pairs - torch.eye(8)).abs().max() < 0.05


def test_rounding_with_noise_is_unbiased_and_rounding_to_nearest_is_not(device):
    """A step of a tenth of bf16's spacing: the mean of many parameters moves by it, to nearest none moves at all."""
    count, step = 1 << 16, 2.0**-7 / 10  # around 1 the spacing of bf16 is 2**-7
    moved = {}
    for seed in (None, 0):
        settings = Settings(beta1=0.0, seed=seed)
        param = torch.ones(count, dtype=torch.bfloat16, device=device)
        slot = Slot(param=param, states=({"qdata": torch.zeros(count, device=device)},), scheme="fp32", shape=(count,))
        grad = torch.full((count,), -1.0, device=device)
        reference("sgd", step_of([slot], [grad], settings, coefficients("sgd", settings, step, 1)))
        moved[seed] = (param.float().mean().item() - 1) / step
    assert moved[None] == 0.0
    deviation = math.sqrt(0.1 * 0.9) * 10 / math.sqrt(count)  # of the mean, in steps: it is 0 or 10 steps
    assert abs(moved[0] - 1) < 5 * deviation and deviation < 0.02


def test_the_states_are_those_of_quantize(device):
    """The bytes of a state are numerics' own of the updated moment, by hand for Adam's first step."""
    settings, scheme = Settings(), "dyn8/1x256@udyn8/1x256"
    (slot,) = slots_of("adam", scheme, (512,), torch.float32, device, settings)
    zero = [quantize(torch.zeros(512, device=device), fmt).tensors() for fmt in formats_of(scheme)[:2]]
    slot, grad = dataclasses.replace(slot, states=tuple(zero)), torch.randn(512, device=device)
    update.adam(step_of([slot], [grad], settings, coefficients("adam", settings, 1e-3, 1)))
    for packed, value, fmt in zip(
        slot.states, (grad * (1 - 0.9), grad * grad * (1 - 0.999)), formats_of(scheme), strict=False
    ):
        parts = quantize(value, fmt)
        assert torch.equal(packed["qdata"], parts.qdata) and torch.equal(packed["scale"], parts.scale)
        spec = Spec(scheme=str(fmt), layout="plain", shape=(512,))
        error = (read(packed, spec) - value).abs()
        gap = max(b - a for a, b in itertools.pairwise(sorted(ELEMENTS[fmt.element.name].values)))
        assert (error <= 0.51 * gap * parts.scale.repeat_interleave(256)).all()


def test_one_format_serves_both_moments_and_a_pair_each_its_own():
    assert [str(fmt) for fmt in formats_of("e4m3/1x256")] == ["e4m3/1x256"] * 3
    assert [str(fmt) for fmt in formats_of("dyn8/1x256@fp32")] == ["dyn8/1x256", "fp32", "fp32"]
    assert str(Format.parse("dyn8/1x256")) == "dyn8/1x256"


SIZES = {  # several tiles, tiles that end inside a block's row, one element, none, odd numbers
    "dyn8/1x256@udyn8/1x256": (8192 * 2 + 512, 256, 8192),
    "dyn4/1x128@ulin4/1x128": (4096 + 128, 8192),
    "fp32": (5, 4099, 1, 0, 7),
    "e4m3/1x256": (8192 + 256,),
    "bf16": (2049, 3),
    "dyn8/1x2048@fp32": (3 * 2048,),
}
DTYPES = ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.bfloat16))


@pytest.mark.parametrize("scheme", SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_sizes_of_many_tiles_and_of_none(rule, scheme, device, poison, monkeypatch):
    """Every pair of dtypes, two steps with gradients elsewhere, one of them at an odd address; and small pieces on the CPU."""
    from lowp.kernels.torch_ import update as pieces

    monkeypatch.setattr(pieces, "_PIECE", 1024)
    every = (
        Settings(seed=11, amsgrad=True, weight_decay=0.1),
        Settings(maximize=True, decoupled=True, weight_decay=0.1),
    )
    for (dtype, grad_dtype), settings in zip(DTYPES, (*every, every[0]), strict=True):
        slots = slots_of(rule, scheme, SIZES[scheme], dtype, device, settings)
        if scheme == "fp32":  # a slot in the middle of a parameter
            slots[0] = dataclasses.replace(slots[0], start=1 << 20)
        numel = [slot.param.numel() for slot in slots]
        grads = [[torch.randn(n + 1, device=device).to(grad_dtype)[i:][:n] for n in numel] for i in range(2)]
        runs = [kernel.run for kernel in able(rule, slots, grads[0], settings)]
        results = []
        for run in (lambda step: reference(rule, step), *runs):
            mine = copied(slots)
            for step, given in enumerate(grads, 3):
                run(step_of(mine, given, settings, coefficients(rule, settings, 1e-2, step)))
                results.append(copied(mine)) if step == 3 else None
            results.append(mine)
        for i in range(2, len(results), 2):
            assert_same_slots(results[i], results[0], exact=is_exact(rule, device), before=slots)
            if is_exact(rule, device):
                assert_same_slots(results[i + 1], results[1], exact=True)
            else:  # a last bit of the first step's parameter may reach the second step's states through weight decay
                for mine, theirs in zip(results[i + 1], results[1], strict=True):
                    near = 4 * torch.finfo(dtype).eps
                    torch.testing.assert_close(mine.param, theirs.param, rtol=near, atol=1e-6)


@pytest.mark.parametrize("seed", [5, 2**31 + 3, 2**32 + 5, 2**40 + 5, -1])
def test_any_seed_is_the_same_noise_everywhere_and_other_noise_at_each_step(seed, device):
    settings, seen = Settings(seed=seed), []
    slots = slots_of("sgd", "fp32", (512,), torch.bfloat16, device, settings)
    grads = [torch.randn(512, device=device)]
    for step in (1, 2, 257):
        drawn = noise(512, 0, seed, step, 0, torch.device("cpu"))
        assert not any(torch.equal(drawn, other) for other in seen)
        seen.append(drawn)
        number = coefficients("sgd", settings, 1e-2, step)
        expected = copied(slots)
        reference("sgd", step_of(expected, grads, settings, number))
        for kernel in able("sgd", slots, grads, settings):
            mine = copied(slots)
            kernel.run(step_of(mine, grads, settings, number))
            assert_same_slots(mine, expected, exact=True)


def fused_of(rule, slots, settings):
    (kernel,) = [k for k in able(rule, slots, [slots[0].param], settings) if k.name == "fused"]
    return kernel


@pytest.mark.parametrize("rule", RULES)
def test_a_compiled_kernel_gets_the_types_it_was_compiled_for(rule, device, monkeypatch):
    """Whole numbers where floats are usual, seeds of any size: one key, one type for each argument, and none beyond 32 bits."""
    from lowp.kernels.triton_ import update as fused

    seen = {}
    monkeypatch.setattr(
        fused, "launch", lambda kernel, key, grid, args, *rest, **more: seen.setdefault(key, []).append(args)
    )
    for seed in (0, 5, 2**31 + 3, 2**40 + 5, -1):
        for number in (0, 0.0):
            settings = Settings(
                beta1=number, beta2=number, eps=number, dampening=number, weight_decay=number, seed=seed
            )
            slots = slots_of(rule, "fp32", (512,), torch.bfloat16, device, settings)
            for step in (1, 2):
                coefficient = coefficients(rule, settings, number + 1, step)
                fused_of(rule, slots, settings).run(step_of(slots, [slots[0].param], settings, coefficient))
    assert len(seen) == 1
    ((first, *others),) = seen.values()
    assert all(list(map(type, args)) == list(map(type, first)) for args in others)
    numbers = [x for args in (first, *others) for x in args if type(x) is int]
    assert len(numbers) == 2 * (1 + len(others)) and all(-(2**31) <= x < 2**31 for x in numbers)


def test_a_table_is_never_written_again(device, monkeypatch):
    """One that a graph has captured stays, whatever steps come after it."""
    from lowp.kernels.triton_ import update as fused

    slots = slots_of("adam", "fp32", (512, 256), torch.bfloat16, device, Settings())
    one, two = ([torch.randn(slot.param.numel(), device=device) for slot in slots] for _ in range(2))
    plan = fused._plan(slots, 2048)
    eager = fused._table(plan, one)
    assert fused._table(plan, one) is eager
    three = [grad.clone() for grad in one]
    with monkeypatch.context() as patch:
        patch.setattr(fused, "capturing", lambda device: True)
        assert fused._table(plan, one) is eager  # nothing to copy at each replay
        elsewhere = fused._table(plan, three)
    assert fused._table(plan, one) is eager and elsewhere.device[:, 1].tolist() == [grad.data_ptr() for grad in three]
    captured = eager
    del eager
    held = weakref.ref(captured)
    before = captured.device.clone()
    moved = fused._table(plan, two)
    assert moved.device[:, 1].tolist() == [grad.data_ptr() for grad in two]
    assert torch.equal(captured.device, before) and before[:, 1].tolist() == [grad.data_ptr() for grad in one]
    del captured, before
    gc.collect()
    assert held() is not None and fused._plan(slots, 2048) is plan
    assert fused._table(plan, two) is moved


def test_one_odd_address_is_not_remembered(device):
    from lowp.kernels.triton_ import update as fused

    slots = slots_of("adam", "fp32", (512,), torch.float32, device, Settings())
    even, odd = torch.randn(512, device=device), torch.randn(513, device=device)[1:]
    plan = fused._plan(slots, 2048)
    assert [fused._table(plan, [grad]).aligned for grad in (even, odd, even)] == [True, False, True]


def test_tables_follow_gradients_that_move_and_go_with_their_parameters(device):
    """Three steps with gradients at new addresses each, of two lists that take turns; then nothing is kept."""
    from lowp.kernels.triton_ import update as fused

    gc.collect()
    settings, scheme = Settings(), "e4m3/1x256"
    lists = [slots_of("adam", scheme, (512, 256), torch.bfloat16, device, settings) for _ in range(2)]
    expected, kept, before = [copied(slots) for slots in lists], [], len(fused._PLANS)
    kernel = fused_of("adam", lists[0], settings)
    for step in range(1, 4):
        for slots, wanted in zip(lists, expected, strict=True):
            grads = [torch.randn(slot.param.numel(), device=device).bfloat16() for slot in slots]
            kept.append(grads)
            number = coefficients("adam", settings, 1e-2, step)
            start = copied(wanted)
            kernel.run(step_of(slots, grads, settings, number))
            reference("adam", step_of(wanted, grads, settings, number))
            assert_same_slots(slots, wanted, exact=False, before=start)
            for mine, theirs in zip(slots, wanted, strict=True):  # the next step starts from the same numbers
                mine.param.copy_(theirs.param)
    assert len(fused._PLANS) == before + 2
    del slots, wanted
    lists.clear()
    gc.collect()
    assert len(fused._PLANS) == before
