"""Observers: the range of all that passed, one that is given, and the one of least error; kept by state_dict."""

import pytest
import torch

from lowp.errors import MisfitError
from lowp.torchao import affine, observers
from lowp.torchao.words import MappingType, PerAxis, PerGroup, PerTensor

ARGS = (MappingType.ASYMMETRIC, torch.int8)
each_granularity = pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0), PerGroup(16)], ids=str)


@each_granularity
def test_the_range_of_all_that_passed(granularity):
    watch = observers.AffineQuantizedMinMaxObserver(*ARGS, granularity)
    parts = [torch.randn(8, 32), torch.randn(8, 32) * 3]
    for part in parts:
        assert watch(part) is part
    block = observers.get_block_size((8, 32), granularity)
    both = torch.stack(parts)
    expected = affine.choose_qparams_affine(both.amax(0), MappingType.SYMMETRIC, block, torch.int8)  # shapes alone
    scale, zero = watch.calculate_qparams()
    assert scale.shape == zero.shape == expected[0].shape
    low = torch.stack([affine._extremes(part, block, False)[0] for part in parts]).amin(0)
    high = torch.stack([affine._extremes(part, block, False)[1] for part in parts]).amax(0)
    assert torch.allclose(scale, (high.clamp(min=0) - low.clamp(max=0)) / 255)
    other = observers.AffineQuantizedMinMaxObserver(*ARGS, granularity)
    other.min_val, other.max_val = torch.zeros_like(low), torch.zeros_like(low)
    other.load_state_dict(watch.state_dict())
    assert torch.equal(other.calculate_qparams()[0], scale), "torchao's range is lost by state_dict"


@each_granularity
def test_the_range_of_least_error(granularity):
    x = torch.randn(64, 512)  # whose rare far values a range of four bits had better cut off
    block = observers.get_block_size((64, 512), granularity)

    def error(watch):
        watch(x)
        scale, zero = watch.calculate_qparams()
        codes = affine.quantize_affine(x, block, scale, zero, torch.int8, -8, 7)
        return (affine.dequantize_affine(codes, block, scale, zero, torch.int8) - x).square().mean()

    args = (*ARGS, granularity, -8, 7)
    assert error(observers.AffineQuantizedMSEObserver(*args)) < error(observers.AffineQuantizedMinMaxObserver(*args))
    once = observers.AffineQuantizedMSEObserver(*args, steps=10, run_once=True)
    once(x)
    before = once.calculate_qparams()[0]
    once(x * 10)
    assert torch.equal(once.calculate_qparams()[0], before)


def test_a_scale_that_is_given():
    watch = observers.AffineQuantizedFixedQParamObserver(*ARGS, PerTensor(), scale=torch.full((1,), 0.5))
    watch(torch.randn(4, 4))
    assert [t.item() for t in watch.calculate_qparams()] == [0.5, 0.0]
    watch.set_qparams(torch.full((1,), 0.25))
    assert watch.calculate_qparams()[0].item() == 0.25


def test_what_an_observer_wants():
    for kind in (observers.AffineQuantizedMinMaxObserver, observers.AffineQuantizedMSEObserver):
        with pytest.raises(MisfitError, match="run the model"):
            kind(*ARGS, PerTensor()).calculate_qparams()
        made = kind.with_args(*ARGS)(PerTensor())
        assert isinstance(made, kind)
    with pytest.raises(MisfitError, match="granularity"):
        observers.AffineQuantizedMinMaxObserver(*ARGS, None)
    watch = observers.AffineQuantizedMinMaxObserver(*ARGS, PerAxis(0))
    watch(torch.randn(4, 8))
    with pytest.raises(MisfitError, match="one number of blocks"):
        watch(torch.randn(6, 8))
