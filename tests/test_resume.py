"""Going on with a run: what may change, going back, leaving out bad steps."""

import dataclasses
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import read_meta, tiny_config
from test_end_to_end import weights

from nvg_jax.data import LoaderOptions, Transform, open_source, train_batches
from nvg_jax.data.sources import FolderSource
from nvg_jax.errors import UserError
from nvg_jax.metadata import RunMetadata
from nvg_jax.models import ModelConfig
from nvg_jax.parts import CHOICES, TOKENIZER
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime import sharding
from nvg_jax.runtime.checkpoint import Checkpoints
from nvg_jax.train import train
from nvg_jax.training import checks, registry, resume, run
from nvg_jax.training.changes import Resume, check_changes
from nvg_jax.training.length import Origin, step_of, training_length
from nvg_jax.training.metrics import check_steps, summarize
from nvg_jax.training.state import FAR_ABOVE, NORMS, Skipping

SECTION = "tokenizer_training"


def metadata(num_images=100, **changes) -> RunMetadata:
    config = tiny_config()
    config[SECTION].update(changes)
    model = ModelConfig.from_config(config, num_classes=2).only()
    content = RunMetadata(model, ("cat", "dog"), config=config.to_dict(), num_images=num_images)
    return RunMetadata.from_json(content.to_json())


# What may change.


def test_the_refusal_names_every_setting_that_changed_and_how_to_allow_it(tmp_path):
    stored = metadata(length="150 steps", optimizer=dict(learning_rate=1e-3))
    new = metadata(length="300 steps", optimizer=dict(learning_rate=5e-4))
    with pytest.raises(UserError) as error:
        check_changes(stored, new, SECTION, tmp_path)
    for text in (
        "tokenizer_training.length = '150 steps', now '300 steps'",
        "tokenizer_training.optimizer.learning_rate = 0.001, now 0.0005",
        "add --allow_changes=length,learning_rate.",
    ):
        assert text in str(error.value)
    with pytest.raises(UserError, match=r"rate = .* --allow_changes=length,learning_rate\.$"):
        check_changes(stored, new, SECTION, tmp_path, ["length"])
    for allowed in (["length", "learning_rate"], [SECTION], ["length", "optimizer"]):
        check_changes(stored, new, SECTION, tmp_path, allowed)
    with pytest.raises(UserError, match="learning_rate = "):
        check_changes(stored, new, SECTION, tmp_path, ["length", "rate", "content"])


def test_what_follows_from_the_length_may_change_with_it(tmp_path):
    stored = metadata(length="150 steps", optimizer=dict(warmup_steps=7, ema_decay=0.8))
    new = metadata(length="300 steps", optimizer=dict(warmup_steps=15, ema_decay=0.9))
    with pytest.raises(UserError, match=r"length = '150 steps', now '300 steps'\. .*=length\.$"):
        check_changes(stored, new, SECTION, tmp_path)
    check_changes(stored, new, SECTION, tmp_path, ["length"])
    new = metadata(length="150 steps", optimizer=dict(warmup_steps=15, ema_decay=0.8))
    with pytest.raises(UserError, match="warmup_steps = 7, now 15"):
        check_changes(stored, new, SECTION, tmp_path, ["length"])


def test_the_optimizer_never_changes(tmp_path):
    new = metadata()
    new.config["generator_training"]["optimizer"]["name"] = "muon"
    with pytest.raises(UserError, match="optimizer.name = 'adamw', now 'muon'. Its checkp"):
        check_changes(metadata(), new, "generator_training", tmp_path, ["optimizer", "name"])


def test_what_any_weights_fit_may_change(tmp_path):
    """Half the devices need `remat`; the rate of dropped blocks is of the recipe."""

    def of(**content) -> RunMetadata:
        config = tiny_config(content=content)
        model = ModelConfig.from_config(config, num_classes=2)
        content = RunMetadata(model, ("cat", "dog"), config=config.to_dict(), num_images=100)
        return RunMetadata.from_json(content.to_json())

    check = lambda new, *allowed: check_changes(of(), new, "generator_training", tmp_path, allowed)
    check(of(remat="blocks"))
    with pytest.raises(UserError, match=r"content.drop_path = .* --allow_changes=drop_path\.$"):
        check(of(drop_path=0.3))
    check(of(drop_path=0.3), "drop_path")
    with pytest.raises(UserError, match="content.width = 32, now 64. Its checkpoints only fit"):
        check(of(width=64), "width")


def test_processes_that_see_other_data_are_told_apart(monkeypatch):
    source = lambda *files: FolderSource(Path("/data"), files, ("a", "b"))
    test = source("a/9.png")

    def facts(train):
        found = []
        monkeypatch.setattr(run, "from_all", lambda own: found.append(own) or own[None])
        run.check_same_data(train, test)
        return found[0]

    monkeypatch.setattr(run.jax, "process_count", lambda: 2)
    own, others = source("a/1.png", "b/2.png"), (source("a/1.png"), source("a/1.png", "b/3.png"))
    for other, counts in zip(others, ("1 training", "2 training")):
        there = facts(other)
        monkeypatch.setattr(run, "from_all", lambda own, there=there: np.stack([own, there]))
        with pytest.raises(UserError, match=f"Process 1 sees other data .*: {counts} and 1 held-"):
            run.check_same_data(own, test)
    there = facts(source("a/1.png", "b/2.png"))
    monkeypatch.setattr(run, "from_all", lambda own: np.stack([own, there]))
    run.check_same_data(own, test)


def test_a_batch_that_is_all_unreadable_has_no_say_in_the_average():
    mask = lambda *valid: {"mask": jnp.array(valid)}
    batches = [mask(True, True), mask(False, False), mask(True, False)]
    losses = iter([1.0, float("nan"), 4.0])
    found = run.Run.test_metrics(
        types.SimpleNamespace(test_batches=lambda _: batches, check_readable=lambda any_: None),
        tiny_config().tokenizer_training,
        lambda batch: {"loss": next(losses)},
    )
    assert found == {"loss": 2.0}


def test_a_student_goes_on_only_with_the_sampling_that_its_teacher_recommended(tmp_path):
    old = metadata().replace(teacher="a fingerprint")
    new = RunMetadata.from_json(old.to_json())
    new.config["sampling"]["solver"] = "heun"
    with pytest.raises(UserError, match="sampling.solver = 'euler', now 'heun'"):
        check_changes(old, new, "distillation", tmp_path)
    old, new = (content.replace(teacher=None) for content in (old, new))
    check_changes(old, new, "generator_training", tmp_path)  # of the samples of an evaluation


def test_the_size_of_the_data_set_may_change_on_purpose(tmp_path):
    with pytest.raises(UserError, match="data.num_images = 100, now 120.* --allow_changes=data"):
        check_changes(metadata(), metadata(120), SECTION, tmp_path)
    check_changes(metadata(), metadata(120), SECTION, tmp_path, ["data"])


@pytest.mark.slow
def test_a_tokenizer_that_generators_were_trained_with_stays_as_it_is(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    for part, step in (("all", None), ("tokenizer", None), ("tokenizer", 8)):
        config = tiny_config(part=part)
        config.tokenizer_training.length = "16 steps"
        with pytest.raises(UserError, match="generators was trained with the tokenizer in .*move"):
            train(config, workdir, ["length"], step)
    # Its last steps are repeated if their checkpoint is damaged: the generators fit again.
    metadata = workdir / "tokenizer" / "12" / "meta" / "metadata"
    metadata.write_text(metadata.read_text()[:-2])
    train(tiny_config(), workdir)
    assert (workdir / "tokenizer" / "damaged_12").exists()
    assert (
        Pipeline.from_pretrained(workdir).fingerprint
        == Pipeline.from_pretrained(trained).fingerprint
    )


def test_the_sizes_of_the_weights_never_change(tmp_path):
    new = metadata()
    sizes = dataclasses.replace(new.model.tokenizer, codebook_size=32)
    new = new.replace(model=dataclasses.replace(new.model, tokenizer=sizes))
    with pytest.raises(UserError, match="tokenizer.codebook_size = 16, now 32. .*another workdir"):
        check_changes(metadata(), new, SECTION, tmp_path, ["tokenizer", "codebook_size"])


@pytest.mark.parametrize(
    "part, resume, message",
    [
        (
            "all",
            Resume(("lerning_rate",)),
            "no setting 'lerning_rate'. Did you mean 'learning_rate",
        ),
        ("all", Resume(step=5), "step of one part, and part=all trains tokenizer and generators"),
    ],
)
def test_flags_that_cannot_be_meant(part, resume, message):
    with pytest.raises(UserError, match=message):
        checks.check_resume(tiny_config(part=part), CHOICES[part], resume)
    checks.check_resume(tiny_config(), (TOKENIZER,), Resume(("data", "clip"), step=5))


# Epochs and data after a change.


def test_epochs_count_the_images_that_were_seen():
    # 1,000 images. 10 epochs in batches of 10 are 1,000 steps; after 300 of them, 7,000 images are
    # left: 350 batches of 20.
    assert training_length("10 epochs", 1000, 20, Origin(300, 3000)) == 650
    assert training_length("400 steps", 1000, 20, Origin(300, 3000)) == 400
    # The first epoch was over at step 100, whatever the batch is now.
    assert step_of(1.0, 1000, 20, Origin(300, 3000)) <= 300


@pytest.mark.parametrize("batch_size", [2, 5, 7])
def test_data_go_on_after_the_images_seen(batch_size):
    source, transform = open_source("digits", "test"), Transform((8, 8), resize=9, pad=1)
    ones = train_batches(
        source, LoaderOptions(transform, process_batch_size=1, num_threads=1), seed=3
    )
    every = [next(ones)["image"][0] for _ in range(30)]
    options = LoaderOptions(transform, process_batch_size=batch_size, num_threads=1)
    batches = train_batches(source, options, seed=3, skip=12)
    for start in (12, 12 + batch_size):
        np.testing.assert_array_equal(
            next(batches)["image"], np.stack(every[start : start + batch_size])
        )


# Leaving out steps.


def test_norms_far_above_the_median_or_not_finite_are_left_out():
    skipping, update = Skipping.create(["grad_norm"]), jax.jit(Skipping.update)
    taken = []

    def see(norm):
        nonlocal skipping
        skipping, left_out = update(skipping, {"grad_norm": jnp.float32(norm), "loss": 0.0})
        taken.append(not left_out)
        return taken[-1], int(skipping.in_a_row)

    assert see(np.nan) == (False, 1) and see(np.inf) == (False, 2)
    for number in range(NORMS):  # too few norms to compare with: 1, 2, 3, 1, 2, 3, ...
        assert see(1000.0 if number == 5 else 1 + number % 3) == (True, 0)
    assert see(2 * FAR_ABOVE) == (True, 0)
    assert see(2.1 * FAR_ABOVE) == (False, 1) and see(np.nan) == (False, 2)
    assert see(3.0) == (True, 0)
    steps = 0
    while not see(50.0)[0]:  # a lasting change: half of the norms are new ones in the end
        steps += 1
    assert NORMS / 2 - 5 <= steps <= NORMS / 2 + 5


def window(*steps):
    return [
        {"a_loss": np.float32(loss), "grad_norm": np.float32(1), **more} for loss, more in steps
    ]


def left_out(in_a_row):
    return {"skipped": np.int32(in_a_row > 0), "skipped_in_a_row": np.int32(in_a_row)}


def test_steps_left_out_are_counted_and_in_no_mean():
    steps = window((1, left_out(0)), (np.nan, left_out(1)), (7, left_out(2)), (3, left_out(0)))
    check_steps(steps, "tokenizer", 40, max_skipped=2, checkpoint=None)
    assert summarize(steps) == {"skipped_steps": 2, "a_loss": 2, "grad_norm": 1}
    assert summarize(steps[1:3]) == {"skipped_steps": 2}
    with pytest.raises(UserError, match="tokenizer: 2 steps in a row were left out up to step 39"):
        check_steps(steps, "tokenizer", 40, max_skipped=1, checkpoint=None)


def test_a_run_that_diverged_says_what_there_is_to_go_on_from():
    steps = window((1, {}), (np.nan, {}))
    with pytest.raises(UserError) as error:
        check_steps(steps, "generators", 40, 0, checkpoint=None)
    assert "generators: a_loss is nan at step 40. There is no checkpoint yet" in str(error.value)
    assert "--config.generator_training.max_skipped_steps=10" in str(error.value)
    assert "allow_changes" not in str(error.value)
    with pytest.raises(UserError, match="is of step 30.* --allow_changes=.* --resume_step=N"):
        check_steps(steps, "generators", 40, 0, checkpoint=30)


@pytest.mark.slow
def test_a_second_process_changes_nothing_of_a_run(trained, tmp_path):
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    with (
        Checkpoints(tmp_path / "tokenizer"),
        pytest.raises(UserError, match="Another command is writing to .*tokenizer"),
    ):
        train(tiny_config(part="tokenizer"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_a_run_whose_checkpoint_to_go_back_to_was_damaged_went_back():
    change = {"step": 4, "images": 64, "settings": {}, "resume_step": 8}
    later = metadata().replace(changes=(change,), step=9)
    assert later.went_back_to(8) and not later.went_back_to(6)
    # Settings that changed at a step are no return to it.
    changed = {"step": 4, "images": 64, "settings": {"seed": [0, 1]}}
    assert not metadata().replace(changes=(changed,), step=9).went_back_to(4)
    assert not metadata().replace(step=9).went_back_to(8)


def test_a_checkpoint_to_go_back_to_that_was_found_damaged_is_not_missed(tmp_path):
    """A launcher repeats --resume_step; the run was killed before it saved again."""
    run = types.SimpleNamespace(workdir=tmp_path, resume=Resume(step=8))
    trainer = types.SimpleNamespace(part=TOKENIZER)
    step = lambda: resume.step_to_go_back_to(trainer, run, metadata().replace(step=4), metadata())
    assert step() == 8
    (tmp_path / "tokenizer" / "damaged_8").mkdir(parents=True)
    assert step() == 4
    later = metadata().replace(step=9)  # it was damaged long ago
    assert resume.step_to_go_back_to(trainer, run, later, metadata()) == 8
    (tmp_path / "tokenizer" / "8").mkdir()  # it came there again
    assert step() == 8


def skipping_config():
    config = tiny_config(part="tokenizer")
    config.tokenizer_training.max_skipped_steps = 2
    config.tokenizer_training.optimizer.learning_rate = 5e-4
    return config


@pytest.mark.slow
def test_a_step_that_is_left_out_changes_only_counts():
    """The optimizer's, too, by which it finds the learning rate of a step."""
    config = skipping_config()
    mesh, model = sharding.make_mesh(), ModelConfig.from_config(config, num_classes=10)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (16, 8, 8, 3)).astype(np.float32)
    batch = {"image": images, "label": np.zeros(16, np.int32)}
    with sharding.in_mesh(mesh):
        # The trainer of the run below, whose settings change after 4 steps of 16 images.
        trainer = registry.make_trainer(TOKENIZER, config, model, mesh, 1497)
        trainer = trainer.restated(Origin(4, 64))
        state = trainer.jit_init_state(jax.random.key(0), {})
        state, metrics = trainer.jit_train_step(
            state, {}, batch, jax.random.key(1), index_backprop=False
        )
        assert not metrics["skipped"] and state.step == 1
        before = jax.tree.map(np.asarray, state)
        bad = batch | {"image": np.full_like(images, np.nan)}
        state, metrics = trainer.jit_train_step(
            state, {}, bad, jax.random.key(1), index_backprop=False
        )
    assert metrics["skipped"] and metrics["skipped_in_a_row"] == 1 and state.step == 2

    def check(path, after, old):
        is_count = np.issubdtype(old.dtype, np.integer)
        counted.extend([jax.tree_util.keystr(path)] * is_count)
        np.testing.assert_array_equal(after, old + is_count)

    counted = []
    jax.tree_util.tree_map_with_path(
        check, state.replace(skipping=None), before.replace(skipping=None)
    )
    assert ".step" in counted and [name for name in counted if "opt_state" in name]
    jax.tree.map(np.testing.assert_array_equal, state.skipping.norms, before.skipping.norms)


# Runs.


@pytest.mark.slow
def test_going_back_with_steps_that_may_be_left_out(trained, tmp_path):
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    config = skipping_config()
    back = dict(allow_changes=["learning_rate", "max_skipped_steps"], resume_step=4)
    train(config, tmp_path, **back)
    meta = read_meta(tmp_path / "tokenizer")
    assert meta["step"] == 12 and [change["step"] for change in meta["changes"]] == [4]
    whole = weights(tmp_path / "tokenizer")
    assert whole["skipping"]["count"] == 8
    # From the middle on, as a launcher starts it again: the statistic goes on, too.
    (tmp_path / "tokenizer" / "12").rename(tmp_path / "removed")
    train(config, tmp_path, **back)
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "tokenizer"), whole)
