"""Training: `python -m nvg_jax.train --config=configs/digits.py --workdir=runs/digits`.

The tokenizer first, then the generators on what it encodes. Started again in the same workdir it
goes on where it was. `--config.part=` picks one part: tokenizer, structure, content, generators
(both on the same batches), or all.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from clu import metric_writers
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_flags

from nvg_jax import cli, models, pretrained
from nvg_jax.data import (
    LoaderOptions,
    SequenceSource,
    Transform,
    eval_batches,
    open_source,
    train_batches,
)
from nvg_jax.layers import TransformerConfig
from nvg_jax.pipeline import (
    TOKENIZER_META,
    Pipeline,
    abstract_params,
    check_tokenizer,
)
from nvg_jax.runtime import checkpoint, preemption, sharding
from nvg_jax.sampling import Settings
from nvg_jax.tokenizer import TokenizerConfig
from nvg_jax.training import generators as generator_steps
from nvg_jax.training import programs
from nvg_jax.visualize import image_grid, png, reconstruction_grid

logger = logging.getLogger("nvg_jax")

RUNS = {  # --config.part -> the runs it takes, each in its own folder of the workdir
    "tokenizer": ("tokenizer",),
    "structure": ("structure",),
    "content": ("content",),
    "generators": ("generators",),
    "separate": ("tokenizer", "structure", "content"),
    "all": ("tokenizer", "generators"),
}
SCALE_IMAGES = 10_000  # images that the canvas scales are measured on, at most


def train(config: ml_collections.ConfigDict, workdir: str | os.PathLike):
    """Trains the parts that `config.part` names; goes on where `workdir` stands.

    Raises:
        ValueError: a setting or data that cannot be, with what would do.
        FloatingPointError: a loss that is not finite, with its step and term.
    """
    workdir = checkpoint.storage_path(workdir)
    check_config(config)
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        trainer = Trainer(config, workdir, mesh)
        for run in RUNS[config.part]:
            if run == "tokenizer":
                trainer.train_tokenizer()
            else:
                trainer.train_generators(run)


def check_config(config: ml_collections.ConfigDict):
    """Raises ValueError for what no run can have, before data is read or anything compiled."""
    if config.part not in RUNS:
        raise ValueError(f"Unknown part {config.part!r}; choose one of {', '.join(RUNS)}.")
    if config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got {config.dtype!r}.")
    if config.tokenizer_workdir and "tokenizer" in RUNS[config.part]:
        raise ValueError(
            f"part={config.part} trains a tokenizer in --workdir, but tokenizer_workdir names "
            "another one. Leave it empty, or train with part=generators."
        )
    for name in ("tokenizer_training", "generator_training"):
        for key in ("batch_size", "log_every", "eval_every", "save_every", "keep"):
            if config[name][key] < 1:
                raise ValueError(f"{name}.{key} must be at least 1, got {config[name][key]}.")
    for run in RUNS[config.part]:
        if run != "tokenizer" and programs.pretrained_names(config, run) and cached(config):
            raise ValueError(
                "Cached sequences have no images for REPA to compare with; turn it off with "
                "--config.generator_training.repa_weight=0, or train from the images."
            )
    if "tokenizer" in RUNS[config.part] and cached(config):
        raise ValueError(
            f"part={config.part} trains a tokenizer, which takes images and no cached "
            "sequences. Train the generators with part=generators and tokenizer_workdir."
        )


def cached(config: ml_collections.ConfigDict) -> bool:
    """Whether the data are sequences that `nvg_jax.encode` has kept."""
    return config.data.name == "sequences"


class Trainer:
    """What the runs share: configuration, data, mesh."""

    def __init__(
        self, config: ml_collections.ConfigDict, workdir: epath.Path, mesh: jax.sharding.Mesh
    ):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.tokenizer_workdir = checkpoint.storage_path(config.tokenizer_workdir or workdir)
        # Of all runs at once, so that a file that is missing is not found out days later.
        names = {n for run in RUNS[config.part] for n in programs.pretrained_names(config, run)}
        self.pretrained = {
            name: pretrained.load(name, config.pretrained_dir or None) for name in sorted(names)
        }
        source = functools.partial(
            open_source, config.data.name, data_dir=config.data.data_dir or None
        )
        self.train_source = source("train")
        self.test_source = source("test", class_names=self.train_source.class_names)
        self.tokenizer_config = TokenizerConfig(**config.tokenizer)
        self.tokenizer = models.make_tokenizer(self.tokenizer_config, config.dtype)
        self.key = jax.random.key(config.seed)

    def process_batch_size(self, batch_size: int) -> int:
        """This process's share of a global batch."""
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if batch_size % ways:
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of data x fsdp = {ways}, so that "
                "every device has its part of a batch."
            )
        if not sharding.processes_split_batch(self.mesh):
            raise ValueError(
                f"The mesh (data, fsdp, tensor) = {tuple(self.mesh.shape.values())} lays tensor "
                f"over devices of several of the {jax.process_count()} processes, which would need "
                "the same images. Use a smaller mesh.tensor, and fsdp for the rest."
            )
        return batch_size // jax.process_count()

    def loader_options(self, batch_size: int) -> LoaderOptions:
        data = self.config.data
        return LoaderOptions(
            Transform(self.tokenizer_config.image_size, data.resize or None, data.pad),
            batch_size=self.process_batch_size(batch_size),
            on_bad=data.on_bad,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=data.num_threads,
            num_workers=data.num_workers,
            prefetch=data.prefetch,
        )

    def training_batches(self, batch_size: int, seed: int) -> grain.DatasetIterator:
        return train_batches(self.train_source, self.loader_options(batch_size), seed)

    def test_batches(self, batch_size: int):
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        batch_size = min(batch_size, max(ways, len(self.test_source) // ways * ways))
        with contextlib.closing(
            eval_batches(self.test_source, self.loader_options(batch_size))
        ) as batches:
            for batch in batches:
                if preemption.noticed():  # an evaluation can take longer than one is given
                    raise preemption.Preempted("asked to end while evaluating")
                yield sharding.global_batch(batch, self.mesh)

    def num_steps(self, settings: ml_collections.ConfigDict) -> int:
        """Steps of a run: `steps`, or as many as `epochs` take."""
        if bool(settings.steps) == bool(settings.epochs):
            raise ValueError(
                f"Give either steps or epochs, not both and not neither (got steps="
                f"{settings.steps}, epochs={settings.epochs})."
            )
        return settings.steps or max(1, self.epochs_to_steps(settings, settings.epochs))

    def epochs_to_steps(self, settings: ml_collections.ConfigDict, epochs: float) -> int:
        return round(epochs * len(self.train_source) / settings.batch_size)

    def frozen(self, run: str) -> dict[str, Any]:
        """The pretrained networks that a run's losses look through, whole on every device."""
        names = programs.pretrained_names(self.config, run)
        return jax.device_put({name: self.pretrained[name] for name in names}, self.replicated)

    # The tokenizer.

    def train_tokenizer(self):
        settings = self.config.tokenizer_training
        steps = self.num_steps(settings)
        warmup = self.epochs_to_steps(settings, settings.index_backprop_epochs)
        program = programs.tokenizer_training(self.config, self.mesh, steps)
        frozen = self.frozen("tokenizer")
        train_key = jax.random.fold_in(self.key, 3)

        def evaluate(state, writer, step):
            quality, counts, shown = {}, 0, None
            for batch in self.test_batches(settings.batch_size):
                out = program.evaluate(state.params, frozen, batch)
                mask = sharding.to_host(batch["mask"])
                for name in {"psnr", "lpips"} & out.keys():
                    quality.setdefault(name, []).append(np.asarray(out[name])[mask])
                counts = counts + np.asarray(out["code_counts"])
                if shown is None:
                    images = sharding.to_host(batch["image"])[mask]
                    shown = images[:16], np.asarray(out["restored"])[mask][:16]
            scalars = {name: np.concatenate(parts).mean() for name, parts in quality.items()}
            scalars |= usage(counts)
            save_picture(writer, self.workdir / "tokenizer", step, reconstruction_grid(*shown))
            return scalars

        def on_end(state):
            params = jax.tree.map(sharding.to_host, state.params)
            return {
                "canvas_scale": self.measure_canvas_scale(state.params, settings.batch_size),
                "hash": checkpoint.fingerprint(params),
            }

        self.fit(
            "tokenizer",
            program=program,
            init=lambda: program.init(jax.random.fold_in(self.key, 0)),
            step_fn=lambda state, batch, step: program.step(
                state, frozen, batch, train_key, index_backprop=step < warmup
            ),
            batches=self.training_batches(settings.batch_size, self.config.seed),
            settings=settings,
            steps=steps,
            meta={
                "tokenizer": dataclass_dict(self.tokenizer_config),
                "class_names": list(self.train_source.class_names),
                "canvas_scale": None,
                "hash": None,
            },
            evaluate=evaluate,
            on_end=on_end,
        )

    def measure_canvas_scale(self, params, batch_size: int) -> list[float]:
        """1 / std of the inputs of all stages (1 for the first) and of the final canvas."""

        @functools.partial(jax.jit, out_shardings=self.replicated)
        def moments(params, batch):
            canvases = generator_steps.encode(self.tokenizer, params, batch).canvases
            return canvases.mean((0, 2, 3)), jnp.square(canvases).mean((0, 2, 3))

        count = math.ceil(min(len(self.train_source), SCALE_IMAGES) / batch_size)
        batches = self.training_batches(batch_size, self.config.seed)
        totals = 0
        for _ in range(count):
            batch = sharding.global_batch(next(batches), self.mesh)
            totals = totals + np.asarray(jax.device_get(moments(params, batch)), np.float64)
        batches.close()
        mean, square = totals / count
        variance = square - mean**2
        if not (variance > 0).all():
            raise FloatingPointError(
                f"The canvases after some stage are all the same (variances {variance}): the "
                "tokenizer has collapsed. Train it longer or with a lower learning rate."
            )
        return [1.0, *(1 / np.sqrt(variance)).tolist()]

    # The generators.

    def train_generators(self, run: str):
        names = models.GENERATORS if run == "generators" else (run,)
        config, settings = self.config, self.config.generator_training
        tokenizer_meta, tokenizer_params = self.load_tokenizer()
        num_classes = self.train_source.num_classes
        sampling = config.sampling.to_dict()
        Settings.from_dict(sampling).expand(  # raises before anything is compiled
            self.tokenizer_config.num_stages, self.tokenizer_config.codebook_size
        )
        steps = self.num_steps(settings)
        program = programs.generator_training(config, self.mesh, steps, names, num_classes)
        frozen = self.frozen(run)
        canvas_scale = np.asarray(tokenizer_meta["canvas_scale"], np.float32)
        codebook = tokenizer_params["quantizer"]["codebook"]
        train_key = jax.random.fold_in(self.key, 2)
        meta = {
            **tokenizer_meta,
            **{name: dataclass_dict(TransformerConfig(**config[name])) for name in names},
            "sampling": sampling,
            "tokenizer_workdir": str(
                checkpoint.storage_path(config.tokenizer_workdir or self.workdir)
            ),
        }
        sampler = None

        def draw_samples(params):
            nonlocal sampler
            classes = np.arange(min(num_classes, 10)).repeat(4)
            # Of this process alone: in the mesh of all, every operation would wait for the others.
            with jax.set_mesh(sharding.make_mesh(devices=jax.local_devices())):
                if sampler is None:
                    sampler = Pipeline(meta, params)
                else:  # what it has compiled stays
                    sampler.params = params
                return image_grid(sampler.sample(classes, seed=config.seed).images, columns=8)

        def evaluate(states, writer, step):
            ema = {name: state.ema_params for name, state in states.items()}
            totals, count = {}, 0
            for batch in self.test_batches(settings.batch_size):
                out = jax.device_get(program.evaluate(ema, tokenizer_params, canvas_scale, batch))
                share = sharding.to_host(batch["mask"]).sum()
                totals = {k: totals.get(k, 0) + v * share for k, v in out.items()}
                count += share
            if len(names) == 2:
                params = jax.tree.map(sharding.to_host, {"tokenizer": tokenizer_params, **ema})
                if jax.process_index() == 0:  # samples on its own devices
                    save_picture(writer, self.workdir / run, step, draw_samples(params))
            return {k: v / count for k, v in totals.items()}

        self.fit(
            run,
            program=program,
            init=lambda: program.init(jax.random.fold_in(self.key, 1), codebook),
            step_fn=lambda states, batch, step: program.step(
                states, tokenizer_params, frozen, canvas_scale, batch, train_key
            ),
            batches=self.training_batches(settings.batch_size, config.seed + 1),
            settings=settings,
            steps=steps,
            meta=meta,
            evaluate=evaluate,
        )

    def load_tokenizer(self):
        """The trained tokenizer to build on: (its metadata, its raw parameters, replicated)."""
        folder = (
            checkpoint.storage_path(self.config.tokenizer_workdir or self.workdir) / "tokenizer"
        )
        # One read: weights and metadata of the same checkpoint, also where a newer one is damaged.
        found = checkpoint.read(folder, lambda m: {"params": abstract_params(m, "tokenizer")})
        if found is None or found[0]["hash"] is None:
            raise ValueError(
                f"The generators need a trained tokenizer and {folder} has none that is finished. "
                "Run with --config.part=tokenizer (or all) first."
            )
        meta, params = found
        if TokenizerConfig(**meta["tokenizer"]) != self.tokenizer_config:
            raise ValueError(
                f"The tokenizer in {folder} has other sizes than config.tokenizer: "
                f"{TokenizerConfig(**meta['tokenizer'])} and {self.tokenizer_config}. Use the "
                "config it was trained with, or another workdir."
            )
        if tuple(meta["class_names"]) != self.train_source.class_names:
            raise ValueError(
                f"The tokenizer in {folder} was trained on a data set with other classes than "
                f"{self.config.data.name!r} has. Use the same data, or another workdir."
            )
        params = jax.device_put(params["params"], self.replicated)
        if isinstance(self.train_source, SequenceSource):
            self.train_source.check_tokenizer(meta["hash"])
        return {key: meta[key] for key in TOKENIZER_META}, params

    # The loop.

    def fit(
        self,
        run: str,
        *,
        program: programs.Program,
        init: Callable,
        step_fn: Callable,
        batches: grain.DatasetIterator,
        settings: ml_collections.ConfigDict,
        steps: int,
        meta: dict[str, Any],
        evaluate: Callable,
        on_end: Callable | None = None,
    ):
        """Trains one run to `steps`, from its latest checkpoint if it has one.

        Args:
            run: the name of the run and of its folder.
            program: for the abstract state and the learning rate of a step.
            init: () -> the initial state, placed; called if there is no checkpoint.
            step_fn: (state, batch, step) -> (state, metrics).
            settings: batch_size, log_every, eval_every, save_every.
            meta: stored with every checkpoint.
            evaluate: (state, writer, step) -> metrics; also writes pictures.
            on_end: state -> metadata that the last checkpoint adds.

        Raises:
            Preempted: the process was asked to end; the state is saved.
        """
        folder = self.workdir / run
        checkpoints = checkpoint.Checkpoints(folder, settings.keep)
        config = json.loads(self.config.to_json_best_effort())
        meta = {**meta, "config": config, "steps": steps}
        start = 0
        if checkpoints.latest_step is None:
            state = init()
        else:
            state, position, start = checkpoints.restore(
                program.state, lambda stored: check_resume(stored, meta, folder)
            )
            batches.set_state(position)
        if start >= steps:
            logger.info("%s: finished at step %d", run, start)
        elif start:
            logger.info("%s: going on at step %d of %d", run, start, steps)
        main_process = jax.process_index() == 0
        writers = [metric_writers.SummaryWriter(str(folder))] if main_process else []
        writer = metric_writers.MultiWriter(writers)
        window, window_start, run_start = [], time.monotonic(), time.monotonic()
        with checkpoints, contextlib.closing(batches), contextlib.closing(writer):
            for step in range(start, steps):
                state, metrics = step_fn(
                    state, sharding.global_batch(next(batches), self.mesh), step
                )
                window.append(metrics)
                done = step + 1
                preempted = preemption.noticed()
                evaluated = done % settings.eval_every == 0 or done == steps
                saved = preempted or done % settings.save_every == 0 or done == steps
                if done % settings.log_every == 0 or evaluated or saved:
                    scalars = summarize(jax.device_get(window), run, done)
                    now = time.monotonic()
                    rate = len(window) / (now - window_start)
                    scalars["images_per_second"] = rate * settings.batch_size
                    scalars["learning_rate"] = float(program.schedule(step))
                    remaining = (now - run_start) / (done - start) * (steps - done)
                    writer.write_scalars(done, scalars)
                    log_progress(run, done, steps, scalars, rate, remaining)
                    window = []
                if saved:
                    last = on_end(state) if on_end and done == steps else {}
                    checkpoints.save(done, state, {**meta, **last}, batches.get_state())
                if evaluated and not preempted:
                    try:
                        results = evaluate(state, writer, done)
                    except preemption.Preempted:
                        preempted = True
                if preempted:
                    if not saved:
                        checkpoints.save(done, state, meta, batches.get_state())
                    checkpoints.wait()
                    raise preemption.Preempted(
                        f"{run}: asked to end; saved at step {done} of {steps}"
                    )
                if evaluated:
                    results = {f"test_{k}": v for k, v in flatten(results).items()}
                    writer.write_scalars(done, results)
                    log_evaluation(run, done, results)
                if not window:
                    window_start = time.monotonic()


def summarize(window: list[dict[str, Any]], run: str, last_step: int) -> dict[str, float]:
    """Mean metrics of the steps up to `last_step`; codebook usage over all of them.

    Raises:
        FloatingPointError: a metric is not finite; names the step and the term.
    """
    for step, metrics in enumerate(window, last_step - len(window) + 1):
        values = flatten(metrics)
        for name in sorted(values, key=lambda name: "_loss" not in name):  # losses first
            value = values[name]
            if not np.isfinite(value):
                raise FloatingPointError(
                    f"{run}: {name} is {value} at step {step}. Training stopped; the last "
                    "checkpoint is from before it. A lower learning rate or clip, or "
                    "--config.dtype=float32, usually helps."
                )
    means = {}
    for name in window[0]:
        values = np.stack([metrics[name] for metrics in window])
        if name == "code_counts":
            means.update(usage(values.sum(0)))
        else:
            means[name] = values.mean(0)
    return flatten(means)


def usage(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Share of the codebook in use, in each stage and in all, of counts (S, V)."""
    used = np.asarray(counts) > 0
    return {"codebook_usage_stage": used.mean(1), "codebook_usage": used.any(0).mean()}


def flatten(metrics: dict[str, Any]) -> dict[str, float]:
    """Scalars of metrics of which some have one value a stage; code counts are left out."""
    scalars = {}
    for name, value in metrics.items():
        if name == "code_counts":
            continue
        value = np.asarray(value)
        if value.ndim == 0:
            scalars[name] = float(value)
        else:
            scalars.update({f"{name}/{stage}": float(v) for stage, v in enumerate(value)})
    return scalars


def log_progress(run, done, steps, scalars, rate, remaining):
    losses = "  ".join(f"{k} {v:.4g}" for k, v in scalars.items() if k.endswith("loss"))
    minutes, seconds = divmod(round(remaining), 60)
    logger.info(
        "%s %d/%d  %s  %.3g steps/s  ETA %d:%02d", run, done, steps, losses, rate, minutes, seconds
    )


def log_evaluation(run, done, results):
    shown = "  ".join(
        f"{k} {v:.4g}" for k, v in results.items() if not k.rsplit("/", 1)[-1].isdigit()
    )
    logger.info("%s %d  held out: %s", run, done, shown)


def check_resume(stored: dict[str, Any], meta: dict[str, Any], folder: epath.Path):
    """Raises ValueError if a run was started with other settings than it is to go on with."""
    if "content" in meta or "structure" in meta:
        check_tokenizer(stored, meta, folder)
    training = "tokenizer_training" if folder.name == "tokenizer" else "generator_training"
    shown = {"log_every", "eval_every", "save_every", "keep"}
    shown |= {"data_dir", "num_threads", "prefetch", "on_bad"}  # the same data may lie elsewhere

    def settings(meta):
        config = meta["config"]
        sections = {name: config[name] for name in ("data", training)}
        settings = {name: meta.get(name) for name in ("tokenizer", "content", "structure")}
        settings |= {name: config[name] for name in ("seed", "dtype", "class_dropout")}
        settings |= {"class_names": meta["class_names"], "steps": meta["steps"]}
        for section, values in sections.items():
            settings |= {f"{section}.{k}": v for k, v in values.items() if k not in shown}
        return settings

    stored_settings, new_settings = settings(stored), settings(meta)
    for key, value in new_settings.items():
        if stored_settings.get(key) != value:
            raise ValueError(
                f"{folder} holds a run with {key} = {stored_settings.get(key)}, and it cannot go "
                f"on with {value}. Use the settings it was started with, or another workdir."
            )


def save_picture(writer, folder: epath.Path, step: int, picture: np.ndarray):
    """A uint8 picture (H, W, 3) as a PNG in the run's folder and in TensorBoard."""
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"pictures_{step:07d}.png").write_bytes(png(picture))
        writer.write_images(step, {"pictures": picture[None]})


def dataclass_dict(config) -> dict[str, Any]:
    """A JSON-able dictionary of a dataclass; equal to itself after a way through JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


FLAGS = flags.FLAGS


def main(_):
    preemption.watch()
    train(FLAGS.config, FLAGS.workdir)


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "Configuration, e.g. configs/digits.py or configs/imagenet256.py:d16."
    )
    flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
