"""compressed-tensors: what is written is read back bit by bit; the package itself and transformers read the same numbers."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lowp
from lowp.errors import CheckpointError, MisfitError
from lowp.integrations import compressed_tensors as ct
from lowp.numerics import ELEMENTS, Scheme
from lowp.numerics.bits import unpack_bits
from lowp.tensor import QTensor

SMALL = Path(__file__).parents[2] / "examples" / "small_lm"
FORMS = {
    "int4/1x32*bf16": "pack-quantized",
    "int4/row*bf16": "pack-quantized",
    "int8/row*bf16": "pack-quantized",
    "int3/1x64*bf16": "pack-quantized",
    "uint4/1x32*bf16+uint8": "pack-quantized",
    "int8/row*bf16@int8/row": "int-quantized",
    "int4/1x32*bf16@int8/row": "int-quantized",
    "e4m3/row@e4m3/row": "float-quantized",
    "e4m3/tensor@e4m3/tensor": "float-quantized",
    "e4m3/64x64@e4m3/1x64": "float-quantized",
    "e2m1/1x16*e4m3/tensor": "nvfp4-pack-quantized",
    "e2m1/1x32*e8m0": "mxfp4-pack-quantized",
}


def layer_of(scheme, rows=64, columns=128):
    layer = nn.Sequential(nn.Linear(columns, rows, dtype=torch.bfloat16))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        nn.init.normal_(layer[0].weight)
    lowp.quantize_(layer, scheme)
    return layer


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(3, 32), (5, 70), (1100, 8)])
def test_words_hold_integers_of_every_width(bits, shape):
    values = torch.randint(-(1 << bits - 1), 1 << bits - 1, shape, dtype=torch.int8)
    words = ct.pack_words(values, bits)
    assert words.shape == (shape[0], -(-shape[1] * bits // 32)) and words.dtype == torch.int32
    assert torch.equal(ct.unpack_words(words, bits, shape[1]), values)


@pytest.mark.parametrize("scheme", FORMS)
def test_a_weight_comes_back_as_it_was(scheme):
    weight = layer_of(scheme)[0].weight.detach()
    group = ct._entry(weight.scheme, ["0"], 1)
    assert group["format"] == FORMS[scheme]
    back = ct.decompress(ct.compress(weight), group, torch.bfloat16)
    before, after = weight.dequantize(torch.float32), back.dequantize(torch.float32)
    if "nvfp4" in group["format"]:  # its global scale is stored as a divisor
        torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
    else:
        assert torch.equal(after, before)
    assert (back.spec.act is None) == (weight.spec.act is None)


def test_a_model_comes_back_and_other_layers_stay(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 32), nn.Linear(32, 8))
    lowp.quantize_(model, {"0": "int4/1x32*bf16", "2": "e4m3/row@e4m3/row", "*": None})
    x = torch.randn(3, 64)
    ct.save(model, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (
        told["quant_method"] == "compressed-tensors" and told["format"] == "mixed-precision" and told["ignore"] == ["3"]
    )
    assert [group["targets"] for group in told["config_groups"].values()] == [["0"], ["2"]]
    empty = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 32), nn.Linear(32, 8))
    back = ct.load(tmp_path / "out", empty, dtype=torch.float32)
    assert isinstance(back[0].weight, QTensor) and type(back[3].weight) is nn.Parameter
    torch.testing.assert_close(back(x), model(x), rtol=1e-5, atol=1e-5)


def test_refusals(tmp_path):
    with pytest.raises(MisfitError, match="no form for int4/1x32"):
        ct.layout_of(Scheme.parse("int4/1x32*bf16+bf16"))
    with pytest.raises(MisfitError, match="no layer of this model is quantized"):
        ct.save(nn.Linear(4, 4), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    embedding = nn.Sequential(nn.Embedding(8, 32))
    lowp.quantize_(embedding, {"0": "int8/row"})
    with pytest.raises(MisfitError, match="linear layers alone"):
        ct.save(embedding, tmp_path / "none")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="new or empty"):
        ct.save(layer_of("int8/row*bf16"), tmp_path / "full")
    (tmp_path / "full" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="quantization_config of compressed-tensors"):
        ct.load(tmp_path / "full", nn.Linear(2, 2))


# -- the package itself -----------------------------------------------------------------------------------


def as_bytes(tensor, form):
    """The bytes of a tensor; float4 as the values that they are, for a zero has two codes."""
    octets = tensor.contiguous().view(torch.uint8)
    if "fp4" not in form or tensor.dtype != torch.uint8 or tensor.shape[-1] < 16:
        return octets
    return ELEMENTS["e2m1"].decode(ELEMENTS["e2m1"].from_codes(unpack_bits(octets, 4, octets.shape[-1] * 2)))


@pytest.mark.guest("compressed-tensors>=0.14")
@pytest.mark.parametrize("scheme", FORMS)
def test_the_package_writes_the_same_bytes_and_reads_ours(scheme):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weight = layer_of(scheme)[0].weight.detach()
    ours, group = ct.compress(weight), ct._entry(weight.scheme, ["0"], 1)
    described = QuantizationScheme.model_validate(
        {k: v for k, v in group.items() if k != "format"} | {"format": group["format"]}
    )
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    read = compressor.decompress(dict(ours), described)["weight"]
    torch.testing.assert_close(read.float(), weight.dequantize(torch.bfloat16).float(), rtol=2**-7, atol=1e-6)
    given = {"weight": weight.dequantize(torch.float32), "weight_scale": weight.parts().scale.float()}
    if "weight_global_scale" in ours:
        given["weight_global_scale"] = ours["weight_global_scale"]
    if "weight_zero_point" in ours:
        given["weight_zero_point"] = ct.unpack_words(ours["weight_zero_point"].mT, 4, weight.shape[0]).mT.contiguous()
    theirs = compressor.compress(given, described)
    for name in ("weight_packed", "weight", "weight_zero_point"):
        assert (name in theirs) == (name in ours), name
        if name in ours:
            one, other = (as_bytes(tensors[name], group["format"]) for tensors in (theirs, ours))
            assert torch.equal(one, other), name


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("int8/row*bf16", "e4m3/row*bf16", "e2m1/1x32*e8m0")]


@pytest.mark.guest("transformers>=5.0")
@pytest.mark.guest("compressed-tensors>=0.14")
@pytest.mark.parametrize("scheme", ["int4/1x32*bf16", "e2m1/1x16*e4m3/tensor", *SLOW])
def test_transformers_loads_what_was_written(scheme, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.bfloat16)
    lowp.quantize_(model, {"lm_head": None, "model.embed_tokens": None, "*": scheme}, on_misfit="skip")
    ct.save(model, tmp_path / "out")
    floats = transformers.AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if isinstance(parameter, QTensor):
                floats.get_parameter(name).copy_(parameter.dequantize())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    x = torch.randint(0, 100, (2, 12))
    assert torch.equal(loaded(x).logits, floats(x).logits)
    mine = ct.load(tmp_path / "out", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QTensor):
            torch.testing.assert_close(
                mine.get_parameter(name).dequantize(), parameter.dequantize(), rtol=2**-8, atol=0
            )
