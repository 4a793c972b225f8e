"""Inception v3 and LPIPS on AlexNet against PyTorch's (tests/reference/evaluation.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.evaluation import RESIZED, TF1_SIZES, tf1_images, thinned
from reference.pretrained import FOLDER, images, seeded
from test_pretrained import CLOSE, relative_error, save_torch
from torch_files import write_legacy

from nvg_jax import pretrained
from nvg_jax.errors import UserError

pytestmark = pytest.mark.slow

HEADS = FOLDER / "lpips_alex.pth"


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "evaluation.npz") as arrays:
        return dict(arrays)


def reference_weights(expected, name: str) -> dict[str, np.ndarray]:
    """The tensors of PyTorch's network by their published names."""
    shapes = json.loads(str(expected[f"{name}_names"]))
    return {key: seeded(key, shape) for key, shape in shapes.items() if shape}


@pytest.fixture(scope="module")
def inception_params(expected, tmp_path_factory) -> dict:
    """Imported from PyTorch's older container, as pytorch-fid's file is."""
    folder = tmp_path_factory.mktemp("inception")
    tensors = reference_weights(expected, "inception")
    tensors["Mixed_5b.branch1x1.bn.num_batches_tracked"] = np.zeros(1, np.float32)
    file = save_torch(folder / "pt_inception.pth", tensors, write_legacy)
    pretrained.convert("inception", [file], folder)
    file.unlink()
    return pretrained.load("inception", folder)


def test_inception_agrees_with_pytorch_fid(expected, inception_params):
    found = jax.jit(pretrained.inception)(inception_params, images("first", 299))
    for name in ("pool", "spatial", "logits"):
        ours, reference = getattr(found, name), expected[f"inception_{name}"]
        assert ours.shape == reference.shape and ours.dtype == jnp.float32
        assert relative_error(ours, reference) < CLOSE
        # Of every value, not of the largest alone.
        np.testing.assert_allclose(
            ours, reference, atol=CLOSE * np.abs(reference).mean(), rtol=1e-3
        )


def test_inception_takes_images_of_its_size():
    for x in (np.zeros((1, 256, 256, 3), np.float32), np.zeros((1, 299, 299, 3), np.uint8)):
        with pytest.raises(UserError, match="Resize with tf1_inception_input"):
            pretrained.inception({}, x)


@pytest.mark.parametrize("size", TF1_SIZES)
def test_tf1_input_agrees_with_tensorflow(expected, size):
    x = tf1_images(size)
    found = jax.jit(pretrained.tf1_inception_input)(x)
    assert found.shape == (2, 299, 299, 3) and found.dtype == jnp.float32
    reference = (expected[f"tf1_{size[0]}x{size[1]}"] - 128) / 128
    np.testing.assert_allclose(thinned(found), reference, atol=1e-6)
    as_float = pretrained.tf1_inception_input(x.astype(np.float32))
    np.testing.assert_allclose(as_float, found, atol=1e-6)


def test_tf1_input_by_hand():
    """Two columns, 0 and 255: source position i * 2 / 299, held at the second beyond it."""
    x = np.zeros((1, 1, 2, 3), np.uint8)
    x[:, :, 1] = 255
    found = np.asarray(pretrained.tf1_inception_input(x))[0, 7, :, 1]
    ramp = np.minimum(np.arange(299) * 2 / 299, 1) * 255
    np.testing.assert_allclose(found, (ramp - 128) / 128, atol=1e-5)


@pytest.mark.parametrize("name", RESIZED)
def test_antialiased_input_agrees_with_pytorch(expected, name):
    x = np.random.default_rng(0).uniform(-1, 1, RESIZED[name]).astype(np.float32)
    found = pretrained.antialiased_inception_input(x)
    assert found.shape == (1, 299, 299, 3)
    np.testing.assert_allclose(thinned(found), expected[f"resized_{name}"], atol=1e-5)


def test_antialiased_input_takes_both_kinds_of_images():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), np.uint8)
    resized = pretrained.antialiased_inception_input(pixels / np.float32(127.5) - 1)
    np.testing.assert_allclose(pretrained.antialiased_inception_input(pixels), resized, atol=1e-6)


def test_lpips_alex_agrees_with_the_package(expected, tmp_path):
    alex = save_torch(tmp_path / "alexnet.pth", reference_weights(expected, "lpips_alex"))
    pretrained.convert("lpips_alex", [alex, HEADS], tmp_path)
    params = pretrained.load("lpips_alex", tmp_path)
    first, second = images("first", 64, 2), images("second", 64, 2)
    distance = jax.jit(pretrained.lpips_alex)(params, first, second)
    assert distance.dtype == jnp.float32
    np.testing.assert_allclose(distance, expected["lpips_alex"], rtol=CLOSE)
    np.testing.assert_array_equal(pretrained.lpips_alex(params, first, first), [0, 0])
    for i, channels in enumerate((64, 192, 384, 256, 256)):
        head = params[f"head{i}"].astype(np.float64)
        assert head.shape == (channels,)
        np.testing.assert_allclose(
            [head.sum(), (head**2).sum(), head.max()], expected[f"lpips_alex_head{i}"], rtol=1e-12
        )


def test_lpips_alex_at_its_smallest_images(tmp_path):
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), pretrained.abstract("lpips_alex"))
    x = np.zeros((1, 31, 40, 3), np.float32)
    assert np.isfinite(pretrained.lpips_alex(params, x, x + 1)).all()
    with pytest.raises(UserError, match="at least 31 x 31 pixels"):
        pretrained.lpips_alex(params, x[:, :30], x[:, :30])


def test_lpips_of_the_other_network_is_refused(expected, tmp_path):
    alex = save_torch(tmp_path / "alexnet.pth", reference_weights(expected, "lpips_alex"))
    with pytest.raises(UserError, match="are not those of lpips.\n") as error:
        pretrained.convert("lpips", [alex, HEADS], Path(tmp_path))
    assert "features.0.weight (64, 3, 11, 11), expected (64, 3, 3, 3)" in str(error.value)


def test_inception_of_torchvision_is_refused(expected, tmp_path):
    """Its own weights have 1000 classes and an auxiliary classifier."""
    tensors = reference_weights(expected, "inception")
    tensors["fc.weight"] = np.zeros((1000, 2048), np.float32)
    tensors["AuxLogits.fc.weight"] = np.zeros((1000, 768), np.float32)
    file = save_torch(tmp_path / "inception_v3_google.pth", tensors)
    with pytest.raises(UserError) as error:
        pretrained.convert("inception", [file], tmp_path)
    assert "unexpected (1): AuxLogits.fc.weight" in str(error.value)
    assert "fc.weight (1000, 2048), expected (1008, 2048)" in str(error.value)
    assert "pt_inception-2015-12-05-6726825d.pth from https://" in str(error.value)
