"""Rotations, and factors moved from a layer's input to its weight, leave the float model as it is."""

import copy

import pytest
import torch
from torch import nn

import lowp
from lowp.methods.rotate import hadamard, rotations
from lowp.numerics import Scheme
from lowp.numerics.compare import relative_error
from lowp.numerics.hadamard import rotated
from lowp.ops.linear import reference
from lowp.quantize import METHODS, Method
from lowp.quantize.edit import edit_
from lowp.quantize.method import method_of
from lowp.quantize.weight import float_weight


def rounds_nothing(weight, statistics, fmt):
    return METHODS["absmax"].run(weight, statistics, fmt)


def random_factor(weights, statistics, schemes):
    return torch.exp(torch.randn(weights[0].shape[1], generator=torch.Generator().manual_seed(3)))


def awq_factor(weights, statistics, schemes):
    return METHODS["awq"].smooth(weights, statistics, [Scheme.parse("int4/1x32")] * len(weights))


def smoothquant_factor(weights, statistics, schemes):
    return METHODS["smoothquant"].smooth(weights, statistics, [Scheme.parse("int8/row@int8/row")] * len(weights))


@pytest.mark.parametrize("size", [1, 2, 16, 24, 96, 130])
def test_hadamard_is_orthonormal_and_spreads_an_outlier(size):
    q = hadamard(size, seed=5)
    assert torch.allclose(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    if size == 16:
        assert torch.allclose(q.abs(), torch.full_like(q, 0.25))
    assert not torch.equal(q, hadamard(size, seed=6)) or size == 1


def test_rotation_leaves_the_logits_of_a_decoder(decoder, batches):
    before = decoder(batches[0]).logits
    weights = {name: p.clone() for name, p in decoder.named_parameters(remove_duplicate=False)}
    edit_(decoder, rotations(decoder))
    assert relative_error(before, decoder(batches[0]).logits) < 5e-6
    changed = dict(decoder.named_parameters(remove_duplicate=False))
    kept = [name for name, p in weights.items() if torch.equal(p, changed[name])]
    assert all("bias" in name for name in kept), kept  # q, k and gate biases alone


def test_rotation_spreads_outliers(llama):
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.mlp.gate_proj.weight[:, 7] *= 30
    before = llama.model.layers[0].mlp.gate_proj.weight.detach().clone()
    edit_(llama, rotations(llama))
    after = llama.model.layers[0].mlp.gate_proj.weight

    def peak(weight):
        return (weight.abs().amax(dim=1) / weight.square().mean(dim=1).sqrt()).mean()

    assert peak(after) < 0.6 * peak(before)


def test_what_is_built_otherwise_is_an_error_that_names_it(llama):
    with pytest.raises(lowp.LowpError, match="decoder as Llama's"):
        rotations(nn.Sequential(nn.Linear(8, 8)))
    llama.model.layers[1].mlp.extra = nn.Linear(64, 64)
    with pytest.raises(lowp.LowpError, match="extra in layer 1"):
        rotations(llama)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [random_factor, awq_factor, smoothquant_factor])
def test_factors_leave_the_logits(decoder, batches, factor, dtype):
    """In fp32 "weights" nothing is rounded, so what remains of smoothing is what it must not change."""
    decoder = decoder.to(dtype)
    before = decoder(batches[0]).logits
    own = Method(name="moves", about="", run=rounds_nothing, why_not=lambda fmt: "", wants_data=True, smooth=factor)
    report = lowp.quantize_(decoder, "fp32", method=own, data=batches)
    after = decoder(batches[0]).logits
    assert relative_error(before.float(), after.float()) < (1e-5 if dtype == torch.float32 else 0.06)
    whys = {row.fqn: row.why for row in report.rows}
    q = next(why for name, why in whys.items() if name.endswith("layers.0.self_attn.q_proj.weight"))
    assert "folded into input_layernorm" in q
    o = next(why for name, why in whys.items() if name.endswith("layers.0.self_attn.o_proj.weight"))
    assert "act_pre_scale" in o  # fewer value heads than query heads: no rows of v_proj stand for o_proj's columns
    down = [why for name, why in whys.items() if name.endswith("layers.0.mlp.down_proj.weight")]
    assert not down or "folded into mlp.up_proj" in down[0]


def dense(decoder):
    return any(name.endswith("mlp.down_proj.weight") for name, _ in decoder.named_parameters())


def test_an_input_rotated_at_run_time_leaves_the_logits(decoder, batches, tmp_path):
    """In fp32 "weights" nothing is rounded. Compiled, saved, copied and as floats again it says the same."""
    before = decoder(batches[0]).logits
    own = Method(
        name="turns", about="", run=rounds_nothing, why_not=lambda fmt: "", wants_data=True, turn=METHODS["quarot"].turn
    )
    report = lowp.quantize_(decoder, {"lm_head": None, "*": "fp32"}, method=own, data=batches)
    whys = [row.why for row in report.rows if row.fqn.endswith("mlp.down_proj.weight")]
    assert bool(whys) == dense(decoder) and all("rotated at run time" in why for why in whys)
    assert dense(decoder) != any("input not rotated" in row.why for row in report.rows)
    assert relative_error(before, decoder(batches[0]).logits) < 5e-6
    lowp.save(decoder, tmp_path / "out")
    decoder.config.save_pretrained(tmp_path / "out")
    restored = lowp.load(tmp_path / "out", model=copy.deepcopy(decoder))
    assert relative_error(before, restored(batches[0]).logits) < 5e-6
    assert relative_error(before, lowp.dequantize_(decoder)(batches[0]).logits) < 5e-6


@pytest.mark.parametrize("scheme", ["int4/1x32*bf16", "int8/row@int8/row", "e4m3/row@e4m3/tensor"])
def test_a_linear_layer_rotates_its_input_before_it_is_quantized(scheme):
    weight, x = torch.randn(64, 96), torch.randn(5, 96)
    signs = METHODS["quarot"].turn("mlp.down_proj.weight", 96)
    plain = lowp.QTensor.quantize(rotated(weight, signs), scheme)
    turned = lowp.QTensor.from_parts(plain.parts().replace(act_rotation=signs), scheme, dtype=torch.float32)
    expected = nn.functional.linear(rotated(x, signs), plain)
    assert torch.equal(nn.functional.linear(x, turned), expected)
    assert torch.equal(torch.compile(nn.functional.linear, backend="aot_eager")(x, turned), expected)
    assert torch.equal(reference(x, turned.packed, turned.spec), reference(rotated(x, signs), plain.packed, plain.spec))
    assert torch.equal(nn.functional.linear(x, turned[:32]), expected[:, :32])
    with pytest.raises(lowp.LowpError, match="rotated as one"):
        turned[:, :32]
    assert relative_error(x @ weight.T, x @ float_weight(turned).T) < (0.2 if "int4" in scheme else 0.05)


@pytest.mark.parametrize("parts", [("act_rotation",), ("act_pre_scale",), ("act_rotation", "act_pre_scale")])
def test_the_gradient_of_the_input_goes_back_through_scale_and_rotation(parts):
    plain = lowp.QTensor.quantize(torch.randn(64, 96), "int4/1x32*bf16")
    made = {"act_rotation": METHODS["quarot"].turn("mlp.down_proj.weight", 96), "act_pre_scale": torch.rand(96) + 0.5}
    weight = lowp.QTensor.from_parts(
        plain.parts().replace(**{name: made[name] for name in parts}), plain.spec.scheme, dtype=torch.float32
    )
    x, grad = torch.randn(5, 96, requires_grad=True), torch.randn(5, 64)
    (got,) = torch.autograd.grad(nn.functional.linear(x, weight), x, grad)
    assert relative_error(grad @ float_weight(weight), got) < 1e-5
    assert relative_error(x @ float_weight(weight).T, nn.functional.linear(x, weight)) < 1e-5


def test_rotated_inputs_have_no_outliers(llama, batches):
    """A few channels of the MLP that are large for all tokens: they leave a token's scale no room for the others."""
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.mlp.up_proj.weight[::32] *= 16
            layer.mlp.down_proj.weight[:, ::32] /= 16
    errors = {}
    for method in ("rotate", "quarot"):
        model = copy.deepcopy(llama)
        expected = model(batches[0]).logits
        lowp.quantize_(model, {"*down_proj": "int8/row@int8/row", "*": None}, method=method, data=batches)
        errors[method] = relative_error(expected, model(batches[0]).logits)
    assert errors["quarot"] < 0.5 * errors["rotate"], errors


def test_a_model_that_only_looks_like_a_decoder_is_put_back(llama, batches):
    norm = llama.model.layers[0].input_layernorm
    norm.forward = lambda x, plain=norm.forward: plain(x) + 0.3 * x.abs()  # not the same in another basis
    before = {name: p.clone() for name, p in llama.named_parameters()}
    with pytest.raises(lowp.LowpError, match="built otherwise"):
        lowp.quantize_(llama, {"lm_head": None, "*": "int4/1x32"}, method="rotate+gptq", data=batches)
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())


class TwoHeads(nn.Module):
    """What the second answer alone shows, and a layer that the first batch does not reach."""

    def __init__(self):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(32), nn.Linear(32, 32)
        self.main, self.aux, self.late = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        hidden = self.up(self.norm(x))
        late = self.late(hidden.relu()) if x[0, 0] > 0 else torch.zeros_like(hidden)
        return self.main(hidden.relu()) + late, self.aux(hidden.sigmoid())


@pytest.mark.parametrize("turned", [False, True])
def test_no_operation_takes_a_factor_that_reaches_the_layer_otherwise(turned):
    torch.manual_seed(0)
    model = TwoHeads().eval()
    data = [torch.randn(16, 32) for _ in range(2)]
    data[0][0, 0], data[1][0, 0] = -1.0, 1.0
    expected = [model(x) for x in data]
    own = Method(
        name="moves", about="", run=rounds_nothing, why_not=lambda fmt: "", wants_data=True, smooth=random_factor
    )
    lowp.quantize_(model, "fp32", method=own, data=data[::-1] if turned else data)
    for x, (first, second) in zip(data, expected, strict=True):
        assert relative_error(first, model(x)[0]) < 1e-5 and relative_error(second, model(x)[1]) < 1e-5


def test_compositions_are_spelled_in_order():
    both = method_of("rotate+gptq")
    assert both.edit is not None and both.run is METHODS["gptq"].run and both.wants_data
    assert method_of("rotate+awq").smooth is METHODS["awq"].smooth
    for wrong in ("gptq+rotate", "awq+smoothquant", "rotate+nothing"):
        with pytest.raises(lowp.LowpError):
            method_of(wrong)


def test_an_embedding_that_was_tied_is_untied_and_says_so(batches):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    clone = copy.deepcopy(model)
    lowp.quantize_(model, {"lm_head": None, "*": "int8/row"}, method="rotate")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False and clone.config.tie_word_embeddings is True
    assert relative_error(clone(batches[0]).logits, model(batches[0]).logits) < 0.05
