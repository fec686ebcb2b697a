"""Rotations: weights and activations without outliers, at no change of what the float model says.

A decoder with RMSNorm says the same in any orthonormal basis of its residual stream: RMSNorm without its weight commutes with a
rotation Q, so Q can be pulled through the whole model and multiplied into the weights.

    fold        each norm's weight g into the layers that read it                     W <- W diag(g),  g <- 1
    stream      embedding E <- E Q;  layers that read it W <- W Q;  layers that write it W <- Q^T W,  b <- Q^T b;  head <- head Q
    values      for each head: value projection W_v <- R^T W_v, output projection W_o <- W_o R     (mixing of tokens between)

Q and R are Hadamard matrices with random signs: every number becomes a sum of all the others with signs, so that no column and no
weight stays much larger than the rest. Sizes that are no power of two take the Kronecker product with a small random orthonormal
matrix. All of it is done once, on the weights; nothing is computed at run time.

Where embedding and head are one tensor, the norm's weight between them unties the two: the head becomes a tensor of its own, with
the memory that takes. The input of the second MLP layer, behind the activation function, cannot be rotated so: `quarot` is
`rotate` and a Hadamard transform of that input at run time (`numerics/hadamard.py`), whose signs the weight brings along.

Sources: Ashkboos et al., QuaRot, arXiv 2404.00456 (the stages above are its offline ones); Ashkboos et al., SliceGPT, 2401.15024.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import MisfitError
from ..numerics import Format, Parts, quantize
from ..numerics.hadamard import group_of
from ..quantize.method import Edit, Edits, Method, register
from ..quantize.statistics import Statistics

# The norm, what reads it, and what writes to the stream, by the names of Hugging Face decoders that are built this way.
_READS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
    "post_attention_layernorm": (
        "mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.gate", "mlp.experts.gate_up_proj",
        "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate",
    ),
}  # fmt: skip
_WRITES = ("self_attn.o_proj", "mlp.down_proj", "mlp.experts.down_proj", "mlp.shared_expert.down_proj")
_TURNED = ("*.down_proj.weight", "*.down_proj")  # behind an activation function; the second is a stack of experts
_OTHER_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "post_self_attn_layernorm")


def hadamard(size: int, seed: int = 0) -> Tensor:
    """An orthonormal matrix (size, size), float64: a Hadamard matrix with random signs.

    Of size 2**k * m with m odd it is the Kronecker product of Hadamard's 2**k and a random orthonormal m x m matrix.

    >>> q = hadamard(96)
    >>> torch.allclose(q @ q.T, torch.eye(96, dtype=torch.float64))
    True
    """
    generator = torch.Generator().manual_seed(seed)
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1))) / math.sqrt(2)
    if size != power:
        odd = torch.randn(size // power, size // power, dtype=torch.float64, generator=generator)
        matrix = torch.kron(torch.linalg.qr(odd).Q.contiguous(), matrix.contiguous())
    signs = 1.0 - 2.0 * torch.randint(0, 2, (size,), generator=generator)
    return matrix * signs.to(torch.float64).unsqueeze(1)


def rotations(model: nn.Module, seed: int = 0) -> Edits:
    """The edits that rotate a decoder.

    Args:
        model: a Hugging Face causal language model with RMSNorm before attention and before the MLP (Llama, Mistral, Qwen,
            Mixtral and their kin), with or without data. seed: of the random signs.

    Raises:
        MisfitError: a model that is built otherwise; it says what is missing.
    """
    decoder = _decoder(model)
    modules = dict(model.named_modules())
    embedding, final = f"{decoder}embed_tokens", f"{decoder}norm"
    head = next((name for name in ("lm_head", "score") if name in modules), "")
    size = _weight(modules[embedding]).shape[1]
    turn = hadamard(size, seed)
    edits: dict[str, Edit] = {f"{embedding}.weight": Edit(reads=(), change=_right(turn))}
    norms = [f"{final}.weight"]
    layers = modules[f"{decoder}layers"]
    assert isinstance(layers, nn.ModuleList)
    for index in range(len(layers)):
        layer = f"{decoder}layers.{index}."
        for norm, readers in _READS.items():
            norms.append(f"{layer}{norm}.weight")
            for reader in _present(model, layer, readers):
                edits[reader] = Edit(reads=(norms[-1],), change=_folded(_right(turn)))
        for writer in _present(model, layer, _WRITES):
            edits[writer] = Edit(reads=(), change=_left(turn))
            bias = f"{writer.removesuffix('.weight')}.bias"
            if _parameter(model, bias) is not None:
                edits[bias] = Edit(reads=(), change=_right(turn))  # a row: Q^T b
        _turn_values(model, layer, edits, seed + 1)
    if head:
        edits[f"{head}.weight"] = Edit(reads=(f"{final}.weight",), change=_folded(_right(turn)))
    edits |= {norm: Edit(reads=(), change=torch.ones_like) for norm in norms}
    tied = bool(head) and _parameter(model, f"{head}.weight") is _parameter(model, f"{embedding}.weight")
    return Edits(by_name=edits, unties=(f"{head}.weight",) if tied else (), seed=seed)


def _turn_values(model: nn.Module, layer: str, edits: dict[str, Edit], seed: int) -> None:
    """Rotate within each attention head, between the value and the output projection."""
    attention = model.get_submodule(f"{layer}self_attn")
    size = getattr(attention, "head_dim", None)
    value, out = f"{layer}self_attn.v_proj.weight", f"{layer}self_attn.o_proj.weight"
    if not isinstance(size, int) or value not in edits or out not in edits:
        return  # query, key and value in one: left as they are
    turn = hadamard(size, seed)
    before, after = edits[value], edits[out]

    def turned_value(own: Tensor, *reads: Tensor) -> Tensor:
        rows = before.change(own, *reads)
        heads = rows.reshape(-1, size, rows.shape[-1])
        return (turn.T.to(rows.device, torch.float32) @ heads).reshape(rows.shape)

    def turned_out(own: Tensor, *reads: Tensor) -> Tensor:
        rows = after.change(own, *reads)
        return (rows.reshape(len(rows), -1, size) @ turn.to(rows.device, torch.float32)).reshape(rows.shape)

    edits[value] = Edit(reads=before.reads, change=turned_value)
    edits[out] = Edit(reads=after.reads, change=turned_out)
    bias = value.replace(".weight", ".bias")
    if _parameter(model, bias) is not None:
        edits[bias] = Edit(reads=(), change=lambda own: (own.view(-1, size) @ turn.to(own)).reshape(own.shape))


Change = Callable[..., Tensor]


def _right(turn: Tensor) -> Change:
    return lambda own: own @ turn.to(own.device, torch.float32)


def _left(turn: Tensor) -> Change:
    return lambda own: turn.T.to(own.device, torch.float32) @ own


def _folded(change: Change) -> Change:
    return lambda own, norm: change(own * norm)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight


def _parameter(model: nn.Module, fqn: str) -> Tensor | None:
    return dict(model.named_parameters(remove_duplicate=False)).get(fqn)


def _present(model: nn.Module, layer: str, names: tuple[str, ...]) -> list[str]:
    """The names of parameters in a layer: a module's weight, or a stack of experts itself."""
    parameters = dict(model.get_submodule(layer.rstrip(".")).named_parameters(remove_duplicate=False))
    return [f"{layer}{key}" for name in names for key in (f"{name}.weight", name) if key in parameters]


def _decoder(model: nn.Module) -> str:
    """The prefix of the decoder's names; a MisfitError says what keeps a model from being rotated."""
    names = dict(model.named_modules())
    found = [name.removesuffix("embed_tokens") for name in names if name.split(".")[-1] == "embed_tokens"]
    prefix = found[0] if len(found) == 1 else None
    if prefix is None or f"{prefix}layers" not in names or f"{prefix}norm" not in names:
        raise _unlike("embed_tokens, layers and norm side by side")
    layers = names[f"{prefix}layers"]
    assert isinstance(layers, nn.ModuleList)
    kinds = {type(module).__name__ for name, module in names.items() if name.split(".")[-1] in (*_READS, "norm")}
    if any(not kind.endswith("RMSNorm") or "Gemma" in kind for kind in kinds):
        raise _unlike(f"RMSNorm that multiplies by its weight, got {', '.join(sorted(kinds))}")
    for index, layer in enumerate(layers):
        inside = {name for name, _ in layer.named_modules()}
        strange = [name for name in _OTHER_NORMS if name in inside]
        missing = [name for name in (*_READS, "self_attn.o_proj") if name not in inside]
        if strange or missing:
            raise _unlike(
                f"{', '.join(_READS)} alone in each layer, got layer {index} with {strange or missing} otherwise"
            )
        readers = {name for reads in _READS.values() for name in reads}
        unknown = [
            name for name, module in layer.named_modules()
            if isinstance(module, nn.Linear) and name not in readers and name not in _WRITES
        ]  # fmt: skip
        if unknown:
            raise _unlike(f"layers that read or write the stream, got {unknown[0]} in layer {index}")
    return prefix


def _unlike(wanted: str) -> MisfitError:
    return MisfitError(
        f"rotate wants a decoder as Llama's is built: {wanted}. Quantize this model without it (method='gptq')."
    )


def _plain(weight: Tensor, statistics: Statistics | None, fmt: Format) -> Parts:
    return quantize(weight, fmt)


def turned_input(name: str, columns: int, *, seed: int = 0, layers: Sequence[str] = _TURNED) -> Tensor | None:
    """The signs by which a layer's input is rotated at run time, None where it is not.

    Args:
        name: of its weight. columns: K. seed: of the signs. layers: patterns of names.

    Returns:
        (K,), int8; None too where K is odd: nothing would be mixed.

    >>> turned_input("layers.0.mlp.down_proj.weight", 4)
    tensor([ 1, -1, -1,  1], dtype=torch.int8)
    """
    if group_of(columns) == 1 or not any(fnmatch.fnmatchcase(name, pattern) for pattern in layers):
        return None
    generator = torch.Generator().manual_seed(seed + 2)  # others than those of the stream and of the values
    return (1 - 2 * torch.randint(0, 2, (columns,), generator=generator)).to(torch.int8)


def method(*, seed: int = 0, online: bool = False) -> Method:
    """Rotations with other signs, for `quantize_(..., method=...)`.

    Args:
        seed: of the signs. online: the input of the second MLP layer too, at run time (QuaRot).
    """
    return Method(
        name="quarot" if online else "rotate",
        about="Hadamard rotations multiplied into the weights of a decoder, then the format's own rule"
        if not online
        else "rotate, and the input of the second MLP layer rotated at run time (wants data)",
        run=_plain,
        why_not=lambda fmt: "",
        wants_data=online,
        edit=functools.partial(rotations, seed=seed),
        turn=functools.partial(turned_input, seed=seed) if online else None,
        options=f"seed={seed}" if seed else "",
    )


register(method())
register(method(online=True))
