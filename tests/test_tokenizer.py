"""Tokenizer: quantization against vectors worked by hand, sizes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import is_even_hierarchy, published_tokenizer

from nvg_jax import granularity, models
from nvg_jax.errors import UserError
from nvg_jax.runtime.sharding import unbox
from nvg_jax.tokenizer import GranularitySequence, Quantizer, Tokenizer, TokenizerConfig
from nvg_jax.tokenizer.autoencoder import Upsample
from nvg_jax.training import tokenizer as steps

TINY = dict(base_channels=32, blocks_per_level=1, latent_dim=4, codebook_size=8)


def quantizer(grid, codebook, kernel=None):
    """A quantizer with the given codebook, and smoothing convolutions of zero unless given."""
    codebook = jnp.asarray(codebook, jnp.float32)
    size, dim = codebook.shape
    stages = granularity.num_stages(grid[0] * grid[1])
    shape = (stages, 3, 3, dim, dim)
    params = {
        "codebook": codebook,
        "smooth_kernel": jnp.zeros(shape) if kernel is None else jnp.asarray(kernel, jnp.float32),
        "smooth_bias": jnp.zeros((stages, dim)),
    }
    return Quantizer(grid, size, dim).bind({"params": params})


def test_upsampling_is_nearest_neighbor_and_a_convolution():
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.normal(size=n).astype("f4") for n in ((2, 3, 2, 5), (3, 3, 5, 4), 4))
    large = np.zeros((2, 8, 6, 5))  # with a margin of zeros
    large[:, 1:-1, 1:-1] = x.repeat(2, axis=1).repeat(2, axis=2)
    windows = np.lib.stride_tricks.sliding_window_view(large, (3, 3), axis=(1, 2))
    expected = np.einsum("bhwirc,rcio->bhwo", windows, kernel) + bias
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)):
        upsample = Upsample(4, dtype).bind({"params": {"kernel": kernel, "bias": bias}})
        found = upsample(jnp.asarray(x))
        assert found.dtype == dtype
        error = np.abs(found.astype(jnp.float32) - expected).max()
        assert error < tolerance * np.abs(expected).max()


@pytest.mark.slow
def test_residual_quantization_of_a_row_of_two():
    # Mean of (1, 3) is 2 -> code 2; what is left (-1, 1) is there exactly.
    q = quantizer((1, 2), [[-1.0], [1.0], [2.0]])
    out = q(jnp.array([[[1.0], [3.0]]]), jnp.array([[[0, 0], [0, 1]]]))
    np.testing.assert_array_equal(out.sequence.tokens, [[[2, 2], [0, 1]]])
    np.testing.assert_array_equal(out.canvases[0, :, :, 0], [[2, 2], [1, 3]])
    # Stage 0 misses each position by 1: 0.25 * 1 + 1; stage 1 misses nothing.
    np.testing.assert_allclose(out.losses, [1.25, 0.0])
    assert [ids.shape for ids in out.stage_tokens] == [(1, 1), (1, 2)]


def test_smoothing_is_half_a_convolution_on_top_of_the_identity():
    kernel = np.zeros((2, 3, 3, 1, 1))
    kernel[1, 1, 0] = 1.0  # stage 1: takes the left neighbor
    q = quantizer((1, 2), [[4.0], [6.0]], kernel)
    vectors = jnp.array([[[4.0], [6.0]]])
    np.testing.assert_allclose(q.smooth(vectors, 0)[0, :, 0], [4, 6])
    np.testing.assert_allclose(q.smooth(vectors, 1)[0, :, 0], [4, 6 + 0.5 * 4])


@pytest.mark.slow
def test_the_warm_up_reaches_every_code_and_changes_no_value():
    latents = jnp.array([[[1.0], [2.9]]])
    structure = jnp.array([[[0, 0], [0, 1]]])
    codebook = jnp.array([[-1.0], [1.0], [2.0]])

    def final_canvas(codebook, soft):
        return quantizer((1, 2), codebook)(latents, structure, soft).canvases[:, -1].sum()

    gradient = jax.jit(jax.grad(final_canvas), static_argnums=1)
    # Chosen are 2, then -1 and 1: stage 0 puts its code at both positions.
    np.testing.assert_allclose(gradient(codebook, False)[:, 0], [1, 1, 2])
    soft = gradient(codebook, True)[:, 0]
    assert np.abs(soft - np.array([1, 1, 2])).min() > 1e-3
    hard, soft = (quantizer((1, 2), codebook)(latents, structure, s) for s in (False, True))
    np.testing.assert_allclose(hard.canvases, soft.canvases, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "latent_size,image_size", [((2, 2), (4, 4)), ((2, 4), (8, 16)), ((4, 4), (4, 4))]
)
def test_encoding_splits_evenly_and_decoding_equals_reconstruction(latent_size, image_size):
    config = TokenizerConfig(image_size, latent_size, channel_multipliers=(1, 1, 1), **TINY)
    model = Tokenizer(config)
    init = jax.jit(lambda key: unbox(models.init_tokenizer(model, key)))
    params = init(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (3, *image_size, 3), minval=-1)
    apply = jax.jit(
        lambda *args, method=None: model.apply({"params": params}, *args, method=method),
        static_argnames="method",
    )
    out = apply(images, method="encode")
    stages = config.num_stages
    assert out.sequence.structure.shape == (3, stages, latent_size[0] * latent_size[1])
    assert is_even_hierarchy(out.sequence.structure).all()
    replayed = apply(out.sequence, method="canvases")
    np.testing.assert_allclose(replayed, out.canvases, atol=1e-6)
    decoded = apply(replayed[:, -1], method="decode")
    trained, _ = apply(images)
    np.testing.assert_allclose(decoded, trained, atol=1e-5)


def test_code_counts():
    ids = (jnp.array([[1]]), jnp.array([[1, 3]]))
    np.testing.assert_array_equal(steps.code_counts(ids, 4), [[0, 1, 0, 0], [0, 1, 0, 1]])


@pytest.mark.parametrize(
    "sizes,message",
    [
        (dict(latent_size=(3, 4), image_size=(24, 32)), "power of two"),
        (dict(image_size=(250, 250)), "one power of two"),
        (dict(image_size=(256, 512)), "one power of two"),
        (dict(channel_multipliers=(1, 2)), "at least 5 channel_multipliers"),
        (dict(base_channels=50), "divisible by 32 or by 24"),
    ],
)
def test_impossible_sizes_get_a_sentence(sizes, message):
    with pytest.raises(UserError, match=message):
        published_tokenizer(**sizes)


def test_sequences_are_pytrees():
    doubled = jax.tree.map(lambda x: 2 * x, GranularitySequence(jnp.ones(2), jnp.zeros(2)))
    assert isinstance(doubled, GranularitySequence) and doubled.structure.sum() == 4
