"""Losses of the content generator, over all stages of an image at once (paper, Section 3.2).

`training.generators.loss_terms` weights and adds the losses.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32

from nvg_jax import granularity
from nvg_jax.tokenizer.quantizer import Quantized


def content_losses(
    predict_canvas: Callable[[Array, Array, Array], tuple[Array, Array]],
    token_logits: Callable[[Array], Array],
    quantized: Quantized,
    weights: Float[Array, " B"] | None = None,
) -> tuple[dict[str, Float32[Array, " S"]], Array]:
    """The losses of each stage, averaged over the batch, and the hidden states to align.

    Args:
        predict_canvas: (canvas, structure embedding, stage) -> (predicted final canvas, hidden
            states): `ContentGenerator.predict_canvas` with its other arguments bound. It is called
            once, on a batch of B * S with the stages of an image adjacent.
        token_logits: (..., D) -> (..., V), such as `ContentGenerator.token_logits`.
        quantized: sequences, canvases and unique tokens of the images.
        weights: per-image weights that sum to 1; None means uniform.

    Returns:
        {"canvas_loss": mean squared error of the final canvas, "token_loss": cross-entropy of the
        unique tokens, "token_accuracy"}; and the hidden states, for `alignment_loss`.
    """
    structure, canvases = quantized.sequence.structure, quantized.canvases
    batch, stages, length = structure.shape
    final = canvases[:, -1]
    before = jnp.concatenate([jnp.zeros_like(canvases[:, :1]), canvases[:, :-1]], axis=1)
    embedding = granularity.structure_embedding(structure, jnp.arange(stages), stages - 1)
    fold = lambda x: x.reshape(batch * stages, *x.shape[2:])
    predicted, hidden = predict_canvas(
        fold(before), fold(embedding), jnp.tile(jnp.arange(stages), batch)
    )
    predicted = predicted.reshape(before.shape)

    missing = predicted - before
    means = [
        granularity.cluster_means(missing[:, stage], structure[:, stage], 2**stage)
        for stage in range(stages)
    ]
    logits = token_logits(jnp.concatenate(means, axis=1))  # (B, 2L - 1, V)
    ids = jnp.concatenate(quantized.stage_tokens, axis=1)
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], -1)[..., 0]
    correct = logits.argmax(-1) == ids
    ends = [2**stage - 1 for stage in range(1, stages)]
    average = lambda x: jnp.average(x, axis=0, weights=weights)
    by_stage = lambda x: average(
        jnp.stack([part.mean(1) for part in jnp.split(x, ends, axis=1)], axis=1)
    )
    terms = {
        "canvas_loss": average(jnp.square(predicted - final[:, None]).mean((2, 3))),
        "token_loss": by_stage(-log_likelihood),
        "token_accuracy": by_stage(correct.astype(jnp.float32)),
    }
    return terms, hidden


def alignment_loss(
    projected: Float[Array, "B_S L features"], targets: Float[Array, "B L features"]
) -> Float32[Array, " S"]:
    """REPA: one minus the cosine similarity of features and targets.

    Averaged over images and positions.

    Args:
        projected: the stages of an image are adjacent.
        targets: shared by the stages of an image.
    """
    projected = projected.astype(jnp.float32).reshape(len(targets), -1, *targets.shape[1:])
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
    cosine = jnp.einsum("bslf,blf->bsl", unit(projected), unit(targets))
    return 1 - cosine.mean((0, 2))
