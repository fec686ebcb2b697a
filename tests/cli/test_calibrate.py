"""lowp quantize --data: calibration as a user types it."""

import shutil

import pytest

pytest.importorskip("transformers")

TEXT = "the quick brown fox jumps over the lazy dog, and 0123456789 is not what it says. " * 40


@pytest.fixture(scope="module")
def model(llama, tmp_path_factory):
    """The random Llama with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("calibrate") / "llama"
    shutil.copytree(llama, folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=letters[2]).save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def given(model, out, *words):
    text = model.parent / "text.txt"
    data = ("--data", text, "--samples", 6, "--length", 32)
    return ("quantize", model, "--to", "int4/1x32*bf16", "--rule", "lm_head=none", "--out", out, *data, *words)


@pytest.mark.parametrize("method", ["gptq", "rotate+gptq", "awq"])
def test_a_calibrated_checkpoint_loads_and_the_report_has_both_errors(lowp, model, tmp_path, method):
    from lowp import load

    found = lowp(*given(model, tmp_path / "out", "--method", method, "--json")).json()
    group = next(one for one in found["groups"] if one["scheme"])
    assert 0 < group["mean_output_error"] < group["mean_rounding_error"] < 0.3
    assert load(tmp_path / "out").model.layers[0].mlp.up_proj.weight.scheme == "int4/1x32*bf16"


def test_the_table_shows_the_error_of_outputs(lowp, model, tmp_path):
    answer = lowp(*given(model, tmp_path / "out", "--method", "gptq", "--max-ram", "64GB"))
    assert answer.code == 0 and "of outputs" in answer.out


def test_static_scales(lowp, model, tmp_path):
    from lowp import load

    words = given(model, tmp_path / "out", "--method", "smoothquant", "--static", "mse", "--json")
    words = tuple("int8/row@int8/tensor" if word == "int4/1x32*bf16" else word for word in words)
    assert lowp(*words).code == 0
    assert "act_scale" in load(tmp_path / "out").model.layers[0].mlp.up_proj.weight.packed


@pytest.mark.parametrize(
    "words, said",
    [
        (("--method", "gptqq"), "gptq"),
        (("--method", "gptq", "--max-ram", "many"), "--max-ram"),
        (("--method", "gptq", "--max-ram", "1M"), "GB"),
        (("--method", "gptq", "--static", "max"), "minmax"),
        (("--method", "gptq", "--length", 100000), "sequence"),
        (("--method", "gptq", "--propagate", "both"), "quantized"),
    ],
)
def test_bad_input_is_one_sentence(lowp, model, tmp_path, words, said):
    answer = lowp(*given(model, tmp_path / "out", *words))
    assert answer.is_one_sentence() and said in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [("--method", "gptq"), ("--method", "rotate"), ("--static", "mse")])
def test_what_wants_data_says_so(lowp, model, tmp_path, words):
    answer = lowp("quantize", model, "--to", "int4/1x32", "--out", tmp_path / "out", *words)
    assert answer.is_one_sentence() and "--data" in answer.err
