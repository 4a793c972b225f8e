"""Trains the generators: their losses and their trainer (paper, Sections 3.2, 3.3 and Appendix).

Either one alone or, as in the paper, both together on the same batches, with one optimizer that
clips the gradients of both by their joint norm.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from nvg_jax import granularity, lora, pretrained, workdir
from nvg_jax.content.losses import alignment_loss, content_losses
from nvg_jax.content.model import ContentGenerator, RepaProjector
from nvg_jax.data import SequenceSource
from nvg_jax.errors import UserError
from nvg_jax.metadata import RunMetadata
from nvg_jax.models import Generator, ModelConfig, init_generator, init_tokenizer
from nvg_jax.parts import GENERATORS, Part
from nvg_jax.runtime import sharding
from nvg_jax.runtime.sharding import unbox
from nvg_jax.runtime.storage import fingerprint
from nvg_jax.sampling.settings import Settings
from nvg_jax.structure.losses import draw_times, structure_losses
from nvg_jax.structure.model import StructureGenerator
from nvg_jax.tokenizer import GranularitySequence, Quantized, Tokenizer
from nvg_jax.tokenizer.quantizer import at_positions
from nvg_jax.training.initial import fit_model, start_from, with_params
from nvg_jax.training.run import Run, located
from nvg_jax.training.state import Params, TrainState
from nvg_jax.training.trainer import Batch, Trainer

REPA_KEY = 1  # folded into a generator's key for the initial projector


@dataclasses.dataclass(frozen=True)
class RepaConfig:
    """Representation alignment of the content generator (Yu et al., arXiv 2410.06940).

    Projects the hidden states after `block` blocks with an MLP and maximizes their cosine
    similarity to DINOv2 patch features of the same image.
    """

    weight: float
    block: int

    def check(self, depth: int, grid: tuple[int, int]):
        """Raises UserError if a content generator of these sizes cannot be aligned."""
        if not 1 <= self.block <= depth:
            raise UserError(
                f"generator_training.repa_block must be one of the content generator's {depth} "
                f"blocks, 1 .. {depth}, got {self.block}."
            )
        rows, columns = pretrained.DINOV2_GRID
        if grid != (rows, columns):
            raise UserError(
                f"REPA compares with the {rows} x {columns} patches of DINOv2 and "
                f"needs a latent of that size, not {grid[0]} x {grid[1]}; turn it off with "
                "--config.generator_training.repa_weight=0."
            )


class Examples(NamedTuple):
    """An encoded batch.

    class_ids: the null class where the label was dropped. weights: of the images, summing to 1;
    None means uniform. targets: the features to align the content generator with, if it is aligned.
    """

    quantized: Quantized
    class_ids: Int32[Array, " B"]
    canvas_scale: Float32[Array, " S+1"]
    weights: Float32[Array, " B"] | None = None
    targets: Float[Array, "B L 768"] | None = None


def loss_terms(
    model: Generator,
    params: Params,
    examples: Examples,
    key: PRNGKeyArray | None,
    repa: RepaConfig | None = None,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, " stages"]]]:
    """(loss, {name: its term in every stage}) of one generator on an encoded batch.

    Args:
        key: None evaluates without drop path, with the flow noise of seed 0.
        repa: how to align the content generator with `examples.targets`; None for no alignment.
    """
    quantized, class_ids, canvas_scale, weights, targets = examples
    batch = class_ids.shape[0]
    structure, canvases = quantized.sequence.structure, quantized.canvases
    stages = structure.shape[1]
    deterministic = key is None
    noise_key, time_key, drop_key = jax.random.split(jax.random.key(0) if key is None else key, 3)

    def apply(*args, **kwargs) -> Any:
        return model.apply({"params": params}, *args, rngs={"drop_path": drop_key}, **kwargs)

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

    assert isinstance(model, ContentGenerator)

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
        assert targets is not None
        projector = make_projector(model.dtype)
        projected = cast(Array, projector.apply({"params": params["repa"]}, hidden))
        terms["repa_loss"] = alignment_loss(projected, targets)
        losses += repa.weight * terms["repa_loss"]
    return losses.mean(), terms


def encode(tokenizer: Tokenizer, params: Params, batch: Batch) -> Quantized:
    """The sequences and canvases of a batch, from the frozen tokenizer.

    Args:
        batch: {"image": float32 (B, H, W, 3) in [-1, 1]}, or a cached sequence: {"structure": int
            (B, L), the finest map, "tokens": int (B, 2L - 1), the unique tokens of
            stages 0, 1, ... K, concatenated}.

    Returns:
        Quantized; its `losses` are None for a cached sequence, whose latent is not known.
    """

    def apply(inputs, method: str) -> Any:
        return tokenizer.apply({"params": params}, inputs, method=method)

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


# The trainer.


def repa_config(config: ml_collections.ConfigDict, part: Part) -> RepaConfig | None:
    """The REPA settings of a part's content generator, None if it trains none or without REPA."""
    if "content" not in part.networks:
        return None
    recipe = config.generator_training
    repa = RepaConfig(recipe.repa_weight, recipe.repa_block)
    return repa if repa.weight else None


class GeneratorTrainer(Trainer[TrainState]):
    """Trains one generator, or both on the same batches, with one optimizer.

    A state's parameters are {generator: tree}. The inputs are the raw parameters of the tokenizer,
    "canvas_scale", float32 (S + 1,), and, if the content generator is aligned, "dinov2". A batch
    has the input of `encode`, and "label".

    With `lora.rank`, a state has only adapters (and the projector of an alignment); the generators'
    parameters are the input "base", {generator: tree}.
    """

    SETTINGS = ("class_dropout", "lora")
    INIT_KEY, STEP_KEY, DATA_SEED = 1, 2, 1

    @classmethod
    def pretrained_names(cls, part: Part, config: ml_collections.ConfigDict) -> tuple[str, ...]:
        return ("dinov2",) if repa_config(config, part) else ()

    def make_networks(self):
        check_heads(self.model, self.part.networks, self.mesh)
        self.rank = self.config.lora.rank
        self.repa = repa_config(self.config, self.part)
        if self.repa:
            self.repa.check(
                self.model.generators["content"].depth, self.model.tokenizer.latent_size
            )
        self.tokenizer = self.model.make_tokenizer()
        self.generators = {name: self.model.make_generator(name) for name in self.part.networks}

    def input_shapes(self) -> Params:
        stages = self.model.tokenizer.num_stages
        shapes = {
            "tokenizer": self.model.abstract_params("tokenizer"),
            "canvas_scale": jax.ShapeDtypeStruct((stages + 1,), jnp.float32),
            **self.abstract_pretrained(),
        }
        if self.rank:
            shapes["base"] = {name: self.model.boxed_params(name) for name in self.generators}
        return shapes

    def init_state(self, key: PRNGKeyArray, inputs: Params) -> TrainState:
        params, codebook = {}, inputs["tokenizer"]["quantizer"]["codebook"]
        for name, model in self.generators.items():
            name_key = jax.random.fold_in(key, GENERATORS.index(name))
            if self.rank:
                params[name] = lora.init(inputs["base"][name], self.rank, name_key)
            else:
                params[name] = init_generator(model, name_key, codebook)
            if name == "content" and self.repa:
                params[name] |= {
                    "repa": init_projector(model, jax.random.fold_in(name_key, REPA_KEY))
                }
        return TrainState.create(params, self.optimizer)

    def whole(self, name: str, params: Params, inputs: Params) -> Params:
        """The parameters to apply a generator with, from those of it that are trained."""
        return lora.combine(inputs["base"][name], params) if self.rank else params

    def train_step(
        self,
        state: TrainState,
        inputs: Params,
        batch: Batch,
        key: PRNGKeyArray,
        *,
        index_backprop: bool = False,
    ) -> tuple[TrainState, dict[str, Array]]:
        """One step of every generator.

        Returns:
            (state, metrics), each metric prefixed with its generator; "grad_norm" is the global
            norm of all gradients, before clipping.
        """
        quantized = encode(self.tokenizer, inputs["tokenizer"], batch)
        targets = self.repa and jax.lax.stop_gradient(
            pretrained.dinov2(inputs["dinov2"], batch["image"], self.tokenizer.dtype)
        )

        def loss_of(params, name, step_key):
            drop_key, loss_key = jax.random.split(step_key)
            model = self.generators[name]
            dropped = jax.random.bernoulli(
                drop_key, self.config.class_dropout, batch["label"].shape
            )
            examples = Examples(
                quantized,
                jnp.where(dropped, model.num_classes, batch["label"]),
                inputs["canvas_scale"],
                targets=targets,
            )
            whole = self.whole(name, params, inputs)
            return loss_terms(model, whole, examples, loss_key, self.repa)

        grads, metrics = {}, {}
        for name in sorted(self.generators):
            # The same noise whether a generator is trained alone or with the other.
            own_key = jax.random.fold_in(key, GENERATORS.index(name))
            step_key = jax.random.fold_in(own_key, state.step)
            (loss, terms), grads[name] = jax.value_and_grad(loss_of, has_aux=True)(
                state.params[name], name, step_key
            )
            metrics |= {f"{name}/{term}": value for term, value in {"loss": loss, **terms}.items()}
        metrics["grad_norm"] = optax.tree.norm(grads)
        return self.update(state, grads), metrics

    def eval_step(self, params: Params, inputs: Params, batch: Batch) -> dict[str, Array]:
        """The losses of every generator without dropout."""
        quantized = encode(self.tokenizer, inputs["tokenizer"], batch)
        weights = batch["mask"] / jnp.maximum(batch["mask"].sum(), 1)
        examples = Examples(quantized, batch["label"], inputs["canvas_scale"], weights)
        metrics = {}
        for name, model in self.generators.items():
            loss, terms = loss_terms(model, self.whole(name, params[name], inputs), examples, None)
            metrics.update({f"{name}/{k}": v for k, v in {"loss": loss, **terms}.items()})
        return metrics

    # A run.

    def open(self, run: Run) -> tuple[Params, RunMetadata]:
        """
        Raises:
            UserError: the sampling settings are invalid, or there is no trained tokenizer.
        """
        return self.open_with(run, *load_tokenizer(run))

    def rehearse(self, run: Run) -> tuple[Params, RunMetadata]:
        """`open` with a random tokenizer, in place of one that is yet to be trained."""
        initial = lambda: unbox(init_tokenizer(self.tokenizer, run.key))
        params = jax.jit(initial, out_shardings=run.replicated)()
        ones = (1.0,) * (self.model.tokenizer.num_stages + 1)
        metadata = RunMetadata(self.model.only(), run.train_source.class_names, canvas_scale=ones)
        return self.open_with(run, metadata, params)

    def open_with(
        self, run: Run, tokenizer: RunMetadata, params: Params
    ) -> tuple[Params, RunMetadata]:
        """`open` with this tokenizer."""
        metadata = RunMetadata(
            model=self.model.only(*self.part.networks),
            class_names=run.train_source.class_names,
            fingerprint=tokenizer.fingerprint,
            canvas_scale=tokenizer.canvas_scale,
            sampling=sampling_settings(run.config),
            tokenizer_workdir=run.tokenizer_workdir,
            **self.facts(run),
        )
        scale = np.asarray(tokenizer.canvas_scale, np.float32)
        inputs = {"tokenizer": params, "canvas_scale": jax.device_put(scale, run.replicated)}
        inputs |= run.frozen(self.pretrained_names(self.part, run.config))
        if not self.rank:
            return inputs, metadata
        folder = located(run.config.init_from)
        base = base_metadata, base_params = workdir.read_model(folder)
        workdir.check_tokenizer(base_metadata, tokenizer, f"init_from={folder}")
        if base_metadata.teacher and "structure" in self.generators:
            raise UserError(
                f"The structure generator of init_from={folder} was distilled, and adapters would "
                "be trained as for one that takes many steps. Train them on its teacher, or those "
                "of the content generator alone (--config.part=content)."
            )
        classes = metadata.class_names
        inputs["base"] = fit_model(folder, base, self.abstract_inputs["base"], classes)
        marks = {name: fingerprint(base_params[name]) for name in self.generators}
        return inputs, metadata.replace(base=marks, base_workdir=folder)

    def first_state(self, run: Run, inputs: Params) -> TrainState:
        state = super().first_state(run, inputs)
        if self.rank or not run.config.init_from:
            return state
        classes = run.train_source.class_names
        return with_params(state, start_from(run.config.init_from, state.params, classes))

    def held_out(self, state: TrainState, inputs: Params, batch: Batch) -> dict[str, Array]:
        """Of the averaged parameters and, as "raw/...", of those that are trained."""
        raw = self.jit_eval_step(state.params, inputs, batch)
        return super().held_out(state, inputs, batch) | {f"raw/{k}": v for k, v in raw.items()}

    def export(self, run: Run, state: TrainState, inputs: Params) -> Params:
        params = {"tokenizer": inputs["tokenizer"]}
        for name in self.part.networks:
            params[name] = {k: v for k, v in state.ema_params[name].items() if k != "repa"}
        params = jax.tree.map(sharding.to_host, params)
        if self.rank:
            base = jax.tree.map(sharding.to_host, inputs["base"])
            params |= {name: lora.merge(base[name], params[name]) for name in base}
        return params


def check_heads(model: ModelConfig, names: Iterable[str], mesh: Mesh):
    """Raises UserError for generators whose attention heads do not divide over a mesh."""
    for name in names:
        sizes = model.generators[name]
        heads = sizes.width // sizes.head_dim
        if heads % mesh.shape["tensor"]:
            raise UserError(
                f"The {heads} attention heads of the {name} generator do not split over "
                f"mesh.tensor={mesh.shape['tensor']}; use a divisor of {heads}."
            )


def sampling_settings(config: ml_collections.ConfigDict) -> Settings:
    """The settings that the trained model is sampled with by default."""
    return Settings.from_dict(config.sampling.to_dict())


def make_projector(dtype: DTypeLike) -> RepaProjector:
    return RepaProjector(pretrained.DINOV2_WIDTH, dtype)


def init_projector(model: Generator, key: PRNGKeyArray) -> Params:
    """Initial parameters of the REPA projector, boxed with their logical axes."""
    features = jnp.zeros((1, 1, model.transformer.width))
    return make_projector(model.dtype).init(key, features)["params"]


def load_tokenizer(run: Run) -> tuple[RunMetadata, Params]:
    """The trained tokenizer to build on: (its metadata, its raw parameters, replicated).

    Raises:
        UserError: no tokenizer has finished training, or its sizes differ.
    """
    folder = run.tokenizer_workdir
    # A single read, so that weights and metadata come from the same checkpoint, even if the newest
    # one is damaged.
    stored = workdir.read_tokenizer(folder)
    if stored is None or stored[0].fingerprint is None:
        raise UserError(
            f"The generators need a trained tokenizer, and {folder} has none that has finished. "
            "Run with --config.part=tokenizer (or all) first, or give a folder that has one with "
            "--config.tokenizer_workdir."
        )
    metadata, params = stored
    if metadata.canvas_scale is None:
        raise UserError(
            f"The tokenizer in {folder} was converted without its generators, whose file has the "
            "scales of the canvases. Convert it again, with --generator."
        )
    sizes = metadata.model.tokenizer
    if sizes != run.model.tokenizer:
        raise UserError(
            f"The tokenizer in {folder} has other sizes than config.tokenizer: "
            f"{sizes} and {run.model.tokenizer}. Use the config it was trained with, "
            "or another workdir."
        )
    if isinstance(run.train_source, SequenceSource):
        run.train_source.check_tokenizer(stored[0].fingerprint)
    return metadata, jax.device_put(params, run.replicated)
