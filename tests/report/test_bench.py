"""A time is given only for a right result, its row says what it is compared with, and what fails costs its own row alone."""

import dataclasses
import math

import pytest
import torch

from lowp.errors import KernelError, SpellingError
from lowp.numerics import known_formats
from lowp.ops import kernels_of
from lowp.report import bench as module
from lowp.report import clock
from lowp.report.bench import bench, bench_kernel, error_of, lines, runnable, slowest, subject_of, sweep
from lowp.report.clock import Limits


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(clock, "CPU_SECONDS", 1e-4)


@pytest.fixture
def dequantize():
    (kernel,) = [k for k in kernels_of("linear") if k.name == "dequantize"]
    return kernel


def raising_at(kernel, batch):
    def run(x, *rest):
        if len(x) == batch:
            raise ZeroDivisionError("out of luck")
        return kernel.run(x, *rest)

    return dataclasses.replace(kernel, name="unlucky", run=run)


@pytest.mark.parametrize(
    ("op", "scheme"), [("linear", "int8"), ("matmul", "int4/1x32*bf16"), ("embedding", "e4m3/row")]
)
def test_every_op_is_timed(op, scheme, device):
    found = list(bench(op, scheme, (64, 128), (1, 5), device=str(device), every=True))
    assert {one.batch for one in found} == {1, 5}
    for one in found:
        assert one.right and one.us > 0 and one.bf16_us > 0
        assert (one.fp32_us is not None) == (device.type == "cpu")
        given = one.to_row()
        assert given["what"] == op and given["ratio"] == pytest.approx(one.us / one.bf16_us, rel=1e-3)
        assert (given["M"], given["N"], given["K"]) == (one.batch, 64, 128)


def test_a_wrong_result_gets_no_time(dequantize):
    def one_row(x, *rest):  # the last token alone, and what it should have written is left as it was
        y = torch.empty(len(x), 64)
        y[:-1] = dequantize.run(x, *rest)[:-1]
        return y

    def times(factor):
        return lambda x, *rest: dequantize.run(x, *rest) * factor

    for bad in (times(1.1), times(torch.nan), one_row):
        wrong = dataclasses.replace(dequantize, run=bad)
        (one,) = bench_kernel(wrong, "int8/row", (64, 128), (300,), device="cpu", dtype=torch.float32)
        assert not one.right and one.us is None and one.speed is None
        with pytest.raises(KernelError, match="wants an error of at most"):
            one.to_row()


def test_one_that_raises_does_not_lose_the_others(dequantize):
    unlucky = raising_at(dequantize, 2)
    found = list(bench_kernel(unlucky, "int8/row", (64, 128), (1, 2, 3), device="cpu", dtype=torch.float32))
    assert [one.right for one in found] == [True, False, True]
    assert found[1].failed == "ZeroDivisionError: out of luck" and "out of luck" in found[1].why_wrong()
    assert found[1].to_dict()["error"] is None  # JSON has no NaN


def test_a_sweep_goes_on_where_a_scheme_does_not_fit():
    found = list(sweep("linear", ["int4/1x128*bf16", "int8/row"], [(64, 96), (64, 128)], (1,)))
    assert [(one.shape[1], one.scheme, one.right) for one in found] == [
        (96, "int4/1x128*bf16", False), (96, "int8/row", True), (128, "int4/1x128*bf16", True), (128, "int8/row", True),
    ]  # fmt: skip
    by_scheme = lines(found)
    assert list(by_scheme) == ["int4/1x128*bf16", "int8/row"] and sum(map(len, by_scheme.values())) == 4
    for line in by_scheme.values():
        assert slowest(line).speed == min(one.speed for one in line if one.right)
    assert slowest([one for one in found if not one.right]) is None


def test_several_kernels_on_one_case_are_lines_of_their_own():
    found = list(bench("linear", "int8/row", (64, 128), (1, 2), every=True))
    kernels = dict.fromkeys(one.kernel for one in found)
    assert len(kernels) > 1 and list(lines(found)) == [f"int8/row, {kernel}" for kernel in kernels]


def test_bf16_is_timed_once_for_a_shape_and_batch(monkeypatch):
    timed = []
    monkeypatch.setattr(module, "_float_calls", lambda s, batch, dtype: timed.append((batch, dtype)) or [lambda: s.x])
    found = list(sweep("linear", ["int8/row", "e4m3/row"], [(64, 128)], (1, 2)))
    assert len(found) == 4 and len(timed) == len(set(timed)) == 4  # 2 batches in bf16 and in fp32
    assert found[0].bf16_us == found[2].bf16_us


@pytest.mark.parametrize("scheme", [known.spelling for known in known_formats()])
def test_the_decoded_reference_is_the_reference(scheme, dequantize, device):
    """The fallback is right on every scheme, however its activation's scales are shared, and on more tokens than are compared."""
    subject = subject_of(dequantize, scheme, (128, 256), 150, device=str(device), dtype=torch.float32)
    for batch in (1, 150):
        assert error_of(subject, batch) <= subject.q.format.tolerance(torch.float32)


def test_the_limit_is_what_moves_or_what_is_multiplied(dequantize):
    slow = Limits(bytes_per_s=1e9, bf16_per_s=1e18, bits8_per_s=1e18)
    weak = Limits(bytes_per_s=1e18, bf16_per_s=1e9, bits8_per_s=4e9)
    settings = dict(device="cpu", dtype=torch.bfloat16)
    for scheme, times in (("int8/row", 1), ("int8/row@int8/row", 4), ("int4/1x32*bf16@e4m3/row", 4)):
        (one,) = bench_kernel(dequantize, scheme, (64, 128), (3,), limits=weak, **settings)
        assert one.limit_us == pytest.approx(2 * 3 * 64 * 128 / 1e3 / times)
        assert one.over_limit == pytest.approx(one.us / one.limit_us)
    (one,) = bench_kernel(dequantize, "int8/row", (64, 128), (3,), limits=slow, **settings)
    assert one.limit_us == pytest.approx((64 * 128 + 64 * 4 + 3 * (64 + 128) * 2) / 1e3)
    assert one.to_row()["limit_us"] == pytest.approx(one.limit_us, rel=1e-3)


def test_an_unknown_op_is_answered_with_the_known():
    with pytest.raises(SpellingError, match="linear"):
        next(bench("linaer", "int8", (64, 64), (1,)))


def test_the_table_is_listed_with_reasons():
    rows = list(runnable("linear", device="cpu", dtype=torch.bfloat16, shape=(128, 256)))
    reasons = {kernel.name: why_not for kernel, _, why_not in rows}
    assert reasons["int8pack_cpu"] == "" and reasons["tinygemm"].startswith("wants")


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_graph_and_the_eager_fallback_agree_on_a_long_call():
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def waits():
        y = x @ x
        y[0, 0].item()
        return y

    graph, eager = clock.median([lambda: x @ x], "cuda"), clock.median([waits], "cuda")
    assert not graph.note and "CUDA graph" in eager.note
    assert 0.5 * graph.us < eager.us < 3 * graph.us + 200


@pytest.mark.gpu
def test_copies_do_not_fit_the_cache_and_limits_are_sane():
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    assert clock.rotation(cache, "cuda") == 3 and clock.rotation(100 * cache, "cuda") == 1
    seen = clock.limits("cuda")
    assert 1e11 < seen.bytes_per_s < 2e13 and 1e13 < seen.bf16_per_s <= seen.bits8_per_s < 2e16
    assert math.isfinite(seen.us(nbytes=1, flops=1.0, bits=16))
