"""One training in two processes: the same numbers, stopped by a signal, resumed by one."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import logged, tiny_config, with_devices

from nvg_jax.runtime import checkpoint
from nvg_jax.train import train

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12  # those of the other tests, whose compiled programs are shared


def run_config():
    config = tiny_config()
    for training in (config.tokenizer_training, config.generator_training):
        training.update(length=f"{STEPS} steps", log_every=1, save_every=10, eval_every=STEPS)
    return config


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


@pytest.mark.slow
def test_two_processes_train_stop_on_a_signal_and_one_goes_on(tmp_path):
    """Four devices of two processes; a SIGTERM to one saves in both; one device ends the run."""
    settings = {"length": f"{STEPS} steps", "log_every": 1, "save_every": 10}
    arguments = [
        f"--config.{part}_training.{key}={value}"
        for part, evaluations in (("tokenizer", STEPS), ("generator", 2))
        for key, value in (settings | {"eval_every": evaluations}).items()
    ]
    running = start(tmp_path / "two", *arguments)
    lines = []
    for line in running[0].stderr:
        lines.append(line)
        if "generators: 3/" in line:
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
