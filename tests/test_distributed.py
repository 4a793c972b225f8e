"""One training on many devices and in several processes: the same numbers, no wasted traffic.

Run as a script, this file is the process with eight devices that the tests look into.
"""

import json
import math
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from etils import epath
from helpers import logged, on_eight_devices, with_devices

from configs import digits
from nvg_jax import models
from nvg_jax.layers import TransformerConfig
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime import checkpoint, sharding
from nvg_jax.tokenizer import TokenizerConfig
from nvg_jax.train import train
from nvg_jax.training import generators, tokenizer
from nvg_jax.training.run import open_run
from nvg_jax.workdir import RunMetadata

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20
MESHES = {
    "one device": (1, 1, 1),
    "data 8": (8, 1, 1),
    "fsdp 8": (1, 8, 1),
    "data 2 fsdp 2 tensor 2": (2, 2, 2),
}


def run_config():
    config = digits.get_config("runlocal")
    for training in (config.tokenizer_training, config.generator_training):
        training.update(steps=STEPS, log_every=1, save_every=10, eval_every=STEPS)
        training.optimizer.update(learning_rate=1e-3)
    return config


def train_on(mesh) -> dict[str, dict]:
    """Twenty steps of both trainings, from the seed and the data of `run_config`.

    Returns:
        {training: {"curves", "collectives" and "sizes" of its compiled step}}.
    """
    config = run_config()
    run = open_run(config, epath.Path("unused"), mesh, networks=())
    key = jax.device_put(jax.random.fold_in(run.key, 2), run.replicated)
    scale = jax.device_put(np.ones(6, np.float32), run.replicated)
    batches = run.train_batches(16, config.seed)
    taken = [sharding.global_batch(next(batches), mesh) for _ in range(STEPS)]
    found = {}

    def steps(name, program, state, *fixed, **static):
        step = program.step.lower(state, *fixed, taken[0], key, **static).compile()
        metrics = []
        for batch in taken:
            state, values = step(state, *fixed, batch, key)
            metrics.append(values)
        curves = {
            tag: [float(m[tag]) for m in jax.device_get(metrics)]
            for tag in metrics[0]
            if tag.endswith("loss") and metrics[0][tag].ndim == 0
        }
        found[name] = {
            "curves": curves, "collectives": collectives(step), "sizes": leaf_sizes(program)
        }  # fmt: skip
        return state

    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        program = tokenizer.make_program(config, mesh, STEPS)
        state = program.init(jax.random.fold_in(run.key, 0))
        copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=run.replicated)
        params = copy(state.params)  # of its own: the step donates the state
        steps("tokenizer", program, state, {}, index_backprop=False)
        program = generators.make_program(config, mesh, STEPS, models.GENERATORS, 10)
        state = program.init(jax.random.fold_in(run.key, 1), params["quantizer"]["codebook"])
        state = steps("generators", program, state, params, {}, scale)
    if dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}:
        found["sampling"] = sampling_collectives(config, {"tokenizer": params, **state.ema_params})
    return found


def sampling_collectives(config, params) -> list[tuple[str, int, str]]:
    """The collectives of the program that eight devices sample with."""
    metadata = RunMetadata(
        tokenizer=TokenizerConfig(**config.tokenizer),
        class_names=tuple("0123456789"),
        canvas_scale=(1.0,) * 6,
        **{name: TransformerConfig(**config[name]) for name in models.GENERATORS},
    )
    pipe = Pipeline(metadata, params)
    program, seen = pipe.program, []

    def look(*args, **static):
        compiled = program.sample.lower(*args, **static).compile()
        seen.append(collectives(compiled))
        return compiled(*args)

    pipe.program = program._replace(sample=look)
    assert pipe.sample(range(8), flow_steps=1, content_guidance=2.0).images.shape == (8, 8, 8, 3)
    return seen[0]


def collectives(compiled) -> list[tuple[str, int, str]]:
    """(kind, elements of the largest result, operation) of every collective of a program."""
    found = []
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for line in compiled.as_text().splitlines():
        match = re.search(rf"= (.*?) ({kinds})(-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
            operation = re.search(r'op_name="([^"]*)"', line)
            found.append((match[2], max(sizes), operation[1] if operation else ""))
    return found


def leaf_sizes(program) -> list[int]:
    """Numbers of elements of all parameters, and of one layer of stacked ones."""
    sizes = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(program.state):
        sizes.add(leaf.size)
        if "blocks" in jax.tree_util.keystr(path):
            sizes.add(leaf.size // leaf.shape[0])
    return sorted(sizes)


def observe() -> dict:
    seen = {}
    for name, sizes in MESHES.items():
        devices = jax.devices()[: math.prod(sizes)]
        seen[name] = train_on(sharding.make_mesh(*sizes, devices=devices))
    return seen


@pytest.fixture(scope="module")
def seen():
    return on_eight_devices(__file__)


OTHERS = [name for name in MESHES if name != "one device"]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("stage", ["tokenizer", "generators"])
def test_every_mesh_gives_the_losses_of_one_device(seen, stage, name):
    alone, found = seen["one device"][stage]["curves"], seen[name][stage]["curves"]
    assert alone.keys() == found.keys() and alone
    for tag in alone:
        assert len(set(alone[tag])) == STEPS
        np.testing.assert_allclose(found[tag], alone[tag], rtol=1e-5, err_msg=tag)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("stage", ["tokenizer", "generators"])
def test_only_parameters_and_gradients_travel(seen, stage, name):
    """No gather of activations, nothing moved about; sums of gradients, metrics and no more.

    Over "tensor" one sum of the residual for each half of a block, as planned.
    """
    data, fsdp, tensor = MESHES[name]
    sizes, found = set(seen[name][stage]["sizes"]), seen[name][stage]["collectives"]
    assert found
    for kind, size, operation in found:
        # A parameter may be collected, a gradient summed, in two goes: over one axis of the mesh,
        # then over the other.
        parameter = any(size * cut in sizes for cut in {1, fsdp, tensor, fsdp * tensor})
        if kind == "all-gather":
            assert fsdp * tensor > 1 and parameter, (size, operation)
            assert re.search("(sharding_constraint|squeeze|reshape|^)$", operation), operation
        elif kind == "all-reduce":
            residual = tensor > 1 and re.search("bnpd,pdc->bnc|bnc,cpd->bnpd", operation)
            metric = size <= 16  # one number, one a stage, or one a code
            assert residual or parameter or metric, (size, operation)
        else:
            raise AssertionError(f"{kind} of {size} elements: {operation}")
    if fsdp > 1:
        assert any(kind == "all-gather" for kind, _, _ in found)


def test_sampling_on_many_devices_needs_no_word_between_them(seen):
    assert seen["data 8"]["sampling"] == []


def test_heads_that_do_not_split_are_refused():
    config = run_config()
    mesh = jax.sharding.AbstractMesh((1, 1, 3), sharding.MESH_AXES)
    with pytest.raises(ValueError, match="2 attention heads .* do not split over mesh.tensor=3"):
        generators.make_program(config, mesh, STEPS, models.GENERATORS, 10)


# Two processes.


def start(workdir, *arguments, processes: int = 2, devices: int = 2):
    """The training command in several processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "nvg_jax.train", "--config=configs/digits.py:runlocal",
        f"--workdir={workdir}", *arguments,
    ]  # fmt: skip
    if processes > 1:
        command += [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}"]
    return [
        subprocess.Popen(
            command + ([f"--process_id={index}"] if processes > 1 else []),
            cwd=ROOT,
            env=with_devices(devices),
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def finish(processes) -> list[str]:
    return [process.communicate()[1] for process in processes]


def test_two_processes_train_stop_on_a_signal_and_one_goes_on(tmp_path):
    """Four devices of two processes; a SIGTERM to one saves in both; one device ends the run."""
    arguments = [
        f"--config.{stage}_training.{key}={value}"
        for stage, evaluations in (("tokenizer", STEPS), ("generator", 2))
        for key, value in (
            ("steps", STEPS), ("log_every", 1), ("save_every", 10), ("eval_every", evaluations),
            ("optimizer.learning_rate", 1e-3),
        )
    ]  # fmt: skip
    running = start(tmp_path / "two", *arguments)
    lines = []
    for line in running[0].stderr:
        lines.append(line)
        if "generators 3/" in line:
            running[1].send_signal(signal.SIGTERM)
            break
    outputs = finish(running)
    assert [process.returncode for process in running] == [75, 75], (lines, outputs)
    assert "loss" not in outputs[1]  # one process tells the progress
    stopped = checkpoint.read_meta(tmp_path / "two" / "generators")["step"]
    assert 3 <= stopped < STEPS and f"saved at step {stopped} of {STEPS}" in outputs[0]

    train(run_config(), tmp_path / "two")
    train(run_config(), tmp_path / "one")
    for run, tags in (
        ("tokenizer", ("loss", "test_psnr")),
        ("generators", ("content/loss", "structure/loss", "test_content/loss")),
    ):
        alone, found = logged(tmp_path / "one" / run), logged(tmp_path / "two" / run)
        for tag in tags:
            curve = {key: value for key, value in alone.items() if key[0] == tag}
            assert len(curve) == (1 if tag.startswith("test") else STEPS)
            for key, value in curve.items():
                np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=str(key))
    assert (tmp_path / "two" / "tokenizer" / f"pictures_{STEPS:07d}.png").is_file()
    assert (tmp_path / "two" / "generators" / "pictures_0000002.png").is_file()


if __name__ == "__main__":
    flags.FLAGS(sys.argv[:1])
    print(json.dumps(observe()))
