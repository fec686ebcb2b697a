"""The life of one model, in its short form: every step of it, from the float checkpoint to the page."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("life_of_a_model", ROOT / "examples" / "life_of_a_model.py")


@pytest.fixture
def life(monkeypatch):
    """The example as a module; it may set its environment, and draws from a random state of its own."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    module = importlib.util.module_from_spec(_spec)
    monkeypatch.setitem(__import__("sys").modules, "life_of_a_model", module)
    _spec.loader.exec_module(module)
    with torch.random.fork_rng():
        yield module


@pytest.mark.slow
def test_short_form_recovers_what_rounding_lost(life, tmp_path):
    evaluations = life.main(["--short", "--out", str(tmp_path)])
    recovered = life.shares(evaluations)
    assert len(evaluations) == 10 and recovered["int2 g32, absmax"] == 0
    assert recovered["int2 g32, QAT"] > max(recovered["int2 g32, mse"], recovered["int2 g32, hqq"])
    assert recovered["int4 g32, int8 activations, QAT"] > 0.3
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (
        "int4 g32, int8 activations, QAT" in page
        and "recovered" in page
        and (tmp_path / "life.png").stat().st_size > 10_000
    )
    assert (tmp_path / "int2-g32" / "lowp.json").is_file()


@pytest.mark.parametrize("tokens", [100, 2056])  # the short form's own text is shorter than what the long one reads
def test_a_rival_is_calibrated_on_a_text_of_any_length(life, tokens):
    size = life.lm.Size(hidden=64, intermediate=128, layers=1, heads=1, kv_heads=1, lr=1e-3)
    ids = torch.arange(tokens, dtype=torch.int32) % life.lm.VOCAB
    model = life.rival(life.lm.build(size, 2048).eval(), ids, "int4/1x32*bf16", "gptq")
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, life.lowp.QTensor)


def test_a_recorded_command_names_no_folder_of_this_machine(life):
    words = ["--steps", "9", "--out", "/somewhere/out", "--work=/else/where", "--start", "build/lm"]
    assert life.command_of(words).endswith("--steps 9 --out out --work=where --start build/lm")


def test_a_control_that_could_learn_nothing_is_refused(life, capsys):
    """Distilled from itself the float model is where it began: a share against it would be no second figure."""
    with pytest.raises(SystemExit):
        life.arguments(["--control"])
    assert "--distill below 1" in capsys.readouterr().err
    assert life.arguments(["--control", "--distill", "0.5"]).control


def test_its_pieces(life):
    """What the short form would show only after a minute: batches, paces, shares."""
    stream = life.batches(torch.arange(100, dtype=torch.int32), 3, 10, torch.Generator().manual_seed(0))
    batch = next(stream)
    assert batch.shape == (3, 10) and (batch[:, 1:] - batch[:, :-1] == 1).all()
    assert [len(one) for one in life.calibration(torch.zeros(10 * 512 + 8))] == [8, 2]
    assert sum(len(one) for one in life.calibration(torch.zeros(100 * 512))) == life.CALIBRATION
    paces = [life.pace((step + 1) / 100) for step in range(100)]
    assert max(paces) == paces[9] == pytest.approx(1.0) and paces[-1] == pytest.approx(0.0, abs=1e-9)
    model = torch.nn.Sequential(torch.nn.Linear(64, 8))
    life.qat.prepare(model, "int4/1x64*bf16+bf16", learn="weight")
    peaks = {group["peak"]: len(group["params"]) for group in life.groups(model, 1.0)}
    (relative,) = set(peaks) - {1.0, 5.0}
    scale = float(model[0].fake_weight.scale.detach().mean())
    assert sorted(peaks.values()) == [1, 1, 2] and peaks[1.0] == 2 and scale < relative < 5 * scale

    def one(name, perplexity):
        quality = life.lowp.report.Quality(tokens=1, perplexity=perplexity, original_perplexity=10.0, kl=0.0, top1=1.0)
        return life.Evaluation(
            name=name, scheme="int4", bytes_before=1, bytes_after=1, bits=4, quality=quality, rows=(), output_errors={}
        )

    assert life.shares([one("a, absmax", 12.0), one("a, QAT", 10.5)]) == {"a, absmax": 0.0, "a, QAT": 0.75}


@pytest.mark.parametrize("precision", ["bf16", "float8"])
def test_pretraining_learns(life, precision):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config), torch.arange(400, dtype=torch.int32) % 7
    words = ["--pretrain", "30", "--batch", "4", "--context", "16", "--pretrain-lr", "0.01", "--precision", precision]
    life.pretrain(model, ids, life.arguments(words))
    line = ids[None, :17].long()
    logits = model(input_ids=line[:, :-1]).logits
    assert torch.nn.functional.cross_entropy(logits[0], line[0, 1:]) < 0.5


def test_a_model_as_it_is_defined_says_what_the_quantized_one_says(life):
    import copy

    lm = life.lm
    size = lm.Size(hidden=64, intermediate=128, layers=1, heads=1, kv_heads=1, lr=1e-3)
    original = lm.build(size, 32).eval()
    model, ids = copy.deepcopy(original), torch.randint(0, lm.VOCAB, (2, 16))
    life.lowp.quantize_(model, life.TABLE | {"*": "int4/1x32*bf16@int8/row"})
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        got = life.as_defined(model, original)(input_ids=ids).logits
        assert (got - original(input_ids=ids).logits).abs().max() > 10 * (got - wanted).abs().max()
