"""autoquant: what is fastest on the inputs that come is what is taken."""

import warnings

import pytest
import torch
from torch import nn

from lowp.errors import LowpError, MisfitError
from lowp.tensor import QTensor
from lowp.torchao import fastest
from lowp.torchao.config import CONFIGS


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.Linear(256, 256)).bfloat16()


X = torch.randn(4, 128, dtype=torch.bfloat16)
INT8, INT4 = CONFIGS["Int8WeightOnlyConfig"](), CONFIGS["Int4WeightOnlyConfig"](group_size=64)


@pytest.mark.parametrize("manual", [False, True])
def test_the_first_call_chooses_and_the_smallest_time_wins(manual, monkeypatch):
    monkeypatch.setattr(fastest, "_SECONDS", 1e-4)
    net = fastest.autoquant(model(), manual=manual)
    assert not any(isinstance(p, QTensor) for p in net.parameters())
    with torch.no_grad():
        y = net(X)
        if manual:
            assert not any(isinstance(p, QTensor) for p in net.parameters())
            net.finalize_autoquant()
    choices = net.autoquant_choices
    assert list(choices) == ["0", "2", "3"]
    for name, choice in choices.items():
        assert set(choice.times) == {fastest._name(one) for one in fastest.DEFAULT_AUTOQUANT_CLASS_LIST}
        assert choice.taken == min(choice.times, key=choice.times.get)
        assert isinstance(net.get_submodule(name).weight, QTensor) == (choice.taken != "float")
    assert choices["2"] is choices["3"] and y.shape == (4, 256) and not net._forward_pre_hooks


def test_every_layer_takes_the_only_candidate():
    net = fastest.autoquant(model(), X, [INT8], filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "0")
    assert [type(net[i].weight).__name__ for i in (0, 2, 3)] == ["Parameter", "Int8Tensor", "Int8Tensor"]


def test_candidates_that_are_too_far_or_fail_are_refused():
    class Broken(nn.Module):
        pass

    far = fastest.autoquant(model(), X, [None, INT4], min_sqnr=35.0)
    assert {c.taken for c in far.autoquant_choices.values()} == {"float"}
    assert all("below 35" in next(iter(c.refused.values())) for c in far.autoquant_choices.values())
    odd = CONFIGS["Int8WeightOnlyConfig"](group_size=7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fastest.autoquant(model(), X, [None, odd]).autoquant_choices["0"].refused
        with pytest.raises(LowpError):
            fastest.autoquant(model(), X, [None, odd], supress_autoquant_errors=False)
    with pytest.raises(MisfitError, match="wants configurations"):
        fastest.autoquant(model(), X, [Broken])
    with pytest.raises(MisfitError, match="no linear layer"):
        fastest.autoquant(nn.ReLU())
