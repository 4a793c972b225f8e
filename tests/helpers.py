"""Shared by several test files. Imports no conftest, so that tests can also run as scripts."""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 600  # seconds of every process that a test starts
# The environment variables of a process that is to be killed: it reads the compilation cache but
# does not write to it, since a kill would leave half an entry.
CACHE_READ_ONLY = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}


def tiny_config(**changes):
    """The configuration of all tests that train: the same sizes and steps compile once."""
    from configs import digits

    config = digits.get_config("runlocal")
    config.update(changes)
    return config


def random_pipeline(**tokenizer):
    """A tiny model of ten classes with random weights, in which every setting matters.

    Its config has changed settings of the tokenizer.
    """
    from nvg_jax import Pipeline
    from nvg_jax.metadata import RunMetadata
    from nvg_jax.models import ModelConfig
    from nvg_jax.sampling.settings import Settings

    config = tiny_config(tokenizer=tokenizer)
    model = ModelConfig.from_config(config, num_classes=10)
    metadata = RunMetadata(
        model=model,
        class_names=tuple(str(digit) for digit in range(10)),
        canvas_scale=(1.0,) * 6,
        sampling=Settings.from_dict(config.sampling.to_dict()),
    )
    params = random_like({name: model.abstract_params(name) for name in model.networks}, 0.2)
    return Pipeline(metadata, params)


def make_reporter(workdir: Path, part: str, start: int = 0, forecast=None):
    """The reporter of a training of 9 steps of a part."""
    from nvg_jax.parts import PARTS
    from nvg_jax.runtime.storage import storage_path
    from nvg_jax.training.metrics import Reporter

    config = tiny_config()
    recipe = config[PARTS[part].section]
    trainer = types.SimpleNamespace(part=PARTS[part], steps=9, recipe=recipe)
    run = types.SimpleNamespace(workdir=storage_path(workdir), config=config)
    return Reporter(trainer, run, start, forecast)


def published_tokenizer(**changes):
    """The sizes of the published tokenizer, changed."""
    from configs import common
    from nvg_jax.tokenizer import TokenizerConfig

    return TokenizerConfig(**common.base().tokenizer.to_dict() | changes)


def optimizer_config(**changes):
    """The published generators' optimizer, changed."""
    from configs import common
    from nvg_jax.training.optimizers import OptimizerConfig

    return OptimizerConfig(**common.base().generator_training.optimizer.to_dict() | changes)


def tiny_discriminator():
    """A discriminator of small images that compiles in a fraction of the time."""
    import flax.linen as nn

    from nvg_jax.tokenizer.discriminator import DiscriminatorHeads, SmallFeatures

    return nn.Sequential([SmallFeatures(width=16, num_layers=2), DiscriminatorHeads(3)])


def random_like(tree, scale: float, seed: int = 0):
    """Arrays of the shapes and types of `tree`, normally distributed with deviation `scale`."""
    import jax

    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(scale=scale, size=x.shape).astype(x.dtype), tree)


def raising(error: Exception):
    """A function that raises, for `monkeypatch.setattr`."""

    def fail(*args, **kwargs):
        raise error

    return fail


def free_port() -> int:
    """A TCP port that nothing on this machine listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    """Inverts one bit of the byte at `position` of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def with_devices(count: int) -> dict[str, str]:
    """The environment of a process with `count` CPU devices."""
    flags = f"--xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}


class Process(subprocess.Popen):
    """A process that never stands still: Python then prints its stacks, and all of it is killed.

    It leads a session of its own, and a thread reads its outputs. To be used in `with`, which kills
    what is left.
    """

    def __init__(self, command, timeout=TIMEOUT, cwd=ROOT, env=os.environ, **options):
        env = {**env, "PYTHONFAULTHANDLER": "1"}  # SIGABRT prints the stacks of all threads
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        super().__init__(command, cwd=cwd, env=env, start_new_session=True, **pipes | options)
        self.late = False
        reader = ThreadPoolExecutor(1)
        self.outputs = reader.submit(self._read, timeout)
        reader.shutdown(wait=False)

    def _read(self, timeout):
        for limit, number in ((timeout, signal.SIGABRT), (10, signal.SIGKILL)):
            try:
                return self.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                self.late = True
                self.send_to_all(number)
        return self.communicate(timeout=10)

    def send_to_all(self, number):
        """Sends a signal to the process and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def __exit__(self, *exception):
        self.send_to_all(signal.SIGKILL)
        self.outputs.exception()
        super().__exit__(*exception)


def finish(*processes: Process) -> list[subprocess.CompletedProcess]:
    """Waits for processes; fails with all outputs if one of them took too long."""
    done = []
    for process in processes:
        outputs = process.outputs.result()
        done.append(subprocess.CompletedProcess(process.args, process.returncode, *outputs))
    if any(process.late for process in processes):
        said = (f"{run.args}:\n{run.stdout or ''}{run.stderr or ''}" for run in done)
        raise AssertionError("\n".join(["A process did not end in time.", *said]))
    return done


def run(command, **options) -> subprocess.CompletedProcess:
    """Runs a command to its end; `options` as of `Process`."""
    with Process(command, **options) as process:
        return finish(process)[0]


def python(*arguments, **options) -> subprocess.CompletedProcess:
    """Runs Python, in the repository unless `cwd` is given."""
    return run([sys.executable, *arguments], **options)


# What commands import, at once or when they need it, in seconds; but they start nothing.
IMPORTED = """
nvg_jax.pipeline nvg_jax.aot.lowering nvg_jax.evaluation.judges nvg_jax.jobs.classification
nvg_jax.jobs.conversion nvg_jax.jobs.editing nvg_jax.jobs.figures nvg_jax.jobs.reconstruction
nvg_jax.jobs.training nvg_jax.jobs.tuning orbax.checkpoint sklearn.datasets
""".split()


def fork(function, *arguments) -> multiprocessing.process.BaseProcess:
    """Starts a function in a process of its own that has already imported what commands need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def forked(*arguments, cwd=ROOT, env=os.environ) -> subprocess.CompletedProcess:
    """`python(*arguments)` of a command or a script that may find its imports already done.

    Of JAX's variables in `env`, only two have an effect, and XLA's flags.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = fork(_execute, arguments, cwd, dict(env), folder)
        process.join()
        outputs = [Path(folder, name).read_text() for name in ("1", "2")]
    return subprocess.CompletedProcess(arguments, process.exitcode, *outputs)


def _execute(arguments, cwd, env, folder):
    import jax

    for output in (1, 2):
        os.dup2(os.open(f"{folder}/{output}", os.O_CREAT | os.O_WRONLY), output)
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    os.chdir(cwd)
    os.environ.clear()
    os.environ |= env
    jax.config.update("jax_platforms", env["JAX_PLATFORMS"])
    shortest = float(env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)
    option, code, *flags = map(str, arguments)
    sys.argv = [code, *flags]
    if option == "-m":
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    else:
        exec(code, {"__name__": "__main__"})


def wait_for(condition, timeout: float = 30):
    """Waits until `condition()` is true."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def on_eight_devices(script: str) -> dict:
    """The JSON that a test file prints when run as a script with eight devices."""
    code = f"import runpy\nrunpy.run_path({script!r}, run_name='__main__')"
    done = forked("-c", code, env=with_devices(8))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def read_meta(folder):
    """The metadata of a folder's newest undamaged checkpoint, with its "step"; None without one."""
    from nvg_jax.runtime.checkpoint import read

    found = read(folder, lambda meta: {})
    return found and found[0]


def logged(folder):
    """{(tag, step): value} of every scalar in the event files of a training run."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    values = {}
    for path in folder.glob("events*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                array = tensor_util.make_ndarray(value.tensor)
                if array.dtype == np.float32 and array.ndim == 0:
                    values[value.tag, event.step] = float(array)
    return values


# Structure maps.


def labels_from_embedding(embedding, stage) -> np.ndarray:
    """The inverse of `structure_embedding`: int (..., L, K), stage i -> int (..., L)."""
    embedding = np.asarray(embedding)
    shift = np.asarray(stage)[..., None, None] - 1 - np.arange(embedding.shape[-1])
    bits = np.where(shift >= 0, embedding // 2, 0)  # channels from i on are padding
    return np.sum(bits << np.maximum(shift, 0), axis=-1)


def is_even_hierarchy(labels) -> np.ndarray:
    """Whether the maps of all stages, int (..., S, L), are a hierarchy of exact halves: bool (...).

    Every label 0..2**i-1 of stage i is used at exactly L / 2**i positions, and halving the labels
    of stage i+1 (rounded down) gives those of stage i. False everywhere unless S = log2(L) + 1.
    """
    labels = np.asarray(labels)
    *_, stages, length = labels.shape
    each_once = (np.sort(labels[..., -1, :]) == np.arange(length)).all(-1)
    nested = (labels[..., 1:, :] // 2 == labels[..., :-1, :]).all((-2, -1))
    return (2 ** (stages - 1) == length) & each_once & nested
