"""Guidance, the token filters, the sampling settings and the program of stages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvg_jax.errors import UserError
from nvg_jax.sampling.generate import Networks, SampleRequests, StagePlan, generate, make_plan
from nvg_jax.sampling.guidance import Guidance, filter_logits
from nvg_jax.sampling.settings import Settings
from nvg_jax.tokenizer import GranularitySequence

# Not in order, so that a filter must find the likely tokens.
PROBABILITIES = np.array([0.15, 0.5, 0.05, 0.3], np.float32)


def kept(**filters) -> list[int]:
    """The tokens that the filters leave of PROBABILITIES."""
    logits = jnp.log(PROBABILITIES)
    filtered = np.asarray(filter_logits(logits, **filters))
    left = np.isfinite(filtered)
    np.testing.assert_array_equal(filtered[left], np.asarray(logits)[left])
    assert np.isneginf(filtered[~left]).all()
    return np.flatnonzero(left).tolist()


@pytest.mark.parametrize(
    "filters, expected",
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 0}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_p": 0.97}, [0, 1, 2, 3]),  # leaving out the 0.05 would leave less than 0.97
        ({"top_p": 0.9}, [0, 1, 3]),
        ({"top_p": 0.7}, [1, 3]),
        ({"top_p": 0.4}, [1]),
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # of two tokens the best has 0.5 / 0.8 = 0.625
        ({"top_k": 0, "top_p": 0.6}, [1, 3]),
    ],
)
def test_what_the_filters_leave(filters, expected):
    assert kept(**filters) == expected


def test_the_filters_leave_what_sorting_says():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 60), scale=3).round(1).astype(np.float32)  # with ties, and zeros
    logits[::2] -= 8
    logits[logits == 0] *= rng.choice([-1, 1], (logits == 0).sum())  # 0.0 and -0.0 are equal
    ascending = np.sort(logits, axis=1)
    for k in (1, 7, 59, 60):
        left = np.isfinite(jax.jit(filter_logits)(logits, k))
        np.testing.assert_array_equal(left, logits >= ascending[:, -k, None])
    exact = np.exp(ascending.astype(np.float64))
    shares = np.cumsum(exact / exact.sum(1, keepdims=True), axis=1)
    for p in (0.05, 0.5, 0.93):
        lowest = ascending[np.arange(40), (shares > 1 - p).argmax(1)]
        left = np.isfinite(jax.jit(filter_logits)(logits, None, p))
        np.testing.assert_array_equal(left, logits >= lowest[:, None])


def test_each_row_is_filtered_by_itself_and_the_filters_may_be_traced():
    logits = jnp.log(jnp.stack([PROBABILITIES, PROBABILITIES[::-1]]))[:, None]
    got = jax.jit(filter_logits)(logits, jnp.int32(3), jnp.float32(0.7))
    left = [np.flatnonzero(row).tolist() for row in np.isfinite(got[:, 0])]
    assert got.shape == (2, 1, 4) and left == [[1, 3], [0, 2]]


def test_guidance_moves_away_from_the_null_class():
    class_ids, seen = jnp.array([1, 3]), []

    def guided(scale):
        guidance = Guidance(class_ids, 5, scale)
        seen.append(guidance.classes.tolist())
        return guidance(guidance.double(jnp.array([10.0, 20.0])) + guidance.classes**2)

    # Class 1 gives 11, class 3 gives 29, the null class 5 gives 35 and 45.
    np.testing.assert_array_equal(guided(None), [11, 29])
    for scale, expected in ((0, [35, 45]), (1, [11, 29]), (2, [-13, 13]), (0.5, [23, 37])):
        np.testing.assert_array_equal(guided(scale), expected)
    assert seen == [[1, 3]] + 4 * [[1, 5, 3, 5]]  # without a scale the null class is not computed


def test_a_number_holds_for_all_stages():
    got = Settings(top_k=7, top_p=0.9, content_guidance=2.0, temperature=0.5).expand(5, 16)
    assert got.top_k == (7,) * 5 and all(type(k) is int for k in got.top_k)
    assert got.top_p == (0.9,) * 5
    assert got.content_guidance == (2.0,) * 5
    assert got.structure_guidance == (1.0,) * 5
    assert (got.temperature, got.flow_steps, got.gumbel) == (0.5, 25, False)
    assert got.expand(5, 16) == got  # and what is expanded stays


def test_a_pair_is_a_range_over_the_stages():
    got = Settings(
        top_k=(9, 1), top_p=(1.0, 0.5), content_guidance=(1, 3), structure_guidance=(2.0, 1.0)
    ).expand(5, 16)
    assert got.top_k == (9, 7, 5, 3, 1)
    assert got.content_guidance == (1, 1.5, 2, 2.5, 3)
    assert got.structure_guidance == (2, 1.75, 1.5, 1.25, 1)
    # u = 4 ** (i / 4) = 1, 1.4142, 2, 2.8284, 4 and p = 0.5 + 0.5 (4 - u) / 3.
    np.testing.assert_allclose(got.top_p, [1, 0.9309644, 0.8333333, 0.6952621, 0.5], atol=1e-7)


def test_stages_to_solve_at_are_sorted_and_different():
    assert Settings(structure_solves=[2, 0, 2]).expand(5, 16).structure_solves == (0, 2)  # type: ignore[reportArgumentType]


def test_one_value_a_stage_is_taken_as_it_is():
    assert Settings(top_p=(1, 0.2, 0.7)).expand(3, 16).top_p == (1, 0.2, 0.7)
    # With two stages a pair is both.
    assert Settings(content_guidance=(3, 1.5)).expand(2, 16).content_guidance == (3, 1.5)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"temperature": -0.1}, "temperature must be 0, or at least 1e-6, got -0.1"),
        ({"temperature": float("nan")}, "temperature takes finite numbers, got nan"),
        ({"temperature": float("inf")}, "temperature takes finite numbers, got inf"),
        ({"top_k": -1}, r"top_k must be whole numbers from 0 .* codebook's 16, got -1"),
        ({"top_k": 17}, "codebook's 16, got 17"),
        ({"top_k": 2.5}, "whole numbers .* got 2.5"),
        ({"top_k": (9, 0)}, "top_k cannot go from 9 to 0"),
        ({"top_k": (0, 5)}, "top_k cannot go from 0 to 5"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": (1.0, 1.5)}, r"top_p must be above 0 and at most 1, got \(1.0, 1.5\)"),
        ({"top_p": float("nan")}, "top_p takes finite numbers, got nan"),
        ({"content_guidance": float("nan")}, "content_guidance takes finite numbers, got nan"),
        ({"structure_guidance": float("inf")}, "structure_guidance takes finite numbers, got inf"),
        ({"top_k": float("nan")}, "top_k takes finite numbers"),
        ({"temperature": "warm"}, "temperature takes finite numbers, got 'warm'"),
        ({"flow_steps": 2.5}, "flow_steps must be a whole number"),
        ({"flow_steps": 0}, "flow_steps must be a whole number from 1 to 10000, got 0"),
        ({"top_k": (1, 2, 3)}, r"top_k takes a number, a \(start, end\) pair or 5 values"),
        ({"top_p": ()}, r"top_p takes .* got \(\)"),
        ({"content_guidance": (1,) * 6}, "content_guidance takes .* 5 values"),
        ({"structure_guidance": ((1, 2),)}, "structure_guidance takes .* 5 values"),
        ({"structure_solves": (0, 3)}, r"must be a list of stages from 0 to 2, .* got \(0, 3\)"),
        ({"structure_solves": 2}, "structure_solves must be a list of stages from 0 to 2"),
        ({"flow_restart": 0.0}, "flow_restart must be above 0 and at most 1, got 0.0"),
    ],
)
def test_wrong_settings_get_a_sentence(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        Settings(**wrong).expand(5, 16)


def plan(**settings):
    return make_plan(Settings(**settings).expand(5, 16))


def test_plain_sampling_needs_no_null_class_and_no_filter():
    got = plan()
    assert got.stages == (
        StagePlan("plain", "plain"),
        StagePlan("plain", "plain"),
        StagePlan("plain", "plain"),
        StagePlan("plain", "noise"),  # the last split is never learned
        StagePlan("plain", "none"),
    )
    assert (got.settings.flow_steps, got.settings.gumbel) == (25, False)
    assert (got.greedy, got.top_k, got.top_p) == (False, False, False)
    assert hash(got) == hash(plan())  # static: equal settings share one program


def test_stages_with_guidance_one_need_no_null_class():
    got = plan(content_guidance=(1, 3.5), structure_guidance=(3, 2, 1, 3, 3))
    assert [stage.content for stage in got.stages] == ["plain"] + 4 * ["guided"]
    assert [stage.split for stage in got.stages] == ["guided", "guided", "plain", "noise", "none"]


def test_splits_that_are_not_solved_reuse_the_last_solution():
    solutions = lambda **settings: [stage.solution for stage in plan(**settings).stages[:3]]
    assert solutions(structure_solves=(0, 2)) == ["new", "reuse", "new"]
    assert solutions(structure_solves=(0, 1, 2)) == solutions() == ["new"] * 3
    # The first split has no solution to reuse.
    assert solutions(structure_solves=(1,)) == ["new", "new", "reuse"]
    assert solutions(structure_solves=(0, 2), flow_restart=0.5) == ["new", "reuse", "restart"]


STAGES, LENGTH = 5, 16
TARGETS = jax.random.normal(jax.random.key(1), (STAGES, 1, LENGTH, STAGES - 1))
NETWORKS = Networks(  # stage i's flow leads to the halves of random scores i
    logits=lambda canvas, maps, stage, classes: jnp.zeros((1, LENGTH, 8)),
    flow_velocity=lambda labels, canvas, stage, classes, times: (
        lambda z, time: (z - TARGETS[stage]) / time,
        times,
    ),
    add_stage=lambda canvas, tokens, stage: canvas,
    null_id=1,
    latent_dim=2,
)


@pytest.mark.slow
@pytest.mark.parametrize("solves", [(), (0, 2), (0,)])
@pytest.mark.parametrize("restart", [1.0, 0.5])
def test_a_split_uses_the_solution_of_the_last_solve(solves, restart):
    """Every split takes its own bit. Kept stages solve nothing, and one program serves them all."""
    settings = Settings(structure_solves=solves, flow_restart=restart).expand(STAGES, 8)
    rng = np.random.default_rng(0)
    finest = rng.permutation(LENGTH)[None] >> np.arange(STAGES - 1, -1, -1)[:, None]
    prefix = GranularitySequence(jnp.asarray(finest[None]), jnp.asarray(finest[None] % 8))
    requests = SampleRequests(
        class_ids=jnp.zeros(1, jnp.int32),
        keys=jax.random.split(jax.random.key(2), 1),
        noise=jax.random.normal(jax.random.key(3), (1, LENGTH, STAGES - 1)),
        prefix=prefix,
        region=jnp.zeros((1, LENGTH), bool),
    )

    @functools.partial(jax.jit, static_argnames="plan")
    def sample(values, plan):
        return generate(NETWORKS, requests, values, plan)[0]

    for kept in (0, 1, 2, 3, 5):  # of these stages, the maps; the tokens of one less
        values = jax.tree.map(jnp.asarray, settings.traced())
        if kept:
            values |= {"structure_stages": kept, "token_stages": kept - 1}
        sequence = sample(values, plan=make_plan(settings, kept=kept > 0))
        np.testing.assert_array_equal(sequence.structure[:, :kept], prefix.structure[:, :kept])
        tokens = slice(max(kept - 1, 0))
        np.testing.assert_array_equal(sequence.tokens[:, tokens], prefix.tokens[:, tokens])
        first = max(kept - 1, 0)
        for stage in range(first, 3):
            solved = max({first, *(s for s in solves or range(3) if first <= s <= stage)})
            labels, scores = sequence.structure[0, stage], TARGETS[solved, 0, :, stage]
            upper = sequence.structure[0, stage + 1] % 2 == 1
            for cluster in range(2**stage):
                own = np.flatnonzero(labels == cluster)
                ranked = own[np.argsort(scores[own])]
                assert set(own[upper[own]]) == set(ranked[len(own) // 2 :])
    assert sample._cache_size() == 2


@pytest.mark.parametrize(
    "settings, switched",
    [
        ({"temperature": 0.0}, {"greedy": True}),
        ({"top_k": (5, 0, 0, 0, 0)}, {"top_k": True}),
        ({"top_p": (1, 1, 1, 1, 0.9)}, {"top_p": True}),
        ({"gumbel": True}, {"settings": Settings(gumbel=True).static()}),
        ({"flow_steps": 4}, {"settings": Settings(flow_steps=4).static()}),
        ({"temperature": 0.7}, {}),  # a value that changes without a new program
    ],
)
def test_what_a_setting_switches_in_the_plan(settings, switched):
    assert plan(**settings) == plan()._replace(**switched)
