"""Trains the tokenizer: its losses and its trainer (paper, Section 3.1 and Appendix)."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32, PRNGKeyArray

from nvg_jax import pretrained
from nvg_jax.errors import UserError
from nvg_jax.metadata import RunMetadata
from nvg_jax.models import init_tokenizer
from nvg_jax.parts import Part
from nvg_jax.runtime import sharding
from nvg_jax.runtime.sharding import unshard
from nvg_jax.runtime.storage import fingerprint
from nvg_jax.tokenizer import Quantized, Tokenizer, codebook_usage
from nvg_jax.tokenizer.diffaug import augment, discriminator_input
from nvg_jax.tokenizer.discriminator import DiscriminatorHeads, SmallFeatures
from nvg_jax.tokenizer.losses import (
    RECONSTRUCTION_LOSSES,
    LeCam,
    adversarial_loss,
    discriminator_loss,
)
from nvg_jax.training.initial import start_from, with_params
from nvg_jax.training.length import step_of
from nvg_jax.training.optimizers import make_optimizer
from nvg_jax.training.run import Run
from nvg_jax.training.state import Params, TrainState
from nvg_jax.training.trainer import Batch, Trainer
from nvg_jax.visualize import reconstruction_grid

DISCRIMINATORS = ("dino", "small")
DISCRIMINATOR_KEY = 1  # folded into the key of the initial state
SCALE_IMAGES = 10_000  # maximum number of images for measuring the canvas scales
PICTURE_IMAGES = 16  # images in the picture of reconstructions


@dataclasses.dataclass(frozen=True)
class TokenizerLossConfig:
    """The losses of the tokenizer; a weight of 0 turns a term off and leaves it out of the program.

    reconstruction: "l1" or "l2". discriminator: "dino" trains heads on the frozen features of DINO
        ViT-S/16, for images of at least 224 x 224; "small" trains a whole network, for small
        images. discriminator_sees_generator_loss: whether the weighted adversarial loss, which
        opposes the hinge loss, is a loss of the discriminator's too, as in the published training.

    Raises:
        UserError: an unknown name.
    """

    reconstruction: str
    perceptual_weight: float
    adversarial_weight: float
    lecam_weight: float
    discriminator: str
    discriminator_sees_generator_loss: bool = False

    def __post_init__(self):
        choices_of = {"reconstruction": RECONSTRUCTION_LOSSES, "discriminator": DISCRIMINATORS}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"tokenizer_training.{name} must be one of {', '.join(choices)}, got "
                    f"{getattr(self, name)!r}."
                )

    @property
    def pretrained_names(self) -> tuple[str, ...]:
        """The names of the pretrained networks that the losses need."""
        names = ("lpips",) if self.perceptual_weight else ()
        if self.adversarial_weight and self.discriminator == "dino":
            names += ("dino",)
        return names

    def make_discriminator(self, dtype: DTypeLike) -> nn.Module | None:
        if not self.adversarial_weight:
            return None
        heads = DiscriminatorHeads(dtype=dtype)
        if self.discriminator == "dino":
            return heads
        return nn.Sequential([SmallFeatures(dtype=dtype), heads])


class DiscriminatorState(flax.struct.PyTreeNode):
    """The discriminator in training: parameters, power-iteration vectors, averaged logits."""

    params: Params
    spectral: Params
    opt_state: optax.OptState
    lecam: LeCam


class TokenizerState(TrainState):
    """The tokenizer in training, with its discriminator if it has one."""

    discriminator: DiscriminatorState | None = None


class Modules(NamedTuple):
    """What is trained, and by which losses."""

    tokenizer: Tokenizer
    discriminator: nn.Module | None
    losses: TokenizerLossConfig


def code_counts(
    stage_tokens: Sequence[Int[Array, "B _"]], codebook_size: int
) -> Int32[Array, "S V"]:
    """How often each token was used in each stage."""
    return jnp.stack(
        [jnp.bincount(ids.ravel(), length=codebook_size) for ids in stage_tokens]
    ).astype(jnp.int32)


def discriminator_inputs(
    discriminator: nn.Module,
    frozen: Params,
    images: Float[Array, "B H W 3"],
    key: PRNGKeyArray,
    dtype: DTypeLike,
) -> Float[Array, "B H W 3"] | list[Float[Array, "B patches 384"]]:
    """What the discriminator sees: images after DiffAug, or DINO's tokens of them."""
    input_key, augment_key = jax.random.split(key)
    images = augment(images, augment_key)
    if not isinstance(discriminator, DiscriminatorHeads):
        return images
    tokens = pretrained.dino(frozen["dino"], discriminator_input(images, input_key), dtype)
    return [hidden[:, 1:] + hidden[:, :1] for hidden in tokens]  # each patch plus the class token


def loss_terms(
    modules: Modules,
    params: Params,
    discriminator_params: Params | None,
    opponent: DiscriminatorState | None,
    frozen: Params,
    images: Float[Array, "B H W 3"],
    key: PRNGKeyArray,
    index_backprop: bool = False,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], DiscriminatorState | None]]:
    """The sum of the tokenizer's and the discriminator's losses.

    They are detached from each other, unless `discriminator_sees_generator_loss`.
    Each of the discriminator's three passes draws its own augmentation.

    Args:
        discriminator_params: the parameters of `opponent`, for which there is a gradient too.
        frozen: {name: parameters} of the pretrained networks of the losses.

    Returns:
        (loss, (metrics, the discriminator state with new vectors and averages)).
    """
    model, discriminator, losses = modules
    params = jax.tree.map(unshard, params)
    restored, quantized = cast(
        tuple[Array, Quantized], model.apply({"params": params}, images, index_backprop)
    )
    assert quantized.losses is not None  # the latent is known
    terms = {
        "reconstruction": RECONSTRUCTION_LOSSES[losses.reconstruction](restored, images),
        "quantizer": quantized.losses.mean(),
    }
    loss = terms["reconstruction"] + terms["quantizer"]
    metrics = {
        "quantizer_stage_loss": quantized.losses,
        "code_counts": code_counts(quantized.stage_tokens, model.config.codebook_size),
    }
    if losses.perceptual_weight:
        distances = pretrained.lpips(frozen["lpips"], restored, images, model.dtype)
        terms["perceptual"] = distances.mean()
        loss += losses.perceptual_weight * terms["perceptual"]
    total = loss
    if discriminator is not None:
        assert opponent is not None and discriminator_params is not None
        generator_key, real_key, fake_key = jax.random.split(key, 3)
        view = lambda images, key: discriminator_inputs(
            discriminator, frozen, images, key, model.dtype
        )
        logits_of = lambda variables, seen: cast(Array, discriminator.apply(variables, seen))
        variables = {"params": discriminator_params, "spectral": opponent.spectral}
        judging = variables
        if not losses.discriminator_sees_generator_loss:
            judging = jax.lax.stop_gradient(variables)
        logits = logits_of(judging, view(restored, generator_key))
        terms["adversarial"] = adversarial_loss(logits)
        loss += losses.adversarial_weight * terms["adversarial"]

        real, updated = cast(
            tuple[Array, dict[str, Any]],
            discriminator.apply(variables, view(images, real_key), mutable=["spectral"]),
        )
        fake = logits_of(
            {"params": discriminator_params, **updated},
            view(jax.lax.stop_gradient(restored), fake_key),
        )
        lecam = opponent.lecam.update(real, fake)
        terms["discriminator"] = discriminator_loss(real, fake)
        terms["lecam"] = lecam.loss(real, fake)
        total = loss + (terms["discriminator"] + losses.lecam_weight * terms["lecam"])
        metrics |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
        opponent = opponent.replace(spectral=updated["spectral"], lecam=lecam)
    metrics |= {"loss": loss, **{f"{name}_loss": value for name, value in terms.items()}}
    return total, (metrics, opponent)


# The trainer.


def loss_config(config: ml_collections.ConfigDict) -> TokenizerLossConfig:
    """The losses of a configuration; raises UserError if they are invalid."""
    fields = dataclasses.fields(TokenizerLossConfig)
    return TokenizerLossConfig(**{f.name: config.tokenizer_training[f.name] for f in fields})


class TokenizerTrainer(Trainer[TokenizerState]):
    """Trains the tokenizer and its discriminator; the inputs are the pretrained networks."""

    INIT_KEY, STEP_KEY, DATA_SEED = 0, 3, 0

    @classmethod
    def pretrained_names(cls, part: Part, config: ml_collections.ConfigDict) -> tuple[str, ...]:
        return loss_config(config).pretrained_names

    def make_networks(self):
        losses = loss_config(self.config)
        dtype = self.recipe.dtype or self.model.dtype
        tokenizer = dataclasses.replace(self.model, dtype=dtype).make_tokenizer()
        self.modules = Modules(tokenizer, losses.make_discriminator(tokenizer.dtype), losses)
        self.discriminator_optimizer = make_optimizer(
            dataclasses.replace(
                self.optimizer_config, weight_decay=self.recipe.discriminator_weight_decay
            ),
            self.schedule,
            decay_all=True,
        )

    def input_shapes(self) -> Params:
        return self.abstract_pretrained()

    def init_state(self, key: PRNGKeyArray, inputs: Params) -> TokenizerState:
        tokenizer, discriminator, _ = self.modules
        state = TokenizerState.create(init_tokenizer(tokenizer, key), self.optimizer)
        if discriminator is None:
            return state
        if isinstance(discriminator, DiscriminatorHeads):
            shape = (1, math.prod(pretrained.DINO_GRID), pretrained.DINO_WIDTH)
            seen = [jnp.zeros(shape)] * pretrained.DINO_FEATURES
        else:
            seen = jnp.zeros((1, *tokenizer.config.image_size, 3))
        variables = discriminator.init(jax.random.fold_in(key, DISCRIMINATOR_KEY), seen)
        opponent = DiscriminatorState(
            params=variables["params"],
            spectral=variables["spectral"],
            opt_state=self.discriminator_optimizer.init(variables["params"]),
            lecam=LeCam.create(),
        )
        return state.replace(discriminator=opponent)

    def train_step(
        self,
        state: TokenizerState,
        inputs: Params,
        batch: Batch,
        key: PRNGKeyArray,
        *,
        index_backprop: bool = False,
    ) -> tuple[TokenizerState, dict[str, Array]]:
        """One step of the tokenizer and its discriminator from one shared forward pass."""
        losses = functools.partial(loss_terms, self.modules)
        (_, (metrics, opponent)), (grads, opponent_grads) = jax.value_and_grad(
            losses, argnums=(0, 1), has_aux=True
        )(
            state.params,
            state.discriminator and state.discriminator.params,
            state.discriminator,
            inputs,
            batch["image"],
            jax.random.fold_in(key, state.step),
            index_backprop,
        )
        metrics["grad_norm"] = optax.tree.norm(grads)
        state = self.update(state, grads)
        if opponent is not None:
            metrics["discriminator_grad_norm"] = optax.tree.norm(opponent_grads)
            updates, opt_state = self.discriminator_optimizer.update(
                opponent_grads, opponent.opt_state, opponent.params
            )
            params = optax.apply_updates(opponent.params, updates)
            state = state.replace(
                discriminator=opponent.replace(params=params, opt_state=opt_state)
            )
        return state, metrics

    def eval_step(self, params: Params, inputs: Params, batch: Batch) -> dict[str, Array]:
        """Reconstructions of a batch {"image", "mask"}, their quality, and the use of the codes.

        Returns:
            {"psnr": (B,) in dB (peak-to-peak range 2), "lpips": (B,) if it is among the inputs,
            "restored": (B, H, W, 3), "code_counts": int32 (S, V) for the images whose mask is
            True}.
        """
        model = self.modules.tokenizer

        def run(tokenizer):
            quantized = tokenizer.encode(batch["image"])
            return tokenizer.decode(quantized.canvases[:, -1]), quantized

        restored, quantized = cast(
            tuple[Array, Quantized], model.apply({"params": params}, method=run)
        )
        error = jnp.square(restored - batch["image"]).mean((1, 2, 3))
        size = model.config.codebook_size
        counted = [jnp.where(batch["mask"][:, None], ids, size) for ids in quantized.stage_tokens]
        quality = {"psnr": 10 * jnp.log10(4.0 / error)}
        if "lpips" in inputs:
            quality["lpips"] = pretrained.lpips(
                inputs["lpips"], restored, batch["image"], model.dtype
            )
        return quality | {
            "restored": restored,
            "code_counts": code_counts(counted, size + 1)[:, :size],
        }

    def index_backprop(self, step: int) -> bool:
        epochs, batch_size = self.recipe.index_backprop_epochs, self.recipe.batch_size
        return step < step_of(epochs, self.num_images, batch_size, self.origin)

    def trained(self, params: Params) -> Params:
        return {"tokenizer": params}

    @property
    def gradient_norms(self) -> tuple[str, ...]:
        own = ("discriminator_grad_norm",) if self.modules.discriminator else ()
        return (*super().gradient_norms, *own)

    @property
    def abstract_networks(self) -> Params:
        discriminator = self.abstract_state.discriminator
        own = {"discriminator": discriminator.params} if discriminator else {}
        return super().abstract_networks | own

    # A run.

    def open(self, run: Run) -> tuple[Params, RunMetadata]:
        classes = run.train_source.class_names
        metadata = RunMetadata(self.model.only(), classes, **self.facts(run))
        return run.frozen(self.abstract_inputs), metadata

    def first_state(self, run: Run, inputs: Params) -> TokenizerState:
        state = super().first_state(run, inputs)
        if not run.config.init_from:
            return state
        params = start_from(run.config.init_from, self.trained(state.params), ())["tokenizer"]
        return with_params(state, params)

    def evaluate(self, run: Run, state: TokenizerState, inputs: Params, metadata: RunMetadata):
        """As of `Trainer`, of the raw parameters, with which generators are trained."""
        quality, counts, shown = {}, [], ()
        for batch in run.test_batches(run.config[self.part.section]):
            out = self.jit_eval_step(state.params, inputs, batch)
            mask = sharding.to_host(batch["mask"])
            for name in {"psnr", "lpips"} & out.keys():
                quality.setdefault(name, []).append(np.asarray(out[name])[mask])
            counts.append(np.asarray(out["code_counts"]))
            if not shown and mask.any():
                pair = sharding.to_host(batch["image"]), np.asarray(out["restored"])
                shown = [images[mask][:PICTURE_IMAGES] for images in pair]
        run.check_readable(bool(shown))
        metrics = {name: np.concatenate(parts).mean() for name, parts in quality.items()}
        return metrics | codebook_usage(np.sum(counts, axis=0)), reconstruction_grid(*shown)

    def finish(self, run: Run, state: TokenizerState, metadata: RunMetadata) -> RunMetadata:
        return metadata.replace(
            canvas_scale=self.measure_canvas_scale(run, state.params),
            fingerprint=fingerprint(jax.tree.map(sharding.to_host, state.params)),
        )

    def export(self, run: Run, state: TokenizerState, inputs: Params) -> Params:
        return {"tokenizer": jax.tree.map(sharding.to_host, state.params)}

    def measure_canvas_scale(self, run: Run, params: Params) -> tuple[float, ...]:
        """1 / std of the inputs of all stages (1 for the first) and of the final canvas.

        Returns:
            S + 1 values.

        Raises:
            UserError: the canvases after a stage are all equal.
        """
        batch_size = self.recipe.batch_size
        count = math.ceil(min(len(run.train_source), SCALE_IMAGES) / batch_size)
        totals = 0
        with contextlib.closing(run.train_batches(batch_size, run.config.seed)) as batches:
            for _ in range(count):
                images = sharding.global_batch(next(batches), run.mesh)["image"]
                moments = jax.device_get(canvas_moments(self.modules.tokenizer, params, images))
                totals = totals + np.asarray(moments, np.float64)
        mean, square = totals / count
        variance = square - mean**2
        if not (variance > 0).all():
            raise UserError(
                f"The canvases after some stage are all equal (variances {variance}): the "
                "tokenizer has collapsed. Train it longer or with a lower learning rate."
            )
        return 1.0, *(1 / np.sqrt(variance)).tolist()


@functools.partial(jax.jit, static_argnames="model")
def canvas_moments(
    model: Tokenizer, params: Params, images: Float[Array, "B H W 3"]
) -> Float32[Array, "2 S"]:
    """Mean and mean square of the canvases after each stage, unsharded."""
    quantized = cast(Quantized, model.apply({"params": params}, images, method="encode"))
    canvases = quantized.canvases
    return unshard(jnp.stack([canvases.mean((0, 2, 3)), jnp.square(canvases).mean((0, 2, 3))]))
