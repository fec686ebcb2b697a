"""lowp.torchao beside the real torchao 0.18 in one process: the same numbers, the same JSON, and files that both read.

Where torchao is wrong this page says how ours differ:

    float8 of all zeros      torchao: scale 0, codes NaN (bf16 that underflows: codes of +-448). Ours: scale 1, codes 0.
    amin over blocks of one  torchao reduces the whole tensor; not compared.
"""

import enum
import importlib
import inspect
import itertools
import json

import pytest
import torch
from torch import nn

import lowp.torchao.affine as affine
import lowp.torchao.config as config
import lowp.torchao.words as words
from lowp.torchao import flatten, names
from lowp.torchao.apply import TENSORS, quantize_
from lowp.torchao.modules import resolve
from lowp.torchao.mx import from_blocked, to_blocked

pytestmark = [pytest.mark.guest("torchao>=0.18,<0.19"), pytest.mark.filterwarnings("ignore")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [(1, 32), (1, 64), (16, 64), (8, 32)]
CODES = [
    (torch.int8, None, None),
    (torch.int8, -8, 7),
    (torch.uint8, 0, 15),
    (torch.int8, -64, 63),
    (torch.uint8, None, None),
]


def inputs() -> dict[str, torch.Tensor]:
    base = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    special = base.clone()
    special[0, 0], special[1, 5], special[2, 5] = torch.nan, torch.inf, -torch.inf
    return {
        "random": base,
        "tiny": base * 1e-39,
        "huge": base * 1e38,
        "zeros": torch.zeros(16, 64),
        "negative": -base.abs(),
        "positive": base.abs(),
        "one value": torch.full((16, 64), 5.0),
        "every size": base * torch.logspace(-38, 37, 16)[:, None],
        "ties": (base * 4).round() / 2,
        "NaN and infinity": special,
    }


each_input = pytest.mark.parametrize("x", inputs().values(), ids=inputs())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def same(ours, theirs):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert torch.equal(torch.nan_to_num(ours.double(), nan=7e77), torch.nan_to_num(theirs.double(), nan=7e77))


@each_input
@each_dtype
@pytest.mark.parametrize("mapping", [mapping.name for mapping in words.MappingType])
def test_affine(x, dtype, mapping):
    import torchao.quantization.quant_primitives as theirs

    x = x.to(dtype)
    for block, (codes, low, high), eps, scale_dtype in itertools.product(
        BLOCKS, CODES, (None, 1e-5), (None, torch.float32)
    ):
        results = []
        for module, kind in ((affine, words.MappingType), (theirs, theirs.MappingType)):
            scale, zero = module.choose_qparams_affine(
                x, kind[mapping], block, codes, low, high, eps=eps, scale_dtype=scale_dtype
            )
            q = module.quantize_affine(x, block, scale, zero, codes, low, high)
            values = module.dequantize_affine(q, block, scale, zero, codes, low, high, output_dtype=dtype)
            fake = {"affine": "fake_quantize_affine"}.get(module.__name__.rsplit(".")[-1], "_fake_quantize_affine")
            results.append((scale, zero, q, values, getattr(module, fake)(x, block, scale, zero, codes, low, high)))
        for ours, expected in zip(*results, strict=True):
            same(ours, expected)


@each_input
@each_dtype
def test_tinygemm_and_float8(x, dtype):
    import torchao.quantization.quant_primitives as theirs

    x = x.to(dtype)
    for block in BLOCKS:
        args = (x, words.MappingType.ASYMMETRIC, block, torch.int32, 0, 15)
        same_args = (x, theirs.MappingType.ASYMMETRIC, *args[2:])
        more = {"eps": 1e-6, "scale_dtype": dtype, "zero_point_dtype": dtype}
        ours, expected = (
            affine.choose_qparams_affine_tinygemm(*args, **more),
            theirs._choose_qparams_affine_tinygemm(*same_args, **more),
        )
        codes = affine.quantize_affine_tinygemm(x, block, *ours, torch.int32, 0, 15)
        for a, b in zip(ours, expected, strict=True):
            same(a, b)
        same(codes, theirs._quantize_affine_tinygemm(x, block, *expected, torch.int32, 0, 15))
        same(
            affine.dequantize_affine_tinygemm(codes, block, *ours, torch.int32, 0, 15, output_dtype=dtype),
            theirs._dequantize_affine_tinygemm(codes, block, *expected, torch.int32, 0, 15, output_dtype=dtype),
        )
        for a, b in zip(
            affine.choose_qparams_affine_dont_preserve_zero(*args),
            theirs._choose_qparams_affine_dont_preserve_zero(*same_args),
            strict=True,
        ):
            same(a, b)
        scale, theirs_scale = affine.choose_scale_float8(x, block), theirs._choose_scale_float8(x, block)
        if (theirs_scale == 0).any():
            assert (scale[theirs_scale == 0] == 1).all()
            continue
        same(scale, theirs_scale)
        q = affine.quantize_affine_float8(x, scale)
        same(q.float(), theirs._quantize_affine_float8(x, scale).float())
        same(affine.dequantize_affine_float8(q, scale, dtype), theirs._dequantize_affine_float8(q, scale, dtype))


def test_gradients_of_the_fake_quantizer_are_torchaos():
    import torchao.quantization.quant_primitives as theirs

    scale, zero = torch.full((4, 2), 0.1), torch.zeros(4, 2)
    grads = []
    for function in (affine.fake_quantize_affine, theirs._fake_quantize_affine):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        function(x, (1, 32), scale, zero, torch.int8, -8, 7).square().sum().backward()
        grads.append(x.grad)
    assert torch.allclose(*grads, rtol=1e-6) and (grads[0] == 0).any() and (grads[0] != 0).any()


def test_scales_in_the_order_of_tensor_cores():
    from torchao.prototype.mx_formats.utils import from_blocked as their_from
    from torchao.prototype.mx_formats.utils import to_blocked as their_to

    for rows, columns in ((128, 4), (130, 5), (1, 1), (256, 16)):
        scales = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
        assert torch.equal(to_blocked(scales).flatten(), their_to(scales).flatten())
        blocked = their_to(scales)
        assert torch.equal(from_blocked(blocked, rows, columns), their_from(blocked, rows, columns))


# -- configurations -------------------------------------------------------------------------------------------------------


def their_class(name):
    import torchao.prototype.mx_formats as mx
    import torchao.prototype.quantization as prototype
    import torchao.quantization as stable

    return next((getattr(module, name) for module in (stable, mx, prototype) if hasattr(module, name)), None)


GONE = ("NF4WeightOnlyConfig", "FPXWeightOnlyConfig", "UIntXWeightOnlyConfig", "GemliteUIntXWeightOnlyConfig")
KNOWN_THERE = [name for name in config.CONFIGS if name not in GONE]


@pytest.mark.parametrize("name", KNOWN_THERE)
def test_fields_defaults_and_json_are_torchaos(name):
    import dataclasses

    from torchao.core.config import config_from_dict, config_to_dict

    theirs = their_class(name)
    if theirs is None:
        pytest.skip(f"torchao 0.18 has no {name} there")
    ours = config.CONFIGS[name]
    assert [f.name for f in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]
    told = config.config_to_dict(ours())
    assert json.dumps(told) == json.dumps(config_to_dict(theirs()))
    assert config.config_from_dict(config_to_dict(theirs())) == ours()
    if name not in ("UIntxWeightOnlyConfig", "Int8DynamicActivationUIntxWeightConfig", "GGUFWeightOnlyConfig"):
        config_from_dict(told)  # torchao reads only what is in its own list of modules


def test_mappings_by_name_are_torchaos():
    from torchao.core.config import config_to_dict
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

    ours = config.FqnToConfig({"a": config.CONFIGS["Int8WeightOnlyConfig"](), "re:b.*": None})
    assert config.config_to_dict(ours) == config_to_dict(FqnToConfig({"a": Int8WeightOnlyConfig(), "re:b.*": None}))
    assert config.config_from_dict(config.config_to_dict(ours)) == ours


# -- files ------------------------------------------------------------------------------------------------------------------

FILES = {
    "int8 rows": ("Int8WeightOnlyConfig", {}),
    "int8 tensor": ("Int8WeightOnlyConfig", {"granularity": "PerTensor()"}),
    "int8 groups": ("Int8WeightOnlyConfig", {"granularity": "PerGroup(64)"}),
    "int8 dynamic": ("Int8DynamicActivationInt8WeightConfig", {}),
    "int8 dynamic asymmetric": (
        "Int8DynamicActivationInt8WeightConfig",
        {"act_mapping_type": "MappingType.ASYMMETRIC"},
    ),
    "float8 rows": ("Float8WeightOnlyConfig", {}),
    "float8 groups": ("Float8WeightOnlyConfig", {"granularity": "PerGroup(64)"}),
    "int4 groups": ("IntxWeightOnlyConfig", {"weight_dtype": "torch.int4", "granularity": "PerGroup(32)"}),
    "int3 asymmetric": (
        "IntxWeightOnlyConfig",
        {"weight_dtype": "torch.int3", "mapping_type": "MappingType.ASYMMETRIC"},
    ),
    "int2 noclip": (
        "IntxWeightOnlyConfig",
        {
            "weight_dtype": "torch.int2",
            "mapping_type": "MappingType.SYMMETRIC_NO_CLIPPING_ERR",
            "granularity": "PerGroup(64)",
        },
    ),
    "8da4w": ("Int8DynamicActivationIntxWeightConfig", {"weight_dtype": "torch.int4"}),
    "nvfp4": ("NVFP4WeightOnlyConfig", {}),
    "nvfp4 one level": ("NVFP4WeightOnlyConfig", {"use_dynamic_per_tensor_scale": "False"}),
    "mxfp8": ("MXDynamicActivationMXWeightConfig", {}),
    "mxfp4": (
        "MXDynamicActivationMXWeightConfig",
        {"weight_dtype": "torch.float4_e2m1fn_x2", "activation_dtype": "torch.float4_e2m1fn_x2"},
    ),
}


def settings(given, module):
    names_ = {"torch": torch, **{name: getattr(module, name) for name in ("PerTensor", "PerGroup", "MappingType")}}
    return {key: eval(value, names_) for key, value in given.items()}


def model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)).to(dtype)


def both(case, dtype):
    """The same model quantized by torchao and by lowp, or None for torchao where it cannot on this machine."""
    import torchao.quantization as theirs

    name, given = FILES[case]
    ours, real = model(dtype), model(dtype)
    quantize_(ours, config.CONFIGS[name](**settings(given, words)))
    try:
        theirs.quantize_(real, their_class(name)(**settings(given, theirs)))
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:
        return ours, None, str(error)
    return ours, real, ""


@each_dtype
@pytest.mark.parametrize("case", FILES)
def test_quantized_models_and_their_files_are_torchaos(case, dtype, tmp_path):
    from safetensors.torch import load_file, save_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict

    if dtype == torch.float16 and case in ("nvfp4", "nvfp4 one level", "mxfp8", "mxfp4"):
        pytest.skip("torchao wants bfloat16 or float32 there")
    ours, real, why_not = both(case, dtype)
    if real is None:
        pytest.skip(f"torchao cannot: {why_not}")
    expected = {name: tensor.dequantize() for name, tensor in real.state_dict().items() if name.endswith("weight")}
    tensors, metadata = flatten.flatten_tensor_state_dict(ours.state_dict())
    save_file(tensors, tmp_path / "ours.safetensors", metadata)
    read, left = unflatten_tensor_state_dict(load_file(tmp_path / "ours.safetensors"), metadata)  # torchao reads ours
    assert not left and list(read) == list(ours.state_dict())
    for name, value in expected.items():
        assert type(read[name]).__name__ == type(real.state_dict()[name]).__name__
        same(read[name].dequantize(), value)
        same(ours.state_dict()[name].dequantize(dtype), value)
    their_tensors, their_metadata = flatten_tensor_state_dict(real.state_dict())
    back, left = flatten.unflatten_tensor_state_dict(their_tensors, their_metadata)  # we read torchao's
    assert not left
    for name, value in expected.items():
        same(back[name].dequantize(dtype), value)
        mine = ours.state_dict()[name]
        assert back[name].scheme == mine.scheme and type(back[name]) is type(mine)
    swizzled = case.startswith(("nvfp4", "mxfp"))
    if not swizzled:
        assert metadata == their_metadata and tensors.keys() == their_tensors.keys()
        for name, tensor in their_tensors.items():
            same(tensors[name].float(), tensor.float())


def test_int4_files_are_read_by_torchao():
    """torchao makes Int4Tensor on Hopper alone; the values of ours are checked by its formula, q * scale + zero_point."""
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    for packing in words.Int4PackingFormat:
        ours = model(torch.bfloat16)
        quantize_(ours, config.CONFIGS["Int4WeightOnlyConfig"](group_size=64, int4_packing_format=packing))
        read, _ = unflatten_tensor_state_dict(*flatten.flatten_tensor_state_dict(ours.state_dict()))
        w = read["0.weight"]
        assert type(w).__name__ == "Int4Tensor" and w.scale.shape == (4, 128) and list(w.block_size) == [1, 64]
        codes = torch.stack((w.qdata & 15, w.qdata >> 4), dim=-1).flatten(1).to(torch.int16)
        codes = torch.where(codes > 7, codes - 16, codes).float()
        values = codes * w.scale.float().T.repeat_interleave(64, 1) + w.zero_point.float().T.repeat_interleave(64, 1)
        assert torch.allclose(values, ours[0].weight.dequantize(torch.float32), rtol=1e-5, atol=1e-7)


def test_every_public_name_is_in_the_table():
    """What torchao's main modules export, each with a row: it works, or says what is missing."""
    for module in (
        "quantization",
        "quantization.qat",
        "core.config",
        "utils",
        "optim",
        "float8",
        "prototype.mx_formats",
    ):
        exported = getattr(importlib.import_module(f"torchao.{module}"), "__all__", [])
        lost = [name for name in exported if name not in names.by_module()[module]]
        assert not lost, f"torchao.{module}: {lost}"


def lacking(ours, theirs) -> list[str]:
    """The arguments of one function that the other does not take by name."""
    if not inspect.isfunction(ours) and not inspect.ismethod(ours):
        return []  # torch's own
    mine = inspect.signature(ours).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in mine.values()):
        return []
    wanted = [
        p.name for p in inspect.signature(theirs).parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    return [name for name in wanted if name not in mine]


INSIDES = (
    "NF4Tensor.",
    "AffineQuantizedMSEObserver.",
    "GGUFQuantizedTensor.from_float",
    "Int4OpaqueTensor.from_hp",  # down to here: how torchao makes its own codes
    "AWQObservedLinear.from_float",  # takes torchao's observer: ours are made by the configuration
    "SmoothQuantObservedLinear.from_float",
    "LearnableFakeQuantize.",  # torch's own class
    "XNNPACKQuantizer.get_supported_",  # lists of torchao's patterns
)


def test_what_works_takes_torchaos_arguments():
    """A function or public method of ours takes at least the arguments of torchao's of that name, by name."""
    found = []
    for row in names.table():
        try:
            theirs = getattr(importlib.import_module(f"torchao.{row.modules[0]}".rstrip(".")), row.name)
        except (ImportError, AttributeError, RuntimeError):
            continue
        ours = resolve(row) if row.works else None
        if inspect.isfunction(theirs) and inspect.isfunction(ours):
            found += [f"{row.name}({name})" for name in lacking(ours, theirs)]
        if inspect.isclass(theirs) and inspect.isclass(ours) and not issubclass(theirs, enum.Enum):
            for name, method in inspect.getmembers(theirs, lambda m: inspect.isfunction(m) or inspect.ismethod(m)):
                if (
                    name.startswith("_")
                    or not str(getattr(method, "__module__", "")).startswith("torchao")
                    or name not in vars(theirs)
                ):
                    continue
                mine = getattr(ours, name, None)
                found += (
                    [f"{row.name}.{name}"]
                    if mine is None
                    else [f"{row.name}.{name}({n})" for n in lacking(mine, method)]
                )
    found = [line for line in found if not line.startswith(INSIDES)]
    assert not found, "\n".join(found)


def test_the_classes_that_files_may_hold_are_torchaos():
    from torchao.prototype.safetensors.safetensors_utils import ALLOWED_TENSORS_SUBCLASSES

    assert set(flatten.READABLE) == set(ALLOWED_TENSORS_SUBCLASSES) <= set(TENSORS)
