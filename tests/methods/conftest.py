"""Small decoders with uneven weights and norms, and tokens to run them on."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM

SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
)  # fmt: skip


def _uneven(model):
    """Norms that are not one, biases that are not zero, columns that stand out: what a trained model has."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 + 0.1)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            else:
                parameter.mul_(4)
    return model.eval()


DECODERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama biased": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "hidden_size": 96, "head_dim": 24})),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
}


@pytest.fixture(params=list(DECODERS))
def decoder(request):
    torch.manual_seed(0)
    return _uneven(DECODERS[request.param]())


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return _uneven(DECODERS["llama"]())


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 96, (4, 32), generator=generator) for _ in range(3)]
