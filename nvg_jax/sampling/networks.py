"""The sampler as one program: the networks of a model bound to the stage loop."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Float32

from nvg_jax import granularity
from nvg_jax.layers import cast_blocks
from nvg_jax.models import ModelConfig
from nvg_jax.runtime import sharding
from nvg_jax.runtime.hardware import compiler_options
from nvg_jax.sampling.generate import (
    Networks,
    SampleRequests,
    SamplingPlan,
    generate,
    make_plan,
)
from nvg_jax.sampling.settings import Settings
from nvg_jax.tokenizer import GranularitySequence


class SamplingProgram(NamedTuple):
    """The sampler of one model.

    sample: (params, canvas_scale, requests, values, *, plan), jitted; compiled once per plan and
        batch size. See `sample_batch`.
    """

    sample: Callable
    model: ModelConfig

    def plan(
        self,
        settings: Settings,
        structure_stages: int = 0,
        token_stages: int = 0,
        region: bool = False,
    ) -> tuple[SamplingPlan, dict[str, Any]]:
        """The static and the traced halves of the settings: (plan, values).

        Args:
            structure_stages, token_stages: how many stages keep the maps and the tokens of the
                prefix; traced.
            region: whether only a region is generated in the other stages.

        Raises:
            UserError: an invalid setting.
        """
        sizes = self.model.tokenizer
        settings = settings.expand(sizes.num_stages, sizes.codebook_size)
        # The first map is always the same.
        kept = region or structure_stages > 1 or token_stages > 0
        values: dict[str, Any] = settings.traced()
        if kept:
            values["structure_stages"] = np.int32(structure_stages)
            values["token_stages"] = np.int32(token_stages)
        return make_plan(settings, kept, region, fixed=sizes.fixed_structure is not None), values

    def arguments(self, batch_size: int, values: dict[str, Any], mesh: Mesh) -> tuple:
        """The abstract arguments of `sample`, with the batch sharded over a mesh.

        `program.sample.lower(*program.arguments(...), plan=plan)` compiles without any data.
        """
        stages, length = self.model.tokenizer.num_stages, self.model.tokenizer.num_positions
        split = NamedSharding(mesh, sharding.BATCH_SPEC)
        replicated = sharding.replicated(mesh)

        def batch(*shape: int, dtype=jnp.int32) -> Any:
            return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=split)

        return (
            sharding.with_shardings(
                {name: self.model.abstract_params(name) for name in self.model.networks}, replicated
            ),
            jax.ShapeDtypeStruct((stages + 1,), jnp.float32),
            SampleRequests(
                class_ids=batch(),
                keys=batch(dtype=jax.eval_shape(jax.random.key, 0).dtype),
                noise=batch(length, stages - 1, dtype=jnp.float32),
                prefix=GranularitySequence(batch(stages, length), batch(stages, length)),
                region=batch(length, dtype=jnp.bool_),
            ),
            {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in values.items()},
        )


@functools.lru_cache(maxsize=8)
def sampling_program(model: ModelConfig) -> SamplingProgram:
    """The sampler of a model with the generators that it needs.

    Models that differ only in their weights therefore share one compilation.
    """
    sample = functools.partial(sample_batch, model=model)
    sample = jax.jit(sample, static_argnames="plan", compiler_options=compiler_options())
    return SamplingProgram(sample, model)


def sample_batch(
    params: dict[str, Any],
    canvas_scale: Float[Array, " factors"],
    requests: SampleRequests,
    values: dict[str, Array],
    *,
    plan: SamplingPlan,
    model: ModelConfig,
) -> tuple[Float32[Array, "B H W 3"], GranularitySequence]:
    """Samples a batch of images; see `generate` for the arguments.

    Args:
        params: {"tokenizer", "content"} and, unless the maps are fixed, "structure".
    """
    networks, decode = bind(params, canvas_scale, model)
    sequence, canvas = generate(networks, requests, values, plan)
    return decode(canvas), sequence


def bind(
    params: dict[str, Any], canvas_scale: Float[Array, " factors"], model: ModelConfig
) -> tuple[Networks, Callable]:
    """The functions the sampler calls: (networks of the loop, canvases (B, L, D) -> images)."""
    tokenizer = model.make_tokenizer()
    content = model.make_generator("content")
    length, num_bits = tokenizer.config.num_positions, tokenizer.config.num_stages - 1
    params = {**params, **{m: cast_blocks(params[m], content.dtype) for m in model.generators}}

    def logits(canvas, maps, stage, classes):
        stages = jnp.full(classes.shape, stage)
        embedding = granularity.structure_embedding(maps, stage, num_bits)
        apply = apply_with(content, params["content"])
        final, _ = apply(canvas, embedding, stages, classes, canvas_scale, method="predict_canvas")
        missing = granularity.cluster_means(final - canvas, maps, length)
        return apply(missing, method="token_logits")

    def flow_velocity(canvas, maps, stage, classes, times):
        structure = model.make_generator("structure")  # a grid model has none
        embedding = granularity.structure_embedding(maps, stage, num_bits)
        apply = apply_with(structure, params["structure"])
        condition = apply(embedding, canvas, classes, method="condition")
        per_time = apply(times, jnp.full(classes.shape, stage), classes, method="modulations")
        return lambda z, at_time: apply(z, condition, at_time, method="velocity"), per_time

    apply = apply_with(tokenizer, params["tokenizer"])
    networks = Networks(
        logits=logits,
        flow_velocity=flow_velocity,
        add_stage=functools.partial(apply, method="add_stage"),
        null_id=content.num_classes,
        latent_dim=tokenizer.config.latent_dim,
    )
    return networks, functools.partial(apply, method="decode")


def apply_with(module: nn.Module, params: dict[str, Any]) -> Callable[..., Any]:
    """`module.apply` with these parameters."""
    return functools.partial(module.apply, {"params": params})
