"""`nvg COMMAND --FLAG=VALUE ...`, the same as `python -m nvg_jax.COMMAND --FLAG=VALUE ...`."""

import runpy
import sys

from nvg_jax.runtime import interrupts

COMMANDS = {
    "sample": "draw images: PNG files, or one .npz file",
    "app": "a page to sample, draw and edit in the browser",
    "evaluate": "FID and other metrics of samples, or of a model",
    "tune_sampling": "find cheaper settings that sample as well",
    "figures": "the figures of the paper, for any model",
    "train": "train a tokenizer and generators, or resume",
    "report": "compare trainings: settings, numbers, curves",
    "distill": "train a student that needs few steps",
    "encode": "store the sequences of a data set, to train on them",
    "convert": "published weights to a folder, and back; export a model",
    "compile": "memory and time that a training would need on TPUs or GPUs",
}


def main():
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in COMMANDS:
        interrupts.listen()
        sys.argv = [f"nvg {command}", *sys.argv[2:]]
        runpy.run_module(f"nvg_jax.{command}", run_name="__main__", alter_sys=True)
    else:
        is_help = command in ("--help", "-h", "help")
        lines = ["usage: nvg COMMAND --FLAG=VALUE ...", ""]
        lines += [f"  {name:15}{does}" for name, does in COMMANDS.items()]
        lines += ["", "nvg COMMAND --help shows the flags of a command."]
        lines = lines if is_help else [f"error: nvg has no command {command!r}.", *lines]
        print("\n".join(lines), file=sys.stdout if is_help else sys.stderr)
        sys.exit(0 if is_help else 2)


if __name__ == "__main__":
    main()
