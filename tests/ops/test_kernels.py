"""Every kernel against the reference, over the kernel table: a new kernel needs no new test, only `cases`.

For each kernel, case, dtype and batch: where `why_not` says "" the result matches the reference within the format's
tolerance, with its inputs drawn anew and torch's uninitialised memory poisoned; where it does not, it says why.

On a machine without a GPU, Triton's kernels are asked as if for Hopper (`asked`) and run in Triton's interpreter on CPU tensors.
"""

import dataclasses

import pytest
import torch

from lowp.errors import KernelError
from lowp.kernels.triton_ import interpreted
from lowp.numerics import Parts, Scheme, known_formats
from lowp.numerics.compare import relative_error
from lowp.ops import Case, best_layout, embedding, explain, kernels_of, linear, matmul, pick, strict
from lowp.ops.embedding import reference as embedding_reference
from lowp.ops.linear import reference as linear_reference
from lowp.ops.matmul import reference as matmul_reference
from lowp.ops.registry import case_of, why_not_from_plain
from lowp.tensor import QTensor

N, K = 128, 256
SCHEMES = tuple(known.spelling for known in known_formats())
CPU = Case(op="linear", scheme="int8/row")
LINEAR = [(kernel, scheme) for kernel in kernels_of("linear") for scheme in (kernel.cases or SCHEMES)]


def asked(kernel, case):
    """The case to ask a kernel: this one, or for a Triton kernel that its interpreter will run here, the same on a GPU."""
    run = getattr(kernel.run, "func", kernel.run)
    if case.device == "cpu" and interpreted() and run.__module__.startswith("lowp.kernels.triton_."):
        return dataclasses.replace(case, device="cuda", sm=90)
    return case


def packed_for(kernel, scheme, dtype, device, *, shape=(N, K), **extras):
    """A weight in the layout the kernel wants, or the reason why it cannot run here."""
    weight = torch.randn(shape, device=device, dtype=dtype) * 0.05
    q = QTensor.quantize(weight, scheme)
    if extras:
        q = QTensor.from_parts(q.parts().replace(**extras), scheme, dtype=dtype)
    x = torch.empty(0, shape[-1], device=device, dtype=dtype)
    why_not = why_not_from_plain(kernel, asked(kernel, case_of(kernel.op, x, q.packed, q.spec)))
    return (q, why_not) if why_not else (q.to_layout(kernel.layout or "plain"), "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kernel", "scheme"), LINEAR, ids=[f"{kernel.name}-{scheme}" for kernel, scheme in LINEAR])
def test_linear_kernels_match_the_reference(kernel, scheme, dtype, device, poison):
    q, why_not = packed_for(kernel, scheme, dtype, device)
    if why_not:
        assert why_not.startswith("wants"), why_not
        return
    bias = torch.randn(N, device=device, dtype=dtype)
    for batch in (1, 33) if asked(kernel, CPU) is not CPU else (1, 16, 33):  # the interpreter is slow
        x = torch.randn(batch, K, device=device, dtype=dtype)
        b = bias if batch > 1 else None
        y = kernel.run(x, q.packed, q.spec, b)
        assert (y.dtype, y.shape) == (dtype, (batch, N))
        assert relative_error(linear_reference(x, q.packed, q.spec, b), y) <= q.format.tolerance(dtype)


def off_by_8(tensor):
    """The same tensor where memory mapped from a file may lie: 8 bytes past a boundary of 64."""
    space = torch.empty(tensor.nbytes + 128, dtype=torch.uint8, device=tensor.device)
    start = (8 - space.data_ptr()) % 64
    moved = space[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return moved.copy_(tensor)


@pytest.mark.parametrize(("kernel", "scheme"), LINEAR, ids=[f"{kernel.name}-{scheme}" for kernel, scheme in LINEAR])
def test_linear_kernels_take_weights_that_lie_anywhere(kernel, scheme):
    """On a CPU, where a checkpoint's tensors are views of a mapped file; elsewhere they are copied there."""
    q, why_not = packed_for(kernel, scheme, torch.bfloat16, torch.device("cpu"))
    if why_not or asked(kernel, CPU) is not CPU:
        return
    moved = {name: off_by_8(tensor) for name, tensor in q.packed.items()}
    for batch in (1, 4, 33):
        x = torch.randn(batch, K, dtype=torch.bfloat16)
        assert torch.equal(kernel.run(x, moved, q.spec, None), kernel.run(x, q.packed, q.spec, None))


@pytest.mark.parametrize(("kernel", "scheme"), LINEAR, ids=[f"{kernel.name}-{scheme}" for kernel, scheme in LINEAR])
def test_linear_with_pre_scale_and_static_scale(kernel, scheme, device):
    act = Scheme.parse(scheme).act
    extras = {"act_pre_scale": torch.rand(K, device=device) + 0.5}
    if act is not None and act.block in ("row", "tensor") and not act.zero_point and act.nested is None:
        extras["act_scale"] = torch.full((), 4.0 / act.element.max, device=device)
    q, why_not = packed_for(kernel, scheme, torch.bfloat16, device, **extras)
    if why_not:
        assert why_not.startswith("wants"), why_not
        return
    x = torch.randn(20, K, device=device, dtype=torch.bfloat16)
    y = kernel.run(x, q.packed, q.spec, None)
    # x * act_pre_scale is rounded to bfloat16 before it is quantized, so codes near a tie may differ by one
    assert relative_error(linear_reference(x, q.packed, q.spec), y) <= 3 * q.format.tolerance(torch.bfloat16)


def test_the_reference_is_the_definition(device):
    """y = act_quantize(x) @ ((qdata - zero_point) * scale).T + bias, written out once more by hand."""
    q = QTensor.quantize(torch.randn(N, K, device=device), "int4/1x64+fp32@int8/row")
    parts, x, bias = q.parts(), torch.randn(7, K, device=device), torch.randn(N, device=device)
    spread = {name: getattr(parts, name).repeat_interleave(64, dim=1) for name in ("scale", "zero_point")}
    weight = (parts.qdata.float() - spread["zero_point"]) * spread["scale"]
    x_scale = x.abs().amax(dim=1, keepdim=True) / 127
    y = ((x / x_scale).round() * x_scale) @ weight.T + bias
    assert relative_error(y, linear_reference(x, q.packed, q.spec, bias)) < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_embedding_kernels_match_the_reference(scheme, device):
    q = QTensor.quantize(torch.randn(N, K, device=device), scheme.split("@")[0])
    ids = torch.randint(0, N, (3, 5), device=device)
    expected = embedding_reference(ids, q.packed, q.spec, torch.bfloat16)
    for kernel in kernels_of("embedding"):
        if not why_not_from_plain(kernel, asked(kernel, case_of("embedding", ids, q.packed, q.spec))):
            laid = q.to_layout(kernel.layout or "plain")
            assert torch.equal(kernel.run(ids, laid.packed, laid.spec, torch.bfloat16), expected), kernel.name
            assert torch.equal(embedding(ids, laid.packed, laid.spec, torch.bfloat16), expected), kernel.name


def test_embedding_of_strided_ids(device):
    q = QTensor.quantize(torch.randn(N, K, device=device), "int4/1x64*bf16")
    ids = torch.randint(0, N, (3, 6), device=device)[:, :-1]
    expected = embedding_reference(ids, q.packed, q.spec, torch.bfloat16)
    for kernel in kernels_of("embedding"):
        if not why_not_from_plain(kernel, asked(kernel, case_of("embedding", ids, q.packed, q.spec))):
            laid = q.to_layout(kernel.layout or "plain")
            assert torch.equal(kernel.run(ids, laid.packed, laid.spec, torch.bfloat16), expected), kernel.name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_matmul_of_stacked_experts(scheme, device):
    q = QTensor.quantize(torch.randn(2, 128, 256, device=device), scheme.split("@")[0])
    x = torch.randn(2, 6, 128, device=device)
    y = matmul(x, q.packed, q.spec)
    assert y.shape == (2, 6, 256)
    assert relative_error(x @ q.dequantize(), y) < 1e-5
    expected = matmul_reference(x, q.packed, q.spec)
    for kernel in kernels_of("matmul"):
        if not why_not_from_plain(kernel, asked(kernel, case_of("matmul", x, q.packed, q.spec))):
            laid = q.to_layout(kernel.layout or "plain")
            assert relative_error(expected, kernel.run(x, laid.packed, laid.spec, False)) < 1e-5, kernel.name
            back = torch.randn(2, 6, 256, device=device)
            by_rows = matmul_reference(back, q.packed, q.spec, True)
            assert relative_error(by_rows, kernel.run(back, laid.packed, laid.spec, True)) < 1e-5, kernel.name


def test_leading_axes_empty_batches_and_nan(device):
    q = QTensor.quantize(torch.randn(N, K, device=device), "int8/row@int8/row")
    assert linear(torch.randn(2, 3, K, device=device), q.packed, q.spec).shape == (2, 3, N)
    assert linear(torch.randn(0, K, device=device), q.packed, q.spec).shape == (0, N)
    x = torch.randn(4, K, device=device)
    x[1, 5] = torch.nan
    y = linear(x, q.packed, q.spec)
    assert y[1].isnan().all(), "a NaN must stay visible"
    assert y[[0, 2, 3]].isfinite().all(), "and stay in its token"


def test_fp16_does_not_overflow_where_the_result_is_finite(device):
    """int32 sums of large codes pass 65504 long before they are scaled: the scaling must come first."""
    for scheme in ("int8/row@int8/row", "int8/row", "int4/1x128*bf16", "e4m3/row@e4m3/row"):
        q = QTensor.quantize(torch.full((N, K), 0.01, device=device, dtype=torch.float16), scheme)
        y = linear(torch.full((32, K), 300.0, device=device, dtype=torch.float16), q.packed, q.spec)
        assert y.isfinite().all() and y.mean().item() == pytest.approx(300 * 0.01 * K, rel=0.05), scheme


# -- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("op", ["linear", "matmul", "embedding"])
def test_every_scheme_runs_on_every_device_and_explain_agrees_with_pick(op, scheme, device):
    verdicts = explain(op, scheme, device=str(device), shape=(N, K))
    assert [v.chosen for v in verdicts].count(True) == 1
    assert all(v.why_not.startswith(("wants", "a scheme")) for v in verdicts if v.why_not), [
        v.why_not for v in verdicts
    ]
    chosen = next(v for v in verdicts if v.chosen)
    base = dataclasses.replace(
        Case(op=op, scheme=scheme, device=device.type, shape=(N, K)), sm=90 if device.type == "cuda" else 0
    )
    if device.type == "cpu":
        assert pick(dataclasses.replace(base, layout=chosen.kernel.layout or "plain")) is chosen.kernel


def test_best_layout_serves_all_ops_of_a_tied_weight():
    case = Case(op="linear", scheme="int4/1x128*bf16", shape=(N, K))
    layout, kernels, why = best_layout(("linear",), case)
    assert not kernels[0].fallback and kernels[0].layout == layout and why == f"linear by {kernels[0].name}"
    tied = ("embedding", "linear")
    for scheme in ("int4/1x128*bf16", "int8/row"):
        layout, kernels, why = best_layout(tied, dataclasses.replace(case, scheme=scheme))
        assert tuple(kernel.op for kernel in kernels) == tied and all(
            kernel.layout in ("", layout) for kernel in kernels
        )
        assert why.startswith("embedding by ") and "fallback" not in why
    layout, kernels, why = best_layout(tied, dataclasses.replace(case, dtype="float64"))
    assert layout == "plain" and kernels[1].fallback and "fallback" in why


def test_strict_refuses_a_fallback_and_says_why(device):
    q = QTensor.quantize(torch.randn(N, K, device=device), "nf4/1x64*bf16")
    x = torch.randn(4, K, device=device, dtype=torch.float64)
    linear(x, q.packed, q.spec)
    with strict(), pytest.raises(KernelError, match=r"int_mm: wants .*; scaled_mm: wants"):
        linear(x, q.packed, q.spec)
    linear(x, q.packed, q.spec)


def test_a_kernel_that_cannot_be_imported_says_so(monkeypatch):
    from lowp.ops import registry

    def broken(name):
        raise ImportError("No module named 'triton'", name="triton")

    monkeypatch.setattr(registry.importlib, "import_module", broken)
    (kernel,) = registry._load("lowp.kernels.triton_.something")
    assert "triton" in kernel.why_not(Case(op="linear", scheme="int8/row"))


def test_parts_know_their_names():
    with pytest.raises(TypeError):
        Parts.of({"qdata": torch.zeros(1), "colour": torch.zeros(1)})
