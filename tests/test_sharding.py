"""The mesh and where arrays lie on it: on one device here, on eight in a process of its own."""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import on_eight_devices

from nvg_jax import layers, models, sharding
from nvg_jax.state import TrainState
from nvg_jax.steps import generators, tokenizer
from nvg_jax.tokenizer import TokenizerConfig


def params(key):
    """Every way in which a parameter may name its axes."""
    draw = lambda names, *shape: nn.LogicallyPartitioned(jax.random.normal(key, shape), names)
    return {
        "wide": draw(("embed", "mlp"), 4, 6),
        "narrow": draw(("mlp", "embed"), 6, 4),
        "stacked": draw(("layers", "embed", "mlp"), 3, 4, 6),
        "odd": draw(("embed", "mlp"), 3, 6),
        "bias": draw(("mlp",), 6),
        "table": draw((None, "embed"), 5, 4),
        "codes": draw(("vocab", None), 8, 3),
        "conv": draw((None, None, "conv_in", "conv_out"), 3, 3, 4, 6),
        "free": draw((None,), 6),
        "scalar": jnp.float32(3),
    }


def init(key):
    return TrainState.create(params(key), optax.adam(0.1))


def test_sizes_of_a_mesh():
    device = jax.devices()[:1]
    for sizes in ({}, {"fsdp": -1, "data": 1}, {"data": 1}):
        mesh = sharding.make_mesh(**sizes, devices=device)
        assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    for sizes in ((2, 1, 1), (-1, 2, 1), (-1, -1, 1), (0, 1, 1), (1, 0, -1), (-2, 1, 1)):
        sentence = "data={}, fsdp={}, tensor={} does not fit 1 devices".format(*sizes)
        with pytest.raises(ValueError, match=sentence):
            sharding.make_mesh(*sizes, devices=device)


def test_unboxing_leaves_plain_arrays_alone():
    boxed = {"a": nn.LogicallyPartitioned(np.ones(2), ("embed",)), "b": np.ones(3)}
    plain = sharding.unbox(boxed)
    assert plain["a"] is boxed["a"].value and plain["b"] is boxed["b"]
    abstract = sharding.unbox(jax.eval_shape(init, jax.random.key(0)))
    assert abstract.params["stacked"].shape == (3, 4, 6)


# On eight devices.


def shard_shapes(tree) -> dict[str, list[int]]:
    """Path -> the shape of one device's share, of arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p): x.addressable_shards[0].data.shape for p, x in leaves}


def share_of_a_device(init, model, mesh) -> float:
    """Largest share of all parameters that a device holds; nothing is computed."""
    abstract = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    leaves = jax.tree.leaves(sharding.unbox(abstract))
    placed = jax.tree.leaves(sharding.shardings(abstract, mesh))
    held = sum(math.prod(s.shard_shape(x.shape)) for x, s in zip(leaves, placed))
    return held / sum(math.prod(x.shape) for x in leaves)


def observe() -> dict:
    """What the tests below look at."""
    seen = {"meshes": {}, "shares": {}}
    for sizes in ((-1, 1, 1), (2, -1, 2), (1, 8, 1), (4, 1, -1)):
        seen["meshes"][str(sizes)] = list(sharding.make_mesh(*sizes).shape.values())
    try:
        sharding.make_mesh(-1, 3, 1)
    except ValueError as error:
        seen["sentence"] = str(error)

    mesh = sharding.make_mesh(2, 2, 2)
    key = jax.random.key(0)
    make, said = sharding.initialiser(init, mesh, key)
    state = make(key)
    seen["state"] = shard_shapes(state)
    place = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)
    seen["as_said"] = place(state) == place(said)
    alone = sharding.unbox(jax.jit(params)(jax.random.key(0)))
    same = [np.array_equal(sharding.to_host(state.params[k]), alone[k]) for k in alone]
    seen["values"] = all(same)

    batch = {"image": np.arange(8 * 3).reshape(8, 3), "mask": np.arange(8) < 5}
    placed = sharding.global_batch(batch, mesh)
    seen["batch"] = shard_shapes(placed)
    back = {name: sharding.to_host(x) for name, x in placed.items()}
    seen["batch_back"] = all(np.array_equal(batch[name], back[name]) for name in batch)
    first = [np.asarray(shard.data)[0, 0] for shard in placed["image"].addressable_shards]
    seen["batch_starts"] = sorted(map(int, first))

    for sizes in ((1, 8, 1), (1, 4, 2), (8, 1, 1)):
        mesh, config = sharding.make_mesh(*sizes), TokenizerConfig()
        for name, width in (("content", 1024), ("structure", 512)):
            transformer = layers.TransformerConfig(width, 16)
            model = models.make_generator(name, transformer, config, 1000)
            share = share_of_a_device(generators.init_params, model, mesh)
            seen["shares"][f"{name} {sizes}"] = share
        share = share_of_a_device(tokenizer.init_params, models.make_tokenizer(config), mesh)
        seen["shares"][f"tokenizer {sizes}"] = share
    return seen


@pytest.fixture(scope="module")
def seen():
    return on_eight_devices(__file__)


def test_one_size_of_a_mesh_may_be_the_rest(seen):
    assert seen["meshes"] == {
        "(-1, 1, 1)": [8, 1, 1],
        "(2, -1, 2)": [2, 2, 2],
        "(1, 8, 1)": [1, 8, 1],
        "(4, 1, -1)": [4, 1, 2],
    }
    assert "data=-1, fsdp=3, tensor=1 does not fit 8 devices" in seen["sentence"]


def test_names_become_shares(seen):
    """fsdp and tensor have two devices each; the average and Adam's moments lie alike."""
    expected = {
        "wide": [2, 3],
        "narrow": [3, 2],
        "stacked": [3, 2, 3],
        "odd": [3, 3],  # three rows do not split in two
        "bias": [3],
        "table": [5, 2],
        "codes": [4, 3],
        "conv": [3, 3, 2, 3],
        "free": [6],
        "scalar": [],
    }
    for part in (".params", ".ema_params", ".opt_state[0].mu", ".opt_state[0].nu"):
        found = {name: seen["state"][f"{part}['{name}']"] for name in expected}
        assert found == expected, part
    assert seen["state"][".step"] == []
    assert seen["as_said"]


def test_a_sharded_start_has_the_values_of_one_device(seen):
    assert seen["values"]


def test_a_batch_is_split_over_data_and_fsdp(seen):
    assert seen["batch"] == {"['image']": [2, 3], "['mask']": [2]}
    # Rows 0, 2, 4 and 6 begin a share; both devices of "tensor" hold the same.
    assert seen["batch_starts"] == [0, 0, 6, 6, 12, 12, 18, 18]
    assert seen["batch_back"]


@pytest.mark.parametrize("name", ["content", "structure", "tokenizer"])
def test_the_published_models_spread_over_the_devices(seen, name):
    assert seen["shares"][f"{name} (8, 1, 1)"] == 1
    for sizes in ("(1, 8, 1)", "(1, 4, 2)"):
        assert 1 / 8 <= seen["shares"][f"{name} {sizes}"] < 1 / 8 + 0.01


if __name__ == "__main__":
    print(json.dumps(observe()))
