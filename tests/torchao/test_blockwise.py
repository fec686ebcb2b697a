"""float8 in blocks of 128 as functions, against the same in plain arithmetic."""

import pytest
import torch
from lowp.torchao.kernel.blockwise_quantization import (
    blockwise_fp8_gemm,
    fp8_blockwise_act_quant,
    fp8_blockwise_weight_dequant,
    fp8_blockwise_weight_quant,
)

from lowp.errors import MisfitError


def numbers(*shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))
    x[..., ::50] *= 40
    return x


@pytest.mark.parametrize("leading", [(4,), (2, 3), (1,)])
def test_the_product_is_that_of_the_values(leading):
    x, w = numbers(*leading, 384), numbers(256, 384)
    a, a_s = fp8_blockwise_act_quant(x)
    b, b_s = fp8_blockwise_weight_quant(w)
    assert a.dtype is b.dtype is torch.float8_e4m3fn and a_s.shape == (*leading, 3) and b_s.shape == (2, 3)
    assert torch.equal(a_s, x.view(*leading, 3, 128).abs().amax(-1) / 448)
    assert torch.equal(b_s, w.view(2, 128, 3, 128).abs().amax((1, 3)) / 448)
    weight = fp8_blockwise_weight_dequant(b, b_s)
    assert torch.equal(weight, (b.float().view(2, 128, 3, 128) * b_s[:, None, :, None]).view(256, 384))
    act = (a.float().view(*leading, 3, 128) * a_s[..., None]).view(*leading, 384)
    y = blockwise_fp8_gemm(a, a_s, b, b_s)
    expected = act.double() @ weight.double().T
    assert y.dtype is torch.bfloat16 and y.shape == (*leading, 256)
    assert (y - expected).norm() < 4e-3 * expected.norm()


def test_zeros_stay_zeros_and_wrong_scales_are_told():
    a, a_s = fp8_blockwise_act_quant(torch.zeros(2, 128))
    b, b_s = fp8_blockwise_weight_quant(torch.zeros(128, 128))
    assert not blockwise_fp8_gemm(a, a_s, b, b_s).any()
    with pytest.raises(MisfitError, match=r"wants b_s \(1, 1\)"):
        blockwise_fp8_gemm(a, a_s, b, b_s.expand(1, 2))
