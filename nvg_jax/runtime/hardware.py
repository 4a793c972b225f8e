"""What programs run with: the platform of the devices, the dtype, the options of JAX and XLA."""

import contextlib
import logging

import jax

from nvg_jax.errors import UserError

logger = logging.getLogger("nvg_jax")

# Options of JAX that change our numbers, or make our programs fail, with the values for which they
# are written. An environment variable may set them: JAX_ENABLE_X64.
OPTIONS = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_numpy_rank_promotion": "allow",
    "jax_numpy_dtype_promotion": "standard",
}
# GPUs that programs are compiled for ahead of time, by their names there -> compute capability.
GPU_CAPABILITY = {"t4": "7.5", "a100": "8.0", "h100": "9.0", "h200": "9.0", "b200": "10.0"}
# cuBLAS computes all matrix products. XLA's autotuner would choose kernels of its own for some,
# with which sampling takes a tenth longer (docs/performance.md).
CUBLAS_ONLY: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}


def platform() -> str:
    """The platform being compiled for: "cpu", "gpu" or "tpu".

    Inside a mesh it is the platform of the mesh, whose devices may belong to another machine.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def ampere_or_later() -> bool:
    """Whether what is being compiled for is an NVIDIA GPU of compute capability 8 or later.

    Those have bfloat16, and cuDNN's attention.
    """
    if platform() != "gpu":
        return False
    mesh = jax.sharding.get_abstract_mesh()
    capability = None if mesh.empty else GPU_CAPABILITY.get(mesh.abstract_device.device_kind)
    return float(capability or jax.local_devices()[0].compute_capability) >= 8


def fast_dtype() -> str:
    """The default dtype for sampling on this machine's devices.

    "bfloat16" on TPUs and on GPUs that support it, "float32" elsewhere.
    """
    return "bfloat16" if platform() == "tpu" or ampere_or_later() else "float32"


def compiler_options() -> dict[str, str | bool] | None:
    """XLA's options for the sampler on this machine's devices."""
    return CUBLAS_ONLY if jax.default_backend() == "gpu" else None


def changed_options() -> dict[str, object]:
    """{name: value} of the `OPTIONS` that have another value in this process."""
    values = {name: getattr(jax.config, name, usual) for name, usual in OPTIONS.items()}
    return {name: value for name, value in values.items() if value != OPTIONS[name]}


def check_options():
    """Raises UserError if an option of JAX has a value for which training is not written."""
    for name, value in changed_options().items():
        raise UserError(
            f"Training needs {name}={OPTIONS[name]}, and this process has {value}. Call "
            f"jax.config.update({name!r}, {OPTIONS[name]!r}) first."
        )


@contextlib.contextmanager
def usual_options():
    """Within it, a notebook's own values of the `OPTIONS` count for nothing.

    But jax_random_seed_offset, which only `jax.random.key` reads.
    """
    with contextlib.ExitStack() as stack:
        for name, value in OPTIONS.items():
            option = getattr(jax, name.removeprefix("jax_"), None)
            if option is not None:
                stack.enter_context(option(value))
        yield


def pin_options():
    """Sets the `OPTIONS` of this process, with a line in the log for each that had another value.

    The precision of matrix products may be chosen from outside; the log says so.
    """
    for name, value in changed_options().items():
        logger.warning("%s=%s is not used: nvg_jax needs %s", name.upper(), value, OPTIONS[name])
        jax.config.update(name, OPTIONS[name])
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if precision is not None:
        logger.warning(
            "JAX_DEFAULT_MATMUL_PRECISION=%s: results differ from those without it", precision
        )


def device_memory(stats) -> dict[str, float]:
    """Bytes on one device, as the compiler accounts for them.

    outputs: only those that do not reuse the memory of an argument. total: the sum of all parts.
    """
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values())}
