"""State dicts from elsewhere: what is taken, what is refused in words, and that nothing is lost or half taken."""

import copy
import io

import pytest
import torch
from torch import nn

import lowp.optim as optim
from lowp.errors import LowpError, MisfitError
from lowp.numerics import ELEMENTS, Format, quantize
from lowp.optim.state import floats


def parameter(shape=(64, 256), seed=0):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def step(optimizer, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    return optimizer


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


@pytest.mark.parametrize("state", ["dyn8/1x256", "fp32"])
@pytest.mark.parametrize("through", ["files", "memory"])
def test_counts_that_differ_come_back_through_torchs_checkpoints(through, state, tmp_path):
    """The second layer had no gradient in two of three steps: counts 3, 3, 1, 1, and no state twice."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, other = network(), network()
    optimizer, fresh = (optim.AdamW(m.parameters(), state=state) for m in (model, other))
    for i in range(3):
        for name, p in model.named_parameters():
            p.grad = None if i and name.startswith("1") else torch.randn_like(p)
        optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer)
    if through == "files":
        dcp.save({"o": saved}, checkpoint_id=tmp_path, no_dist=True)
        found = {"o": get_optimizer_state_dict(other, fresh)}
        dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
        saved = found["o"]
    set_optimizer_state_dict(other, fresh, saved)
    assert [int(fresh.state[p]["step"]) for p in other.parameters()] == [3, 3, 1, 1]
    assert len(fresh.state) == len(fresh.state_dict()["state"]) == 4
    assert fresh.state_nbytes() == optimizer.state_nbytes()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(floats(optimizer.state[p]["exp_avg"]), floats(fresh.state[q]["exp_avg"]))


def bitsandbytes(wrapped, size=64 * 256):
    """A state as bitsandbytes keeps it, by the published form, and the group that it writes."""
    state = {}
    for i, name in ((1, "dyn8"), (2, "udyn8")):
        parts = quantize(torch.rand(size) * 1e-3, Format.parse(f"{name}/1x256"))
        table = ELEMENTS[name].table(torch.device("cpu")).clone()
        state |= {f"state{i}": parts.qdata.view(-1, 256), f"absmax{i}": parts.scale, f"qmap{i}": table}
    held = {"step": 7} | ({"__bnb_optimizer_quant_state__": state} if wrapped else state)
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "alpha": 0.0, "t_alpha": None,
             "t_beta3": None, "params": [0]}  # fmt: skip
    return {"state": {0: held}, "param_groups": [group]}, state


@pytest.mark.parametrize("wrapped", [False, True])
def test_bitsandbytes_as_it_saves_today_and_before(wrapped):
    given, state = bitsandbytes(wrapped)
    p = parameter()
    optimizer = optim.AdamW8bit([p], amsgrad=True)
    optimizer.load_state_dict(given)
    for i, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
        assert torch.equal(optimizer.state[p][name].packed["qdata"], state[f"state{i}"])
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"} and int(optimizer.state[p]["step"]) == 7
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    step(optimizer)
    assert int(optimizer.state[p]["step"]) == 8


def torchao_like(elements):
    class State(torch.Tensor):
        """A tensor with torchao's attributes."""

    made = torch.zeros(64, 256).as_subclass(State)
    made.codes, made.scale = torch.zeros(elements, dtype=torch.uint8), torch.ones(elements // 256)
    made.qmap = ELEMENTS["dyn8"].table(torch.device("cpu"))
    return {"step": torch.tensor(1.0), "exp_avg": made, "exp_avg_sq": made}


def no_maps():
    state = bitsandbytes(False)[1]
    return {"step": 7} | {name: value for name, value in state.items() if "absmax" not in name}


def floats_of(shape):
    return {"step": torch.tensor(1.0), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}


WRONG = {
    "another shape": (floats_of((256, 64)), "in that shape or flat"),
    "another size": (floats_of((8,)), "wants 16384 elements"),
    "no moments": ({"step": 7, "whatever": torch.zeros(4)}, "wants exp_avg, exp_avg_sq, got step, whatever"),
    "one moment": ({"step": 7, "exp_avg": torch.zeros(64, 256)}, "wants exp_avg, exp_avg_sq"),
    "no count": ({name: value for name, value in floats_of((64, 256)).items() if name != "step"}, "wants step"),
    "torchao's of another size": (torchao_like(2 * 64 * 256), "codes"),
    "bitsandbytes' with a scale a tensor": (no_maps(), "block_wise"),
    "bitsandbytes' of another size": (bitsandbytes(False, 64 * 512)[0]["state"][0], "wants 16384 elements"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused_in_words_and_changes_nothing(what):
    state, said = WRONG[what]
    p, q = parameter(), parameter(seed=1)
    optimizer = step(optim.AdamW8bit([p, q], lr=0.1))
    before = copy.deepcopy(optimizer.state_dict())
    other = {**optimizer.state_dict()["param_groups"][0], "lr": 0.5}
    good = floats_of((64, 256))
    with pytest.raises(MisfitError, match=said):
        optimizer.load_state_dict({"state": {0: good, 1: state}, "param_groups": [other]})
    now = optimizer.state_dict()
    assert now["param_groups"] == before["param_groups"]
    for number, held in before["state"].items():
        for name, value in held.items():
            assert torch.equal(now["state"][number][name], value), (number, name)


def test_too_many_parameters_are_torchs_error_and_change_nothing():
    saved = step(optim.AdamW8bit([parameter(), parameter(seed=1)])).state_dict()
    optimizer = step(optim.AdamW8bit([parameter()], lr=0.1))
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(saved)
    assert len(optimizer.state) == 1 and optimizer.param_groups[0]["lr"] == 0.1


def test_a_flat_state_is_taken():
    p = parameter()
    optimizer = optim.AdamW8bit([p])
    given = {"step": 1, "exp_avg": torch.rand(64 * 256), "exp_avg_sq": torch.rand(64 * 256)}
    optimizer.load_state_dict({"state": {0: given}, "param_groups": optimizer.state_dict()["param_groups"]})
    assert optimizer.state[p]["exp_avg"].shape == p.shape


def test_hooks_after_a_load_see_the_states():
    saved = step(optim.AdamW8bit([parameter()])).state_dict()
    optimizer, seen = optim.AdamW8bit([parameter()]), []
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append([sorted(held) for held in o.state.values()]))
    optimizer.load_state_dict(saved)
    assert seen == [[["exp_avg", "exp_avg_sq", "step"]]]


def test_what_a_checkpoint_holds_beside_parameters_is_kept():
    saved = step(optim.AdamW8bit([parameter()])).state_dict()
    saved["state"]["counter"] = {"n": 3}
    optimizer = optim.AdamW8bit([parameter()])
    optimizer.load_state_dict(saved)
    assert optimizer.state["counter"] == {"n": 3} and len(optimizer.state) == 2


def test_sgd_goes_on_from_torchs_buffer():
    """torch's SGD keeps no count: a buffer that is there has had its first step, so dampening holds for the next."""
    p, q = parameter(), parameter()
    theirs = step(torch.optim.SGD([q], lr=0.1, momentum=0.9, dampening=0.5))
    with torch.no_grad():
        p.copy_(q)
    mine = optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5, state="fp32")
    mine.load_state_dict(theirs.state_dict())
    for optimizer in (mine, theirs):
        step(optimizer, seed=2)
    torch.testing.assert_close(p, q)


def test_sgd_from_torch_before_its_first_step():
    q = parameter()
    theirs = step(torch.optim.SGD([q], lr=0.1))  # without momentum: its buffer is None
    mine = optim.SGD([parameter()], lr=0.1, momentum=0.9)
    mine.load_state_dict(theirs.state_dict() | {"param_groups": mine.state_dict()["param_groups"]})
    assert not mine.state


def test_states_given_to_torch_share_no_memory():
    p = parameter((10,))
    optimizer = step(optim.AdamW8bit([p]))
    given = optim.to_torch(optimizer.state_dict())["state"][0]
    assert all(given[name].data_ptr() != optimizer.state[p][name].data_ptr() for name in given)


def through_a_file(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize("name", ["AdamW8bit", "Adam4bit", "AdamWFp8"])
def test_a_copy_of_an_optimizer_goes_on_like_it(name, way):
    optimizer = step(getattr(optim, name)([parameter()]))
    other = way(optimizer)
    assert type(other) is type(optimizer)
    for one in (optimizer, other):
        step(one, seed=2)
    (p,), (q,) = (one.param_groups[0]["params"] for one in (optimizer, other))
    assert p is not q and torch.equal(p, q) and int(other.state[q]["step"]) == 2


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"bf16_stochastic_round": True}, TypeError, "AdamW8bit.*stochastic_rounding"),
        ({"min_8bit_size": 1}, TypeError, "AdamW8bit.*4096"),
        ({"is_paged": True}, TypeError, "AdamW8bit.*CPUOffloadOptimizer"),
        ({"whatever": True}, TypeError, "AdamW8bit.*whatever"),
        ({"state": "fp32", "block_size": 64}, MisfitError, "block_size"),
        ({"betas": (0.9,)}, MisfitError, "two"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_arguments_of_others_are_answered_in_our_words(options, error, said):
    with pytest.raises(error, match=said):
        optim.AdamW8bit([parameter()], **options)
    assert issubclass(MisfitError, LowpError)
