"""FID while a model trains, by the default judge: Inception's input, and a small random network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import logged, tiny_config

from nvg_jax import Pipeline, pretrained
from nvg_jax.evaluation import frechet_distance
from nvg_jax.evaluation.judges import NetworkJudge
from nvg_jax.evaluation.sets import Split
from nvg_jax.pretrained import ImageFeatures
from nvg_jax.train import train
from nvg_jax.visualize import to_uint8

COUNT = 20
pytestmark = pytest.mark.slow


def small_network(params, images) -> ImageFeatures:
    """Means of 13 x 13 pixels, projected to eight features; takes what `inception` takes."""
    assert images.dtype == jnp.float32 and images.shape[1:] == (299, 299, 3)
    means = images.reshape(-1, 23, 13, 23, 13, 3).mean((2, 4)).reshape(len(images), -1)
    pool = jnp.tanh(means @ params["projection"])
    return ImageFeatures(pool, pool[:, :3], pool[:, :4])


@pytest.fixture
def network(monkeypatch, tmp_path):
    """Random weights, which are loaded as "inception"."""
    rng = np.random.default_rng(0)
    params = {"projection": rng.normal(scale=0.1, size=(23 * 23 * 3, 8)).astype(np.float32)}
    places = {("inception", cache): params for cache in ("", "given")}
    load = lambda name, cache: places[name, cache]
    monkeypatch.setattr(pretrained, "load", load)
    monkeypatch.setattr(pretrained, "inception", small_network)
    monkeypatch.setenv("NVG_CACHE", str(tmp_path / "cache"))
    return params


def test_every_part_is_measured_by_the_default_judge(network, tmp_path):
    real = np.random.default_rng(1).integers(0, 256, (30, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "real.npz", real)
    config = tiny_config()
    config.pretrained_dir = "given"
    config.evaluation.update(judge="inception", reference=str(tmp_path / "real.npz"))
    for recipe in ("tokenizer_training", "generator_training"):
        config[recipe].update(fid_every=12, fid_samples=COUNT)
    train(config, tmp_path / "run")

    held_out = next(Split(config.data, "test", (8, 8), COUNT).batches([0]))
    as_floats = held_out / np.float32(127.5) - 1
    for part, reference, prepare in (
        ("tokenizer", held_out, pretrained.antialiased_inception_input),
        ("generators", real, pretrained.tf1_inception_input),
    ):
        pipe = Pipeline.from_pretrained(tmp_path / "run" / f"best_{part}")
        if part == "tokenizer":
            images = pipe.reconstruct(as_floats)
        else:
            images = pipe.sample([i % 10 for i in range(COUNT)], seed=config.seed).images
        seen = (prepare(x) for x in (reference, to_uint8(images)))
        pools = [np.asarray(small_network(network, x).pool) for x in seen]
        expected = frechet_distance(*pools)
        assert expected > 0 and pipe.metadata.fid == pytest.approx(expected, rel=1e-3)
        fid = logged(tmp_path / "run" / part)["fid", 12]
        assert fid == pytest.approx(pipe.metadata.fid, rel=1e-6)


def test_both_inputs_see_the_same_pixels(network):
    """What is gray for one is gray for the other, whatever the range each works with."""
    gray = np.full((2, 299, 299, 3), 200, np.uint8)
    inputs = [jax.jit(prepare)(gray) for prepare in (
        pretrained.tf1_inception_input, pretrained.antialiased_inception_input)]  # fmt: skip
    np.testing.assert_allclose(inputs[0], (200 - 128) / 128, atol=1e-6)
    np.testing.assert_allclose(inputs[1], 200 / 127.5 - 1, atol=1e-6)
    with pytest.raises(TypeError, match="Expected uint8 images, got float32"):
        NetworkJudge("inception").image_features(gray.astype(np.float32))
