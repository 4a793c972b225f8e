"""All stages on tiny digits models: training, resuming, sampling, wrong use."""

import contextlib
import functools
import gc
import json
import logging
import re
import shutil
import signal
import sys
import time
import types

import fsspec
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from bucket import some_requests_fail
from etils import epath
from helpers import (
    Process,
    finish,
    forked,
    free_port,
    is_even_hierarchy,
    logged,
    raising,
    random_pipeline,
    read_meta,
    tiny_config,
    tiny_discriminator,
    with_devices,
)
from PIL import Image

from nvg_jax import GranularitySequence, Pipeline, cli, workdir
from nvg_jax.errors import UserError
from nvg_jax.evaluation import frechet_distance, sets
from nvg_jax.evaluation.judges import DigitClassifier
from nvg_jax.evaluation.sets import Split, load_split
from nvg_jax.jobs import classification
from nvg_jax.metadata import RunMetadata, read_export_metadata
from nvg_jax.models import ModelConfig
from nvg_jax.parts import TOKENIZER
from nvg_jax.runtime import heartbeat, sharding
from nvg_jax.runtime.storage import storage_path
from nvg_jax.sampling.settings import Settings
from nvg_jax.train import train
from nvg_jax.training import tokenizer
from nvg_jax.training.loop import BestModel
from nvg_jax.visualize import to_uint8

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipe(trained):
    return Pipeline.from_pretrained(trained)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)


def weights(folder, step=None):
    """The raw bytes of a run's latest state, or of another step."""
    with ocp.CheckpointManager(folder) as manager:
        restore = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = manager.restore(step or manager.latest_step(), args=restore)["state"]
    return jax.tree.map(np.asarray, state)


def test_a_run_leaves_checkpoints_metrics_and_pictures(trained):
    for run in ("tokenizer", "generators"):
        assert read_meta(trained / run)["step"] == 12
        assert list((trained / run).glob("pictures_*.png"))
    tags = {tag for tag, _ in logged(trained / "tokenizer")}
    assert {"quantizer_stage_loss/4", "codebook_usage", "test_psnr", "learning_rate"} <= tags
    tags = {tag for tag, _ in logged(trained / "generators")}
    expected = {"content/token_loss/4", "content/token_accuracy/0", "structure/flow_loss/2"}
    expected |= {"test_content/loss", "test_raw/content/loss"}  # averaged weights, raw weights
    assert expected | {"images_per_second", "grad_norm"} <= tags


def test_the_best_model_by_fid_is_kept_beside_the_latest(trained):
    real = load_split(tiny_config().data, "train", (8, 8))
    judge = DigitClassifier(real.images, real.labels)
    held_out = next(Split(tiny_config().data, "test", (8, 8), 50).batches([0]))
    samples = lambda best: best.sample([i % 10 for i in range(50)], seed=0).images
    for part, known, images in (
        ("tokenizer", held_out, lambda best: best.reconstruct(held_out)),
        ("generators", real.images, samples),
    ):
        values = logged(trained / part)
        measured = {step: values[tag, step] for tag, step in values if tag == "fid"}
        assert measured.keys() == {8, 12}
        best = Pipeline.from_pretrained(trained / f"best_{part}")
        assert best.metadata.step == min(measured, key=measured.get)
        assert best.metadata.fid == pytest.approx(min(measured.values()), rel=1e-6)
        features = [judge.image_features(x).pool for x in (known, to_uint8(images(best)))]
        assert frechet_distance(*features) == pytest.approx(best.metadata.fid, rel=1e-4)


def test_only_a_lower_fid_replaces_the_best_model(tmp_path):
    config = tiny_config()
    metadata = RunMetadata(
        ModelConfig.from_config(config, 1).only(), ("a",), config=config.to_dict()
    )
    as_json = lambda config: json.loads(json.dumps(config.to_dict()))
    run = types.SimpleNamespace(workdir=epath.Path(tmp_path), config_json=lambda: as_json(config))
    trainer = types.SimpleNamespace(part=TOKENIZER, num_images=None)
    folder, params = tmp_path / "best_tokenizer", {"x": np.ones(3)}
    values = iter([5.0, 7.0, 3.0, 4.0, 3.0, 9.0])
    score = lambda metadata, params: next(values)
    kept = []  # what only a model that is kept needs

    def update(best, step):
        return best.update(step, metadata, params, lambda: kept.append(step) or metadata)

    best = BestModel(run, trainer, score, start=0)
    assert [update(best, step) for step in (10, 20, 30)] == [(5.0, 5.0), (7.0, 5.0), (3.0, 3.0)]
    resumed = BestModel(run, trainer, score, start=30)
    assert update(resumed, 40) == (4.0, 3.0)
    assert update(resumed, 50) == (3.0, 3.0)
    assert kept == [10, 30]
    stored = read_export_metadata(folder)
    assert (stored.step, stored.fid) == (30, 3.0)
    # A FID of another number of images, by another judge or of other data does not compete.
    for path, value in (
        ("tokenizer_training.fid_samples", 20),
        ("evaluation.judge", "inception"),
        ("data.resize", 9),
    ):
        other = tiny_config()
        other.update_from_flattened_dict({path: value})
        changed = types.SimpleNamespace(
            workdir=run.workdir, config_json=lambda other=other: as_json(other)
        )
        assert BestModel(changed, trainer, score, start=50).fid == float("inf")
    content = (folder / "config.json").read_text()
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"is not JSON .* Or delete .*best_tokenizer"):
        BestModel(run, trainer, score, start=50)
    (folder / "config.json").write_text(content)
    # A new training in the same workdir does not compete with the one before.
    anew = BestModel(run, trainer, score, start=0)
    assert update(anew, 10) == (9.0, 9.0)
    assert read_export_metadata(folder).step == 10


def test_canvas_scales_are_one_over_the_deviation_of_the_canvases(trained, pipe):
    meta = read_meta(trained / "tokenizer")
    scale = meta["canvas_scale"]
    assert len(scale) == 6 and scale[0] == 1
    from nvg_jax.data import LoaderOptions, Transform, eval_batches, open_source

    options = LoaderOptions(Transform((8, 8), resize=8), 1497)
    batch = next(eval_batches(open_source("digits", "train"), options))
    encode = functools.partial(pipe.tokenizer.apply, method="encode")
    canvases = jax.jit(encode)({"params": pipe.params["tokenizer"]}, batch["image"]).canvases
    # Measured on whole batches of a shuffled epoch: the last images may be seen twice.
    np.testing.assert_allclose(scale[1:], 1 / np.asarray(canvases).std((0, 2, 3)), rtol=0.02)


def test_encode_decode_reconstruct(pipe, images):
    sequence = pipe.encode(images)
    assert sequence.structure.shape == sequence.tokens.shape == (3, 5, 16)
    assert sequence.structure.dtype == sequence.tokens.dtype == np.int32
    assert is_even_hierarchy(sequence.structure).all()
    floats = images.astype(np.float32) / 127.5 - 1
    encode = functools.partial(pipe.tokenizer.apply, method="encode")
    quantized = jax.jit(encode)({"params": pipe.params["tokenizer"]}, floats)
    restored = pipe.decode_canvas(quantized.canvases[:, -1])
    np.testing.assert_allclose(pipe.decode(sequence), restored, atol=1e-5)
    np.testing.assert_allclose(pipe.reconstruct(images), restored, atol=1e-5)
    np.testing.assert_array_equal(pipe.encode(floats).tokens, sequence.tokens)
    floats[0, 0, 0, 0] = np.nextafter(np.float32(1), np.float32(2))  # as a resize may round
    assert pipe.encode(floats).tokens.shape == sequence.tokens.shape


def test_sampling_shapes_even_splits_and_defaults(pipe):
    out = pipe.sample([3, "7"], seed=1)
    assert out.images.shape == (2, 8, 8, 3) and np.abs(out.images).max() <= 1
    assert out.canvases is None
    assert is_even_hierarchy(out.sequence.structure).all()
    # The folder's own settings are the defaults, and decoding the sequence gives the images.
    settings = dict(content_guidance=(2.0, 2.0), structure_guidance=(1.5, 1.5), flow_steps=2)
    np.testing.assert_array_equal(out.images, pipe.sample([3, 7], seed=1, **settings).images)
    np.testing.assert_allclose(pipe.decode(out.sequence), out.images, atol=1e-5)
    canvases = pipe.sample([3, 7], seed=1, canvases=True).canvases
    assert canvases.shape == (2, 5, 16, 4)
    np.testing.assert_allclose(pipe.decode_canvas(canvases[:, -1]), out.images, atol=1e-5)


def test_a_sample_depends_on_its_seed_and_index_alone(pipe):
    classes = [0, 1, 2, 3, 4, 5, 6, 7]
    together = pipe.sample(classes, seed=5)
    for index in (0, 6):
        alone = pipe.sample([classes[index]], seed=5, first_index=index)
        np.testing.assert_array_equal(alone.sequence.tokens[0], together.sequence.tokens[index])
        np.testing.assert_allclose(alone.images[0], together.images[index], atol=1e-5)
    assert np.abs(pipe.sample(classes, seed=6).images - together.images).max() > 1e-3


def test_every_knob_changes_the_samples(pipe):
    # After a dozen steps the networks hardly do anything: random weights make them.
    leaves, tree = jax.tree.flatten(pipe.params)
    rng = np.random.default_rng(0)
    leaves = [x + rng.normal(size=x.shape, scale=0.2).astype(np.float32) for x in leaves]
    pipe = Pipeline(pipe.metadata, jax.tree.unflatten(tree, leaves))
    base = dict(seed=2, content_guidance=1.0, structure_guidance=1.0, flow_steps=2)
    classes = [4] * 8
    plain = pipe.sample(classes, **base)
    for change in (
        dict(temperature=0),
        dict(top_k=1),
        dict(top_p=(1.0, 0.05)),
        dict(gumbel=True),
        dict(flow_steps=5),
        dict(structure_guidance=(1.0, 9.0)),
        dict(content_guidance=[1, 3, 5, 7, 9]),
        dict(structure_noise=np.random.default_rng(0).normal(size=(8, 16, 4))),
    ):
        out = pipe.sample(classes, **(base | change))
        assert not np.array_equal(out.images, plain.images), change
        assert is_even_hierarchy(out.sequence.structure).all()
    greedy = [pipe.sample(classes, **base, **kw).sequence.tokens for kw in
              (dict(temperature=0), dict(top_k=1))]  # fmt: skip
    np.testing.assert_array_equal(*greedy)


def test_a_prefix_is_kept(pipe, images):
    prefix = pipe.encode(images)
    out = pipe.sample([1, 2, 3], seed=0, prefix=prefix, token_stages=2, structure_stages=4)
    np.testing.assert_array_equal(out.sequence.structure[:, :4], prefix.structure[:, :4])
    np.testing.assert_array_equal(out.sequence.tokens[:, :2], prefix.tokens[:, :2])
    assert is_even_hierarchy(out.sequence.structure).all()
    whole = pipe.sample([1, 2, 3], prefix=prefix, token_stages=5, structure_stages=5)
    np.testing.assert_allclose(whole.images, pipe.reconstruct(images), atol=1e-5)


def test_an_export_is_the_same_model(pipe, tmp_path, images):
    pipe.save_pretrained(tmp_path / "export")
    again = Pipeline.from_pretrained(tmp_path / "export")
    assert again.class_names == pipe.class_names and again.settings == pipe.settings
    np.testing.assert_array_equal(again.encode(images).tokens, pipe.encode(images).tokens)
    np.testing.assert_array_equal(again.sample([5]).images, pipe.sample([5]).images)


FIRST = 8  # of the tokenizer's 12 steps, with index_backprop


@pytest.mark.parametrize("stage", ["tokenizer", "generators"])
def test_a_resumed_run_is_the_uninterrupted_run(trained, tmp_path, monkeypatch, stage):
    """The tokenizer's with a discriminator, and index_backprop that ends within the run."""
    index_backprop, used = tokenizer.TokenizerTrainer.index_backprop, []

    def watched(trainer, step):
        used.append(index_backprop(trainer, step))
        return used[-1]

    monkeypatch.setattr(tokenizer.TokenizerTrainer, "index_backprop", watched)
    monkeypatch.setattr(
        tokenizer.TokenizerLossConfig,
        "make_discriminator",
        lambda config, dtype: tiny_discriminator(),
    )
    config, whole = tiny_config(part=stage), trained
    if stage == "generators":
        (tmp_path / "tokenizer").symlink_to(trained / "tokenizer")
    else:
        config.tokenizer_training.update(
            adversarial_weight=0.1, discriminator="small", index_backprop_epochs=FIRST * 16 / 1497
        )
        whole = tmp_path / "whole"
        train(config, whole)
    place, calls, before = sharding.global_batch, [], len(used)

    def interrupt(batch, mesh):
        calls.append(1)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return place(batch, mesh)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sharding, "global_batch", interrupt)
        train(config, tmp_path)
    train(config, tmp_path)
    if stage == "tokenizer":
        # Six steps and the start of the seventh, then from the checkpoint of the fourth on.
        assert used[before:] == [True] * 7 + [step < FIRST for step in range(4, 12)]
        moved = jax.tree.map(
            lambda a, b: bool((a != b).any()), weights(whole / stage, 8), weights(whole / stage)
        )
        opponent = moved["discriminator"]
        for part in (moved["params"], opponent["params"], opponent["spectral"]):
            assert np.mean(jax.tree.leaves(part)) > 0.7  # the vectors of one logit cannot turn
        assert opponent["lecam"]["real"] and opponent["lecam"]["fake"]
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / stage), weights(whole / stage))
    once, parts = logged(whole / stage), logged(tmp_path / stage)
    losses = {key for key in once if "loss" in key[0]}
    assert losses and {key: parts[key] for key in losses} == {key: once[key] for key in losses}


def test_two_processes_stop_on_a_signal_and_one_goes_on(trained, bucket, tmp_path, foreground):
    """Four devices of two processes, whose workdir is in a bucket that fails on purpose.

    Ctrl-C in one, which sends itself a SIGTERM, saves in both; one device ends the run in a copy of
    the workdir, with the losses of one device.
    """
    beat = storage_path("gs://bucket/run/heartbeat.json")

    def at_step_6():
        with contextlib.suppress(FileNotFoundError, ValueError):  # none yet, or replaced meanwhile
            line = json.loads(beat.read_text())
            return line["part"] == "generators" and line["step"] >= 6
        return False

    command = [
        sys.executable, "-m", "nvg_jax.train", "--config=configs/digits.py:runlocal",
        "--workdir=gs://bucket/run", "--config.generator_training.eval_every=4",
        f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2",
    ]  # fmt: skip
    start = lambda index: Process([*command, f"--process_id={index}"], env=with_devices(2))
    bucket.fault, bucket.latency = some_requests_fail(0.02), 0.005
    with start(0) as one, start(1) as other:
        while not at_step_6() and one.poll() is None:
            time.sleep(0.1)
        other.send_signal(signal.SIGINT)
        done = finish(one, other)
    assert [process.returncode for process in done] == [75, 130], done
    assert "loss" not in done[1].stderr  # one process tells the progress
    bucket.fault = lambda method, path: None
    fsspec.filesystem("gs").get("gs://bucket/run/", f"{tmp_path}/", recursive=True)
    stopped = read_meta(tmp_path / "generators")["step"]
    assert 6 <= stopped < 12
    for reason, process in zip(("preempted", "interrupted"), done):
        assert f"{reason}; generators: saved at step {stopped} of 12" in process.stderr
    assert (tmp_path / "generators" / "pictures_0000004.png").is_file()

    train(tiny_config(), tmp_path)
    for run, tags in (
        ("tokenizer", ("loss", "test_psnr")),
        ("generators", ("content/loss", "structure/loss", "test_content/loss")),
    ):
        alone, found = logged(trained / run), logged(tmp_path / run)
        for tag in tags:
            curve = {key: value for key, value in alone.items() if key[0] == tag}
            assert len(curve) == (1 if tag.startswith("test") else 6)
            for key, value in curve.items():
                np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=str(key))
        assert (tmp_path / run / "pictures_0000012.png").is_file()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_term(tmp_path, monkeypatch):
    place, calls = sharding.global_batch, []

    def damaged(batch, mesh):
        calls.append(1)
        if len(calls) == 3:
            batch = batch | {"image": np.full_like(batch["image"], np.nan)}
        return place(batch, mesh)

    monkeypatch.setattr(sharding, "global_batch", damaged)
    with pytest.raises(UserError, match=r"_loss.* is nan at step 3"):
        train(tiny_config(part="tokenizer"), tmp_path)


def test_a_second_generator_and_a_missing_step_are_refused_before_anything(trained):
    """Nothing in the folder changes."""
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    with pytest.raises(UserError, match="holds a trained content generator in generators/"):
        train(tiny_config(part="content"), trained)
    with pytest.raises(UserError, match="no checkpoint of step 5 in .*; it has those of 4, 8, 12"):
        train(tiny_config(part="tokenizer"), trained, resume_step=5)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_generators_refuse_another_tokenizer(trained, tmp_path):
    train(tiny_config(part="tokenizer", seed=1), tmp_path)
    (tmp_path / "generators").symlink_to(trained / "generators")
    with pytest.raises(UserError, match="another tokenizer"):
        Pipeline.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="another tokenizer"):
        train(tiny_config(part="generators", seed=1), tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "tokenizer").symlink_to(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="no content and no structure generator; it has tokenizer"):
        Pipeline.from_pretrained(alone).sample([0])
    with pytest.raises(UserError, match="seed = 0, now 5"):
        train(tiny_config(part="tokenizer", seed=5), trained)
    moved = f"the tokenizer in {trained}, which is no longer there. Move it"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=moved):
        patch.setattr(workdir, "read_tokenizer", lambda folder: None)
        Pipeline.from_pretrained(tmp_path)
    converted = random_pipeline()
    converted.metadata = converted.metadata.replace(fingerprint="of a file", canvas_scale=None)
    converted.save_pretrained(tmp_path / "converted")
    with pytest.raises(UserError, match="converted without its generators.* with --generator"):
        train(
            tiny_config(part="generators", tokenizer_workdir=str(tmp_path / "converted")),
            tmp_path / "on_it",
        )
    other_sizes = tiny_config(part="generators")
    other_sizes.tokenizer.codebook_size = 32
    with pytest.raises(UserError, match="other sizes"):
        train(other_sizes, tmp_path)


# Orbax leaves coroutines behind after an error, which Python complains of.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_weights_and_metadata_come_from_one_checkpoint(trained, tmp_path):
    """The finished tokenizer is damaged, the one before it is not finished: no one builds on it."""
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer" / "12" / "state").rglob("d/*"):  # the metadata are in meta/
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match="has none that has finished"):
        train(tiny_config(part="generators"), tmp_path)
    shutil.copytree(trained / "generators", tmp_path / "generators")
    with pytest.raises(UserError, match="is at step 8, before the end of its training"):
        Pipeline.from_pretrained(tmp_path)
    gc.collect()  # the complaints come here, where they are ignored


def test_too_little_memory_ends_in_a_sentence(monkeypatch, capsys, tmp_path):
    def main(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(cli, "logger", logging.Logger("own"))  # which `cli.main` sets up
    monkeypatch.setattr(cli.app, "run", lambda start, **_: main(None))
    with pytest.raises(SystemExit) as end:
        cli.main(main)
    assert end.value.code == 2
    assert "error: The devices have too little memory (RESOURCE" in capsys.readouterr().err
    monkeypatch.setattr(heartbeat, "_step", 0)
    monkeypatch.setenv("NVG_HEARTBEAT", str(tmp_path / "beat"))
    with pytest.raises(SystemExit):
        cli.main(main)
    heartbeat.beat(storage_path(tmp_path), "tokenizer", 0, 100)
    heartbeat.stop()
    with pytest.raises(jax.errors.JaxRuntimeError):  # it did fit: a launcher tries again
        cli.main(main)
    busy = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Too many requests")
    monkeypatch.setattr(cli.app, "run", raising(busy))
    with pytest.raises(jax.errors.JaxRuntimeError):
        cli.main(main)


def changed(sequence, **parts):
    return GranularitySequence(**(sequence._asdict() | parts))


def moved(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda pipe: pipe.sample([10]), "Unknown class 10"),
        (lambda pipe: pipe.sample(["cat"]), r"Unknown class 'cat'\. This model has the classes 0"),
        (lambda pipe: pipe.sample([1.0]), "Unknown class 1.0"),
        (lambda pipe: pipe.sample([True]), "Unknown class True"),
        (lambda pipe: pipe.sample([]), "at least one class"),
        (lambda pipe: pipe.sample("12"), r"list of class ids or names, got '12'; .* \['12'\]"),
        (lambda pipe: pipe.sample(3), r"list of class ids or names, got 3; .* \[3\]"),
        (lambda pipe: pipe.sample(np.array(3)), r"list of class ids or names, got 3; .* \[3\]"),
        (lambda pipe: pipe.sample(b"12"), "list of class ids or names, got b'12'"),
        (lambda pipe: pipe.sample(jax.numpy.array([0, 10])), "Unknown class 10"),
        (lambda pipe: pipe.decode(5), "sequence must be a GranularitySequence, .* got int"),
        (lambda pipe: pipe.decode((5, 6)), r"structure must be integers of shape \(batch, 5, 16\)"),
        (lambda pipe: pipe.decode(([[1], [1, 2]], [1])), "structure must be integers of shape"),
        (lambda pipe: pipe.structure_noise(0, "a"), "count must be a whole number"),
        (lambda pipe: pipe.load_lora("there", "1"), "must be a finite number, got '1'"),
        (lambda pipe: pipe.sample([0], structure_solves=([0],)), "must be a list of stages"),
        (lambda pipe: pipe.sample([0], seed=1.5), "seed must be a whole number in 0 .. 4294967295"),
        (lambda pipe: pipe.sample([0], seed=2**70), "seed must be a whole number .* got 11805"),
        (lambda pipe: pipe.sample([0], seed=-1), "seed must be a whole number .* got -1"),
        (lambda pipe: pipe.sample([0], first_index=-1), "first_index must be a whole number"),
        (lambda pipe: pipe.sample([0], first_index=1.5), "first_index must be .* got 1.5"),
        (lambda pipe: pipe.sample([0], top_p=0.0), "top_p must be above 0"),
        (lambda pipe: pipe.sample([0], top_k=17), "top_k must be whole numbers"),
        (
            lambda pipe: pipe.sample([0], temperature=-1.0),
            "temperature must be 0, or at least",
        ),
        (lambda pipe: pipe.sample([0], temperature=[1.0]), "temperature takes one number"),
        (lambda pipe: pipe.sample([0], content_guidance=[1, 2, 3]), "5 values"),
        (lambda pipe: pipe.sample([0], flow_steps=0), "flow_steps must be a whole number"),
        (lambda pipe: pipe.sample([0], flow_steps=[2]), "flow_steps takes one number"),
        (lambda pipe: pipe.sample([0], gumbel="yes"), "gumbel must be True or False, got 'yes'"),
        (
            lambda pipe: pipe.sample([0], structure_noise=np.zeros((1, 4, 4))),
            r"structure_noise must have the shape \(1, 16, 4\)",
        ),
        (
            lambda pipe: pipe.sample([0], structure_noise=np.full((1, 16, 4), np.nan)),
            "structure_noise must be finite",
        ),
        (
            lambda pipe: pipe.sample([0], structure_noise="loud"),
            "structure_noise must be numbers",
        ),
        (lambda pipe: pipe.sample([0], token_stages=1), "need a `prefix` sequence"),
        (lambda pipe: pipe.sample([0], structure_stages=6), "structure_stages must be .* 0 .. 5"),
        (
            lambda pipe: pipe.sample([0], prefix=pipe.known, token_stages=3, structure_stages=1),
            "give at least structure_stages=3",
        ),
        (
            lambda pipe: pipe.sample([0], prefix=pipe.known, structure_stages=1),
            r"prefix.structure must be integers of shape \(1, 5, 16\), got int32 \(3, 5, 16\)",
        ),
        (
            lambda pipe: pipe.sample(
                [0, 1, 2],
                prefix=changed(
                    pipe.known, structure=moved(pipe.known.structure, np.s_[:, 0, :2], 1)
                ),
                structure_stages=1,
            ),
            "map of stage 0",
        ),
        (lambda pipe: pipe.sample([0, 1, 2], prefix=pipe.known), "Nothing of prefix is kept"),
        (lambda pipe: pipe.class_ids("12"), "list of class ids or names, got '12'"),
        (lambda pipe: pipe.class_ids(None), "list of class ids or names, got None"),
        (lambda pipe: pipe.class_id("9" * 5000), "Unknown class '999"),
        (lambda pipe: pipe.sample([0], structure_solves=(True,)), "must be a list of stages"),
        (lambda pipe: pipe.sample([0], structure_solves=(0.0,)), "must be a list of stages"),
        (lambda pipe: setattr(pipe, "settings", None), "must be nvg_jax.sampling.Settings, got N"),
        (
            lambda pipe: setattr(pipe, "settings", Settings(temperature=-1)),
            "temperature must be 0, or at least",
        ),
        (lambda pipe: Pipeline(pipe.metadata, pipe.params, np.dtype("float16")), "dtype must be"),
        (lambda pipe: pipe.encode(np.zeros((8, 8, 3), np.uint8)), r"give image\[None\]"),
        (lambda pipe: pipe.encode(np.zeros((1, 8, 9, 3), np.uint8)), "`prepare` makes a picture"),
        (lambda pipe: pipe.encode(np.full((1, 8, 8, 3), 2.0)), r"\[-1, 1\]"),
        (lambda pipe: pipe.encode(np.full((1, 8, 8, 3), np.nan)), r"\[-1, 1\]"),
        (lambda pipe: pipe.decode_canvas(np.zeros((16, 4))), r"shape \(batch, 16, 4\)"),
        (
            lambda pipe: pipe.decode(
                changed(pipe.known, structure=moved(pipe.known.structure, np.s_[:, 4, :2], 0))
            ),
            "map of stage 4",
        ),
        (
            lambda pipe: pipe.decode(
                changed(
                    pipe.known,
                    tokens=moved(
                        pipe.known.tokens, np.s_[:, 0, 0], (pipe.known.tokens[:, 0, 0] + 1) % 16
                    ),
                )
            ),
            "stage 0 differ",
        ),
        (
            lambda pipe: pipe.decode(changed(pipe.known, tokens=pipe.known.tokens + 99)),
            "Token ids",
        ),
        (
            lambda pipe: pipe.decode(jax.tree.map(lambda x: x[:0], pipe.known)),
            r"shape \(batch, 5, 16\), got int32 \(0, 5, 16\)",
        ),
    ],
)
def test_wrong_use_of_a_pipeline_gets_a_sentence(pipe, images, call, message):
    pipe.known = pipe.encode(images)
    with pytest.raises(UserError, match=message):
        call(pipe)


def test_an_unknown_setting_is_named(pipe):
    with pytest.raises(TypeError, match="'temprature'; there are temperature, top_k"):
        pipe.sample([0], temprature=1.0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda folder: Pipeline.from_pretrained(folder / "nowhere"), "There is no folder"),
        (lambda folder: Pipeline.from_pretrained(folder), "no trained tokenizer"),
        (lambda folder: train(tiny_config(part="everything"), folder), "Unknown part"),
        (
            lambda folder: train(tiny_config(dtype="float16"), folder),
            "dtype must be float32 or bfloat16, got 'float16'",
        ),
        (lambda folder: train(tiny_config(tokenizer_workdir="x"), folder), "Leave it empty"),
        (lambda folder: train(tiny_config(part="content"), folder), "need a trained tokenizer"),
        (
            lambda folder: (
                random_pipeline().save_pretrained(folder) or train(tiny_config(), folder)
            ),
            "holds an exported model, which would hide the one that is trained there",
        ),
        (
            lambda folder: train(tiny_config(tokenizer_training={"eval_images": -1}), folder),
            "tokenizer_training.eval_images must be 0 or more, got -1",
        ),
    ],
)
def test_wrong_use_of_a_folder_gets_a_sentence(tmp_path, call, message):
    with pytest.raises(UserError, match=message):
        call(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(content=dict(width=100)), "width"),
        (dict(sampling=dict(top_p=(2.0, 2.0))), "top_p must be"),
        (dict(generator_training=dict(length="5")), "A training length is"),
        (dict(generator_training=dict(optimizer=dict(schedule="cosin"))), "schedule 'cosin'"),
        (dict(generator_training=dict(batch_size=2000)), "larger than the 1497 training"),
    ],
)
def test_settings_of_a_later_part_are_checked_before_the_first_is_trained(
    tmp_path, changes, message
):
    with pytest.raises(UserError, match=message):
        train(tiny_config(**changes), tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_export_does_not_hide_a_run(pipe, trained):
    with pytest.raises(UserError, match="holds a training run"):
        pipe.save_pretrained(trained)


def command(*arguments):
    """Runs a module and returns its error output."""
    done = forked("-m", *arguments)
    assert done.returncode == 0 or "error:" in done.stderr, done.stderr
    return done.stderr


def test_mistakes_on_the_command_line_end_in_a_sentence(tmp_path, trained):
    for output, message in (
        (command("nvg_jax.train", "--config=configs/digits.py",
                "--config.generator_training.lr=3", f"--workdir={tmp_path}"),
         "no config.generator_training.lr. config.generator_training has batch_size,"),
        (command("nvg_jax.sample", f"--workdir={trained}", f"--out={tmp_path}", "--classes=11"),
         "error: Unknown class 11"),
        (command("nvg_jax.evaluate", f"--workdir={trained}", "--pad=2"), "flag 'pad'"),
    ):  # fmt: skip
        assert message in output and "Traceback" not in output


def test_too_few_held_out_images_are_an_error_before_anything_is_sampled(
    pipe, tmp_path, monkeypatch
):
    monkeypatch.setitem(sets.MAX_IMAGES, "test", 3)
    with pytest.raises(UserError, match="digits has 3 held-out images, .* needs at least 4"):
        classification.report(pipe, pipe.metadata.config["data"], None, tmp_path, 64)


def test_the_command_lines_write_pictures_and_metrics(trained, pipe, tmp_path):
    sample = ("nvg_jax.sample", f"--workdir={trained}", "--classes=0,1", "--per_class=3")
    command(*sample, f"--out={tmp_path / 'pictures'}")
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {"000000_0.png", "000005_1.png", "grid.png", "stages.png"} <= names
    images = to_uint8(pipe.sample([0, 0, 0, 1, 1, 1], seed=0).images)
    first = np.asarray(Image.open(tmp_path / "pictures" / "000003_1.png"))
    assert np.abs(first.astype(int) - images[3]).max() <= 1
    command("nvg_jax.evaluate", f"--workdir={trained}", "--num_samples=20", f"--out={tmp_path}")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["samples"] == 20 and metrics["classifier_accuracy_on_real_test_images"] > 0.98
    assert 0 <= metrics["class_agreement"] <= 1 and metrics["test_psnr"] > 0
    made = {"seed": 0, "flow_steps": 2, "judge": "classifier"}  # and all else that it depends on
    assert made.items() <= metrics.items() and metrics["data"]["name"] == "digits"


@pytest.mark.parametrize("dtype, name", [("bfloat16", "bf16"), ("float16", "f16")])
def test_half_precision_samples_and_decodes_but_encodes_in_float32(
    trained, pipe, images, dtype, name
):
    fast = Pipeline.from_pretrained(trained, dtype=dtype)
    sequence = pipe.encode(images)
    jax.tree.map(np.testing.assert_array_equal, fast.encode(images), sequence)
    error = np.abs(fast.decode(sequence) - pipe.decode(sequence)).max()
    assert 0 < error < 0.05
    out = fast.sample([1, 2, 3], seed=0)
    assert out.images.dtype == np.float32 and is_even_hierarchy(out.sequence.structure).all()
    plan, values = fast.program.plan(fast.settings)
    with jax.set_mesh(sharding.make_mesh()):
        arguments = fast.program.arguments(2, values, sharding.make_mesh())
        text = fast.program.sample.lower(*arguments, plan=plan).as_text()
    width = fast.metadata.model.structure.width
    products = re.findall(rf"dot_general.*tensor<{width}x{4 * width}x(\w+)>\) ->", text)
    assert products and set(products) == {name}
    with pytest.raises(UserError, match="float32 or bfloat16 or float16, got 'half'"):
        Pipeline.from_pretrained(trained, dtype="half")
