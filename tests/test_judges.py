"""Judges on real held-out images, and metrics against values worked by hand."""

import ml_dtypes
import numpy as np
import pytest

from nvg_jax import evaluation
from nvg_jax.data import open_source
from nvg_jax.data.transforms import Transform, decode
from nvg_jax.errors import UserError
from nvg_jax.evaluation import judges
from nvg_jax.evaluation.image import to_float
from nvg_jax.evaluation.judges import DigitClassifier, area_resize, train_classifier


def flat(*values, size=(2, 3), dtype=np.float32):
    """One image of a single value for every number given."""
    values = np.asarray(values, dtype)
    return np.broadcast_to(values[:, None, None, None], (len(values), *size, 3))


# Metrics.


def test_psnr_of_constant_offsets():
    # Offsets 0.2 and 0.02 of a range of 2: a tenth and a hundredth, so 20 and 40 dB.
    images, restored = flat(0.5, -0.5, 1.0), flat(0.3, -0.48, 1.0)
    np.testing.assert_allclose(evaluation.psnr(images, restored)[:2], [20, 40], rtol=1e-5)
    assert evaluation.psnr(images, restored)[2] == np.inf
    # An offset of 51 of 255 is a fifth, whatever the type of image: 20 log10(5) dB.
    gray = flat(100, dtype=np.uint8)
    for other in (flat(151, dtype=np.uint8), flat(151 / 127.5 - 1)):
        np.testing.assert_allclose(evaluation.psnr(gray, other), 20 * np.log10(5), rtol=1e-5)


def test_psnr_is_of_each_image_not_of_the_batch():
    images = np.zeros((2, 4, 4, 3), np.float32)
    restored = images.copy()
    restored[1, 0, 0, 0] = 1  # one of 48 values is off by 1: 10 log10(4 * 48) dB
    np.testing.assert_allclose(evaluation.psnr(images, restored), [np.inf, 22.833012], rtol=1e-6)


def test_image_kinds():
    np.testing.assert_array_equal(to_float(flat(0, 255, dtype=np.uint8)), flat(-1, 1))
    half = to_float(flat(-0.5, 1, dtype=ml_dtypes.bfloat16))
    assert half.dtype == np.float32
    np.testing.assert_array_equal(half, flat(-0.5, 1))


@pytest.mark.parametrize(
    "images, message",
    [
        (flat(0, 255), "Clip a decoder's output"),
        (flat(np.nan), "from nan to nan"),
        (flat(0, dtype=np.int32), "uint8"),
        (flat(0)[0], "shape"),
        (flat(0)[..., :1], "shape"),
        (flat(0)[:0], "shape"),
    ],
)
def test_arrays_that_are_no_images(images, message):
    with pytest.raises(UserError, match=message):
        to_float(images)


def test_psnr_of_other_sizes():
    with pytest.raises(UserError, match="same shape"):
        evaluation.psnr(flat(0), flat(0, 0))


def with_moments(mean, covariance, count=40):
    """Points whose sample mean and unbiased covariance are exactly these."""
    points = np.random.default_rng(0).normal(size=(count, len(mean)))
    points -= points.mean(0)
    values, vectors = np.linalg.eigh(np.cov(points, rowvar=False))
    points = points @ vectors / np.sqrt(values)  # now the covariance is the identity
    values, vectors = np.linalg.eigh(np.asarray(covariance, float))
    return points * np.sqrt(values.clip(0)) @ vectors.T + mean


@pytest.mark.parametrize(
    "mean, covariance, expected",
    [
        ([0, 0], [[1, 0], [0, 9]], 0.0),  # itself
        ([3, 4], [[1, 0], [0, 9]], 25.0),  # moved by (3, 4)
        # Axes in common: the squared differences of the deviations, (1 - 2)^2 + (3 - 5)^2.
        ([0, 0], [[4, 0], [0, 25]], 5.0),
        # tr = 10 + 6.5 and |(S_a S_b)^1/2| = sqrt(tr(M) + 2 sqrt(det M)) with M = S_a S_b of
        # trace 1 * 2.5 + 9 * 4 = 38.5 and determinant 9 * (2.5 * 4 - 1.5^2) = 69.75.
        ([0, 0], [[2.5, 1.5], [1.5, 4]], 16.5 - 2 * np.sqrt(38.5 + 2 * np.sqrt(69.75))),
        # Singular: a line along the diagonal, of variance 2. tr(M) = 1 + 9, det M = 0.
        ([0, 0], [[1, 1], [1, 1]], 10 + 2 - 2 * np.sqrt(10)),
        ([1, 0], [[0, 0], [0, 0]], 1 + 10),  # a single point
    ],
)
def test_frechet_distance_of_known_gaussians(mean, covariance, expected):
    a, b = with_moments([0, 0], [[1, 0], [0, 9]]), with_moments(mean, covariance)
    assert evaluation.frechet_distance(a, b) == pytest.approx(expected, abs=1e-9)
    assert evaluation.frechet_distance(b, a) == pytest.approx(expected, abs=1e-9)


def test_frechet_distance_with_fewer_samples_than_features():
    # The covariances have rank 4 of 50. Moving all points moves nothing but the mean.
    a = np.random.default_rng(0).normal(size=(5, 50)).astype(np.float32)
    assert evaluation.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert evaluation.frechet_distance(a, a + np.float32(2)) == pytest.approx(50 * 4, rel=1e-6)


@pytest.mark.parametrize(
    "features, message",
    [
        (np.zeros((3, 5)), "same D"),
        (np.zeros((1, 4)), "at least two features, got 1"),
        (np.zeros(4), r"shape \(N, D\)"),
        (np.full((3, 4), np.nan), "finite"),
    ],
)
def test_features_that_cannot_be_compared(features, message):
    with pytest.raises(UserError, match=message):
        evaluation.frechet_distance(np.zeros((3, 4)), features)


def test_nearest_distances_of_three_points():
    references = flat(-1, 0, 1)
    distances = evaluation.nearest_distances(flat(-0.9, 0.25, 0.6, 1), references)
    np.testing.assert_allclose(distances, [0.1, 0.25, 0.4, 0], atol=1e-6)
    assert distances[3] == 0
    with pytest.raises(UserError, match="size"):
        evaluation.nearest_distances(flat(0), flat(0, size=(3, 2)))


def test_nearest_distances_against_all_pairs():
    rng = np.random.default_rng(0)
    queries, references = (rng.integers(0, 256, (n, 3, 5, 3), np.uint8) for n in (7, 300))
    difference = (queries[:, None].astype(float) - references[None]) / 127.5
    expected = np.sqrt((difference**2).mean((2, 3, 4))).min(1)
    np.testing.assert_allclose(
        evaluation.nearest_distances(queries, references), expected, rtol=1e-5
    )


def test_held_out_images_that_are_training_images_do_not_judge(caplog):
    """With them, copies would count as no nearer than what was not trained on."""
    train, held_out = flat(0), flat(*[0] * 20, *[0.05] * 80)
    found = evaluation.copying_report(flat(*[0.01] * 50), train, held_out)
    assert found["near_share"] == 1 and found["held_out_median"] == pytest.approx(0.05)
    assert "20 of 100 held-out images are also training images" in caplog.text


def test_copying_report():
    # 101 held-out images at distances 1e-7, 0.001 .. 0.1 from the only training image.
    train, held_out = flat(0), flat(1e-7, *np.arange(1, 101) / 1000)
    report = evaluation.copying_report(flat(*[0.06] * 96, *[0.001] * 4), train, held_out)
    assert report["held_out_median"] == pytest.approx(0.05)
    assert report["held_out_mean"] == pytest.approx(0.05)
    assert report["held_out_low_quantile"] == pytest.approx(0.005)
    assert report["samples_median"] == pytest.approx(0.06)
    assert report["samples_mean"] == pytest.approx(0.05764)
    assert report["near_share"] == pytest.approx(0.04)
    assert report["near_share_error"] == pytest.approx(np.sqrt(0.0475 * (1 / 100 + 1 / 101)))
    assert report["not_nearer"] is True
    # Some copies among distant samples, or all a little nearer: both are found out.
    copies = evaluation.copying_report(flat(*[0.06] * 90, *[0.001] * 10), train, held_out)
    assert copies["near_share"] == pytest.approx(0.1) and copies["not_nearer"] is False
    nearer = evaluation.copying_report(flat(*[0.04] * 100), train, held_out)
    assert nearer["near_share"] == 0 and nearer["not_nearer"] is False


def test_class_agreement():
    overall, per_class = evaluation.class_agreement([3, 3, 5, 0, 5], [3, 3, 3, 5, 5])
    assert overall == pytest.approx(3 / 5)
    assert per_class == {3: pytest.approx(2 / 3), 5: pytest.approx(1 / 2)}
    for predicted, asked in [([1], [1, 2]), ([], []), ([[1]], [[1]])]:
        with pytest.raises(UserError, match="same length"):
            evaluation.class_agreement(predicted, asked)


# Classifiers.


def test_area_resize_by_hand():
    image = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    halved = area_resize(image, 2)[0, ..., 0]
    np.testing.assert_allclose(halved, [[2.5, 4.5], [10.5, 12.5]])
    # Three pixels onto two: each new one is a whole pixel and half of the middle one.
    image = np.broadcast_to(np.float32([0, 3, 6])[:, None, None], (1, 3, 3, 1))
    np.testing.assert_allclose(area_resize(image, 2)[0, :, 0, 0], [1, 5], rtol=1e-6)
    doubled = area_resize(np.float32([[1, 2], [3, 4]])[None, ..., None], 4)[0, ..., 0]
    np.testing.assert_allclose(
        doubled, [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]], rtol=1e-6
    )


def digits(split, size):
    source, transform = open_source("digits", split), Transform((size, size), resize=size)
    items = [source[i] for i in range(len(source))]
    images = np.stack([transform(decode(item["image"])) for item in items])
    return images, np.array([item["label"] for item in items])


@pytest.mark.parametrize("size", [8, 16])
def test_digit_classifier_knows_held_out_digits(size):
    classifier = DigitClassifier(*digits("train", size))
    images, labels = digits("test", size)
    predicted = classifier.predict(images)
    assert (predicted == labels).mean() >= 0.98
    as_bytes = np.round((images + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(classifier.predict(as_bytes), predicted)


def test_digit_classifier_of_wrong_labels():
    with pytest.raises(UserError, match="0 to 9"):
        DigitClassifier(flat(0, 1), [9, 10])
    with pytest.raises(UserError, match="as many integer labels"):
        DigitClassifier(flat(0, 1), [9])


def bars(count, color):
    """Noisy images of 12 x 10 pixels; the class is where the bar is: left, middle or right."""
    rng = np.random.default_rng(count)
    labels = rng.integers(0, 3, count)
    images = np.broadcast_to(rng.normal(0, 0.2, (count, 12, 10, 1)), (count, 12, 10, 3)).copy()
    for image, label in zip(images, labels):
        image[:, 1 + 3 * label : 3 + 3 * label] += color
    return images.clip(-1, 1).astype(np.float32), labels


@pytest.mark.slow
def test_train_classifier_on_bars():
    classifier = train_classifier(*bars(200, color=0.7), num_classes=3, steps=30)
    assert classifier.gray
    images, labels = bars(1100, color=0.7)  # more than are predicted at once
    predicted = classifier.predict(images)
    assert (predicted == labels).mean() > 0.95
    found = classifier.image_features(images)
    logits = found.logits
    assert logits.shape == (1100, 3) and found.pool.shape == (1100, 64)
    assert found.spatial.shape == (1100, 7 * 16)
    np.testing.assert_array_equal(logits.argmax(-1), predicted)
    # The logits are a linear map of the features, so the features are the layer before.
    features = np.c_[found.pool, np.ones(1100)]
    solution = np.linalg.lstsq(features, logits, rcond=None)[0]
    np.testing.assert_allclose(features @ solution, logits, atol=1e-3)
    # A gray classifier sees the mean of the channels: opposite tints change nothing.
    tint = np.float32([0.1, -0.1, 0])
    dimmed = images * 0.8
    tinted, plain = (classifier.image_features(x).logits for x in (dimmed + tint, dimmed))
    np.testing.assert_allclose(tinted, plain, atol=1e-3)


@pytest.mark.slow
def test_train_classifier_sees_color_where_there_is_color():
    # Classes of equal brightness: more red than blue, or more blue than red.
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 100)
    tint = np.float32([0.3, 0, -0.3]) * (1 - 2 * labels[:, None])
    images = np.broadcast_to(tint[:, None, None], (100, 8, 8, 3)) + rng.normal(
        0, 0.1, (100, 8, 8, 1)
    )
    classifier = train_classifier(images, labels, num_classes=2, steps=20)
    assert not classifier.gray
    assert (classifier.predict(images) == labels).mean() > 0.95


def test_train_classifier_of_wrong_labels():
    with pytest.raises(UserError, match="0 to 2"):
        train_classifier(flat(0, 1), [0, 3], num_classes=3)
    with pytest.raises(UserError, match="as many integer labels"):
        train_classifier(flat(0, 1), [0.0, 1.0], num_classes=3)


@pytest.mark.slow
def test_a_classifier_stops_when_it_knows_its_images_and_is_kept(monkeypatch, tmp_path):
    """On 270 images it once took 2,400 steps, anew at each evaluation."""
    monkeypatch.setenv("NVG_CACHE", str(tmp_path))
    images, labels = bars(200, color=0.7)
    images = np.round((images + 1) * 127.5).astype(np.uint8)
    steps = []
    monkeypatch.setattr(judges.logger, "info", lambda text, *values: steps.append(values))
    first = judges.fit_classifier("mine", images, labels, 3)
    assert steps[-1][0] < 200 and steps[-1][2] < 0.1
    monkeypatch.setattr(judges, "train_classifier", None)
    again = judges.fit_classifier("mine", images, labels, 3)
    assert again.fingerprint == first.fingerprint and again.gray
    np.testing.assert_array_equal(again.predict(images), first.predict(images))
    for other in ((images, (labels + 1) % 3, 3), (images[1:], labels[1:], 3), (images, labels, 4)):
        with pytest.raises(TypeError, match="NoneType"):  # trains
            judges.fit_classifier("mine", *other)
