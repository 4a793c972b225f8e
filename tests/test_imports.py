"""The layers of the package: who may import whom, read from the source."""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

# A module of the package imports modules of its own level and of the levels before it.
LEVELS = (
    ("kernels", "lora"),
    ("granularity", "clustering", "attention", "layers"),
    ("tokenizer", "structure", "content", "pretrained"),
    ("models",),
    ("sampling", "evaluation"),
    ("metadata",),
    ("hub",),
    ("bundled",),
    ("workdir",),
    ("pipeline",),
    ("training",),
    ("jobs",),
    ("aot", "cli", "page"),
    ("train", "distill", "encode", "convert", "compile", "report")
    + ("sample", "evaluate", "figures", "tune_sampling", "app"),
)
# These know no model: of the package they import only each other. Every level may import them.
FREE = ("__main__", "errors", "presets", "parts", "data", "runtime", "torch_interop", "visualize")
STRANGERS = (("structure", "content"), ("content", "structure"))  # never, whatever their level


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in files("nvg_jax")}


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute in this project"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from nvg_jax import layers` imports the module nvg_jax.layers.
            names.update(inner & MODULES or {node.module})
    return names


def outside(path: Path) -> set[str]:
    """First names of everything that a file imports."""
    return {name.partition(".")[0] for name in imported(path)}


def room(module: str) -> str:
    """nvg_jax.structure.flow -> structure; the package itself has no room: ''."""
    return (module + ".").split(".")[1]


def level(room: str) -> int:
    return next(number for number, rooms in enumerate(LEVELS) if room in rooms)


INSIDE = [path for path in files("nvg_jax") if module_name(path) != "nvg_jax"]


def test_every_module_has_its_place():
    rooms = {room(module_name(path)) for path in INSIDE}
    assert rooms == {*FREE, *(name for names in LEVELS for name in names)}


@pytest.mark.parametrize("path", INSIDE, ids=module_name)
def test_imports_go_one_way(path):
    own = room(module_name(path))
    for name in imported(path):
        if name.partition(".")[0] != "nvg_jax":
            continue
        other = room(name)
        assert other, "inside the package, import the module that is meant and not nvg_jax"
        assert (own, other) not in STRANGERS
        if other in FREE:
            continue
        assert own not in FREE, f"{own} knows no model and imports {other}"
        assert level(other) <= level(own), f"{other} is above {own}"
        if other != own:
            assert not {own, other} <= set(LEVELS[-1]), f"{own} and {other} are both commands"


def test_no_module_imports_itself_through_others():
    """Not even late."""
    graph = {module_name(path): imported(path) & MODULES for path in INSIDE}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_package_knows_no_preset_no_launcher_and_no_test():
    for path in files("nvg_jax"):
        assert not outside(path) & {"configs", "launch", "tests", "benchmarks"}, path


def test_presets_need_only_ml_collections():
    for path in files("configs"):
        assert outside(path) <= {"configs", "ml_collections"}, path


def test_what_the_package_imports_is_required():
    """By requirements.txt, by JAX, or by an extra, which need not be installed."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lines += [*(importlib.metadata.requires("jax") or ()), "gradio", "huggingface_hub"]
    lines += ["matplotlib", "wandb"]
    required = {re.split(r"[^\w-]", line)[0].replace("_", "-").lower() for line in lines}
    distributions = importlib.metadata.packages_distributions()
    for path in files("nvg_jax"):
        for name in outside(path) - sys.stdlib_module_names - {"nvg_jax"}:
            owners = {owner.replace("_", "-").lower() for owner in distributions.get(name, [name])}
            assert owners & required, f"{path} imports {name}"


def test_a_package_that_is_imported_late_names_its_extra():
    blocks = [
        (path, block)
        for path in files("nvg_jax")
        for block in re.findall(r"lazy_imports\(\):.*\n((?: .*\n)+)", path.read_text())
    ]
    assert blocks
    for path, block in blocks:
        assert all(line.startswith("    from nvg_jax") for line in block.splitlines()), path


def test_nothing_needs_torch():
    for folder in ("nvg_jax", "configs", "tests", "benchmarks", "launch"):
        for path in files(folder):
            if path.parent.name == "reference":  # made the numbers that tests compare with
                continue
            allowed = {"torch"} if path.name == "against_torch.py" else set()
            assert not outside(path) & {"torch", "torchvision"} - allowed, path


def test_windows_is_told_where_it_runs():
    code = "import os; os.name = 'nt'\nimport nvg_jax"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "ImportError: nvg_jax runs on Linux and macOS" in done.stderr
