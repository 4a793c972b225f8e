"""Distillation: what the student learns from a teacher, and the model it leaves."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random_pipeline, tiny_config

from nvg_jax import Pipeline, workdir
from nvg_jax.distill import distill
from nvg_jax.errors import UserError
from nvg_jax.jobs.sampling_runs import SamplingJob
from nvg_jax.sampling.settings import Settings
from nvg_jax.structure.losses import Teacher, structure_losses
from nvg_jax.tokenizer import GranularitySequence, Quantized
from nvg_jax.training.distillation import Distillation, solution, student_settings

# An image of four positions, of whose two splits the first is learned.
STRUCTURE = jnp.array([[[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 3]]])


def minimize(loss, params, steps, learning_rate):
    """Parameters after steps of Adam; loss: (parameters, key) -> scalar."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys)[0][0])(params)


# Two points, +1 and -1: the exact velocity from a normal distribution to them.
def two_points(z, time):
    return (z - jnp.tanh((1 - time) * z / time**2)) / time


def small_network(params, z, time):
    time = jnp.broadcast_to(time, z.shape)
    x = jnp.stack([z, z * time, time, jnp.ones_like(z)], axis=-1)
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer)
    return (x @ params[-1])[..., 0]


def curvature(velocity, noise):
    """Mean squared deviation of a flow's velocity from the straight line between its ends."""
    times = jnp.linspace(1, 0, 101)
    z, velocities = noise, []
    for start, end in zip(times[:-1], times[1:]):
        velocities.append(velocity(z, start))
        z = z + (end - start) * velocities[-1]
    return float(jnp.square(jnp.stack(velocities) - (noise - z)).mean())


@pytest.mark.slow
def test_reflow_straightens_the_flow_to_two_points():
    batch, length, bits = 64, 4, 2
    structure = jnp.repeat(STRUCTURE, batch, axis=0)
    canvases = jnp.zeros((batch, 3, length, 1))
    solve = solution(lambda z, time, *_: two_points(z, time), np.linspace(1, 0, 51), "euler")

    def loss(params, key):
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (batch, length, bits))
        times = jax.random.uniform(time_key, (batch, 1))
        student = lambda z, time, *_: small_network(params, z, time[:, None, None])
        return structure_losses(
            student, structure, canvases, noise, times, teacher=Teacher(solution=solve)
        ).mean()

    sizes = ((4, 48), (48, 48), (48, 1))
    keys = jax.random.split(jax.random.key(1), 3)
    params = [jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, sizes)]
    params = minimize(loss, params, steps=1500, learning_rate=1e-2)

    noise = jax.random.normal(jax.random.key(2), (2000,))
    student = lambda z, time: small_network(params, z, time)
    before, after = curvature(two_points, noise), curvature(student, noise)
    assert before > 0.1 and after < before / 4, (before, after)
    # One step arrives near the points, on the noise's own side; the teacher's one step at 0.
    one = noise - student(noise, 1.0)
    assert jnp.abs(jnp.abs(one) - 1).mean() < 0.25
    assert (jnp.sign(one) == jnp.sign(noise)).mean() > 0.98
    assert jnp.abs(noise - two_points(noise, 1.0)).max() < 1e-6


def test_guidance_distillation_of_a_linear_network_gives_its_guided_output():
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(2, 2)), rng.normal(size=(4, 2))  # three classes and none
    model = types.SimpleNamespace(
        num_classes=3,
        apply=lambda variables, z, time, embedding, canvas, stage, classes: (
            z @ variables["params"]["weight"] + variables["params"]["bias"][classes][:, None]
        ),
    )
    scale = 2.5
    settings = Settings(structure_guidance=(scale, 1.0, 1.0))
    distillation = Distillation(model, None, settings, Settings(), reflow=False)
    classes = jnp.arange(30) % 3
    structure = jnp.repeat(STRUCTURE, 30, axis=0)
    sequence = GranularitySequence(structure, structure)
    quantized = Quantized(sequence, jnp.zeros((30, 3, 4, 1)), (), None)
    teacher = {"weight": jnp.asarray(weight), "bias": jnp.asarray(bias)}

    def loss(params, key):
        noise, times = jax.random.normal(key, (30, 4, 2)), jax.random.uniform(key, (30, 1))
        return distillation.loss(params, teacher, quantized, classes, noise, times).mean()

    student = minimize(loss, jax.tree.map(jnp.zeros_like, teacher), 800, 0.1)
    np.testing.assert_allclose(student["weight"], weight, atol=2e-3)
    guided = bias[3] + scale * (bias[:3] - bias[3])
    np.testing.assert_allclose(student["bias"][:3], guided, atol=2e-3)
    np.testing.assert_array_equal(student["bias"][3], 0)  # the null class is not needed


@pytest.mark.slow
def test_a_distillation_learns_either_solutions_or_velocities():
    # A teacher that is straight already, but not to the data: all solutions are 0.
    model = types.SimpleNamespace(
        num_classes=1, grid=(2, 2), apply=lambda v, z, time, *_: z / time[:, None, None]
    )
    quantized = Quantized(
        GranularitySequence(STRUCTURE, STRUCTURE), jnp.zeros((1, 3, 4, 1)), (), None
    )
    noise, times = jax.random.normal(jax.random.key(0), (1, 4, 2)), jnp.array([[0.5]])
    settings = Settings(flow_steps=3, structure_guidance=(1.0, 1.0, 1.0))
    losses = [
        Distillation(model, None, settings, settings, reflow).loss(
            {}, {}, quantized, jnp.zeros(1, int), noise, times
        )
        for reflow in (True, False)
    ]
    # Solution 0: z_t = t noise, the velocity to learn is noise, and the student says z_t / t.
    np.testing.assert_allclose(losses, 0, atol=1e-10)
    zero = types.SimpleNamespace(num_classes=1, grid=(2, 2), apply=lambda v, z, *_: 0 * z)
    still = Distillation(zero, None, settings, settings, reflow=True)
    # A teacher that stays where it is: the solution is the noise, the velocity to it 0.
    got = still.loss({}, {}, quantized, jnp.zeros(1, int), noise, times)
    np.testing.assert_allclose(got, 0, atol=1e-10)


# The command.


def short_config(**changes):
    config = tiny_config()
    config.distillation.update(
        length="4 steps", batch_size=16, log_every=2, eval_every=4, save_every=2, flow_steps=1
    )
    config.distillation.update(changes)
    return config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    pipeline = random_pipeline()
    guided = pipeline.metadata.sampling.updated({"structure_guidance": (1.0, 2.0)})
    pipeline.metadata = pipeline.metadata.replace(sampling=guided, fingerprint="tokenizer")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    distill(short_config(), str(teacher), folder)
    return folder


@pytest.mark.slow
def test_the_student_is_a_whole_model_with_its_own_recommended_steps(teacher, student):
    few, many = Pipeline.from_pretrained(student), Pipeline.from_pretrained(teacher)
    assert (few.settings.flow_steps, few.settings.structure_guidance) == (1, 1.0)
    assert few.settings.content_guidance == many.settings.content_guidance
    for name in ("tokenizer", "content"):
        jax.tree.map(np.testing.assert_array_equal, few.params[name], many.params[name])
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()), few.params["structure"], many.params["structure"]
    )
    assert all(jax.tree.leaves(changed["blocks"]))
    plan, _ = few._plan({}, 0, 0, False)
    assert {stage.split for stage in plan.stages} == {"plain", "noise", "none"}  # no null branch
    assert few.sample([0, 1]).images.shape == (2, 8, 8, 3)
    with pytest.raises(UserError, match="has its guidance inside; structure_guidance must be 1"):
        few.sample([0], structure_guidance=2.0)
    with pytest.raises(UserError, match="has its guidance inside"):
        few.settings = few.settings.updated({"structure_guidance": 2.0})
    # Trained on with its tokenizer, new generators are not distilled ones.
    assert few.metadata.teacher and workdir.read_tokenizer(student)[0].teacher is None
    job = SamplingJob(few, [0], 1, 1, 0, {"structure_guidance": 2.0})
    with pytest.raises(UserError, match="has its guidance inside"):
        job.describe()  # before a folder is written


def test_a_student_is_sampled_at_the_times_that_it_knows():
    own = Settings(flow_steps=4, structure_guidance=1.0)
    config = tiny_config().to_dict()
    config["distillation"]["flow_steps"] = 4
    metadata = random_pipeline().metadata.replace(teacher="other", sampling=own, config=config)
    for steps in (1, 2, 4):
        metadata.expand_settings(own.updated({"flow_steps": steps}))
    fewer = metadata.replace(sampling=own.updated({"flow_steps": 1}))  # as tune_sampling found
    fewer.expand_settings(own)
    for change in ({"flow_steps": 3}, {"flow_steps": 8}, {"solver": "heun"}, {"flow_shift": 1.0}):
        with pytest.raises(UserError, match="flow_steps=1 or 2 or 4; got"):
            metadata.expand_settings(own.updated(change))
    config["distillation"]["reflow"] = False  # learned at all times
    metadata.replace(config=config).expand_settings(own.updated({"flow_steps": 3}))


@pytest.mark.parametrize("reflow, restart", [(True, 1.0), (False, 0.5)])
def test_a_student_of_solutions_starts_from_noise_whatever_its_teacher_did(reflow, restart):
    config = short_config(reflow=reflow)
    config.sampling.flow_restart = 0.5
    assert student_settings(config).flow_restart == restart


@pytest.mark.slow
def test_the_student_keeps_what_is_given(student):
    pipe = Pipeline.from_pretrained(student)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    given = pipe.encode(images)
    out = pipe.sample([3, 4], prefix=given, structure_stages=3, token_stages=2).sequence
    np.testing.assert_array_equal(out.structure[:, :3], given.structure[:, :3])
    np.testing.assert_array_equal(out.tokens[:, :2], given.tokens[:, :2])
    region = np.arange(16) % 4 >= 2
    out = pipe.sample([3, 4], prefix=given, region=region).sequence
    np.testing.assert_array_equal(out.structure[..., ~region], given.structure[..., ~region])
    np.testing.assert_array_equal(out.tokens[..., ~region], given.tokens[..., ~region])


@pytest.mark.slow
def test_one_solution_of_a_student_serves_all_splits(student):
    """It sees the first token alone: other later tokens leave all maps as they are."""
    pipe = Pipeline.from_pretrained(student)
    given = pipe.encode(np.zeros((2, 8, 8, 3), np.float32))

    def sample(temperature, **settings):
        settings |= {"top_p": 1.0, "temperature": temperature}
        kept = {"prefix": given, "structure_stages": 1, "token_stages": 1}
        return pipe.sample([3, 4], **kept, **settings).sequence

    one, other = (sample(t, structure_solves=(0,)) for t in (0.1, 10.0))
    assert (one.tokens != other.tokens).any()
    np.testing.assert_array_equal(one.structure, other.structure)
    assert (sample(0.1).structure != sample(10.0).structure).any()  # each split sees all before it


@pytest.mark.slow
def test_the_same_command_again_resumes(teacher, student, tmp_path):
    # Stopped in the middle and started again, it ends with the same weights.
    config = short_config()
    config.distillation.save_every = 1
    stopped = []

    def noticed():
        stopped.append(len(stopped))
        return len(stopped) == 2

    with pytest.MonkeyPatch.context() as patch:
        from nvg_jax.runtime import preemption

        patch.setattr(preemption, "noticed", noticed)
        with pytest.raises(preemption.Preempted, match="saved at step 2 of 4"):
            distill(config, str(teacher), tmp_path)
    distill(config, str(teacher), tmp_path)
    a, b = (Pipeline.from_pretrained(f).params["structure"] for f in (student, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(flow_steps=2), "distillation.flow_steps = 1, now 2"),
        (dict(flow_steps=0), "distillation.flow_steps must be 1 or more, got 0"),
        (dict(batch_size=0), "distillation.batch_size must be 1 or more"),
        (dict(structure_guidance=(1.0, 2.0, 3.0)), "a .start, end. pair or 5 values"),
    ],
)
def test_wrong_settings_end_in_a_sentence(teacher, student, changes, message):
    with pytest.raises(UserError, match=message):
        distill(short_config(**changes), str(teacher), student)


def test_a_student_has_no_adapters(tmp_path):
    config = short_config()
    config.lora.rank = 4
    with pytest.raises(UserError, match="lora.rank=4 is of `train`; a student is trained with all"):
        distill(config, str(tmp_path / "teacher"), tmp_path / "out")


@pytest.mark.slow
def test_wrong_folders_and_data_end_in_a_sentence(teacher, student, tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        distill(short_config(), str(tmp_path / "nothing"), tmp_path / "out")
    (tmp_path / "run" / "generators").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a training run"):
        distill(short_config(), str(teacher), tmp_path / "run")
    with pytest.raises(UserError, match="holds a model already, which its student would replace"):
        distill(short_config(), str(teacher), teacher)
    (tmp_path / "begun" / "distillation").mkdir(parents=True)
    with pytest.raises(UserError, match="distillation in .*begun has not finished"):
        Pipeline.from_pretrained(tmp_path / "begun")
    pipeline = random_pipeline()
    pipeline.metadata = pipeline.metadata.replace(class_names=tuple("abcdefghij"))
    pipeline.save_pretrained(tmp_path / "letters")
    with pytest.raises(UserError, match=r"\(a, b, c and 7 more\) and the data have 10 \(0"):
        distill(short_config(), str(tmp_path / "letters"), tmp_path / "out")
    with pytest.raises(UserError, match="holds a run with teacher = "):
        other = random_pipeline()
        other.params = jax.tree.map(lambda x: x * 0.9, other.params)
        other.metadata = other.metadata.replace(
            sampling=Pipeline.from_pretrained(teacher).settings, fingerprint="tokenizer"
        )
        other.save_pretrained(tmp_path / "other")
        distill(short_config(), str(tmp_path / "other"), student)


def test_times_of_a_flow_are_the_samplers():
    # The student is trained at the times it is sampled with: those of its settings.
    settings = Settings(flow_steps=2, flow_shift=3.0, solver="euler")
    model = types.SimpleNamespace(grid=(4, 4))
    seen = []

    def velocity(z, time, *_):
        jax.debug.callback(lambda t: seen.append(float(t)), time)
        return z

    distillation = Distillation(model, None, settings, settings, True)
    solve = distillation.solver(settings, velocity)
    solve(jnp.zeros((1, 16, 4)), jnp.ones((1, 16, 4)), None, jnp.zeros(1, int))
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [1, 0.75], rtol=1e-6)  # 3 t / (1 + 2 t) of t = 1, 1/2
    noise, times = distillation.draw(jax.random.key(0), jnp.zeros((200, 5, 16), int))
    assert noise.shape == (200, 16, 4) and times.shape == (200, 3)
    assert set(np.unique(times)) == {1.0, 0.75} and 0.4 < (times == 1).mean() < 0.6
    # One that only learns the guidance is sampled with any number of steps.
    any_time = dataclasses.replace(distillation, reflow=False)
    _, times = any_time.draw(jax.random.key(0), jnp.zeros((200, 5, 16), int))
    assert len(np.unique(times)) > 500
