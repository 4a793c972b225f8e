"""A model whose maps halve the grid, for all images alike: it has no structure generator."""

import numpy as np
import pytest
from helpers import forked, random_pipeline, tiny_config
from test_end_to_end import weights

from nvg_jax import GranularitySequence, Pipeline, granularity
from nvg_jax.errors import UserError
from nvg_jax.jobs import conversion, editing, tuning
from nvg_jax.jobs.sampling_runs import SamplingJob
from nvg_jax.runtime.storage import fingerprint
from nvg_jax.train import train

GRID = {"structure": "grid"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A content generator that was trained for a few steps with a random tokenizer."""
    folder = tmp_path_factory.mktemp("grid")
    pipe = random_pipeline(structure="grid")
    trained = pipe.metadata.replace(fingerprint=fingerprint(pipe.params["tokenizer"]))
    Pipeline(trained, {"tokenizer": pipe.params["tokenizer"]}).save_pretrained(folder / "tokenizer")
    own = str(folder / "tokenizer")
    train(tiny_config(part="content", tokenizer=GRID, tokenizer_workdir=own), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def pipe(run):
    return Pipeline.from_pretrained(run)


@pytest.fixture(scope="module")
def expected():
    return granularity.grid_structure((4, 4))


@pytest.mark.slow
def test_every_image_and_every_sample_has_these_maps(pipe, expected, tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
    encoded, out = pipe.encode(images), pipe.sample([1, 2, 3], seed=0)
    for structure in (encoded.structure, out.sequence.structure):
        np.testing.assert_array_equal(structure, np.broadcast_to(expected, (3, 5, 16)))
    np.testing.assert_allclose(pipe.decode(out.sequence), out.images, atol=1e-5)
    assert len({token.tobytes() for token in out.sequence.tokens}) == 3
    pipe.save_pretrained(tmp_path / "export")
    again = Pipeline.from_pretrained(tmp_path / "export")
    np.testing.assert_array_equal(again.sample([1, 2, 3], seed=0).images, out.images)


@pytest.mark.slow
def test_no_structure_generator_is_trained_or_needed(run, pipe, tmp_path):
    assert set(weights(run / "content")["params"]) == {"content"}
    assert set(pipe.params) == {"tokenizer", "content"} and pipe.can_sample
    assert tuning.candidates(pipe) == []  # no evaluation could be saved
    with pytest.raises(UserError, match="structure=grid.: they cannot walk from"):
        SamplingJob(pipe, [1], 2, 2, 0, {}, walk_to=1)
    with pytest.raises(UserError, match="structure=grid, which the published layout does not know"):
        conversion.to_safetensors(run, tmp_path / "published")
    with pytest.raises(UserError, match="structure=grid needs no structure generator: train with"):
        train(tiny_config(part="all", tokenizer=GRID), run)
    with pytest.raises(UserError, match="must be latent or grid, got 'square'"):
        train(tiny_config(tokenizer={"structure": "square"}), run)
    own = str(run.parent / "tokenizer")
    with pytest.raises(UserError, match="other sizes than config.tokenizer"):
        train(tiny_config(part="content", tokenizer_workdir=own), run.parent / "other")


@pytest.mark.slow
def test_no_figure_of_drawings(run, tmp_path):
    command = ["-m", "nvg_jax.figures", f"--workdir={run}", f"--out={tmp_path}/figures"]
    done = forked(*command, "--figures=sequence,drawings")
    assert done.returncode == 2 and "cannot follow drawings (--figures)" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_tokens_are_kept_and_a_region_is_sampled(pipe):
    first = pipe.sample([1, 1], seed=0).sequence
    kept = pipe.sample([1, 1], seed=1, prefix=first, structure_stages=3, token_stages=3).sequence
    np.testing.assert_array_equal(kept.tokens[:, :3], first.tokens[:, :3])
    assert (kept.tokens[:, 3:] != first.tokens[:, 3:]).any()
    region = np.zeros(16, bool)
    region[:8] = True  # the upper half
    edited = pipe.sample([2, 2], seed=1, prefix=first, region=region).sequence
    np.testing.assert_array_equal(edited.structure, first.structure)
    np.testing.assert_array_equal(edited.tokens[:, 1:, 8:], first.tokens[:, 1:, 8:])
    assert (edited.tokens[:, 1:, :8] != first.tokens[:, 1:, :8]).any()
    other = GranularitySequence(first.structure[:, :, ::-1].copy(), first.tokens)
    with pytest.raises(UserError, match="structure=grid.: they cannot follow other maps"):
        pipe.sample([1, 1], prefix=other, structure_stages=2)
    with pytest.raises(UserError, match="they cannot follow a drawing"):
        editing.follow_drawing(pipe, "rings")
