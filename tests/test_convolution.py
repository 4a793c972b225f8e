"""The kernel's gradient on a CPU, against sums over pixels in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from nvg_jax.kernels import convolution
from nvg_jax.runtime import hardware, sharding


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 24, 10_000])  # rows of the output at once: 1, 2, all
@pytest.mark.parametrize(
    "size, strides, padding, pads",
    [
        ((3, 3), (1, 1), "SAME", ((1, 1), (1, 1))),
        ((2, 2), (1, 1), ((1, 0), (0, 1)), ((1, 0), (0, 1))),  # of Upsample
        ((3, 3), (2, 2), "VALID", ((0, 0), (0, 0))),
        ((1, 1), (1, 1), "SAME", ((0, 0), (0, 0))),
    ],
)
def test_gradients_are_those_of_the_convolution(monkeypatch, block, size, strides, padding, pads):
    monkeypatch.setattr(convolution, "LARGE", 0)
    monkeypatch.setattr(convolution, "BLOCK", block)
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 9, 6, 3)), rng.normal(size=(*size, 3, 4))
    apply = lambda x, kernel: convolution.convolution()(
        x, kernel, strides, padding, dimension_numbers=convolution.LAYOUT
    )
    out, backward = jax.vjp(apply, jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    g = rng.normal(size=out.shape)
    of_x, of_kernel = backward(jnp.asarray(g, jnp.float32))
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    expected, expected_kernel = np.zeros(padded.shape), np.zeros(kernel.shape)
    for row, column in np.ndindex(out.shape[1:3]):
        down, right = row * strides[0], column * strides[1]
        seen = np.s_[:, down : down + size[0], right : right + size[1]]
        expected_kernel += np.einsum("bijc,bd->ijcd", padded[seen], g[:, row, column])
        expected[seen] += np.einsum("ijcd,bd->bijc", kernel, g[:, row, column])
    inside = expected[:, pads[0][0] : pads[0][0] + 9, pads[1][0] : pads[1][0] + 6]
    np.testing.assert_allclose(of_kernel, expected_kernel, atol=1e-4)
    np.testing.assert_allclose(of_x, inside, atol=1e-4)


def test_only_one_cpu_computes_it_in_blocks(monkeypatch):
    assert convolution.convolution() is not jax.lax.conv_general_dilated
    with jax.sharding.use_abstract_mesh(AbstractMesh((8, 1, 1), sharding.MESH_AXES)):
        assert convolution.convolution() is jax.lax.conv_general_dilated
    monkeypatch.setattr(hardware, "platform", lambda: "gpu")
    assert convolution.convolution() is jax.lax.conv_general_dilated
