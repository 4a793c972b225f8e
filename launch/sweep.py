"""Starts one training run for each entry of a sweep, or prints the commands (the default).

    python launch/sweep.py --sweep=configs/sweeps/digits_generators.py --workdir=runs/sweep
    python launch/sweep.py --sweep=... --workdir=... --submit
    python launch/sweep.py --sweep=... --workdir=/shared/sweep --launcher=slurm \\
        --launcher_args="--nodes=1 --gpus-per-node=8 --exclusive" --submit

Run it from the repository. A sweep is a Python file that defines CONFIG, a preset or a file with
its variant if any; get_sweep(), which returns a list of dictionaries of overrides such as
{"content.depth": 8}; and optionally FIXED, a dictionary of overrides that all runs share. Every run
has its own folder below --workdir, named after its overrides, and resumes when it is submitted
again. The arguments after `--` are passed to every run, and may set only what the sweep does not.
At the end of local runs, a table compares them, the best one first.
"""

import argparse
import contextlib
import hashlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from etils import epy

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed, and sweeps import configs

from nvg_jax import presets  # noqa: E402
from nvg_jax.cli import mistake_in_config  # noqa: E402
from nvg_jax.errors import UserError, comes_with, did_you_mean  # noqa: E402
from nvg_jax.training import checks  # noqa: E402

with epy.lazy_imports(error_callback=comes_with("train")):  # slow
    from flax import traverse_util

    from nvg_jax.training import curves

NAME_LENGTH = 180  # file systems allow 255, and the scheduler may add to a job name


def main():
    try:
        options, extra = parse_arguments(sys.argv[1:])
        commands = sweep_commands(options, extra)
        if not options.submit:
            print("\n".join(map(shlex.join, commands)))
            return
        codes = run_all(commands, go_on=options.launcher != "slurm")
        # Those that only check leave no curves to compare.
        checks_only = any(re.match("--?check(_only)?(=|$)", argument) for argument in extra)
        trained = [command for command, code in zip(commands, codes) if code == 0]
        if options.launcher == "local" and trained and not checks_only:
            print(comparison(trained))
        if failed := next(filter(None, codes), 0):
            sys.exit(failed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_all(commands: Sequence[Sequence[str]], go_on: bool) -> list[int]:
    """Runs commands one after another; returns their exit codes.

    The first that fails ends this script, unless `go_on` and it was a failure of its own: exit code
    1, or 2 as of a loss that is not finite.
    """
    codes = []
    for number, command in enumerate(commands, 1):
        print(f"run {number} of {len(commands)}: {shlex.join(command)}", flush=True)
        codes.append(run(command))
        if code := codes[-1]:
            print(f"error: run {number} ended with exit code {code}", file=sys.stderr)
            if not go_on or code not in (1, 2):
                sys.exit(code if code > 0 else 128 - code)
    return codes


def comparison(commands: Sequence[Sequence[str]]) -> str:
    """The table of `python -m nvg_jax.report` for these runs, the best one first."""
    folders = [word.partition("=")[2] for c in commands for word in c if word[:10] == "--workdir="]
    with contextlib.chdir(ROOT):  # where the runs were started
        return curves.tables(*curves.read({Path(folder).name: folder for folder in folders}))


def run(command: Sequence[str]) -> int:
    """Runs a command, forwards Ctrl-C and SIGTERM to it as SIGTERM, and returns its exit code."""
    if shutil.which(command[0]) is None:
        raise UserError(f"there is no command {command[0]} here; submit where it is installed.")
    received = []
    stop = lambda number, _: received.append(number)
    # Before the command starts, and with a wait that ends: a signal that arrives at the start of an
    # endless one is only handled after it.
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    process = subprocess.Popen(command, cwd=ROOT)
    forwarded, code = 0, None
    while code is None:
        if len(received) > forwarded:
            forwarded = len(received)
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=0.5)
    for number, handler in before.items():
        signal.signal(number, handler)
    return 128 + received[0] if received else code  # it may have been at its end


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command line, and the training arguments after `--`."""
    extra = []
    if "--" in arguments:
        split = arguments.index("--")
        arguments, extra = arguments[:split], arguments[split + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--sweep", required=True, help="the sweep file")
    parser.add_argument("--workdir", required=True, help="parent of the runs' folders")
    parser.add_argument("--launcher", choices=("local", "slurm", "gke"), default="local")
    parser.add_argument(
        "--launcher_args", default="", help="more arguments for the launcher (slurm: for sbatch)"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry_run", action="store_true", help="print the commands (default)")
    mode.add_argument("--submit", action="store_true", help="run the commands, one after another")
    options = parser.parse_args(arguments)
    for name in ("sweep", "workdir"):  # as of an unset variable
        if not getattr(options, name):
            raise UserError(f"--{name} is empty: give a value.")
    options.workdir = options.workdir.rstrip("/")
    try:
        options.launcher_args = shlex.split(options.launcher_args)
    except ValueError as error:
        raise UserError(f"--launcher_args={options.launcher_args}: {error}.") from error
    return options, extra


def sweep_commands(options: argparse.Namespace, extra: Sequence[str]) -> list[list[str]]:
    """The command of every run, after checking all of them.

    Raises:
        UserError: an invalid sweep; the message names the run and the key.
    """
    config_name, fixed, sweep = load_sweep(options.sweep)
    known = traverse_util.flatten_dict(parse_config(config_name, []).to_dict(), sep=".")
    for argument in extra:
        key = re.match(r"--?config\.([\w.]+)", argument)
        if key and "=" not in argument:
            raise UserError(f"write {argument}=VALUE, with a value after =.")
        if key and not any(f"{name}.".startswith(f"{key[1]}.") for name in known):
            raise UserError(f"there is no setting {key[1]}.{did_you_mean(key[1], known)}")
    commands, names = [], {}
    for number, overrides in enumerate(sweep, 1):
        where = f"run {number} of {options.sweep}"
        try:
            if both := fixed.keys() & overrides.keys():
                raise UserError(f"{min(both)} is also in FIXED; set it in one place only.")
            every = dict(sorted({**fixed, **overrides}.items()))
            if unknown := every.keys() - known:
                name = min(unknown)
                raise UserError(f"there is no setting {name}.{did_you_mean(name, known)}")
            for flag in ("config", "workdir", *(f"config.{key}" for key in every)):
                if any(re.match(f"--?{re.escape(flag)}(=|$)", argument) for argument in extra):
                    raise UserError(f"do not set --{flag} after --: the sweep sets it.")
            arguments = [f"--config.{key}={as_text(value)}" for key, value in every.items()]
            config = parse_config(config_name, arguments + list(extra))
            checks.check_config(config)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        settings = traverse_util.flatten_dict(config.to_dict(), sep=".")
        own = {key: settings[key] for key in overrides}
        name = run_name(own)
        if name in names:
            other, same = names[name][0], names[name][1] == own
            raise UserError(
                f"{where} is {name}, the same as run {other}; remove one of them."
                if same
                else f"{where} would have the folder of run {other}, {name}: their values differ "
                "only in signs that its name lacks. Put them into two sweeps."
            )
        names[name] = number, own
        commands.append(
            launcher_command(options, name)
            + ["--", f"--config={config_name}", f"--workdir={options.workdir}/{name}"]
            + arguments
            + list(extra)
        )
    return commands


def load_sweep(file: str) -> tuple[str, Mapping[str, Any], list[Mapping[str, Any]]]:
    """CONFIG, FIXED and get_sweep() of a sweep file."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"there is no sweep file {file}.")
    try:
        module = presets.execute(path)
        config_name, sweep = module.CONFIG, module.get_sweep()
    except UserError:
        raise
    except Exception as error:  # anything that the user's file raises
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    if not (
        isinstance(sweep, list) and sweep and all(isinstance(entry, Mapping) for entry in sweep)
    ):
        raise UserError(f"get_sweep() of {file} must return a list of dictionaries, not {sweep!r}.")
    fixed = getattr(module, "FIXED", {})
    if not isinstance(fixed, Mapping):
        raise UserError(f"FIXED of {file} must be a dictionary, not {fixed!r}.")
    for entry in (fixed, *sweep):
        if wrong := [key for key in entry if not isinstance(key, str)]:
            raise UserError(f"{file}: the key {wrong[0]!r} is not the name of a setting.")
    return config_name, fixed, sweep


def parse_config(config_name: str, arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """The configuration as training would parse it."""
    overrides = [argument for argument in arguments if re.match(r"--?config\.", argument)]
    argv = ["sweep", f"--config={config_name}", *overrides]
    values = flags.FlagValues()
    presets.define_flag(values, argv)
    try:
        with contextlib.chdir(ROOT):  # where the runs are started
            values(argv)
            return values.config
    except Exception as error:  # a wrong flag, or anything that the user's config file raises
        message = mistake_in_config(error) or str(error) or type(error).__name__
        message = message.strip().splitlines()[-1].strip()
        arguments = shlex.join([f"--config={config_name}", *overrides])
        raise UserError(f"{arguments}: {message}") from error


def as_text(value: Any) -> str:
    """A value, perhaps of NumPy, in the form that config_flags parses."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, str) else repr(value)


def run_name(overrides: Mapping[str, Any]) -> str:
    """A folder name that depends on the overrides alone, so it is the same in every sweep."""
    parts = []
    for key, value in sorted(overrides.items()):
        text = "-".join(map(as_text, value)) if isinstance(value, tuple) else as_text(value)
        parts.append(f"{key}={text}")
    name = re.sub(r"[^A-Za-z0-9_.,=+-]", "_", ",".join(parts)) or "base"
    if len(name) > NAME_LENGTH:
        name = f"{name[: NAME_LENGTH - 9]}-{short_hash(name)}"
    return name


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def launcher_command(options: argparse.Namespace, name: str) -> list[str]:
    """The command of one run, up to the `--` before the training arguments."""
    arguments, folder = options.launcher_args, short_hash(f"{options.workdir}/{name}")
    if options.launcher == "slurm":
        # Submitted again, it waits for the one before, which has the same name.
        once = [f"--job-name={name}-{folder}", "--dependency=singleton"]
        return ["sbatch", *once, *arguments, "launch/slurm.sbatch"]
    if options.launcher == "gke":  # names must be short and lower-case
        sweep = re.sub(r"[^a-z0-9]+", "-", Path(options.sweep).stem.lower()).strip("-")
        sweep = sweep if sweep[:1].isalpha() else f"nvg-{sweep}".strip("-")
        return ["bash", "launch/gke_xpk.sh", f"--name={sweep[:18]}-{folder}", *arguments]
    return ["bash", "launch/local.sh", *arguments]


if __name__ == "__main__":
    main()
