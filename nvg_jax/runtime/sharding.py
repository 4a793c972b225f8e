"""One mesh, one table from logical axis names to mesh axes, and how arrays are placed on it.

Mesh axes: "data" (batch), "fsdp" (batch, and parameters, their averages and optimizer state) and
"tensor" (wide channels). Models only name axes.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = PartitionSpec(("data", "fsdp"))
RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("conv_in", "fsdp"),
    ("conv_out", "tensor"),
    ("layers", None),
    ("length", None),
    ("height", None),
    ("width", None),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh of `devices`, by default all of all processes; one size may be -1, "the rest".

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or slices of TPUs (tori
            without a link between them) do not divide "data".
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [data, fsdp, tensor], len(devices)
    if sizes.count(-1) == 1:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = count // rest if rest > 0 else -1
    if math.prod(sizes) != count or min(sizes) < 1:
        raise ValueError(
            f"A mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not fit {count} devices: "
            "the sizes must multiply to it, and one of them may be -1 for the rest."
        )
    # Orders the devices of a torus so that neighbors on an axis are near each other.
    # GPUs call every machine a slice, and fsdp may well span machines.
    on_tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif sizes[0] % slices:
        raise ValueError(
            f"mesh.data={sizes[0]} must be a multiple of the {slices} slices, between which only "
            "gradients are to travel; use a smaller mesh.fsdp or mesh.tensor."
        )
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // slices, *sizes[1:]), (slices, 1, 1), devices,
            allow_split_physical_axes=True,
        )  # fmt: skip
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def is_boxed(x) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def unbox(tree):
    """The tree without its axis names; unlike `nn.unbox` it also takes abstract trees in a mesh."""
    return jax.tree.map(lambda x: x.value if is_boxed(x) else x, tree, is_leaf=is_boxed)


def shardings(abstract, mesh: Mesh):
    """The sharding of every leaf of an abstract tree whose parameters name their axes.

    A dimension that its mesh axis does not divide is not split.
    """

    def sharding(leaf):
        names = leaf.names if is_boxed(leaf) else ()
        spec = nn.logical_to_mesh_axes(names, RULES)
        shape = unbox(leaf).shape
        fits = [
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, shape)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree.map(sharding, abstract, is_leaf=is_boxed)


def with_shardings(tree, placed):
    """Shapes and dtypes of an abstract tree with the shardings `placed`, one or one for each."""
    tree = unbox(tree)
    if isinstance(placed, NamedSharding):
        placed = jax.tree.map(lambda _: placed, tree)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, placed
    )


def sharded_init(init: Callable, mesh: Mesh, *args) -> tuple[Callable, Any]:
    """Prepares `init`, which makes a tree with named axes, to run sharded.

    Args:
        args: what it will be called with, or their shapes and dtypes.

    Returns:
        The compiled function, which gives a plain tree, and that tree's shapes, dtypes and
        shardings.
    """
    tree = jax.eval_shape(init, *args)
    placed = shardings(tree, mesh)
    return jax.jit(lambda *a: unbox(init(*a)), out_shardings=placed), with_shardings(tree, placed)


def processes_split_batch(mesh: Mesh) -> bool:
    """Whether every process holds as many rows of a batch as any other, and no row twice."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = {}
    for device, (row,) in NamedSharding(mesh, BATCH_SPEC).devices_indices_map((ways,)).items():
        rows.setdefault(device.process_index, set()).add(row.start or 0)
    counts = [len(held) for held in rows.values()]
    return sum(counts) == ways and len(set(counts)) == 1


def global_batch(batch, mesh: Mesh):
    """Arrays whose leading axis is this process's share -> global arrays split over the batch."""
    sharding = NamedSharding(mesh, BATCH_SPEC)

    def place(x):
        shape = (len(x) * jax.process_count(), *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(place, batch)


def to_host(array) -> np.ndarray:
    """A whole global array as NumPy, on every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
