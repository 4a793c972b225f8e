"""What a training is about to do: told before its first step, and kept in the workdir."""

import collections
import contextlib
import importlib.metadata
import json
import logging
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview

from nvg_jax import bundled
from nvg_jax.errors import listed
from nvg_jax.metadata import read_model_metadata
from nvg_jax.models import parameter_counts
from nvg_jax.parts import GENERATOR_PARTS
from nvg_jax.runtime.processes import is_main
from nvg_jax.runtime.storage import make_folder, write_file
from nvg_jax.training.metrics import EventWriter
from nvg_jax.training.run import Run
from nvg_jax.training.trainer import Trainer

logger = logging.getLogger("nvg_jax")
FILE = "run.json"
CLASSES_SHOWN = 20
LIBRARIES = ("nvg_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def announce(run: Run, trainers: Sequence[Trainer]):
    """Logs what these trainers are about to do; process 0 writes it to the workdir.

    WORKDIR/run.json and TensorBoard's text have the config, with everything that follows from
    the number of images, the commit and the versions. It replaces that of an earlier start.
    TensorBoard's text also lists the parameters.

    Raises:
        UserError: the workdir cannot be written.
    """
    for line in describe(run, trainers):
        logger.info("%s", line)
    if not is_main():
        return
    text = json.dumps({"config": run.config_json(), **provenance()}, indent=1)
    make_folder(run.workdir)
    write_file(run.workdir / FILE, text + "\n", shared=True)  # parts may train side by side
    writer = EventWriter(run.workdir)
    texts = {"config": f"```json\n{text}\n```"}
    for trainer in trainers:
        params = trainer.trained(trainer.abstract_state.params)
        overview = parameter_overview.get_parameter_overview(params, include_stats=False)
        texts[f"parameters/{trainer.part.name}"] = f"```\n{overview}\n```"
    writer.write_texts(0, texts)
    writer.flush()


def provenance() -> dict[str, Any]:
    """The command, the commit of this code, and the versions of it and of its libraries."""
    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not only inside a repository
        commit = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):  # installed without its repository
        commit = None
    versions = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a checkout
            versions[name] = importlib.metadata.version(name)
    return {"command": sys.argv, "commit": commit, "versions": versions}


def git(*arguments: str) -> str:
    """What a git command prints in the folder of this code."""
    folder = Path(__file__).parent
    return subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def describe(run: Run, trainers: Sequence[Trainer]) -> list[str]:
    """Lines of text on the data, the devices, the training of every part, and the results."""
    devices = collections.Counter(device.device_kind for device in run.mesh.devices.flat)
    mesh = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    return [
        *describe_data(run),
        f"devices: {', '.join(f'{n} x {kind}' for kind, n in devices.items())} (mesh: {mesh}) of "
        f"{jax.process_count()} process{'es' if jax.process_count() > 1 else ''}",
        *(line for trainer in trainers for line in describe_part(run, trainer)),
        f"results: {run.workdir} (tensorboard --logdir {shlex.quote(os.fspath(run.workdir))})",
    ]


def describe_data(run: Run) -> list[str]:
    data, train, test = run.config.data, run.train_source, run.test_source
    lines = [
        f"data: {' '.join(filter(None, (data.name, data.data_dir)))}: {len(train):,} images to "
        f"train on, {len(test):,} held out; unreadable ones "
        + ("are skipped" if data.on_bad == "skip" else "stop the run (--config.data.on_bad=skip)")
    ]
    counts = train.images_per_class
    if counts is None or train.num_classes > CLASSES_SHOWN:
        lines.append(f"classes: {train.num_classes:,}")
        if counts is not None:
            lines[-1] += f", of {min(counts):,} to {max(counts):,} images"
    else:
        named = (f"{name} ({n:,})" for name, n in zip(train.class_names, counts))
        lines.append(f"classes: {train.num_classes}: {', '.join(named)}")
    if empty := [name for name, n in zip(train.class_names, counts or ()) if not n]:
        lines.append(f"WARNING: no image to train on (add some, or remove it): {listed(empty)}")
    return lines


def describe_part(run: Run, trainer: Trainer) -> list[str]:
    name, recipe = trainer.part.name, run.config[trainer.part.section]
    sizes = parameter_counts(trainer.trained(trainer.abstract_state.params))
    what = "parameters in adapters" if run.config.lora.rank else "parameters"
    origin = trainer.origin  # before it, batches had another size
    images = origin.images + (trainer.steps - origin.step) * recipe.batch_size
    optimizer, dtype = trainer.optimizer_config, recipe.get("dtype") or run.config.dtype
    rate = optimizer.peak_rate(recipe.batch_size)
    intervals = f"evaluated every {recipe.eval_every:,} steps, saved every {recipe.save_every:,}"
    if recipe.fid_every:
        intervals += f", FID every {recipe.fid_every:,}"
    return [
        f"{name}: " + ", ".join(f"{k} of {n:,} {what}" for k, n in sizes.items()),
        *describe_start(run, trainer),
        f"{name}: {trainer.steps:,} steps of {recipe.batch_size:,} images "
        f"({images / trainer.num_images:,.3g} epochs), {intervals}",
        f"{name}: learning rate {rate:.3g} ({optimizer.schedule}, {optimizer.warmup_steps:,} steps "
        f"of warm-up), {dtype}, state of {state_bytes(trainer) / 2**20:,.1f} MiB per device",
    ]


def describe_start(run: Run, trainer: Trainer) -> list[str]:
    """How many classes are known to the model that new generators start from."""
    folder, name = run.config.init_from, trainer.part.name
    if not folder or trainer.part not in GENERATOR_PARTS or (run.workdir / name).exists():
        return []
    model, classes = read_model_metadata(bundled.find(folder)), run.train_source.class_names
    known = set(model.class_names).intersection(classes) if model else ()
    return [f"{name}: {len(known):,} of {len(classes):,} classes are those of init_from, by name"]


def state_bytes(trainer: Trainer) -> int:
    """The bytes of parameters, averages and optimizer state on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(trainer.abstract_state)
    )
