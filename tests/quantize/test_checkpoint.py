"""Checkpoints: what is saved comes back bit for bit, can be read without us, and a damaged file is an error that says so."""

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open
from torch import nn

import lowp
from lowp.errors import CheckpointError
from lowp.layouts.plain import tensor_shapes
from lowp.numerics import Scheme, known_formats
from lowp.quantize import quantize_weight, shards
from lowp.quantize.checkpoint import RECORD, load_into, load_state, read_contents, save
from lowp.tensor import QTensor

SCHEMES = list(dict.fromkeys(str(Scheme.parse(known.spelling)) for known in known_formats()))


class Holder(nn.Module):
    """A module with one weight, and nothing else."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(64, 128), nn.Linear(128, 128), nn.BatchNorm1d(128), nn.Linear(128, 64, bias=False)
    ).bfloat16()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = small()
    model[3].weight = model[0].weight
    lowp.quantize_(model, {"1": "int4", "0": "int8"})
    return save(model, tmp_path / "model")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if isinstance(a, QTensor) != isinstance(b, QTensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not isinstance(a, QTensor):
        return bits(a) == bits(b)
    a, b = a.to_layout("plain"), b.to_layout("plain")
    return a.spec == b.spec and {k: bits(v) for k, v in a.packed.items()} == {k: bits(v) for k, v in b.packed.items()}


# -- what is saved comes back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_format_comes_back_bit_for_bit(scheme, tmp_path):
    before = Holder(quantize_weight(torch.randn(128, 256), scheme))
    save(before, tmp_path / "out")
    after = load_state(tmp_path / "out")["weight"]
    assert same(before.weight, after)
    assert torch.equal(before.weight.dequantize(), after.dequantize()) or before.weight.dequantize().isnan().any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_format_can_be_read_without_us(scheme, tmp_path):
    """From lowp.json and the safetensors alone, with numpy, following how_to_read."""
    weight = quantize_weight(torch.randn(128, 256), scheme)
    save(Holder(weight), tmp_path / "out")
    assert numpy.array_equal(read_by_the_book(tmp_path / "out", "weight"), weight.dequantize(torch.float32).numpy())


def read_by_the_book(folder: Path, name: str) -> numpy.ndarray:
    record = json.loads((folder / "lowp.json").read_text())
    meaning = record["tensors"][name]
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    element = meaning["scheme"].split("@")[0].split("/")[0]
    shape = meaning.get("stored_shape", meaning["shape"])
    q = stored["qdata"].float().numpy()
    if element in record["codes"]:
        codes = record["codes"][element]
        width = (len(codes) - 1).bit_length()
        stream = numpy.unpackbits(stored["qdata"].numpy(), axis=-1, bitorder="little")[..., : shape[-1] * width]
        index = (stream.reshape(*shape, width) << numpy.arange(width)).sum(-1)
        q = numpy.array([numpy.nan if value is None else value for value in codes], dtype=numpy.float32)[index]
    if "scale" not in stored:
        return q
    scale = stored["scale"].float().numpy()
    if "scale_scale" in stored:
        offset = stored["scale_zero_point"].numpy() if "scale_zero_point" in stored else numpy.float32(0)
        scale = over(scale, stored["scale_scale"].numpy(), offset)
    return over(q, scale, stored["zero_point"].float().numpy() if "zero_point" in stored else numpy.float32(0))


def over(q: numpy.ndarray, scale: numpy.ndarray, zero_point) -> numpy.ndarray:
    """(q - zero_point) * scale, each entry repeated over its block; blocks of a row may run on into the next."""

    def spread(x):
        if not isinstance(x, numpy.ndarray) or x.size == 1:
            return x.reshape(()) if isinstance(x, numpy.ndarray) else x
        if all(n % m == 0 for n, m in zip(q.shape, x.shape, strict=True)):
            for axis, (n, m) in enumerate(zip(q.shape, x.shape, strict=True)):
                x = x.repeat(n // m, axis)
            return x
        return x.reshape(-1).repeat(q.size // x.size).reshape(q.shape)

    return (q - spread(zero_point)) * spread(scale)


def test_tied_weights_are_stored_once_and_come_back_tied(saved):
    state = load_state(saved)
    assert state["0.weight"] is state["3.weight"]
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.startswith("3.")]  # noqa: SIM118
    model = small()
    model[3].weight = model[0].weight
    load_into(model, saved)
    assert model[3].weight is model[0].weight
    assert isinstance(model[0].weight, QTensor)


def test_a_model_untied_becomes_tied(saved):
    model = load_into(small(), saved)
    assert model[3].weight is model[0].weight


def test_load_gives_the_same_outputs_and_the_best_layout(saved):
    model = small()
    model[3].weight = model[0].weight
    lowp.quantize_(model, {"1": "int4", "0": "int8"})
    loaded = load_into(small(), saved)
    assert loaded[1].weight.spec.layout == model[1].weight.spec.layout
    ids = torch.arange(64)
    assert torch.equal(loaded.eval()(ids), model.eval()(ids))


def test_load_onto_the_meta_device_and_in_another_dtype(saved):
    with torch.device("meta"):
        model = small()
    load_into(model, saved, dtype=torch.float32)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert model[1].weight.dtype == model[1].bias.dtype == torch.float32
    assert model[2].num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize(
    "layer, scheme", [(nn.Conv2d(4, 32, 4), "int4/1x32*bf16"), (nn.Conv1d(8, 16, 3, bias=False), "int8")]
)
def test_conv_comes_back_in_its_shape(layer, scheme, tmp_path):
    model = nn.Sequential(layer)
    lowp.quantize_(model, {"0": scheme})
    save(model, tmp_path / "out")
    after = load_state(tmp_path / "out")["0.weight"]
    assert same(model[0].weight, after)
    assert after.shape == layer.weight.shape


def test_transposed_comes_back_transposed(tmp_path):
    model = Holder(quantize_weight(torch.randn(128, 64), "int8", kind="conv1d"))
    save(model, tmp_path / "out")
    after = load_state(tmp_path / "out")["weight"]
    assert after.transposed and same(model.weight.t(), after.t())


def test_scalars_empty_tensors_and_other_dtypes_come_back(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scalar", torch.tensor(3.5, dtype=torch.float64))
            self.register_buffer("empty", torch.zeros(0, 4))
            self.register_buffer("mask", torch.tensor([True, False, True]))
            self.register_buffer("float8", torch.randn(4).to(torch.float8_e5m2))
            self.register_buffer("strided", torch.arange(12).view(3, 4).t())

    before = Odd()
    save(before, tmp_path / "out")
    after = load_state(tmp_path / "out")
    assert all(same(tensor, after[name]) for name, tensor in before.state_dict().items())


def test_several_shards_have_an_index_that_others_read(tmp_path):
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)])
    lowp.quantize_(model, {"1": "int8"})
    save(model, tmp_path / "out", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / shards.INDEX).read_text())["weight_map"]
    assert len(set(index.values())) > 2
    for name, file in index.items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert all(same(tensor, load_state(tmp_path / "out")[name]) for name, tensor in model.state_dict().items())


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        model = small()
        lowp.quantize_(model, "int4")
        save(model, tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert (tmp_path / "a/lowp.json").read_bytes() == (tmp_path / "b/lowp.json").read_bytes()


def test_configuration_is_copied_and_weights_are_not(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in (
        "config.json",
        "tokenizer.json",
        "LICENSE",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        ".hidden",
    ):
        (source / name).write_text(f"{{}} {name}")
    out = save(small(), tmp_path / "out", config_from=source)
    assert sorted(path.name for path in out.iterdir()) == [
        "LICENSE",
        "config.json",
        RECORD,
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()


# -- nothing is lost --------------------------------------------------------------------------------------------------


def test_an_existing_directory_is_an_error_and_stays(saved):
    before = (saved / RECORD).read_bytes()
    with pytest.raises(CheckpointError, match="exists"):
        save(small(), saved)
    assert (saved / RECORD).read_bytes() == before


def test_overwrite_replaces_a_checkpoint_of_ours_only(saved, tmp_path):
    save(small(), saved, overwrite=True)
    assert not read_contents(saved).meanings
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="remove it yourself"):
        save(small(), tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("when", ["copy_configuration", "seal", "publish"])
def test_a_failure_leaves_nothing_behind(when, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(f"lowp.quantize.checkpoint.{when}", fail)
    with pytest.raises(OSError):
        save(small(), tmp_path / "out", config_from=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_space_left_is_found_first(tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"GB of space, got .* free"):
        save(small(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_numbers_cannot_be_saved(tmp_path):
    with pytest.raises(CheckpointError, match=r"0\.weight on the meta device"):
        save(nn.Sequential(nn.Linear(4, 4, device="meta")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- damaged, altered and foreign files -------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def grow(folder: Path) -> None:
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"more")


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def no_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def change(**values):
    def damage(folder: Path) -> None:
        record = json.loads((folder / RECORD).read_text())
        for key, value in values.items():
            *path, last = key.split("__")
            place = record
            for step in path:
                place = place[step.replace("_", ".")]
            place[last] = value
        (folder / RECORD).write_text(json.dumps(record))

    return damage


def write_record(text: str):
    return lambda folder: (folder / RECORD).write_text(text)


DAMAGES = {
    "cut short": (truncate, "cut short"),
    "grown": (grow, "altered"),
    "one bit": (flip_a_bit, "SHA-256"),
    "no shard": (no_shard, "no such file"),
    "not json": (write_record("PK\x03\x04"), "wants JSON"),
    "json of another kind": (write_record("[1, 2]"), "files, tied and tensors"),
    "half a json": (write_record('{"files": {'), "wants JSON"),
    "unknown scheme": (change(tensors__1_weight__scheme="int44/row"), "1.weight"),
    "another scheme": (change(tensors__1_weight__scheme="int8/row"), "wants qdata as int8"),
    "another shape": (change(tensors__1_weight__shape=[128, 256]), "wants qdata"),
    "odd shape": (change(tensors__1_weight__shape="big"), "1.weight"),
    "odd dtype": (change(tensors__1_weight__dtype="int64"), "1.weight"),
    "odd sum": (change(files={"model.safetensors": 3}), "bytes and sha256"),
    "a path outside": (change(files={"../model.safetensors": {"bytes": 1, "sha256": ""}}), "beside it"),
    "ties nothing": (change(tied={"3.weight": "9.weight"}), "ties"),
}


@pytest.mark.parametrize("damage, said", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_an_error_that_names_it(damage, said, saved):
    damage(saved)
    with pytest.raises(CheckpointError, match=said):
        load_state(saved)


@pytest.mark.parametrize("cut", [0, 4, 8, 20, 200])
def test_a_file_cut_anywhere_is_an_error(cut, saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="cut short"):
        shards.read_header(path)


def test_a_header_that_lies_is_an_error(saved):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for damage in ({"dtype": "F13"}, {"shape": [1 << 40]}, {"data_offsets": [-8, 8]}, {"shape": None}):
        text = json.dumps(header | {"1.bias": header["1.bias"] | damage}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(CheckpointError):
            shards.read_header(path)
    path.write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
    with pytest.raises(CheckpointError, match="wants the header"):
        shards.read_header(path)


def test_without_verify_a_flipped_bit_passes_and_a_cut_does_not(saved):
    flip_a_bit(saved)
    load_state(saved, verify=False)
    truncate(saved)
    with pytest.raises(CheckpointError, match="cut short"):
        load_state(saved, verify=False)


def test_foreign_directories_are_named(tmp_path, saved):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_state(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="the file"):
        load_state(saved / RECORD)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="an empty directory"):
        load_state(empty)
    (empty / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match="only pickles"):
        load_state(empty)
    shutil.copy(saved / "model.safetensors", empty)
    with pytest.raises(CheckpointError, match="a checkpoint in floats"):
        load_state(empty)


def test_names_and_shapes_that_differ_are_named_and_the_model_stays(saved):
    model = nn.Sequential(*small(), nn.Linear(4, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"lacks 4\.weight, 4\.bias"):
        load_into(model, saved)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"has besides 2\."):
        load_into(nn.Sequential(*list(small())[:2]), saved)
    wider = small()
    wider[1] = nn.Linear(128, 256, bias=False)
    wider[1].bias = nn.Parameter(torch.zeros(128))
    with pytest.raises(CheckpointError, match=r"1\.weight wants the shape \(256, 128\)"):
        load_into(wider, saved)


def test_a_model_that_ties_what_the_files_keep_apart_is_an_error(tmp_path):
    save(small(), tmp_path / "out")
    model = small()
    model[3].weight = model[0].weight
    with pytest.raises(CheckpointError, match="one tensor in this model, got two"):
        load_into(model, tmp_path / "out")


def test_a_buffer_without_numbers_is_named_and_the_model_stays(saved):
    with torch.device("meta"):
        model = small()
        model[0].register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(CheckpointError, match=r"0\.table is not part of a checkpoint"):
        load_into(model, saved)
    assert model[1].weight.device.type == "meta"


def test_a_crash_while_replacing_is_mended_by_the_next_run(saved):
    saved.rename(saved.with_name(f".{saved.name}.old"))
    save(small(), saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_sizes_follow_from_the_format(saved):
    for name, meaning in read_contents(saved).meanings.items():
        found = {part: (s.shape, s.dtype) for part, s in read_contents(saved).parts(name).items()}
        assert found == tensor_shapes(Scheme.parse(meaning.scheme).weight, meaning.stored_shape)
