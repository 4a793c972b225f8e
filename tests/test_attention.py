"""Attention: every implementation that runs here against NumPy, and what is chosen where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvg_jax import attention
from nvg_jax.kernels import cpu_attention, tpu_attention
from nvg_jax.kernels.rotary import Rotary, rotate
from nvg_jax.runtime import hardware


def arguments(length, heads, head_dim, batch=2, seed=0):
    """q, k, v and what rotates them."""
    rng = np.random.default_rng(seed)
    shape = batch, length, heads, head_dim
    q, k, v = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    scales = (rng.uniform(0.5, 1.5, head_dim).astype(np.float32) for _ in range(2))
    angles = rng.uniform(-9, 9, (batch, length, head_dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return q, k, v, Rotary(*map(jnp.asarray, (*scales, cos, sin)))


def expected(q, k, v, rotary=None):
    """The definition, with pairs of channels as complex numbers; works for gradients too."""
    q_scale, k_scale, cos, sin = rotary or (None,) * 4

    def prepare(x, scale):
        if scale is None:
            return x
        x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)[:, :, None]
        return jnp.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    scores = jnp.einsum("bqhd,bkhd->bhqk", prepare(q, q_scale), prepare(k, k_scale))
    weights = jax.nn.softmax(scores / np.sqrt(q.shape[-1]), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def relative_error(found, exact):
    found, exact = (np.asarray(x, np.float32) for x in (found, exact))
    return np.abs(found - exact).max() / np.abs(exact).max()


@pytest.mark.slow
@pytest.mark.parametrize("length, heads, head_dim", [(5, 3, 4), (33, 2, 64), (257, 2, 16)])
def test_attention_on_a_cpu_is_its_definition(length, heads, head_dim):
    assert (length == 257) == (length >= cpu_attention.LENGTH_BY_HEAD)
    *inputs, rotary = arguments(length, heads, head_dim)
    grad = np.random.default_rng(1).normal(size=inputs[0].shape).astype(np.float32)
    for how in (rotary, None):
        results = []
        for function in (attention.attention, expected):

            @jax.jit
            def run(*inputs):
                out, backward = jax.vjp(lambda *args: function(*args, how), *inputs)
                return out, *backward(grad)

            results.append(run(*inputs))
        for name, found, exact in zip(("out", "q", "k", "v"), *results):
            assert relative_error(found, exact) < 1e-5, name


def test_head_by_head_the_gradient_multiplies_no_more_than_all_at_once():
    def products(length):
        q, k, v, _ = arguments(length, 2, 4)
        total = lambda *inputs: attention.attention(*inputs).sum()
        return str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)).count(
            "dot_general["
        )

    assert products(cpu_attention.LENGTH_BY_HEAD) == products(8) == 6


# Two heads a block, four, one; more rows than one block of 128; a length that fills its rows.
SIZES = [(17, 4, 64), (9, 4, 32), (20, 1, 128), (130, 2, 64), (16, 2, 64)]


@pytest.mark.slow
@pytest.mark.parametrize("length, heads, head_dim", SIZES)
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("rotated", [True, False])
def test_the_tpu_kernel_and_its_gradient(length, heads, head_dim, dtype, tolerance, rotated):
    *inputs, rotary = arguments(length, heads, head_dim, batch=1 if length > 100 else 2)
    inputs = [jnp.asarray(x, dtype) for x in inputs]
    exact = [x.astype(jnp.float32) for x in inputs]
    grad = np.random.default_rng(1).normal(size=inputs[0].shape).astype(np.float32)
    scales, angles = (rotary[:2], rotary[2:]) if rotated else ((), ())

    def run(function, *inputs):
        def call(q, k, v, *scales):
            how = Rotary(*scales, *angles) if rotated else None
            return function(q, k, v, how).astype(jnp.float32)

        out, backward = jax.vjp(call, *inputs, *scales)
        return out, *backward(grad)

    fused = lambda *args: tpu_attention.fused_attention(*args, interpret=True)
    run = jax.jit(run, static_argnums=0)
    names = ("out", "q", "k", "v", "q_scale", "k_scale")
    for name, a, b in zip(names, run(fused, *inputs), run(expected, *exact)):
        assert relative_error(a, b) < tolerance, name


def test_the_kernel_refuses_sequences_too_long_for_the_chip():
    assert tpu_attention.fits_kernel(np.zeros((1, 513, 2, 64)))
    assert not tpu_attention.fits_kernel(np.zeros((1, 1025, 2, 64)))


def test_the_kernel_takes_blocks_of_whole_heads():
    args = arguments(9, 4, 64)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    with jax.set_mesh(mesh):
        assert tpu_attention.fits_kernel(args[0])
        assert not tpu_attention.fits_kernel(args[0][:, :, :3])  # half a block
        assert not tpu_attention.fits_kernel(arguments(9, 4, 48)[0])  # a head across two blocks


@pytest.mark.slow
def test_sequences_of_odd_length_are_padded_for_cudnn(monkeypatch):
    """Its gradient does not support them; the discriminator's DINO has 197 tokens.

    The number of all tokens becomes a multiple of eight, as matrix products need.
    """
    *inputs, rotary = arguments(5, 2, 16)
    grad = np.random.default_rng(1).normal(size=inputs[0].shape).astype(np.float32)
    library, lengths = jax.nn.dot_product_attention, []

    def cudnn(q, k, v, implementation, **options):
        assert implementation == "cudnn"
        lengths.append(q.shape[1])
        return library(q, k, v, **options)

    monkeypatch.setattr(hardware, "platform", lambda: "gpu")
    monkeypatch.setattr(attention, "fits_cudnn", lambda *_: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    results = []
    for function in (attention.attention, expected):
        out, backward = jax.vjp(lambda *args: function(*args, rotary), *inputs)  # noqa: B023
        results.append((out, *backward(grad)))
    assert lengths == [8]  # for two images of 5 tokens
    for name, found, exact in zip(("out", "q", "k", "v"), *results):
        assert found.shape == exact.shape and relative_error(found, exact) < 1e-5, name


def test_cudnn_needs_half_precision_and_an_ampere():
    """cuDNN's documentation: its attention needs compute capability 8.0; a T4 has 7.5."""

    def fits(name, dtype, head_dim=64):
        device = jax.sharding.AbstractDevice(name, 40, platform="cpu" if name == "cpu" else "gpu")
        mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            return attention.fits_cudnn(dtype, head_dim)

    assert fits("h100", jnp.bfloat16) and fits("a100", jnp.float16)
    assert not fits("h100", jnp.float32) and not fits("h100", jnp.float16, 256)
    assert not fits("t4", jnp.float16) and not fits("cpu", jnp.bfloat16)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_rotation_turns_each_pair_of_channels(monkeypatch, platform):
    """Two heads with the same angles: a quarter turn of the first pair, none of the second."""
    monkeypatch.setattr(hardware, "platform", lambda: platform)
    x = jnp.array([[[[1.0, 2, 3, 4], [5, 6, 7, 8]]]])
    cos, sin = jnp.array([[[0.0, 1.0]]]), jnp.array([[[1.0, 0.0]]])
    expected = [[[[-2.0, 1, 3, 4], [-6, 5, 7, 8]]]]
    np.testing.assert_array_equal(rotate(x, cos, sin), expected)
    half = rotate(x.astype(jnp.bfloat16), cos, sin)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.astype(jnp.float32), expected)
