"""The 8-bit product under every tiling it may be given: the table's own test only sees those that `choose` picks."""

import dataclasses

import pytest
import torch

from lowp.kernels.triton_ import interpreted
from lowp.numerics.compare import relative_error
from lowp.ops import kernels_of, tuned
from lowp.ops.linear import reference
from lowp.ops.registry import Case
from lowp.tensor import QTensor

w8a8 = pytest.importorskip("lowp.kernels.triton_.w8a8", reason="needs Triton")
(KERNEL,) = [kernel for kernel in kernels_of("linear") if kernel.name == "w8a8"]
TILINGS = (
    w8a8.Tiling(bm=16, bn=64, bk=128, split=2),
    w8a8.Tiling(bm=32, bn=128, bk=128, split=4),
    w8a8.Tiling(bm=64, bn=128, bk=128, swap=False, group=2),
    w8a8.Tiling(bm=64, bn=64, bk=64, swap=False, split=2, stages=2),
)


@pytest.fixture(autouse=True)
def runnable(device):
    if device.type == "cpu" and not interpreted():
        pytest.skip("Triton's interpreter is off: a GPU is here")


def linear(x, q, bias=None, tiled=None):
    packed = q.packed
    pre, static = packed.get("act_pre_scale"), packed.get("act_scale")
    return w8a8.linear(x, packed["qdata"], packed["scale"], static, pre, bias, q.spec.scheme, tiled=tiled)


@pytest.mark.parametrize("tiled", TILINGS, ids=lambda t: f"{t.bm}x{t.bn}x{t.bk}/{t.split}{'s' if t.swap else ''}")
@pytest.mark.parametrize("scheme", KERNEL.cases)
def test_every_tiling_gives_the_product(scheme, tiled, device, poison):
    q = QTensor.quantize(torch.randn(384, 512, device=device) * 0.05, scheme)
    bias = torch.randn(384, device=device, dtype=torch.bfloat16)
    if q.spec.weight.block == "128x128":
        tiled = dataclasses.replace(tiled, bk=128)
    for tokens in (1, 17, 70):
        x = torch.randn(tokens, 512, device=device, dtype=torch.bfloat16)
        y = linear(x, q, bias, tiled)
        assert relative_error(reference(x, q.packed, q.spec, bias), y) <= q.format.tolerance(x.dtype)
        assert torch.equal(y, linear(x, q, bias, tiled)), "sums are added in one order"


@pytest.mark.parametrize("scheme", ["int8/row@int8/row+int8", "e4m3/row@e4m3/row"])
def test_columns_and_rows_that_fill_no_tile(scheme, device, poison):
    q = QTensor.quantize(torch.randn(144, 272, device=device), scheme)
    x = torch.randn(21, 272 * 2, device=device, dtype=torch.float16)[:, ::2]
    y = linear(x, q)
    assert relative_error(reference(x, q.packed, q.spec), y) <= q.format.tolerance(x.dtype)


@pytest.mark.parametrize("scheme", KERNEL.cases)
def test_a_nan_stays_visible_and_in_its_token(scheme, device):
    q = QTensor.quantize(torch.randn(256, 256, device=device), scheme)
    x = torch.randn(5, 256, device=device, dtype=torch.bfloat16)
    x[1, 3], x[2, 200] = torch.nan, torch.inf
    y = linear(x, q)
    assert not y[1].isfinite().any() and not y[2].isfinite().any()
    if q.spec.act.block != "tensor":
        assert y[[0, 3, 4]].isfinite().all()


def test_a_tiling_fits_the_chip_and_the_columns():
    for sm, room in ((80, 163), (89, 99), (90, 227), (120, 99)):
        for kind in ("int8", "e4m3", "blocks"):
            for tokens in (1, 7, 16, 64, 65, 256, 8192):
                for rows, columns in (
                    (14336, 4096),
                    (4096, 14336),
                    (1024, 8192),
                    (11008, 4096),
                    (4096, 11008),
                    (5120, 1040),
                ):
                    tiled = w8a8.tiling(tokens, rows, columns, sm, kind)
                    assert tiled.shared <= room * 1024
                    assert tiled.split == 1 or columns % (tiled.bk * tiled.split) == 0
                    tiles = -(-tokens // tiled.bm) * -(-rows // tiled.bn)
                    assert sm < 90 or not tiled.swap or tiled.split == 1 or tiles * tiled.split <= 2 * 132
                    assert kind != "blocks" or columns % 128 or tiled.bk == 128


@pytest.mark.parametrize("scheme", ["int8/row@int8/row+int8", "e4m3/row@e4m3/row", "e4m3/128x128@e4m3/1x128"])
def test_measured_choices_are_taken(scheme, device):
    q = QTensor.quantize(torch.randn(128, 1024, device=device) * 0.05, scheme)
    x = torch.randn(20, 1024, device=device, dtype=torch.bfloat16)
    expected = reference(x, q.packed, q.spec)
    case = Case(
        op="linear", scheme=q.spec.scheme, layout="plain", device="cuda", shape=(128, 1024), sm=90, dtype="bfloat16"
    )
    rule = w8a8._chosen(q.spec.scheme, x.dtype, 20, 0, 128, 1024, 90)
    configs = w8a8._candidates(case, 20)
    assert {"how": "torch"} in configs and len({config["split"] for config in configs[:-1]}) > 1
    for config in configs:
        with tuned.forced("w8a8", config):
            taken = w8a8._chosen(q.spec.scheme, x.dtype, 20, 0, 128, 1024, 90)
            assert config == ({"how": "torch"} if taken is None else dataclasses.asdict(taken))
            if device.type == "cuda" or (taken and taken.bm <= 64):  # large tiles take the interpreter long
                assert relative_error(expected, linear(x, q)) <= q.format.tolerance(x.dtype)
    with tuned.forced("w8a8", {"knob": 1}):  # of another version
        assert w8a8._chosen(q.spec.scheme, x.dtype, 20, 0, 128, 1024, 90) == rule


@pytest.mark.parametrize("kind", ["int8", "e4m3", "blocks"])
def test_candidates_fit_the_chip_and_the_columns(kind):
    for tokens in (1, 16, 70, 512, 4096):
        for rows, columns in ((1024, 4096), (28672, 4096), (4096, 14336), (144, 272)):
            for sm, room in ((80, 163), (89, 99), (90, 227), (120, 99)):
                found = w8a8.candidates(tokens, rows, columns, sm, kind)
                assert found and len(found) < 30
                for tiled in found:
                    assert tiled.shared <= room * 1024 and columns % (tiled.bk * tiled.split) in (0, columns % tiled.bk)
                    tiles = -(-tokens // tiled.bm) * -(-rows // tiled.bn)
                    assert tiled.split == 1 or (tiles <= w8a8.COUNTERS and columns % (tiled.bk * tiled.split) == 0)


def test_what_it_refuses():
    def why_not(scheme, **changes):
        case = dataclasses.replace(w8a8.Case(op="linear", scheme=scheme, device="cuda", sm=90), **changes)
        return KERNEL.why_not(case)

    assert why_not("e4m3/row@e4m3/row") == why_not("int8/row@int8/row", sm=80) == ""
    assert why_not("e4m3/row@e4m3/row", sm=80) == "wants sm89 for products of e4m3, got sm80"
    assert why_not("e4m3/row@e4m3/row", device="cpu", sm=0) == "wants cuda, got cpu"
    assert why_not("e4m3/row@e4m3/row", dtype="float32").startswith("wants bfloat16 or float16")
    assert why_not("int8/row").startswith("wants") and why_not("int8/row@e4m3/row").startswith("wants")


@pytest.mark.parametrize("scheme", ["int8/row@int8/row+int8", "int8/row*bf16@int8/row", "int8/tensor@int8/tensor"])
def test_sums_of_torch_are_scaled_in_one_pass(scheme, device, poison):
    q = QTensor.quantize(torch.randn(1040, 128, device=device), scheme)
    x, bias = torch.randn(19, 128, device=device, dtype=torch.bfloat16), torch.randn(1040, device=device)
    made = w8a8.cast_tensors(x, w8a8.plan_of(q.spec.act, 128, x.device))
    sums = w8a8.int_mm(made.codes, q.packed["qdata"])
    y = w8a8.scaled(sums, made, q.packed["qdata"], q.packed["scale"], bias, q.scheme, x.dtype)
    assert relative_error(reference(x, q.packed, q.spec, bias), y) <= q.format.tolerance(x.dtype)


def test_a_weight_cut_in_place(device):
    """A slice of the columns of a weight lies in strides: it is read as what it is."""
    q = QTensor.quantize(torch.randn(128, 512, device=device), "int8/row@int8/row")
    x = torch.randn(3, 256, device=device, dtype=torch.bfloat16)
    part = q[:, 256:]
    assert not part.packed["qdata"].is_contiguous()
    assert relative_error(reference(x, part.packed, part.spec), linear(x, part)) <= q.format.tolerance(x.dtype)
