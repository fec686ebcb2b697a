"""The linear layers of known models: what a name such as "llama3-8b" stands for in `lowp bench linear --shapes llama3-8b`.

    q_proj        heads * head_dim                     x hidden
    k_proj        kv_heads * head_dim                  x hidden            v_proj alike
    qkv_proj      (heads + 2 kv_heads) * head_dim      x hidden            the three above in one, as serving engines have them
    o_proj        hidden                               x heads * head_dim
    gate_proj     intermediate                         x hidden            up_proj alike
    gate_up_proj  2 intermediate                       x hidden            the two above in one
    down_proj     hidden                               x intermediate

Shapes are N x K: rows out, columns in. Sources: the `config.json` of meta-llama/Meta-Llama-3-8B, meta-llama/Meta-Llama-3-70B and
Qwen/Qwen3-32B.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SpellingError


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The sizes of a Llama-like decoder: grouped-query attention and a gated MLP, no biases.

    Args:
        hidden: width of the residual stream. intermediate: of the MLP. layers: how many blocks.
        heads, kv_heads, head_dim: of the attention. vocabulary: rows of the embedding and of lm_head.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """The (N, K) of every linear layer of a block by its name, separate and fused.

        >>> MODELS["llama3-8b"].linears()["qkv_proj"]
        (6144, 4096)
        """
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "qkv_proj": (q + 2 * kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "gate_up_proj": (2 * self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }


MODELS = {
    "llama3-8b": Decoder(
        hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocabulary=128256
    ),
    "llama3-70b": Decoder(
        hidden=8192, intermediate=28672, layers=80, heads=64, kv_heads=8, head_dim=128, vocabulary=128256
    ),
    "qwen3-32b": Decoder(
        hidden=5120, intermediate=25600, layers=64, heads=64, kv_heads=8, head_dim=128, vocabulary=151936
    ),
}


def model_of(name: str) -> Decoder:
    """The sizes of a model by its name.

    Raises:
        SpellingError: a name that is not in the table.
    """
    if name not in MODELS:
        raise SpellingError.of("model", name, MODELS)
    return MODELS[name]
