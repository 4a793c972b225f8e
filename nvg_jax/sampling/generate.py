"""The stage loop: from class ids to a visual granularity sequence (paper, Section 3.4).

A pure function over callables, which compiles into one program: stages that run the same
branches share one `lax.scan`.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nvg_jax import granularity
from nvg_jax.sampling.guidance import filter_logits, guided
from nvg_jax.structure import flow
from nvg_jax.tokenizer.quantizer import GranularitySequence, at_positions


def per_stage(value, num_stages: int, name: str, schedule=np.linspace) -> tuple[float, ...]:
    """Expands a number, a (start, end) pair or S values to S values.

    Raises:
        ValueError: another count of values, or something that is no finite number.
    """
    try:
        values = np.atleast_1d(np.asarray(value, np.float64))
    except (TypeError, ValueError):
        values = np.array([np.nan])
    if not np.isfinite(values).all():
        raise ValueError(f"{name} takes finite numbers, got {value!r}.")
    if values.shape == (1,):
        values = np.repeat(values, num_stages)
    elif values.shape == (2,) and num_stages != 2:
        values = schedule(*values, num_stages)
    if values.shape != (num_stages,):
        raise ValueError(
            f"{name} takes a number, a (start, end) pair or {num_stages} values (one a stage), "
            f"got {value!r}."
        )
    return tuple(values.tolist())


def top_p_range(start: float, end: float, num_stages: int) -> np.ndarray:
    """Top-p of every stage: u_i = K ** (i / K) mapped linearly from (u_0, u_K) to (start, end)."""
    last = num_stages - 1
    u = np.float64(last) ** (np.arange(num_stages) / last)
    return end + (start - end) * (u[-1] - u) / (u[-1] - u[0])


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample; the defaults are plain sampling from the model.

    temperature: 0 takes the most likely token. top_k: 0 keeps all tokens. top_p: in (0, 1].
    content_guidance, structure_guidance: 1 is no guidance. top_k, top_p and the guidances take a
    number, a (start, end) pair or S values. flow_steps: Euler steps of a split. gumbel: draw the
    splits at random instead of taking the larger half.
    """

    temperature: float = 1.0
    top_k: int | tuple[int, ...] = 0
    top_p: float | tuple[float, ...] = 1.0
    content_guidance: float | tuple[float, ...] = 1.0
    structure_guidance: float | tuple[float, ...] = 1.0
    flow_steps: int = 25
    gumbel: bool = False

    @classmethod
    def from_dict(cls, values: dict) -> "Settings":
        """From a dictionary that may have been through JSON, which makes lists of tuples."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def expand(self, num_stages: int, codebook_size: int) -> "Settings":
        """One value a stage for every range, checked.

        Raises:
            ValueError: a value outside its range, or another count of values.
        """

        def integers(start, end, count):
            return np.round(np.linspace(start, end, count))

        top_k = per_stage(self.top_k, num_stages, "top_k", integers)
        top_p = per_stage(self.top_p, num_stages, "top_p", top_p_range)
        ranges = {
            name: per_stage(getattr(self, name), num_stages, name)
            for name in ("content_guidance", "structure_guidance")
        }
        (temperature,) = per_stage(self.temperature, 1, "temperature")
        if temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}.")
        if any(k != int(k) or not 0 <= k <= codebook_size for k in top_k):
            raise ValueError(
                f"top_k must be whole numbers from 0 (no filter) to the codebook's "
                f"{codebook_size}, got {self.top_k}."
            )
        if not all(0 < p <= 1 for p in top_p):
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if self.flow_steps != int(self.flow_steps) or self.flow_steps < 1:
            raise ValueError(
                f"flow_steps must be a whole number of 1 or more, got {self.flow_steps}"
            )
        return dataclasses.replace(
            self,
            top_k=tuple(int(k) for k in top_k),
            top_p=top_p,
            flow_steps=int(self.flow_steps),
            **ranges,
        )


class Networks(NamedTuple):
    """What the loop calls.

    logits: (canvas (B, L, D), labels (B, L), stage, class_ids (B,)) -> (B, L, V), a row a cluster
        (rows past the stage's 2**stage clusters are not used).
    velocity: (z (B, L, K), time, labels, canvas, stage, class_ids) -> (B, L, K).
    add_stage: (canvas, tokens (B, L), stage) -> canvas.
    null_id: the class id of no class. latent_dim: D.
    """

    logits: Callable
    velocity: Callable
    add_stage: Callable
    null_id: int
    latent_dim: int


class Stage(NamedTuple):
    """What a stage runs: where its tokens and its split come from.

    content: "given", "plain" or "guided"; split: "given", "plain", "guided", "noise" or "none".
    """

    content: str
    split: str


class Program(NamedTuple):
    """What shapes the compiled program; the other settings are values that may change freely."""

    stages: tuple[Stage, ...]
    flow_steps: int
    gumbel: bool
    greedy: bool
    top_k: bool
    top_p: bool


def make_program(settings: Settings, given_tokens: int = 0, given_structure: int = 0) -> Program:
    """The program for expanded settings.

    Args:
        given_tokens: the tokens of stages 0 .. given_tokens - 1 are given.
        given_structure: the maps of stages 0 .. given_structure - 1 are given.
    """
    count = len(settings.content_guidance)
    stages = []
    for stage in range(count):
        content = "plain" if settings.content_guidance[stage] == 1 else "guided"
        split = "plain" if settings.structure_guidance[stage] == 1 else "guided"
        if stage < given_tokens:
            content = "given"
        if stage == count - 1:
            split = "none"
        elif stage + 1 < given_structure:
            split = "given"
        elif stage == count - 2:
            split = "noise"  # never learned: either order of two positions will do
        stages.append(Stage(content, split))
    return Program(
        stages=tuple(stages),
        flow_steps=settings.flow_steps,
        gumbel=settings.gumbel,
        greedy=settings.temperature == 0,
        top_k=any(settings.top_k),
        top_p=any(p < 1 for p in settings.top_p),
    )


def generate(
    networks: Networks,
    class_ids,
    keys,
    noise,
    program: Program,
    values: dict[str, jax.Array],
    given: GranularitySequence,
) -> tuple[GranularitySequence, jax.Array]:
    """Generates the sequences of a batch.

    Args:
        class_ids: int32 (B,).
        keys: a random key for each sample (B,); all its randomness comes from it.
        noise: float32 (B, L, K), the noise that every stage's flow starts from.
        program: what each stage runs; static.
        values: "temperature" scalar, and "top_k", "top_p", "content_guidance" and
            "structure_guidance", each (S,).
        given: maps and tokens int32 (B, S, L), read where the program says "given".

    Returns:
        The sequence, and the canvases float32 (B, S, L, D) after each stage.
    """
    batch, length, num_bits = noise.shape
    stages = num_bits + 1
    times = jnp.asarray(flow.shifted_times(program.flow_steps, length), jnp.float32)
    token_keys, split_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)

    def draw_tokens(mode, canvas, labels, x):
        stage = x["stage"]
        scale = x["content_guidance"] if mode == "guided" else None
        logits = guided(
            lambda doubled, classes: networks.logits(
                doubled(canvas), doubled(labels), stage, classes
            ),
            class_ids,
            networks.null_id,
            scale,
        )
        if program.greedy:
            ids = logits.argmax(-1)
        else:
            logits = filter_logits(
                logits / values["temperature"],
                x["top_k"] if program.top_k else None,
                x["top_p"] if program.top_p else None,
            )
            draw = lambda key, row: jax.random.categorical(jax.random.fold_in(key, stage), row)
            ids = jax.vmap(draw)(token_keys, logits)
        return at_positions(ids.astype(jnp.int32), labels)

    def draw_split(mode, canvas, labels, x):
        stage = x["stage"]
        bit = lambda z: jax.lax.dynamic_index_in_dim(z, stage, axis=2, keepdims=False)
        if mode == "noise":
            return granularity.split(labels, bit(noise), stage)
        scale = x["structure_guidance"] if mode == "guided" else None
        known = granularity.structure_embedding(labels, stage, num_bits) - 1.0

        def velocity(z, time):
            return guided(
                lambda doubled, classes: networks.velocity(
                    doubled(z), time, doubled(labels), doubled(canvas), stage, classes
                ),
                class_ids,
                networks.null_id,
                scale,
            )

        scores = bit(flow.solve(velocity, noise, known, stage, times))
        if program.gumbel:
            draw = lambda key, labels, scores: granularity.split(
                labels, scores, stage, key=jax.random.fold_in(key, stage)
            )
            return jax.vmap(draw)(split_keys, labels, scores)
        return granularity.split(labels, scores, stage)

    def run_stage(mode, carry, x):
        canvas, labels = carry
        tokens = x["tokens"]
        if mode.content != "given":
            tokens = draw_tokens(mode.content, canvas, labels, x)
        canvas = networks.add_stage(canvas, tokens, x["stage"])
        after = labels
        if mode.split == "given":
            after = x["next_structure"]
        elif mode.split != "none":
            after = draw_split(mode.split, canvas, labels, x)
        return (canvas, after), (labels, tokens, canvas)

    stage_first = lambda x: jnp.moveaxis(x, 1, 0)
    inputs = {
        "stage": jnp.arange(stages),
        "tokens": stage_first(given.tokens),
        "next_structure": jnp.roll(stage_first(given.structure), -1, axis=0),
        **{k: v for k, v in values.items() if k != "temperature"},
    }
    carry = (
        jnp.zeros((batch, length, networks.latent_dim)),
        jnp.zeros((batch, length), jnp.int32),
    )
    outputs, start = [], 0
    for mode, group in itertools.groupby(program.stages):
        end = start + len(list(group))
        xs = jax.tree.map(lambda x: x[start:end], inputs)
        carry, out = jax.lax.scan(lambda c, x: run_stage(mode, c, x), carry, xs)
        outputs.append(out)
        start = end
    structure, tokens, canvases = (
        jnp.moveaxis(jnp.concatenate(parts), 0, 1) for parts in zip(*outputs)
    )
    return GranularitySequence(structure, tokens), canvases
