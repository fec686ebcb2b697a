"""Our numbers equal those of torchao 0.18, byte for byte, where torchao defines them; where they differ, this page says why.

MX        scale bytes and codes, except
          - rceil: torchao takes the ceiling of a rounded float32 logarithm, up to 22 units in the last place too low; ours is
            exact. So rceil is compared on bf16 numbers, where no logarithm comes so close.
          - scale byte 0: torchao encodes such blocks by 2**-126 (rceil: by 1) and decodes them by 2**-127, so that they come
            back halved (rceil: as zeros). Ours encode and decode by 2**-127; the codes are not compared.
          - NaN: the scale byte is 255 on both sides, the codes mean nothing.
NVFP4     scale bytes and codes, except
          - two levels, all zero: torchao's are NaN, ours are zeros.
          - two levels, amax below about 1e-32: torchao's reciprocal overflows; our second level is never below 2**-120.
          - one level, infinity: torchao saturates it in silence, our scale byte is NaN.
affine    scale (float32), zero point (int32) and codes. noclip for int1 is a division by zero there; unsigned integers are
          compared with the asymmetric rule alone, for torchao gives its symmetric rules a zero point in the middle.
"""

import pytest
import torch

from lowp.numerics import ELEMENTS, Format, dequantize, quantize
from lowp.numerics.bits import pack_bits
from lowp.numerics.math import e8m0_scale

pytestmark = [
    pytest.mark.guest("torchao>=0.18,<0.19"),
    pytest.mark.filterwarnings("ignore"),  # the guest's own
]

MX = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e3m2": "fp6_e3m2", "e2m3": "fp6_e2m3"}
MODES = ["floor", "ceil", "even", "rceil"]


def every_exponent(dtype: torch.dtype) -> torch.Tensor:
    """Blocks of 32 whose largest number walks through every exponent of float32 and the mantissas where rounding turns."""
    mantissas = torch.arange(0, 2**23, 2**16)
    near = torch.cat([mantissas + step for step in (-1, 0, 1)]) % 2**23
    bits = (torch.arange(0, 255).unsqueeze(1) << 23) | near
    amax = bits.flatten().to(torch.int32).view(torch.float32)
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(amax.numel(), 32, generator=generator) * 2 - 1
    shares[:, 0] = 1.0
    shares[::2, 1] = -0.0
    shares[::3, 2:9] *= 2.0**-12
    return (amax.unsqueeze(1) * shares).to(dtype)


def special_blocks(dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    x[0], x[1] = 0.0, -0.0
    x[2, 3], x[3, 4], x[4, 5] = torch.inf, -torch.inf, torch.nan
    x[5] *= 2.0**-130
    x[6] = torch.finfo(dtype).max
    x[7, 1:] = 0
    x[8:16] *= torch.logspace(-30, 30, 8).unsqueeze(1)
    return x.to(dtype)


def torchao_mx(x: torch.Tensor, element: str, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    dtype = torch.float4_e2m1fn_x2 if element == "e2m1" else MX[element]
    scale, qdata = to_mx(x, dtype, 32, ScaleCalculationMode(mode))
    return scale.view(torch.uint8).reshape(-1, 1), qdata.view(torch.uint8).reshape(x.shape[0], -1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("element", [*MX, "e2m1"])
@pytest.mark.parametrize("blocks", [every_exponent, special_blocks])
def test_mx(element, mode, blocks):
    for dtype in (torch.bfloat16,) if mode == "rceil" else (torch.bfloat16, torch.float32):
        x = blocks(dtype)
        parts = quantize(x, Format.parse(f"{element}/1x32*e8m0~{mode}"))
        scale = parts.scale.view(torch.uint8)
        codes = pack_bits(ELEMENTS[element].to_codes(parts.qdata), 4 if element == "e2m1" else 8)
        their_scale, their_codes = torchao_mx(x, element, mode)
        assert torch.equal(scale, their_scale), dtype
        ordinary = ((scale > 0) & (scale < 255)).flatten()
        assert torch.equal(codes[ordinary], their_codes[ordinary]), dtype
        zero = (x == 0).all(dim=1)
        assert (scale[zero] == 0).all() and torch.equal(codes[zero], their_codes[zero]), dtype


@pytest.mark.parametrize("element", [*MX, "e2m1"])
def test_mx_rceil_of_float32_is_torchaos_but_for_its_logarithm(element):
    x = every_exponent(torch.float32)
    ours = quantize(x, Format.parse(f"{element}/1x32*e8m0~rceil")).scale.view(torch.uint8).int()
    theirs = torchao_mx(x, element, "rceil")[0].int()
    exact = (
        torch.ceil(torch.log2(x.double().abs().amax(dim=1, keepdim=True) / ELEMENTS[element].max)).clamp(-127, 127)
        + 127
    )
    subnormal = x.double().abs().amax(dim=1, keepdim=True) < 2.0**-126
    assert torch.equal(ours.double(), torch.where(subnormal, ours.double(), exact))
    assert ((ours - theirs) >= 0).all() and ((ours - theirs) <= 1).all() and (ours != theirs).double().mean() < 0.01


def test_mx_blocks_of_the_smallest_scale_come_back():
    """torchao's come back halved: see the page."""
    x = torch.full((1, 32), 2.0**-119)
    fmt = Format.parse("e4m3/1x32*e8m0~floor")
    assert torch.equal(dequantize(quantize(x, fmt), fmt), x)
    assert e8m0_scale(torch.tensor([2.0**-119]), ELEMENTS["e4m3"], "floor").view(torch.uint8).item() == 0


def torchao_nvfp4(x: torch.Tensor, per_tensor: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    scale, qdata = nvfp4_quantize(x, 16, per_tensor)
    return scale.view(torch.uint8).reshape(x.shape[0], -1), qdata.view(torch.uint8).reshape(x.shape[0], -1)


def nvfp4(x: torch.Tensor, spelling: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    parts = quantize(x, Format.parse(spelling))
    return parts.scale.view(torch.uint8), pack_bits(parts.qdata, 4), parts.scale_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("std", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_nvfp4(dtype, std):
    from torchao.prototype.mx_formats.nvfp4_tensor import per_tensor_amax_to_scale

    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-3, 0, 512).unsqueeze(1) * std
    x[0], x[1] = 0.0, -0.0
    x = x.to(dtype)
    for ours, theirs in zip(nvfp4(x, "e2m1/1x16*e4m3"), torchao_nvfp4(x, None), strict=False):
        assert torch.equal(ours, theirs), "one level"
    scale, codes, outer = nvfp4(x, "e2m1/1x16*e4m3/tensor")
    per_tensor = per_tensor_amax_to_scale(x.abs().max())
    assert torch.equal(outer.flatten(), per_tensor.flatten())
    their_scale, their_codes = torchao_nvfp4(x, per_tensor)
    assert torch.equal(scale, their_scale) and torch.equal(codes, their_codes), "two levels"


def test_nvfp4_zeros_are_zeros():
    fmt = Format.parse("e2m1/1x16*e4m3/tensor")
    assert (dequantize(quantize(torch.zeros(4, 32), fmt), fmt) == 0).all()
    tiny = torch.full((4, 32), 1e-37)
    assert torch.allclose(dequantize(quantize(tiny, fmt), fmt), tiny, rtol=0.1)


def test_nvfp4_nan_is_a_nan_scale():
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    x[1, 3] = torch.nan
    scale, codes, _ = nvfp4(x, "e2m1/1x16*e4m3")
    their_scale, their_codes = torchao_nvfp4(x, None)
    assert torch.equal(scale, their_scale)
    assert torch.equal(codes[[0, 2, 3]], their_codes[[0, 2, 3]])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("rule", ["symmetric", "noclip", "asymmetric"])
@pytest.mark.parametrize("unsigned", ["", "u"])
def test_affine(bits, rule, unsigned):
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    if unsigned and rule != "asymmetric":
        pytest.skip("torchao has a zero point there, see the page")
    if bits == 1 and rule == "noclip":
        pytest.skip("torchao divides by zero there")
    mapping = {
        "symmetric": MappingType.SYMMETRIC,
        "noclip": MappingType.SYMMETRIC_NO_CLIPPING_ERR,
        "asymmetric": MappingType.ASYMMETRIC,
    }[rule]
    element = ELEMENTS[f"{unsigned}int{bits}"]
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-38, 37, 256).unsqueeze(1)
    x[0], x[1], x[2], x[3] = 0.0, 5.0, -5.0, 1e-40
    x[4:8] = x[4:8].abs()
    x[8:12] = (x[8:12] * 2 / x[8:12].abs().max()).round() / 2  # ties
    for block, columns in (("row", 128), ("1x32", 32)):
        fmt = Format.parse(f"{unsigned}int{bits}/{block}{'+int32' if rule == 'asymmetric' else ''}~{rule}")
        parts = quantize(x, fmt)
        args = {"quant_min": element.qmin, "quant_max": element.qmax}
        dtype = torch.uint8 if unsigned else torch.int8
        scale, zero_point = choose_qparams_affine(x, mapping, (1, columns), dtype, **args, scale_dtype=torch.float32)
        codes = quantize_affine(x, (1, columns), scale, zero_point, dtype, **args)
        assert torch.equal(parts.scale.flatten(), scale.flatten())
        assert torch.equal(parts.qdata, codes)
        if rule == "asymmetric":
            assert parts.zero_point.dtype == zero_point.dtype == torch.int32
            assert torch.equal(parts.zero_point.flatten(), zero_point.flatten())
        values = dequantize_affine(codes, (1, columns), scale, zero_point, dtype, **args)
        assert torch.equal(dequantize(parts, fmt), values)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("dyn8", (True, 7, 8)), ("udyn8", (False, 7, 8)), ("dyn4", (True, 3, 4))],
)
def test_dynamic_maps(name, arguments):
    from torchao.optim.quant_utils import create_dynamic_map

    theirs = torch.tensor(create_dynamic_map(*arguments), dtype=torch.float64)
    ours = torch.tensor(ELEMENTS[name].values, dtype=torch.float64)
    assert torch.allclose(ours, theirs, rtol=2e-7, atol=0), "theirs come from a float32 linspace"


def test_linear_map():
    from torchao.optim.subclass_4bit import get_qmap_unsigned

    assert tuple(get_qmap_unsigned()) == ELEMENTS["ulin4"].values


@pytest.mark.parametrize("name", ["dyn8", "udyn8", "dyn4", "ulin4"])
def test_optimizer_states(name):
    """Codes by the same map: what lies on a boundary but for the last bit may differ."""
    from torchao.optim.quant_utils import quantize_4bit_with_qmap, quantize_8bit_with_qmap

    element = ELEMENTS[name]
    x = torch.randn(2**16, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) / 3
    x = x if element.signed else x.square()
    encode = quantize_8bit_with_qmap if element.bits == 8 else quantize_4bit_with_qmap
    theirs = encode(x, element.table(x.device))
    differ = element.encode(x) != theirs
    assert differ.double().mean() < 1e-4
    below, above = element.decode(element.encode(x)), element.decode(theirs)
    assert torch.allclose((x - below).abs()[differ], (x - above).abs()[differ], rtol=1e-4, atol=1e-7)


def test_nf4_table():
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor

    x = torch.randn(64, 64 * 256 // 64, generator=torch.Generator().manual_seed(0))
    theirs = NF4Tensor.from_tensor(x, 64, 256).nf4
    assert torch.allclose(torch.tensor(ELEMENTS["nf4"].values), theirs.float(), atol=5e-5), "theirs has four decimals"
