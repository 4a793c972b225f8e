"""The training loop with a model of one number: what it evaluates, and when."""

import json
import logging
import os
import shutil
import signal
import time
import types
from unittest.mock import MagicMock

import numpy as np
import pytest
from helpers import logged, tiny_config
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from nvg_jax.errors import UserError
from nvg_jax.metadata import RunMetadata, read_export_metadata, read_metadata
from nvg_jax.models import ModelConfig
from nvg_jax.parts import TOKENIZER
from nvg_jax.runtime import preemption, sharding
from nvg_jax.runtime.checkpoint import Checkpoints
from nvg_jax.runtime.storage import storage_path
from nvg_jax.training import loop, metrics, weights_and_biases
from nvg_jax.training.changes import NEWEST, Resume
from nvg_jax.training.length import START, training_length
from nvg_jax.training.resume import standing
from nvg_jax.training.watching import memory_in_use

STEPS = 6


class Batches:
    """An endless iterator over the numbers 0, 1, ..., that can be resumed.

    A number is the first image of a batch, over 16.
    """

    def __init__(self, batch_size, seed, skip):
        self.position, self.batch_size, self.skip = 0, batch_size, skip

    def __next__(self):
        number = (self.skip + self.position * self.batch_size) / 16
        self.position += 1
        return {"image": np.full((1, 1), number, np.float32)}

    def get_state(self):
        return self.position

    def set_state(self, position):
        self.position = position

    def close(self):
        pass


class Sum:
    """Trains the sum of its batches; its FID is 10 minus the sum."""

    part, STEP_KEY, DATA_SEED, num_images = TOKENIZER, 0, 0, None
    abstract_state = {"sum": np.zeros((1, 1), np.float32)}

    def __init__(self, recipe, origin=START):
        self.recipe, self.origin = recipe, origin
        self.steps = training_length(recipe.length, 96, recipe.batch_size, origin)
        self.evaluated = []
        self.interrupted = False  # by SIGTERM, in an evaluation

    def open(self, run):
        config = tiny_config()
        model = ModelConfig.from_config(config, 1).only()
        return {}, RunMetadata(model, ("a",), config=run.config.to_dict(), steps=self.steps)

    def first_state(self, run, inputs):
        return self.abstract_state

    def stored_state(self, metadata):
        return self.abstract_state

    def resumed(self, state):
        return state

    def restated(self, origin):
        self.__init__(self.recipe, origin)
        return self

    def index_backprop(self, step):
        return False

    def jit_train_step(self, state, inputs, batch, key, index_backprop):
        state = {"sum": state["sum"] + np.asarray(batch["image"])}
        return state, {"sum_loss": state["sum"][0, 0]}

    def schedule(self, step):
        return np.float32(1)

    def evaluate(self, run, state, inputs, metadata):
        if self.interrupted:
            raise preemption.Preempted("preempted during an evaluation")
        self.evaluated.append((float(state["sum"][0, 0]), metadata.fingerprint))
        return {"sum": state["sum"][0, 0]}, None

    def finish(self, run, state, metadata):
        return metadata.replace(fingerprint="finished")

    def export(self, run, state, inputs):
        return state


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Trains `Sum` in a folder: (SIGTERM's step, what an evaluation and a score do) -> it."""
    base = tiny_config()
    base.tokenizer_training.update(save_every=2, eval_every=2, fid_every=3, log_every=1, keep=2)
    base.tokenizer_training.length = f"{STEPS} steps"
    monkeypatch.setattr(sharding, "global_batch", lambda batch, mesh: batch)

    def fit(sigterm_at=None, in_evaluation=False, in_score=False, resume=NEWEST, **changes):
        calls = iter(range(1, 100))
        monkeypatch.setattr(preemption, "noticed", lambda: next(calls) == sigterm_at)
        config = ConfigDict(base)
        config.profile_steps = changes.pop("profile_steps", ())
        config.wandb_project = changes.pop("wandb_project", "")
        config.tokenizer_training.update(changes)
        trainer = Sum(config.tokenizer_training)
        trainer.interrupted = in_evaluation

        def score(metadata, params):
            if in_score:
                raise preemption.Preempted("preempted while measuring")
            return 20 - params["sum"].item()

        run = types.SimpleNamespace(
            config=config,
            workdir=storage_path(tmp_path),
            mesh=None,
            key=0,
            train_batches=Batches,
            resume=resume,
            config_json=lambda: json.loads(json.dumps(config.to_dict())),
        )
        monkeypatch.setattr("jax.random.fold_in", lambda key, data: key)
        trainer, fit.start = standing(trainer, run)
        fit.steps = trainer.steps
        loop.fit(trainer, run, score)
        return trainer.evaluated

    return fit


def assert_complete(folder):
    """Everything that an undisturbed run logs and keeps: the sums of 0 .. step - 1."""
    values = logged(folder / "tokenizer")
    assert {s: v for (tag, s), v in values.items() if tag == "test_sum"} == {2: 1, 4: 6, 6: 15}
    assert {s: v for (tag, s), v in values.items() if tag == "fid"} == {3: 17, 6: 5}
    best = read_export_metadata(storage_path(folder / "best_tokenizer"))
    assert (best.step, best.fid, best.fingerprint) == (6, 5.0, "finished")


def test_a_finished_run_is_not_evaluated_again(fit, tmp_path):
    assert fit() == [(1.0, None), (6.0, None), (15.0, "finished")]
    assert_complete(tmp_path)
    assert fit() == []


@pytest.mark.parametrize("step", [4, 6])
def test_what_a_preempted_step_owes_is_made_up_for(fit, tmp_path, step):
    with pytest.raises(preemption.Preempted):
        fit(sigterm_at=step)
    if step == STEPS:
        assert fit() == [(15.0, "finished")]
    else:
        assert fit() == [(6.0, None), (15.0, "finished")]
    assert_complete(tmp_path)


def test_an_interrupted_measurement_is_made_up_for(fit, tmp_path):
    """First SIGTERM interrupts the FID of step 3, then evaluations, then the FID of step 6."""
    for again in (dict(in_score=True), dict(in_evaluation=True), dict(in_score=True)):
        with pytest.raises(preemption.Preempted):
            fit(**again)
    fit()
    assert_complete(tmp_path)


# Changing a run on purpose.


def test_a_finished_run_is_extended_with_a_larger_batch(fit, tmp_path, caplog):
    fit()
    with pytest.raises(UserError, match="length = '6 steps', now '8 steps'.* --allow_changes=len"):
        fit(length="8 steps")
    change = dict(length="2 epochs", batch_size=32)  # of 96 images: 3 steps of 32 are left
    with caplog.at_level(logging.INFO, "nvg_jax"):
        evaluated = fit(resume=Resume(("length", "batch_size")), **change)
    assert "tokenizer: changed at step 6, after 96 images: tokenizer_training.batch" in caplog.text
    assert evaluated == [(15.0 + 6 + 8, None), (15.0 + 6 + 8 + 10, "finished")]
    assert (fit.start, fit.steps) == (6, 9)  # known before the first step, for the forecast
    stored = read_metadata(tmp_path / "tokenizer")
    settings = {"batch_size": [16, 32], "length": ["6 steps", "2 epochs"]}
    settings = {f"tokenizer_training.{name}": values for name, values in settings.items()}
    assert stored.changes == ({"step": 6, "images": 96, "settings": settings},)
    assert (stored.step, stored.steps) == (9, 9)
    assert fit(**change) == []  # what was allowed once is part of the run


def test_a_run_that_went_back_does_so_once(fit, tmp_path, caplog):
    fit(keep=9)
    back = dict(resume=Resume(("batch_size",), step=2), keep=9, batch_size=32)
    with pytest.raises(preemption.Preempted):
        fit(sigterm_at=3, **back)  # after the fifth step
    folder = tmp_path / "tokenizer"
    assert {path.name for path in folder.glob("abandoned_*")} == {"abandoned_4", "abandoned_6"}
    # A launcher gives the same flags. 0 + 1, then the images from 32 on in batches of 32: 2, 4, ...
    assert fit(**back)[-1] == (1.0 + 2 + 4 + 6 + 8, "finished")
    assert [change["step"] for change in read_metadata(folder).changes] == [2]
    # Other settings go back again.
    fit(**back | dict(resume=Resume(("batch_size",), step=2), batch_size=48))
    assert (folder / "abandoned_4_1").is_dir()


def test_a_run_is_not_shortened_to_less_than_it_has(fit):
    with pytest.raises(preemption.Preempted):
        fit(sigterm_at=5)
    with pytest.raises(UserError, match="length = '4 steps' is 4 steps, and the .* is of step 5"):
        fit(resume=Resume(("length",)), length="4 steps")
    fit(length="6 steps")
    with pytest.raises(UserError, match="length = '4 steps' is 4 steps, and the .* is of step 6"):
        fit(resume=Resume(("length",)), length="4 steps")


def test_going_back_in_an_empty_folder_is_refused(fit, tmp_path):
    """As with a typo in --workdir."""
    with pytest.raises(UserError, match="--resume_step=4: there is no checkpoint in .*--workdir"):
        fit(resume=Resume(step=4))
    assert not list(tmp_path.iterdir())


def test_what_was_noted_of_abandoned_steps_does_not_count(fit, tmp_path):
    fit(save_every=1, keep=9)  # FID 5
    back = dict(resume=Resume(("batch_size",), step=5), batch_size=8, keep=9)
    with pytest.raises(preemption.Preempted):
        fit(sigterm_at=1, **back)  # after the new step 6: 0 + 1 + 2 + 3 + 4, then image 80 / 16
    assert fit(**back) == [(15.0, "finished")]
    fit(**back | dict(resume=Resume(("batch_size",), step=2), batch_size=4))
    # 0 + 1, then the images 32, 36, ... over 16: the best of this run, not of the other one.
    best = read_export_metadata(storage_path(tmp_path / "best_tokenizer"))
    assert (best.step, best.fid) == (6, 20 - (1 + 2 + 2.25 + 2.5 + 2.75))


# Ctrl-C, as the stop button of a notebook sends it.


@pytest.fixture
def fit_in_notebook(tmp_path, monkeypatch, foreground):
    """Trains `Sum`; SIGINT comes while the batches of these numbers are loaded."""

    def fit_in_notebook(*at):
        config, seen = ConfigDict(tiny_config()), iter(range(1, 100))
        config.tokenizer_training.update(length=f"{STEPS} steps", log_every=1, save_every=100)

        def place(batch, mesh):
            if next(seen) in at:
                os.kill(os.getpid(), signal.SIGINT)
            return batch

        monkeypatch.setattr(sharding, "global_batch", place)
        monkeypatch.setattr("jax.random.fold_in", lambda key, data: key)
        run = types.SimpleNamespace(
            config=config, workdir=storage_path(tmp_path), mesh=None, key=0,
            train_batches=Batches, resume=NEWEST,
        )  # fmt: skip
        trainer = Sum(config.tokenizer_training)
        preemption.interruptible()(loop.fit)(trainer, run)
        return trainer.evaluated

    return fit_in_notebook


def test_the_stop_button_saves_after_the_step(fit_in_notebook, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="tokenizer: saved at step 3 of 6. The same"):
        fit_in_notebook(3)
    assert read_metadata(tmp_path / "tokenizer").step == 3
    assert signal.getsignal(signal.SIGINT) is handler
    assert fit_in_notebook() == [(15.0, "finished")]


@pytest.mark.parametrize("at", [(1,), (3, 3)])
def test_before_the_first_step_and_the_second_time_it_ends_at_once(
    fit_in_notebook, tmp_path, at, monkeypatch
):
    if len(at) == 2:
        kill = os.kill
        monkeypatch.setattr(os, "kill", lambda *arguments: [kill(*arguments), kill(*arguments)])
    with pytest.raises(KeyboardInterrupt) as error:
        fit_in_notebook(*at)
    assert not str(error.value)
    assert read_metadata(tmp_path / "tokenizer") is None
    assert fit_in_notebook() == [(15.0, "finished")]  # nothing of the request is left


# Watching.


def test_after_a_resume_tensorboard_shows_each_step_once(fit, tmp_path):
    with pytest.raises(preemption.Preempted):
        fit(sigterm_at=5, save_every=4)
    folder = tmp_path / "tokenizer"
    shutil.rmtree(folder / "5")  # as after a crash: the fifth step is done again
    fit(save_every=4)
    events = EventAccumulator(str(folder)).Reload()
    values = events.Tensors("sum_loss")
    assert [(event.step, event.tensor_proto.float_val[0]) for event in values] == [
        (1, 0), (2, 1), (3, 3), (4, 6), (5, 10), (6, 15)
    ]  # fmt: skip


def test_a_profile_is_one_that_tensorboard_finds(fit, tmp_path, monkeypatch):
    fit(profile_steps=(2, 3))
    (trace,) = (tmp_path / "tokenizer" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert b"train" in trace.read_bytes()


def test_every_step_that_compiles_may_take_long(fit, monkeypatch):
    steps, patience = [-1], {}
    monkeypatch.setattr(Sum, "index_backprop", lambda trainer, step: steps.append(step) or step < 3)
    reset = lambda slow=False: patience.setdefault(steps[-1], []).append(slow)
    monkeypatch.setattr(loop.watchdog, "reset", reset)
    fit()
    # Of every step, the first is before its batch, the second before it is taken.
    slow = {step: slow[:2] for step, slow in patience.items() if step >= 0}
    assert slow == {step: [True, step in (0, 3)] for step in range(len(slow))} and len(slow) > 4


def test_the_log_says_where_the_time_went(fit, tmp_path, monkeypatch, caplog):
    """By a clock that runs only in batches, 1 s, evaluations, 2 s, and saves, 3 s."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def taking(seconds, owner, name):
        function = getattr(owner, name)

        def slow(*arguments):
            now[0] += seconds
            return function(*arguments)

        monkeypatch.setattr(owner, name, slow)

    taking(1.0, Batches, "__next__")
    taking(2.0, Sum, "evaluate")
    taking(3.0, Checkpoints, "save")
    with caplog.at_level(logging.INFO, "nvg_jax"):
        fit()
    shares = "steps 0%  data 29%  compiling 0%  saving 43%  evaluating 29%"  # of 6 + 6 + 9 = 21 s
    assert f"tokenizer: 6  time since the start: {shares}" in caplog.text
    values = logged(tmp_path / "tokenizer")
    # Since the line of step 2: its save, its evaluation, and the batch of step 3.
    of_step_3 = {n: values[f"goodput/{n}", 3] for n in ("steps", "data", "saving", "evaluating")}
    assert of_step_3 == pytest.approx(dict(steps=0, data=1 / 6, saving=3 / 6, evaluating=2 / 6))
    assert values["goodput_total/data", 3] == pytest.approx(3 / 8)


def test_memory_of_devices_that_say_it(monkeypatch):
    device = lambda used: types.SimpleNamespace(
        memory_stats=lambda: used and {"bytes_in_use": used * 2**30, "peak_bytes_in_use": 2**33}
    )
    monkeypatch.setattr("jax.local_devices", lambda: [device(1), device(3)])
    assert memory_in_use() == {"device_memory_gib": 3, "device_memory_peak_gib": 8}
    monkeypatch.setattr("jax.local_devices", lambda: [device(None)])
    assert memory_in_use() == {}


@pytest.mark.slow
def test_weights_and_biases_offline(fit, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    fit(wandb_project="nvg")
    name = (tmp_path / "tokenizer" / "wandb_id.txt").read_text()
    (log,) = (tmp_path / "tokenizer" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb")
    content = log.read_bytes()
    assert all(word in content for word in (b"sum_loss", b"test_sum", b"goodput/data", b"nvg"))


def test_an_interrupted_last_evaluation_goes_to_weights_and_biases(fit, monkeypatch):
    writer, project = MagicMock(), dict(wandb_project="nvg", eval_every=STEPS, fid_every=STEPS)
    monkeypatch.setattr(metrics, "WandbWriter", writer)
    with pytest.raises(preemption.Preempted):
        fit(in_evaluation=True, **project)
    written = writer.return_value.write_scalars
    for expected in (True, False):  # the second time, nothing is left
        writer.reset_mock()
        fit(**project)
        assert writer.called == expected
        assert any("test_sum" in call.args[1] for call in written.call_args_list) == expected


def test_a_resume_continues_a_run_of_weights_and_biases_and_a_new_start_does_not(
    tmp_path, monkeypatch
):
    wandb = MagicMock()
    monkeypatch.setattr(weights_and_biases, "wandb", wandb)
    folder = storage_path(tmp_path / "tokenizer")

    def start() -> str:
        folder.mkdir(exist_ok=True)
        weights_and_biases.WandbWriter("nvg", folder, {})
        return wandb.init.call_args.kwargs["id"]

    first = start()
    assert start() == first  # also before its first checkpoint
    shutil.rmtree(folder)
    assert start() != first
