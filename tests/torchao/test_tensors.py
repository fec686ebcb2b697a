"""Views: what a class shows gives the same weight back, through its constructor, by setting an attribute, and through files."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowp.errors import CheckpointError, MisfitError, TensorRuleError
from lowp.tensor import QTensor
from lowp.torchao import base, flatten, library
from lowp.torchao.apply import TENSORS, quantize_
from lowp.torchao.config import CONFIG_ROWS, CONFIGS
from lowp.torchao.nf4 import NF4Tensor, linear_nf4, to_nf4
from lowp.torchao.predicates import get_model_size_in_bytes, unwrap_tensor_subclass
from lowp.torchao.views import View

aten = torch.ops.aten
NAMES = [row.name for row in CONFIG_ROWS]
UNSAID = [name for name in NAMES if "uintx" in name.lower()] + ["Int4DynamicActivationInt4WeightConfig"]


def weight(name, dtype=torch.bfloat16, device="cpu"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128)).to(device, dtype)
    fields = {"act_quant_scale": torch.tensor(0.03)} if name == "Int8StaticActivationInt8WeightConfig" else {}
    quantize_(model, CONFIGS[name](**fields))
    return model[0].weight.data


def bytes_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


each_name = pytest.mark.parametrize("name", NAMES)


@each_name
def test_a_view_is_a_tensor_of_ours_and_of_torchaos(name, device):
    w = weight(name, device=device)
    assert isinstance(w, View) and isinstance(w, QTensor) and isinstance(w, base.TorchAOBaseTensor)
    assert type(nn.Parameter(w, requires_grad=False)) is type(w) is type(w.detach()) is type(copy.deepcopy(w))
    assert type(w.to(torch.float16)) is type(w) or type(w) is NF4Tensor


@each_name
def test_the_constructor_takes_what_is_shown(name, device):
    w = weight(name, device=device)
    if not w._arguments:
        with pytest.raises(TypeError):
            type(w)(torch.ones(1))
        return
    given = dict.fromkeys(w._arguments) | w.torchao_tensors() | w.torchao_attributes()
    again = type(w)(**given)
    assert again.scheme == w.scheme and torch.equal(again.dequantize(), w.dequantize())
    positional = type(w)(*[given[argument] for argument in w._arguments])
    assert torch.equal(positional.dequantize(), w.dequantize())


@each_name
def test_setting_what_is_shown_changes_nothing(name):
    w = weight(name)
    if not w._arguments:
        return
    before, shown = w.dequantize(), w.torchao_tensors()
    for part, tensor in shown.items():
        setattr(w, part, tensor.clone())
    assert torch.equal(w.dequantize(), before)
    assert all(torch.equal(bytes_of(w.torchao_tensors()[part]), bytes_of(tensor)) for part, tensor in shown.items())


@each_name
def test_saving_and_loading(name):
    w = weight(name)
    file = io.BytesIO()
    torch.save({"w": w}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["w"]
    assert type(loaded) is type(w) and torch.equal(loaded.dequantize(), w.dequantize())


@each_name
@pytest.mark.parametrize("prefix", ["", "layers.0."])
def test_files_give_it_back(name, prefix):
    """A parameter of the model itself too, which torchao's form has no name for."""
    w = weight(name)
    state = {f"{prefix}weight": w, f"{prefix}bias": torch.randn(4)}
    if type(w).__name__ in ("NF4Tensor", "GGUFQuantizedTensor", "FloatxTensor") or name in UNSAID:
        with pytest.raises(MisfitError, match=r"lowp\.save"):
            flatten.flatten_tensor_state_dict(state)
        return
    tensors, metadata = flatten.flatten_tensor_state_dict(state)
    assert all(type(tensor) is torch.Tensor and tensor.is_contiguous() for tensor in tensors.values())
    assert flatten.is_metadata_torchao(metadata | {"format": "pt"}) and not flatten.is_metadata_torchao(
        {"format": "pt"}
    )
    found, left = flatten.unflatten_tensor_state_dict(tensors, metadata)
    assert list(found) == list(state) and not left
    again = found[f"{prefix}weight"]
    assert again.scheme == w.scheme and again.spec.layout == w.spec.layout
    assert torch.equal(again.dequantize(), w.dequantize())
    x = torch.randn(3, 256, dtype=w.dtype)
    assert torch.equal(F.linear(x, again), F.linear(x, w))
    first = next(iter(tensors))
    part, left = flatten.unflatten_tensor_state_dict({first: tensors[first]}, metadata)
    assert not part and list(left) == [first], "a part of a tensor is left over, not lost"


def test_foreign_files_are_refused():
    with pytest.raises(CheckpointError, match="tensor_names"):
        flatten.unflatten_tensor_state_dict({}, {"format": "pt"})
    with pytest.raises(CheckpointError, match="convert it"):
        entry = '{"_type": "Strange", "_data": {}, "_tensor_data_names": ["qdata"]}'
        flatten.unflatten_tensor_state_dict({"_w_qdata": torch.ones(1)}, {"w": entry, "tensor_names": '["w"]'})
    with pytest.raises(CheckpointError, match="JSON"):
        flatten.unflatten_tensor_state_dict({}, {"w": "{", "tensor_names": '["w"]'})


@pytest.mark.parametrize("layout", ["int4pack_cpu", "fragments"])
def test_a_cut_that_a_layout_does_not_allow_writes_to_its_parent(layout):
    w = weight("Int4WeightOnlyConfig").to_layout("plain").to_layout(layout)
    before = w.dequantize()
    if layout == "fragments":
        with pytest.warns(UserWarning, match="not in fragments"):
            assert torch.equal(w.narrow(1, 0, 128).dequantize(), before[:, :128])
        return
    with pytest.warns(UserWarning, match="lies in the layout plain now"):
        part = w.narrow(0, 0, 64)
    part.copy_(w.narrow(0, 64, 64))
    assert torch.equal(w.dequantize(), torch.cat((before[64:], before[64:])))


@pytest.mark.parametrize(("layout", "after"), [("int4pack_cpu", "plain"), ("planes", "planes"), ("plain", "plain")])
def test_a_cut_of_an_alias_writes_to_the_parameter(layout, after):
    """How engines load shards: parameter.data, narrowed, written to. A layout that cannot be cut gives way, and says so."""
    layer = nn.Linear(256, 128).bfloat16()
    quantize_(layer, CONFIGS["Int4WeightOnlyConfig"]())
    layer.weight = nn.Parameter(layer.weight.data.to_layout(layout), requires_grad=False)
    source, before = weight("Int4WeightOnlyConfig").to_layout(after), layer.weight.dequantize()
    x = torch.randn(2, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)  # a forward pass leaves aliases behind, which are gone
        said = pytest.warns(UserWarning, match="lies in the layout plain now") if layout != after else nullcontext()
        with said:
            layer.weight.data.detach().narrow(0, 64, 64).copy_(source.narrow(0, 0, 64))
        expected = torch.cat((before[:64], source.dequantize()[:64]))
        assert torch.equal(layer.weight.parts().qdata[64:], source.parts().qdata[:64])
        assert torch.equal(layer.weight.dequantize(), expected) and layer.weight.spec.layout == after
        assert torch.allclose(layer(x), F.linear(x, expected, layer.bias), rtol=0.05, atol=0.05)


@each_name
def test_one_row_is_a_quantized_vector(name, device):
    w = weight(name, device=device)
    layout = w.spec.layout
    if w.format.wraps or (
        w.format.nested is not None and "scale_scale" in w.packed and w.packed["scale_scale"].numel() > 1
    ):
        return  # a scale of scales may run over several rows
    for index in (0, 5, -1):
        assert w[index].shape == (256,) and torch.equal(w[index].dequantize(), w.dequantize()[index])
    assert w.spec.layout == layout, "reading a row leaves the weight where it lies"
    with pytest.raises(IndexError):
        w[128]


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "Int4WeightOnlyConfig"])
def test_what_a_slice_shows_is_its_parents_memory(name):
    w = weight(name).to_layout("plain")
    part = w.narrow(0, 0, 64)
    for shown in ("qdata", "scale"):
        assert getattr(w, shown).data_ptr() == getattr(part, shown).data_ptr()


@each_name
def test_compiled_modules_compute_the_same(name):
    model = nn.Sequential(nn.Linear(256, 128, bias=False, dtype=torch.bfloat16))
    model[0].weight = nn.Parameter(weight(name), requires_grad=False)
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.compiler.reset()
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        assert torch.allclose(y, model(x), rtol=0.02, atol=0.02)


@pytest.fixture(params=[False, True], ids=["alone", "operators"])
def operators(request):
    """As if a real torchao had been imported: its operators are there, the redirect is not."""
    if request.param:
        library.define()
    yield
    library.undefine()


@each_name
def test_unwrapped_modules_compute_the_same(name, operators):
    w = weight(name)
    model = nn.Sequential(nn.Linear(256, 128, bias=False, dtype=torch.bfloat16))
    model[0].weight = nn.Parameter(w, requires_grad=False)
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    y = model(x)
    unwrap_tensor_subclass(model)
    assert all(type(p.data) is torch.Tensor for p in (*model.parameters(), *model.buffers()))
    assert torch.equal(model(x), y)


def test_sizes_are_of_what_is_stored():
    model = nn.Sequential(nn.Embedding(64, 256), nn.Linear(256, 128, bias=False)).bfloat16()
    before = get_model_size_in_bytes(model)
    quantize_(model, CONFIGS["Int8WeightOnlyConfig"]())
    assert get_model_size_in_bytes(model) == 64 * 256 * 2 + 128 * 256 + 128 * 4 < before
    assert get_model_size_in_bytes(model, ignore_embeddings=True) == 128 * 256 + 128 * 4


# -- NF4 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nf4_turns_to_floats_where_a_dtype_is_asked_for(dtype):
    """Its own dtype too: QDoRA adds the answer to the adapters' product. Moving a module leaves its weights as they are."""
    layer = nn.Linear(64, 64, bias=False)
    layer.weight = nn.Parameter(to_nf4(torch.randn(64, 64)), requires_grad=False)
    for floats in (layer.weight.to(dtype), layer.weight.to(dtype=dtype)):
        assert type(floats) is torch.Tensor and torch.equal(floats, layer.weight.dequantize(dtype))
    assert isinstance(layer.to(torch.float32).weight, NF4Tensor) and isinstance(layer.to("cpu").weight, NF4Tensor)


def test_nf4_as_torchtune_uses_it():
    floats = torch.randn(96, 64)  # no multiple of 64 * 256 numbers: torchao refuses it
    w = to_nf4(floats)
    x = torch.randn(5, 64, requires_grad=True)
    linear_nf4(x, w).sum().backward()
    assert torch.allclose(x.grad, w.get_original_weight().sum(0).expand(5, -1), atol=1e-4)
    assert type(w.to(torch.bfloat16)) is torch.Tensor and type(w.to("cpu")) is NF4Tensor
    assert (w.dequantize() - floats).norm() / floats.norm() < 0.12
    high, low = w.quantized_data >> 4, w.quantized_data & 15
    codes = torch.stack((high, low), -1).view(96, 64).long()
    scalers = (w.quantized_scalers.float() / w.quantization_factor + w.scaler_mean).view(96, 1)
    assert torch.allclose(w.nf4.float()[codes] * scalers, w.dequantize(), atol=2e-3)


# -- what third parties write -------------------------------------------------------------------------------------------------


class Doubled(base.TorchAOBaseTensor):
    """Holds half of what it shows."""

    tensor_data_names = ["half"]  # noqa: RUF012
    tensor_attribute_names = ["dtype"]  # noqa: RUF012
    optional_tensor_data_names = ["extra"]  # noqa: RUF012

    @staticmethod
    def __new__(cls, half, dtype, extra=None):
        made = torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=dtype, device=half.device)
        made.half, made.extra = half, extra
        return made

    def dequantize(self):
        return (self.half * 2).to(self.dtype)


@Doubled.implements([aten.t.default])
def _(func, types, args, kwargs):
    return args[0].dequantize().t()


@Doubled.implements_torch_function(F.linear)
def _(func, types, args, kwargs):
    return F.linear(args[0], args[1].dequantize(), *args[2:])


class Child(Doubled):
    """Inherits what its parent implements."""


@pytest.mark.parametrize("kind", [Doubled, Child])
def test_a_third_party_gets_the_common_operations(kind):
    w = kind(torch.ones(4, 8), torch.float32, torch.zeros(2))
    for made in (w.detach(), w.clone(), w.to("cpu"), copy.deepcopy(w), nn.Parameter(w, requires_grad=False)):
        assert type(made) is kind and torch.equal(made.half, w.half) and made.extra is not None
    assert w.to(torch.bfloat16).dtype == torch.bfloat16
    assert F.linear(torch.ones(2, 8), w).tolist() == [[16.0] * 4] * 2 and w.t().shape == (8, 4)
    other = kind(torch.zeros(4, 8), torch.float32, torch.ones(2))
    other.copy_(w)
    assert torch.equal(other.half, w.half) and torch.equal(other.extra, w.extra)
    names, context = w.__tensor_flatten__()
    assert names == ["half", "extra"]
    again = kind.__tensor_unflatten__({name: getattr(w, name) for name in names}, context, w.shape, w.stride())
    assert torch.equal(again.dequantize(), w.dequantize())
    with pytest.raises(TensorRuleError, match="does not implement"):
        w + 1
    with pytest.raises(MisfitError, match="copy_"):
        other.copy_(torch.ones(4, 8))


def test_a_third_party_may_give_our_classes_an_operation():
    kind = TENSORS["Int8Tensor"]

    class Mine(kind):
        """Int8Tensor that can be negated."""

    @Mine.implements(aten.neg.default)
    def _(func, types, args, kwargs):
        return -args[0].dequantize()

    w = Mine.from_hp(torch.randn(16, 32))
    assert torch.equal(-w, -w.dequantize())
    with pytest.raises(TensorRuleError):
        -kind.from_hp(torch.randn(16, 32))


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "NVFP4WeightOnlyConfig"])
def test_tied_weights_are_flattened_into_tensors_of_their_own(name):
    """transformers refuses to save tensors that share memory under names that it does not know as tied."""
    model = nn.ModuleDict({"head": nn.Linear(64, 32, bias=False), "table": nn.Linear(64, 32, bias=False)})
    model["table"].weight = model["head"].weight
    quantize_(model, CONFIGS[name]())
    assert model["table"].weight is model["head"].weight
    tensors, metadata = flatten.flatten_tensor_state_dict(model.state_dict())
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors) >= 4
    again, left = flatten.unflatten_tensor_state_dict(tensors, metadata)
    assert not left and torch.equal(again["table.weight"].dequantize(), again["head.weight"].dequantize())
