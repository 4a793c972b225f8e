"""The mesh, on the devices of one process (test_eight_devices.py has the placement on many)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvg_jax.aot.chips import TPUS, Target
from nvg_jax.errors import UserError
from nvg_jax.runtime import sharding


def test_sizes_of_a_mesh():
    device = jax.devices()[:1]
    for sizes in ({}, {"fsdp": -1, "data": 1}, {"data": 1}):
        mesh = sharding.make_mesh(**sizes, devices=device)
        assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    for sizes in ((2, 1, 1), (-1, 2, 1), (-1, -1, 1), (0, 1, 1), (1, 0, -1), (-2, 1, 1)):
        sentence = "data={}, fsdp={}, tensor={} does not fit 1 devices".format(*sizes)
        with pytest.raises(UserError, match=sentence):
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
    assert sharding.processes_split_batch(mesh)
    assert Target("2xv5e:8x1", mesh, TPUS["v5e"]).chips == 16  # of the same places in two slices
    with pytest.raises(
        UserError, match=r"mesh.data=1 must be a multiple of the number of slices, 2"
    ):
        sharding.make_mesh(1, 16, 1, devices=chips)


def test_a_batch_is_filled_with_its_last_row():
    rows, labels = np.arange(6.0).reshape(3, 2), jnp.array([7, 8, 9])
    filled, filled_labels = sharding.fill_batch((rows, labels), 5)
    assert filled.tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]
    assert filled_labels.tolist() == [7, 8, 9, 9, 9]
    assert sharding.fill_batch(rows, 3) is rows


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
    make = lambda: {"a": nn.LogicallyPartitioned(jnp.ones((3, 4)), ("layers", "embed"))}
    assert sharding.unbox(jax.eval_shape(make))["a"].shape == (3, 4)
