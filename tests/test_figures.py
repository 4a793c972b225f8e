"""The paper's figures of a tiny model: what stands where."""

import jax
import numpy as np
import pytest
from helpers import forked

from nvg_jax.jobs import figures, sampling_runs
from nvg_jax.visualize import GAP, structure_colors, to_uint8

TILE = 64 + GAP  # images of 8 x 8 pixels are enlarged eight times


def tile(picture, rows, columns, row, column):
    """A tile of a labeled grid, as 8 x 8 pixels."""
    grid = picture[-(rows * TILE - GAP) :, -(columns * TILE - GAP) :]
    return grid[row * TILE : row * TILE + 64 : 8, column * TILE : column * TILE + 64 : 8]


def test_a_model_says_what_it_is(pipe):
    lines = [line.strip() for line in repr(pipe).splitlines()]
    assert lines[:2] == ["Pipeline", "images: 8 x 8 pixels, latents 4 x 4 in 5 stages, 16 codes"]
    assert lines[2] == "parameters: tokenizer 209,771, content 34,548, structure 37,636"
    assert lines[3] == "classes: 10 (0, 1, 2, 3, 4 and 5 more)"
    assert lines[4].startswith("settings: Settings(") and "flow_steps=2" in lines[4]
    assert lines[5] == f"computes in float32 on {jax.local_device_count()} x cpu"


@pytest.mark.slow
def test_canvases_stand_above_their_maps(pipe):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    sequence = pipe.encode(images)
    picture = sampling_runs.stages_picture(pipe, sequence, ["a", "b"])
    restored = to_uint8(pipe.decode(sequence))
    for image in range(2):
        last = tile(picture, 4, 5, 2 * image, 4)
        np.testing.assert_allclose(last.astype(int), restored[image].astype(int), atol=1)
        for stage in range(5):
            colors = structure_colors(sequence.structure[image, stage].reshape(4, 4), stage)
            shown = tile(picture, 4, 5, 2 * image + 1, stage)
            np.testing.assert_array_equal(shown, colors.repeat(2, axis=0).repeat(2, axis=1))


def test_a_sample_is_its_two_halves(pipe):
    picture = figures.binary(pipe, [3, 5], columns=1, seed=0)
    for row in range(2):
        sample, structure, one, other = (tile(picture, 2, 4, row, column) for column in range(4))
        first = (structure == structure_colors(0, 1)).all(-1)
        assert first.sum() == 32
        np.testing.assert_array_equal(one[first], sample[first])
        np.testing.assert_array_equal(other[~first], sample[~first])
        assert (one[~first] >= 191).all() and (other[first] >= 191).all()  # faded


@pytest.mark.slow
def test_samples_of_other_classes_keep_the_structure(pipe):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    picture = figures.reuse(pipe, images, ["a", "b"], [3, 5, 3], seed=0)
    sequence = pipe.encode(images)
    restored = to_uint8(pipe.decode(sequence))
    for row in range(2):
        shown = [tile(picture, 2, 5, row, column) for column in range(5)]
        np.testing.assert_array_equal(shown[0], to_uint8(images)[row])
        np.testing.assert_allclose(shown[1].astype(int), restored[row].astype(int), atol=1)
        for column, label in enumerate((3, 5, 3)):
            own = jax.tree.map(lambda x: x[row : row + 1], sequence)
            kept = dict(prefix=own, structure_stages=5, first_index=3 * row + column)
            alone = to_uint8(pipe.sample([label], **kept).images)[0]
            np.testing.assert_allclose(shown[2 + column].astype(int), alone.astype(int), atol=1)


def test_an_unknown_figure_gets_the_known_ones(tmp_path):
    def run(*args):
        command = ["-m", "nvg_jax.figures", "--workdir=fashion_mnist", f"--out={tmp_path}"]
        return forked(*command, *args)

    unknown = run("--figures=sequence,map")
    assert unknown.returncode == 2
    assert "--figures takes sequence, binary, drawings, stages, reuse; got map" in unknown.stderr
    unused = run("--figures=binary", "--image=cat.png")
    assert unused.returncode == 2 and "--image is shown by the figures seq" in unused.stderr
    missing = run("--figures=reuse")
    assert missing.returncode == 2 and "takes its structures from --image" in missing.stderr
