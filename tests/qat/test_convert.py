"""prepare and convert: what is trained is what is kept, for every format; the model stays the float model in all else."""

import copy
import os
import pickle
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowp
from lowp import qat
from lowp.errors import LowpError, MisfitError, QuantizedError, SpellingError
from lowp.numerics import Scheme, known_formats
from lowp.quantize.match import plan
from lowp.tensor import QTensor

SCHEMES = sorted({str(Scheme.parse(known.spelling)) for known in known_formats()} - {"bf16"})  # bf16 quantizes nothing
ACTS = (
    "int4/1x32*bf16@int8/row+int8",
    "int4/1x32*bf16@int8/row",
    "e4m3/row@e4m3/row",
    "e2m1/1x16*e4m3/tensor@e2m1/1x16*e4m3/tensor",
)


class Tied(nn.Module):
    """A token table that is the output layer too, and two layers between."""

    def __init__(self, width=256, dtype=torch.float32):
        super().__init__()
        self.table = nn.Embedding(128, width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 128, bias=False)
        self.head.weight = self.table.weight
        self.to(dtype)

    def forward(self, ids):
        x = self.table(ids)
        return self.head(x + self.down(torch.relu(self.up(x))))


IDS = torch.arange(12).reshape(2, 6) * 7 % 128


def trained(model, steps=2):
    scales = {id(p) for n, p in model.named_parameters() if n.endswith("scale")}
    groups = [
        dict(params=[p for p in model.parameters() if (id(p) in scales) == learned], lr=1e-6 if learned else 1e-3)
        for learned in (False, True)
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    for _ in range(steps):
        model(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def seen(module, name="weight"):
    """The weight as the layer's own forward reads it."""
    module._reading = True
    try:
        return getattr(module, name).detach()
    finally:
        module._reading = False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_kept_is_bit_for_bit_what_was_trained(scheme, dtype, device):
    weight_only = str(Scheme.parse(scheme).weight)
    model = nn.Sequential(nn.Linear(256, 128), nn.Embedding(128, 256)).to(device, dtype)
    rules = {"1": weight_only, "*": scheme}
    qat.prepare(model, rules)
    shown = [seen(module) for module in model]
    report = qat.convert(model)
    assert [row.scheme for row in report.rows] == [scheme, weight_only]
    assert type(model[0]) is nn.Linear and type(model[1]) is nn.Embedding
    for module, wanted in zip(model, shown, strict=True):
        assert isinstance(module.weight, QTensor) and torch.equal(module.weight.dequantize(), wanted)


@pytest.mark.parametrize(
    "kind",
    [
        lambda: (nn.Sequential(nn.Linear(64, 64)), "int4/1x32@int8/row", {}),
        lambda: (nn.Sequential(nn.Embedding(64, 64)), {"0": "int4/1x32"}, {}),
        lambda: (nn.Sequential(nn.Linear(64, 64)), "int4/1x32", {"learn": "weight"}),
        lambda: (nn.Sequential(nn.Linear(64, 64)), "int4/1x32", {"lora": qat.Lora(rank=2, base="int8/row")}),
    ],
)
def test_prepared_models_are_copied_and_pickled(kind):
    model, rules, options = kind()
    x = torch.arange(5) if isinstance(model[0], nn.Embedding) else torch.randn(5, 64)
    qat.prepare(model, rules, **options)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is type(model[0]) and torch.equal(other(x), model(x))
        other(x).sum().backward()
        assert any(p.grad is not None for p in other.parameters()) and all(p.grad is None for p in model.parameters())
        qat.convert(other)


def test_a_refused_conversion_changes_nothing():
    model, x = nn.Sequential(nn.Linear(256, 256)), torch.randn(3, 256)
    qat.prepare(model, "e4m3/128x128", lora=qat.Lora(rank=4))
    y, names = model(x), [name for name, _ in model.named_parameters()]
    with pytest.raises(LowpError):
        qat.convert(model, strict=True)
    assert torch.equal(model(x), y) and [name for name, _ in model.named_parameters()] == names
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    with pytest.raises(MisfitError):
        qat.prepare(model, "int8/row", lora=qat.Lora(base="int4/1x64"))
    assert [type(layer) for layer in model] == [nn.Linear] * 2 and all(
        type(p) is nn.Parameter for p in model.parameters()
    )


@pytest.mark.parametrize(
    ("part", "value"), [("scale", 0.0), ("scale", -1.0), ("scale", float("inf")), ("zero_point", float("nan"))]
)
@pytest.mark.parametrize("scheme", ["int4/1x32*bf16+bf16", "int4/1x32*bf16+int8"])
def test_scales_and_zero_points_that_went_astray_are_not_converted(scheme, part, value):
    model = nn.Sequential(nn.Linear(64, 8))
    qat.prepare(model, scheme, learn="weight")
    with torch.no_grad():
        getattr(model[0].fake_weight, part)[3, 1] = value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(MisfitError, match=r"0: learned .* got 1 .*astray"):
        qat.convert(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())


def test_layers_whose_weight_is_read_elsewhere_are_refused():
    hooked = nn.Sequential(nn.Linear(32, 32))
    hooked[0].forward = hooked[0].forward  # as accelerate's hooks do
    encoder = nn.Sequential(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True))
    for model, rules in (
        (hooked, "int8/row"),
        (encoder, {"*.out_proj": None, "*": "int8/row"}),
        (nn.Sequential(nn.Embedding(8, 32, max_norm=1.0)), {"0": "int8/row"}),
        (nn.Sequential(nn.Embedding(8, 32, sparse=True)), {"0": "int8/row"}),
    ):
        with pytest.raises(MisfitError, match="cannot be prepared"):
            qat.prepare(model, rules)
    tied = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    tied[1].weight = tied[0].weight
    with pytest.raises(MisfitError, match="tied"):
        qat.prepare(tied, "int8/row@int8/row", learn="act")
    with pytest.raises(MisfitError, match="activation"):
        qat.prepare(nn.Sequential(nn.Linear(32, 32)), "int8/row", learn="act")


def test_a_learned_range_starts_from_the_first_batch_that_says_something():
    model = nn.Sequential(nn.Linear(32, 8))
    qat.prepare(model, "int8/row@int8/tensor", learn="act")
    fake = model[0].fake_act
    for nothing in (torch.empty(0, 32), torch.zeros(2, 32), torch.full((2, 32), torch.nan)):
        model(nothing)
        assert fake.scale.item() == 0
    model(torch.full((2, 32), 127.0))
    assert fake.scale.item() == 1
    again = nn.Sequential(nn.Linear(32, 8))
    qat.prepare(again, "int8/row@int8/tensor", learn="act")
    unstarted = again.state_dict()
    model.load_state_dict(unstarted)
    model(torch.full((2, 32), 254.0))
    assert fake.scale.item() == 2
    with torch.no_grad():
        fake.scale.fill_(-1.0)
    with pytest.raises(MisfitError, match="positive"):
        qat.convert(model)
    assert qat.FakeQuantize in type(fake).__mro__ and model[0].fake_act is fake


def test_switches_of_one_fake_quantizer():
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64)
    floats = copy.deepcopy(model)
    qat.prepare(model, "int4/1x32@int8/row")
    model[0].fake_act.enabled = False
    assert torch.equal(model(x), nn.functional.linear(x, seen(model[0]), model[0].bias))
    model[0].fake_weight.enabled = False
    assert torch.equal(model(x), floats(x))
    del model[0].weight
    assert not hasattr(model[0], "weight")


@pytest.mark.parametrize("learn", [(), ("weight", "act")], ids=str)
@pytest.mark.parametrize("scheme", ACTS)
def test_the_converted_model_says_what_the_prepared_one_said(scheme, learn):
    model, act = Tied(), Scheme.parse(scheme).act
    if "act" in learn and (act.zero_point or act.nested):
        with pytest.raises(MisfitError, match="learned range"):
            qat.prepare(model, scheme, learn=learn)
        assert not [m for m in model.modules() if type(m).__name__.startswith("FakeQuantized")]
        return
    qat.prepare(model, scheme, learn=learn)
    trained(model, 3)
    with torch.no_grad():
        wanted = model(IDS)
    qat.convert(model)
    assert ("act_scale" in model.up.weight.packed) == ("act" in learn)
    error = (model(IDS) - wanted).norm() / wanted.norm()
    assert error < (2e-2 if "e2m1" in scheme else 1e-4), error  # a code may flip where sums are added in another order


def test_a_prepared_model_keeps_no_more_for_its_backward():
    """x and W alone: what fake quantization makes is made again."""
    x, kept = torch.randn(8, 256), {}
    for scheme in (None, *ACTS):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
        if scheme:
            qat.prepare(model, scheme)
        own, sizes = {p.data_ptr() for p in model.parameters()}, {}

        def keep(t, own=own, sizes=sizes):
            if t.data_ptr() not in own:
                sizes[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = model(x)
        kept[scheme] = sum(sizes.values())
        del y
    assert set(kept.values()) == {kept[None]}


def test_rules_matching_and_report_are_those_of_quantize():
    rules = {"up": None, "table": "int8/row", "re:.*down": "int4/1x32"}
    model = Tied()
    wanted = plan(model, rules)
    assert qat.prepare(model, rules) == wanted
    report = qat.convert(model)
    other = Tied()
    assert [(r.fqn, r.tied, r.scheme, r.kernel) for r in report.rows if r.scheme] == [
        (r.fqn, r.tied, r.scheme, r.kernel) for r in lowp.quantize_(other, rules).rows if r.scheme
    ]
    for bad, error in (
        ({"nothing": "int4"}, SpellingError),
        ({"up": "int4/1x100"}, MisfitError),
        ("int44", SpellingError),
    ):
        with pytest.raises(error):
            qat.prepare(Tied(), bad)


def test_tied_weights_stay_tied_and_are_quantized_once():
    model = Tied()
    qat.prepare(model, {"table": "int4/1x32", "*": "int8/row"}, learn="weight")
    assert model.head.weight is model.table.weight and model.head.fake_weight is model.table.fake_weight
    trained(model)
    shown = seen(model.head)
    qat.convert(model)
    assert model.head.weight is model.table.weight and torch.equal(model.table.weight.dequantize(), shown)


def test_the_state_dict_is_the_float_models_both_ways():
    model, floats = Tied(), Tied()
    qat.prepare(model, ACTS[0])
    assert list(model.state_dict()) == list(floats.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in floats.named_parameters()]
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    trained(model)
    floats.load_state_dict(model.state_dict())
    assert torch.equal(floats.up.weight, model.up.weight)
    again = Tied()
    qat.prepare(again, ACTS[0])
    again.load_state_dict(floats.state_dict())
    assert torch.equal(again(IDS), model(IDS))


def test_learned_scales_are_parameters_that_move_and_are_saved():
    model = Tied()
    qat.prepare(model, "int4/1x64*bf16+int8@int8/row", learn=("weight", "act"))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "fake" in n}
    assert {n.rpartition(".")[2] for n in before} == {"scale", "zero_point"}
    trained(model)
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[n], p) for n, p in before.items() if n.endswith("scale"))
    again = Tied()
    qat.prepare(again, "int4/1x64*bf16+int8@int8/row", learn=("weight", "act"))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted = model(IDS)
        assert torch.equal(again(IDS), wanted)
    qat.convert(again)
    assert (again(IDS) - wanted).norm() < 1e-4 * wanted.norm()


def test_outside_its_forward_a_layer_shows_its_parameter():
    model = Tied()
    qat.prepare(model, "int2/1x32~mse")
    parameter = model.up._parameters["weight"]
    assert model.up.weight is parameter and isinstance(model.up, nn.Linear)
    model.up.weight.data.mul_(2)  # as who merges adapters does
    assert seen(model.up).abs().max() > 1.5 * model.down.weight.abs().max()
    with pytest.raises(RuntimeError, match="shape"):
        model.up(torch.randn(2, 7))
    assert model.up.weight is parameter  # a forward that failed leaves nothing behind


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3


@pytest.mark.parametrize(
    ("layer", "x", "scheme"),
    [
        (lambda: Scaled(32, 64), torch.arange(5), "int4/1x32"),
        (lambda: nn.Conv2d(4, 8, 3), torch.randn(1, 4, 6, 6), "int8/row"),
        (lambda: nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last), torch.randn(1, 4, 6, 6), "int8/row"),
        (lambda: nn.Conv1d(8, 8, 1, groups=1), torch.randn(1, 8, 6), "int4/row"),
    ],
    ids=["embedding of another class", "conv2d", "channels last", "conv1d"],
)
def test_layers_that_read_their_weight_in_their_own_forward(layer, x, scheme):
    model = nn.Sequential(layer())
    floats = copy.deepcopy(model)
    qat.prepare(model, {"0": scheme})
    y = model(x)
    y.sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    lowp.quantize_(floats, {"0": scheme})
    lowp.dequantize_(floats)
    torch.testing.assert_close(y, floats(x))
    qat.convert(model)
    assert torch.equal(model[0].weight.dequantize(), floats[0].weight)


def test_gpt2s_linear_layer_and_stacks_of_experts():
    transformers = pytest.importorskip("transformers")
    turned = nn.Sequential(transformers.pytorch_utils.Conv1D(32, 64))  # weight (64, 32): in, out
    qat.prepare(turned, "int4/1x32@int8/row")
    x = torch.randn(3, 64)
    y = turned(x)
    qat.convert(turned)
    torch.testing.assert_close(turned(x), y)

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(4, 64, 32)), nn.Parameter(torch.randn(4, 32, 64))

        def forward(self, x):
            return torch.relu(x @ self.up.mT) @ self.down.mT

    model, x = nn.Sequential(Experts()), torch.randn(4, 5, 32)
    qat.prepare(model, "int4/1x32")
    y = model(x)
    y.sum().backward()
    assert model[0].up.grad.abs().sum() > 0 and model[0].down.grad.abs().sum() > 0
    floats = Experts()
    floats.load_state_dict({n.removeprefix("0."): p for n, p in model.state_dict().items()})
    qat.convert(model)
    floats.up, floats.down = (nn.Parameter(p.dequantize()) for p in (model[0].up, model[0].down))
    assert torch.equal(y, floats(x))
    with pytest.raises(MisfitError, match="experts"):
        qat.prepare(nn.Sequential(Experts()), "int4/1x32@int8/row")


def test_refusals_are_sentences():
    model = Tied()
    with pytest.raises(MisfitError, match="prepare"):
        qat.convert(model)
    with pytest.raises(MisfitError, match="prepare"):
        qat.enable(model)
    qat.prepare(model, "int8/row")
    with pytest.raises(QuantizedError, match="prepared already"):
        qat.prepare(model, "int8/row")
    with torch.no_grad():
        model.up.weight[3, 5] = torch.nan
    with pytest.raises(MisfitError, match=r"up\.weight.*1 NaN"):
        qat.convert(model)
    assert type(model.down).__name__ == "FakeQuantizedLinear"  # nothing was changed
    with pytest.raises(MisfitError, match="NaN"):
        broken = Tied()
        broken.up.weight.data[0, 0] = torch.nan
        qat.prepare(broken, "int8/row")
    with pytest.raises(SpellingError, match="learn"):
        qat.prepare(Tied(), "int8/row", learn="weights")
    with pytest.raises(SpellingError, match="clamp"):
        qat.prepare(Tied(), "int8/row", clamp="stop")
    with pytest.raises(MisfitError, match="MultiheadAttention"):
        qat.prepare(nn.MultiheadAttention(32, 2), "int8/row")
    skipped = qat.prepare(nn.MultiheadAttention(32, 2), "int8/row", on_misfit="skip")
    assert [row.scheme for row in skipped.rows] == [None] and "MultiheadAttention" in skipped.rows[0].why
    quantized = Tied()
    lowp.quantize_(quantized, "int8/row")
    with pytest.raises(QuantizedError):
        qat.prepare(quantized, "int8/row")
    empty = Tied().to("meta")
    assert qat.prepare(empty, "int8/row").rows  # a plan needs no numbers
    with pytest.raises(MisfitError, match="device meta"):
        qat.convert(empty)
    unseen = Tied()
    qat.prepare(unseen, "int8/row@int8/row", learn="act")
    with pytest.raises(MisfitError, match="at least one batch"):
        qat.convert(unseen)
    assert issubclass(QuantizedError, LowpError)


def test_degenerate_weights():
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    with torch.no_grad():
        model[0].weight[0], model[0].weight[1] = 0, 1e-40
        model[0].weight[2] *= 1e37
    qat.prepare(model, "int4/1x32*bf16@int8/row")
    y = model(torch.randn(3, 64))
    y[:, 3:].sum().backward()
    assert y.isfinite().all() and (y[:, 0] == 0).all() and model[0].weight.grad.isfinite().all()
    qat.convert(model)
    assert (model[0].weight.dequantize()[0] == 0).all()


def test_delayed_start():
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(4, 64)
    floats = copy.deepcopy(model)
    qat.prepare(model, "int2/1x32~mse", enabled=False)
    assert torch.equal(model(x), floats(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = qat.start_after(optimizer, model, 2)
    outputs = []
    for _ in range(3):
        y = model(x)
        y.sum().backward()
        outputs.append(torch.equal(y, floats(x)))
        optimizer.step()
    handle.remove()
    assert outputs == [True, True, False]
    qat.disable(model)
    assert torch.equal(model(x), floats(x))


# -- in company -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", [(), ("weight", "act")], ids=str)
def test_compile_keeps_one_graph_and_the_numbers(learn):
    model = Tied(64)
    qat.prepare(model, ACTS[1], learn=learn)
    model(IDS)  # learned ranges start
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if learn else "inductor")
    for _ in range(2):
        answers = []
        for run in (model, compiled):
            model.zero_grad()
            y = run(IDS)
            y.square().mean().backward()
            answers.append((y.detach(), *(p.grad.clone() for p in model.parameters())))
        for eager, traced in zip(*answers, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-6)


def test_a_learned_range_starts_inside_a_graph_too():
    model = nn.Sequential(nn.Linear(64, 8))
    qat.prepare(model, "int8/row@int8/tensor", learn="act")
    x = torch.randn(4, 64)
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert model[0].fake_act.scale.item() == pytest.approx(x.abs().max().item() / 127)
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    grads = []
    for wrap in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(4, 64, requires_grad=True)
        qat.prepare(model, ACTS[0])
        y = checkpoint(model, x, use_reentrant=reentrant) if wrap else model(x)
        y.square().sum().backward()
        grads.append([p.grad for p in model.parameters()] + [x.grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_and_autocast(dtype, device):
    model = nn.Sequential(nn.Linear(64, 64)).to(device, dtype)
    qat.prepare(model, ACTS[1])
    x = torch.randn(4, 64, device=device, dtype=dtype)
    y = model(x)
    y.sum().backward()
    assert y.dtype == dtype and model[0].weight.grad.dtype == dtype
    if dtype == torch.float32:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            low = model(x)
        low.sum().backward()
        assert low.dtype == torch.bfloat16 and (low - y).norm() < 0.01 * y.norm()
        assert torch.equal(seen(model[0]), lowp.QTensor.quantize(model[0].weight, "int4/1x32*bf16").dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_learned_scales_beside_weights_of_low_precision(dtype):
    model = nn.Sequential(nn.Linear(64, 32)).to(dtype)
    qat.prepare(model, "int4/1x32*bf16@int8/row", learn=("weight", "act"))
    x = torch.randn(4, 64, dtype=dtype)
    y = model(x)
    y.float().square().sum().backward()
    scale = model[0].fake_weight.scale
    assert scale.dtype == torch.float32 and scale.grad.abs().sum() > 0 and model[0].weight.grad.dtype == dtype
    shown = seen(model[0])
    qat.convert(model)
    assert torch.equal(model[0].weight.dequantize(), shown)
    assert (model(x) - y).float().norm() < 0.01 * y.float().norm()


def test_dtypes_that_do_not_go_together_are_torchs_error():
    model = nn.Sequential(nn.Linear(64, 32))
    qat.prepare(model, "int4/1x32")
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(2, 64, dtype=torch.bfloat16))


def step(model, ids):
    loss = model(ids).square().mean()
    loss.backward()
    return loss


def data_parallel(rank, world):
    """DDP and FSDP2 on halves of the batch: the gradients of one process on the whole."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    for learn in ((), ("weight", "act")):

        def build(learn=learn):
            torch.manual_seed(0)
            model = Tied(64)
            qat.prepare(model, ACTS[1], learn=learn)
            return model

        whole = build()
        step(whole, IDS)
        wrapped = DistributedDataParallel(build())
        step(wrapped, IDS.chunk(world)[rank])
        if learn:  # every rank starts its ranges from the same number
            starts = torch.stack([p.detach() for n, p in wrapped.named_parameters() if n.endswith("fake_act.scale")])
            found = [torch.empty_like(starts) for _ in range(world)]
            dist.all_gather(found, starts)
            assert torch.equal(*found) and (starts > 0).all()
            continue
        for (name, p), q in zip(whole.named_parameters(), wrapped.module.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-7, msg=name)
        sharded = build()
        for layer in (sharded.up, sharded.down):
            fully_shard(layer)
        fully_shard(sharded)
        step(sharded, IDS.chunk(world)[rank])
        for (name, p), q in zip(whole.named_parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-4, atol=1e-7, msg=name)
        with pytest.raises(MisfitError, match="whole weight"):
            qat.convert(sharded)
        with pytest.raises(MisfitError, match="before it is sharded"):
            qat.prepare(fully_shard(Tied(64)), "int8/row")
        gathered = {name: p.full_tensor() for name, p in sharded.named_parameters()}
        whole.load_state_dict(gathered | {"head.weight": gathered["table.weight"]})
        qat.convert(whole)


def work(rank, world, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        data_parallel(rank, world)
        dist.barrier()  # nobody leaves while the other still speaks
    finally:
        dist.destroy_process_group()
    os._exit(0)  # what a process group leaves running need not outlive Python's own end


@pytest.mark.multi
def test_two_processes():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, args=(2, port), nprocs=2)
