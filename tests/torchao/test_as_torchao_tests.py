"""What torchao's own tests hold on to, where it is not a number: who wins when classes inherit, what an error says, which
constants there are, what a view is in inference mode."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from lowp.torchao.core import config as core
from lowp.torchao.kernel.intmm import int_scaled_matmul, safe_int_mm
from lowp.torchao.prototype.mx_formats import constants
from lowp.torchao.quantization import (
    Float8Tensor,
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int4WeightOnlyConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8Tensor,
    MappingType,
    PerAxis,
    PerRow,
    quantize_,
    to_nf4,
)
from lowp.torchao.quantization.observer import AffineQuantizedMinMaxObserver
from lowp.torchao.quantization.quant_primitives import _DTYPE_TO_BIT_WIDTH, quantize_affine
from lowp.torchao.quantization.utils import _quantize_activation_per_token_absmax, compute_error
from lowp.torchao.utils import TorchAOBaseTensor, torch_version_at_least
from torch import nn

from lowp.torchao import apply

aten = torch.ops.aten


def pair_class(parents=(TorchAOBaseTensor,)):
    """A tensor class of one inner tensor and one attribute."""

    def new(cls, qdata, attr="a", device=None, zero_point=None):
        self = torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=qdata.dtype, device=device or qdata.device)
        self.qdata, self.attr, self.zero_point = qdata, attr, zero_point
        return self

    names = {
        "tensor_data_names": ["qdata"],
        "tensor_attribute_names": ["attr", "device"],
        "optional_tensor_data_names": ["zero_point"],
    }
    return type("Pair", parents, {"__new__": new, "__init__": lambda self, *args, **kwargs: None, **names})


def test_of_two_parents_the_later_one_wins_and_a_child_before_both():
    left, right = pair_class(), pair_class()
    called: list[str] = []
    left.implements(aten.neg.default)(lambda func, types, args, kwargs: called.append("left"))
    right.implements(aten.neg.default)(lambda func, types, args, kwargs: called.append("right"))
    child = pair_class((left, right))
    aten.neg.default(child(torch.ones(2)))
    child.implements([aten.neg.default])(lambda func, types, args, kwargs: called.append("child"))
    for kind in (left, right, child):
        aten.neg.default(kind(torch.ones(2)))
    assert called == ["right", "left", "right", "child"]


def test_contiguous_reaches_the_inner_tensors():
    x = pair_class()(torch.randn(3, 2))
    x.qdata = torch.randn(2, 3).t()
    assert not x.qdata.is_contiguous() and x.contiguous().qdata.is_contiguous()


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({"attr": "one"}, {"attr": "two"}, r"attr: 'one' vs 'two'"),
        ({}, {"zero_point": torch.zeros(3)}, r"zero_point: None vs Tensor"),
    ],
)
def test_copy_says_what_differs(ours, theirs, said):
    kind = pair_class()
    with pytest.raises(ValueError, match=said):
        kind(torch.randn(2, 3), **ours).copy_(kind(torch.randn(2, 3), **theirs))
    with pytest.raises(ValueError, match=r"qdata.shape: torch.Size\(\[2, 3\]\) vs torch.Size\(\[2\]\)"):
        kind(torch.randn(2, 3)).copy_(kind(torch.randn(2)))


def test_to_takes_a_layout_and_tells_non_blocking():
    given = pair_class()(torch.randn(2, 2))._get_to_kwargs(torch.strided, device="cuda", non_blocking=True)
    assert given == {"device": torch.device("cuda"), "dtype": torch.float32, "non_blocking": True}


def test_what_is_not_implemented_names_the_types_that_came():
    with pytest.raises(NotImplementedError, match="arg_types"):
        aten.neg.default(pair_class()(torch.ones(2)))


@pytest.mark.parametrize(
    ("version", "least", "is_it"), [("2.5.0a0+git1", "2.5.0", False), ("2.5.0.dev2", "2.4.0", True)]
)
def test_what_comes_before_a_release_is_less_than_it(monkeypatch, version, least, is_it):
    monkeypatch.setattr(torch, "__version__", version)
    assert torch_version_at_least(least) is is_it


@dataclasses.dataclass
class Foreign(core.AOBaseConfig):
    value: int = 42


def test_a_configuration_of_a_module_that_was_allowed_is_read(monkeypatch):
    written = core.config_to_dict(Foreign(7))
    with pytest.raises(ValueError, match="Failed to find class Foreign in any of the allowed modules"):
        core.config_from_dict(written)
    monkeypatch.setattr(core, "ALLOWED_AO_MODULES", {__name__})
    assert core.config_from_dict(written).value == 7


def test_constants_follow_from_the_elements():
    assert (constants.F8E4M3_MAX, constants.F6_E3M2_MAX, constants.F4_E2M1_MAX) == (448.0, 28.0, 6.0)
    assert (constants.F8E5M2_MAX_POW2, constants.F6_E2M3_MAX_POW2, constants.F4_E2M1_EXP_BIAS) == (15, 2, 1)
    assert _DTYPE_TO_BIT_WIDTH[torch.uint3] == 3 and _DTYPE_TO_BIT_WIDTH[torch.int32] == 32


def test_refusals_that_torchao_asserts_are_assertion_errors():
    with pytest.raises(AssertionError, match="Unsupported input dtype"):
        quantize_affine(torch.ones(2, 2, dtype=torch.int32), (1, 2), torch.ones(2), torch.zeros(2), torch.int8)
    observer = AffineQuantizedMinMaxObserver(MappingType.SYMMETRIC, torch.int8, granularity=PerAxis(0))
    observer(torch.randn(10, 4))
    with pytest.raises(AssertionError, match=r"self.min_val:torch.Size\(\[10\]\) != min_val:torch.Size\(\[9\]\)"):
        observer(torch.randn(9, 4))
    with pytest.raises(ValueError, match=r"PerRow\(dim=-1\)"):
        Int8StaticActivationInt8WeightConfig(granularity=PerRow(dim=0))


def test_a_token_has_one_scale():
    codes, scale = _quantize_activation_per_token_absmax(torch.randn(2, 3, 8))
    assert codes.shape == (2, 3, 8) and scale.shape == (2, 3)


def test_nf4_takes_values_from_other_blocks_and_says_what_it_has_not():
    x = torch.rand(128)
    target = to_nf4(x, 64, 1)
    target.copy_(to_nf4(x, 32, 2))
    assert (target.block_size, target.scaler_block_size) == (64, 1)
    torch.testing.assert_close(target.dequantize(), x, atol=0.15, rtol=0.15)
    for refused, said in (
        (lambda q: q[..., ::2], r"aten.slice\(NF4Tensor\) with customized step"),
        (lambda q: q[1:], r"aten.slice\(NF4Tensor\) with start"),
        (lambda q: torch.as_strided(q, (127,), (1,), 0), r"aten.as_strided\(NF4Tensor\) different numel"),
    ):
        with pytest.raises(NotImplementedError, match=said):
            refused(target)


def test_a_view_in_inference_mode_of_a_tensor_from_outside():
    x = Float8Tensor.from_hp(torch.randn(4, 16))
    with torch.inference_mode():
        assert torch.equal(x[1:3].dequantize(), x.dequantize()[1:3])
        inside = Int8Tensor.from_hp(torch.randn(4, 16))
        assert torch.equal(inside[1:3].dequantize(), inside.dequantize()[1:3])


def test_int4_multiplies_batches_as_linear_layers_do(device):
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.randn(3, 64, 128, dtype=torch.bfloat16, device=device), requires_grad=False)
    quantize_(holder, Int4WeightOnlyConfig(group_size=64), filter_fn=lambda module, name: True)
    x = torch.randn(3, 5, 128, dtype=torch.bfloat16, device=device)
    expected = x @ holder.weight.dequantize().mT
    assert compute_error(expected.float(), torch.bmm(x, holder.weight).float()) > 40
    assert compute_error(expected.float(), torch.bmm(x, holder.weight.transpose(1, 2)).float()) > 40


def test_a_number_is_a_scale_of_the_activation():
    layer = nn.Linear(128, 64, dtype=torch.bfloat16)
    quantize_(layer, Int4WeightOnlyConfig(group_size=64))
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    before = F.linear(x * 2, layer.weight, layer.bias)
    layer.weight.act_pre_scale = 2
    assert compute_error(before.float(), layer(x).float()) > 40


def test_a_convolution_keeps_its_activation_in_floats():
    layer = nn.Conv2d(16, 32, 3)
    with pytest.warns(UserWarning, match="activation stays in floats"):
        from lowp.torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerTensor

        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor())
        quantize_(layer, config, filter_fn=lambda module, name: isinstance(module, nn.Conv2d))
    assert isinstance(layer.weight, Float8Tensor) and layer.weight.act_quant_kwargs is None
    other = nn.Conv2d(16, 32, 3)
    quantize_(other, Float8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, nn.Conv2d))
    assert isinstance(other.weight, Float8Tensor)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(64, 32), nn.Linear(32, 64)
        self.linear1.more = nn.Parameter(torch.randn(32, 64))


F8 = Float8WeightOnlyConfig()


@pytest.mark.parametrize(
    ("mapping", "quantized"),
    [
        ({"linear1": None, "linear1.weight": F8}, {"linear1.weight"}),
        ({"re:linear.*": None, "re:linear.*.weight": F8}, {"linear1.weight", "linear2.weight"}),
        ({"re:linear.*.weight": None, "linear1": F8}, {"linear1.weight"}),
        ({"re:linear.*.weight": None, "_default": F8}, set()),
        ({"re:linear.*": F8, "linear2": None}, {"linear1.weight"}),
        ({"linear1.more": F8}, {"linear1.more"}),
        ({"re:.*more": F8, "re:.*bias": None}, {"linear1.more"}),
    ],
)
def test_which_key_decides(mapping, quantized):
    model = Two()
    report = quantize_(model, FqnToConfig(mapping), filter_fn=None)
    assert {name for name, p in model.named_parameters() if isinstance(p, Float8Tensor)} == quantized
    assert {row.fqn for row in report.rows if row.scheme} == quantized
    assert all(row.error < 0.05 for row in report.rows)
    for name in quantized:
        module = model.get_submodule(name.partition(".")[0])
        assert f"{name.partition('.')[2]}=Float8Tensor(" in str(module) and copy.deepcopy(module).extra_repr()


def test_a_mapping_wants_no_filter_and_a_handler_that_knows_parameters():
    model = Two()
    with pytest.raises(ValueError, match="filter_fn=None"):
        quantize_(model, FqnToConfig({"linear1": F8}), filter_fn=lambda module, name: True)
    seen = []
    monkey = {Foreign: lambda module, config: module}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apply, "HANDLERS", monkey)
        with pytest.raises(NotImplementedError, match="does not yet support parameter quantization"):
            quantize_(model, FqnToConfig({"linear1.weight": Foreign()}), filter_fn=None)
        monkey[Foreign] = lambda module, config, parameter_name="weight": seen.append(parameter_name)
        quantize_(model, FqnToConfig({"linear1.more": Foreign()}), filter_fn=None)
    assert seen == ["more"]


@pytest.mark.parametrize("shape", [(1, 7, 3), (17, 16, 8), (40, 33, 20)])
def test_integer_products_of_any_shape(shape, device):
    m, k, n = shape
    a, b = (torch.randint(-128, 128, size, dtype=torch.int8, device=device) for size in ((m, k), (k, n)))
    expected = a.cpu().to(torch.int64) @ b.cpu().to(torch.int64)
    assert torch.equal(safe_int_mm(a, b).cpu().to(torch.int64), expected)
    scales = torch.rand(m, 1, device=device)
    torch.testing.assert_close(int_scaled_matmul(a, b, scales).cpu(), expected * scales.cpu())
