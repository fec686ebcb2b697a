"""A time is given only for a right result, and its row says what it is compared with."""

import dataclasses

import pytest
import torch

from lowp.errors import KernelError, SpellingError
from lowp.ops import kernels_of
from lowp.report import bench as module
from lowp.report.bench import bench, bench_kernel, runnable


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 1e-4)


@pytest.mark.parametrize(
    ("op", "scheme"), [("linear", "int8"), ("matmul", "int4/1x32*bf16"), ("embedding", "e4m3/row")]
)
def test_every_op_is_timed(op, scheme):
    found = list(bench(op, scheme, (64, 128), (1, 5), every=True))
    assert {one.batch for one in found} == {1, 5}
    for one in found:
        assert one.right and one.us > 0 and one.bf16_us > 0 and one.fp32_us > 0
        given = one.to_row()
        assert given["what"] == op and given["ratio"] == pytest.approx(one.us / one.bf16_us, rel=1e-3)


def test_a_wrong_result_gets_no_time():
    (kernel,) = [k for k in kernels_of("linear") if k.name == "dequantize"]
    for bad in (lambda x, *rest: kernel.run(x, *rest) * 1.1, lambda x, *rest: kernel.run(x, *rest) * torch.nan):
        wrong = dataclasses.replace(kernel, run=bad)
        (one,) = bench_kernel(wrong, "int8/row", (64, 128), (4,), device="cpu", dtype=torch.float32)
        assert not one.right and one.us is None
        with pytest.raises(KernelError, match="wrong"):
            one.to_row()


def test_an_unknown_op_is_answered_with_the_known():
    with pytest.raises(SpellingError, match="linear"):
        next(bench("linaer", "int8", (64, 64), (1,)))


def test_the_table_is_listed_with_reasons():
    rows = list(runnable("linear", device="cpu", dtype=torch.bfloat16, shape=(128, 256)))
    reasons = {kernel.name: why_not for kernel, _, why_not in rows}
    assert reasons["int8pack_cpu"] == "" and reasons["tinygemm"].startswith("wants")
