"""Trains the generators: losses, step, task (paper, Sections 3.2, 3.3 and Appendix).

Either one alone or, as in the paper, both together on the same batches, with one optimizer that
clips the gradients of both by their joint norm.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nvg_jax import granularity, models, pretrained, workdir
from nvg_jax.content.losses import alignment_loss, content_losses
from nvg_jax.content.model import RepaProjector
from nvg_jax.errors import UserError
from nvg_jax.layers import TransformerConfig
from nvg_jax.models import Generator
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime import sharding
from nvg_jax.runtime.processes import is_main
from nvg_jax.sampling.settings import Settings
from nvg_jax.structure.losses import draw_times, structure_losses
from nvg_jax.structure.model import StructureGenerator
from nvg_jax.tokenizer import GranularitySequence, Quantized, Tokenizer, TokenizerConfig
from nvg_jax.tokenizer.quantizer import at_positions
from nvg_jax.training import programs
from nvg_jax.training.initial import start_from, with_params
from nvg_jax.training.loop import Task
from nvg_jax.training.optimizers import OptimizerConfig, learning_rate_schedule, make_optimizer
from nvg_jax.training.run import Run
from nvg_jax.training.state import TrainState
from nvg_jax.visualize import image_grid
from nvg_jax.workdir import RunMetadata

PICTURE_CLASSES, PICTURE_PER_CLASS = 10, 4  # samples in the picture


@dataclasses.dataclass(frozen=True)
class RepaConfig:
    """Representation alignment of the content generator (Yu et al., arXiv 2410.06940).

    Projects the hidden states after `block` blocks with an MLP and maximizes their cosine
    similarity to DINOv2 patch features of the same image; weight=0 disables it.
    """

    weight: float
    block: int

    def check(self, depth: int, grid: tuple[int, int]):
        """Raises UserError if a content generator of these sizes cannot be aligned."""
        if self.weight < 0:
            raise UserError(f"generator_training.repa_weight must be 0 or more, got {self.weight}.")
        if self.weight and not 1 <= self.block <= depth:
            raise UserError(
                f"generator_training.repa_block must be one of the content generator's {depth} "
                f"blocks, 1 .. {depth}, got {self.block}."
            )
        rows, columns = pretrained.DINOV2_GRID
        if self.weight and grid != (rows, columns):
            raise UserError(
                f"REPA compares with the {rows} x {columns} patches of DINOv2 and "
                f"needs a latent of that size, not {grid[0]} x {grid[1]}; turn it off with "
                "--config.generator_training.repa_weight=0."
            )


def loss_terms(
    model: Generator,
    params,
    quantized: Quantized,
    class_ids,
    canvas_scale,
    key,
    weights=None,
    repa: RepaConfig | None = None,
    targets=None,
):
    """(scalar loss, {name: float32 per stage}) of one generator on an encoded batch.

    Args:
        class_ids: int32 (B,), the null class where the label was dropped.
        canvas_scale: float32 (S + 1,).
        key: None evaluates without drop path, with the flow noise of seed 0.
        weights: float32 (B,), per-image weights that sum to 1; None means uniform.
        repa, targets: how to align the content generator, and the features to align it with,
            float32 (B, L, 768); None disables the alignment.
    """
    batch = class_ids.shape[0]
    structure, canvases = quantized.sequence.structure, quantized.canvases
    stages = structure.shape[1]
    deterministic = key is None
    noise_key, time_key, drop_key = jax.random.split(jax.random.key(0) if key is None else key, 3)
    apply = lambda *args, **kwargs: model.apply(
        {"params": params}, *args, rngs={"drop_path": drop_key}, **kwargs
    )
    if isinstance(model, StructureGenerator):
        learned = stages - 2
        losses = structure_losses(
            lambda *inputs: apply(
                *inputs, jnp.repeat(class_ids, learned), deterministic=deterministic
            ),
            structure,
            canvases,
            jax.random.normal(noise_key, (batch, structure.shape[2], stages - 1)),
            draw_times(time_key, batch, learned),
            weights,
        )
        return losses.mean(), {"flow_loss": losses}

    def predict_canvas(canvas, embedding, stage):
        return apply(
            canvas,
            embedding,
            stage,
            jnp.repeat(class_ids, stages),
            canvas_scale,
            deterministic=deterministic,
            feature_block=repa.block if repa else 0,
            method="predict_canvas",
        )

    token_logits = lambda missing: apply(missing, method="token_logits")
    terms, hidden = content_losses(predict_canvas, token_logits, quantized, weights)
    losses = terms["canvas_loss"] + terms["token_loss"]
    if repa:
        projector = make_projector(model.dtype)
        projected = projector.apply({"params": params["repa"]}, hidden)
        terms["repa_loss"] = alignment_loss(projected, targets)
        losses += repa.weight * terms["repa_loss"]
    return losses.mean(), terms


def encode(tokenizer: Tokenizer, params, batch) -> Quantized:
    """The sequences and canvases of a batch, from the frozen tokenizer.

    Args:
        batch: {"image": float32 (B, H, W, 3) in [-1, 1]}, or a cached sequence: {"structure": int
            (B, L), the labels of the finest stage, "tokens": int (B, 2L - 1), the unique tokens of
            stages 0, 1, ... K, concatenated}.

    Returns:
        Quantized; its `losses` are None for a cached sequence, whose latent is not known.
    """
    apply = functools.partial(tokenizer.apply, {"params": params})
    if "image" in batch:
        return jax.lax.stop_gradient(apply(batch["image"], method="encode"))
    finest, tokens = (batch[name].astype(jnp.int32) for name in ("structure", "tokens"))
    stages = granularity.num_stages(finest.shape[1])
    structure = granularity.all_stages(finest)
    stage_tokens = jnp.split(tokens, [2**stage - 1 for stage in range(1, stages)], axis=1)
    at = [at_positions(ids, structure[:, stage]) for stage, ids in enumerate(stage_tokens)]
    sequence = GranularitySequence(structure, jnp.stack(at, axis=1))
    canvases = jax.lax.stop_gradient(apply(sequence, method="canvases"))
    return Quantized(sequence, canvases, tuple(stage_tokens), None)


def train_step(
    state: TrainState,
    tokenizer_params,
    frozen,
    canvas_scale,
    batch,
    key,
    *,
    generators: dict[str, Generator],
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    tokenizer: Tokenizer,
    class_dropout: float,
    repa: RepaConfig | None,
):
    """One step of every generator on a batch: the input of `encode`, and "label".

    Args:
        state: its parameters are {name: tree} for each name in `generators`.
        frozen: {"dinov2": parameters} if the content generator is aligned.
        key: the run's key; the step number is folded in.

    Returns:
        (state, metrics), each metric prefixed with its generator; "grad_norm" is the global norm of
        all gradients, before clipping.
    """
    quantized = encode(tokenizer, tokenizer_params, batch)
    targets = repa and jax.lax.stop_gradient(
        pretrained.dinov2(frozen["dinov2"], batch["image"], tokenizer.dtype)
    )

    def loss_of(params, name, step_key):
        drop_key, loss_key = jax.random.split(step_key)
        model = generators[name]
        dropped = jax.random.bernoulli(drop_key, class_dropout, batch["label"].shape)
        class_ids = jnp.where(dropped, model.num_classes, batch["label"])
        return loss_terms(
            model, params, quantized, class_ids, canvas_scale, loss_key, repa=repa, targets=targets
        )

    grads, metrics = {}, {}
    for index, name in enumerate(sorted(generators)):
        step_key = jax.random.fold_in(jax.random.fold_in(key, index), state.step)
        (loss, terms), grads[name] = jax.value_and_grad(loss_of, has_aux=True)(
            state.params[name], name, step_key
        )
        metrics |= {f"{name}/{term}": value for term, value in {"loss": loss, **terms}.items()}
    metrics["grad_norm"] = optax.tree.norm(grads)
    return state.update(grads, optimizer, config.ema_decay), metrics


def eval_step(
    params,
    tokenizer_params,
    canvas_scale,
    batch,
    *,
    generators: dict[str, Generator],
    tokenizer: Tokenizer,
):
    """Losses of every generator in `params` on a batch like that of `train_step`, without dropout.

    Images where the batch's "mask", bool (B,), is False do not count.
    """
    quantized = encode(tokenizer, tokenizer_params, batch)
    weights = batch["mask"] / jnp.maximum(batch["mask"].sum(), 1)
    metrics = {}
    for name in params:
        loss, terms = loss_terms(
            generators[name], params[name], quantized, batch["label"], canvas_scale, None, weights
        )
        metrics.update({f"{name}/{k}": v for k, v in {"loss": loss, **terms}.items()})
    return metrics


# The program and the task.


def repa_config(config: ml_collections.ConfigDict) -> RepaConfig | None:
    """The REPA settings of a config's content generator, None if alignment is off.

    Raises:
        UserError: invalid settings.
    """
    recipe = config.generator_training
    repa = RepaConfig(recipe.repa_weight, recipe.repa_block)
    repa.check(config.content.depth, tuple(config.tokenizer.latent_size))
    return repa if repa.weight else None


def parts_of(part: str) -> tuple[str, ...]:
    """The generators in a trained part: "generators" holds both."""
    return models.GENERATORS if part == "generators" else (part,)


def pretrained_names(config: ml_collections.ConfigDict, names: Sequence[str]) -> tuple[str, ...]:
    """The names of the pretrained networks that training the generators `names` needs."""
    return ("dinov2",) if "content" in names and repa_config(config) else ()


def sampling_settings(config: ml_collections.ConfigDict) -> Settings:
    """The settings that the trained model is sampled with by default."""
    return Settings.from_dict(config.sampling.to_dict())


def build_program(run: Run, part: str) -> programs.TrainProgram:
    """The program of a part ("content", "structure", or "generators") of a run.

    Raises:
        UserError: invalid settings, or a batch that does not fit the mesh or the data set.
    """
    config, recipe = run.config, run.config.generator_training
    sizes = run.tokenizer_config
    sampling_settings(config).expand(sizes.num_stages, sizes.codebook_size)
    run.check_batch_size(recipe.batch_size)
    steps, num_classes = run.num_steps(recipe), run.train_source.num_classes
    return make_program(config, run.mesh, steps, parts_of(part), num_classes)


@programs.shared
def make_program(
    config: ml_collections.FrozenConfigDict,
    mesh: Mesh,
    steps: int,
    names: tuple[str, ...],
    num_classes: int,
) -> programs.TrainProgram:
    """The training of the generators `names` ("content", "structure", or both) over `steps` steps.

    init: (key, codebook). step: (state, tokenizer parameters, frozen, canvas scale, batch, key).
    evaluate: (averaged parameters, tokenizer parameters, canvas scale, batch). See `train_step` and
    `eval_step`.

    Raises:
        UserError: attention heads that do not divide over the mesh, or invalid settings.
    """
    programs.check_heads(config, names, mesh)
    recipe = config.generator_training
    optimizer_config = OptimizerConfig(**recipe.optimizer)
    optimizer = make_optimizer(optimizer_config, recipe.batch_size, steps)
    tokenizer_config = TokenizerConfig(**config.tokenizer)
    repa = repa_config(config) if "content" in names else None
    tokenizer = models.make_tokenizer(tokenizer_config, config.dtype)
    generators = {
        name: models.make_generator(
            name, TransformerConfig(**config[name]), tokenizer_config, num_classes, config.dtype
        )
        for name in names
    }

    def init(key, codebook):
        params = {}
        for name, model in generators.items():
            name_key = jax.random.fold_in(key, models.GENERATORS.index(name))
            params[name] = models.init_generator(model, name_key, codebook)
            if name == "content" and repa:
                params[name] |= {"repa": init_projector(model, jax.random.fold_in(name_key, 1))}
        return TrainState.create(params, optimizer)

    codebook = jax.ShapeDtypeStruct(
        (tokenizer_config.codebook_size, tokenizer_config.latent_dim), jnp.float32
    )
    key = programs.abstract_key()
    init, state = sharding.sharded_init(init, mesh, key, codebook)
    replicated = NamedSharding(mesh, PartitionSpec())
    networks = dict(generators=generators, tokenizer=tokenizer)
    step = functools.partial(
        train_step,
        optimizer=optimizer,
        config=optimizer_config,
        class_dropout=config.class_dropout,
        repa=repa,
        **networks,
    )
    tokenizer_params = models.abstract_params("tokenizer", tokenizer_config)
    return programs.TrainProgram(
        init=init,
        step=jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated),
        ),
        evaluate=jax.jit(functools.partial(eval_step, **networks), out_shardings=replicated),
        arguments=(
            state,
            sharding.with_shardings(tokenizer_params, replicated),
            programs.abstract_frozen(pretrained_names(config, names), mesh),
            jax.ShapeDtypeStruct((tokenizer_config.num_stages + 1,), jnp.float32),
            programs.abstract_batch(tokenizer_config, recipe.batch_size, mesh),
            key,
        ),
        schedule=learning_rate_schedule(optimizer_config, recipe.batch_size, steps),
    )


def make_projector(dtype) -> RepaProjector:
    return RepaProjector(pretrained.DINOV2_WIDTH, dtype)


def init_projector(model: Generator, key):
    """Initial parameters of the REPA projector, boxed with their logical axes."""
    features = jnp.zeros((1, 1, model.transformer.width))
    return make_projector(model.dtype).init(key, features)["params"]


def task(run: Run, part: str) -> Task:
    """The generators of a part ("content", "structure", or "generators": both) as a task."""
    names = parts_of(part)
    config, recipe = run.config, run.config.generator_training
    tokenizer, tokenizer_params = load_tokenizer(run)
    steps = run.num_steps(recipe)
    program = build_program(run, part)
    frozen = run.frozen(pretrained_names(config, names))
    canvas_scale = np.asarray(tokenizer.canvas_scale, np.float32)
    key = jax.random.fold_in(run.key, 2)
    metadata = RunMetadata(
        tokenizer=tokenizer.tokenizer,
        class_names=run.train_source.class_names,
        fingerprint=tokenizer.fingerprint,
        canvas_scale=tokenizer.canvas_scale,
        **{name: TransformerConfig(**config[name]) for name in names},
        sampling=sampling_settings(config),
        tokenizer_workdir=str(run.tokenizer_workdir),
        config=run.config_json(),
        steps=steps,
    )
    sampler = Sampler(metadata, config.seed) if len(names) == len(models.GENERATORS) else None

    def evaluate(state):
        losses = run.test_metrics(
            recipe,
            lambda batch: program.evaluate(state.ema_params, tokenizer_params, canvas_scale, batch),
        )
        picture = None
        if sampler is not None:
            params = model(state)
            if is_main():
                picture = sampler.picture(params)
        return losses, picture

    def model(state):
        params = {"tokenizer": tokenizer_params}
        for name in names:
            params[name] = {k: v for k, v in state.ema_params[name].items() if k != "repa"}
        return jax.tree.map(sharding.to_host, params)

    def init():
        codebook = tokenizer_params["quantizer"]["codebook"]
        state = program.init(jax.random.fold_in(run.key, 1), codebook)
        if not config.init_from:
            return state
        classes = run.train_source.class_names
        return with_params(state, start_from(config.init_from, state.params, classes))

    return Task(
        name=part,
        recipe=recipe,
        steps=steps,
        state=program.state,
        learning_rate=program.schedule,
        metadata=metadata,
        batches=run.train_batches(recipe.batch_size, config.seed + 1),
        init=init,
        update=lambda state, batch, step: program.step(
            state, tokenizer_params, frozen, canvas_scale, batch, key
        ),
        evaluate=evaluate,
        finish=lambda state: metadata,
        model=model,
    )


class Sampler:
    """Draws the same samples at every evaluation, on the devices of this process."""

    def __init__(self, metadata: RunMetadata, seed: int):
        self._metadata, self._seed, self._pipeline = metadata, seed, None

    def picture(self, params) -> np.ndarray:
        """A grid of samples, uint8 (H, W, 3)."""
        count = min(self._metadata.num_classes, PICTURE_CLASSES)
        classes = np.arange(count).repeat(PICTURE_PER_CLASS)
        # Not in the mesh of all processes, where every operation would wait for the others.
        with jax.set_mesh(sharding.make_mesh(devices=jax.local_devices())):
            if self._pipeline is None:
                self._pipeline = Pipeline(self._metadata, params)
            else:  # keeps the compiled programs
                self._pipeline.params = params
            return image_grid(self._pipeline.sample(classes, seed=self._seed).images, columns=8)


def load_tokenizer(run: Run):
    """The trained tokenizer to build on: (its metadata, its raw parameters, replicated).

    Raises:
        UserError: no tokenizer has finished training, or its sizes differ.
    """
    folder = run.tokenizer_workdir
    # A single read, so that weights and metadata come from the same checkpoint, even if the newest
    # one is damaged.
    found = workdir.read_tokenizer(folder)
    if found is None or found[0].fingerprint is None:
        raise UserError(
            f"The generators need a trained tokenizer, and {folder} has none that has finished. "
            "Run with --config.part=tokenizer (or all) first, or give a folder that has one with "
            "--config.tokenizer_workdir."
        )
    metadata, params = found
    if metadata.tokenizer != run.tokenizer_config:
        raise UserError(
            f"The tokenizer in {folder} has other sizes than config.tokenizer: "
            f"{metadata.tokenizer} and {run.tokenizer_config}. Use the config it was trained with, "
            "or another workdir."
        )
    if run.cached_sequences:
        run.train_source.check_tokenizer(metadata.fingerprint)
    return metadata, jax.device_put(params, run.replicated)
