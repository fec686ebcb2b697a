"""diffusers with TorchAoConfig: a small Flux transformer quantized while loading, saved and loaded, with group offloading."""

import tempfile
import warnings

import torch
from diffusers import FluxTransformer2DModel, TorchAoConfig
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerRow,
)

warnings.simplefilter("ignore")
CASES = {
    "int8": Int8WeightOnlyConfig(),
    "int8 dynamic": Int8DynamicActivationInt8WeightConfig(),
    "float8": Float8WeightOnlyConfig(),
    "float8 dynamic": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    "int4": Int4WeightOnlyConfig(group_size=32),
    "intx": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}
torch.manual_seed(0)
torch.set_grad_enabled(False)
floats = FluxTransformer2DModel(
    patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
    joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
).to(torch.bfloat16)  # fmt: skip
inputs = {
    "hidden_states": torch.randn(1, 16, 4),
    "encoder_hidden_states": torch.randn(1, 8, 32),
    "pooled_projections": torch.randn(1, 32),
    "timestep": torch.ones(1),
}
inputs = {name: tensor.bfloat16() for name, tensor in inputs.items()}
inputs |= {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3)}
expected = floats(**inputs).sample.float()
with tempfile.TemporaryDirectory() as folder:
    floats.save_pretrained(folder)
    for name, config in CASES.items():
        kept = TorchAoConfig(config, modules_to_not_convert=["x_embedder", "proj_out"])
        model = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16, quantization_config=kept)
        y = model(**inputs).sample
        assert (y - expected).norm() / expected.norm() < 0.1, name
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved)
            again = FluxTransformer2DModel.from_pretrained(saved)
            assert torch.equal(again(**inputs).sample, y), name
        cpu = torch.device("cpu")
        again.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        assert torch.equal(again(**inputs).sample, y), name
        print("ok", name)
