"""The optimizers against torch's, over formats and options; what they refuse; and what happens to parameters of every kind."""

import copy
import functools
import io

import pytest
import torch
from torch import nn

import lowp.optim as optim
from lowp.errors import LowpError, MisfitError, SpellingError
from lowp.optim.state import SMALLEST, floats, scheme_of, shape_of_states
from lowp.tensor import QTensor

NAMES = [name for name in optim.__all__ if isinstance(getattr(optim, name), type) and name[-3:] in ("bit", "Fp8")]
STATES = ("fp32", "bf16", "dyn8/1x256", "dyn4/1x128", "e4m3/1x256", "int8/1x64", "e4m3/row", ("dyn8/1x128", "fp32"))
TORCH = {
    "AdamW": (optim.AdamW, torch.optim.AdamW, [{}, {"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}]),
    "Adam": (optim.Adam, torch.optim.Adam, [{}, {"weight_decay": 0.1}]),
    "SGD": (
        functools.partial(optim.SGD, momentum=0.9),
        functools.partial(torch.optim.SGD, momentum=0.9),
        [{}, {"weight_decay": 0.1}, {"nesterov": True}, {"dampening": 0.5}],
    ),
}  # fmt: skip


def parameters(device="cpu", dtype=torch.float32):
    shapes = ((64, 256), (16, 2, 128), (4096,), (33, 256), (100, 96), (7,), (), (0, 5), (50, 83))
    return [nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]


def run(make, params, steps=6, seed=0):
    optimizer = make(params)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        optimizer.step()
    return optimizer


def twin(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize(("name", "which"), [(name, i) for name, row in TORCH.items() for i in range(len(row[2]))])
def test_with_float_states_it_is_torchs_optimizer(name, which, device):
    ours, theirs, options = TORCH[name]
    mine, other = (params := parameters(device)), twin(params)
    run(functools.partial(ours, lr=1e-2, state="fp32", **options[which]), mine)
    run(functools.partial(theirs, lr=1e-2, **options[which]), other)
    for p, q in zip(mine, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("name", TORCH)
def test_with_low_precision_states_it_stays_near(name, state, device):
    """The whole movement after six steps, against float32 states; a wrong moment or a lost scale is off by its own size."""
    ours, theirs, _ = TORCH[name]
    mine, other = (params := parameters(device)), twin(params)
    start = twin(params)
    run(functools.partial(ours, lr=1e-2, state=state), mine)
    run(functools.partial(theirs, lr=1e-2), other)
    small = 0.01 if state == "bf16" else 1e-4
    if "int8" in str(state) or "row" in str(state):
        allowed = 10.0  # linear codes lose small second moments: allowed, not advised
    else:
        allowed = 0.3 if "dyn4" in str(state) else 0.03
    for p, q, before in zip(mine, other, start, strict=True):
        if p.numel():
            assert ((p - q).norm() / (q - before).norm()).item() < (
                small if p.numel() < SMALLEST else max(small, allowed)
            ), p.shape


def test_lion_by_hand(device):
    p = nn.Parameter(torch.ones(4, device=device))
    optimizer = optim.Lion([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5, state="fp32")
    p.grad = torch.tensor([1.0, -2.0, 0.0, 3.0], device=device)
    optimizer.step()
    torch.testing.assert_close(p.detach().cpu(), 0.95 - 0.1 * torch.tensor([1.0, -1.0, 0.0, 1.0]))
    torch.testing.assert_close(optimizer.state[p]["exp_avg"].cpu(), 0.01 * torch.tensor([1.0, -2.0, 0.0, 3.0]))


def test_which_states_are_quantized_and_what_they_weigh():
    params = parameters()
    optimizer = run(optim.AdamW8bit, params, steps=1)
    quantized = [isinstance(optimizer.state[p]["exp_avg"], QTensor) for p in params]
    whole = [p.numel() >= SMALLEST and p.numel() % 256 == 0 for p in params]
    assert quantized == whole == [True, True, True, True, False, False, False, False, False]
    for row, p, kept in zip(optimizer.explain(), params, quantized, strict=True):
        assert row[1] == tuple(p.shape) and (row[2] != "fp32") == kept and bool(row[3]) != kept
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in params)
    big = sum(p.numel() for p, kept in zip(params, quantized, strict=True) if kept)
    small = sum(p.numel() for p in params) - big
    assert optimizer.state_nbytes() == 2 * (big + 4 * big // 256) + 8 * small


def test_blocks_run_over_rows_where_they_do_not_divide_them():
    assert shape_of_states(torch.zeros(16, 2, 128), scheme_of("dyn8/1x256"))[0] == (4096,)
    assert shape_of_states(torch.zeros(16, 512), scheme_of("dyn8/1x256"))[0] == (16, 512)
    p = nn.Parameter(torch.zeros(32, 128))
    optimizer = optim.AdamW8bit([p])
    p.grad = torch.randn(32, 128)
    optimizer.step()
    m = optimizer.state[p]["exp_avg"]
    assert m.shape == (32, 128) and m.packed["scale"].shape == (16,)
    torch.testing.assert_close(floats(m), p.grad * 0.1, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_the_names_people_know(name):
    p = nn.Parameter(torch.randn(64, 256))
    optimizer = getattr(optim, name)([p], lr=1e-3, **({"momentum": 0.9} if "SGD" in name else {}))
    p.grad = torch.randn_like(p)
    before = p.detach().clone()
    optimizer.step()
    assert not torch.equal(p, before)
    bits = 4 if "4bit" in name else 8
    moment = next(value for key, value in optimizer.state[p].items() if key != "step")
    assert moment.format.element.bits == bits
    other = getattr(optim, name)([p], block_size=64, **({"momentum": 0.9} if "SGD" in name else {}))
    assert "1x64" in other.param_groups[0]["state"]


def test_groups_differ_in_everything_and_come_later(device):
    a, b, c = (nn.Parameter(torch.randn(64, 256, device=device)) for _ in range(3))
    optimizer = optim.AdamW(
        [{"params": [a], "state": "dyn4/1x128", "lr": 0.0}, {"params": [b], "weight_decay": 0.0}, {"params": []}],
        lr=1e-2,
    )
    for p in (a, b):
        p.grad = torch.randn_like(p)
    before = a.detach().clone()
    optimizer.step()
    assert torch.equal(a, before) and optimizer.state[a]["exp_avg"].scheme == "dyn4/1x128"
    assert optimizer.state[b]["exp_avg"].scheme == "dyn8/1x256"
    optimizer.add_param_group({"params": [c], "state": "fp32", "betas": (0.5, 0.5)})
    c.grad = torch.randn_like(c)
    optimizer.step()
    assert optimizer.state[c]["exp_avg"].dtype == torch.float32 and not isinstance(
        optimizer.state[c]["exp_avg"], QTensor
    )
    assert [int(optimizer.state[p]["step"]) for p in (a, b, c)] == [2, 2, 1]


def test_parameters_without_a_gradient_do_not_step_and_count_for_themselves():
    a, b = (nn.Parameter(torch.randn(64, 256)) for _ in range(2))
    optimizer = optim.AdamW8bit([a, b])
    for grads in ((True, True), (True, False), (True, True)):
        for p, there in zip((a, b), grads, strict=True):
            p.grad = torch.randn_like(p) if there else None
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (a, b)] == [3, 2]


@pytest.mark.parametrize(
    "make", [lambda x: x.t(), lambda x: x[:, ::2], lambda x: x.view(16, 16, 8, 8).to(memory_format=torch.channels_last)]
)
def test_what_is_not_contiguous_is_stepped_all_the_same(make, device):
    x = torch.randn(128, 128, device=device)
    p, q = nn.Parameter(make(x.clone())), nn.Parameter(make(x.clone()).contiguous())
    assert not p.is_contiguous()
    grad = torch.randn(p.shape, device=device)
    for param, g in ((p, torch.empty_like(p).copy_(grad)), (q, grad)):
        param.grad = g
        optim.AdamW8bit([param], lr=1e-2).step()
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: optim.AdamW(p, lr=-1), "lr wants"),
        (lambda p: optim.AdamW(p, betas=(1.0, 0.9)), "beta wants"),
        (lambda p: optim.AdamW(p, state="dyn9/1x256"), "dyn8"),
        (lambda p: optim.AdamW(p, differentiable=True), "torch.optim"),
        (lambda p: optim.SGD(p), "momentum"),
        (lambda p: optim.AdamW(p, state=("fp32",)), "pair"),
    ],
)
def test_what_is_refused_says_what_to_do(make, said):
    with pytest.raises((LowpError, ValueError), match=said):
        make([nn.Parameter(torch.zeros(4))])
    assert issubclass(SpellingError, LowpError)


def test_a_sparse_gradient_is_an_error():
    embedding = nn.Embedding(100, 64, sparse=True)
    optimizer = optim.AdamW8bit(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(MisfitError, match="sparse=False"):
        optimizer.step()


def test_schedulers_closures_and_tensor_learning_rates():
    p, q = (nn.Parameter(torch.ones(64, 256)) for _ in range(2))
    mine, other = optim.AdamW8bit([p], lr=torch.tensor(0.1)), optim.AdamW8bit([q], lr=0.1)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5) for o in (mine, other)]

    def loss(param, optimizer):
        optimizer.zero_grad()
        value = param.square().sum()
        value.backward()
        return value

    for _ in range(4):
        values = [o.step(functools.partial(loss, x, o)) for x, o in ((p, mine), (q, other))]
        for schedule in schedules:
            schedule.step()
    assert torch.equal(p, q) and values[0] == values[1] < 64 * 256


def test_a_grad_scaler_hands_over_its_scale_and_skips_what_overflowed(device):
    """Adam's parameters do not show a wrong scale, its moments do; an infinite gradient may be in neither."""
    results = []
    for scaled in (False, True):
        p = nn.Parameter(torch.ones(64, 256, device=device))
        optimizer = optim.AdamW([p], lr=0.1, state="fp32")
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=scaled)
        for i, factor in enumerate((1.0, float("inf"), 2.0)):
            if factor == float("inf") and not scaled:
                continue
            x = torch.randn(64, 256, generator=torch.Generator().manual_seed(i)).to(device)
            optimizer.zero_grad()
            scaler.scale((p * x).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        state = optimizer.state[p]
        results.append((p.detach(), state["exp_avg"], state["exp_avg_sq"]))
        assert int(state["step"]) == 2
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(plain, scaled)


def test_steps_counted_on_the_device_are_the_same_steps(device):
    """`capturable`: no number of the step is ever asked for on the host."""
    mine, other = (params := parameters(device)), twin(params)
    run(functools.partial(optim.AdamW8bit, lr=1e-2, capturable=False), mine)
    optimizer = optim.AdamW8bit(other, lr=torch.tensor(1e-2, device=device), capturable=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for p in other:
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        optimizer.step()
    for p, q in zip(mine, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert all(optimizer.state[p]["step"].device.type == device.type for p in other)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    p, q = (nn.Parameter(torch.ones(64, 256, device="cuda")) for _ in range(2))
    grads = torch.randn(5, 64, 256, device="cuda")
    mine, other = optim.AdamW8bit([p], capturable=True), optim.AdamW8bit([q], capturable=True)
    p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(2):
            p.grad.copy_(grads[i])
            mine.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.step()
    for i in range(2, 5):
        p.grad.copy_(grads[i])
        graph.replay()
    for i in range(5):
        q.grad.copy_(grads[i])
        other.step()
    assert torch.equal(p, q) and int(mine.state[p]["step"]) == 5


@pytest.mark.gpu
def test_a_cuda_graph_keeps_its_gradients_though_others_are_stepped_between():
    p, q = (nn.Parameter(torch.ones(64, 256, device="cuda")) for _ in range(2))
    grads = torch.randn(5, 64, 256, device="cuda")
    mine, other = optim.AdamW8bit([p], capturable=True), optim.AdamW8bit([q], capturable=True)
    static = torch.zeros_like(p)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        p.grad = grads[0].clone()
        mine.step()
    torch.cuda.current_stream().wait_stream(stream)
    p.grad, graph = static, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.step()
    for i in range(1, 5):
        if i % 2:
            p.grad = grads[i].clone()
            mine.step()
            p.grad = None
        else:
            static.copy_(grads[i])
            graph.replay()
    for grad in grads:
        q.grad = grad.clone()
        other.step()
    assert torch.equal(p, q) and int(mine.state[p]["step"]) == 5


@pytest.mark.parametrize("state", ["dyn8/1x256", "dyn4/1x128", "e4m3/1x256", "fp32"])
def test_a_checkpoint_goes_on_where_it_stopped_bit_for_bit(state, device, tmp_path):
    make = functools.partial(optim.AdamW, lr=1e-2, state=state, stochastic_rounding=True)
    params = parameters(device, torch.bfloat16)
    optimizer = run(make, params, steps=3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    there = twin(params)
    again = make(there)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    generator = torch.Generator().manual_seed(5)
    for p, q in zip(params, there, strict=True):
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        q.grad = p.grad.clone()
    optimizer.step()
    again.step()
    for p, q in zip(params, there, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            other = again.state[q][name]
            same = torch.equal(value, other)
            assert same and (type(value), value.dtype) == (type(other), other.dtype), (name, p.shape)


def test_a_checkpoint_is_a_copy_and_hooks_see_it():
    p = nn.Parameter(torch.randn(64, 256))
    optimizer = run(optim.AdamW8bit, [p], steps=1)
    saved = copy.deepcopy(optimizer.state_dict())
    other = optim.AdamW8bit([nn.Parameter(p.detach().clone())])
    seen = []
    other.register_load_state_dict_pre_hook(lambda o, found: seen.append(list(found["state"])))
    other.register_load_state_dict_post_hook(lambda o: seen.append("after"))
    other.load_state_dict(saved)
    assert seen == [[0], "after"]
    q = other.param_groups[0]["params"][0]
    held = [o["exp_avg"].packed["qdata"] for o in (other.state[q], saved["state"][0])]
    assert torch.equal(*held) and held[0].data_ptr() != held[1].data_ptr()
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    assert file.tell() < 64 * 256 * 2.6


def test_into_torch_and_back(device):
    """Ours -> torch.optim.AdamW -> ours: second moments go back to the same codes, first ones to within their map's step."""
    params = parameters(device)
    optimizer = run(functools.partial(optim.AdamW8bit, lr=1e-2), params, steps=3)
    theirs = torch.optim.AdamW(twin(params), lr=1.0)
    theirs.load_state_dict(optim.to_torch(optimizer.state_dict()))
    assert theirs.param_groups[0]["lr"] == 1e-2 and theirs.param_groups[0]["betas"] == (0.9, 0.999)
    for p, q in zip(params, theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(theirs.state[q]["exp_avg"], floats(optimizer.state[p]["exp_avg"]))
        q.grad = p.grad
    theirs.step()
    assert int(theirs.state[theirs.param_groups[0]["params"][0]]["step"]) == 4
    back = optim.AdamW8bit(twin(params), lr=5.0)
    back.load_state_dict(optim.to_torch(optimizer.state_dict()))
    assert back.param_groups[0]["lr"] == 1e-2 and back.param_groups[0]["state"] == "dyn8/1x256"
    for p, q in zip(params, back.param_groups[0]["params"], strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], back.state[q]["exp_avg_sq"]), p.shape
        before, after = floats(optimizer.state[p]["exp_avg"]), floats(back.state[q]["exp_avg"])
        assert (
            before - after
        ).norm() <= 0.01 * before.norm()  # the signed map holds 1 but not -1: scales may shrink by 0.7 %


def test_between_formats_through_floats():
    params = parameters()
    eight = run(optim.AdamW8bit, params, steps=2)
    four = optim.AdamW4bit(twin(params))
    four.load_state_dict(eight.state_dict())
    p, q = params[0], four.param_groups[0]["params"][0]
    assert four.state[q]["exp_avg"].scheme == "dyn4/1x128" and four.param_groups[0]["state"] == "dyn4/1x128"
    a, b = floats(eight.state[p]["exp_avg"]), floats(four.state[q]["exp_avg"])
    assert ((a - b).norm() / a.norm()).item() < 0.25


def test_a_state_of_another_size_is_an_error():
    a, b = nn.Parameter(torch.randn(64, 256)), nn.Parameter(torch.randn(64, 128))
    saved = run(optim.AdamW8bit, [a], steps=1).state_dict()
    with pytest.raises(MisfitError, match="wants 8192 elements"):
        optim.AdamW8bit([b]).load_state_dict(saved)


def test_bitsandbytes_states_are_taken_code_for_code():
    """Its state dict, made by hand from the published form: codes, absmax of each block of 256, and the map."""
    from lowp.numerics import ELEMENTS, Format, quantize

    p, q = nn.Parameter(torch.randn(64, 256)), nn.Parameter(torch.randn(5000))
    held = {}
    for number, param in enumerate((p, q)):
        held[number] = {"step": 7}
        padded = torch.zeros(-(-param.numel() // 256) * 256)
        for i, name in ((1, "dyn8"), (2, "udyn8")):
            padded[: param.numel()] = torch.rand(param.numel()) * 1e-3
            parts = quantize(padded, Format.parse(f"{name}/1x256"))
            held[number] |= {f"state{i}": parts.qdata[: param.numel()].view(param.shape), f"absmax{i}": parts.scale,
                             f"qmap{i}": ELEMENTS[name].table(torch.device("cpu")).clone()}  # fmt: skip
    optimizer = optim.AdamW8bit([p, q])
    group = {k: v for k, v in optimizer.state_dict()["param_groups"][0].items() if k != "state"}
    optimizer.load_state_dict({"state": held, "param_groups": [group]})
    assert torch.equal(optimizer.state[p]["exp_avg_sq"].packed["qdata"].flatten(), held[0]["state2"].flatten())
    assert int(optimizer.state[p]["step"]) == 7 and optimizer.state[q]["exp_avg"].shape == (5000,)
    value = (
        ELEMENTS["dyn8"].table(torch.device("cpu"))[held[1]["state1"].long()]
        * held[1]["absmax1"].repeat_interleave(256)[:5000]
    )
    assert torch.equal(optimizer.state[q]["exp_avg"], value)


def test_bf16_parameters_learn_what_rounding_to_nearest_loses(device):
    """Steps of 1/16 of bf16's spacing, all one way: with noise the parameters follow float32's, to nearest they stand still."""
    ends = {}
    for noisy in (False, True):
        p = nn.Parameter(torch.ones(64, 256, device=device, dtype=torch.bfloat16))
        optimizer = optim.AdamW8bit([p], lr=2.0**-12, weight_decay=0.0, stochastic_rounding=noisy)
        for _ in range(32):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends[noisy] = 1 - p.float().mean().item()
    assert ends[False] == 0.0 and abs(ends[True] / (32 * 2.0**-12) - 1) < 0.05
