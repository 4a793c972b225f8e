"""The training loop with a model of one number: what it evaluates, and when."""

import types

import numpy as np
import pytest
from helpers import logged, tiny_config
from ml_collections import ConfigDict

from nvg_jax.models import ModelConfig
from nvg_jax.parts import TOKENIZER
from nvg_jax.runtime import preemption, sharding
from nvg_jax.runtime.files import storage_path
from nvg_jax.training import loop
from nvg_jax.workdir import RunMetadata, read_metadata

STEPS = 6


class Batches:
    """An endless iterator over the numbers 0, 1, ..., that can be resumed."""

    position = 0

    def __next__(self):
        self.position += 1
        return {"image": np.full((1, 1), self.position - 1, np.float32)}

    def get_state(self):
        return self.position

    def set_state(self, position):
        self.position = position

    def close(self):
        pass


class Sum:
    """Trains the sum of its batches; its FID is 10 minus the sum."""

    part, steps, STEP_KEY, DATA_SEED = TOKENIZER, STEPS, 0, 0
    abstract_state = {"sum": np.zeros((1, 1), np.float32)}

    def __init__(self):
        self.evaluated = []
        self.interrupted = False  # by SIGTERM, in an evaluation

    def open(self, run):
        config = tiny_config()
        model = ModelConfig.from_config(config, 1).only()
        return {}, RunMetadata(model, ("a",), config=run.config.to_dict(), steps=STEPS)

    def first_state(self, run, inputs):
        return self.abstract_state

    def warming_up(self, step):
        return False

    def jit_train_step(self, state, inputs, batch, key, warming_up):
        state = {"sum": state["sum"] + np.asarray(batch["image"])}
        return state, {"sum_loss": state["sum"][0, 0]}

    def learning_rate(self, step):
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
    config = ConfigDict(tiny_config())
    config.tokenizer_training.update(save_every=2, eval_every=2, fid_every=3, log_every=1, keep=2)
    monkeypatch.setattr(sharding, "global_batch", lambda batch, mesh: batch)

    def fit(sigterm_at=None, in_evaluation=False, in_score=False):
        calls = iter(range(1, 100))
        monkeypatch.setattr(preemption, "noticed", lambda: next(calls) == sigterm_at)
        trainer = Sum()
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
            train_batches=lambda batch_size, seed: Batches(),
        )
        monkeypatch.setattr("jax.random.fold_in", lambda key, data: key)
        loop.fit(trainer, run, score)
        return trainer.evaluated

    return fit


def assert_complete(folder):
    """Everything that an undisturbed run logs and keeps: the sums of 0 .. step - 1."""
    values = logged(folder / "tokenizer")
    assert {s: v for (tag, s), v in values.items() if tag == "test_sum"} == {2: 1, 4: 6, 6: 15}
    assert {s: v for (tag, s), v in values.items() if tag == "fid"} == {3: 17, 6: 5}
    best = read_metadata(folder / "best_tokenizer" / "pipeline")
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
