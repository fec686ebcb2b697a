"""transformers' Trainer with optim="adamw_torch_8bit" and "adamw_torch_4bit": trains, saves, goes on from the checkpoint."""

import tempfile
import warnings

import torch
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

warnings.simplefilter("ignore")


def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, vocab_size=128)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True))


def trained(folder, optim, steps, resume=None):
    data = [{"input_ids": (ids := torch.arange(i, i + 16) % 128), "labels": ids} for i in range(64)]
    args = TrainingArguments(
        folder, optim=optim, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1, save_steps=4,
        report_to=[], use_cpu=True, lr_scheduler_type="constant", seed=1, disable_tqdm=True, max_grad_norm=1.0,
    )  # fmt: skip
    trainer = Trainer(model=model(), args=args, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


for optim, kind in (("adamw_torch_8bit", OptimState8bit), ("adamw_torch_4bit", OptimState4bit)):
    with tempfile.TemporaryDirectory() as folder:
        trainer = trained(folder, optim, 8)
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert losses[-1] < 0.7 * losses[0], losses
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        assert any(isinstance(state["exp_avg"], kind) for state in optimizer.state.values())
        again = trained(folder, optim, 8, resume=f"{folder}/checkpoint-4")
        for p, q in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(p, q), optim
        print("ok", optim)
