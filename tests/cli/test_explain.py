"""`lowp explain` says what `lowp.ops.explain` says, marks the kernel that runs, and answers wrong names with near ones."""

import pytest

from lowp.cli.explain import ops, shape_of
from lowp.errors import SpellingError
from lowp.ops import explain, kernels_of


def test_every_kernel_is_a_row_and_one_is_chosen(lowp):
    for op in ops():
        scheme = next(case for kernel in kernels_of(op) for case in kernel.cases)
        answer = lowp("explain", op, scheme, "--json").json()
        assert [row["kernel"] for row in answer["kernels"]] == [kernel.name for kernel in kernels_of(op)]
        assert sum(row["chosen"] for row in answer["kernels"]) == 1
        assert all(row["can_run"] != bool(row["why_not"]) for row in answer["kernels"])


def test_json_is_what_the_table_of_kernels_says(lowp):
    rows = lowp("explain", "linear", "fp8-dynamic", "--shape", "64x128", "--dtype", "fp16", "--json").json()["kernels"]
    import torch

    verdicts = explain("linear", "fp8_dynamic", shape=(64, 128), dtype=torch.float16)
    assert [(row["kernel"], row["why_not"], row["how"]) for row in rows] == [
        (v.kernel.name, v.why_not, v.how) for v in verdicts
    ]
    assert all(row["can_run"] == bool(row["how"]) for row in rows)


def test_the_table_marks_what_runs(lowp):
    shown = lowp("explain", "linear", "int8").out
    marked = [line for line in shown.splitlines() if line.startswith("│ *")]
    assert len(marked) == 1 and "can run; int8 decoded to " in marked[0]
    assert all(kernel.name in shown for kernel in kernels_of("linear"))


def test_without_arguments_it_lists_ops_presets_and_formats(lowp):
    answer = lowp("explain", "--json").json()
    assert {"linear", "matmul", "embedding"} <= set(answer["ops"])
    assert answer["presets"]["int4"] == "int4/1x128*bf16"
    assert all(known["spelling"] for known in answer["formats"])
    assert "int4/1x128*bf16" in lowp("explain").out
    assert lowp("explain", "linear").code == 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("liner", "int4"), "did you mean 'linear'"),
        (("liner",), "did you mean 'linear'"),
        (("linear", "int44"), "did you mean 'int4'"),
        (("linear", "int4/1x0"), "holds nothing"),
        (("linear", "int4", "--device", "tpu"), "device"),
        (("linear", "int4", "--dtype", "int8"), "dtype"),
        (("linear", "int4", "--shape", "big"), "--shape wants"),
        (("linear", "int4", "--shape", "0x4"), "--shape wants"),
    ],
)
def test_bad_input_is_one_sentence(lowp, arguments, said):
    answer = lowp("explain", *arguments)
    assert answer.is_one_sentence() and said in answer.err


def test_a_group_that_does_not_divide_is_said_by_each_kernel(lowp):
    rows = lowp("explain", "linear", "int4/1x128*bf16", "--shape", "64x100", "--json").json()["kernels"]
    assert not any(row["can_run"] for row in rows)


def test_shapes():
    assert shape_of("8,16x4") == (8, 16, 4)
    with pytest.raises(SpellingError):
        shape_of("-1x4")
