"""Accelerator chips, and topologies of them to compile for without owning one.

`TPUS` and `GPUS` hold the published specifications. Only `find_target` knows the platforms.
"""

import dataclasses
import importlib.util
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from nvg_jax.errors import UserError
from nvg_jax.runtime import sharding
from nvg_jax.runtime.hardware import CUBLAS_ONLY, GPU_CAPABILITY

GIB = 2**30


class Chip(NamedTuple):
    """Published specifications of a chip.

    flops: bfloat16 operations per second, without sparsity. hbm: bytes of main memory.
    hbm_bandwidth: bytes per second. link_bandwidth: bytes per second sent to other chips, over all
    links together. network_bandwidth: the same where a slower network connects the hosts.
    float32_flops, float16_flops: None is as many as in bfloat16. GPUs multiply float32 in TF32.
    """

    flops: float
    hbm: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float | None = None
    float32_flops: float | None = None
    float16_flops: float | None = None

    def peak(self, dtype: str) -> float:
        """Operations per second in "float32", "bfloat16" or "float16"."""
        other = {"float32": self.float32_flops, "float16": self.float16_flops}
        return other.get(dtype) or self.flops


# TPUs: from the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" of
# https://cloud.google.com/tpu/docs. They list the interconnect bandwidth of both directions
# together (v5e 400, v5p 1200, v6e 800, TPU7x 1200 GB/s; v4: 2400 Gbit/s each way); half of that is
# the send direction. The keys are the compiler's names of topologies; `tpu_devices` lists their
# valid sizes.
TPUS = {
    "v4": Chip(275e12, 32 * GIB, 1200e9, 300e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 400e9),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 600e9),
}
# GPUs: NVIDIA's data sheets for the SXM modules; half of NVLink's bandwidth is the send
# direction. Network: one adapter per GPU, as in NVIDIA's DGX systems (A100 200 Gbit/s, others 400).
# The T4, a PCIe card, has neither bfloat16, which XLA computes in float32, nor TF32.
GPUS = {
    "t4": Chip(8.1e12, 16e9, 320e9, 16e9, float16_flops=65e12),
    "a100": Chip(312e12, 80e9, 2039e9, 300e9, 25e9, float32_flops=156e12),
    "h100": Chip(989e12, 80e9, 3352e9, 450e9, 50e9, float32_flops=494.5e12),
    "h200": Chip(989e12, 141e9, 4800e9, 450e9, 50e9, float32_flops=494.5e12),
    "b200": Chip(2250e12, 180e9, 8000e9, 900e9, 50e9, float32_flops=1125e12),
}

GPU_SHARE = 0.75  # of a GPU's memory, which JAX takes unless XLA_CLIENT_MEM_FRACTION says otherwise


class GpuLayout(NamedTuple):
    """What XLA needs to know to compile for a GPU, besides `GPU_CAPABILITY`.

    From NVIDIA's tuning guides. shared_memory: bytes per multiprocessor; a block may use 1 KiB
    less. clock: GHz.
    """

    multiprocessors: int
    units: int
    shared_memory: int
    l2_cache: int
    clock: float


LAYOUTS = {
    "t4": GpuLayout(40, 64, 65_536, 4 * 2**20, 1.59),
    "a100": GpuLayout(108, 64, 167_936, 40 * 2**20, 1.41),
    "h100": GpuLayout(132, 128, 233_472, 50 * 2**20, 1.98),
    "h200": GpuLayout(132, 128, 233_472, 50 * 2**20, 1.98),
    "b200": GpuLayout(148, 128, 233_472, 126 * 2**20, 1.965),
}


@dataclasses.dataclass
class Target:
    """A mesh over the devices of a topology.

    device: one device's share of its chip. options: compiler options.
    """

    topology: str
    mesh: Mesh
    device: Chip
    options: dict[str, str | bool] = dataclasses.field(default_factory=dict)

    @property
    def chips(self) -> int:
        """The number of chips; some TPUs present each as several devices."""
        return len({chip_of(device) for device in self.mesh.devices.flat})

    @property
    def batch_shards(self) -> int:
        return sharding.batch_shards(self.mesh)


def find_target(topology: str, mesh: dict[str, int]) -> Target:
    """Arranges the devices of a topology such as v5p:4x4x4 or h100:8 in a mesh of the given sizes.

    2xv5p:4x4x4 is two slices. Their estimate counts the links inside a slice, not the network
    between them.

    Raises:
        UserError: unknown topology, no compiler for it, or sizes that do not fit its devices.
    """
    name, _, shape = topology.partition(":")
    slices = re.match(r"([1-9]\d*)x(?=v|tpu)", name)
    name = name[slices.end() :] if slices else name
    if name in TPUS and re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        devices = tpu_devices(f"{name}:{shape}", int(slices[1]) if slices else 1)
        # Some chips present several devices.
        per_chip = len(devices) // len(set(map(chip_of, devices)))
        device = Chip(*(number / per_chip for number in TPUS[name][:4]))
        return Target(topology, sharding.make_mesh(**mesh, devices=devices), device)
    if name in GPUS and re.fullmatch(r"([1-9]\d*x)?[1-8]", shape):
        hosts, per_host = ([1] + [int(size) for size in shape.split("x")])[-2:]
        device = GPUS[name]
        if hosts > 1:  # the slowest link limits a collective
            if device.network_bandwidth is None:
                raise UserError(f"No network between hosts is known for {name}; give one host.")
            device = device._replace(link_bandwidth=device.network_bandwidth)
        devices = gpu_devices(name, hosts, per_host)
        # Without a GPU, Triton's kernels for matrix products cannot be tuned.
        gpus = sharding.make_mesh(**mesh, devices=devices)
        return Target(topology, gpus, device, CUBLAS_ONLY)
    raise UserError(
        f"Unknown topology {topology!r}: expected CHIP:SHAPE. For a TPU ({', '.join(TPUS)}), SHAPE "
        "is the number of chips along each axis, such as v5e:16x16, v5p:4x4x4 or v6e:8x8, with the "
        "number of slices in front if there are several, such as 2xv5e:16x16; for a "
        f"GPU ({', '.join(GPUS)}), the number of GPUs, 1 to 8 on a host, such as h100:8, or hosts "
        "x GPUs, such as h100:4x8."
    )


def chip_of(device) -> tuple:
    """Tells chips apart: those of TPUs have a place in their slice."""
    place = getattr(device, "coords", None) or [device.id]
    return getattr(device, "slice_index", 0), *place


def tpu_devices(topology: str, slices: int) -> list:
    """Descriptions of the TPU devices of slices of a topology, for the compiler only."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "The TPU compiler is not installed. It needs no TPU and about 600 MB: "
            'pip install "jax[tpu]"'
        )
    # A host has 2 x 2 chips or more, except the host of a single chip, such as Colab's.
    single = set(topology.partition(":")[2].split("x")) == {"1"}
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
    try:
        return topologies.get_topology_desc(
            topology, platform="tpu", num_slices=slices, **bounds
        ).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"There is no topology {topology!r} ({str(error).splitlines()[0]}). Valid sizes: "
            "v5e and v6e 1x1, 2x2 to 16x16; v4 and v5p 2x2x1, 2x2x2, 2x2x4, 4x4x4, 8x8x8 and so on."
        ) from error


def gpu_devices(name: str, hosts: int, per_host: int) -> list:
    """Descriptions of GPUs, for the compiler only."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise UserError(
            "The GPU compiler is not installed. It needs no GPU and about 5 GB: "
            'pip install "jax[cuda13]"'
        )
    layout, chip = LAYOUTS[name], GPUS[name]
    major, minor = GPU_CAPABILITY[name].split(".")
    # Instructions of this generation only, such as Hopper's matrix products.
    features = "feature_extension: ACCELERATED_FEATURES" if int(major) >= 9 else ""
    config = f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          core_count: {layout.multiprocessors} fpus_per_core: {layout.units}
          shared_memory_per_block: 49152 shared_memory_per_core: {layout.shared_memory}
          shared_memory_per_block_optin: {layout.shared_memory - 1024}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: {chip.hbm_bandwidth:.0f} device_memory_size: {chip.hbm:.0f}
          l2_cache_size: {layout.l2_cache} clock_rate_ghz: {layout.clock}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        device_description_str: "{name}"
    """
    shape = f"1x{hosts}x{per_host}"
    return topologies.get_topology_desc(
        platform="cuda", target_config=config, topology=shape
    ).devices


def hide_accelerators():
    """Runs JAX on the CPU only and keeps libtpu from searching for TPUs. Call before JAX starts."""
    os.environ |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilations may run at once
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    jax.config.update("jax_platforms", "cpu")
