"""Keeping parts of an image: regions, drawings, what is pasted back, and the command."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import forked, is_even_hierarchy, random_pipeline
from PIL import Image

from nvg_jax import granularity
from nvg_jax.data import Transform
from nvg_jax.errors import UserError
from nvg_jax.jobs import editing, sampling_runs
from nvg_jax.metadata import RunMetadata
from nvg_jax.sampling import control
from nvg_jax.structure import flow
from nvg_jax.visualize import to_uint8

SIZE = (4, 4)  # the tiny model's latent; its images have 8 x 8 pixels


@pytest.fixture(scope="module")
def reference(pipe):
    return np.random.default_rng(3).integers(0, 256, (6, 8, 8, 3), np.uint8)


# Regions.


def split_by_hand(labels, scores, stage, kept):
    """The rule of a split with fixed positions, position by position."""
    out = np.full(len(labels), -1)
    for cluster in range(2**stage):
        members = np.flatnonzero(labels == cluster)
        out[members[kept[members] >= 0]] = kept[members[kept[members] >= 0]]
        free = sorted(members[kept[members] < 0], key=lambda i: -scores[i])
        places = len(members) // 2 - (out[members] == 1).sum()
        for rank, position in enumerate(free):
            out[position] = rank < places
    return 2 * labels + out


def test_a_split_with_kept_positions():
    rng = np.random.default_rng(0)
    split = jax.jit(granularity.split)
    for _ in range(50):
        stage = int(rng.integers(0, 3))
        labels = rng.permutation(np.arange(16) // (16 >> stage))
        reference = np.asarray(split(labels, rng.normal(size=16), stage))
        outside = rng.random(16) < rng.random()
        kept = np.where(outside, reference % 2, -1)
        scores = rng.normal(size=16)
        found = split(labels, scores, stage, kept=kept)
        np.testing.assert_array_equal(found, split_by_hand(labels, scores, stage, kept))
        drawn = split(labels, scores, stage, key=jax.random.key(1), kept=kept)
        assert (np.asarray(drawn)[outside] == reference[outside]).all()
        assert (np.bincount(drawn, minlength=2 << stage) == 16 >> stage + 1).all()


def test_kept_positions_follow_the_path_to_their_target():
    """Straight from the noise to the target, but for the known channels, which stay known."""
    rng = np.random.default_rng(1)
    noise, target, known = rng.normal(size=(3, 1, 4, 3)).astype(np.float32)
    known[..., :1] = target[..., :1]
    noise, target, known = map(jnp.asarray, (noise, target, known))
    kept, seen = jnp.array([[True, False, True, False]]), []
    times = jnp.array([1.0, 0.6, 0.0])

    def velocity(z, time):
        seen.append(np.asarray(z))
        return jnp.ones_like(z)

    with jax.disable_jit():
        end = flow.solve(velocity, noise, known, 1, times, (kept, target))
    for z, time in zip([*seen, np.asarray(end)], times):
        line = time * noise + (1 - time) * target
        np.testing.assert_allclose(z[0, ::2, 1:], line[0, ::2, 1:], atol=1e-6)
        np.testing.assert_array_equal(z[..., :1], target[..., :1])
    np.testing.assert_allclose(end[0, 1::2, 1:], (noise - 1)[0, 1::2, 1:], atol=1e-6)


# One solution for several splits, drawn at random, with everything else that a flow can have.
ONE_SOLUTION = dict(
    gumbel=True, structure_solves=(0,), solver="heun", structure_guidance=(1.0, 2.0)
)


@pytest.mark.slow
@pytest.mark.parametrize("start, settings", [(0, {}), (2, ONE_SOLUTION)])
def test_outside_a_region_all_maps_and_tokens_are_the_reference(pipe, reference, start, settings):
    sequence = pipe.encode(reference)
    region = np.random.default_rng(start).random((6, 16)) < 0.5
    region[0], region[1] = False, True  # nothing and everything
    region[5] = np.arange(16) % 4 < 2
    out = pipe.sample(
        [5] * 6, seed=1, prefix=sequence, structure_stages=start, token_stages=start, region=region,
        **settings,
    ).sequence  # fmt: skip
    assert is_even_hierarchy(out.structure).all()
    for found, kept in zip(out, sequence):
        outside = np.broadcast_to(~region[:, None], found.shape)
        np.testing.assert_array_equal(found[outside], kept[outside])
        np.testing.assert_array_equal(found[:, :start], kept[:, :start])
        np.testing.assert_array_equal(found[0], kept[0])
    granularity.check_tokens(out.structure, out.tokens, pipe.tokenizer.config.codebook_size)
    for stage in range(start, 5):  # a cluster with any position outside keeps its token
        for image in range(6):
            labels = out.structure[image, stage]
            for label in set(labels[~region[image]]):
                outside = np.flatnonzero((labels == label) & ~region[image])[0]
                kept = sequence.tokens[image, stage, outside]
                assert (out.tokens[image, stage, labels == label] == kept).all()
    assert (out.structure[1:] != sequence.structure[1:]).any((1, 2)).all()  # something is new
    assert (out.tokens[1:] != sequence.tokens[1:]).any((1, 2)).all()
    # The smoothing of a stage reaches one position: further outside, canvases are the reference's.
    near = np.pad(region.reshape(6, 4, 4), ((0, 0), (1, 1), (1, 1)))
    near = np.lib.stride_tricks.sliding_window_view(near, (3, 3), (1, 2)).any((-1, -2))
    canvases = pipe.canvases(out) - pipe.canvases(sequence)
    far = ~near.reshape(6, 1, 16, 1)
    np.testing.assert_array_equal(np.where(far, canvases, 0), 0)
    assert far[5].any() and np.where(far, 0, canvases)[1:].any((1, 2, 3)).all()


@pytest.mark.slow
def test_a_region_of_everything_is_sampling_with_a_prefix(pipe, reference):
    sequence = pipe.encode(reference[:2])
    given = dict(seed=2, prefix=sequence, structure_stages=2, token_stages=2)
    free, region = pipe.sample([1, 2], **given), np.ones((2, 16), bool)
    limited = pipe.sample([1, 2], region=region, **given)
    jax.tree.map(np.testing.assert_array_equal, limited.sequence, free.sequence)


def test_a_mask_over_pixels_takes_every_patch_it_touches():
    mask = np.zeros((8, 16), bool)
    mask[1, 3] = mask[7, 8] = True
    found = control.region_of_mask(mask, (4, 4)).reshape(4, 4)
    assert sorted(map(tuple, np.argwhere(found))) == [(0, 0), (3, 2)]
    for wrong, message in (
        (np.zeros((8, 8), bool), "covers nothing"),
        (np.ones((8, 8), bool), "touches every patch"),
        (np.ones((9, 8), bool), "multiples of 4 and 4"),
        (np.ones((8, 8)), "must be bool"),
    ):
        with pytest.raises(UserError, match=message):
            control.region_of_mask(wrong, (4, 4))


# Drawings.


def hierarchy(drawing, size=SIZE):
    structure, stages = control.structure_of_drawing(np.asarray(drawing), size)
    assert is_even_hierarchy(structure)
    return structure.reshape(-1, *size), stages


def test_two_equal_regions_are_the_first_map():
    drawing = np.array([[7, 7, 9, 9], [7, 9, 9, 7], [9, 9, 7, 7], [9, 7, 7, 9]])
    structure, stages = hierarchy(drawing)
    assert stages == 2
    np.testing.assert_array_equal(structure[1], drawing == 9)


def test_the_nearest_positions_go_with_a_small_region():
    drawing = np.zeros((4, 4), int)
    drawing[:2, 0] = 1
    structure, _ = hierarchy(drawing)
    small = structure[1] == 1
    assert small[:2, 0].all()
    distance = np.hypot(*np.meshgrid([0, 0, 1, 2], [0, 1, 2, 3]))  # from the two positions
    assert distance[small].max() <= distance[~small].min()


def test_four_quarters_and_three_regions():
    rows, columns = np.mgrid[:8, :8] // 4
    structure, stages = hierarchy(2 * rows + columns)  # two pixels a position
    assert stages == 3
    np.testing.assert_array_equal(structure[2], np.kron([[0, 1], [2, 3]], np.ones((2, 2))))
    half = np.where(columns == 0, 0, 1 + rows)  # the left half, two quarters on the right
    structure, stages = hierarchy(half)
    assert stages == 3
    np.testing.assert_array_equal(structure[1], np.kron([[0, 1]], np.ones((4, 2))))
    np.testing.assert_array_equal(structure[2][:, 2:], np.kron([[2], [3]], np.ones((2, 2))))


def test_the_halves_of_quarters_are_adjacent_whatever_their_colors():
    for colors in itertools.permutations(range(4)):
        structure, _ = hierarchy(np.kron(np.reshape(colors, (2, 2)), np.ones((2, 2), int)))
        first = structure[1, ::3, ::3]  # the corners
        assert (first[0] == first[1]).all() or (first[:, 0] == first[:, 1]).all(), colors


def test_of_four_rings_the_inner_two_are_a_half():
    drawing = control.ready_made("rings", 64)
    structure, _ = hierarchy(drawing, (16, 16))
    inner = control.regions_of_positions(drawing, (16, 16)).reshape(16, 16) < 2
    assert (structure[1] == ~inner).mean() > 0.95 and structure[1, 8, 8] == 0


@pytest.mark.parametrize("per_stripe", [1, 4])
def test_the_halves_of_many_regions_are_left_and_right(per_stripe):
    """Whatever their colors: sixteen stripes, or 64 regions of one position each."""
    colors = np.random.default_rng(0).permutation(16 * per_stripe).reshape(per_stripe, 16)
    first = hierarchy(colors.repeat(4 // per_stripe, axis=0), (4, 16))[0][1]
    assert (first[:, :8] == first[0, 0]).all() and (first[:, 8:] == 1 - first[0, 0]).all()


def test_any_drawing_gives_an_even_hierarchy():
    rng = np.random.default_rng(0)
    for _ in range(30):
        drawing = rng.integers(0, rng.integers(2, 9), (16, 8))
        _, stages = hierarchy(drawing, (8, 4))
        regions = len(np.unique(control.regions_of_positions(drawing, (8, 4))))
        assert 2 ** (stages - 2) < regions <= 2 ** (stages - 1)


@pytest.mark.parametrize("name", control.DRAWINGS)
def test_ready_made_drawings_halve_the_image(name):
    drawing = control.ready_made(name, 64)
    structure, stages = hierarchy(drawing, (16, 16))
    if stages == 2:
        agree = structure[1] == control.regions_of_positions(drawing, (16, 16)).reshape(16, 16)
        assert agree.mean() > 0.93
    with pytest.raises(UserError, match="circle_left"):
        control.ready_made("cricle")
    with pytest.raises(UserError, match="size must be a whole number in 1 .* got 0"):
        control.ready_made(name, 0)


# Pixels and noise.


def test_pasting_keeps_far_pixels_and_all_of_the_mask():
    original, edited = np.zeros((2, 9, 9, 3), np.float32), np.ones((2, 9, 9, 3), np.float32)
    mask = np.zeros((9, 9), bool)
    mask[4, 4] = True
    found = control.paste(original, edited, mask, feather=2)
    np.testing.assert_allclose(found[0, 4, :, 0], [0, 0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0, 0])
    assert (control.paste(original, edited, mask, 0)[0, ..., 0] == mask).all()
    with pytest.raises(UserError, match=r"same size, got \(9, 9\), \(9, 9\) and \(8, 9\)"):
        control.paste(original, edited, mask[1:], 0)
    with pytest.raises(UserError, match="A mask must be bool .*got uint8"):
        control.paste(original, edited, np.uint8(255) * mask, 0)
    with pytest.raises(
        UserError, match="feather must be a whole number of pixels, 0 or more, got -1"
    ):
        control.paste(original, edited, mask, -1)
    with pytest.raises(UserError, match=r"as many originals .* \(4, 9, 9, 3\) and \(6, 9, 9, 3\)"):
        control.paste(original.repeat(2, 0), edited.repeat(3, 0), mask, 0)
    with pytest.raises(UserError, match=r"got float32 \(2, 9, 9, 3\) in \[255, 255\]"):
        control.paste(original, 255.0 * edited, mask, 0)
    with pytest.raises(UserError, match=r"images must be float .* in \[-1, 1\].* got uint8"):
        control.paste(original.astype(np.uint8), edited, mask, 0)


def test_noise_between_two_seeds_keeps_its_length():
    start, end = np.random.default_rng(0).normal(size=(2, 16, 4))
    np.testing.assert_allclose(control.between(start, end, 0), start)
    np.testing.assert_allclose(control.between(start, end, 1), end, atol=1e-12)
    middle = control.between(start, end, 0.5)
    lengths = sorted(map(np.linalg.norm, (start, end)))
    assert 0.98 * lengths[0] < np.linalg.norm(middle) < 1.02 * lengths[1]
    np.testing.assert_allclose(control.between(start, 2 * start, 0.5), 1.5 * start)
    both = control.between(
        np.stack([start, 9 * start]), np.stack([end, start]), 0.5
    )  # image by image
    np.testing.assert_allclose(both, [middle, 5 * start])
    single = start.astype(np.float32), end.astype(np.float32)
    found = control.between(*single, np.float64(0.5))
    assert found.dtype == np.float32 and (found == control.between(*single, 0.5)).all()
    with pytest.raises(UserError, match=r"same shape, got \(16, 4\) and \(16, 3\)"):
        control.between(start, end[:, 1:], 0.5)
    with pytest.raises(UserError, match="share must be a finite number, got nan"):
        control.between(start, end, np.nan)
    with pytest.raises(UserError, match="is zero everywhere"):
        control.between(np.stack([start, 0 * start]), np.stack([end, end]), 0.5)


# Files and the command.


@pytest.fixture(scope="module")
def files(tmp_path_factory, reference):
    """image.png and mask.png (the right half), smooth.png."""
    folder = tmp_path_factory.mktemp("files")
    Image.fromarray(reference[0]).save(folder / "image.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    smooth = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(np.stack([smooth] * 3, -1)).resize((64, 64)).save(folder / "smooth.png")
    return folder


@pytest.mark.slow
def test_a_job_keeps_what_is_given_and_pastes_the_rest(pipe, reference, files):
    given = editing.edit_region(pipe, files / "image.png", files / "mask.png", 1, feather=0)
    assert (given.region.reshape(4, 4) == [0, 0, 1, 1]).all()
    job = sampling_runs.SamplingJob(pipe, [3, 4], 2, 3, 0, {}, given)
    original = reference[0].astype(np.float32) / 127.5 - 1
    kept = pipe.encode(reference[:1])
    for batch in range(2):
        out = job.sample(batch)
        assert (to_uint8(out.images)[:, :, :4] == reference[0][None, :, :4]).all()
        assert (out.sequence.tokens[..., ~given.region] == kept.tokens[..., ~given.region]).all()
        assert np.abs(out.images[:, :, 4:] - original[:, 4:]).max() > 0.01
    other = editing.edit_region(pipe, files / "image.png", files / "mask.png", 1, feather=2)
    describe = lambda given: sampling_runs.SamplingJob(pipe, [3], 2, 3, 0, {}, given).describe()
    assert len({str(describe(g)["given"]) for g in (given, other)}) == 2
    assert describe(None)["given"] is None


@pytest.mark.slow
def test_maps_of_a_drawing_and_of_an_image_are_kept(pipe, files):
    given = editing.follow_drawing(pipe, "left_right")
    assert given.structure_stages == 2 and given.token_stages == 0
    out = sampling_runs.SamplingJob(pipe, [1], 2, 2, 0, {}, given).sample(0)
    assert (out.sequence.structure[:, 1].reshape(2, 4, 4) == [0, 0, 1, 1]).all()
    given = editing.follow_drawing(pipe, files / "mask.png")
    assert (given.sequence.structure[1].reshape(4, 4) == [0, 0, 1, 1]).all()
    given = editing.keep_stages(pipe, files / "image.png", 3, 2)
    out = sampling_runs.SamplingJob(pipe, [1], 2, 2, 0, {}, given).sample(0)
    for found, kept, stages in zip(out.sequence, given.sequence, (3, 2)):
        assert (found[:, :stages] == kept[:stages]).all()


def test_a_pipeline_inside_a_transformation_of_jax(pipe):
    images = np.zeros((1, 8, 8, 3), np.float32)
    canvas = np.zeros((1, 16, 4), np.float32)
    outside = pytest.raises(UserError, match="call it outside of jax.jit, jax.grad")
    calls = [(pipe.encode, images), (pipe.decode_canvas, canvas), (pipe.prepare, images[0])]
    for method, value in (*calls, (pipe.class_ids, np.arange(2))):
        with outside:
            jax.jit(method)(value)
    constant = lambda x: pipe.decode_canvas(canvas).sum() * x
    for transform, argument in ((jax.jit, 1.0), (jax.grad, 1.0), (jax.vmap, np.ones(2))):
        with outside:
            transform(constant)(argument)


def test_what_a_pipeline_returns_can_be_changed_in_place(pipe):
    images = np.linspace(-1, 1, 2 * 8 * 8 * 3, dtype=np.float32).reshape(2, 8, 8, 3)
    sequence = pipe.encode(images)
    tokens = sequence.tokens.copy()
    sequence.tokens[:, -1] = (tokens[:, -1] + 1) % 16
    assert (pipe.encode(images).tokens == tokens).all()  # nothing of the pipeline's own changed
    pipe.decode(sequence)[:] = 0
    pipe.structure_noise()[:] = 0
    pipe.sample([0]).images[:] = 0


@pytest.mark.slow
def test_samples_do_not_depend_on_what_a_notebook_has_set(pipe):
    """Its options of JAX and its mesh; seeds and counts of any kind of integer."""
    images = np.linspace(-1, 1, 2 * 8 * 8 * 3, dtype=np.float32).reshape(2, 8, 8, 3)

    def results(seed=3, count=2):
        out = pipe.sample([1, 2], seed=seed, gumbel=True)
        return jax.tree.leaves((out, pipe.structure_noise(seed, count), pipe.encode(images)))

    def check(**arguments):
        for ours, theirs in zip(results(**arguments), wanted, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)

    wanted = results()
    check(seed=jnp.array(3), count=np.int8(2))
    with jax.set_mesh(jax.make_mesh((1,), ("x",))):
        check()
    with (
        jax.enable_x64(True),
        jax.default_prng_impl("rbg"),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        check()
    jax.config.update("jax_random_seed_offset", 1)
    try:
        check()
    finally:
        jax.config.update("jax_random_seed_offset", 0)


@pytest.mark.slow
def test_a_walk_begins_and_ends_at_the_structure_of_a_seed(pipe):
    job = sampling_runs.SamplingJob(pipe, [1, 2], 3, 4, 5, {}, walk_to=9)
    parts = [job.sample(batch) for batch in range(2)]
    walk = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    free = pipe.sample([2], seed=5, first_index=3)
    end = pipe.sample([2], 5, pipe.structure_noise(9, first_index=3), first_index=3)
    for index, expected in ((3, free), (5, end)):
        for found, exact in zip(walk.sequence, expected.sequence):
            np.testing.assert_array_equal(found[index], exact[0])
    assert (walk.sequence.structure[3] != walk.sequence.structure[5]).any()
    assert job.describe() != sampling_runs.SamplingJob(pipe, [1, 2], 3, 4, 5, {}).describe()


def test_what_is_transparent_in_a_mask_is_not_white(pipe, files, tmp_path):
    painted = np.full((8, 8, 4), 255, np.uint8)
    painted[:, :4, 3] = 0
    Image.fromarray(painted).save(tmp_path / "mask.png")
    given = editing.edit_region(pipe, files / "image.png", tmp_path / "mask.png", 0, None)
    assert (given.region.reshape(4, 4) == [0, 0, 1, 1]).all()


def test_what_a_mask_marks_beside_the_crop_is_not_nothing(pipe, tmp_path):
    pixels = np.zeros((8, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    pixels[:, :4] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="sees the middle of the picture, in 8 x 8"):
        editing.edit_region(pipe, tmp_path / "image.png", tmp_path / "mask.png", 0, None)


@pytest.mark.parametrize("brightest", [1, 127])
def test_a_mask_without_white_says_so(pipe, files, tmp_path, brightest):
    Image.new("L", (8, 8), brightest).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=f"no white: its brightest pixel is {brightest} of 255"):
        editing.edit_region(pipe, files / "image.png", tmp_path / "mask.png", 0, None)


def test_a_photo_is_a_drawing_of_many_regions():
    """Its memory does not grow with the number of its colors."""
    colors = np.arange(512 * 512).reshape(512, 512)
    colors[::2] = 0  # half of the pixels of every position
    colors[256:] += 10**6
    structure, stages = control.structure_of_drawing(colors, (4, 4))
    assert stages == 2
    np.testing.assert_array_equal(structure[1], np.repeat([0, 1], 8))


def test_a_ready_made_drawing_has_the_shape_of_the_images():
    wide = editing.ready_made("left_right", (8, 64))
    assert wide.shape == (8, 64) and wide.dtype == np.int32
    assert len(np.unique(wide[:, :32])) == len(np.unique(wide[:, 32:])) == 1
    assert wide[0, 0] != wide[0, -1]


@pytest.mark.parametrize("filter", ["lanczos", "published"])
def test_a_thin_stroke_of_a_large_mask_marks_what_it_touches(pipe, filter, monkeypatch):
    large = random_pipeline()  # of 8 x 8 pixels; the middle of 9
    monkeypatch.setattr(RunMetadata, "transform", Transform((8, 8), 9, 0, filter))
    mask = np.zeros((900, 1800), bool)
    mask[512, 701:703] = True  # in row 5 of 9, and columns 7 of 18, of which 5 to 12 are seen
    rows, columns = np.nonzero(editing.model_mask(large, mask))
    assert (rows.tolist(), columns.tolist()) == ([5], [2])


def test_wrong_use_ends_in_a_sentence(pipe, files):
    image, mask = files / "image.png", files / "mask.png"
    for call, message in (
        (lambda: editing.edit_region(pipe, image, None, 0, None), "--edit needs --mask"),
        (lambda: editing.edit_region(pipe, files / "no.png", mask, 0, None), "no file .*no.png"),
        (lambda: editing.edit_region(pipe, image, files / "smooth.png", 0, None), "64 x 64 pixels"),
        (lambda: editing.edit_region(pipe, image, mask, 5, None), "--edit_from must be .* 0 .. 4"),
        (lambda: editing.keep_stages(pipe, image, 6, 0), "--structure_stages must be .* 1 .. 5"),
        (lambda: editing.keep_stages(pipe, image, 2, 3), "--token_stages must be .* 0 .. 2"),
        (lambda: editing.follow_drawing(pipe, "cricle"), "one of circle_left"),
        (lambda: editing.follow_drawing(pipe, __file__), "test_control.py is"),
        (lambda: pipe.sample([1], region=np.ones(16, bool)), "need a `prefix`"),
        (lambda: pipe.sample([1], structure_stages=np.ones(2)), "structure_stages must be a whole"),
        (lambda: setattr(pipe, "params", {}), "This tree has no tokenizer"),
        (lambda: pipe.sample([1], region=np.ones(15, bool)), r"bool of shape \(16,\)"),
        (lambda: pipe.sample([1], region=np.ones(16)), "got float64"),
        (lambda: pipe.sample([1], region=[[True], [False, True]]), r"region must be .* got object"),
        (lambda: pipe.encode([np.zeros((8, 8, 3)), np.zeros((9, 8, 3))]), "makes a picture of any"),
        (lambda: pipe.prepare([[1, 2], [3]]), "An image to prepare must be"),
        (lambda: pipe.prepare(Image.new("RGB", (0, 5))), "has no pixels"),
        (lambda: pipe.sample([1], content_guidance=1e39), "content_guidance takes finite numbers"),
        (lambda: pipe.sample([1], flow_steps=2**40), "flow_steps must be a whole number from 1 to"),
        (lambda: sampling_runs.SamplingJob(pipe, [1], 2, 2, -1, {}), "seed must be .*, got -1"),
        (lambda: sampling_runs.SamplingJob(pipe, [1], 1, 1, 0, {}, walk_to=3), "walk needs two"),
        (lambda: sampling_runs.SamplingJob(pipe, [1], 2, 2, 0, {}, walk_to=-3), "walk_to must be"),
        (
            lambda: sampling_runs.write_pictures(
                sampling_runs.SamplingJob(pipe, [1], 2, 2, 0, {}), image, 2
            ),
            "image.png is a file, so it cannot be a folder",
        ),
    ):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.slow
def test_the_command_edits_an_image(pipe, files, tmp_path):
    pipe.save_pretrained(tmp_path / "model")

    def sample(*args):
        command = ["-m", "nvg_jax.sample", f"--workdir={tmp_path / 'model'}", "--per_class=2"]
        return forked(*command, "--classes=3", f"--out={tmp_path / 'out'}", *args)

    image, mask = files / "image.png", files / "mask.png"
    edit = sample(f"--edit={image}", f"--mask={mask}", "--edit_from=1", "--paste", "--feather=0")
    assert edit.returncode == 0, edit.stderr
    made = np.asarray(Image.open(tmp_path / "out" / "000001_3.png"), np.int32)
    assert (made[:, :4] == np.asarray(Image.open(image))[:, :4]).all()
    both = sample(f"--edit={image}", f"--mask={mask}", "--structure_map=rings")
    assert both.returncode == 2 and "only one of --structure_map, --edit" in both.stderr
    again = sample("--structure_map=left_right")  # in the same folder
    assert again.returncode == 2 and "samples made with other settings: given was" in again.stderr
    empty = sample(f"--edit={image}", "--mask=")
    assert empty.returncode == 2 and "--mask is empty: give a value" in empty.stderr
    alone = sample("--token_stages=2")
    assert alone.returncode == 2 and "--token_stages needs --structure_from" in alone.stderr
