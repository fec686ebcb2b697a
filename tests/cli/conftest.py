"""A tiny random Llama in Hugging Face's form, and a way to call the command line as a user does."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner


def make_llama(
    folder: Path, *, layers: int = 2, tied: bool = True, dtype: torch.dtype = torch.bfloat16, shard: str = "50MB"
) -> Path:
    """Write a Llama of hidden size 128 and vocabulary 256."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, tie_word_embeddings=tied, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that tests read and never write."""
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def new_llama():
    """new_llama(folder, layers=2, tied=True, dtype=torch.bfloat16, shard="50MB") writes one."""
    return make_llama


class Answer:
    """What a command answered: exit code, stdout, stderr."""

    def __init__(self, result) -> None:
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr
        self.exception = result.exception

    def json(self):
        """stdout as JSON: nothing else may be there."""
        return json.loads(self.out)

    def is_one_sentence(self) -> bool:
        """Bad input: exit code 2 and one line on stderr, no traceback, nothing on stdout."""
        return self.code == 2 and self.err.count("\n") == 1 and "Traceback" not in self.err and not self.out


@pytest.fixture
def lowp():
    """lowp("quantize", model, "--to", "int4") -> Answer."""
    from lowp.cli.app import build

    def call(*arguments: object) -> Answer:
        wide = {"COLUMNS": "200"}  # test workers run in narrow terminals
        return Answer(CliRunner().invoke(build(), [str(argument) for argument in arguments], env=wide))

    return call
