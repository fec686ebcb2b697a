"""The measures against their definitions, written out once more; windows score every token once; bytes and errors by layer."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import lowp
from lowp.errors import MisfitError
from lowp.numerics.compare import relative_error
from lowp.report import evaluate as module
from lowp.report import evaluation, layer_rows, measure, model_bytes, tokens_of
from lowp.report.evaluate import windows
from lowp.report.layers import counted_as, output_errors
from lowp.tensor import QTensor


@pytest.fixture(scope="module")
def original():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=96,
        tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def quantized(original):
    model = copy.deepcopy(original)
    lowp.quantize_(model, {"model.embed_tokens": "int8/row", "*": "int4/1x32*bf16"})
    return model


IDS = torch.randint(0, 96, (150,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("count", [2, 3, 9, 10, 11, 100, 101])
@pytest.mark.parametrize(("window", "stride"), [(2, 1), (4, 3), (10, 5), (64, 63)])
def test_each_token_but_the_first_is_scored_once(count, window, stride):
    spans = windows(count, window, stride)
    assert [i for w in spans for i in range(w.first, w.stop)] == list(range(1, count))
    assert all(w.stop - w.start == min(window, count) and w.start < w.first for w in spans)
    assert all(w.first - w.start >= window - stride for w in spans[1:])


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 0), (8, 8)])
def test_windows_that_make_no_sense_are_refused(window, stride):
    with pytest.raises(MisfitError, match="window"):
        windows(100, window, stride)


def by_hand(model, window, stride):
    """Log-probabilities of every word at each scored position, one window at a time."""
    rows = []
    for w in windows(len(IDS), window, stride):
        with torch.no_grad():
            logits = model(input_ids=IDS[w.start : w.stop][None], use_cache=False).logits[0]
        rows.append(logits[w.first - 1 - w.start : w.stop - 1 - w.start].double().log_softmax(-1))
    return torch.cat(rows)


def test_measures_are_their_definitions(original, quantized):
    p, q = by_hand(original, 32, 16), by_hand(quantized, 32, 16)
    found = measure(original, {"q": quantized}, IDS, window=32, stride=16)["q"]
    assert found.tokens == len(IDS) - 1
    assert found.perplexity == pytest.approx(math.exp(F.nll_loss(q, IDS[1:]).item()), rel=1e-5)
    assert found.original_perplexity == pytest.approx(math.exp(F.nll_loss(p, IDS[1:]).item()), rel=1e-5)
    assert found.kl == pytest.approx(F.kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-3)
    assert found.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


def test_the_size_of_a_batch_changes_nothing(original, quantized, monkeypatch):
    whole = measure(original, {"q": quantized}, IDS, window=32, stride=16)["q"]
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(module, "_POSITIONS_AT_ONCE", 5)
    single = measure(original, {"q": quantized}, IDS, window=32, stride=16)["q"]
    assert single.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
    assert single.kl == pytest.approx(whole.kl, rel=1e-3)


def test_a_model_is_at_no_distance_from_itself(original):
    for other in (original, copy.deepcopy(original)):
        found = measure(original, {"same": other}, IDS)["same"]
        assert (found.kl, found.top1, found.ratio) == (0.0, 1.0, 1.0)


def test_measuring_twice_is_the_same_and_leaves_training_mode(original, quantized):
    quantized.train()
    assert measure(original, {"q": quantized}, IDS) == measure(original, {"q": quantized}, IDS)
    assert quantized.training and not original.training
    quantized.eval()


def test_a_word_that_the_original_rules_out_adds_nothing(original):
    other = copy.deepcopy(original)
    hooks = [m.register_forward_hook(lambda mod, args, out: _ruled_out(out)) for m in (original, other)]
    try:
        assert measure(original, {"q": other}, IDS)["q"].kl == 0.0
    finally:
        for hook in hooks:
            hook.remove()


def _ruled_out(out):
    out.logits[..., 95] = -math.inf
    return out


def test_wrong_tokens_and_vocabularies_are_named(original):
    with pytest.raises(MisfitError, match="token 96, the model knows 96"):
        measure(original, {"q": original}, torch.tensor([1, 96, 3]))
    other = copy.deepcopy(original)
    other.resize_token_embeddings(100)
    with pytest.raises(MisfitError, match="speaks 100 tokens, the original 96"):
        measure(original, {"other": other}, IDS)


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text, **options):
        assert options["add_special_tokens"] is False
        return type("Encoding", (), {"input_ids": torch.tensor([[ord(letter) % 96 for letter in text]])})


def test_tokens_of_a_text():
    assert len(tokens_of(Letters(), "hello")) == 5
    assert len(tokens_of(Letters(), "hello", 3)) == 3
    for text, limit in (("h", None), ("", None), ("hello", 1)):
        with pytest.raises(MisfitError, match="at least 2 tokens"):
            tokens_of(Letters(), text, limit)


# -- layers -----------------------------------------------------------------------------------------------------------


def test_bytes_count_tied_weights_once_and_floats_as_stored(original, quantized):
    count = sum(p.numel() for p in original.parameters())
    assert model_bytes(original) == 4 * count
    assert model_bytes(original, torch.bfloat16) == 2 * count
    packed = {id(p): p.packed_nbytes for p in quantized.parameters() if isinstance(p, QTensor)}
    rest = sum(p.numel() for p in quantized.parameters() if not isinstance(p, QTensor))
    assert model_bytes(quantized, torch.bfloat16) == sum(packed.values()) + 2 * rest


def test_rows_read_off_a_model_are_those_of_its_report(original):
    model = copy.deepcopy(original)
    report = lowp.quantize_(model, {"model.embed_tokens": "int8/row", "*.v_proj": None, "*": "int4/1x32*bf16"})
    found = {row.fqn: row for row in layer_rows(model, original)}
    for row in report.rows:
        if row.fqn in found and row.scheme:
            other = found[row.fqn]
            same = ("tied", "kind", "shape", "scheme", "layout", "kernel", "bytes_before", "bytes_after")
            assert all(getattr(other, name) == getattr(row, name) for name in same), (other, row)
            assert other.error == pytest.approx(row.error, rel=1e-4)
    assert found["model.layers.0.self_attn.v_proj.weight"].scheme is None


def test_counted_as_halves_floats_only(original, quantized):
    rows = counted_as(layer_rows(quantized, original), torch.bfloat16)
    assert rows == layer_rows(quantized, original, torch.bfloat16)


def test_an_evaluation_is_ready_for_json(original, quantized):
    import json

    quality = measure(original, {"q": quantized}, IDS)["q"]
    one = evaluation("q", quantized, original, quality, floats=torch.bfloat16)
    assert one.scheme == "int4/1x32*bf16"
    assert 4.5 <= one.bits <= 5.0  # 4 and a bf16 scale for 32; tiles keep a zero beside it
    json.dumps(one.to_dict(), allow_nan=False)
    nothing = evaluation("copy", original, original, quality)
    assert (nothing.scheme, nothing.to_dict()["bits"]) == ("", None)


def test_output_errors_are_local(original, quantized):
    """The error of a layer on the original's input: computed by hand for one deep in the model."""
    seen = {}
    name = "model.layers.1.mlp.down_proj"
    hook = original.get_submodule(name).register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    errors = output_errors(quantized, original, IDS[:64], window=64)
    hook.remove()
    with torch.no_grad():
        expected = relative_error(seen["y"], quantized.get_submodule(name)(seen["x"]))
    assert errors[name] == pytest.approx(expected, rel=1e-6)
    assert set(errors) == {n for n, m in quantized.named_modules() if isinstance(getattr(m, "weight", None), QTensor)}
    assert all(not m._forward_hooks for m in original.modules())
