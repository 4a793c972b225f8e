"""Compiles a program for TPUs on a machine without any, and says what it would take.

python -m nvg_jax.compile --config=configs/imagenet256.py:d24 --topology=v5p:8x8x8

The training step that `train` runs, or with --program=sample the sampler. `--config.part=` picks
the training (tokenizer, structure, content, generators; all: generators), `--config.mesh.fsdp=` and
so on the mesh, `--find_batch` the largest global batch that fits. Needs TPU's compiler: pip install
"jax[tpu]". Times are roofline estimates from the compiled program, nothing is measured.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_flags

from nvg_jax import cli, models
from nvg_jax.aot import hlo
from nvg_jax.data import open_source
from nvg_jax.models import abstract_params
from nvg_jax.pipeline import generate_batch
from nvg_jax.runtime import sharding
from nvg_jax.sampling.generate import make_program
from nvg_jax.sampling.settings import Settings
from nvg_jax.tokenizer import GranularitySequence, Tokenizer, TokenizerConfig
from nvg_jax.training import programs

GIB = 2**30
IMAGENET = (1_281_167, 1000)  # images to train on and classes of tfds:imagenet2012
SAMPLES = 64  # sampled at once, unless --batch_size says else
ESTIMATE = "roofline estimate from the compiled program, not a measurement"

logger = logging.getLogger("nvg_jax")


class Chip(NamedTuple):
    """Published figures of a chip.

    flops: bfloat16 operations a second. hbm: bytes of main memory. hbm_bandwidth: bytes a second.
    ici_bandwidth: bytes a second that it can send to its neighbors over all links together.
    """

    flops: float
    hbm: int
    hbm_bandwidth: float
    ici_bandwidth: float


# From the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" of
# https://cloud.google.com/tpu/docs. They give the interconnect in both directions together (v5e
# 400, v5p 1200, v6e 800, TPU7x 1200 GB/s; v4: 2400 Gbit/s each way); half of it is sent.
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1200e9, 300e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 400e9),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 600e9),
}


class DoesNotFitError(ValueError):
    """The program needs more memory than a device has."""


@dataclasses.dataclass
class Target:
    """What is compiled for: `mesh` of the devices of a topology, and their chip's share each."""

    topology: str
    mesh: Mesh
    device: Chip

    @property
    def batch_ways(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]


def find_target(topology: str, mesh: dict[str, int]) -> Target:
    """The devices of a topology such as v5p:4x4x4 in a mesh of the given sizes.

    Raises:
        ValueError: no such topology, no TPU compiler, or sizes that do not fit.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        raise ValueError(
            f"Unknown topology {topology!r}: give CHIP:SHAPE with a chip of {', '.join(CHIPS)} and "
            "its chips along the axes, such as v5e:16x16, v5p:4x4x4 or v6e:8x8."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "The compiler for TPUs is not installed (it needs no TPU, and about 600 MB): "
            'pip install "jax[tpu]"'
        )
    try:
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"There is no topology {topology!r} ({str(error).splitlines()[0]}). Sizes that exist: "
            "v5e and v6e 2x2 to 16x16, v4 and v5p 2x2x1, 2x2x2, 2x2x4, 4x4x4, 8x8x8 and so on."
        ) from error
    mesh = sharding.make_mesh(**mesh, devices=devices)
    share = len(devices) // len({tuple(device.coords) for device in devices})  # devices a chip
    return Target(topology, mesh, Chip(*(value / share for value in CHIPS[name])))


# The programs, lowered.


def abstract_batch(mesh: Mesh, batch_size: int, *shape: int, dtype=jnp.float32):
    placed = NamedSharding(mesh, sharding.BATCH_SPEC)
    return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=placed)


def training_run(config: ml_collections.ConfigDict) -> str:
    """Which training `config.part` means here; of "all" the generators."""
    runs = ("tokenizer", *models.GENERATORS, "generators")
    run = "generators" if config.part == "all" else config.part
    if run not in runs:
        raise ValueError(
            f"--config.part={config.part} is no single program; choose one of {', '.join(runs)}."
        )
    return run


def training_settings(run: str) -> str:
    return "tokenizer_training" if run == "tokenizer" else "generator_training"


def in_mesh(mesh: Mesh):
    """What `train` is traced in; no operation may run eagerly inside, there are no devices."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(nn.logical_axis_rules(sharding.RULES))
    return stack


def lower_training(
    config: ml_collections.ConfigDict, mesh: Mesh, batch_size: int, images: int, num_classes: int
):
    """The training step of `config.part` -> (lowered, {network: abstract parameters}).

    The tokenizer's is that of its warm-up, which does more, if it has one.
    """
    run, config = training_run(config), config.copy_and_resolve_references()
    settings = config[training_settings(run)]
    settings.batch_size = batch_size
    steps = settings.steps or max(1, round(settings.epochs * images / batch_size))
    with in_mesh(mesh):
        if run == "tokenizer":
            program = programs.tokenizer_training(config, mesh, steps)
            index_backprop = settings.index_backprop_epochs > 0
            lowered = program.step.lower(*program.arguments, index_backprop=index_backprop)
            networks = {run: program.state.params}
            if program.state.adversary:
                networks["discriminator"] = program.state.adversary.params
            return lowered, networks | program.arguments[1]
        names = models.GENERATORS if run == "generators" else (run,)
        program = programs.generator_training(config, mesh, steps, names, num_classes)
        lowered = program.step.lower(*program.arguments)
    _, tokenizer, frozen, *_ = program.arguments
    params = {name: state.params for name, state in program.state.items()}
    return lowered, {**params, "tokenizer": tokenizer, **frozen}


def lower_sampling(
    config: ml_collections.ConfigDict, mesh: Mesh, batch_size: int, num_classes: int
):
    """The sampler as `Pipeline` runs it -> (lowered, {network: abstract parameters})."""
    tokenizer = TokenizerConfig(**config.tokenizer)
    stages, length = tokenizer.num_stages, tokenizer.num_positions
    settings = Settings.from_dict(config.sampling.to_dict())
    settings = settings.expand(stages, tokenizer.codebook_size)
    meta = {"tokenizer": config.tokenizer.to_dict(), "class_names": range(num_classes)}
    meta |= {name: config[name].to_dict() for name in models.GENERATORS}
    replicated = NamedSharding(mesh, PartitionSpec())
    params = {
        name: sharding.with_shardings(abstract_params(meta, name), replicated)
        for name in ("tokenizer", *models.GENERATORS)
    }
    generators = {
        name: models.make_generator(name, meta[name], tokenizer, num_classes)
        for name in models.GENERATORS
    }
    batch = functools.partial(abstract_batch, mesh, batch_size)
    ids = functools.partial(batch, dtype=jnp.int32)
    values = jax.eval_shape(
        lambda: {
            name: jnp.asarray(getattr(settings, name))
            for name in ("temperature", "top_k", "top_p", "content_guidance", "structure_guidance")
        }
    )
    generate = functools.partial(generate_batch, tokenizer=Tokenizer(tokenizer), **generators)
    args = (
        params,
        jax.ShapeDtypeStruct((stages + 1,), jnp.float32),
        ids(),
        batch(dtype=jax.eval_shape(jax.random.key, 0).dtype),
        batch(length, stages - 1),
        values,
        GranularitySequence(ids(stages, length), ids(stages, length)),
    )
    with jax.set_mesh(mesh):
        jitted = jax.jit(generate, static_argnames="program")
        return jitted.lower(*args, program=make_program(settings)), params


# The report.


def memory_of(stats, hbm: float) -> dict[str, float]:
    """Bytes on a device, from the compiler's own account.

    outputs: those that do not take the place of an argument. total: of all at once.
    """
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values()), "hbm": hbm}


def roofline(
    flops: float, hbm_bytes: float, ici_bytes: float, model_flops: float, device: Chip
) -> dict[str, float]:
    """Seconds of a step on one device, and what share of its peak they make of the model's FLOPs.

    Each of arithmetic, memory and communication at its published speed. `seconds` is the longest of
    the three, as if they overlapped entirely: the classical roofline, and what `mfu` is of;
    `seconds_in_turn` is their sum, as if nothing overlapped.

    Args:
        flops, hbm_bytes, ici_bytes: what one device executes, moves and sends.
        model_flops: of the model's forward and backward pass alone, a device's share.
    """
    parts = {
        "compute": flops / device.flops,
        "hbm": hbm_bytes / device.hbm_bandwidth,
        "ici": ici_bytes / device.ici_bandwidth,
    }
    seconds, in_turn = max(parts.values()), sum(parts.values())
    return {
        **parts,
        "bound": max(parts, key=parts.get),
        "seconds": seconds,
        "seconds_in_turn": in_turn,
        "mfu": model_flops / seconds / device.flops,
        "mfu_in_turn": model_flops / in_turn / device.flops,
    }


def collectives_of(cost: hlo.Cost) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The collectives by kind, and each with where it comes from, the largest first."""
    kinds = collections.defaultdict(lambda: {"count": 0, "bytes": 0, "bytes_sent": 0.0})
    for item in cost.collectives:
        kind = kinds[item.kind]
        kind["count"] += item.count
        kind["bytes"] += item.count * item.bytes
        kind["bytes_sent"] += item.bytes_sent
    ordered = sorted(cost.collectives, key=lambda item: -item.bytes_sent)
    return dict(kinds), [{**item._asdict(), "bytes_sent": item.bytes_sent} for item in ordered]


class Compiler:
    """Lowers and compiles one program for one target, at any batch size."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        target: Target,
        program: str,
        images: int,
        num_classes: int,
    ):
        self.config, self.target, self.program = config, target, program
        self.images, self.num_classes = images, num_classes

    def check_batch(self, batch_size: int):
        ways = self.target.batch_ways
        if batch_size < 1 or batch_size % ways:
            near = max(1, batch_size // ways) * ways
            raise ValueError(
                f"A batch of {batch_size} does not divide over the data x fsdp = {ways} shares of "
                f"the mesh; take a multiple of {ways}, such as {near}, or another --config.mesh."
            )

    def lower(self, config: ml_collections.ConfigDict, batch_size: int):
        mesh = self.target.mesh
        if self.program == "sample":
            return lower_sampling(config, mesh, batch_size, self.num_classes)
        return lower_training(config, mesh, batch_size, self.images, self.num_classes)

    def compile(self, batch_size: int):
        """The compiled program and its abstract parameters.

        Raises:
            DoesNotFitError: with the memory that the compiler missed.
        """
        lowered, params = self.lower(self.config, batch_size)
        try:
            return lowered.compile(), params
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error))
            needs = f"it needs {used[1]} of {used[2]}" if used else "the compiler ran out of it"
            raise DoesNotFitError(
                f"A global batch of {batch_size} does not fit the memory of a device of "
                f"{self.target.topology}: {needs}. Try a larger --config.mesh.fsdp, more devices, "
                "a smaller --batch_size, or --find_batch."
            ) from error

    def model_flops(self, batch_size: int) -> int:
        """FLOPs of all devices together, of the program as written, without rematerialization."""
        config = self.config.copy_and_resolve_references()
        config.content.remat = config.structure.remat = False
        text = self.lower(config, batch_size)[0].as_text("hlo")
        return hlo.cost(hlo.parse(text)).flops

    def report(self, batch_size: int) -> dict[str, Any]:
        """Everything that is known of the compiled program, JSON-able."""
        self.check_batch(batch_size)
        started = time.monotonic()
        compiled, params = self.compile(batch_size)
        compile_seconds = time.monotonic() - started
        target, devices = self.target, self.target.mesh.size
        cost = hlo.cost(hlo.parse(compiled.as_text()))
        memory = memory_of(compiled.memory_analysis(), target.device.hbm)
        kinds, collectives = collectives_of(cost)
        model_flops = self.model_flops(batch_size)
        times = roofline(
            cost.flops,
            cost.hbm_bytes,
            sum(kind["bytes_sent"] for kind in kinds.values()),
            model_flops / devices,
            target.device,
        )
        sizes = {
            name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
            for name, tree in params.items()
        }
        steps_a_day = 86_400 / times["seconds"]
        return {
            "estimate": ESTIMATE,
            "topology": target.topology,
            "devices": devices,
            "mesh": dict(target.mesh.shape),
            "program": self.program,
            "stage": training_run(self.config) if self.program == "train" else None,
            "batch_size": batch_size,
            "compile_seconds": compile_seconds,
            "parameters": {**sizes, "total": sum(sizes.values())},
            "memory": memory,
            "fits": memory["total"] <= memory["hbm"],
            "model_flops": model_flops,
            "executed_flops": cost.flops * devices,
            "hbm_bytes": cost.hbm_bytes,
            "collectives_by_kind": kinds,
            "collectives": collectives,
            "unknown_loops": len(cost.unknown_loops),
            "custom_calls": dict(cost.custom_calls),
            "roofline": times,
            "steps_a_day": steps_a_day,
            "images_a_second": batch_size / times["seconds"],
            "epochs_a_day": steps_a_day * batch_size / self.images,
        }


def show(report: dict[str, Any]) -> str:
    """The report as text."""
    r, memory, times = report, report["memory"], report["roofline"]
    program = f"training step ({r['stage']})" if r["program"] == "train" else "sampler"
    gib = lambda size: f"{size / GIB:.2f} GiB"
    mega = lambda count: f"{count / 1e6:,.1f} M"
    seconds = lambda value: f"{value * 1e3:,.1f} ms"
    mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items())
    lines = [
        f"{program}, {r['topology']} ({r['devices']} devices: {mesh}), global batch "
        f"{r['batch_size']}, compiled in {r['compile_seconds']:.0f} s",
        "",
        "Parameters",
        *(f"  {name:<12} {mega(count):>12}" for name, count in r["parameters"].items()),
        "",
        f"Memory of a device ({gib(memory['hbm'])})",
        *(
            f"  {name:<12} {gib(memory[name]):>12}"
            for name in ("arguments", "outputs", "temporaries", "code", "total")
        ),
        f"  {'fits' if r['fits'] else 'DOES NOT FIT'}, {memory['total'] / memory['hbm']:.0%} used",
        "",
        "Work of a step, all devices",
        f"  model FLOPs     {r['model_flops']:.4g} (matrix products of the program as written)",
        f"  executed FLOPs  {r['executed_flops']:.4g} (with what is computed again)",
        "Work of a step, one device",
        f"  memory traffic  {r['hbm_bytes'] / 1e9:,.1f} GB (estimate: all operands and results "
        "of fusions)",
        "  collectives",
        *(
            f"    {kind:<20} {k['count']:>6} times, {k['bytes'] / 1e6:>12,.3f} MB, "
            f"{k['bytes_sent'] / 1e6:,.3f} MB sent"
            for kind, k in sorted(r["collectives_by_kind"].items())
        ),
    ]
    if r["unknown_loops"]:
        lines.append(
            f"  counted once: {r['unknown_loops']} loops whose length depends on the data "
            "(the clustering's)"
        )
    if r["custom_calls"]:
        lines.append(f"  FLOPs not counted: of kernels that cannot be read, {r['custom_calls']}")
    lines += [
        "",
        f"Time of a step ({r['estimate']})",
        *(f"  {name:<12} {seconds(times[name]):>12}" for name in ("compute", "hbm", "ici")),
        f"  the longest  {seconds(times['seconds']):>12}, MFU {times['mfu']:.1%}, bound by "
        f"{times['bound']}",
        f"  their sum    {seconds(times['seconds_in_turn']):>12}, MFU {times['mfu_in_turn']:.1%}",
        "At the longest of the three",
        f"  {r['images_a_second']:,.0f} images a second",
    ]
    if r["program"] == "train":
        lines[-1] += f", {r['steps_a_day']:,.0f} steps and {r['epochs_a_day']:,.1f} epochs a day"
    return "\n".join(lines)


def largest(fits: Callable[[int], bool], start: int, ways: int) -> int:
    """The largest multiple of `ways` that fits, 0 if none: doubling or halving, then bisection.

    Args:
        fits: batch size -> bool, true up to some size. start: where to begin.
    """
    size, high = max(1, start // ways), None
    low = 0
    while high is None or high - low > 1:
        if fits(size * ways):
            low = size
        else:
            high = size
        if high is None:
            size = 2 * low
        elif low == 0:
            size = high // 2
        else:
            size = (low + high) // 2
    return low * ways


def find_batch(compiler: Compiler, start: int) -> int:
    """The largest global batch that fits, by compiling; shows progress and what may remain.

    Raises:
        DoesNotFitError: not even one sample on each device.
    """
    seconds, ways = [], compiler.target.batch_ways
    bounds = {True: 0, False: math.inf}

    def fits(batch_size: int) -> bool:
        started = time.monotonic()
        try:
            compiled, _ = compiler.compile(batch_size)
        except DoesNotFitError:
            result = False
        else:
            memory = memory_of(compiled.memory_analysis(), compiler.target.device.hbm)
            result = memory["total"] <= memory["hbm"]
        seconds.append(time.monotonic() - started)
        bounds[result] = (max if result else min)(bounds[result], batch_size)
        eta = "after the first that does not fit"
        if bounds[False] < math.inf:
            rounds = math.ceil(math.log2(max(1, (bounds[False] - bounds[True]) / ways)))
            eta = f"{rounds * np.mean(seconds):.0f} s"
        logger.info(
            "batch %d %s (%.0f s); ETA %s",
            batch_size, "fits" if result else "does not fit", seconds[-1], eta,
        )  # fmt: skip
        return result

    found = largest(fits, start, ways)
    if not found:
        raise DoesNotFitError(
            f"Not even a global batch of {ways} (one sample a device) fits "
            f"{compiler.target.topology}. Try a larger --config.mesh.fsdp or more devices."
        )
    return found


def prepare():
    """Lets JAX find no device but the CPU, and TPU's compiler look for none; before JAX starts."""
    os.environ |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilations at once
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    jax.config.update("jax_platforms", "cpu")


FLAGS = flags.FLAGS


def main(_):
    config = FLAGS.config
    if FLAGS.program == "train":
        training_run(config)  # raises before anything is compiled
    if FLAGS.json and not Path(FLAGS.json).absolute().parent.is_dir():
        raise ValueError(f"The folder of --json={FLAGS.json} does not exist; make it first.")
    target = find_target(FLAGS.topology, config.mesh.to_dict())
    images, num_classes = IMAGENET
    if config.data.name != "tfds:imagenet2012":
        source = open_source(config.data.name, "train", data_dir=config.data.data_dir or None)
        images, num_classes = len(source), source.num_classes
    compiler = Compiler(config, target, FLAGS.program, images, num_classes)
    batch_size, ways = FLAGS.batch_size, target.batch_ways
    if batch_size is None:
        settings = training_settings(training_run(config)) if FLAGS.program == "train" else None
        asked = config[settings].batch_size if settings else SAMPLES
        batch_size = -(-asked // ways) * ways
        if settings and batch_size != asked:
            logger.warning(
                "The config's batch of %d does not divide over the %d shares of the mesh; this is "
                "for %d. Training needs --config.%s.batch_size=%d, or another --config.mesh.",
                asked, ways, batch_size, settings, batch_size,
            )  # fmt: skip
    if FLAGS.find_batch:
        batch_size = find_batch(compiler, batch_size)
    report = compiler.report(batch_size)
    print(show(report))
    if FLAGS.json:
        Path(FLAGS.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    prepare()
    config_flags.DEFINE_config_file("config", None, "Configuration, as of `train`.")
    flags.DEFINE_string("topology", None, "CHIP:SHAPE, such as v5e:16x16, v5p:4x4x4 or v6e:8x8.")
    flags.DEFINE_enum("program", "train", ["train", "sample"], "What to compile.")
    flags.DEFINE_integer(
        "batch_size", None, "Global batch; by default the config's, or 64 samples.", lower_bound=1
    )
    flags.DEFINE_boolean("find_batch", False, "Find the largest global batch that fits.")
    flags.DEFINE_string("json", None, "File for the report as JSON.")
    flags.mark_flags_as_required(["config", "topology"])
    cli.main(main)
