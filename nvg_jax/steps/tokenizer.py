"""Training and evaluation steps of the tokenizer (paper, Section 3.1 and Appendix)."""

import jax
import jax.numpy as jnp
import optax

from nvg_jax.layers import whole
from nvg_jax.optimizers import OptimizerConfig
from nvg_jax.state import TrainState
from nvg_jax.tokenizer import Tokenizer
from nvg_jax.tokenizer.losses import RECONSTRUCTION_LOSSES


def init_params(model: Tokenizer, key):
    """Freshly initialised parameters, boxed with their logical axes."""
    images = jnp.zeros((1, *model.config.image_size, 3))
    return model.init(key, images)["params"]


def code_counts(stage_tokens, codebook_size: int):
    """int32 (S, V): how often each token was used in each stage."""
    return jnp.stack(
        [jnp.bincount(ids.ravel(), length=codebook_size) for ids in stage_tokens]
    ).astype(jnp.int32)


def train_step(
    state: TrainState,
    batch,
    *,
    model: Tokenizer,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    reconstruction: str,
    soft_index: bool,
):
    """One step on {"image": float32 (B, H, W, 3)}; returns the state and the metrics.

    `reconstruction` is "l1" or "l2". Perceptual and adversarial terms join `losses` here.
    """

    def loss_fn(params):
        params, images = jax.tree.map(whole, params), batch["image"]
        restored, quantized = model.apply({"params": params}, images, soft_index)
        losses = {
            "reconstruction": RECONSTRUCTION_LOSSES[reconstruction](restored, images),
            "quantizer": quantized.losses.mean(),
        }
        return sum(losses.values()), (losses, quantized)

    grads, (losses, quantized) = jax.grad(loss_fn, has_aux=True)(state.params)
    metrics = {
        "loss": sum(losses.values()),
        **{f"{name}_loss": value for name, value in losses.items()},
        "quantizer_stage_loss": quantized.losses,
        "grad_norm": optax.tree.norm(grads),
        "code_counts": code_counts(quantized.stage_tokens, model.config.codebook_size),
    }
    return state.update(grads, optimizer, config.ema_decay), metrics


def eval_step(params, batch, *, model: Tokenizer):
    """Reconstructions of {"image", "mask"}, their quality and the codes in use.

    Returns:
        {"psnr": float32 (B,) in dB (peak-to-peak range 2), "restored": float32 (B, H, W, 3),
        "code_counts": int32 (S, V) of the images whose mask is True}.
    """

    def run(tokenizer):
        quantized = tokenizer.encode(batch["image"])
        return tokenizer.decode(quantized.canvases[:, -1]), quantized

    restored, quantized = model.apply({"params": params}, method=run)
    error = jnp.square(restored - batch["image"]).mean((1, 2, 3))
    size = model.config.codebook_size
    counted = [jnp.where(batch["mask"][:, None], ids, size) for ids in quantized.stage_tokens]
    return {
        "psnr": 10 * jnp.log10(4.0 / error),
        "restored": restored,
        "code_counts": code_counts(counted, size + 1)[:, :size],
    }
