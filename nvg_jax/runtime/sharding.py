"""The device mesh, the table from logical axis names to mesh axes, and the placement of arrays.

Mesh axes: "data" splits the batch; "fsdp" splits the batch and also the parameters, their moving
averages and the optimizer state; "tensor" splits wide channel axes. Models only name logical axes.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.linen import spmd
from jax import Array
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from nvg_jax.errors import UserError

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
    """A mesh of `devices` (by default all devices of all processes).

    One size may be -1, which takes all remaining devices.

    Raises:
        UserError: the product of the sizes is not the number of devices, or "data" is not a
            multiple of the number of TPU slices (tori without a fast link between them).
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [data, fsdp, tensor], len(devices)
    if sizes.count(-1) == 1:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = count // rest if rest > 0 else -1
    if math.prod(sizes) != count or min(sizes) < 1:
        raise UserError(
            f"A mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not fit {count} devices: "
            "their product must be that number. One size may be -1, which takes the rest."
        )
    # Orders the devices of a torus so that neighbors on a mesh axis are close to each other.
    # On GPUs, JAX reports each machine as a slice; there, fsdp may span machines.
    on_tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif sizes[0] % slices:
        raise UserError(
            f"mesh.data={sizes[0]} must be a multiple of the number of slices, {slices}, so that "
            "only gradients travel between slices. Use a smaller mesh.fsdp or mesh.tensor."
        )
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // slices, *sizes[1:]),
            (slices, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def local_mesh() -> Mesh:
    """The devices of this process: in the mesh of all, every operation waits for the others."""
    return make_mesh(devices=jax.local_devices())


@contextlib.contextmanager
def in_mesh(mesh: Mesh):
    """The context in which training is traced: the mesh, and the meaning of logical axes."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def is_boxed(x) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def unbox(tree):
    """Removes the axis names from a tree; unlike `nn.unbox`, accepts abstract trees in a mesh."""
    return jax.tree.map(lambda x: x.value if is_boxed(x) else x, tree, is_leaf=is_boxed)


def shardings(abstract, mesh: Mesh):
    """The sharding of each leaf of an abstract tree whose parameters name their axes.

    A dimension that is not divisible by the size of its mesh axis is not split.
    """

    def sharding(leaf):
        names = leaf.names if is_boxed(leaf) else ()
        spec = spmd.logical_to_mesh_axes(names, RULES) or ()

        def place(x):
            fits = [
                axis if axis is not None and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(spec, x.shape)
            ]
            return NamedSharding(mesh, PartitionSpec(*fits))

        return jax.tree.map(place, unbox(leaf))  # an optimizer leaves some names without a value

    return jax.tree.map(sharding, abstract, is_leaf=is_boxed)


def parameter(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: Sequence[int],
    axes: Sequence[str | None],
) -> Array:
    """A parameter of a module, float32, with one logical axis per dimension."""
    boxed: Any = nn.with_logical_partitioning(init, tuple(axes))
    return module.param(name, boxed, shape)


def constrain(x: Array, axes: Sequence[str | None]) -> Array:
    """Shards an activation by the logical axes of its dimensions (None: unsharded)."""
    return spmd.with_logical_constraint(x, tuple(axes))


def unshard(x: Array, axes: Sequence[str | None] | None = None) -> Array:
    """Unshards a parameter at its point of use.

    XLA then all-gathers weights layer by layer instead of moving activations. `axes` are the
    logical axes, one per dimension, that stay sharded (None: unsharded); by default none.
    """
    return constrain(x, axes or (None,) * x.ndim)


def with_shardings(tree, placed):
    """An abstract tree with shardings attached: `placed` is one sharding or a tree of them."""
    tree = unbox(tree)
    if isinstance(placed, NamedSharding):
        placed = jax.tree.map(lambda _: placed, tree)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, placed
    )


def sharded_init(init: Callable, mesh: Mesh, *args) -> tuple[Callable, Any]:
    """Jits `init`, which returns a tree with named axes, so that its result is created sharded.

    Args:
        args: the arguments it will be called with, or their shapes and dtypes.

    Returns:
        The jitted function, which returns a plain tree, and that tree's shapes, dtypes and
        shardings.
    """
    init = jax.jit(init)  # traced once, for both of its results
    tree = jax.eval_shape(init, *args)
    placed = shardings(tree, mesh)
    return jax.jit(lambda *a: unbox(init(*a)), out_shardings=placed), with_shardings(tree, placed)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, shards: int):
    """Raises UserError if a batch does not split evenly over the shards of a mesh."""
    if batch_size < 1 or batch_size % shards:
        near = max(1, batch_size // shards) * shards
        raise UserError(
            f"A batch of {batch_size} does not split over the data x fsdp = {shards} shards of the "
            f"mesh; use a multiple of {shards}, such as {near}, or another --config.mesh."
        )


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of parts that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def tensor_shards() -> int:
    """The number of parts that wide channel axes are split into in the current mesh, if any."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1)


def processes_split_batch(mesh: Mesh) -> bool:
    """Whether all processes hold the same number of rows of a batch, and no row is held by two."""
    shards = batch_shards(mesh)
    rows = {}
    for device, (row,) in NamedSharding(mesh, BATCH_SPEC).devices_indices_map((shards,)).items():
        rows.setdefault(device.process_index, set()).add(row.start or 0)
    counts = [len(held) for held in rows.values()]
    return sum(counts) == shards and len(set(counts)) == 1


def fill_batch(batch, size: int):
    """Repeats the last row of arrays (B, ...), B at most `size`, to the shape (size, ...)."""

    def fill(x):
        return x if len(x) == size else x[np.minimum(np.arange(size), len(x) - 1)]

    return jax.tree.map(fill, batch)


def local_batch(batch, mesh: Mesh):
    """Splits arrays (B, ...) over the devices of a mesh of this process.

    The last row is repeated until B is a multiple of the number of devices.
    """
    count = len(jax.tree.leaves(batch)[0])
    batch = fill_batch(batch, -(-count // mesh.size) * mesh.size)
    return jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC))


def global_batch(batch, mesh: Mesh):
    """Global arrays, split over the batch axis, from the rows of each process."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH_SPEC), batch)


def to_host(array) -> np.ndarray:
    """The full value of a global array as a NumPy array, on every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
