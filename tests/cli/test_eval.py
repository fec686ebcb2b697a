"""lowp eval, generate, report and bench as a user types them: what they print, and what bad input is answered with."""

import pytest

pytest.importorskip("transformers")

TEXT = "the quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(scope="module")
def model(llama, tmp_path_factory):
    """The random Llama with a tokenizer of bytes."""
    import shutil

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("eval") / "llama"
    shutil.copytree(llama, folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=letters[2], pad_token=letters[0]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    from typer.testing import CliRunner

    from lowp.cli.app import build

    out = tmp_path_factory.mktemp("out") / "int8"
    words = ["quantize", str(model), "--to", "int8", "--rule", "model.embed_tokens=int8", "--out", str(out), "--json"]
    result = CliRunner().invoke(build(), words)
    assert result.exit_code == 0, result.output
    return out


def test_eval_measures(lowp, model, quantized, text):
    given = ("eval", quantized, "--against", model, "--text", text, "--window", 64, "--stride", 32, "--dtype", "fp32")
    found = lowp(*given, "--json", "--outputs").json()
    assert found["quality"]["tokens"] == len(TEXT) - 1
    assert 0 < found["quality"]["kl"] < 1e-3 and found["quality"]["top1"] > 0.9
    assert found["bytes_after"] < 0.6 * found["bytes_before"]
    assert found["scheme"] == "int8/row" and len(found["rows"]) == 15
    assert 0 < found["output_errors"]["model.layers.1.mlp.down_proj"] < 0.05
    for more in ((), ("--all",), ("--outputs",)):
        answer = lowp(*given, *more)
        assert answer.code == 0 and "perplexity" in answer.out and "KL to the original" in answer.out
        assert ("model.layers.0.mlp.up_proj.weight" in answer.out) == (more == ("--all",)) or not more


def test_eval_reads_the_first_tokens_only(lowp, model, quantized, text):
    answer = lowp("eval", quantized, "--against", model, "--text", text, "--tokens", 50, "--json")
    assert answer.json()["quality"]["tokens"] == 49


@pytest.mark.parametrize(
    "changed",
    [
        {"--text": "nowhere.txt"},
        {"--against": "nowhere"},
        {"--tokens": "-1"},
        {"--tokens": "1"},
        {"--stride": "600"},
        {"--window": "1"},
        {"--device": "cuda:99"},
        {"--dtype": "int8"},
    ],
    ids=str,
)
def test_bad_input_of_eval_is_one_sentence(lowp, model, quantized, text, changed):
    given = {"--against": model, "--text": text} | changed
    answer = lowp("eval", quantized, *(word for pair in given.items() for word in pair))
    assert answer.is_one_sentence(), (answer.code, answer.err, answer.exception)
    assert "tokenizer" not in answer.err, "none of these is about the tokenizer"


def test_a_file_that_is_no_text_is_one_sentence(lowp, model, quantized, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\x00abc")
    answer = lowp("eval", quantized, "--against", model, "--text", tmp_path / "a.bin")
    assert answer.is_one_sentence() and "UTF-8" in answer.err


def test_generate_writes(lowp, model, quantized):
    for directory in (model, quantized):
        given = ("generate", directory, "--prompt", "the [bold] ", "--max-new-tokens", 5)
        found = lowp(*given, "--json").json()
        assert 1 <= found["tokens"] <= 5 and found["tokens_per_second"] > 0
        answer = lowp(*given)
        assert answer.code == 0 and answer.out.startswith("the [bold] ") and "a second" in answer.out


def test_generate_draws_the_same_with_the_same_seed(lowp, quantized):
    given = ("generate", quantized, "--prompt", "the ", "--max-new-tokens", 12, "--temperature", 1.0, "--json")
    texts = [lowp(*given, "--seed", seed).json()["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("words", ["--prompt=", "--temperature=-1", "--max-new-tokens=0", "--max-new-tokens=999"])
def test_bad_input_of_generate_is_one_sentence(lowp, quantized, words):
    answer = lowp("generate", quantized, "--prompt=a", words)
    assert answer.is_one_sentence(), (answer.code, answer.err, answer.exception)


def test_report_writes_a_page(lowp, model, quantized, text, tmp_path):
    out = tmp_path / "report.html"
    given = ("report", quantized, "--against", model, "--text", text, "--tokens", 60, "--out", out)
    answer = lowp(*given)
    assert answer.code == 0 and str(out) in answer.out.replace("\n", "")
    assert "int8/row" in out.read_text() and [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert lowp(*given, "--json").json()["models"][0]["quality"]["tokens"] == 59


def test_a_page_that_cannot_be_written_is_known_before_the_work(lowp, model, quantized, text, tmp_path):
    for out in (tmp_path, tmp_path / "none" / "report.html"):
        answer = lowp("report", quantized, "--against", model, "--text", text, "--out", out)
        assert answer.is_one_sentence(), (answer.code, answer.err)
