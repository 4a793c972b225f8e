"""What depends on the devices that a program runs on: the platform, the dtype, XLA's options."""

import jax

# cuBLAS computes all matrix products. XLA's autotuner would choose kernels of its own for some,
# with which sampling takes a tenth longer (docs/performance.md).
CUBLAS_ONLY: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}


def platform() -> str:
    """The platform being compiled for: "cpu", "gpu" or "tpu".

    Inside a mesh it is the platform of the mesh, whose devices may belong to another machine.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def fast_dtype() -> str:
    """The default dtype for sampling on this machine's devices.

    "bfloat16" on TPUs and on GPUs that support it (compute capability 8 and later), "float32"
    elsewhere.
    """
    device = jax.local_devices()[0]
    if device.platform == "gpu":
        return "bfloat16" if float(device.compute_capability) >= 8 else "float32"
    return "bfloat16" if device.platform == "tpu" else "float32"


def compiler_options() -> dict[str, str | bool] | None:
    """XLA's options for the sampler on this machine's devices."""
    return CUBLAS_ONLY if jax.default_backend() == "gpu" else None
