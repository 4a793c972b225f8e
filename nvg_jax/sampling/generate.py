"""The stage loop: from class ids to a visual granularity sequence (paper, Section 3.4).

A pure function over callables, which compiles into one program: stages that run the same
branches share one `lax.scan`. How many stages are kept from a prefix is traced.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int, Key

from nvg_jax import granularity
from nvg_jax.sampling.guidance import Guidance, filter_logits
from nvg_jax.sampling.settings import Settings
from nvg_jax.structure import flow
from nvg_jax.tokenizer.quantizer import GranularitySequence, at_positions


class Networks(NamedTuple):
    """What the loop calls.

    logits: (canvas (B, L, D), maps (B, L), stage, class_ids (B,)) -> (B, L, V), one row per
        cluster (rows past the stage's 2**stage clusters are not used).
    flow_velocity: (canvas, maps, stage, class_ids, times (n,)) -> (velocity, per_time), arguments
        of `flow.solve`; everything that all steps share is computed once.
    add_stage: (canvas, tokens (B, L), stage) -> canvas.
    null_id: the id of the null class. latent_dim: D.
    """

    logits: Callable[..., Array]
    flow_velocity: Callable[..., tuple[Callable[..., Array], Any]]
    add_stage: Callable[..., Array]
    null_id: int
    latent_dim: int


class SampleRequests(NamedTuple):
    """What a batch of samples is made from, besides the settings.

    keys: a random key for each sample, from which all but `noise` is drawn.
    noise: normal values, where every stage's flow starts.
    prefix: maps and tokens, read if the plan has `kept`, which a region needs. The first map is
        always read, and must be zero; of a model whose maps are fixed, all maps are.
    region: read if the plan says so. Positions outside keep all maps and tokens of `prefix`, and a
        cluster that contains such a position keeps its token.
    """

    class_ids: Int[Array, " B"]
    keys: Key[Array, " B"]
    noise: Float[Array, "B L K"]
    prefix: GranularitySequence
    region: Bool[Array, "B L"]


class StagePlan(NamedTuple):
    """Where one stage's tokens and its split come from, unless they are kept.

    content: "plain" or "guided"; split: "plain" or "guided" (by the flow), "noise", "fixed" (in the
    prefix) or "none".
    solution: of the flow: "new", "restart" (it starts from the last one) or "reuse" (the last one).
    """

    content: str
    split: str
    solution: str = "new"


class SamplingPlan(NamedTuple):
    """The static half of sampling; every plan compiles its own program.

    settings: `Settings.static()`. The booleans say which of the traced settings are in use,
    whether the first stages may be kept, and whether only a region of a reference is generated.
    """

    stages: tuple[StagePlan, ...]
    settings: Settings
    greedy: bool
    top_k: bool
    top_p: bool
    kept: bool
    region: bool


def make_plan(
    settings: Settings, kept: bool = False, region: bool = False, fixed: bool = False
) -> SamplingPlan:
    """The plan for expanded settings.

    Args:
        kept: whether maps and tokens of the first stages come from the prefix. How many is traced.
        region: whether only a region is generated in the other stages.
        fixed: whether the maps of all stages come from the prefix, since the model draws none.
    """
    content_guidance = settings.per_stage("content_guidance")
    structure_guidance = settings.per_stage("structure_guidance")
    count = len(content_guidance)
    solves = {0, *(settings.structure_solves or range(count))}
    stages = []
    for stage in range(count):
        content = "plain" if content_guidance[stage] == 1 else "guided"
        split = "plain" if structure_guidance[stage] == 1 else "guided"
        solution = "new"
        if stage == count - 1:
            split = "none"
        elif fixed:
            split = "fixed"
        elif stage == count - 2:
            split = "noise"  # not learned: either order of a pair is valid
        elif stage not in solves:
            solution = "reuse"
        elif stage > 0 and settings.flow_restart < 1:
            solution = "restart"
        stages.append(StagePlan(content, split, solution))
    return SamplingPlan(
        stages=tuple(stages),
        settings=settings.static(),
        greedy=settings.temperature == 0,
        top_k=any(settings.per_stage("top_k")),
        top_p=any(p < 1 for p in settings.per_stage("top_p")),
        kept=kept,
        region=region,
    )


def flow_solutions(plan: SamplingPlan, num_positions: int) -> list[tuple[bool, int]]:
    """(whether it is guided, evaluations of the velocity) of each solution of the flow.

    Args:
        num_positions: L.
    """
    settings, solutions = plan.settings, []
    times = flow.shifted_times(settings.flow_steps, num_positions, settings.flow_shift)
    for stage in plan.stages:
        if stage.split in ("plain", "guided") and stage.solution != "reuse":
            steps = settings.flow_steps
            if stage.solution == "restart":
                steps = 1 + int((times[:-1] < settings.flow_restart).sum())
            solutions.append((stage.split == "guided", steps * flow.SOLVERS[settings.solver]))
    return solutions


def flow_evaluations(plan: SamplingPlan, num_positions: int) -> int:
    """How often the structure generator runs for one image with L = `num_positions`."""
    solutions = flow_solutions(plan, num_positions)
    return sum((2 if guided else 1) * evaluations for guided, evaluations in solutions)


def generate(
    networks: Networks, requests: SampleRequests, values: dict[str, Array], plan: SamplingPlan
) -> tuple[GranularitySequence, Float32[Array, "B L D"]]:
    """Generates the sequences of a batch.

    Args:
        values: `Settings.traced()`; "temperature" is a scalar, the others are (S,). If the plan has
            `kept`, also "structure_stages" and "token_stages", scalars: so many stages take their
            maps and their tokens from the prefix.
        plan: what each stage runs; static.

    Returns:
        The sequence, and the final canvas.
    """
    class_ids, keys, noise, prefix, region = requests
    batch, length, num_bits = noise.shape
    stages = num_bits + 1
    times = flow.shifted_times(plan.settings.flow_steps, length, plan.settings.flow_shift)
    restart = plan.settings.flow_restart
    restart_times = jnp.asarray([restart, *times[times < restart]], jnp.float32)
    times = jnp.asarray(times, jnp.float32)
    keeps_last = any(stage.solution != "new" for stage in plan.stages)
    reference = granularity.structure_embedding(prefix.structure[:, -1], num_bits, num_bits) - 1.0
    structure_stages, token_stages = (
        values.get(name, 0) for name in ("structure_stages", "token_stages")
    )
    token_keys, split_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)

    def draw_tokens(source, canvas, maps, x):
        stage = x["stage"]
        scale = x["content_guidance"] if source == "guided" else None
        guidance = Guidance(class_ids, networks.null_id, scale)
        double = guidance.double
        logits = guidance(networks.logits(double(canvas), double(maps), stage, guidance.classes))
        if plan.greedy:
            ids = logits.argmax(-1)
        else:
            logits = filter_logits(
                logits / values["temperature"],
                x["top_k"] if plan.top_k else None,
                x["top_p"] if plan.top_p else None,
            )
            draw = lambda key, row: jax.random.categorical(jax.random.fold_in(key, stage), row)
            ids = jax.vmap(draw)(token_keys, logits)
        tokens = at_positions(ids.astype(jnp.int32), maps)
        if plan.region:
            # Positions outside keep their reference cluster, and so its token.
            outside = (maps[:, :, None] == maps[:, None, :]) & ~region[:, None, :]
            kept = jnp.take_along_axis(x["tokens"], outside.argmax(-1), axis=1)
            tokens = jnp.where(outside.any(-1), kept, tokens)
        return tokens

    def solve_flow(stage_plan, canvas, maps, last, x):
        if stage_plan.solution == "reuse":
            return last
        stage = x["stage"]
        scale = x["structure_guidance"] if stage_plan.split == "guided" else None
        guidance = Guidance(class_ids, networks.null_id, scale)
        double = guidance.double
        solver = plan.settings.solver
        restarts = stage_plan.solution == "restart"
        at = restart_times if restarts else times
        velocity, per_time = networks.flow_velocity(
            double(canvas), double(maps), stage, guidance.classes, flow.call_times(at, solver)
        )
        guided = lambda z, at_time: guidance(velocity(double(z), at_time))
        known = granularity.structure_embedding(maps, stage, num_bits) - 1.0
        follow = (~region, reference) if plan.region else None
        start = last if restarts else None
        return flow.solve(guided, noise, known, stage, at, follow, solver, per_time, start)

    def draw_split(solution, maps, x, gumbel):
        stage = x["stage"]
        scores = jax.lax.dynamic_index_in_dim(solution, stage, axis=2, keepdims=False)
        kept = jnp.where(region, -1, x["next_structure"] % 2) if plan.region else None
        if not gumbel:
            return granularity.split(maps, scores, stage, kept=kept)
        draw = lambda key, maps, scores, kept: granularity.split(
            maps, scores, stage, key=jax.random.fold_in(key, stage), kept=kept
        )
        return jax.vmap(draw)(split_keys, maps, scores, kept)

    def next_maps(stage_plan, canvas, maps, last, x):
        """(maps of the next stage, last solution of the flow)"""
        if stage_plan.split == "fixed":
            return x["next_structure"], last
        if stage_plan.split == "noise":
            return draw_split(noise, maps, x, gumbel=False), last
        solution = solve_flow(stage_plan, canvas, maps, last, x)
        maps = draw_split(solution, maps, x, plan.settings.gumbel)
        return maps, solution if keeps_last else None

    def kept_if(condition, keep, draw):
        return jax.lax.cond(condition, keep, draw) if plan.kept else draw()

    def run_stage(stage_plan, carry, x):
        (canvas, maps, last), stage = carry, x["stage"]
        tokens = kept_if(
            stage < token_stages,
            lambda: x["tokens"],
            lambda: draw_tokens(stage_plan.content, canvas, maps, x),
        )
        canvas = networks.add_stage(canvas, tokens, stage)
        if stage_plan.split == "none":
            return (canvas, maps, last), (maps, tokens)
        draw = lambda solution: (
            lambda: next_maps(stage_plan._replace(solution=solution), canvas, maps, last, x)
        )
        drawn = draw(stage_plan.solution)
        if stage_plan.solution != "new":  # the first flow that is solved has no last solution
            again = drawn
            drawn = lambda: kept_if(stage + 1 == structure_stages, draw("new"), again)
        after, solution = kept_if(
            stage + 1 < structure_stages, lambda: (x["next_structure"], last), drawn
        )
        return (canvas, after, solution), (maps, tokens)

    stage_first = lambda x: jnp.moveaxis(x, 1, 0)
    inputs = {
        "stage": jnp.arange(stages),
        "tokens": stage_first(prefix.tokens),
        "next_structure": jnp.roll(stage_first(prefix.structure), -1, axis=0),
        **{name: value for name, value in values.items() if jnp.ndim(value)},  # one per stage
    }
    # The first map is zero everywhere, but is read from the prefix. Workaround: libtpu 0.0.52
    # aborts on v5p if the first map is a compile-time constant.
    canvas = jnp.zeros((batch, length, networks.latent_dim))
    carry = canvas, prefix.structure[:, 0], noise if keeps_last else None
    outputs, start = [], 0
    for stage_plan, group in itertools.groupby(plan.stages):
        end = start + len(list(group))
        xs = jax.tree.map(lambda x: x[start:end], inputs)
        carry, out = jax.lax.scan(lambda c, x: run_stage(stage_plan, c, x), carry, xs)
        outputs.append(out)
        start = end
    structure, tokens = (jnp.moveaxis(jnp.concatenate(parts), 0, 1) for parts in zip(*outputs))
    return GranularitySequence(structure, tokens), carry[0]
