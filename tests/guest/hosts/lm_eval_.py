"""lm-eval: simple_evaluate over quantized models, on a task of this file: answers to choose from, and a text's likelihood.

By a model object (HFLM(pretrained=model)), and by a checkpoint that transformers saved, as `lm_eval --model hf` takes it.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    PerRow,
    quantize_,
)
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

warnings.simplefilter("ignore")
MODEL = sys.argv[1]
STORIES = [
    ("The little girl went to the park. She was very", ["happy", "seventeen", "electric"], 0),
    ("Tom had a red ball. He liked to", ["play", "invoice", "quantum"], 0),
    ("The dog was tired. It went to", ["tax", "sleep", "parliament"], 1),
    ("Mom gave him an apple. It was", ["yummy", "bureaucratic", "encrypted"], 0),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{story}}"
doc_to_choice: "{{endings}}"
doc_to_target: right
metric_list: [{metric: acc}]
"""
TEXT = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{story}}"
metric_list: [{metric: bits_per_byte}]
"""


def evaluated(manager, model, **more):
    return simple_evaluate(model=model, tasks=["choose", "read"], task_manager=manager, bootstrap_iters=0, **more)[
        "results"
    ]


def numbers(results):
    return results["choose"]["acc,none"], results["read"]["bits_per_byte,none"]


with tempfile.TemporaryDirectory() as folder:
    data = Path(folder, "stories.jsonl")
    data.write_text(
        "".join(json.dumps(dict(zip(("story", "endings", "right"), s, strict=True))) + "\n" for s in STORIES)
    )
    for name, kind in (("choose", CHOICE), ("read", TEXT)):
        Path(folder, f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    manager = TaskManager(include_path=folder, include_defaults=False)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def load(**more):
        return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, **more)

    def as_object(model):
        return numbers(evaluated(manager, HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")))

    floats = as_object(load())
    assert floats[0] >= 0.75, floats
    print("ok", "floats", floats)
    for name, config in {
        "int4": Int4WeightOnlyConfig(group_size=32),
        "int8 dynamic": Int8DynamicActivationInt8WeightConfig(),
        "float8 dynamic": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    }.items():
        model = load()
        quantize_(model, config)
        got = as_object(model)
        assert got != floats and abs(got[1] - floats[1]) < 0.15 * floats[1] and abs(got[0] - floats[0]) <= 0.25, (
            name,
            got,
        )
        saved = load(quantization_config=TorchAoConfig(config))
        assert any(isinstance(p, TorchAOBaseTensor) for p in saved.parameters())
        place = f"{folder}/{name}"
        saved.save_pretrained(place)
        tokenizer.save_pretrained(place)
        arguments = f"pretrained={place},dtype=float32"
        from_file = numbers(evaluated(manager, "hf", model_args=arguments, device="cpu"))
        assert from_file == as_object(saved), (name, from_file)
        print("ok", name, got, from_file)
