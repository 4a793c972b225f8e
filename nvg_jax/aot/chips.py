"""Accelerator chips, and topologies of them to compile for without having one.

`CHIPS` holds the published figures. `find_target` is the only place that knows platforms.
"""

import dataclasses
import importlib.util
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from nvg_jax.runtime import sharding

GIB = 2**30


class Chip(NamedTuple):
    """Published figures of a chip.

    flops: bfloat16 operations per second. hbm: bytes of main memory. hbm_bandwidth: bytes per
    second. ici_bandwidth: bytes per second sent to neighbors, over all links together.
    """

    flops: float
    hbm: float
    hbm_bandwidth: float
    ici_bandwidth: float


# From the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" of
# https://cloud.google.com/tpu/docs. They give the interconnect bandwidth of both directions
# together (v5e 400, v5p 1200, v6e 800, TPU7x 1200 GB/s; v4: 2400 Gbit/s each way); half is sending.
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1200e9, 300e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 400e9),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 600e9),
}


@dataclasses.dataclass
class Target:
    """A mesh over the devices of a topology; `device` is one device's share of its chip."""

    topology: str
    mesh: Mesh
    device: Chip

    @property
    def batch_shards(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]


def find_target(topology: str, mesh: dict[str, int]) -> Target:
    """Arranges the devices of a topology such as v5p:4x4x4 in a mesh of the given sizes.

    Raises:
        ValueError: unknown topology, no compiler for it, or sizes that do not fit its devices.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        raise ValueError(
            f"Unknown topology {topology!r}: expected CHIP:SHAPE, where CHIP is one of "
            f"{', '.join(CHIPS)} and SHAPE the number of chips along each axis, such as "
            "v5e:16x16, v5p:4x4x4 or v6e:8x8."
        )
    devices = tpu_devices(topology)
    # Some chips present several devices.
    per_chip = len(devices) // len({tuple(device.coords) for device in devices})
    device = Chip(*(figure / per_chip for figure in CHIPS[name]))
    return Target(topology, sharding.make_mesh(**mesh, devices=devices), device)


def tpu_devices(topology: str) -> list:
    """Descriptions of the TPU devices of a topology, for the compiler only."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "The TPU compiler is not installed. It needs no TPU and about 600 MB: "
            'pip install "jax[tpu]"'
        )
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"There is no topology {topology!r} ({str(error).splitlines()[0]}). Valid sizes: "
            "v5e and v6e from 2x2 to 16x16; v4 and v5p 2x2x1, 2x2x2, 2x2x4, 4x4x4, 8x8x8 and so on."
        ) from error


def hide_accelerators():
    """Makes JAX run on the CPU only, and libtpu search for no TPU. Call before JAX starts."""
    os.environ |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilations may run at once
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    jax.config.update("jax_platforms", "cpu")
