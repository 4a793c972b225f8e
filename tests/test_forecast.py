"""The time that a run still takes, worked by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_reporter, tiny_config
from jax.sharding import NamedSharding, PartitionSpec

from nvg_jax.models import ModelConfig
from nvg_jax.parts import TOKENIZER
from nvg_jax.runtime import sharding
from nvg_jax.training import registry
from nvg_jax.training.forecast import Forecast, Work, due, flops, step_flops
from nvg_jax.training.tokenizer import TokenizerTrainer


def test_all_parts_evaluations_and_fid_count():
    """26 seconds were once promised, and 68 were left."""
    tokenizer = Work("tokenizer", 100, 10.0, eval_every=50, fid_every=0, eval_share=3.0)
    generators = Work("generators", 200, 20.0, eval_every=80, fid_every=100, eval_share=5.0)
    ahead = Forecast([tokenizer, generators])
    assert ahead.remaining("tokenizer", 10) is None
    ahead.measured("tokenizer", "step", 2.0)
    # 90 steps of 2 s and two evaluations of 3 steps; then 200 steps of 4 s and three evaluations of
    # 5 steps, after steps 80, 160 and 200.
    assert ahead.remaining("tokenizer", 10) == 90 * 2 + 2 * 3 * 2 + 200 * 4 + 3 * 5 * 4
    ahead.measured("tokenizer", "compilation", 60.0)
    # For its own evaluation, and for a step and an evaluation of the other part.
    assert ahead.remaining("tokenizer", 10) == 1052 + 3 * 60
    ahead.measured("tokenizer", "evaluation", 30.0)
    assert ahead.remaining("tokenizer", 50) == 50 * 2 + 1 * 30 + 200 * 4 + 3 * 5 * 4 + 2 * 60
    ahead.measured("generators", "step", 1.0)
    ahead.measured("generators", "evaluation", 7.0)
    assert ahead.covers("tokenizer", 50) == "with generators, without FID"
    assert ahead.covers("generators", 199) == "without FID"
    assert ahead.covers("generators", 200) == ""
    ahead.measured("generators", "fid", 100.0)
    assert ahead.covers("tokenizer", 50) == "with generators"
    assert ahead.covers("generators", 100) == ""
    assert ahead.remaining("generators", 100) == 100 * 1 + 2 * 7 + 1 * 100
    assert ahead.remaining("generators", 200) == 0


def test_a_moment_of_other_work_on_the_machine_changes_no_forecast():
    ahead = Forecast([Work("tokenizer", 100, 1.0, eval_every=100, fid_every=0, eval_share=0.0)])
    for seconds in (2.0, 2.0, 9.0, 2.0, 2.0):
        ahead.measured("tokenizer", "step", seconds)
        assert ahead.remaining("tokenizer", 10) == 90 * 2
    for _ in range(9):  # but a machine that has become slower does
        ahead.measured("tokenizer", "step", 3.0)
    assert ahead.remaining("tokenizer", 10) == 90 * 3


def test_the_line_says_that_its_time_is_without_fid(tmp_path, caplog):
    caplog.set_level("INFO", "nvg_jax")
    ahead = Forecast([Work("generators", 9, 1.0, eval_every=9, fid_every=5, eval_share=0.0)])
    reporter = make_reporter(tmp_path, "generators", forecast=ahead)
    for step in range(1, 5):
        if step == 4:
            ahead.measured("generators", "fid", 0.0)
        reporter.start_step()
        reporter.add({"loss": np.float32(1)})
        reporter.progress(step, 1.0, None)
    lines = [line for line in caplog.messages if "ETA" in line]
    assert [line.endswith(" without FID") for line in lines] == [True, True, False]


@pytest.mark.parametrize(
    "done, steps, every, times", [(0, 100, 30, 4), (30, 100, 30, 3), (99, 100, 30, 1), (5, 9, 0, 0)]
)
def test_what_is_due(done, steps, every, times):
    assert due(done, steps, every) == times


def test_a_step_is_not_taken_for_one_of_the_warm_up():
    def trace(step):
        return jax.jit(lambda x: x @ x if step < 2 else x).trace(jnp.ones((2, 2)))

    assert step_flops(types.SimpleNamespace(steps=9, trace=trace)) == 0
    assert step_flops(types.SimpleNamespace(steps=2, trace=trace)) == 16


@pytest.mark.slow
def test_a_training_does_not_trace_its_step_again(monkeypatch):
    """The abstract arguments are those of the arrays of a run, as far as tracing sees them."""
    traced, train_step = [], TokenizerTrainer.train_step
    monkeypatch.setattr(
        TokenizerTrainer,
        "train_step",
        lambda *args, **kw: traced.append(1) or train_step(*args, **kw),
    )
    config, mesh = tiny_config(tokenizer_training={"length": "7 steps"}), sharding.make_mesh()
    model = ModelConfig.from_config(config, num_classes=10)
    with sharding.in_mesh(mesh):
        trainer = registry.make_trainer(TOKENIZER, config, model, mesh, num_images=100)
        trainer.trace()
        state = jax.tree.map(
            lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), trainer.abstract_state
        )
        images, labels = np.zeros((16, 8, 8, 3), np.float32), np.zeros(16, np.int32)
        batch = sharding.global_batch({"image": images, "label": labels}, mesh)
        key = jax.device_put(jax.random.key(0), NamedSharding(mesh, PartitionSpec()))
        key = jax.random.fold_in(key, trainer.STEP_KEY)
        trainer.jit_train_step.trace(state, {}, batch, key, index_backprop=False)
    assert len(traced) == 1


def test_the_flops_of_products_convolutions_and_loops():
    def network(x, kernel, matrix):
        x = jax.lax.conv(x, kernel, (1, 1), "VALID")  # (1, 5, 3, 3) from 2 channels, 2 x 2
        x = x.reshape(5, 9) @ matrix
        return jax.lax.scan(lambda x, _: (jax.jit(jnp.dot)(x, matrix), None), x, length=7)[0]

    shapes = (1, 2, 4, 4), (5, 2, 2, 2), (9, 9)
    jaxpr = jax.make_jaxpr(network)(*map(jnp.zeros, shapes)).jaxpr
    assert flops(jaxpr) == 2 * 45 * 8 + 8 * 2 * 5 * 9 * 9
