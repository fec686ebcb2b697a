"""The CPU's products, on every instruction set that this machine has: shapes drawn at random against the reference, threads, NaN,
views, and what torch asks of an operator. (The registry's own tests run every scheme on the best set.)"""

import pathlib
import random
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import lowp
from lowp.kernels.cpu import library, planes
from lowp.layouts import LAYOUTS
from lowp.numerics import Format, Scheme
from lowp.numerics.compare import relative_error
from lowp.ops.linear import reference
from lowp.ops.registry import Case, kernels_of, pick
from lowp.tensor import QTensor

SETS = ("avx2", "avxvnni", "avx512vnni", "avx512bf16", "neon", "neondot", "neoni8mm")
(LINEAR,) = (kernel for kernel in kernels_of("linear") if kernel.name == "planes")
pytestmark = pytest.mark.skipif(bool(library.missing()), reason=library.missing())


@pytest.fixture(params=SETS)
def instructions(request):
    try:
        library.use(request.param)
    except lowp.LowpError:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    library.use()


def drawn(scheme, shape, dtype=torch.float32):
    return QTensor.quantize(torch.randn(shape, dtype=dtype) * 0.05, scheme).to_layout("planes")


def shapes_for(scheme, count):
    """Shapes that the layout takes: rows that fill no tile, columns that fill no panel, batches on both sides of 8."""
    fmt, act = Scheme.parse(scheme).weight, Scheme.parse(scheme).act
    blocks = [int(one.block.removeprefix("1x")) for one in (fmt, act or fmt) if one.block.startswith("1x")]
    step = max([32, *blocks])
    chosen = random.Random(scheme)
    for _ in range(count):
        yield (
            chosen.choice((1, 2, 3, 4, 5, 8, 9, 16, 31)),
            chosen.randint(1, 90),
            step * chosen.randint(1, max(1, 1600 // step)),
        )


@pytest.mark.parametrize("scheme", planes._cases())
def test_any_shape_on_any_instruction_set(scheme, instructions, poison):
    for tokens, rows, columns in shapes_for(scheme, 4):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if LAYOUTS["planes"].why_not(Format.parse(scheme.split("@")[0]), (rows, columns), "cpu"):
                continue  # a block of the matrix that this shape has not
            q = drawn(scheme, (rows, columns), dtype)
            x, bias = torch.randn(tokens, columns + 8, dtype=dtype)[:, :columns], torch.randn(rows, dtype=dtype)
            y = LINEAR.run(x, q.packed, q.spec, bias)
            assert y.shape == (tokens, rows) and y.dtype == dtype
            error = relative_error(reference(x, q.packed, q.spec, bias), y)
            assert error <= q.format.tolerance(dtype), (tokens, rows, columns, dtype)


@pytest.mark.parametrize("scheme", ["int4/1x32*bf16", "int4/1x32*bf16@int8/row+int8"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_same_bits_on_any_number_of_threads(scheme, tokens):
    q, x, before = drawn(scheme, (1024, 256)), torch.randn(tokens, 256), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(LINEAR.run(x, q.packed, q.spec, None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("scheme", ["int4/1x32*bf16", "int4/1x32*bf16@int8/row", "int8/row@int8/1x32", "e4m3/row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible_and_in_its_token(scheme, dtype, bad, instructions):
    q = drawn(scheme, (48, 128), dtype)
    for tokens in (2, 12):
        x = torch.randn(tokens, 128, dtype=dtype)
        x[1, 5] = bad
        y = LINEAR.run(x, q.packed, q.spec, None)
        others = [i for i in range(tokens) if i != 1]
        assert y[others].isfinite().all()
        assert not y[1].isfinite().any() if "int4" not in scheme and bad != bad else not y[1].isfinite().all()


@pytest.mark.parametrize("scheme", ["int4/1x32*bf16@int8/row", "int8/row@int8/1x32"])
@pytest.mark.parametrize("tokens", [2, 12])
def test_a_nan_stays_visible_under_a_static_scale(scheme, tokens, instructions):
    q, x = drawn(scheme, (48, 128)), torch.randn(tokens, 128)
    packed = q.packed | {"act_scale": torch.tensor(0.02)}
    expected = reference(x, packed, q.spec)
    assert relative_error(expected, LINEAR.run(x, packed, q.spec, None)) < 1e-5
    x[1, 5] = torch.nan
    y, lost = LINEAR.run(x, packed, q.spec, None), reference(x, packed, q.spec)
    others = [i for i in range(tokens) if i != 1]
    assert y[1].isnan().all() and relative_error(expected[others], y[others]) < 1e-5
    assert lost[1].isnan().all() and torch.equal(lost[others], expected[others]), "the reference says so too"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_e4m3_activations_are_the_references_number_for_number(dtype, static, instructions):
    """Through an identity: every exponent, ties, subnormals, what saturates; NaN and infinity in their tokens."""
    q = QTensor.quantize(torch.eye(256, dtype=dtype), "int8/row@e4m3/row").to_layout("planes")
    x = torch.randn(12, 256)
    x[1] = torch.linspace(-448, 448, 256)
    x[2] *= 2.0 ** torch.randint(-12, 9, (256,))
    x[3] = torch.arange(256) / 512 * 2**-6
    x[3, 0] = 448
    x[4] = 0
    x[5, 3], x[6, 3] = torch.nan, torch.inf
    x, packed = x.to(dtype), q.packed | ({"act_scale": torch.tensor(0.5)} if static else {})
    for rows in (x, x[2:3], x[2:4]):
        y, expected = LINEAR.run(rows, packed, q.spec, None), reference(rows, packed, q.spec)
        keep = expected.isfinite().all(dim=1)
        close = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(y[keep], expected[keep], rtol=close, atol=0)
        assert not y[~keep].isfinite().all(dim=1).any()


@pytest.mark.parametrize("tokens", [129, 300])
@pytest.mark.parametrize(
    "scheme", ["int4/1x32*bf16", "e2m1/1x16*e4m3/tensor", "int3/1x64*bf16+int8", "nf4/1x64*int8/1x256"]
)
def test_scales_that_go_into_the_decoded_panel(tokens, scheme, instructions):
    """With many rows of bf16 x; float32 x keeps its own way, exact."""
    q = drawn(scheme, (112, 320) if "256" not in scheme else (112, 512))
    x = torch.randn(tokens, q.shape[1])
    for dtype, allowed in ((torch.bfloat16, q.format.tolerance(torch.bfloat16)), (torch.float32, 1e-5)):
        y = LINEAR.run(x.to(dtype), q.packed, q.spec, None)
        assert relative_error(reference(x.to(dtype), q.packed, q.spec), y) < allowed


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_a_bias_and_an_x_lie_as_they_like(tokens):
    q = drawn("int4/1x32*bf16@int8/row+int8", (50, 128))
    transposed, expanded = torch.randn(128, tokens).T, torch.randn(1, 128).expand(tokens, 128)
    for bias in (torch.randn(100)[::2], torch.randn(1).expand(50), torch.randn(50, dtype=torch.float64)):
        for x in (transposed, expanded):
            y, expected = LINEAR.run(x, q.packed, q.spec, bias), reference(x, q.packed, q.spec, bias)
            assert y.shape == expected.shape == (tokens, 50)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int4/1x32*bf16@int8/row+int8", "int4/1x64*bf16", "nf4/1x64*int8/1x256"])
@pytest.mark.parametrize("tokens", [3, 20])
def test_a_gradient_reaches_x_and_inference_mode_runs(scheme, tokens):
    q, x = drawn(scheme, (48, 128)), torch.randn(tokens, 128, requires_grad=True)
    y = nn.functional.linear(x, q)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(tokens, 128), rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(nn.functional.linear(x, q), y)


@pytest.mark.parametrize("scheme", [one for one in planes._cases() if planes._multiplies_codes(Scheme.parse(one))])
def test_products_of_codes_are_the_same_bits_on_every_instruction_set(scheme):
    """Sums of integers are exact, and what follows is added in one order."""
    q, batches = drawn(scheme, (50, 1024)), [torch.randn(tokens, 1024) for tokens in (1, 3, 8, 40)]
    try:
        results = []
        for name in SETS:
            try:
                library.use(name)
            except lowp.LowpError:
                continue
            results.append([LINEAR.run(x, q.packed, q.spec, None) for x in batches])
    finally:
        library.use()
    for other in results[1:]:
        assert all(torch.equal(y, expected) for y, expected in zip(other, results[0], strict=True))


def test_sums_of_many_large_products_do_not_overflow(instructions):
    for scheme in ("int8/row@int8/row", "uint8/row+uint8@int8/row", "int7/row@int8/row+int8"):
        q = QTensor.quantize(torch.full((17, 28672), 1.0), scheme).to_layout("planes")
        for tokens in (1, 9):
            x = torch.full((tokens, 28672), -127.0)
            expected = reference(x, q.packed, q.spec, None, torch.float64)
            assert relative_error(expected, LINEAR.run(x, q.packed, q.spec, None)) < 1e-5


def test_a_cut_of_the_rows_of_a_stack_multiplies():
    (kernel,) = (kernel for kernel in kernels_of("grouped") if kernel.name == "planes")
    x, offs = torch.randn(10, 128), torch.tensor([3, 3, 10], dtype=torch.int32)
    for scheme in ("int4/1x32*bf16@int8/row+int8", "int4/1x32*bf16+int8"):
        q = drawn(scheme, (3, 64, 128))
        part, whole = q[:, 16:48], kernel.run(x, q.packed, q.spec, offs)
        assert torch.equal(kernel.run(x, part.packed, part.spec, offs), whole[:, 16:48])


def test_calls_leave_no_memory_behind():
    q, x, bias = drawn("int4/1x32*bf16@int8/row+int8", (64, 128)), torch.randn(2, 128), torch.randn(64)
    statm = pathlib.Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("wants Linux's /proc")

    def pages_after(calls):
        for _ in range(calls):
            LINEAR.run(x, q.packed, q.spec, bias)
        return int(statm.read_text().split()[1])

    before = pages_after(1000)
    assert (
        pages_after(20000) - before < 256
    )  # a handle of a tensor that is never given back takes 300 bytes: 1,400 pages


def test_a_cut_of_rows_multiplies():
    q, x = drawn("int4/1x32*bf16@int8/row+int8", (100, 128)), torch.randn(3, 128)
    whole = LINEAR.run(x, q.packed, q.spec, None)
    part = q[32:]
    assert torch.equal(LINEAR.run(x, part.packed, part.spec, None), whole[:, 32:])


@pytest.mark.parametrize("scheme", ["int4/1x32*bf16", "int4/1x64*bf16+int8@int8/row+int8", "nf4/1x64*int8/1x256"])
def test_torch_accepts_the_operator(scheme):
    q = drawn(scheme, (48, 128))
    told = planes._told(q.scheme, (48, 128))
    weight, sums = planes._weight(q.packed), q.packed.get("row_sum")
    torch.library.opcheck(
        torch.ops.lowp.planes_linear, (torch.randn(3, 128), *weight, sums, None, torch.randn(48), *told)
    )
    ids = torch.tensor([1, 5, 47])
    torch.library.opcheck(torch.ops.lowp.planes_embedding, (ids, *weight, *told))


def test_ids_beyond_the_table_and_wrong_sizes_are_errors():
    q = drawn("int4/1x32*bf16", (48, 128))
    told, weight = planes._told(q.scheme, (48, 128)), planes._weight(q.packed)
    with pytest.raises(IndexError, match="out of range in a table of 48 rows: 48"):
        torch.ops.lowp.planes_embedding(torch.tensor([48]), *weight, *told)
    with pytest.raises((RuntimeError, ValueError), match="K = 128 columns side by side"):
        torch.ops.lowp.planes_linear(torch.randn(3, 64), *weight, None, None, None, *told)
    with pytest.raises((RuntimeError, ValueError), match="64 x 128 codes want 4096 contiguous bytes, got 3072"):
        torch.ops.lowp.planes_linear(torch.randn(3, 128), *weight, None, None, None, *planes._told(q.scheme, (64, 128)))


def test_arguments_that_do_not_go_together_are_errors():
    q = drawn("int4/1x64*bf16+int8@int8/row+int8", (48, 128))
    (*weight,), sums, told = planes._weight(q.packed), q.packed["row_sum"], planes._told(q.scheme, (48, 128))
    x = torch.randn(3, 128)

    def error(message, x=x, weight=weight, sums=sums, act_scale=None, bias=None):
        with pytest.raises((RuntimeError, ValueError), match=message):
            torch.ops.lowp.planes_linear(x, *weight, sums, act_scale, bias, *told)

    error("x in float32, bfloat16 or float16", x=x.double())
    error("x in float32, bfloat16 or float16", x=x.to(torch.uint8))
    error("x of 2 axes with K = 128", x=x[0])
    error("bias of 48 numbers side by side, got 8", bias=torch.randn(8))
    error("bias of 48 numbers side by side, got 48, apart", bias=torch.randn(96)[::2])
    error("bias in float32", bias=torch.randn(48).double())
    error("wants the sums of the weight's rows", sums=None)
    error("sums of rows of 48 numbers", sums=sums[:2])
    error("zero point of 96 numbers", weight=[*weight[:2], weight[2][:1], *weight[3:]])
    error("static scale of 1 numbers", act_scale=torch.rand(3))
    error("scales in float32, bfloat16", weight=[weight[0], weight[1].double(), *weight[2:]])
    error("zero points in float32, bfloat16", weight=[*weight[:2], weight[2].long(), *weight[3:]])
    stack = drawn("int4/1x32*bf16", (3, 48, 128))
    told = planes._told(stack.scheme, (3, 48, 128))
    for offs in (torch.tensor([1, 3]), torch.tensor([1, 2, 3])):
        with pytest.raises((RuntimeError, ValueError), match="wants offsets in int32"):
            torch.ops.lowp.planes_grouped(x, *planes._weight(stack.packed), None, None, offs, *told)
    with pytest.raises((RuntimeError, ValueError), match="offsets of 3 numbers"):
        torch.ops.lowp.planes_grouped(x, *planes._weight(stack.packed), None, None, torch.tensor([3]).int(), *told)
    with pytest.raises((RuntimeError, ValueError), match="a matrix for each of 3 experts"):
        torch.ops.lowp.planes_grouped(torch.randn(2, 4, 128), *planes._weight(stack.packed), None, None, None, *told)


def test_an_instruction_set_that_is_not_here_is_an_error():
    with pytest.raises(lowp.LowpError, match="use wants an instruction set that this CPU has, got 'abacus'"):
        library.use("abacus")


def test_a_tied_table_is_packed_once_and_compiles_to_one_graph():
    torch._dynamo.reset()

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    model = Tied().to(torch.bfloat16)
    report = lowp.quantize_(model, {"*": "int4/1x32*bf16"})
    assert model.head.weight is model.embed.weight and model.embed.weight.spec.layout == "planes"
    assert [(row.kernel, row.tied) for row in report.rows] == [("planes", ("head.weight",))]
    ids = torch.randint(0, 96, (2, 5))
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(ids), model(ids))


def test_without_the_library_lowp_says_why(monkeypatch):
    monkeypatch.setattr(planes, "_MISSING", "wants lowp's C++ library, which was not built")
    from lowp.ops.registry import Case, verdicts

    case = Case(op="linear", scheme="int4/1x32*bf16", layout="planes")
    found = {verdict.kernel.name: verdict for verdict in verdicts(case)}
    assert found["planes"].why_not == "wants lowp's C++ library, which was not built"
    assert found["dequantize"].chosen


@pytest.mark.parametrize("scheme", planes._cases())
def test_no_dtype_of_x_falls_to_a_slower_way(scheme):
    """float16 and float32 too: torch's own products of them take up to a hundred times as long on a CPU."""
    for dtype in ("bfloat16", "float16", "float32"):
        case = Case(op="linear", scheme=scheme, layout="planes", device="cpu", dtype=dtype, shape=(256, 1024))
        assert pick(case).name == "planes"


def test_a_frozen_compiled_model_still_holds_codes():
    """Freezing folds what is computed from weights alone; the product takes x, so nothing of it can be."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).to(torch.bfloat16).eval()
    lowp.quantize_(model, {"*": "int4/1x32*bf16"})
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.no_grad(), config.patch(freezing=True):
        y, (code, *_) = run_and_get_code(torch.compile(model, fullgraph=True), x)
        assert torch.equal(y, model(x))
    assert "planes_linear" in code and "mkldnn" not in code and "extern_kernels.mm" not in code


def test_other_threads_run_meanwhile():
    """The GIL is free during a product: a thread that counts goes on counting."""
    q, x = drawn("int4/1x32*bf16", (1024, 1024)), torch.randn(2000, 1024)
    counted, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        steps = []
        for _ in range(3):
            before = counted[0]
            LINEAR.run(x, q.packed, q.spec, None)
            steps.append(counted[0] - before)
    finally:
        done.set()
        thread.join()
    assert max(steps) > 1000


def test_without_the_library_everything_runs_and_explain_says_so():
    """In a process of its own, which never had it."""
    program = """
import pathlib, torch
from lowp.kernels.cpu import library
library.PATH = pathlib.Path("/nowhere/lowp_cpu.so")
import lowp
from lowp.tensor import QTensor
model = torch.nn.Sequential(torch.nn.Embedding(64, 64), torch.nn.Linear(64, 48))
expected = model(torch.arange(9))
report = lowp.quantize_(model, {"*": "int8/row@int8/row", "0": "int8/row"})
assert (model(torch.arange(9)) - expected).norm() < 0.05 * expected.norm()
assert all(row.kernel != "planes" for row in report.rows), report
print(lowp.explain("linear", "int4/1x32*bf16", device="cpu"))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "install a C++ compiler (g++), then install lowp again" in " ".join(ran.stdout.split())
