"""vLLM: serves checkpoints that transformers wrote with our weights, and quantizes a float one itself; same greedy tokens.

In float32: the attention of the two rounds differently, and in bfloat16 the two likeliest tokens are often one rounding apart.

It loads models in processes of its own, so the environment is switched (`lowp torchao enable`) before this runs.
"""

import gc
import json
import os
import sys
import tempfile

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
MODEL = sys.argv[1]
PROMPTS = ["The little girl went to the park and", "One day, a dog", "Tom was sad because"]


class Look:
    """A worker's extension: asked in the process that serves, which imports this file for it."""

    def look(self):
        """The classes of the weights, their schemes and layouts, and torchao's modules that are not ours."""
        weights = {name: p for name, p in self.model_runner.model.named_parameters() if "proj" in name}
        alien = [
            k for k, m in sys.modules.items() if k.split(".")[0] == "torchao" and not m.__name__.startswith("lowp.")
        ]
        kinds = sorted({f"{type(p).__module__}.{type(p).__name__}" for p in weights.values()})
        return (
            kinds,
            sorted({f"{p.spec.scheme} {p.spec.layout}" for p in weights.values() if hasattr(p, "spec")}),
            alien,
        )


def tokens_of(model, ids):
    out = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


def serve(folder, ids, **more):
    from vllm import LLM, SamplingParams

    sizes = {"max_model_len": 128, "max_num_seqs": 4}
    llm = LLM(folder, dtype="float32", enforce_eager=True, worker_extension_cls="vllm_.Look", **sizes, **more)
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    done = llm.generate([{"prompt_token_ids": one[0].tolist()} for one in ids], greedy, use_tqdm=False)
    found = llm.collective_rpc("look")[0]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return [list(one.outputs[0].token_ids) for one in done], found


def main():
    import torch
    from torchao.core.config import config_to_dict
    from torchao.quantization import (
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    cases = {
        "int8 dynamic": (Int8DynamicActivationInt8WeightConfig(), "Int8Tensor", False),
        "int4": (Int4WeightOnlyConfig(group_size=32), "Int4Tensor", False),
        "8da4w": (Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4), "IntxUnpackedToInt8Tensor", False),
        "online int8": (Int8WeightOnlyConfig(), "Int8Tensor", True),
    }
    for name, (config, kind, online) in cases.items():
        model = AutoModelForCausalLM.from_pretrained(
            MODEL, dtype=torch.float32, quantization_config=TorchAoConfig(config)
        )
        expected = [tokens_of(model, one) for one in ids]
        with tempfile.TemporaryDirectory() as folder:
            if online:
                text = json.dumps(config_to_dict(config))
                more = {"quantization": "torchao", "hf_overrides": {"quantization_config_dict_json": text}}
                got, found = serve(MODEL, ids, **more)
            else:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                got, found = serve(folder, ids)
        kinds, schemes, alien = found
        assert not alien and [one.rpartition(".")[2] for one in kinds] == [kind], (name, found)
        same = sum(a == b for one, other in zip(got, expected, strict=True) for a, b in zip(one, other, strict=True))
        assert got == expected, (name, f"{same} of {16 * len(PROMPTS)} tokens", got, expected)
        print("ok", name, kinds, schemes, flush=True)


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    main()
