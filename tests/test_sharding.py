"""The mesh and where arrays lie on it: on one device here, on eight in a process of its own."""

import json
import math
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import on_eight_devices

from nvg_jax import layers, models
from nvg_jax.runtime import sharding
from nvg_jax.runtime.checkpoint import Checkpoints
from nvg_jax.tokenizer import TokenizerConfig
from nvg_jax.training.state import TrainState


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


class Chip:
    """What a mesh asks of a device."""

    platform, device_kind, core_on_chip = "tpu", "none that is known", 0

    def __init__(self, number: int, per_process: int, per_slice: int):
        self.id, self.process_index = number, number // per_process
        self.slice_index, place = divmod(number, per_slice)
        self.coords = (place, 0, 0)


def test_between_slices_lies_the_data_axis():
    chips = [Chip(number, 4, 8) for number in range(16)]
    mesh = sharding.make_mesh(-1, 2, 2, devices=chips)
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert slices.shape == (4, 2, 2) and (np.ptp(slices, axis=(1, 2)) == 0).all()
    assert sorted(slices[:, 0, 0]) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"mesh.data=1 must be a multiple of the 2 slices"):
        sharding.make_mesh(1, 16, 1, devices=chips)


def test_every_process_has_rows_of_its_own():
    chips = [Chip(number, 4, 16) for number in range(16)]
    split = lambda *sizes: sharding.processes_split_batch(sharding.make_mesh(*sizes, devices=chips))
    assert split(16, 1, 1) and split(2, 8, 1) and split(4, 1, 4) and split(4, 2, 2)
    assert not split(2, 1, 8) and not split(1, 1, 16)  # eight devices have the same rows
    uneven = [Chip(number, 3, 16) for number in range(4)]
    assert not sharding.processes_split_batch(sharding.make_mesh(4, 1, 1, devices=uneven))


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
    seen = {"meshes": {}, "shares": {}, "restored": {}}
    for sizes in ((-1, 1, 1), (2, -1, 2), (1, 8, 1), (4, 1, -1)):
        seen["meshes"][str(sizes)] = list(sharding.make_mesh(*sizes).shape.values())
    try:
        sharding.make_mesh(-1, 3, 1)
    except ValueError as error:
        seen["sentence"] = str(error)

    mesh = sharding.make_mesh(2, 2, 2)
    key = jax.random.key(0)
    make, said = sharding.sharded_init(init, mesh, key)
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
            share = share_of_a_device(models.init_generator, model, mesh)
            seen["shares"][f"{name} {sizes}"] = share
        share = share_of_a_device(models.init_tokenizer, models.make_tokenizer(config), mesh)
        seen["shares"][f"tokenizer {sizes}"] = share

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder)
        checkpoints.save(1, state, {})
        checkpoints.wait()
        for sizes in ((1, 8, 1), (2, 2, 1), (1, 2, 2), (1, 1, 1)):
            devices = jax.devices()[: math.prod(sizes)]
            _, wanted = sharding.sharded_init(
                init, sharding.make_mesh(*sizes, devices=devices), key
            )
            found, _, _ = checkpoints.restore(wanted, lambda meta: None)
            same = jax.tree.map(lambda a, b: np.array_equal(a, b), found, state)
            seen["restored"][str(sizes)] = all(jax.tree.leaves(same)) and place(found) == place(
                wanted
            )
        checkpoints.close()
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


@pytest.mark.parametrize("sizes", ["(1, 8, 1)", "(2, 2, 1)", "(1, 2, 2)", "(1, 1, 1)"])
def test_a_checkpoint_of_eight_devices_goes_to_any_mesh(seen, sizes):
    assert seen["restored"][sizes]


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
