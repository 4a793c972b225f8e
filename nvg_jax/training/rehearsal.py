"""A rehearsal of a training on its machines, before the money is spent."""

import collections
import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from nvg_jax.errors import UserError
from nvg_jax.metadata import RunMetadata
from nvg_jax.parts import TOKENIZER, Part
from nvg_jax.runtime import checkpoint, sharding, watchdog
from nvg_jax.runtime.hardware import device_memory
from nvg_jax.runtime.processes import barrier, is_main
from nvg_jax.runtime.storage import check_shared, make_folder, write_file
from nvg_jax.training import plan, weights_and_biases
from nvg_jax.training.forecast import due
from nvg_jax.training.run import Run
from nvg_jax.training.trainer import Trainer

STEPS = 5  # timed
FOLDER = "rehearsal"  # in the workdir, while it lasts

# (metadata, {network: parameters}) -> seconds of one measurement of FID.
FidSeconds = Callable[[RunMetadata, dict[str, Any]], float]


class Cost(NamedTuple):
    """Seconds of a whole training, by what they are spent on."""

    compiling: float
    steps: float
    evaluations: float
    fid: float
    saving: float


def rehearse(
    run: Run,
    standings: Sequence[tuple[Trainer, int]],
    fid_seconds: dict[Part, FidSeconds],
    price: float = 0.0,
):
    """Prints what works, line by line, and what the whole run takes.

    Every process reads a batch and takes `STEPS` steps of every part; process 0 prints.

    Args:
        standings: the trainer of each part and the step that it goes on from.
        fid_seconds: for the parts whose FID is measured.
        price: of a device for an hour; 0: not known.

    Raises:
        UserError: what does not work, and why.
    """
    report = functools.partial(print, flush=True) if is_main() else lambda text: None
    for line in plan.describe(run, [trainer for trainer, _ in standings]):
        report(line)
    report(f"✓ data: {len(run.train_source):,} and {len(run.test_source):,} images open")
    if run.pretrained:
        report(f"✓ pretrained networks: {', '.join(run.pretrained)}")
    if run.config.wandb_project and is_main():
        report(f"✓ wandb: version {weights_and_biases.version()}")
    report(f"✓ workdir: a checkpoint is written and read back in {check_workdir(run):.1f} s")
    costs = []
    unfinished = [(trainer, start) for trainer, start in standings if start < trainer.steps]
    trains_tokenizer = any(trainer.part == TOKENIZER for trainer, _ in unfinished)
    for trainer, start in unfinished:
        opened = trainer.rehearse(run) if trains_tokenizer else trainer.open(run)
        cost, lines = rehearse_part(run, trainer, start, opened, fid_seconds.get(trainer.part))
        costs.append(cost)
        for line in lines:
            report(f"✓ {trainer.part.name}: {line}")
    if costs:
        started = any(start for _, start in standings)
        what = "what is left of the run" if started else "the whole run"
        report(f"{what}: {summary(costs, run.mesh.size, price)}")
    else:
        report("the run has finished: nothing is left to train")


def check_workdir(run: Run) -> float:
    """Writes and reads back a small checkpoint in the workdir: the seconds that it took."""
    state = {"numbers": np.arange(8.0, dtype=np.float32)}
    with scratch_folder(run) as folder:
        start = time.monotonic()
        with checkpoint.Checkpoints(folder, keep=1) as checkpoints:
            checkpoints.save(1, jax.device_put(state, run.replicated), {})
        found = checkpoint.read(folder, lambda content: state)
        if found is None or (found[1]["numbers"] != state["numbers"]).any():
            raise UserError(f"A checkpoint written to {folder} does not read back as it was.")
        return time.monotonic() - start


@contextlib.contextmanager
def scratch_folder(run: Run) -> Iterator[epath.Path]:
    """A new folder in the workdir that is removed afterwards; every process must call it.

    Raises:
        UserError: the workdir cannot be written, or not all processes see what process 0 writes.
    """
    folder, new = run.workdir / FOLDER, not run.workdir.exists()
    try:
        if is_main():
            folder.rmtree(missing_ok=True)  # left behind by a check that was killed
            make_folder(folder)
            write_file(folder / "shared", "1")
        barrier("the rehearsal's folder is there")
        # Before any checkpoint: reading one waits for all processes.
        check_shared((folder / "shared").exists(), folder, "--workdir")
        yield folder
        barrier("the rehearsal's folder is no longer needed")
    finally:
        if is_main():
            # Another process may be writing still: then the workdir is not empty, a ValueError.
            with contextlib.suppress(OSError, ValueError):
                folder.rmtree(missing_ok=True)
                if new:
                    run.workdir.rmdir()


def rehearse_part(
    run: Run,
    trainer: Trainer,
    begin: int,
    opened: tuple[Any, RunMetadata],
    fid_seconds: FidSeconds | None,
) -> tuple[Cost, list[str]]:
    """Compiles a part and takes a few steps: (what it will cost from `begin` on, lines of text)."""
    recipe, (inputs, metadata) = run.config[trainer.part.section], opened
    # Steps with `index_backprop` have a program of their own: {whether with it: number of steps}.
    counts = collections.Counter(map(trainer.index_backprop, range(begin, trainer.steps)))
    seed = run.config.seed + trainer.DATA_SEED
    with contextlib.closing(run.train_batches(recipe.batch_size, seed)) as batches:
        batch, reading = time_data(batches, run.config.data)
    place = lambda: sharding.global_batch(batch, run.mesh)
    watchdog.reset(slow=True)
    start = time.monotonic()
    programs = {
        trainer.index_backprop(step): trainer.trace(step, place()).lower().compile()
        for step in (begin, trainer.steps - 1)[-len(counts) :]
    }
    compiling = time.monotonic() - start
    lines = [f"compiled in {compiling:.0f} s", memory_line(programs.values())]

    watchdog.reset(slow=True)
    state = trainer.jit_init_state(jax.random.fold_in(run.key, trainer.INIT_KEY), inputs)
    key = jax.random.fold_in(run.key, trainer.STEP_KEY)
    steps = stepping = 0.0
    for index_backprop, program in programs.items():
        watchdog.reset(slow=True)
        for number in range(1 + STEPS):
            if number == 1:  # the first step also loads the program
                jax.block_until_ready(state)
                start = time.monotonic()
            state, _ = program(state, inputs, place(), key)
        jax.block_until_ready(state)
        stepping = (time.monotonic() - start) / STEPS
        steps += counts[index_backprop] * max(stepping, reading)
    lines.append(
        f"a step of {recipe.batch_size:,} images takes {stepping:.3g} s and its data {reading:.3g}"
        " s" + (", so the steps wait for the data" if reading > stepping else "")
    )
    saving = time_saving(run, state)
    lines.append(f"a save takes {saving:.3g} s, and is completed while the steps go on")

    evaluation = evaluation_seconds(run, trainer, state, opened, reading)
    lines.append(f"an evaluation takes {evaluation:.3g} s")
    fid = 0.0
    if fid_seconds is not None:
        fid = fid_seconds(metadata, trainer.export(run, state, inputs))
        lines.append(f"a measurement of FID takes {fid:.3g} s")
    times = functools.partial(due, begin, trainer.steps)
    cost = Cost(
        compiling,
        steps,
        times(recipe.eval_every) * evaluation,
        times(recipe.fid_every) * fid,
        times(recipe.save_every) * saving,
    )
    lines.append(f"{trainer.steps - begin:,} steps: {sum(cost) / 3600:.3g} h")
    return cost, lines


def time_data(
    batches: Iterator[dict[str, Any]], data: ml_collections.ConfigDict
) -> tuple[dict[str, Any], float]:
    """(a batch, the seconds that each takes), once all that are made ahead have been drawn."""
    watchdog.reset(slow=True)
    workers = max(data.num_workers, 1)
    batch = {}
    for _ in range(workers * (data.prefetch + max(data.prefetch, data.num_threads))):
        batch = next(batches)
    start, count = time.monotonic(), STEPS * workers  # the same number from each
    for _ in range(count):
        batch = next(batches)
    return batch, (time.monotonic() - start) / count


def time_saving(run: Run, state) -> float:
    """The seconds for which the steps stand still while a state is saved."""
    watchdog.reset(slow=True)
    with (
        scratch_folder(run) as folder,
        checkpoint.Checkpoints(folder, keep=1) as checkpoints,
    ):
        checkpoint.describe(state)  # compiles the checksums
        start = time.monotonic()
        checkpoints.save(1, state, {})
        return time.monotonic() - start


def memory_line(programs: Iterable[jax.stages.Compiled]) -> str:
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    needed = max(device_memory(each.memory_analysis())["total"] for each in programs)
    text = f"needs {needed / 2**30:.3g} GiB of memory per device"
    return text + (f" of {limit / 2**30:.3g}" if limit else "")


def evaluation_seconds(
    run: Run, trainer: Trainer, state, opened: tuple[Any, RunMetadata], reading: float
) -> float:
    """An estimate of the time of an evaluation with its picture, from one batch.

    Args:
        reading: seconds that the data of a batch take.
    """
    recipe, (inputs, metadata) = run.config[trainer.part.section], opened
    batch = next(run.test_batches(recipe))
    seconds = once_compiled(lambda: trainer.held_out(state, inputs, batch))
    count = min(recipe.eval_images or len(run.test_source), len(run.test_source))
    picture = once_compiled(lambda: trainer.picture(run, state, inputs, metadata))
    return max(seconds, reading) * math.ceil(count / len(batch["label"])) + picture


def once_compiled(call: Callable[[], Any]) -> float:
    """The seconds that a second call takes."""
    start = 0.0
    for _ in range(2):
        watchdog.reset(slow=True)
        start = time.monotonic()
        jax.block_until_ready(call())
    return time.monotonic() - start


def summary(costs: Sequence[Cost], chips: int, price: float) -> str:
    """The sum of all costs as text: hours, chip-hours, shares, and what they cost."""
    total = Cost(*map(sum, zip(*costs)))
    hours = sum(total) / 3600
    shares = ", ".join(
        f"{name} {value / sum(total):.0%}" for name, value in total._asdict().items() if value
    )
    text = f"{hours:.3g} h on {chips:,} device{'s' if chips > 1 else ''}, "
    text += f"{hours * chips:.3g} device-hours ({shares})"
    return text + (f", {hours * chips * price:,.2f} at {price:g} an hour" if price else "")
