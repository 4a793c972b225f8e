"""What the tests share: a quiet CPU, one compilation cache, the parity pack."""

import os
import tempfile
from pathlib import Path

# Before jax starts. Most of the time of these tests is compilation: no optimization of tiny
# programs, and what one test or its subprocess compiled is there for the next.
CACHE = tempfile.TemporaryDirectory(prefix="nvg_jax_tests_")
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "XLA_FLAGS": "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0",
    "JAX_COMPILATION_CACHE_DIR": CACHE.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
}

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """The folder of numbers produced by the published model; skips where it is not."""
    folder = Path(os.environ.get("NVG_PARITY_DIR", ROOT.parent / "shared" / "parity"))
    if not (folder / "expected.npz").is_file():
        pytest.skip(f"the parity pack is not in {folder}; set NVG_PARITY_DIR to its folder")
    return folder
