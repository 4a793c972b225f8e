"""Presets by name, from any folder: `--config=digits:demo` is configs/digits.py with "demo".

In a clone they are files of configs/; a wheel has them in nvg_jax/configs/.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from nvg_jax.errors import UserError

flags.disclaim_key_flags()  # --help of a command shows --config as its own
INSTALLED = Path(__file__).parent / "configs"
FOLDER = INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"


def names() -> list[str]:
    """The names of all presets."""
    return sorted({path.stem for path in FOLDER.glob("*.py")} - {"__init__", "common"})


def find(config: str) -> str:
    """The file, and ":" and the variant if there is one, of "digits:demo" or "my/file.py:small".

    Raises:
        UserError: there is no such preset or file.
    """
    name, *variant = config.split(":", 1)
    file = FOLDER / f"{name}.py" if name in names() else Path(name)
    if not file.is_file():
        raise UserError(
            f"There is no configuration {name}. Give a file, or a preset: {', '.join(names())}."
        )
    return ":".join([str(file), *variant])


def load(config: str) -> ml_collections.ConfigDict:
    """The configuration of a preset or file, such as "digits:demo", to change and train with.

    Raises:
        UserError: there is no such preset, file or variant, or the file raises ValueError.
    """
    file, *variant = find(config).split(":", 1)
    make_importable(Path(file))
    try:
        module = execute(file)
        if not hasattr(module, "get_config"):
            raise ValueError("it has no function get_config")
        return module.get_config(*variant)
    except ValueError as error:  # the files of configs/ import nothing of nvg_jax
        raise UserError(f"{config}: {error}") from error


def base() -> ml_collections.ConfigDict:
    """Every setting with its published value: base() of configs/common.py."""
    return execute(FOLDER / "common.py").base()


def execute(file: str | os.PathLike) -> types.ModuleType:
    """The module in a file of configurations."""
    spec = importlib.util.spec_from_file_location("config", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} must be a Python file, whose name ends in .py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def define_flag(values: flags.FlagValues = flags.FLAGS, argv: list[str] | None = None):
    """Defines --config, with --config.KEY=VALUE for each of its settings.

    Args:
        values: where the flags are defined.
        argv: the command line that has the overrides; None is that of this process.
    """
    help = "A preset such as digits or imagenet256:d16, or a file with get_config."
    config_flags.DEFINE_config_file("config", None, help, flag_values=values, sys_argv=argv)
    parser = values["config"].parser
    parse = parser.parse

    def parse_config(argument: str):
        config = find(argument)
        make_importable(Path(config.split(":")[0]))
        value = parse(config)
        if value is None or type(value) is dict:  # an error in the file is of another type
            raise UserError(
                f"get_config in {config} must return a ConfigDict, not {type(value).__name__}."
            )
        return value

    parser.parse = parse_config


def make_importable(file: Path):
    """Lets a configuration import `configs`: its own folder if it has that name, then the presets.

    The folder that contains them need not be on the path: it is not in an installed package.
    """
    folders = (file.absolute().parent, FOLDER)
    package = sys.modules.setdefault("configs", types.ModuleType("configs"))
    places = [str(folder) for folder in folders if folder.name == "configs"]
    package.__path__ = list(dict.fromkeys([*places, *getattr(package, "__path__", ())]))
