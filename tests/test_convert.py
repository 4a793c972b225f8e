"""Published files in, our folders out, and back: through tiny files made here and the pack."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest
from absl import flags
from helpers import forked, raising, random_pipeline
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from test_weight_names import generator_shapes, stand_ins, tokenizer_shapes
from torch_files import ordered, storage, tensor, write_zip

from configs import common
from nvg_jax import Pipeline, convert
from nvg_jax.errors import UserError
from nvg_jax.jobs import conversion
from nvg_jax.runtime import export
from nvg_jax.runtime.storage import fingerprint
from nvg_jax.sampling.settings import PUBLISHED
from nvg_jax.tokenizer import TokenizerConfig
from nvg_jax.torch_interop import weight_names
from nvg_jax.torch_interop.checkpoint_files import read_state_dict

CONFIG = TokenizerConfig(
    image_size=(4, 8),
    latent_size=(2, 4),
    latent_dim=4,
    codebook_size=16,
    base_channels=32,
    channel_multipliers=(1, 2),
    blocks_per_level=1,
)
SIZES = {
    name: dict(width=2 * 16, depth=depth, head_dim=16, mlp_ratio=2)
    for name, depth in (("content", 2), ("structure", 1))
} | {"num_classes": 3}


def random_tensors(shapes, seed: int, prefix: str = "") -> dict[str, np.ndarray]:
    """Random tensors of published names for shapes of ours."""
    rng = np.random.default_rng(seed)
    views = weight_names.published_views(stand_ins(shapes))
    return {prefix + k: rng.normal(size=v.shape).astype(np.float32) for k, v in views.items()}


def write_checkpoint(path, tensors):
    """A Lightning checkpoint of float32 tensors."""
    items = []
    for key, (name, array) in enumerate(tensors.items()):
        strides = [int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)]
        store = storage(str(key), array.size)
        items += [name, tensor(store, 0, array.shape, tuple(strides))]
    storages = {str(key): array for key, array in enumerate(tensors.values())}
    return write_zip(path, {"state_dict": ordered(*items)}, storages)


def write_autoencoder(path, config=CONFIG, seed: int = 1):
    tensors = random_tensors(tokenizer_shapes(config), seed)
    averaged = random_tensors(tokenizer_shapes(config), seed + 1, "ema_model.")
    statistic = {"total_visited_codes": np.ones((9, 2), np.float32)}
    return write_checkpoint(path, tensors | averaged | statistic)


def write_generator(path, config=CONFIG):
    tensors = {}
    for seed, prefix in enumerate(("nvgformer.", "ema_model.nvgformer.")):
        tensors |= random_tensors(generator_shapes(SIZES, config), 10 + seed, prefix)
        tensors[prefix + "rope_ids"] = weight_names.rope_ids(config.latent_size)
    frozen = random_tensors(tokenizer_shapes(config), 1, "first_stage_model.")
    return write_checkpoint(path, tensors | frozen)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(autoencoder, generator): tiny files in the published layout."""
    folder = tmp_path_factory.mktemp("published")
    return write_autoencoder(folder / "ae.ckpt"), write_generator(folder / "d2.ckpt")


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    """A folder converted from both, with the default weights."""
    folder = tmp_path_factory.mktemp("converted")
    conversion.convert(folder, *files)
    return folder


def same_bytes(path, tensors):
    """A safetensors file holds exactly these tensors."""
    back = load_file(path)
    assert set(back) == set(tensors)
    for name, expected in tensors.items():
        assert (back[name].dtype, back[name].shape) == (expected.dtype, expected.shape), name
        assert back[name].tobytes() == expected.tobytes(), name


def raw_autoencoder(path):
    return read_state_dict(path, lambda name: name.startswith(("encoder", "decoder", "quantize")))


def averaged(path):
    """The EMA tensors of a file under the names of the raw ones."""
    tensors = read_state_dict(path, lambda name: name.startswith("ema_model."))
    return {name.removeprefix("ema_model."): tensor for name, tensor in tensors.items()}


@pytest.mark.slow
def test_there_and_back_on_the_command_line(files, folder, tmp_path):
    """Same names, types, shapes and bytes: the raw autoencoder and the averaged generators."""
    command = ["-m", "nvg_jax.convert", f"--workdir={folder}", "--to-safetensors"]
    done = forked(*command, f"--out={tmp_path / 'back'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"written: {tmp_path / 'back'}\n"
    autoencoder, generator = files
    same_bytes(tmp_path / "back" / "autoencoder.safetensors", raw_autoencoder(autoencoder))
    same_bytes(tmp_path / "back" / "generator.safetensors", averaged(generator))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [{}, {"blocks_per_level": 0, "channel_multipliers": (1, 2)}],  # the published layout has blocks
)
def test_our_safetensors_come_back_as_what_they_are(tmp_path, sizes):
    """With their own classes, settings and preparation of images, not those of the published."""
    pipe = random_pipeline(**sizes)
    names = tuple(f"digit {number}" for number in range(10))
    pipe.metadata = pipe.metadata.replace(
        class_names=names, fingerprint=fingerprint(pipe.params["tokenizer"])
    )
    pipe.save_pretrained(tmp_path / "folder")
    conversion.to_safetensors(tmp_path / "folder", tmp_path / "out")
    files = [tmp_path / "out" / f"{part}.safetensors" for part in ("autoencoder", "generator")]
    metadata, params = conversion.read_published(*files)
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(pipe.params))
    assert metadata.sources["generator"]["file"] == "generator.safetensors"
    assert metadata.replace(sources=None) == pipe.metadata
    assert (metadata.resize_filter, metadata.class_names) == ("lanczos", names)
    with pytest.raises(UserError, match="holds one copy .* leave --autoencoder_weights out"):
        conversion.read_published(*files, autoencoder_weights="ema")
    export.save({"x": np.zeros(3)}, files[1], {conversion.HEADER: "{}{"})
    with pytest.raises(UserError, match="generator.safetensors is damaged: nvg_jax in its header"):
        conversion.read_published(*files)


def test_published_safetensors_and_the_names_of_wrapped_modules(files, tmp_path, caplog):
    wrapped = {f"module._orig_mod.{k}": x for k, x in raw_autoencoder(files[0]).items()}
    save_file(wrapped, tmp_path / "ae.safetensors")
    save_file(averaged(files[1]), tmp_path / "d2.safetensors")
    expected, expected_params = conversion.read_published(*files)
    with caplog.at_level("WARNING", "nvg_jax"):
        metadata, params = conversion.read_published(
            tmp_path / "ae.safetensors", tmp_path / "d2.safetensors"
        )
    jax.tree.map(np.testing.assert_array_equal, params, expected_params)
    assert metadata.replace(sources=None) == expected.replace(sources=None)
    (line,) = caplog.messages
    assert line.endswith("ae.safetensors: took _orig_mod., module. off the names of its tensors")
    damaged = tmp_path / "ae.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match="ae.safetensors: it is damaged"):
        conversion.read_published(damaged)


def test_the_folder_says_what_it_is(files, folder):
    meta = json.loads((folder / "config.json").read_text())
    expected = json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    assert meta["tokenizer"] == expected
    for name in ("content", "structure"):
        assert meta[name] == meta[name] | SIZES[name]
    assert meta["class_names"] == ["0", "1", "2"]
    scale = averaged(files[1])["nvgformer.scale_factors"]
    assert np.float32(meta["canvas_scale"]).tobytes() == scale.tobytes()
    assert meta["sources"] == {
        part: {
            "file": file.name,
            "weights": weights,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for part, weights, file in zip(("autoencoder", "generator"), ("raw", "ema"), files)
    }
    pipeline = Pipeline.from_pretrained(folder)
    weights = jax.device_get(pipeline.params["tokenizer"])
    assert meta["fingerprint"] == fingerprint(weights)
    assert pipeline.settings == PUBLISHED


def test_published_settings_are_those_of_the_presets():
    assert dataclasses.asdict(PUBLISHED) == common.base().sampling.to_dict()


@pytest.mark.slow
def test_a_converted_folder_samples(folder):
    out = Pipeline.from_pretrained(folder).sample([0, "2"], flow_steps=1)
    assert out.images.shape == (2, 4, 8, 3)
    assert np.isfinite(out.images).all()


def test_the_other_weights_and_an_autoencoder_alone(tmp_path):
    path = write_autoencoder(tmp_path / "ae.ckpt", SQUARE)
    conversion.convert(tmp_path / "out", path, autoencoder_weights="ema")
    pipeline = Pipeline.from_pretrained(tmp_path / "out")
    assert not pipeline.can_sample
    conversion.to_safetensors(tmp_path / "out", tmp_path / "back")
    same_bytes(tmp_path / "back" / "autoencoder.safetensors", averaged(path))
    assert [file.name for file in (tmp_path / "back").iterdir()] == ["autoencoder.safetensors"]


@pytest.mark.parametrize("weights", weight_names.WEIGHTS)
def test_a_whole_checkpoint_as_safetensors_has_both_copies(files, tmp_path, weights):
    save_file(read_state_dict(files[1]), tmp_path / "d2.safetensors")
    read = weight_names.read(tmp_path / "d2.safetensors", weights)
    expected = weight_names.read(files[1], weights)
    assert read.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(read[name], array, name)


def test_raw_generators(files):
    _, params = conversion.read_published(*files, generator_weights="raw")
    raw = read_state_dict(files[1], lambda name: name == "nvgformer.cls_head.linear.bias")
    ours = params["content"]["token_head"]["bias"]
    assert ours.tobytes() == raw["nvgformer.cls_head.linear.bias"].tobytes()


# Mistakes.

SQUARE = dataclasses.replace(CONFIG, image_size=(8, 8), latent_size=(4, 4))


def test_missing_and_foreign_files(files, tmp_path):
    autoencoder, generator = files
    with pytest.raises(ValueError, match="There is no file .*nowhere.ckpt"):
        conversion.read_published(tmp_path / "nowhere.ckpt")
    with pytest.raises(ValueError, match="There is no file .*nowhere.ckpt"):
        conversion.read_published(autoencoder, tmp_path / "nowhere.ckpt")
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="Cannot read .*notes.txt: .*neither"):
        conversion.read_published(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="Cannot convert .*d2.ckpt. .*no tensor 'encoder.conv_in"):
        conversion.read_published(generator, generator)
    with pytest.raises(ValueError, match="Cannot convert .*ae.ckpt. .*no tensor 'rope_ids'"):
        conversion.read_published(autoencoder, autoencoder)


def test_weights_that_the_file_does_not_have(files, tmp_path):
    raw = write_checkpoint(tmp_path / "raw.ckpt", raw_autoencoder(files[0]))
    with pytest.raises(ValueError, match="raw.ckpt holds no ema weights. Take the raw ones"):
        conversion.read_published(raw, files[1], autoencoder_weights="ema")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, sentence",
    [
        (SQUARE, "ae.ckpt. The autoencoder has 16 latent positions, which cannot be 2 x 4"),
        (dataclasses.replace(CONFIG, codebook_size=8), "its codebook_size is 16, .*'s 8"),
        (dataclasses.replace(CONFIG, latent_dim=2), "its latent_dim is 4, the autoencoder's 2"),
    ],
)
def test_a_generator_of_another_autoencoder(files, tmp_path, config, sentence):
    other = write_autoencoder(tmp_path / "ae.ckpt", config)
    with pytest.raises(ValueError, match=sentence):
        conversion.read_published(other, files[1])


@pytest.mark.slow
def test_an_own_generator_of_another_autoencoder_of_the_same_sizes(files, tmp_path):
    for seed in (1, 2):
        ae = write_autoencoder(tmp_path / f"ae{seed}.ckpt", seed=seed)
        conversion.convert(tmp_path / f"run{seed}", ae, files[1])
        conversion.to_safetensors(tmp_path / f"run{seed}", tmp_path / f"out{seed}")
    with pytest.raises(UserError, match="was made for another autoencoder .* belong together"):
        conversion.read_published(
            tmp_path / "out1" / "autoencoder.safetensors",
            tmp_path / "out2" / "generator.safetensors",
        )


def test_an_autoencoder_alone_that_is_not_square(files):
    with pytest.raises(ValueError, match="Give its latent size .*, or a generator"):
        conversion.read_published(files[0])


def test_other_tensors_are_listed_with_their_file(files, tmp_path):
    tensors = raw_autoencoder(files[0])
    tensors["encoder.extra"] = tensors.pop("decoder.conv_in.conv.bias")
    path = write_checkpoint(tmp_path / "odd.ckpt", tensors)
    with pytest.raises(ValueError) as error:
        conversion.read_published(path, files[1])
    for part in ("odd.ckpt", "missing (1): decoder.conv_in.conv.bias", "(1): encoder.extra"):
        assert part in str(error.value)


def test_nothing_is_overwritten(files, folder):
    before = sorted(folder.rglob("*"))
    for write in (
        lambda: conversion.convert(folder, *files),
        lambda: conversion.to_safetensors(folder, folder),
        lambda: conversion.convert(files[0], *files),  # a file
    ):
        with pytest.raises(ValueError, match="exists and is not empty. Give --out a new folder"):
            write()
    assert sorted(folder.rglob("*")) == before


def test_a_disk_that_is_full_is_named_and_leaves_nothing(folder, tmp_path, monkeypatch):
    full = SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
    for write in (conversion.export_model, conversion.to_safetensors):
        with monkeypatch.context() as patch, pytest.raises(UserError) as error:
            patch.setattr(export, "save_file", raising(full))
            write(folder, tmp_path / "out")
        assert "safetensors cannot be written: No space left on device" in str(error.value)
        assert not list((tmp_path / "out").iterdir())
    (tmp_path / "out" / "autoencoder.safetensors.tmp").touch()  # of one that was killed
    conversion.to_safetensors(folder, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"autoencoder.safetensors", "generator.safetensors"}


def command(monkeypatch, *arguments):
    """Calls the command with these flags."""
    values = flags.FlagValues()
    defaults = {f"{file}_weights": weights for file, weights in weight_names.DEFAULTS.items()}
    for name in convert.NAMES:
        default = (defaults | {"dtype": "float32"}).get(name)
        flags.DEFINE_string(name, default, "", flag_values=values)
    values(["convert", *arguments])
    monkeypatch.setattr(convert, "FLAGS", values)
    convert.main(None)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            "--workdir=a --to_safetensors=1 --out=b --dtype=float16",
            "takes --workdir and --out",
        ),
        ("--workdir=a --out=b --autoencoder_weights=ema", "or only --workdir to export"),
        ("--pretrained=dino --from=a --dtype=float16", "takes --from .*, and nothing else"),
        ("--workdir=a --out=b --from=c", "--from belongs to --pretrained"),
        ("--workdir=a --out=b --license=mit", "--license is for models on the hub"),
        ("--autoencoder=a --out=b --generator_weights=raw", "belongs to --generator"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(monkeypatch, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        command(monkeypatch, *arguments.split())


def test_one_generator_alone_has_no_published_file(folder, tmp_path):
    pipeline = Pipeline.from_pretrained(folder)
    metadata = pipeline.metadata.replace(model=pipeline.metadata.model.only("content"))
    params = {k: v for k, v in pipeline.params.items() if k != "structure"}
    Pipeline(metadata, params).save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match="has only the content generator"):
        conversion.to_safetensors(tmp_path / "half", tmp_path / "back")
    assert not (tmp_path / "back").exists()


# The pack of the published model.


@pytest.mark.slow
def test_the_converted_pack(parity_dir, tmp_path):
    """The folder encodes to the published tokens, and gives the files' bytes back."""
    autoencoder, generator = parity_dir / "ae.ckpt", parity_dir / "generator.ckpt"
    conversion.convert(tmp_path / "folder", autoencoder, generator)
    with np.load(parity_dir / "expected.npz") as expected, jax.default_matmul_precision("highest"):
        got = Pipeline.from_pretrained(tmp_path / "folder").encode(expected["images_nhwc"])
        np.testing.assert_array_equal(got.tokens, expected["tokens"])
        np.testing.assert_array_equal(got.structure, expected["labels"])
    conversion.to_safetensors(tmp_path / "folder", tmp_path / "back")
    same_bytes(tmp_path / "back" / "autoencoder.safetensors", raw_autoencoder(autoencoder))
    same_bytes(tmp_path / "back" / "generator.safetensors", averaged(generator))
