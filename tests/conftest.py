"""Set-up shared by all tests: a quiet CPU, one compilation cache, the parity pack."""

import ctypes
import gc
import os
import signal
import sys
from pathlib import Path

from helpers import ROOT, free_port, random_pipeline, tiny_config

# Set before jax is imported. Most of the time of these tests is compilation, so compiled programs
# are shared by all processes and kept for the next run.
CACHE = ROOT / ".pytest_cache" / "jax"
os.environ |= {
    "JAX_PLATFORMS": os.environ.get("TEST_PLATFORM", "cpu"),  # cuda,cpu: the parity tests on a GPU
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),  # JAX locks the folder only if a size is set
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}",  # no test asks the real hub
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Calls are checked against the types and shapes in the signatures of these modules, which must be
# imported after this line. Not here: `sampling.settings` and `tokenizer.model`, whose dataclasses
# take values of other types and check or convert them.
TYPED = ("granularity", "clustering", "attention", "layers", "kernels", "structure", "content")
TYPED += tuple(
    f"tokenizer.{name}"
    for name in ("autoencoder", "diffaug", "discriminator", "losses", "quantizer")
)
TYPED += tuple(f"sampling.{name}" for name in ("control", "generate", "guidance", "networks"))
install_import_hook([f"nvg_jax.{name}" for name in TYPED], "shapes.checked")

from nvg_jax.cli import FAST_COMPILE  # noqa: E402
from nvg_jax.runtime import interrupts  # noqa: E402

interrupts.listen = lambda: None  # a command called in this process leaves its signals alone
flags.FLAGS(["tests"])  # Orbax asks for some
os.environ["XLA_FLAGS"] = " ".join(FAST_COMPILE)
gc.set_threshold(200_000, 50, 100)  # tracing creates many objects, of which most stay


def pytest_configure(config):
    """Deletes cache entries that an interrupted run left half written, once per run.

    JAX writes NAME-cache, then NAME-atime, and never replaces an entry.
    """
    if not hasattr(config, "workerinput"):
        for entry in CACHE.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink()


# Files that train the tiny model: in one worker, which compiles it once; not test_end_to_end, which
# takes as long as all of them.
TRAINING = (
    "test_faults",
    "test_bucket",
    "test_errors",
    "test_resume",
    "test_initial",
    "test_scoring",
    "test_rehearsal",
)
# Files that take longest; first, so that no worker is left alone with one of them at the end.
LONG = (
    "test_end_to_end",
    *TRAINING,
    "test_eight_devices",
    "test_launch",  # waits more than it computes
    "test_parity",
    "test_training_losses",
    "test_control",
    "test_generators",
    "test_distillation",
    "test_sampling_runs",
    "test_watchdog",
    "test_notebook",
    "test_pretrained",
)


def pytest_collection_modifyitems(items):
    rank = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadfile`, with the files of `TRAINING` as one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "training" if Path(file).stem in TRAINING else file

    return Scheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Frees compiled programs, which the cache keeps, after files of a process that holds many.

    They are most of its memory, in pieces that glibc keeps until it is told to return them, and of
    its mappings, of which Linux allows 65,530; with jax 0.12, they are 10,000 for a GiB.
    """
    yield
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        mappings = Path("/proc/self/maps").read_bytes().count(b"\n")
        if pages * os.sysconf("SC_PAGESIZE") > 3 * 2**30 or mappings > 20_000:
            jax.clear_caches()
            gc.collect()
            getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)


@pytest.fixture(scope="session")
def parity_dir(tmp_path_factory):
    """A folder with the files of tests/parity and the checkpoints that its pack.py writes."""
    from parity import pack

    folder = tmp_path_factory.mktemp("parity")
    for file in pack.FOLDER.iterdir():
        (folder / file.name).symlink_to(file)
    pack.write_checkpoints(folder)
    return folder


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()


@pytest.fixture(scope="module")
def exported(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of every part that measured FID and kept all checkpoints; to be left as is.

    One for all workers.
    """
    from filelock import FileLock

    from nvg_jax.train import train

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    config = tiny_config()
    for training in (config.tokenizer_training, config.generator_training):
        training.update(fid_every=8, fid_samples=50, keep=3)
    folder, done = shared / "trained", shared / "trained.done"
    with FileLock(shared / "trained.lock"):
        if not done.exists():
            train(config, folder)
            done.touch()
    return folder


@pytest.fixture(scope="module")
def service():
    """The emulator of Cloud Storage, found by all libraries in this process and its children."""
    import fsspec
    from bucket import serve

    before = dict(os.environ)
    with serve() as bucket:
        os.environ |= bucket.environment
        yield bucket
    os.environ.clear()
    os.environ |= before
    fsspec.filesystem("gs").clear_instance_cache()


@pytest.fixture
def bucket(service, monkeypatch):
    """An empty bucket; what waits for it waits a twentieth of the time."""
    from bucket import shorten_pauses

    service.clear()
    shorten_pauses(monkeypatch)
    return service


@pytest.fixture
def foreground():
    """Ctrl-C and a hangup as in the foreground, for this process and its children.

    A shell's background process ignores the one, and what nohup started the other.
    """
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
