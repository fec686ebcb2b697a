"""The portable Triton kernels where the kernel table's own tests do not reach: every tiling, the decoder's bits, odd shapes."""

import dataclasses

import pytest
import torch

from lowp.kernels.triton_ import decode, interpreted, w16
from lowp.kernels.triton_.packed import parts_of
from lowp.numerics import Parts, known_formats
from lowp.numerics.compare import relative_error
from lowp.ops import Case
from lowp.ops.grouped import reference as grouped_reference
from lowp.ops.linear import reference
from lowp.tensor import QTensor

FORMATS = sorted({known.spelling.split("@")[0] for known in known_formats() if "/" in known.spelling})
ODD = (
    "int3/1x64*bf16+bf16",
    "int5/row",
    "uint7/1x48*fp16+uint8",
    "uint4/1x24*bf16+bf16",
    "e2m1/1x12",
    "nf4/1x6*int8/1x8",
    "int3/1x96*bf16",
    "int1/1x3",
    "e4m3/2x48",
    "e5m2/tensor",
    "e3m2/1x16*e8m0",
    "int1/1x32+fp32",
)


@pytest.fixture(autouse=True)
def runnable(device):
    if device.type == "cpu" and not interpreted():
        pytest.skip("Triton's interpreter is off: a GPU is here")


def weight(scheme, shape, device, dtype=torch.bfloat16):
    return QTensor.quantize(torch.randn(shape, device=device, dtype=dtype) * 0.05, scheme)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", [*FORMATS, *ODD])
def test_decode_is_dequantize_bit_for_bit(scheme, dtype, device, poison):
    rows = 128 if "128x128" in scheme else 6
    q = weight(scheme, (rows, 192 if scheme in ODD else 256), device)
    values = decode.decode(q.packed, q.spec, dtype)
    assert torch.equal(values, q.dequantize(dtype))
    ids = torch.randint(0, rows, (2, 3), device=device)
    assert torch.equal(decode.decode(q.packed, q.spec, dtype, ids), values[ids])


@pytest.mark.parametrize(
    "scheme", ["int4/1x64*bf16+int8", "nf4/1x64*int8/1x256", "e2m1/1x16*e4m3/tensor", "int8/tensor"]
)
def test_decode_of_a_stack_and_of_views(scheme, device):
    q = weight(scheme, (3, 8, 128), device)
    assert torch.equal(decode.decode(q.packed, q.spec, torch.float32), q.dequantize(torch.float32))
    views = [q[1]] if "1x256" in scheme else [q[1], q[:, 4:], *([q[:, :, 64:]] if "1x64" in scheme else [])]
    for view in views:
        assert torch.equal(decode.decode(view.packed, view.spec, torch.float32), view.dequantize(torch.float32))


def test_codes_that_begin_inside_a_word(device):
    q = weight("int4/1x16", (4, 64), device)
    moved = torch.empty(q.packed["qdata"].numel() + 1, dtype=torch.uint8, device=device)[1:].view(4, 32)
    packed = q.packed | {"qdata": moved.copy_(q.packed["qdata"])}
    assert torch.equal(decode.decode(packed, q.spec, torch.float32), q.dequantize(torch.float32))


@pytest.mark.parametrize("columns", [8, 40, 72, 100])
@pytest.mark.parametrize(
    "scheme", ["int4/row", "int3/row+fp32", "uint2/tensor", "e4m3/row", "int1/row+bf16", "nf4/row"]
)
def test_any_number_of_columns(scheme, columns, device):
    q, x = weight(scheme, (5, columns), device, torch.float32), torch.randn(3, columns, device=device)
    assert torch.equal(decode.decode(q.packed, q.spec, torch.float32), q.dequantize())
    tiling = w16.Tiling(bn=16, bm=16, bk=64, stages=1)
    y = w16.tiled(x, parts_of(q.packed), q.scheme, tiling)
    torch.testing.assert_close(y, reference(x, q.packed, q.spec), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_codes_that_are_no_numbers(device):
    for name in ("e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz"):
        q = QTensor.quantize(torch.randn(1, 256, device=device), f"{name}/row")
        codes = torch.arange(256, dtype=torch.uint8, device=device).view(q.format.element.dtype).reshape(1, 256)
        q = QTensor.from_parts(
            Parts(qdata=codes, scale=torch.ones_like(q.parts().scale)), q.scheme, dtype=torch.float32
        )
        torch.testing.assert_close(
            decode.decode(q.packed, q.spec, torch.float32), q.dequantize(), rtol=0, atol=0, equal_nan=True
        )


def test_a_finite_value_stays_finite_in_float16(device):
    q = QTensor.quantize(
        torch.full((16, 64), 70000.0, device=device) * torch.tensor([1.0, -1.0], device=device).repeat(32), "int8/row"
    )
    assert torch.equal(decode.decode(q.packed, q.spec, torch.float16), q.dequantize(torch.float16))
    assert q.dequantize(torch.float16).isfinite().all()


TILINGS = [
    w16.Tiling(bn=bn, bm=bm, bk=bk, split=split, weight_left=left, stages=2)
    for bn, bm, bk, split, left in (
        (32, 16, 64, 1, True),
        (64, 16, 32, 4, True),
        (32, 32, 128, 2, True),
        (32, 64, 32, 1, False),
        (128, 16, 32, 3, False),
    )
]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize(
    "scheme",
    [
        "int4/1x32*bf16+bf16",
        "int3/1x64*bf16",
        "int3/1x48*bf16",
        "uint5/1x24*bf16+uint8",
        "e2m1/1x16*e4m3/tensor",
        "int8/row",
        "nf4/1x64*int8/1x256",
    ],
)
def test_every_tiling_computes_the_same(scheme, tiling, device, poison):
    """Rows, tokens and columns that fill no tile; splits that leave the last one little or nothing."""
    q, bias = weight(scheme, (44, 192), device), torch.randn(44, device=device, dtype=torch.bfloat16)
    x = torch.randn(19, 192, device=device, dtype=torch.bfloat16)
    y = w16.tiled(x, parts_of(q.packed), q.scheme, tiling, bias)
    assert relative_error(reference(x, q.packed, q.spec, bias), y) <= q.format.tolerance(torch.bfloat16)
    assert torch.equal(y, w16.tiled(x, parts_of(q.packed), q.scheme, tiling, bias)), "the same bits each time"


@pytest.mark.parametrize(
    "scheme", ["int4/1x32*fp16+int8", "int3/1x64*fp16+fp16", "e2m1/1x64*fp16", "e5m2/1x32*fp16", "e3m2/1x64*e4m3"]
)
def test_worked_out_in_16_bits(scheme, device):
    """The path of elements, scales and zero points that are float16 numbers; bfloat16's is the same text, on a GPU."""
    assert decode.exact_in(scheme, torch.float16) and not decode.exact_in(scheme, torch.float32)
    q, x = weight(scheme, (40, 128), device, torch.float16), torch.randn(3, 128, device=device, dtype=torch.float16)
    y = w16.tiled(x, parts_of(q.packed), q.scheme, TILINGS[0])
    assert relative_error(reference(x, q.packed, q.spec), y) <= q.format.tolerance(torch.float16)


@pytest.mark.parametrize("tiling", [tiling for tiling in TILINGS if tiling.split == 1], ids=str)
def test_every_tiling_finds_its_expert(tiling, device, poison):
    q = weight("int4/1x32*bf16", (3, 40, 64), device)
    x = torch.randn(50, 64, device=device, dtype=torch.bfloat16)
    offs = torch.tensor([33, 33, 47], dtype=torch.int32, device=device)
    y = w16.tiled(x, parts_of(q.packed), q.scheme, tiling, offs=offs)
    assert relative_error(grouped_reference(x, q.packed, q.spec, offs), y) <= q.format.tolerance(torch.bfloat16)
    batch = x[:48].reshape(3, 16, 64)
    y = w16.tiled(batch, parts_of(q.packed), q.scheme, tiling)
    assert relative_error(grouped_reference(batch, q.packed, q.spec), y) <= q.format.tolerance(torch.bfloat16)


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("shape", [(128, 256), (4096, 14336), (151936, 8192), (64, 16)])
def test_what_is_chosen_can_run(shape, sm):
    for tokens in (1, 7, 16, 33, 64, 65, 200, 512, 513, 100000):
        for widest in (64, 128):
            tiling = w16.choose(tokens, *shape, sm, widest=widest)
            assert (tiling is None) == (tokens > (512 if 90 <= sm < 120 else 256))
            if tiling is not None:
                assert 32 <= tiling.bk <= widest
                assert (tiling.split - 1) * tiling.bk < shape[1], "each split has columns"


def test_many_tokens_are_a_product_of_floats(device):
    q, x = weight("int4/1x32*bf16", (16, 32), device), torch.randn(600, 32, device=device, dtype=torch.bfloat16)
    y = torch.ops.lowp.w16(x, *parts_of(q.packed), None, q.scheme)
    assert torch.equal(y, torch.nn.functional.linear(x, q.dequantize()))


def test_operators_and_their_fakes_agree(device):
    q, x = weight("int4/1x32*bf16", (16, 64), device), torch.randn(2, 64, device=device, dtype=torch.float16)
    experts = weight("int4/1x32*bf16", (2, 16, 64), device)
    offs = torch.tensor([1, 2], dtype=torch.int32, device=device)
    parts, ops = parts_of(q.packed), torch.ops.lowp
    for op, args in (
        (ops.w16, (x, *parts, None, q.scheme)),
        (ops.w16_grouped, (x, *parts_of(experts.packed), offs, q.scheme)),
        (ops.decode, (*parts, None, q.scheme, 64, torch.float16)),
        (ops.decode, (*parts, offs, q.scheme, 64, torch.float32)),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))
    assert ops.w16(x[:0], *parts, None, q.scheme).shape == (0, 16)
    assert ops.w16_grouped(x[:0], *parts_of(experts.packed), 0 * offs, q.scheme).shape == (0, 16)


@pytest.mark.parametrize("kernel", w16.KERNELS, ids=lambda kernel: f"{kernel.op}-{kernel.name}")
def test_a_kernel_says_what_it_wants(kernel):
    shape = (4, 128, 256) if kernel.op == "grouped" else (128, 256)
    scheme = "int8/row@int8/row" if kernel.name == "w16_act" else "int8/row"
    here = Case(op=kernel.op, scheme=scheme, device="cuda", sm=80, shape=shape)
    assert kernel.why_not(here) == ""
    for change, why in (
        ({"device": "cpu"}, "wants cuda, got cpu"),
        ({"sm": 75}, "wants sm80, got sm75"),
        ({"dtype": "float64"}, "wants bfloat16, float16 or float32, got float64"),
    ):
        assert kernel.why_not(dataclasses.replace(here, **change)) == why
    odd = dataclasses.replace(here, scheme=scheme.replace("row", "1x24", 1), shape=(*shape[:-1], 240))
    assert kernel.why_not(odd) == ""


def test_a_tile_too_narrow_is_refused():
    with pytest.raises(ValueError, match="wants tiles of 32 columns or more, got bk=16"):
        w16.Tiling(bn=128, bm=16, bk=16)
