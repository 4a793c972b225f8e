"""What the tests share: a quiet CPU with eight devices, the parity pack, tiny trained runs."""

import os
from pathlib import Path

# Before jax starts. Eight devices on one CPU, so that every test can shard.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """The folder of numbers produced by the published model; skips where it is not."""
    folder = Path(os.environ.get("NVG_PARITY_DIR", ROOT.parent / "shared" / "parity"))
    if not (folder / "expected.npz").is_file():
        pytest.skip(f"the parity pack is not in {folder}; set NVG_PARITY_DIR to its folder")
    return folder
