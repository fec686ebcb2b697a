"""Every rule of QTensor commutes with dequantize, for every known format: rule(q).dequantize() == operation(q.dequantize())."""

import copy
import functools
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowp.errors import MisfitError, TensorRuleError
from lowp.numerics import Scheme, known_formats
from lowp.numerics.compare import relative_error
from lowp.tensor import QTensor
from lowp.tensor.qtensor import RULES

SPELLINGS = tuple(dict.fromkeys(str(Scheme.parse(known.spelling).weight) for known in known_formats()))
N, K = 256, 512


def wraps(q: QTensor) -> bool:
    """Scales of scales that run over several rows cannot be cut across K."""
    return q.format.nested is not None and "scale_scale" in q.packed and q.scale_scale.shape[0] > 1


def check(q, expected):
    got = q.dequantize() if isinstance(q, QTensor) else q
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert torch.equal(got, expected)


@functools.cache
def quantized(spelling, device):
    return QTensor.quantize(torch.randn(N, K, device=device) * 0.02, spelling)


@pytest.fixture(params=SPELLINGS)
def q(request, device):
    return quantized(request.param, device).clone()


SAME = {
    "detach": lambda t: t.detach(),
    "clone": lambda t: t.clone(),
    "contiguous": lambda t: t.contiguous(),
    "deepcopy": copy.deepcopy,
    "to itself": lambda t: t.to(t.device),
    "float16": lambda t: t.to(torch.float16),
    "half": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "parameter": lambda t: nn.Parameter(t, requires_grad=False).data,
}
VIEWS = {
    "t": lambda t: t.t(),
    "transpose": lambda t: t.transpose(0, 1),
    "transpose(-1, -2)": lambda t: t.transpose(-1, -2),
    "permute": lambda t: t.permute(1, 0),
    "permute to itself": lambda t: t.permute(0, 1),
    "mT": lambda t: t.mT,
    "t twice": lambda t: t.t().t(),
    "slice of rows": lambda t: t[:128],
    "slice, negative": lambda t: t[-128:],
    "slice past the end": lambda t: t[128:9999],
    "whole slice": lambda t: t[:],
    "narrow": lambda t: t.narrow(0, 128, 128),
    "select a row": lambda t: t[3],
    "select a column": lambda t: t[:, 5],
    "chunk": lambda t: t.chunk(2)[1],
    "split": lambda t: t.split(128)[0],
    "split with sizes": lambda t: t.split([128, 128])[1],
    "slice of the transposed": lambda t: t.t()[:, 128:],
    "cat of chunks": lambda t: torch.cat(t.chunk(2)),
    "view(-1)": lambda t: t.view(-1),
    "view(-1) and back": lambda t: t.view(-1).view(N, K),
    "view in three axes": lambda t: t.view(2, 128, K),
    "reshape that splits rows": lambda t: t.reshape(N * 2, K // 2),
    "flatten": lambda t: t.flatten(),
    "unsqueeze": lambda t: t.unsqueeze(0),
    "unsqueeze at the end": lambda t: t.unsqueeze(-1),
    "squeeze": lambda t: t.unsqueeze(0).squeeze(0),
    "squeeze all": lambda t: t.unsqueeze(0).squeeze(),
    "expand": lambda t: t.unsqueeze(0).expand(3, -1, -1),
    "stack": lambda t: torch.stack([t, t]),
    "index of a stack": lambda t: torch.stack([t, t.clone()])[1],
    "as_strided to itself": lambda t: t.as_strided(t.size(), t.stride()),
}
VIEWS_OF_K = {
    "slice across K": lambda t: t[:, 256:],
    "chunk across K": lambda t: t.chunk(2, dim=1)[1],
    "cat across K": lambda t: torch.cat(t.chunk(2, dim=1), dim=1),
}


@pytest.mark.parametrize("what", SAME)
def test_what_changes_no_number(q, what):
    check(SAME[what](q), SAME[what](q.dequantize()))


@pytest.mark.parametrize("what", VIEWS)
def test_views_commute_with_dequantize(q, what):
    check(VIEWS[what](q), VIEWS[what](q.dequantize()))


@pytest.mark.parametrize("what", VIEWS_OF_K)
def test_cuts_across_k_commute_with_dequantize(q, what):
    if wraps(q):
        with pytest.raises(MisfitError, match="splits a block"):
            VIEWS_OF_K[what](q)
        return
    check(VIEWS_OF_K[what](q), VIEWS_OF_K[what](q.dequantize()))


def test_rows_of_zeros_behind_others(q):
    """What DTensor puts behind a shard that is smaller than others."""
    if "zero_point" in q.packed and q.packed["zero_point"].numel() == 1:
        with pytest.raises(TensorRuleError, match="zero point"):
            F.pad(q, (0, 0, 0, N))
        return
    check(F.pad(q, (0, 0, 0, N)), F.pad(q.dequantize(), (0, 0, 0, N)))
    with pytest.raises(TensorRuleError, match="rows of zeros"):
        F.pad(q, (0, 1))


def test_writing_to_a_slice_writes_to_its_parent(q):
    """How serving engines load shards: param.narrow(...).copy_(shard)."""
    whole, first = q.dequantize(), torch.zeros_like(q)
    check(first, torch.zeros_like(whole))
    for start in (0, 128):
        first.narrow(0, start, 128).copy_(q.narrow(0, start, 128))
    check(first, whole)


def test_a_shard_with_another_shared_scale_is_refused():
    target = QTensor.quantize(torch.randn(64, 64), "e4m3/tensor")
    shard = QTensor.quantize(torch.randn(32, 64) * 5, "e4m3/tensor")
    with pytest.raises(MisfitError, match="serves the other parts too"):
        target[:32].copy_(shard)
    with pytest.raises(MisfitError, match="one scale for all pieces"):
        torch.cat([target, shard])


def test_copy_between_floats_and_quantized(q):
    floats = torch.empty(N, K, device=q.device)
    floats.copy_(q)
    check(q, floats)
    other = torch.zeros_like(q)
    other.copy_(torch.randn(N, K, device=q.device))
    assert other.dequantize().abs().sum() > 0
    with pytest.raises(MisfitError, match="same scheme"):
        other.copy_(QTensor.quantize(torch.randn(N, K, device=q.device), "int5/1x32*bf16+int8"))


def test_new_and_like(q):
    for made in (torch.zeros_like(q), torch.empty_like(q), q.new_zeros(N, K), q.new_empty((N, K))):
        assert isinstance(made, QTensor) and made.scheme == q.scheme
        check(made, torch.zeros(N, K, device=q.device))
    assert q.new_zeros(128, K).shape == (128, K)


def test_meta_and_back(q):
    on_meta = q.to("meta")
    assert on_meta.device.type == "meta" and on_meta.shape == q.shape
    empty = torch.empty_like(on_meta, device=q.device)
    empty.copy_(q)
    check(empty, q.dequantize())


@pytest.mark.parametrize("form", ["parameter", "tensor", "view"])
def test_save_and_load_with_weights_only(q, form):
    saved = {"parameter": nn.Parameter(q, requires_grad=False), "tensor": q, "view": q.t()}[form]
    file = io.BytesIO()
    torch.save({"w": saved}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["w"]
    assert isinstance(loaded, nn.Parameter) == (form == "parameter")
    check(loaded.data if form == "parameter" else loaded, saved.dequantize())


def test_modules_share_their_memory(q):
    layer = nn.Linear(K, N, bias=False)
    layer.weight = nn.Parameter(q, requires_grad=False)
    assert not layer.weight.is_shared()
    layer.share_memory()
    assert layer.weight.is_shared() and all(tensor.is_shared() for tensor in layer.weight.packed.values())
    check(layer.weight, q.dequantize())


def test_state_dict_goes_round(q):
    one, two = nn.Linear(K, N, bias=False), nn.Linear(K, N, bias=False)
    one.weight = nn.Parameter(q, requires_grad=False)
    two.weight = nn.Parameter(torch.zeros_like(q), requires_grad=False)
    two.load_state_dict(one.state_dict())
    check(two.weight.data, q.dequantize())
    two.half()
    assert (
        two.weight.dtype == torch.float16
        and two(torch.randn(2, K, device=q.device, dtype=torch.float16)).dtype == torch.float16
    )


def test_linear_matmul_embedding_and_gradient(q):
    weight = q.dequantize()
    x = torch.randn(2, 3, K, device=q.device, requires_grad=True)
    bias = torch.randn(N, device=q.device)
    for b in (None, bias):
        y = F.linear(x, q, b)
        assert relative_error(F.linear(x, weight, b), y) < q.format.tolerance(torch.float32)
    y.square().sum().backward()
    expected = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), x)[0]
    assert relative_error(expected, x.grad) < 2 * q.format.tolerance(torch.float32)
    uneven = torch.randn(3, K, 2, device=q.device).transpose(1, 2)
    assert relative_error(F.linear(uneven, weight), F.linear(uneven, q)) < q.format.tolerance(torch.float32)
    assert relative_error(x @ weight.T, x @ q.T) < q.format.tolerance(torch.float32)
    assert relative_error(x[0, :, :N] @ weight, x[0, :, :N] @ q) < 1e-5
    ids = torch.randint(0, N, (2, 5), device=q.device)
    check(F.embedding(ids, q), F.embedding(ids, weight))


class Shown(QTensor):
    """A subclass with a constructor of its own, that shows another tensor under the name of a packed one."""

    _prefix = "_kept_"
    qdata = "shown"

    def __new__(cls, refused):
        raise AssertionError("an operation does not call the constructor of a subclass")


torch.serialization.add_safe_globals([Shown])


@pytest.mark.parametrize("what", [*SAME, *VIEWS, "zeros_like", "save and load", "flatten"])
def test_an_operation_keeps_the_class_of_its_operand(q, what):
    def save_and_load(t):
        file = io.BytesIO()
        torch.save(t, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def flatten(t):
        names, context = t.__tensor_flatten__()
        inner = {name: getattr(t, name) for name in names}
        return type(t).__tensor_unflatten__(inner, context, t.shape, t.stride())

    more = {"zeros_like": torch.zeros_like, "save and load": save_and_load, "flatten": flatten}
    operation = (SAME | VIEWS | more)[what]
    made = operation(Shown.of(q.packed, q.spec, dtype=q.dtype))
    assert type(made) is Shown or not isinstance(operation(q), QTensor)
    check(made, operation(q).dequantize() if isinstance(operation(q), QTensor) else operation(q))
    assert Shown.of(q.packed, q.spec, dtype=q.dtype).qdata == "shown"


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(q, mode):
    with mode():
        x = torch.randn(4, K, device=q.device)
        assert relative_error(x @ q.dequantize().T, F.linear(x, q)) < q.format.tolerance(torch.float32)


def test_what_has_no_rule_is_an_error_that_says_what_to_do():
    q = QTensor.quantize(torch.randn(64, 64), "int8/row")
    for operation in (lambda: q + 1, lambda: q.abs(), lambda: torch.linalg.svd(q)):
        with pytest.raises(TensorRuleError, match=r"has no rule.*\.dequantize\(\)"):
            operation()
    with pytest.raises(TensorRuleError, match="stands for a float dtype"):
        q.to(torch.int32)
    with pytest.raises(TensorRuleError, match="step 1"):
        q[::2]
    with pytest.raises(TensorRuleError, match="lazy view"):
        q.view(-1)[:5]
    packed = QTensor.quantize(torch.randn(64, 64), "int4/1x32*bf16", layout="int4pack_cpu")
    with pytest.raises(TensorRuleError, match="layout plain"):
        packed[:32]
    with pytest.raises(IndexError):
        q[64]
    assert "int8/row" in repr(q)


def test_layouts_bound_to_a_device_do_not_stop_a_tensor_from_moving():
    q = QTensor.quantize(torch.randn(64, 64), "int4/1x32*bf16", layout="int4pack_cpu")
    assert q.to("meta").spec.layout == "plain"
    check(q.to(torch.float16), q.dequantize(torch.float16))


def test_every_rule_is_for_an_operator_that_torch_has():
    assert len(RULES) > 40
    assert all(str(operator).count(".") >= 1 for operator in RULES)


def test_pin_memory(q):
    if q.device.type != "cuda":
        pytest.skip("pinning wants a CUDA device to be there")
    pinned = q.cpu().pin_memory()
    assert pinned.is_pinned()
    check(pinned.to("cuda", non_blocking=True), q.dequantize())


def test_equal_compares_values_where_the_bytes_say_nothing():
    """Hosts ask it of tied weights of which one is quantized."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    q = QTensor.quantize(x, "int8/row")
    assert torch.equal(q, q.dequantize()) and torch.equal(q.dequantize(), q) and torch.equal(q, q.clone())
    assert not torch.equal(q, x) and not torch.equal(x, q) and not torch.equal(q, q.dequantize()[:16])
    assert not torch.equal(q, QTensor.quantize(x, "int4/1x32")) and not torch.equal(q, q.dequantize().double() + 1e-9)
