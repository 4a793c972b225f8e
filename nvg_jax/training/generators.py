"""Training step of the structure and the content generator on one encoded batch.

Either one alone or both together, as the paper trains them; each has its own state.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from nvg_jax import granularity, pretrained
from nvg_jax.content.losses import alignment_loss, content_losses
from nvg_jax.content.model import RepaProjector
from nvg_jax.models import Generator
from nvg_jax.structure.losses import draw_times, structure_losses
from nvg_jax.structure.model import StructureGenerator
from nvg_jax.tokenizer import GranularitySequence, Quantized, Tokenizer
from nvg_jax.tokenizer.quantizer import at_positions
from nvg_jax.training.optimizers import OptimizerConfig

DINO_GRID = (16, 16)  # patches of DINOv2 ViT-B/14 on 224 x 224 pixels


@dataclasses.dataclass(frozen=True)
class RepaConfig:
    """Representation alignment of the content generator (Yu et al., arXiv 2410.06940).

    The features after `block` blocks, through a small network of their own, are drawn towards
    DINOv2's of the same image; `weight` 0 leaves it out.
    """

    weight: float
    block: int

    def check(self, depth: int, grid: tuple[int, int]):
        """Raises ValueError for a content generator that cannot be aligned."""
        if self.weight < 0:
            raise ValueError(
                f"generator_training.repa_weight must be 0 or more, got {self.weight}."
            )
        if self.weight and not 1 <= self.block <= depth:
            raise ValueError(
                f"generator_training.repa_block must be one of the content generator's {depth} "
                f"blocks, 1 .. {depth}, got {self.block}."
            )
        if self.weight and grid != DINO_GRID:
            raise ValueError(
                f"REPA compares with the {DINO_GRID[0]} x {DINO_GRID[1]} patches of DINOv2 and "
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
        key: None to evaluate without drop path; the flow's noise then comes from seed 0.
        weights: float32 (B,), the share of each image, 1 in all; alike if None.
        repa, targets: of the content generator: how to align it, and with what features, float32
            (B, L, 768); without, it is not aligned.
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
            lambda noisy, time, embedding, canvas, stage: apply(
                noisy, time, embedding, canvas, stage, jnp.repeat(class_ids, learned),
                deterministic=deterministic,
            ),
            structure,
            canvases,
            jax.random.normal(noise_key, (batch, structure.shape[2], stages - 1)),
            draw_times(time_key, batch, learned),
            weights,
        )  # fmt: skip
        return losses.mean(), {"flow_loss": losses}
    tapped = []

    def predict_canvas(canvas, embedding, stage):
        predicted, features = apply(
            canvas, embedding, stage, jnp.repeat(class_ids, stages), canvas_scale,
            deterministic=deterministic, feature_block=repa.block if repa else 0,
            method="predict_canvas",
        )  # fmt: skip
        tapped.append(features)
        return predicted

    token_logits = lambda missing: apply(missing, method="token_logits")
    terms = content_losses(predict_canvas, token_logits, quantized, weights)
    losses = terms["canvas_loss"] + terms["token_loss"]
    if repa:
        projected = RepaProjector(model.dtype).apply({"params": params["repa"]}, tapped[0])
        terms["repa_loss"] = alignment_loss(projected, targets)
        losses += repa.weight * terms["repa_loss"]
    return losses.mean(), terms


def encode(tokenizer: Tokenizer, params, batch) -> Quantized:
    """The frozen tokenizer's sequence and canvases of a batch.

    Args:
        batch: {"image": float32 (B, H, W, 3) in [-1, 1]}, or what is kept of such a sequence:
            {"structure": int (B, L), the labels of the finest stage, "tokens": int (B, 2L - 1),
            those of the clusters of stage 0, 1, ... K after each other}.

    Returns:
        Quantized; from a kept sequence its `losses` are None, as the latent is not known.
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
    states,
    tokenizer_params,
    frozen,
    canvas_scale,
    batch,
    key,
    *,
    models: dict[str, Generator],
    optimizers: dict[str, optax.GradientTransformation],
    configs: dict[str, OptimizerConfig],
    tokenizer: Tokenizer,
    class_dropout: float,
    repa: RepaConfig | None,
):
    """One step of every generator in `states` on a batch for `encode` with its "label".

    Args:
        states: a TrainState for each name ("structure", "content") in `models`.
        frozen: {"dinov2": its parameters} if the content generator is aligned.
        key: the run's key; the step number is folded in.

    Returns:
        The states and the metrics, each name followed by its generator.
    """
    quantized = encode(tokenizer, tokenizer_params, batch)
    targets = repa and jax.lax.stop_gradient(
        pretrained.dinov2(frozen["dinov2"], batch["image"], tokenizer.dtype)
    )
    states, metrics = dict(states), {}
    for index, name in enumerate(sorted(states)):
        state, model = states[name], models[name]
        step_key = jax.random.fold_in(jax.random.fold_in(key, index), state.step)
        drop_key, loss_key = jax.random.split(step_key)
        dropped = jax.random.bernoulli(drop_key, class_dropout, batch["label"].shape)
        class_ids = jnp.where(dropped, model.num_classes, batch["label"])
        (loss, terms), grads = jax.value_and_grad(
            lambda params: loss_terms(
                model, params, quantized, class_ids, canvas_scale, loss_key,
                repa=repa, targets=targets,
            ),
            has_aux=True,
        )(state.params)  # fmt: skip
        states[name] = state.update(grads, optimizers[name], configs[name].ema_decay)
        terms = {"loss": loss, "grad_norm": optax.tree.norm(grads), **terms}
        metrics.update({f"{name}/{key}": value for key, value in terms.items()})
    return states, metrics


def eval_step(params, tokenizer_params, canvas_scale, batch, *, models, tokenizer: Tokenizer):
    """Losses of every generator in `params` on a batch as in `train_step`, without dropout.

    Images where the batch's "mask", bool (B,), is False do not count.
    """
    quantized = encode(tokenizer, tokenizer_params, batch)
    weights = batch["mask"] / jnp.maximum(batch["mask"].sum(), 1)
    metrics = {}
    for name in params:
        loss, terms = loss_terms(
            models[name], params[name], quantized, batch["label"], canvas_scale, None, weights
        )
        metrics.update({f"{name}/{k}": v for k, v in {"loss": loss, **terms}.items()})
    return metrics
