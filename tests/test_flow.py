"""The rectified flow: schedule, path, solver and the structure generator's objective."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvg_jax.structure import flow
from nvg_jax.structure.losses import draw_times, structure_losses

# Two images of eight positions; their finest maps, and the bits of a label, largest first.
FINEST = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [5, 2, 7, 0, 1, 6, 3, 4]])
STRUCTURE = FINEST[:, None] >> np.array([3, 2, 1, 0])[:, None]
TARGET = 2.0 * (FINEST[..., None] >> np.array([2, 1, 0]) & 1) - 1


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_times_fall_from_one_to_zero_shifted_by_the_number_of_positions():
    # Half way t' = e^mu / (e^mu + 1), mu = 0.5 for 256 positions and 1.15 for 4096.
    np.testing.assert_allclose(flow.shifted_times(2, 256), [1, sigmoid(0.5), 0], rtol=1e-12)
    np.testing.assert_allclose(flow.shifted_times(2, 4096), [1, sigmoid(1.15), 0], rtol=1e-12)
    np.testing.assert_allclose(flow.shifted_times(2, 2176)[1], sigmoid(0.825), rtol=1e-12)
    # A quarter: e^0.5 / (e^0.5 + 3).
    quarter = math.exp(0.5) / (math.exp(0.5) + 3)
    np.testing.assert_allclose(flow.shifted_times(4, 256)[3], quarter, rtol=1e-12)
    for steps in (1, 25):
        times = flow.shifted_times(steps, 16)
        assert times.shape == (steps + 1,)
        np.testing.assert_allclose(times[[0, -1]], [1, 0], atol=1e-12)
        assert (np.diff(times) < 0).all()
    # With a shift of 3, half way is 3 * 0.5 / (1 + 2 * 0.5).
    np.testing.assert_allclose(flow.shifted_times(2, 256, shift=3), [1, 0.75, 0], rtol=1e-12)
    np.testing.assert_allclose(flow.shifted_times(4, 256, shift=1), [1, 0.75, 0.5, 0.25, 0])


def test_channels_below_the_stage_are_known():
    np.testing.assert_array_equal(flow.known_channels(2, 4), [[True, True, False, False]])
    per_sample = flow.known_channels(jnp.array([0, 3]), 4)
    np.testing.assert_array_equal(per_sample, [[[False] * 4], [[True, True, True, False]]])


def test_the_path_mixes_noise_and_target_where_the_bits_are_unknown():
    noise, target = jnp.full((3, 1, 2), 5.0), jnp.broadcast_to(jnp.array([1.0, -1.0]), (3, 1, 2))
    point, used = flow.path(noise, target, jnp.array([0.25, 0.25, 1.0]), jnp.array([0, 1, 1]))
    # A quarter of 5 and three quarters of 1 or -1; what is known is the target at all times.
    np.testing.assert_allclose(point, [[[2, 0.5]], [[1, 0.5]], [[1, 5]]])
    np.testing.assert_array_equal(used, [[[5, 5]], [[1, 5]], [[1, 5]]])


def known_of(stage):
    """The target with the channels that are not yet known at 0, as an embedding minus 1."""
    return jnp.where(jnp.arange(3) < stage, TARGET, 0.0)


@pytest.mark.parametrize("solver", flow.SOLVERS)
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("times", [[1.0, 0.0], [1.0, 0.7, 0.6, 0.0]])
def test_the_exact_velocity_leads_to_the_target(solver, stage, times):
    noise = jax.random.normal(jax.random.key(0), TARGET.shape)
    velocity = lambda z, time: noise - TARGET
    got = flow.solve(velocity, noise, known_of(stage), stage, jnp.array(times), solver=solver)
    np.testing.assert_allclose(got, TARGET, atol=1e-6)


def test_a_restarted_flow_begins_between_noise_and_the_last_solution():
    noise, last = jnp.full(TARGET.shape, 8.0), jnp.full(TARGET.shape, -4.0)
    rest = lambda z, time: jnp.zeros_like(z)
    got = flow.solve(rest, noise, known_of(1), 1, jnp.array([0.25, 0.1, 0.0]), start=last)
    # A quarter of 8 and three quarters of -4; the first channel is known.
    np.testing.assert_array_equal(got, jnp.where(jnp.arange(3) < 1, TARGET, -1.0))


def solve_scalar(velocity, steps, solver, start=2.0):
    """Where a flow of one channel leads in `steps` equal steps."""
    start = jnp.full((1, 1, 1), start)
    times = jnp.linspace(1, 0, steps + 1)
    return flow.solve(velocity, start, jnp.zeros((1, 1, 1)), 0, times, solver=solver).item()


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_the_order_of_a_solver(solver, order):
    # dz/dt = z + cos 3t has the solution C e^t + (3 sin 3t - cos 3t) / 10; C follows from z(1) = 2.
    exact = (2 + (math.cos(3) - 3 * math.sin(3)) / 10) / math.e - 0.1
    velocity = lambda z, time: z + jnp.cos(3 * time)
    errors = [abs(solve_scalar(velocity, steps, solver) - exact) for steps in (16, 32)]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.35


def test_multistep_is_exact_where_the_predicted_structure_moves_linearly():
    # v = (z - s) / t with s = 0.5 + 3 t leads to s(0); Euler's first step has no slope to know.
    velocity = lambda z, time: (z - 0.5 - 3 * time) / time
    assert abs(solve_scalar(velocity, 3, "multistep") - 0.5) < 1e-6
    assert abs(solve_scalar(velocity, 3, "euler") - 0.5) > 0.5


def test_multistep_calls_the_network_once_and_heun_twice_a_step():
    calls = dict.fromkeys(flow.SOLVERS, 0)
    for solver in calls:

        def velocity(z, time, solver=solver):
            jax.debug.callback(lambda: calls.update({solver: calls[solver] + 1}))
            return z

        solve_scalar(velocity, 4, solver)
    jax.effects_barrier()
    assert calls == {"euler": 4, "heun": 8, "multistep": 4}


def test_known_channels_stay_whatever_the_velocity():
    known, noise = known_of(1), jnp.zeros(TARGET.shape)
    # All channels move by the known one: z = -(sum of the steps) * known = known.
    follow = lambda z, time: jnp.repeat(-z[..., :1], 3, axis=-1)
    solve = jax.jit(lambda stage: flow.solve(follow, noise, known, stage, jnp.linspace(1, 0, 5)))
    got = solve(1)
    np.testing.assert_array_equal(got[..., 0], TARGET[..., 0])
    np.testing.assert_allclose(got[..., 1:], jnp.repeat(known[..., :1], 2, axis=-1), atol=1e-6)


def test_each_euler_step_takes_the_velocity_at_its_start():
    times, start = jnp.array([1.0, 0.5, 0.0]), jnp.full((1, 1, 1), 2.0)
    solve = lambda velocity: flow.solve(velocity, start, jnp.zeros((1, 1, 1)), 0, times).item()
    assert solve(lambda z, time: jnp.full_like(z, time)) == 2 - 0.5 * 1 - 0.5 * 0.5
    assert solve(lambda z, time: z) == 2 * 0.5 * 0.5


NOISE = jax.random.normal(jax.random.key(1), TARGET.shape)
CANVASES = jax.random.normal(jax.random.key(2), (2, 4, 8, 5))
TIMES = jnp.array([[0.2, 0.4], [0.6, 0.8]])  # of images 0 and 1, stages 0 and 1


def losses(velocity):
    return structure_losses(velocity, jnp.asarray(STRUCTURE), CANVASES, NOISE, TIMES)


@pytest.mark.slow
def test_the_exact_velocity_has_no_loss():
    target = np.repeat(TARGET, 2, axis=0)

    def exact(noisy, time, *_):
        return (noisy - target) / time[:, None, None]  # z - s = t (eps - s)

    np.testing.assert_allclose(losses(exact), [0, 0], atol=1e-10)


def test_no_velocity_has_the_distance_of_noise_and_target():
    squared = np.square(np.asarray(NOISE) - TARGET)
    # In stage 1 the first of the three channels is known and has no error.
    expected = [squared.mean(), squared[..., 1:].sum() / squared.size]
    np.testing.assert_allclose(losses(lambda noisy, *_: jnp.zeros_like(noisy)), expected, rtol=1e-5)


def test_what_the_network_sees_of_each_stage():
    seen = {}

    def velocity(noisy, time, embedding, canvas, stage):
        seen.update(noisy=noisy, time=time, embedding=embedding, canvas=canvas, stage=stage)
        return jnp.zeros_like(noisy)

    losses(velocity)
    # Image 0 with stages 0 and 1, then image 1: the last two of four stages are not learned.
    np.testing.assert_array_equal(seen["stage"], [0, 1, 0, 1])
    np.testing.assert_allclose(seen["time"], [0.2, 0.4, 0.6, 0.8])
    np.testing.assert_array_equal(seen["canvas"], CANVASES[:, :2].reshape(4, 8, 5))
    upper = FINEST[..., None] // 4  # the first bit
    np.testing.assert_array_equal(seen["embedding"][::2], np.ones((2, 8, 3)))
    np.testing.assert_array_equal(seen["embedding"][1::2, :, :1], 2 * upper)
    np.testing.assert_array_equal(seen["embedding"][1::2, :, 1:], np.ones((2, 8, 2)))
    # One noise an image; in stage 1 the first channel is known.
    points, times = seen["noisy"].reshape(2, 2, 8, 3), np.asarray(TIMES)[..., None, None]
    expected = times * np.asarray(NOISE)[:, None] + (1 - times) * TARGET[:, None]
    expected[:, 1, :, 0] = TARGET[..., 0]
    np.testing.assert_allclose(points, expected, atol=1e-6)


def test_drawn_times_are_the_sigmoid_of_a_normal():
    times = draw_times(jax.random.key(0), 2000, 3)
    assert times.shape == (2000, 3) and times.dtype == jnp.float32
    assert 0 < times.min() and times.max() < 1
    logits = jnp.log(times / (1 - times))
    # Three standard deviations of the mean and the deviation of 2000 draws.
    np.testing.assert_allclose(logits.mean(0), np.zeros(3), atol=3 / 2000**0.5)
    np.testing.assert_allclose(logits.std(0), np.ones(3), atol=3 / 4000**0.5)
    correlation = np.corrcoef(np.asarray(logits).T)
    np.testing.assert_allclose(correlation, np.eye(3), atol=0.1)  # each stage its own
