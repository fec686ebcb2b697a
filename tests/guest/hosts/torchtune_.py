"""torchtune: QLoRA and QDoRA on a small Llama, base weights in NF4, trained, saved as floats, merged."""

import torch
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.models.llama2 import llama2, lora_llama2
from torchtune.modules.common_utils import reparametrize_as_dtype_state_dict_post_hook
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import get_adapter_params, get_merged_lora_ckpt, set_trainable_params

SIZES = dict(vocab_size=96, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=128, max_seq_len=64)
LORA = dict(lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True)


def made(quantize, dora=False):
    torch.manual_seed(0)
    more = dict(lora_rank=4, lora_alpha=8.0, use_dora=dora, quantize_base=quantize)
    return lora_llama2(**SIZES, intermediate_dim=256, **LORA, **more)


def trained(model, ids, steps=12):
    adapters = get_adapter_params(model)
    set_trainable_params(model, adapters)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        logits = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        assert all(p.grad is not None for p in adapters.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


ids = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(1))
for name, dora in (("QLoRA", False), ("QDoRA", True)):
    floats, model = made(False, dora), made(True, dora)
    state = floats.state_dict()
    frozen = {n: p for n, p in model.named_parameters() if isinstance(p, NF4Tensor)}
    assert len(frozen) == 2 * 7, len(frozen)
    model.load_state_dict(state)  # floats into NF4, as a checkpoint of floats is loaded
    if dora:
        for module in (*floats.modules(), *model.modules()):
            if hasattr(module, "initialize_dora_magnitude"):
                module.initialize_dora_magnitude()
    with torch.no_grad():
        error = (model(ids) - floats(ids)).norm() / floats(ids).norm()
    assert 0 < error < 0.2, (name, error)
    before = {n: p.dequantize().clone() for n, p in frozen.items()}
    losses, of_floats = trained(model, ids), trained(floats, ids)
    assert losses[-1] < 0.7 * losses[0] and abs(losses[-1] - of_floats[-1]) < 0.25 * of_floats[0], (losses, of_floats)
    assert all(torch.equal(before[n], p.dequantize()) for n, p in model.named_parameters() if n in before), name
    model._register_state_dict_hook(reparametrize_as_dtype_state_dict_post_hook)
    saved = model.state_dict()
    assert all(type(tensor) is torch.Tensor for tensor in saved.values())
    merged = get_merged_lora_ckpt({n: t.float() for n, t in saved.items()}, rank=4, alpha=8.0)
    plain = llama2(**SIZES, intermediate_dim=256)
    plain.load_state_dict(merged)
    with torch.no_grad():
        expected = model(ids)
        apart = (plain(ids) - expected).norm() / expected.norm()
    assert apart < 0.02, (name, apart)
    print("ok", name, f"losses {losses[0]:.3f} -> {losses[-1]:.3f}, of floats {of_floats[-1]:.3f}", flush=True)

layer = FrozenNF4Linear(128, 64, bias=False, dtype=torch.bfloat16)
x = torch.randn(3, 128, dtype=torch.bfloat16, requires_grad=True)
y = layer(x)
y.sum().backward()
weight = layer.weight.dequantize()
assert torch.allclose(y, x @ weight.T, atol=0.05) and torch.allclose(x.grad, weight.sum(0).expand(3, -1), atol=0.05)
print("ok FrozenNF4Linear")
