"""Training and evaluation steps of the tokenizer (paper, Section 3.1 and Appendix)."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from nvg_jax import pretrained
from nvg_jax.layers import unshard
from nvg_jax.models import init_tokenizer
from nvg_jax.tokenizer import Tokenizer
from nvg_jax.tokenizer.diffaug import augment, discriminator_input
from nvg_jax.tokenizer.discriminator import DiscriminatorHeads, SmallFeatures
from nvg_jax.tokenizer.losses import (
    RECONSTRUCTION_LOSSES,
    LeCam,
    discriminator_loss,
    generator_loss,
)
from nvg_jax.training.optimizers import OptimizerConfig
from nvg_jax.training.state import TrainState

DISCRIMINATORS = ("dino", "small")
DINO_TAP = (14 * 14, 384)  # positions and channels of each of its taps
NUM_DINO_TAPS = 5


@dataclasses.dataclass(frozen=True)
class Losses:
    """The tokenizer's losses; a weight of 0 leaves a part out altogether.

    reconstruction: "l1" or "l2". discriminator: "dino", heads on the frozen features of DINO
    ViT-S/16, for images of at least 224 x 224; or "small", for small images, all of it trained.

    Raises:
        ValueError: a name that does not exist, or a negative weight.
    """

    reconstruction: str
    perceptual_weight: float
    adversarial_weight: float
    lecam_weight: float
    discriminator: str

    def __post_init__(self):
        for name, choices in (
            ("reconstruction", RECONSTRUCTION_LOSSES), ("discriminator", DISCRIMINATORS)
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"tokenizer_training.{name} must be one of {', '.join(choices)}, got "
                    f"{getattr(self, name)!r}."
                )
        for name in ("perceptual_weight", "adversarial_weight", "lecam_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"tokenizer_training.{name} must be 0 or more, got {getattr(self, name)}."
                )

    @property
    def pretrained(self) -> tuple[str, ...]:
        """The pretrained networks that these losses look through."""
        names = ("lpips",) if self.perceptual_weight else ()
        if self.adversarial_weight and self.discriminator == "dino":
            names += ("dino",)
        return names

    def make_discriminator(self, dtype) -> nn.Module | None:
        if not self.adversarial_weight:
            return None
        heads = DiscriminatorHeads(dtype=dtype)
        if self.discriminator == "dino":
            return heads
        return nn.Sequential([SmallFeatures(dtype=dtype), heads])


class Adversary(flax.struct.PyTreeNode):
    """The discriminator in training: parameters, power-iteration vectors, averages of logits."""

    params: Any
    spectral: Any
    opt_state: Any
    lecam: LeCam


class TokenizerState(TrainState):
    """The tokenizer in training, with its adversary if it has one."""

    adversary: Adversary | None = None


def init_state(
    model: Tokenizer,
    key,
    optimizer: optax.GradientTransformation,
    discriminator: nn.Module | None,
    discriminator_optimizer: optax.GradientTransformation,
) -> TokenizerState:
    """The state before the first step, its parameters boxed with their logical axes."""
    state = TokenizerState.create(init_tokenizer(model, key), optimizer)
    if discriminator is None:
        return state
    if isinstance(discriminator, DiscriminatorHeads):
        inputs = [jnp.zeros((1, *DINO_TAP))] * NUM_DINO_TAPS
    else:
        inputs = jnp.zeros((1, *model.config.image_size, 3))
    variables = discriminator.init(jax.random.fold_in(key, 1), inputs)
    adversary = Adversary(
        params=variables["params"],
        spectral=variables["spectral"],
        opt_state=discriminator_optimizer.init(variables["params"]),
        lecam=LeCam.create(),
    )
    return state.replace(adversary=adversary)


def code_counts(stage_tokens, codebook_size: int):
    """int32 (S, V): how often each token was used in each stage."""
    return jnp.stack(
        [jnp.bincount(ids.ravel(), length=codebook_size) for ids in stage_tokens]
    ).astype(jnp.int32)


def discriminator_inputs(discriminator: nn.Module, frozen, images, key, dtype):
    """What the discriminator sees of images (B, H, W, 3): DiffAug, then its input size."""
    input_key, augment_key = jax.random.split(key)
    images = augment(images, augment_key)
    if not isinstance(discriminator, DiscriminatorHeads):
        return images
    tokens = pretrained.dino(frozen["dino"], discriminator_input(images, input_key), dtype)
    return [tap[:, 1:] + tap[:, :1] for tap in tokens]  # patches, the class token added to each


def train_step(
    state: TokenizerState,
    frozen,
    batch,
    key,
    *,
    model: Tokenizer,
    optimizer: optax.GradientTransformation,
    discriminator: nn.Module | None,
    discriminator_optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    losses: Losses,
    index_backprop: bool,
):
    """One step of the tokenizer and of its discriminator, on one pass through the autoencoder.

    Args:
        frozen: parameters of the pretrained networks that `losses` names.
        batch: {"image": float32 (B, H, W, 3) in [-1, 1]}.
        key: the run's key; the step number is folded in.

    Returns:
        The state and the metrics.
    """
    (_, (metrics, adversary)), (grads, adversary_grads) = jax.value_and_grad(
        loss_terms, argnums=(0, 1), has_aux=True
    )(
        state.params,
        state.adversary and state.adversary.params,
        state.adversary,
        frozen,
        batch["image"],
        jax.random.fold_in(key, state.step),
        model=model,
        discriminator=discriminator,
        losses=losses,
        index_backprop=index_backprop,
    )
    metrics["grad_norm"] = optax.tree.norm(grads)
    state = state.update(grads, optimizer, config.ema_decay)
    if adversary is not None:
        metrics["discriminator_grad_norm"] = optax.tree.norm(adversary_grads)
        updates, opt_state = discriminator_optimizer.update(
            adversary_grads, adversary.opt_state, adversary.params
        )
        params = optax.apply_updates(adversary.params, updates)
        state = state.replace(adversary=adversary.replace(params=params, opt_state=opt_state))
    return state, metrics


def loss_terms(
    params,
    adversary_params,
    adversary: Adversary | None,
    frozen,
    images,
    key,
    *,
    model: Tokenizer,
    discriminator: nn.Module | None,
    losses: Losses,
    index_backprop: bool,
):
    """The sum of the losses of both players; neither's gradient reaches the other.

    Returns:
        (loss, (metrics, the adversary with new vectors and averages)).
    """
    params = jax.tree.map(unshard, params)
    restored, quantized = model.apply({"params": params}, images, index_backprop)
    terms = {
        "reconstruction": RECONSTRUCTION_LOSSES[losses.reconstruction](restored, images),
        "quantizer": quantized.losses.mean(),
    }
    loss = sum(terms.values())
    metrics = {
        "quantizer_stage_loss": quantized.losses,
        "code_counts": code_counts(quantized.stage_tokens, model.config.codebook_size),
    }
    if losses.perceptual_weight:
        distances = pretrained.lpips(frozen["lpips"], restored, images, model.dtype)
        terms["perceptual"] = distances.mean()
        loss += losses.perceptual_weight * terms["perceptual"]
    adversary_loss = 0.0
    if discriminator is not None:
        fake_key, real_key = jax.random.split(key)
        see = lambda images, key: discriminator_inputs(
            discriminator, frozen, images, key, model.dtype
        )
        fake_inputs, real_inputs = see(restored, fake_key), see(images, real_key)
        variables = {"params": adversary_params, "spectral": adversary.spectral}
        logits = discriminator.apply(jax.lax.stop_gradient(variables), fake_inputs)
        terms["adversarial"] = generator_loss(logits)
        loss += losses.adversarial_weight * terms["adversarial"]

        real, updated = discriminator.apply(variables, real_inputs, mutable=["spectral"])
        fake = discriminator.apply(
            {"params": adversary_params, **updated}, jax.lax.stop_gradient(fake_inputs)
        )
        terms["discriminator"] = discriminator_loss(real, fake)
        terms["lecam"] = adversary.lecam.loss(real, fake)
        adversary_loss = terms["discriminator"] + losses.lecam_weight * terms["lecam"]
        metrics |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
        adversary = adversary.replace(
            spectral=updated["spectral"], lecam=adversary.lecam.update(real, fake)
        )
    metrics |= {"loss": loss, **{f"{name}_loss": value for name, value in terms.items()}}
    return loss + adversary_loss, (metrics, adversary)


def eval_step(params, frozen, batch, *, model: Tokenizer):
    """Reconstructions of {"image", "mask"}, their quality and the codes in use.

    Returns:
        {"psnr": float32 (B,) in dB (peak-to-peak range 2), "lpips": float32 (B,) if `frozen` has
        it, "restored": float32 (B, H, W, 3), "code_counts": int32 (S, V) of the images whose mask
        is True}.
    """

    def run(tokenizer):
        quantized = tokenizer.encode(batch["image"])
        return tokenizer.decode(quantized.canvases[:, -1]), quantized

    restored, quantized = model.apply({"params": params}, method=run)
    error = jnp.square(restored - batch["image"]).mean((1, 2, 3))
    size = model.config.codebook_size
    counted = [jnp.where(batch["mask"][:, None], ids, size) for ids in quantized.stage_tokens]
    quality = {"psnr": 10 * jnp.log10(4.0 / error)}
    if "lpips" in frozen:
        quality["lpips"] = pretrained.lpips(frozen["lpips"], restored, batch["image"], model.dtype)
    return quality | {
        "restored": restored,
        "code_counts": code_counts(counted, size + 1)[:, :size],
    }
