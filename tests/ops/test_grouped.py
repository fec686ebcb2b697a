"""The grouped product: its meaning, every kernel against it, and the way to it from torch._grouped_mm."""

import pytest
import torch

from lowp.errors import MisfitError
from lowp.numerics.compare import relative_error
from lowp.ops import grouped, kernels_of
from lowp.ops.grouped import reference
from lowp.ops.registry import case_of, why_not_from_plain
from lowp.tensor import QTensor

from .test_kernels import asked

E, N, K, T = 4, 48, 128, 21
ENDS = (5, 5, 18, 19)  # the second expert has no token, the last two tokens no expert
SCHEMES = dict.fromkeys(
    scheme
    for kernel in kernels_of("grouped")
    for scheme in (*kernel.cases, "int8/row@int8/row", "int3/1x64*bf16+bf16", "nf4/1x64*int8/1x256")
)


def weights(scheme, dtype, device):
    return QTensor.quantize(torch.randn(E, N, K, device=device, dtype=dtype) * 0.05, scheme)


def offsets(device):
    return torch.tensor(ENDS, dtype=torch.int32, device=device)


def test_the_reference_is_the_definition(device):
    q, x = weights("int4/1x64", torch.float32, device), torch.randn(T, K, device=device)
    y, start = reference(x, q.packed, q.spec, offsets(device)), 0
    for w, end in zip(q.dequantize(), ENDS, strict=True):
        torch.testing.assert_close(y[start:end], x[start:end] @ w.T)
        start = end


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernel", kernels_of("grouped"), ids=lambda kernel: kernel.name)
def test_grouped_kernels_match_the_reference(kernel, scheme, dtype, device, poison):
    q = weights(scheme, dtype, device)
    for x, offs in (
        (torch.randn(T, K, device=device, dtype=dtype), offsets(device)),
        (torch.randn(E, 3, K, device=device, dtype=dtype), None),
    ):
        why_not = why_not_from_plain(kernel, asked(kernel, case_of("grouped", x, q.packed, q.spec)))
        if why_not:
            assert why_not.startswith("wants"), why_not
            return
        laid = q.to_layout(kernel.layout or "plain")
        y, expected = kernel.run(x, laid.packed, laid.spec, offs), reference(x, q.packed, q.spec, offs)
        assert (y.dtype, y.shape) == (dtype, (*x.shape[:-1], N))
        end = None if offs is None else ENDS[-1]  # what stands after it is undefined
        assert relative_error(expected[:end], y[:end]) <= q.format.tolerance(dtype)


@pytest.mark.parametrize("ends", [(0, 0, 0, 7), (7, 7, 7, 7), (0, 0, 0, 0), (1, 2, 3, 4)], ids=str)
def test_any_division_of_the_tokens(ends, device):
    q, x = weights("int8/row", torch.float32, device), torch.randn(7, K, device=device)
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    expected = reference(x, q.packed, q.spec, offs)
    for kernel in kernels_of("grouped"):
        if not why_not_from_plain(kernel, asked(kernel, case_of("grouped", x, q.packed, q.spec))):
            laid = q.to_layout(kernel.layout or "plain")
            y = kernel.run(x, laid.packed, laid.spec, offs)
            torch.testing.assert_close(y[: ends[-1]], expected[: ends[-1]], rtol=1e-4, atol=1e-5)


ROUTES = [torch._grouped_mm] + ([torch.nn.functional.grouped_mm] if hasattr(torch.nn.functional, "grouped_mm") else [])


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_the_way_from_torch(route, device):
    q, x = weights("int4/1x128*bf16", torch.bfloat16, device), torch.randn(T, K, device=device, dtype=torch.bfloat16)
    offs = offsets(device)
    y = route(x, q.transpose(-2, -1), offs=offs)
    assert torch.equal(y[: ENDS[-1]], grouped(x, q.packed, q.spec, offs)[: ENDS[-1]])
    batch = torch.randn(E, 3, K, device=device, dtype=torch.bfloat16)
    assert torch.equal(route(batch, q.mT), grouped(batch, q.packed, q.spec))
    back = torch.randn(
        T, N, device=device, dtype=torch.bfloat16
    )  # not transposed, as a gradient has it: through floats
    expected = torch._grouped_mm(back, q.dequantize(), offs=offs)
    assert torch.equal(route(back, q, offs=offs)[: ENDS[-1]], expected[: ENDS[-1]])


def test_gradient_to_the_tokens(device):
    q, offs = weights("int4/1x128*bf16", torch.bfloat16, device), offsets(device)
    x = torch.randn(ENDS[-1], K, device=device, dtype=torch.bfloat16, requires_grad=True)
    plain = x.detach().clone().requires_grad_()
    torch._grouped_mm(x, q.mT, offs=offs).float().square().sum().backward()
    torch._grouped_mm(plain, q.dequantize().mT, offs=offs).float().square().sum().backward()
    assert relative_error(plain.grad, x.grad) <= 2 * q.format.tolerance(torch.bfloat16)


def test_compiles_to_one_graph(device):
    q, offs = weights("e4m3/row", torch.bfloat16, device), offsets(device)
    x = torch.randn(T, K, device=device, dtype=torch.bfloat16)

    def experts(x, offs):
        return torch._grouped_mm(x, q.mT, offs=offs)

    y = torch.compile(experts, fullgraph=True, backend="aot_eager")(x, offs)
    assert torch.equal(y[: ENDS[-1]], experts(x, offs)[: ENDS[-1]])


def test_a_misfit_says_what_is_wanted():
    q, x = weights("int8/row", torch.float32, "cpu"), torch.randn(T, K)
    for wrong, offs in ((x, None), (x, torch.zeros(E + 1, dtype=torch.int32)), (x[:, 1:], offsets("cpu"))):
        with pytest.raises(MisfitError, match="grouped wants"):
            grouped(wrong, q.packed, q.spec, offs)
    with pytest.raises(MisfitError, match="grouped wants"):
        grouped(x, q.packed, q.spec, torch.zeros(E, dtype=torch.int64))
