"""Discriminator, DiffAug and adversarial losses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvg_jax.errors import UserError
from nvg_jax.runtime import sharding
from nvg_jax.tokenizer import diffaug, losses
from nvg_jax.tokenizer.discriminator import (
    BatchNorm,
    DiscriminatorHeads,
    SmallFeatures,
    SpectralConv,
)

KEY = jax.random.key(0)
SMALL = nn.Sequential(  # one head, to compile less
    [SmallFeatures(width=8, num_layers=2), lambda features: features[1:], DiscriminatorHeads()]
)


def init(module: nn.Module, *args) -> dict:
    return sharding.unbox(jax.jit(module.init)(KEY, *args))


def drawn(module: nn.Module, *args) -> dict:
    """Variables from NumPy. The first update makes proper vectors of the random ones."""
    shapes = sharding.unbox(jax.eval_shape(module.init, KEY, *args))
    return jax.tree.map(lambda x: draw(x.size, *x.shape), shapes)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def paths(tree) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


# Losses, by hand.


def test_hinge():
    real = jnp.array([[2.0, 0.5], [1.0, -1.0]])  # short of 1 by 0, 0.5, 0, 2
    fake = jnp.array([[-2.0, 0.0], [2.0, -0.5]])  # above -1 by 0, 1, 3, 0.5
    assert losses.discriminator_loss(real, fake) == pytest.approx((2.5 / 4 + 4.5 / 4) / 2)


def test_the_generator_sees_the_mean_logit_of_an_image():
    # Means 0 and ln 3: log(1 + 1) and log(1 + 1/3).
    fake = jnp.array([[5.0, -5.0], [0.0, 2 * np.log(3)]])
    expected = (np.log(2) + np.log(4 / 3)) / 2
    assert losses.adversarial_loss(fake) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_lecam():
    state = losses.LeCam(real=jnp.float32(1.0), fake=jnp.float32(-0.5))
    real = jnp.array([[0.5, -2.0]])  # above the fake average by 1 and not at all
    fake = jnp.array([[0.0, 3.0]])  # below the real average by 1 and not at all
    assert state.loss(real, fake) == pytest.approx(0.5 + 0.5)

    start = losses.LeCam.create()
    assert (start.real, start.fake) == (0, 0)
    after = start.update(jnp.full((2, 3), 4.0), jnp.array([[-1.0] * 3, [-3.0] * 3]))
    assert (after.real, after.fake) == (pytest.approx(0.004), pytest.approx(-0.002))
    halved = state.update(real, fake, decay=0.5)  # means -0.75 and 1.5
    assert (halved.real, halved.fake) == (pytest.approx(0.125), pytest.approx(0.5))
    moved = jax.grad(lambda x: after.update(x, fake).loss(0 * x, fake))(real)
    assert not moved.any()


# Spectral normalization.


def spectral_conv(width: int, kernel_size):
    """A convolution and its variables after 50 updates, none of which touched the kernel."""
    conv = SpectralConv(width, kernel_size, "CIRCULAR", jnp.float32)
    x = jnp.zeros((1, *(9,) * len(kernel_size), width))
    variables = init(conv, x)
    step = jax.jit(lambda v: conv.apply(v, x, mutable=["spectral"])[1])
    for _ in range(50):
        variables |= step(variables)
    return conv, variables


@pytest.mark.slow
@pytest.mark.parametrize("kernel_size", [(1,), (9,), (3, 3)])
def test_the_largest_singular_value_is_one(kernel_size):
    """The kernel in use is read off the answers to single impulses."""
    width = 24
    conv, variables = spectral_conv(width, kernel_size)
    sides = (9,) * len(kernel_size)
    impulses = np.zeros((width, *sides, width), np.float32)
    impulses[(np.arange(width), *(4,) * len(sides), np.arange(width))] = 1
    answers = conv.apply(
        variables, jnp.asarray(impulses)
    )  # (in, positions, out); other positions are zero
    matrix = np.moveaxis(answers, -1, 0).reshape(width, -1)
    assert np.linalg.svd(matrix, compute_uv=False)[0] == pytest.approx(1, rel=0.01)
    stored = np.moveaxis(variables["params"]["kernel"], -1, 0).reshape(width, -1)
    assert np.linalg.svd(stored, compute_uv=False)[0] > 1.2


@pytest.mark.slow
def test_the_gradient_passes_the_weight_and_not_its_vectors():
    """Of sum(G * W / s) with s = u^T W v it is G / s - u v^T sum(G * W) / s^2."""
    conv, variables = spectral_conv(5, (1,))
    weight = np.asarray(variables["params"]["kernel"][0].T, np.float64)  # (out, in)
    u, v = (np.asarray(variables["spectral"][name], np.float64) for name in "uv")
    g = draw(1, 5, 5)
    s = u @ weight @ v
    expected = g / s - np.outer(u, v) * (g * weight).sum() / s**2

    def value(variables):
        answers = conv.apply(variables, jnp.eye(5)[None]) - variables["params"]["bias"]
        return (g * answers[0].T).sum()

    grads = jax.grad(value)(variables)
    np.testing.assert_allclose(grads["params"]["kernel"][0].T, expected, rtol=1e-4, atol=1e-5)
    assert not grads["spectral"]["u"].any() and not grads["spectral"]["v"].any()


def test_vectors_move_only_where_they_may():
    images = jnp.asarray(draw(2, 4, 8, 8, 3))
    variables = init(SMALL, images)
    kernels = [p for p in paths(variables["params"]) if p.endswith("kernel")]
    vectors = {p.replace("kernel", name) for p in kernels for name in "uv"}
    assert vectors == set(paths(variables["spectral"]))
    assert len(kernels) == 1 + 1 + 3  # patches, the 3x3 block, three of the head
    logits, updated = jax.jit(lambda v: SMALL.apply(v, images, mutable=["spectral"]))(variables)
    assert logits.shape == (4, 4)
    assert set(updated) == {"spectral"}
    moved = jax.tree.map(
        lambda a, b: float(abs(a - b).max()), updated["spectral"], variables["spectral"]
    )
    moved = {p: value for p, value in paths(moved).items() if "logit" not in p}  # one row: done
    assert min(moved.values()) > 0 and max(moved.values()) < 0.5


# The heads.


def slow_head(x, params, vectors, size: int):
    """One head in NumPy: a circular convolution is a sum of rolled inputs times matrices."""

    def conv(x, part):
        weights, uv = params, vectors
        for name in part:
            weights, uv = weights[name], uv[name]
        kernel = np.asarray(weights["kernel"], np.float64)
        matrix = kernel.transpose(2, 1, 0).reshape(kernel.shape[2], -1)
        half = len(kernel) // 2
        rolled = [np.roll(x, half - k, axis=1) @ kernel[k] for k in range(len(kernel))]
        return sum(rolled) / (uv["u"] @ matrix @ uv["v"]) + weights["bias"]

    def block(x, name):
        x = conv(x, (name, "conv"))
        x = (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-6)
        x = x * params[name]["norm"]["scale"] + params[name]["norm"]["bias"]
        return np.where(x > 0, x, 0.2 * x)

    assert params["residual"]["conv"]["kernel"].shape[0] == size
    x = block(x, "block")
    x = (x + block(x, "residual")) / np.sqrt(2)
    return conv(x, ("logit",))[..., 0]


@pytest.mark.slow
def test_heads_against_a_slow_reference():
    features = [jnp.asarray(draw(3, 2, 12, 4)), jnp.asarray(draw(4, 2, 9, 6))]
    heads = DiscriminatorHeads()
    variables = drawn(heads, features)
    found, updated = jax.jit(lambda v: heads.apply(v, features, mutable=["spectral"]))(variables)
    expected = [
        slow_head(
            np.asarray(x, np.float64), variables["params"][name], updated["spectral"][name], 9
        )
        for x, name in zip(features, ("head0", "head1"))
    ]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.concatenate(expected, 1), rtol=1e-4, atol=1e-5)


def test_the_published_heads():
    features = [jax.ShapeDtypeStruct((2, 196, 384), jnp.bfloat16)] * 5
    heads = DiscriminatorHeads(dtype=jnp.bfloat16)
    logits, variables = jax.eval_shape(lambda x: heads.init_with_output(KEY, x), features)
    assert (logits.shape, logits.dtype) == ((2, 5 * 196), jnp.float32)
    width = 384
    one = (width**2 + 3 * width) + (9 * width**2 + 3 * width) + (width + 1)
    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert count == 5 * one


def test_batch_norm_by_hand():
    x = jnp.array([[[1.0, 10.0], [3.0, 10.0]], [[5.0, 10.0], [7.0, 10.0]]])
    y = BatchNorm().apply({"params": {"scale": jnp.ones(2), "bias": jnp.zeros(2)}}, x)
    # Mean 4, variance 5; a channel without variance gives zeros.
    np.testing.assert_allclose(y[..., 0].ravel(), np.array([-3, -1, 1, 3]) / 5**0.5, rtol=1e-5)
    assert not y[..., 1].any()


def test_patches_must_fit():
    features = SmallFeatures()
    with pytest.raises(UserError, match="input of 30 x 32 is not a multiple"):
        features.init(KEY, jnp.zeros((1, 30, 32, 3)))


def test_images_get_a_gradient():
    images = jnp.asarray(draw(6, 4, 8, 8, 3))
    variables = drawn(SMALL, images)
    variables |= jax.jit(lambda v: SMALL.apply(v, images, mutable=["spectral"])[1])(variables)
    value = lambda images: losses.adversarial_loss(
        SMALL.apply(variables, diffaug.augment(images, KEY))
    )
    grads = jax.jit(jax.grad(value))(images)
    assert np.isfinite(grads).all() and (abs(grads).max((1, 2, 3)) > 0).all()


# DiffAug.


def test_pure_translation():
    """Every result is the image moved over a black ground, by up to two pixels of sixteen."""
    image = draw(7, 16, 16, 3)
    ground = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    shifted = {
        (y, x): ground[2 - y : 18 - y, 2 - x : 18 - x] for y in range(-2, 3) for x in range(-2, 3)
    }
    images = jnp.broadcast_to(image, (400, *image.shape))
    seen = {
        next(shift for shift, one in shifted.items() if np.array_equal(one, result))
        for result in np.asarray(jax.jit(diffaug.translate)(images, KEY))
    }
    assert seen == set(shifted)
    np.testing.assert_array_equal(diffaug.translate(images, KEY, ratio=0.0), images)


def test_pure_cutout():
    """The cut is 4 x 6 of 20 x 30, or the part of that which is in the image."""
    cut = np.asarray(jax.jit(diffaug.cutout)(jnp.ones((500, 20, 30, 3)), KEY)) == 0
    corners = {"y": set(), "x": set()}
    for one in cut:
        rows, columns = one.any((1, 2)).nonzero()[0], one.any((0, 2)).nonzero()[0]
        np.testing.assert_array_equal(one[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
        assert one.sum() == 3 * len(rows) * len(columns)
        for name, found, full, size in (("y", rows, 20, 4), ("x", columns, 30, 6)):
            clipped = found[0] == 0 or found[-1] == full - 1
            assert len(found) == size or (clipped and size // 2 <= len(found) < size)
            corners[name].add(int(found[0]))
    assert corners["y"] == set(range(19)) and corners["x"] == set(range(28))

    images = jnp.asarray(draw(8, 4, 20, 30, 3))
    result = np.asarray(jax.jit(diffaug.cutout)(images, KEY))
    assert ((result == images) | (result == 0)).all()
    np.testing.assert_array_equal(diffaug.cutout(images, KEY, ratio=0.0), images)


def test_color():
    """The pixels (0, 0, 0.6) and (1, 1, 1) show the three changes apart.

    Their channel means are 0.2 and 1, their common mean 0.6. Brightness b moves that to 0.6 + b;
    contrast c makes the distance of the channel means 0.8 c; saturation s and c the distance of
    blue and red in the first pixel 0.6 s c.
    """
    pixels = jnp.broadcast_to(jnp.array([[[0.0, 0.0, 0.6], [1.0, 1.0, 1.0]]]), (300, 1, 2, 3))
    result = np.asarray(jax.jit(diffaug.color)(pixels, KEY), np.float64)[:, 0]
    gray = result.mean(-1)
    brightness = result.mean((1, 2)) - 0.6
    contrast = (gray[:, 1] - gray[:, 0]) / 0.8
    saturation = (result[:, 0, 2] - result[:, 0, 0]) / 0.6 / contrast
    for values, low, high in (
        (brightness, -0.5, 0.5),
        (saturation, 0.0, 2.0),
        (contrast, 0.5, 1.5),
    ):
        assert low - 1e-5 <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high + 1e-5
    for a, b in ((brightness, contrast), (brightness, saturation), (saturation, contrast)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.2  # one draw each
    np.testing.assert_allclose(result[:, 0, 0], result[:, 0, 1], atol=1e-5)
    np.testing.assert_allclose(result[:, 1] - gray[:, 1:], 0, atol=1e-5)


def test_augmentation_applies_all_three_to_every_image():
    """On ones: the cut is zero, the shifted-in edge and the rest are two other colors."""
    result = np.asarray(jax.jit(diffaug.augment)(jnp.ones((50, 16, 16, 3)), KEY))
    assert all((one == 0).all(-1).sum() >= 1 for one in result)
    assert len({tuple(np.unique(one)) for one in result}) == 50
    assert {len(np.unique(one.round(4))) for one in result} <= {2, 3}


# The way to the discriminator's input size.


def test_crop_or_area_resize():
    """Half the size: a crop is a window of the image, an area resize the means of 2 x 2 blocks.

    A batch is cropped or resized as a whole; every image has its own window.
    """
    image = draw(9, 8, 8, 3)
    blocks = image.reshape(4, 2, 4, 2, 3).mean((1, 3))
    windows = {(y, x): image[y : y + 4, x : x + 4] for y in range(5) for x in range(5)}
    images = jnp.broadcast_to(image, (6, 8, 8, 3))
    prepare = jax.jit(jax.vmap(lambda key: diffaug.discriminator_input(images, key, 4)))
    crops, resized = [], 0
    for batch in np.asarray(prepare(jax.random.split(KEY, 100))):
        means = [np.allclose(result, blocks, atol=1e-6) for result in batch]
        if any(means):
            assert all(means)
            resized += 1
            continue
        found = [next(k for k, one in windows.items() if np.array_equal(one, x)) for x in batch]
        assert len(set(found)) > 1
        crops += found
    assert set(crops) == set(windows)
    assert 35 < resized < 65


def test_area_resize_of_unlike_sizes():
    """Eight to seven pixels: adaptive pooling means two neighbors for each."""
    expected = [[0.5 if i in (j, j + 1) else 0.0 for i in range(8)] for j in range(7)]
    np.testing.assert_array_equal(diffaug.area_matrix(8, 7), expected)
    # Five to three: from 0, 5/3, 10/3 rounded down to 5/3, 10/3, 5 rounded up.
    third = [[1 / 2, 1 / 2, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 1 / 2, 1 / 2]]
    np.testing.assert_allclose(diffaug.area_matrix(5, 3), third, rtol=1e-6)


def test_input_sizes():
    fitting, large, small = (jnp.zeros((2, *size, 3)) for size in ((4, 4), (6, 9), (3, 8)))
    assert diffaug.discriminator_input(fitting, KEY, 4) is fitting
    assert diffaug.discriminator_input(large, KEY, 4).shape == (2, 4, 4, 3)
    with pytest.raises(UserError, match="is 4 x 4 and cannot be cut from images of 3 x 8"):
        diffaug.discriminator_input(small, KEY, 4)
