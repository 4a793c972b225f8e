"""The evaluation command: archives, features in parts, references, sweeps, reconstruction.

The network in these tests is a small function of the pixels; Inception has tests of its own.
"""

import contextlib
import json
import logging
import re
import types
import zipfile

import jax
import numpy as np
import pytest
from helpers import raising
from PIL import Image
from test_encoding import hand_made

from nvg_jax import evaluate, pretrained
from nvg_jax.data import open_source
from nvg_jax.errors import UserError
from nvg_jax.evaluation import features, image, judges, report, sets
from nvg_jax.jobs import classification, editing, reconstruction, sampling_runs
from nvg_jax.pretrained import ImageFeatures
from nvg_jax.runtime import resumable, storage
from nvg_jax.runtime.storage import locked
from nvg_jax.sampling.settings import parse_sweep
from nvg_jax.tokenizer import GranularitySequence

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (23, 8, 8, 3), np.uint8)
OTHERS = RNG.integers(0, 200, (17, 8, 8, 3), np.uint8)
DIGITS = {"name": "digits", "data_dir": "", "resize": 8}
METRICS = ("fid", "sfid", "inception_score", "precision", "recall")


class Judge:
    """Pool: channel means of the quarters; spatial: one row; logits: a part of the pool."""

    name, fingerprint = "stub", "0"

    def __init__(self, fail_after=None):
        self.seen, self._fail_after = 0, fail_after

    def image_features(self, images) -> ImageFeatures:
        if self._fail_after is not None and self.seen >= self._fail_after:
            raise KeyboardInterrupt
        self.seen += len(images)
        x = np.asarray(images, np.float32) / 255
        pool = x.reshape(-1, 2, 4, 2, 4, 3).mean((2, 4)).reshape(len(x), 12)
        return ImageFeatures(pool, x[:, 0, :, 0], 9 * pool[:, :5])


def save(path, images, **more):
    np.savez(path, images, **more)
    return path


@pytest.fixture
def samples(tmp_path):
    return sets.Archive(save(tmp_path / "samples.npz", IMAGES), 5)


@pytest.fixture
def reference(tmp_path, monkeypatch):
    monkeypatch.setenv("NVG_CACHE", str(tmp_path / "cache"))
    return sets.Archive(save(tmp_path / "reference.npz", OTHERS), 4)


def expected_metrics():
    ours, real = (Judge().image_features(x) for x in (IMAGES, OTHERS))
    order = np.random.default_rng(0).permutation(len(IMAGES))
    exponentials = np.exp(ours.logits[order])
    precision, recall = features.precision_recall(real.pool, ours.pool)
    return {
        "fid": features.frechet_distance(real.pool, ours.pool),
        "sfid": features.frechet_distance(real.spatial, ours.spatial),
        "inception_score": features.inception_score(
            exponentials / exponentials.sum(1, keepdims=True)
        ),
        "precision": precision,
        "recall": recall,
    }


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("nvg_jax"), "propagate", True)
    return caplog


def test_batches_give_the_metrics_of_all_images_at_once(samples, reference, tmp_path):
    judge = Judge()
    known = report.reference_features(reference, judge)
    found = report.compare(samples, known, judge, tmp_path / "out/own.json", {"samples": "a"})
    for name, value in expected_metrics().items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    assert found["images"] == 23 and found["reference_images"] == 17 and found["samples"] == "a"
    assert (tmp_path / "out" / "own.json").is_file()


def test_every_reference_has_metrics_of_its_own(samples, reference, tmp_path, monkeypatch):
    judge = Judge()
    monkeypatch.setattr(judges, "make_judge", {"stub": judge}.__getitem__)
    flags = dict(samples=str(samples.path), reference=str(reference.path), workdir=None, sweep=None)
    flags |= dict(batch_size=5, out=tmp_path / "out")
    monkeypatch.setattr(evaluate, "FLAGS", types.SimpleNamespace(**flags))
    assert "precision" in evaluate.evaluate_samples("stub")
    seen, other = judge.seen, save(tmp_path / "other.npz", OTHERS[:9])
    evaluate.FLAGS.reference = str(other)
    assert evaluate.evaluate_samples("stub")
    assert judge.seen - seen == 10  # the new reference alone, in two batches
    for path, count in ((reference.path, 17), (other, 9)):
        content = json.loads((tmp_path / f"out/metrics_{path.stem}.json").read_text())
        assert content["judge"] == "stub" and content["reference_images"] == count
        assert content["reference"]["name"] == str(path)
        assert content["reference"]["shape"] == [count, 8, 8, 3]


def test_beside_samples_are_as_many_held_out_images(samples, monkeypatch, tmp_path, warnings):
    monkeypatch.setenv("NVG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(judges, "make_judge", {"stub": Judge()}.__getitem__)
    flags = dict(samples=None, reference="train", workdir="runs/digits", sweep=None)
    flags |= dict(num_samples=23, batch_size=5, out=tmp_path / "out")
    monkeypatch.setattr(evaluate, "FLAGS", types.SimpleNamespace(**flags))
    held_out = evaluate.held_out_images(DIGITS, (8, 8))
    assert held_out is not None
    train = sets.Split(DIGITS, "train", (8, 8), 500)
    lines = evaluate.compare("stub", [({}, samples, {})], train, held_out).splitlines()
    content = json.loads((tmp_path / "out/metrics_train.json").read_text())
    found = content["metrics_of_real_test_images"]
    assert found["images"] == content["images"] == 23
    assert len(lines[1].split()) == 5 and lines[2].endswith("  23 held-out images")

    def seen(split):
        source = open_source("digits", split)
        images = np.stack([np.stack([x["image"]] * 3, -1) for x in source])
        return images, Judge().image_features(images).pool

    (_, train_pool), (test_images, test_pool) = seen("train"), seen("test")
    measured = {image.tobytes() for image in np.concatenate(list(held_out.batches(range(5))))}
    chosen = [image.tobytes() in measured for image in test_images]
    fid = features.frechet_distance(train_pool, test_pool[chosen])
    np.testing.assert_allclose(found["fid"], fid, rtol=1e-5)
    assert found["fid"] < content["fid"] / 2  # the samples are noise

    for split, count in (("train", 9), ("test", 3)):
        (tmp_path / f"pictures/{split}/a").mkdir(parents=True)
        for i in range(count):
            Image.fromarray(IMAGES[i]).save(tmp_path / f"pictures/{split}/a/{i}.png")
    pictures = {"name": "image_folder", "data_dir": str(tmp_path / "pictures"), "resize": 8}
    assert evaluate.held_out_images(pictures, (8, 8)) is None
    assert "there are 3, and 4 are needed" in warnings.text


def test_a_killed_run_goes_on_where_it_was(samples, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        report.features_of(samples, Judge(fail_after=10), tmp_path / "parts")
    second = Judge()
    found = report.features_of(samples, second, tmp_path / "parts")
    assert second.seen == 25 - 10  # the last batch is filled up
    np.testing.assert_array_equal(found.pool, Judge().image_features(IMAGES).pool)
    assert found.count == 23
    (tmp_path / "parts" / "000002.npz").write_bytes(b"PK")
    third = Judge()
    again = report.features_of(samples, third, tmp_path / "parts")
    assert third.seen == 5  # the damaged part alone
    np.testing.assert_array_equal(again.pool, found.pool)


def test_a_part_that_cannot_be_read_now_is_not_damaged(tmp_path):
    resumable.read_arrays(save(tmp_path / "part.npz", IMAGES))
    away = types.SimpleNamespace(open=raising(TimeoutError("the bucket is away")))
    with pytest.raises(TimeoutError):
        resumable.read_arrays(away)
    with pytest.raises(TimeoutError):
        sampling_runs.read_part(away, IMAGES.shape)


def test_parts_of_other_images_are_refused(samples, reference, tmp_path):
    report.features_of(samples, Judge(), tmp_path / "parts")
    with pytest.raises(UserError, match="holds features made with other settings"):
        report.features_of(reference, Judge(), tmp_path / "parts")


def test_a_reference_is_computed_once(reference, tmp_path):
    first = report.reference_features(reference, Judge())
    judge = Judge()
    again = report.reference_features(reference, judge)
    assert judge.seen == 0
    np.testing.assert_array_equal(first.pool, again.pool)
    np.testing.assert_array_equal(first.spatial_covariance, again.spatial_covariance)
    changed = sets.Archive(save(tmp_path / "reference.npz", OTHERS[::-1]), 4)
    report.reference_features(changed, judge)
    assert judge.seen > 0


def test_features_that_cannot_be_kept_are_still_computed(reference, monkeypatch, caplog):
    place = "/proc/nvg"  # where nothing can be created
    monkeypatch.setenv("NVG_CACHE", place)
    assert report.reference_features(reference, Judge()).count > 0
    assert re.search(f"features are not kept .NVG_CACHE.*{place}.* cannot be created", caplog.text)


def test_two_commands_with_one_reference(reference, monkeypatch):
    """The second one leaves alone what the first one has computed so far."""
    monkeypatch.setattr(report, "read_kept", lambda path: None)
    report.reference_features(reference, Judge())
    (file,) = (pretrained.cache_folder() / "references").iterdir()
    parts = file.with_suffix("")
    parts.mkdir()
    (parts / "000000.npz").write_bytes(b"of the first")
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_bytes(b"of the first, too")
    with locked(parts) as free:
        assert free and report.reference_features(reference, Judge()).count > 0
        assert [path.name for path in parts.iterdir()] == ["000000.npz"] and temporary.exists()


def test_a_reference_that_another_machine_lacks_is_computed_by_all(reference, monkeypatch):
    """Otherwise the others would wait for the features of this process forever."""
    first = report.reference_features(reference, Judge())
    for module in (report, storage):
        monkeypatch.setattr(module, "everywhere", lambda holds: False)
    judge = Judge()
    again = report.reference_features(reference, judge)
    assert judge.seen > 0
    np.testing.assert_array_equal(first.pool, again.pool)
    left = (pretrained.cache_folder() / "references").iterdir()
    assert [path.suffix for path in left] == [".npz"]  # nothing that seems shared


def test_statistics_of_a_reference_file_come_first(reference, tmp_path):
    rng = np.random.default_rng(1)
    mu, sigma = rng.normal(size=12), np.eye(12)
    file = save(tmp_path / "statistics.npz", OTHERS, mu=mu, sigma=sigma)
    judge = Judge()
    judge.name = "inception"
    found = report.reference_features(sets.Archive(file, 4), judge)
    np.testing.assert_array_equal(found.pool_mean, mu)
    np.testing.assert_array_equal(found.pool_covariance, sigma)
    np.testing.assert_allclose(found.spatial_mean, OTHERS[:, 0, :, 0].mean(0) / 255, 1e-5)
    other = report.reference_features(sets.Archive(file, 4), Judge())  # whose they are not
    assert np.abs(other.pool_mean - mu).max() > 0.1


def test_a_split_is_every_image_once_and_keeps_the_first_features(monkeypatch, tmp_path):
    monkeypatch.setenv("NVG_CACHE", str(tmp_path))
    monkeypatch.setattr(report, "REFERENCE_IMAGES", 50)
    source = open_source("digits", "test")
    split = sets.Split(DIGITS, "test", (8, 8), 64)
    seen = np.concatenate(list(split.batches(range(5))))
    stored = np.stack([source[i]["image"] for i in range(len(source))])
    as_set = lambda images: sorted(image.tobytes() for image in images)
    assert as_set(seen[..., 0]) == as_set(stored)
    found = report.reference_features(split, Judge())
    assert found.count == 300 and found.pool.shape == (50, 12)
    np.testing.assert_array_equal(found.pool, Judge().image_features(seen[:50]).pool)
    np.testing.assert_allclose(
        found.pool_mean, Judge().image_features(seen).pool.mean(0, np.float64), rtol=1e-6
    )


@pytest.mark.parametrize(
    "content, message",
    [
        (dict(images=IMAGES), 'has the arrays images; expected the images as "arr_0"'),
        (dict(arr_0=IMAGES / 255), "must be uint8 of shape .* got float64"),
        (dict(arr_0=IMAGES[..., 0]), r"must be uint8 .* got uint8 \(23, 8, 8\)"),
        (dict(arr_0=np.asfortranarray(IMAGES)), "in Fortran order"),
        (None, "is damaged, incomplete or not an .npz file"),
    ],
)
def test_archives_with_other_contents(tmp_path, content, message):
    np.savez(tmp_path / "x.npz", **content or {})
    if content is None:
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("arr_0.npy", b"no array")
    with pytest.raises(UserError, match=message):
        sets.Archive(tmp_path / "x.npz", 5)


def test_truncated_and_damaged_archives(tmp_path):
    path = save(tmp_path / "x.npz", IMAGES)
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])
    with pytest.raises(UserError, match="is damaged, incomplete or not an .npz file"):
        sets.Archive(path, 5)
    path.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    with pytest.raises(UserError, match="is damaged"):
        list(sets.Archive(path, 5).batches(range(5)))
    with pytest.raises(UserError, match="There is no file"):
        sets.Archive(tmp_path / "y.npz", 5)


def test_other_sizes_and_too_few_images_are_said(samples, reference, tmp_path, warnings):
    larger = sets.Archive(save(tmp_path / "l.npz", np.zeros((4, 16, 8, 3), np.uint8)), 4)
    report.warn_if_sizes_differ(samples, reference)
    assert not warnings.records
    report.warn_if_sizes_differ(samples, larger)
    assert "8 x 8 pixels and the reference 16 x 8" in warnings.text
    few = sets.Archive(save(tmp_path / "few.npz", IMAGES[:9]), 4)
    known = report.reference_features(reference, Judge())
    report.compare(few, known, Judge(), tmp_path / "few/metrics.json", {})
    assert "9 samples for 12 features: the covariance is rank deficient" in warnings.text


def test_what_a_reference_may_be(tmp_path):
    with pytest.raises(UserError, match="must be train, test or an .npz file, got 'val'"):
        sets.open_reference("val", 4, None, None)
    with pytest.raises(UserError, match="is a split of a data set"):
        sets.open_reference("train", 4, None, None)


def test_cached_sequences_have_no_images(tmp_path):
    data = {"name": "sequences", "data_dir": str(hand_made(tmp_path / "cache")), "resize": 0}
    for split in ("train", "test"):
        with pytest.raises(UserError, match=r"no images .* give the data set .*--data_name"):
            sets.open_reference(split, 4, (8, 8), data)


def test_a_sweep_is_every_combination():
    points = parse_sweep("content_guidance=1,3.5;2 flow_steps=4;8 gumbel=true")
    assert points == [
        dict(content_guidance=guidance, flow_steps=steps, gumbel=True)
        for guidance in ((1.0, 3.5), 2.0)
        for steps in (4, 8)
    ]
    for text, message in (
        ("guidance=1", "with the names temperature"),
        ("top_p", "takes NAME=VALUE"),
        ("top_p=1,x", "top_p takes numbers"),
        ("flow_steps=8.0", "flow_steps takes whole numbers, got '8.0'"),
        ("top_p=1 top_k=5 top_p=0.5", "--sweep has top_p twice"),
        ("gumbel=maybe", "gumbel takes"),
    ):
        with pytest.raises(UserError, match=message):
            parse_sweep(text)


def test_the_table_marks_the_lowest_fid():
    line = dict.fromkeys(METRICS, 0.5) | {"images": 50_000, "features": 2048}
    results = [
        {**line, "fid": fid, "sweep": dict(top_p=(1.0, top_p))} for fid, top_p in ((3, 0.5), (2, 1))
    ]
    first, second = report.table(results).splitlines()[1:3]
    assert "top_p=1,0.5" in first and "lowest" not in first
    assert "top_p=1,1" in second and second.endswith("lowest FID")


def test_numbers_have_three_digits_and_every_name_is_explained():
    """A small folder once gave 352.59935075584195, from 27 images, without a word."""
    values = [352.59935075584195, 0.35, 12345.6, 0.0012345, 0.0]
    assert [report.digits(v) for v in values] == ["353", "0.350", "12300", "0.00123", "0.00"]
    # The PSNR of equal images, and the FID of a model that diverged.
    assert [report.digits(v) for v in (np.inf, -np.inf, np.nan)] == ["inf", "-inf", "nan"]
    few = dict.fromkeys(METRICS, 352.59935075584195) | {"images": 27, "features": 64}
    text = report.table([few])
    assert "353" in text and "352.6" not in text
    assert "too few images for FID: 27, which is not more than the 64 features" in text
    for name in report.HEADS:
        assert text.count(f"\n{name}: ") == 1
    assert "too few" not in report.table([few | {"images": 65}])


def test_a_model_stands_beside_real_images_and_chance():
    five = dict.fromkeys(METRICS, 2.0)
    results = {
        "test_psnr": 21.04, "rfid": 12.0, "classifier_accuracy_on_reconstructions": 0.7,
        "classifier_accuracy_on_real_test_images": 0.74074, "class_agreement": 0.35,
        "class_agreement_of_real_test_images": 0.6667,
        "copying": {"near_share": 0.25}, "metrics_of_samples": five,
        "metrics_of_real_test_images": five | {"fid": 1.0}, "metrics_images": 27, "features": 64,
    }  # fmt: skip
    lines = classification.table(results, num_classes=3).splitlines()
    assert lines[0].split() == ["model", "real", "images", "chance"]
    assert "class agreement         0.350        0.667    0.333" in lines
    assert "near copies             0.250       0.0500" in lines
    assert "FID                      2.00         1.00" in lines
    assert any(line.startswith("too few images for FID: 27") for line in lines)
    alone = {k: v for k, v in results.items() if not k.startswith(("class_", "metrics", "copy"))}
    assert "class agreement:" not in classification.table(alone, num_classes=3)


def test_samples_and_real_images_have_as_many_of_every_class():
    samples, real = np.array([0, 1, 2, 0, 1, 2, 0, 1]), np.array([0] * 9 + [1, 2, 2, 2])
    counts = classification.in_common(samples, real, 4)
    assert counts.tolist() == [3, 1, 2, 0]
    for labels in (samples, real):
        chosen = classification.turns(labels) < counts[labels]
        assert np.bincount(labels[chosen], minlength=4).tolist() == [3, 1, 2, 0]
    with pytest.raises(UserError, match="have 3 images of the same classes.* draw more samples"):
        classification.in_common(samples[:3], real, 4)


def test_samples_are_compared_with_real_images_of_the_same_classes(tmp_path, monkeypatch):
    """Of two classes, one lies much nearer to its training images: a mixture is no copy."""
    rng, shape = np.random.default_rng(1), (8, 8, 3)
    base = rng.integers(60, 190, (2, *shape))

    def images(*counts):
        labels = np.repeat([0, 1], counts)
        noise = rng.normal(0, np.where(labels, 40, 4)[:, None, None, None], (len(labels), *shape))
        return sets.LabeledImages(np.clip(base[labels] + noise, 0, 255).astype(np.uint8), labels)

    judge = Judge()
    judge.predict = lambda images: (images.mean((1, 2, 3)) > base.mean()).astype(int)
    train, test, samples = images(10, 190), images(20, 180), images(100, 100)
    found = classification.sample_metrics(judge, samples, ("near", "far"), train, test)
    assert found["metrics_images"] == 120  # 20 and 100
    copying = found["copying"]
    assert copying["near_share"] < 0.1  # half of all samples is nearer than 5% of `test`
    for name, given in (("", samples), ("_of_real_test_images", test)):
        near, far = (judge.predict(given.images[given.labels == k]) == k for k in (0, 1))
        assert near.mean() - far.mean() > 0.05
        expected = (20 * near.mean() + 100 * far.mean()) / 120
        assert found[f"class_agreement{name}"] == pytest.approx(expected)


def test_few_samples_are_of_classes_all_over():
    model = types.SimpleNamespace(num_classes=10)
    config = types.SimpleNamespace(fixed_structure=None)
    pipe = types.SimpleNamespace(metadata=types.SimpleNamespace(model=model), tokenizer=config)
    classes = lambda n: sampling_runs.SamplingJob.cycling(pipe, n, 4, 0, {}).classes
    assert classes(5) == [0, 2, 4, 6, 8]
    assert classes(13) == [*range(10), 0, 1, 2]


def test_classes_with_other_names_are_named(caplog):
    model = lambda config: types.SimpleNamespace(
        class_names=("cat", "dog", "eel"), metadata=types.SimpleNamespace(config=config)
    )
    data = lambda *names: types.SimpleNamespace(class_names=names)
    classification.warn_if_classes_differ(model({"seed": 0}), data("cat", "dog", "eel"))
    classification.warn_if_classes_differ(model(None), data("n1", "n2", "n3"))  # converted
    assert not caplog.messages
    classification.warn_if_classes_differ(model({"seed": 0}), data("cat", "eel", "dog"))
    assert (
        "2 classes have other names in the data than in the model, the first 'eel' and 'dog'"
        in (caplog.text)
    )
    caplog.clear()
    classification.warn_if_classes_differ(model({"seed": 0}), data("cat", "dog", "eel", "fox"))
    assert "the first 'fox' and '(no class)'" in caplog.text


@pytest.mark.parametrize("classes", [2, 3])
def test_an_evaluation_needs_data_with_the_number_of_classes_of_the_model(classes):
    model = types.SimpleNamespace(
        class_names=tuple("abc"),
        metadata=types.SimpleNamespace(model=types.SimpleNamespace(num_classes=3), config={}),
    )
    source = types.SimpleNamespace(num_classes=classes, class_names=tuple("abc")[:classes])
    refused = pytest.raises(UserError, match="has 3 classes and the data set has 2; give the data")
    with refused if classes == 2 else contextlib.nullcontext():
        classification.check_classes(model, source)


def test_reconstruction(monkeypatch, tmp_path):
    """A model that darkens the images by a known amount, with stubs for the networks."""
    stubs = {("stub", "reconstructions"): Judge()}
    monkeypatch.setattr(reconstruction, "make_judge", lambda *names: stubs[names])
    monkeypatch.setattr(pretrained, "load", lambda name: {"w": np.float32(len(name))})

    def distance(params, a, b, dtype):
        assert jax.config.jax_default_matmul_precision == "highest"
        return params["w"] * abs(a - b).mean((1, 2, 3))

    monkeypatch.setattr(pretrained, "lpips", distance)
    monkeypatch.setattr(pretrained, "lpips_alex", distance)
    config = types.SimpleNamespace(num_stages=2, codebook_size=4)
    originals = []

    def encode(images):
        originals.append(images)
        tokens = np.zeros((len(images), 2, 1), np.int32)
        tokens[:, 1, 0] = 1 + np.arange(len(images)) % 2
        return GranularitySequence(tokens, tokens)

    darker = lambda sequence: np.maximum(image.to_float(originals[-1]) - 0.2, -1)
    pipeline = types.SimpleNamespace(
        tokenizer=types.SimpleNamespace(config=config),
        dtype="float32",
        params={"tokenizer": {}},
        encode=encode,
        decode=darker,
        reconstruct=lambda images: darker(encode(images)),
    )
    images = sets.Split(DIGITS, "test", (8, 8), 50)
    found = reconstruction.report(pipeline, images, tmp_path, "stub")
    pixels = np.concatenate(list(images.batches(range(6))))
    floats = pixels / 255 * 2 - 1
    restored = np.floor(255 * (np.maximum(floats - 0.2, -1) + 1) / 2 + 1e-4) / 255 * 2 - 1
    psnr = 10 * np.log10(4 / np.square(restored - floats).mean((1, 2, 3)))
    np.testing.assert_allclose(found["psnr"], psnr.mean(), rtol=1e-4)
    absolute = np.abs(restored - floats).mean()
    np.testing.assert_allclose(found["lpips_vgg"], 5 * absolute, rtol=1e-3)
    np.testing.assert_allclose(found["lpips_alex"], 10 * absolute, rtol=1e-3)
    assert 0 < found["ssim"] < 1 and found["rfid"] > 0 and found["images"] == 300
    assert found["codebook_usage"] == 0.75 and found["codebook_usage_of_stages"] == [0.25, 0.5]
    picture = editing.read_picture(tmp_path / "extremes.png")
    heads = (picture[:-130] < 128).any((0, 2))  # above tiles of 64 pixels: best, and then worst
    assert heads[-1054:-526].any() and heads[-526:].any()
