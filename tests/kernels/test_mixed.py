"""The mixed product on Hopper: every tiling is right, and the rule chooses among them. Formats are tests/ops/test_kernels.py's.

What needs no GPU: tilings fit the chip, the text compiles for every format where NVRTC is installed.
"""

import concurrent.futures
import dataclasses
import types

import pytest
import torch

from lowp.errors import KernelError
from lowp.kernels import nvrtc
from lowp.kernels.cuda_ import mixed
from lowp.kernels.cuda_.tiling import (
    WORKSPACE,
    Decoded,
    Tiling,
    candidates,
    choose,
    decoded_from,
    estimate_us,
    plan,
    shared_bytes,
)
from lowp.layouts import Spec
from lowp.numerics import Parts, Scheme, dequantize, known_formats
from lowp.numerics.compare import relative_error
from lowp.ops import strict, tuned
from lowp.ops.linear import linear
from lowp.ops.linear import reference as linear_reference
from lowp.ops.registry import Case
from lowp.tensor import QTensor

SHAPES = ((28672, 4096), (4096, 14336), (1024, 8192), (5120, 25600), (200, 192), (72, 64 * 7))
BATCHES = (1, 2, 7, 8, 9, 16, 33, 64, 65, 100, 128, 129, 256, 300, 1000, 8192)
WIDTHS = ("int4/1x64*bf16", "int3/1x64*bf16+bf16", "nf4/1x64*int8/1x256", "e4m3/row", "e2m1/1x16*e4m3/tensor")
FLOAT8 = (  # x in float8: integers and small floats, groups of 32 to 256, rows, and one for each plane of bits
    "int4/1x128*bf16@e4m3/row", "int3/1x64@e4m3/row", "uint4/1x256*fp16@e4m3/row", "int5/row@e4m3/row", "ternary/1x128@e4m3/row",
    "e2m1/1x32*e8m0@e4m3/row", "e2m3/row*bf16@e4m3/row", "e3m2/1x128@e4m3/row", "e4m3/1x64@e4m3/row", "int2/tensor@e4m3/row",
)  # fmt: skip
BOTH = ("int4/1x128*bf16", "int4/1x128*bf16@e4m3/row")  # x in 16 bits and in 8
FORMATS = sorted({str(Scheme.parse(scheme).weight) for scheme in mixed.KERNELS[0].cases})


def divides(scheme, shape):
    block = Scheme.parse(scheme).weight.block
    return block in ("row", "tensor") or shape[1] % int(block.partition("x")[2]) == 0


@pytest.mark.parametrize(
    ("scheme", "shape"), [(one, shape) for one in WIDTHS + FLOAT8 for shape in SHAPES if divides(one, shape)], ids=str
)
def test_candidates_fit_the_chip_and_the_columns(scheme, shape):
    numbers = mixed._numbers(scheme, shape, torch.bfloat16)
    for tokens in BATCHES:
        found = candidates(tokens, shape[1], numbers)
        assert found or shape[1] < 512
        chosen = choose(tokens, *shape, numbers, 132)
        assert (chosen in found) if found else chosen is None
        for one in found:
            own = 1024 + 256  # what the driver takes, and barriers
            assert (
                (shared_bytes(one, numbers) + own) * one.blocks <= 228 * 1024
                and one.stages >= 2
                and one.bm >= min(tokens, 64) / 2
            )
            assert shape[1] // 64 % one.kc == 0 and one.split * one.kc <= shape[1] // 64
            assert one.grid(tokens, *shape, 132) >= 1 and (not one.stream or one.grid(tokens, *shape, 132) <= 132)


def test_the_model_asks_for_more_time_for_more_work():
    tiling = Tiling(wgs=2, bm=128, kc=2)
    times = [estimate_us(tiling, tokens, 14336, 4096, 132) for tokens in (128, 1024, 8192)]
    assert times == sorted(times) and times[2] > 4 * times[1]


@pytest.mark.parametrize("scale", ["uint8/1x256", "e4m3/row", "e4m3/1x16", "e5m2/tensor", "int8/2x4"])
def test_scales_of_scales_that_it_cannot_read_are_refused(scale):
    assert mixed._why_not_scheme(Scheme.parse(f"int4/1x64*{scale}")).startswith(
        "wants scales that are floats, e4m3/tensor"
    )


def test_packed_tensors_are_contiguous():
    """The kernel reads raw addresses: a scale that is one number seen many times must have been written out."""
    q = QTensor.quantize(torch.randn(64, 64), "int4/row")
    one = q.parts().scale[:1].expand(64, 1)
    packed = (
        QTensor.from_parts(q.parts().replace(scale=one), "int4/row", dtype=torch.bfloat16).to_layout("fragments").packed
    )
    assert all(
        tensor.is_contiguous() and tensor.untyped_storage().nbytes() >= tensor.nbytes for tensor in packed.values()
    )


@pytest.mark.skipif(bool(nvrtc.missing_compiler()), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("scheme", [*FORMATS, *FLOAT8])
def test_the_text_compiles_for_every_format(scheme, tmp_path, monkeypatch):
    """Not kept from an earlier run: the compiler itself is asked."""
    monkeypatch.setenv("LOWP_CACHE", str(tmp_path))
    shape = (256, 512)
    for dtype in (torch.bfloat16, torch.float16):
        numbers = mixed._numbers(scheme, shape, dtype)
        for tokens in (1, 300):
            tiling = choose(tokens, *shape, numbers, 132)
            assert mixed.compile_product(tiling, numbers)[:4] == b"\x7fELF"
        assert mixed.compile_decoder(numbers)[:4] == b"\x7fELF"
    assert len(list(tmp_path.rglob("*.cubin"))) == 6


@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 4096), (28672, 4096), (57344, 8192), (200, 1024)], ids=str)
@pytest.mark.parametrize("scheme", ["int4/1x128*bf16", "e2m1/1x32*e8m0", "int8/row", "int4/1x128*bf16@e4m3/row"])
def test_many_tokens_are_decoded_first_in_a_bounded_workspace(scheme, shape):
    numbers = mixed._numbers(scheme, shape, torch.bfloat16)
    least = decoded_from(*shape, numbers)
    assert (least is None) == (scheme in ("int8/row", "int4/1x128*bf16@e4m3/row"))
    for tokens in (1, 256, 511, 512, 2048, 4096, 100_000):
        chosen = plan(tokens, *shape, numbers, 132)
        assert isinstance(chosen, Decoded) == (least is not None and tokens >= least)
        if isinstance(chosen, Decoded):
            rows = chosen.decoded_rows
            assert rows == shape[0] or rows % 256 == 0
            assert 2 * rows * shape[1] <= WORKSPACE


def test_a_decoder_reads_nothing_before_the_kernel_before_it_has_ended():
    """It is launched early the first time already, when the table of a codebook may have been written by the kernel before."""
    body = mixed._file("weight").partition("__global__")[2]
    assert (
        0
        < body.index("griddepcontrol.wait")
        < min(body.index(read) for read in ("fill_table(", "load_codes(", "load_rows("))
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [64, 128, 192, 1000])
def test_pieces_of_a_decoded_weight_are_the_whole_product(rows, bias, monkeypatch):
    w_NK, x_MK, b = torch.randn(200, 96), torch.randn(7, 96), torch.randn(200) if bias else None

    def decode(packed, spec, dtype, first=0, out=None):
        return w_NK if out is None else out.copy_(w_NK[first : first + out.shape[0]])

    monkeypatch.setattr(mixed, "decode", decode)
    spec = Spec(scheme="int4/1x32", layout="fragments", shape=(200, 96))
    y_MN = mixed._multiply_decoded(x_MK, {}, spec, b, rows)
    assert torch.allclose(y_MN, torch.nn.functional.linear(x_MK, w_NK, b), atol=1e-5)


def weight(scheme, n=320, k=1024, dtype=torch.bfloat16):
    return QTensor.quantize(torch.randn(n, k, device="cuda", dtype=dtype) * 0.05, scheme).to_layout("fragments")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", WIDTHS + FLOAT8)
def test_every_tiling_is_right_and_deterministic(scheme, dtype, poison):
    q = weight(scheme, n=200, dtype=dtype)
    numbers = mixed._numbers(q.spec.scheme, q.spec.shape, dtype)
    bias = torch.randn(200, device="cuda", dtype=dtype)
    for tokens in (1, 13, 40, 100, 300):
        x = torch.randn(tokens, 1024, device="cuda", dtype=dtype)
        expected = linear_reference(x, q.packed, q.spec, bias)
        for tiling in candidates(tokens, 1024, numbers):
            y = mixed.product(x, q.packed, q.spec, bias, tiling)
            assert relative_error(expected, y) <= q.format.tolerance(dtype), (tokens, tiling)
            assert torch.equal(y, mixed.product(x, q.packed, q.spec, bias, tiling)), (tokens, tiling)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", FORMATS)
def test_decoding_a_whole_weight(scheme, poison):
    q = weight(scheme)
    values = dequantize(q.parts(), q.format)
    for dtype in (torch.bfloat16, torch.float16):
        # the element is exact; its scale and the product are rounded once each
        whole = mixed.decode(q.packed, q.spec, dtype)
        assert relative_error(values, whole) <= 1.5 * torch.finfo(dtype).eps
        piece = mixed.decode(q.packed, q.spec, dtype, 64, torch.empty_like(whole[64:200]))
        assert torch.equal(piece, whole[64:200])


def case_for(q, dtype=torch.bfloat16):
    from lowp.ops.registry import case_of

    return case_of("linear", torch.empty(0, q.shape[1], device="cuda", dtype=dtype), q.packed, q.spec)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", BOTH)
def test_inputs_as_they_come(scheme):
    """Strided, unaligned, empty, many axes, a bias of another dtype, more rows than a multiple of 8."""
    q = weight(scheme, n=203)
    bias = torch.randn(203, device="cuda")
    big = torch.randn(40, 3000, device="cuda", dtype=torch.bfloat16)
    odd = torch.randn(40, 3001, device="cuda", dtype=torch.bfloat16)[
        :1, :1024
    ]  # one row, and a stride that nobody reads
    for x in (
        big[:, 5:1029],
        big[::3, 8:1032],
        big[:0, :1024],
        big[:, :1024].reshape(4, 10, 1024),
        big[3, 1:1025],
        odd,
    ):
        y = linear(x.reshape(-1, 1024) if x.dim() != 2 else x, q.packed, q.spec, bias)
        expected = linear_reference(x.reshape(-1, 1024), q.packed, q.spec, bias)
        assert relative_error(expected, y.reshape(expected.shape)) <= q.format.tolerance(torch.bfloat16)
    assert torch.nn.functional.linear(big[:6, :1024].reshape(2, 3, 1024), q).shape == (2, 3, 203)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", BOTH)
def test_streams_and_graphs(scheme):
    """Two streams at once share nothing, and a graph replays with new numbers in the same place."""
    q = weight(scheme, n=4096, k=4096)
    xs = [torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16) for m in (300, 17)]
    expected = [linear(x, q.packed, q.spec) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(linear(x, q.packed, q.spec))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected[i % 2]) for i, result in enumerate(results))
    static = xs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(static, q.packed, q.spec)
    static.copy_(2 * xs[0])
    graph.replay()
    assert torch.equal(y, linear(2 * xs[0], q.packed, q.spec))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", BOTH)
def test_threads_do_not_share_a_launch(scheme):
    q = weight(scheme, n=1024, k=1024)
    xs = [torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16) for m in (1, 5, 17, 64)]
    expected = [linear(x, q.packed, q.spec) for x in xs]
    torch.cuda.synchronize()

    def serve(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [linear(xs[i], q.packed, q.spec) for _ in range(300)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(result, expected[i]) for result in results)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(serve, range(4)))


@pytest.mark.gpu
def test_what_lies_elsewhere_is_an_error():
    q, x = weight("int4/1x128*bf16"), torch.randn(2, 1024, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(KernelError, match="wants a bias on cuda:0"):
        linear(x, q.packed, q.spec, torch.zeros(320))
    with pytest.raises(KernelError, match="wants a weight on cuda:0"):
        mixed._run(x, {name: tensor.cpu() for name, tensor in q.packed.items()}, q.spec, None)


@pytest.mark.gpu
def test_rows_cut_from_a_weight():
    q = weight("int4/1x128*bf16", n=512)
    x = torch.randn(9, 1024, device="cuda", dtype=torch.bfloat16)
    whole, part = torch.nn.functional.linear(x, q), torch.nn.functional.linear(x, q[128:320])
    assert relative_error(whole[:, 128:320], part) <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", BOTH)
def test_a_weight_that_is_written_to_is_read_anew(scheme):
    """A product may begin before the kernel in front of it has ended, but not while that one writes the weight."""
    x = torch.randn(2, 4096, device="cuda", dtype=torch.bfloat16)
    first, second = (weight(scheme, n=14336, k=4096) for _ in range(2))
    expected = [linear(x, q.packed, q.spec) for q in (first, second)]
    held = first.clone()
    for _ in range(3):
        for q, y in zip((first, second), expected, strict=True):
            for _ in range(2):
                assert torch.equal(linear(x, held.packed, held.spec), linear(x, held.packed, held.spec))
            held.copy_(q)
            assert torch.equal(linear(x, held.packed, held.spec), y)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", BOTH)
def test_products_that_follow_one_another(scheme):
    """Each reads what the one before it wrote."""
    q = weight(scheme, n=4096, k=4096)
    start = x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(50):
        x = linear(x, q.packed, q.spec) * 0.3
    y = start
    for _ in range(50):
        torch.cuda.synchronize()
        y = linear(y, q.packed, q.spec)
        torch.cuda.synchronize()
        y = y * 0.3
    assert torch.equal(x, y)


def test_which_schemes_float8_tensor_cores_multiply():
    assert all(mixed._in_float8(str(Scheme.parse(scheme)), (256, 512)) for scheme in FLOAT8)
    for other in (
        "int4/1x128*bf16", "int6/1x128@e4m3/row", "uint5/1x128@e4m3/row", "nf4/1x64@e4m3/row", "int4/1x128*bf16+bf16@e4m3/row",
        "int4/1x16@e4m3/row", "int4/1x128@e4m3/tensor", "int4/1x128@int8/row", "e2m1/1x16*e4m3/tensor@e4m3/row",
    ):  # fmt: skip
        assert not mixed._in_float8(str(Scheme.parse(other)), (256, 512)), other
    assert not any(mixed._in_float8("int4/1x64@e4m3/row", (256, columns)) for columns in (192, 256, 448))


def test_sums_that_run_on_are_for_bf16_and_columns_that_are_not_many():
    for columns, dtype in ((4096, torch.bfloat16), (28672, torch.bfloat16), (4096, torch.float16)):
        numbers = mixed._numbers("int4/1x128@e4m3/row", (4096, columns), dtype)
        tokens = {one.bm for one in candidates(4096, columns, numbers)}
        assert (256 in tokens) == (columns == 4096 and dtype == torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", FLOAT8)
def test_float8_activations_scaled_before_and_by_a_static_scale(scheme, dtype):
    q = weight(scheme, n=192, k=1024, dtype=dtype)
    pre = torch.rand(1024, device="cuda") + 0.5
    for more in ({"act_pre_scale": pre}, {"act_scale": torch.full((), 0.01, device="cuda")}):
        packed = q.packed | more
        for tokens in (3, 400):
            x = torch.randn(tokens, 1024, device="cuda", dtype=dtype)
            assert mixed._tiling(mixed._weight(q.spec.scheme, q.spec.shape, dtype, x.device), tokens) is not None
            with strict():
                y = linear(x, packed, q.spec)
            assert relative_error(linear_reference(x, packed, q.spec), y) <= q.format.tolerance(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [5, 512])
def test_float8_products_of_small_integers_are_exact(tokens):
    """Scales that part by powers of two, a negative one, zeros, one out of reach of those before; each token by itself."""
    rows, columns, group = 192, 1024, 128
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, device="cuda")
    codes[:, 0], codes[:, 3 * group : 4 * group] = 1, 0
    powers = torch.tensor([1.0, 2.0**-70, 4.0, 0.0, -2.0, 0.5, 2.0**-70, 1.0], device="cuda")
    parts = Parts(qdata=codes, scale=powers.expand(rows, -1).contiguous())
    q = QTensor.from_parts(parts, "int4/1x128@e4m3/row", dtype=torch.bfloat16).to_layout("fragments")
    x = torch.zeros(tokens, columns, device="cuda", dtype=torch.bfloat16)
    x[:, ::64] = torch.randint(-4, 5, (tokens, 16), device="cuda").bfloat16()
    x[:, 0] = 448  # the largest e4m3 number: the scale of each token is 1
    x[0] = 0
    near = (codes.double() * (powers.abs() > 1e-6).double().repeat_interleave(group)).mul(
        powers.double().repeat_interleave(group)
    )
    y = linear(x, q.packed, q.spec)
    assert torch.equal(y, (x.double() @ near.T).bfloat16())
    x[2, 5], x[3, 7] = torch.nan, torch.inf
    lost = linear(x, q.packed, q.spec)
    assert not bool(lost[2:4].isfinite().any()) and torch.equal(lost[4:], y[4:]) and torch.equal(lost[:2], y[:2])


@pytest.mark.gpu
def test_float8_products_of_many_columns_and_outliers():
    """Sums that only grow lose the most bits; an outlier of a token leaves few for the others."""
    q = weight("int4/1x128*bf16@e4m3/row", n=256, k=16384)
    for tokens in (16, 1024):
        x = torch.randn(tokens, 16384, device="cuda", dtype=torch.bfloat16).abs()
        x[:, ::1000] *= 50
        expected = linear_reference(x, q.packed, q.spec)
        assert relative_error(expected, linear(x, q.packed, q.spec)) <= q.format.tolerance(torch.bfloat16)


@pytest.mark.gpu
def test_measured_choices_are_taken():
    q = weight("int4/1x128*bf16")
    x = torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16)
    for config in mixed._candidates(case_for(q), 4):
        with tuned.forced("mixed", config):
            y = linear(x, q.packed, q.spec)
        assert relative_error(linear_reference(x, q.packed, q.spec), y) <= q.format.tolerance(torch.bfloat16)


@pytest.mark.parametrize("scheme", ["int4/1x128*bf16", "int4/1x128*bf16@e4m3/row"])
def test_what_was_measured_decides_and_the_rule_without_it(scheme, monkeypatch):
    hopper = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)
    one = mixed._weight.__wrapped__(scheme, (1024, 4096), torch.bfloat16, torch.device("cuda", 0))
    case = Case(op="linear", scheme=scheme, layout="fragments", device="cuda", shape=(1024, 4096), sm=90)
    with tuned.forced("mixed", None):
        rule = mixed._tiling(one, 2048)
        assert rule is not None
    configs = mixed._candidates(case, 2048)
    assert {"decoded_rows": 1024} in configs
    for config in configs:
        with tuned.forced("mixed", config):
            assert config == dataclasses.asdict(mixed._tiling(one, 2048))
    with tuned.forced("mixed", {"knob": 1}):  # of another version
        assert mixed._tiling(one, 2048) == rule


def test_what_it_leaves_to_others():
    """8-bit times 8-bit, tables of 256 values, blocks of several rows, and zero points of whole rows: each has its own kernel."""
    refused = {known.spelling for known in known_formats() if known.spelling not in mixed.KERNELS[0].cases}
    eight_bits = {"e4m3/row@e4m3/row", "e4m3/tensor@e4m3/tensor", "int8/row@int8/row", "e4m3/128x128@e4m3/1x128"}
    assert refused == eight_bits | {"bf16", "dyn8/1x256", "udyn8/1x256", "uint8/tensor+int32"}
