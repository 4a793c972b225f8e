"""The notebook: its installation, its cells one by one and all together, and its copy in docs/."""

import ast
import base64
import collections
import copy
import glob
import importlib.util
import io
import logging
import os
import pathlib
import re
import runpy
import subprocess
import symtable
import sys
import types
from importlib import metadata

import nbclient
import nbformat
import numpy as np
import pytest
from helpers import ROOT, TIMEOUT, run
from PIL import Image

RENDER = runpy.run_path(str(ROOT / "notebooks" / "render.py"))
PAGE = RENDER["PAGE"].read_text()
NOTEBOOK = nbformat.read(RENDER["NOTEBOOK"], as_version=4)
CODE = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
INSTALL, HUB, TRAIN = CODE[0], *CODE[-2:]


def test_outputs_are_stripped():
    for cell in NOTEBOOK.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_what_it_takes_from_the_package_exists():
    code = "\n".join(CODE)
    objects = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("nvg_jax"):
            exec(ast.unparse(node), objects)
    objects |= {name: objects["Pipeline"] for name in ("pipe", "emoji", "imagenet", "mine")}
    called = []
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attribute)):
                if name in objects:
                    assert callable(getattr(objects[name], attribute, None)), ast.unparse(node)
                    called.append(f"{name}.{attribute}")
    assert {"pipe.sample", "control.paste", "mine.sample"} <= set(called)


def test_no_two_cells_set_the_same_variable():
    """So that a cell shows the same after earlier ones were run again."""
    owners = collections.defaultdict(list)
    for code in CODE:
        # From Python 3.12 on, those of comprehensions are among a cell's symbols.
        loops = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.comprehension))
        inner = {name.id for node in loops for name in ast.walk(node.target) if hasattr(name, "id")}
        for symbol in symtable.symtable(code, "a cell", "exec").get_symbols():
            if symbol.is_assigned() and symbol.get_name() not in inner:
                owners[symbol.get_name()].append(code)
    assert owners.keys() >= {"class_name", "kept_stages"}
    assert [name for name, codes in owners.items() if len(codes) > 1] == []


# The installation.


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Runs the first cell on a machine of which everything is a stand-in; returns its commands."""

    def run_cell(
        smi="", devices=(), plugin=False, installed=False, jax="0.11.2", status=0, kind=""
    ):
        commands = []

        def command(arguments, **_):
            commands.append([str(argument) for argument in arguments])
            return subprocess.CompletedProcess(arguments, status, "", "No space left")

        found = {"nvg_jax": installed, "jax_cuda12_plugin": plugin, "numpy": True}
        modules = types.SimpleNamespace(
            __version__=jax,
            devices=lambda: [types.SimpleNamespace(device_kind=kind or "cpu")],
            default_backend=lambda: "gpu" if kind else "cpu",
        )
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "path", list(sys.path))
            patch.setitem(sys.modules, "jax", modules)
            patch.setattr(subprocess, "getoutput", lambda _: smi)
            patch.setattr(subprocess, "run", command)
            patch.setattr(glob, "glob", lambda pattern: [d for d in devices if d[:8] in pattern])
            patch.setattr(importlib.util, "find_spec", lambda name: found[name] or None)
            patch.setattr(metadata, "version", {"numpy": "2.1.3", "jax": "0.11.2"}.get)
            exec(INSTALL, {})
        return commands

    return run_cell


NO_DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


@pytest.mark.parametrize(
    "machine_has, jax",
    [
        (dict(), "jax"),
        (dict(smi="/bin/sh: 1: nvidia-smi: not found"), "jax"),
        (dict(smi=NO_DRIVER), "jax"),
        (dict(smi="470.82.01"), "jax"),
        (dict(smi="525.60.13"), "jax[cuda12]"),
        (dict(smi="550.54.15\n550.54.15"), "jax[cuda12]"),
        (dict(smi="570.86.10"), "jax[cuda12]"),
        (dict(smi="580.65.06"), "jax[cuda13]"),
        (dict(smi="590.44.01"), "jax[cuda13]"),
        (dict(smi="590.44.01", plugin=True), "jax[cuda12]"),
        (dict(devices=["/dev/accel0"]), "jax[tpu]"),
        (dict(devices=["/dev/vfio/0"]), "jax[tpu]"),
    ],
)
def test_it_installs_the_jax_of_the_machine_beside_what_is_there(machine, machine_has, jax):
    environment, install = machine(**machine_has)
    folder = environment[-1]
    assert environment[1:] == ["-m", "venv", "--system-site-packages", "--without-pip", folder]
    assert install[1:3] == ["-m", "pip"] and install[3] == f"--python={folder}/bin/python"
    source = f"nvg_jax @ git+{RENDER['REPOSITORY']}"
    assert install[4:] == ["install", "--quiet", source, jax, "numpy==2.1.3"]


def test_its_last_line_says_which_device_is_used(machine, capsys):
    def said(**machine_has):
        assert machine(installed=True, **machine_has) == []
        return capsys.readouterr().out

    assert said(smi="550.54.15", kind="Tesla T4").strip() == "Device: Tesla T4"
    assert said() == "Device: cpu (a GPU or TPU is faster: Runtime > Change runtime type)\n"
    only = "Device: only the CPU"
    again = "choose Runtime > Disconnect and delete runtime, then run this cell again.\n"
    assert said(smi="470.8") == f"{only}: JAX needs a driver 525 or newer, and this GPU's is 470.\n"
    there = f"{only}, though there is"
    assert said(smi="550.5") == f"{there} a GPU, driver 550, for jax[cuda12]: {again}"
    assert said(devices=["/dev/accel0"]) == f"{there} a TPU, for jax[tpu]: {again}"
    silent = f"{only}. This machine's GPU does not answer: {again[:-1]} {NO_DRIVER}\n"
    assert said(smi=NO_DRIVER) == silent


def test_it_stops_with_a_sentence(machine):
    with pytest.raises(SystemExit, match="JAX 0.7.2 was .* before 0.11.2 .*Runtime > Restart"):
        machine(jax="0.7.2")
    with pytest.raises(SystemExit, match="venv failed:\nNo space left"):
        machine(status=1)


# The copy in docs/, and the address of the repository.


def test_the_copy_is_current():
    """Between the cells it has what they printed, indented, and their pictures."""
    outputs, rest = [], PAGE
    for cell in NOTEBOOK.cells:
        before, part, rest = rest.partition(RENDER["shown"](cell) + "\n")
        assert part, f"Run notebooks/render.py; the copy differs from it here:\n{cell.source}"
        outputs += before.splitlines()
    allowed = ("    ", "![", RENDER["HEAD"])
    assert [
        line for line in outputs + rest.splitlines() if line and not line.startswith(allowed)
    ] == []
    pictures = re.findall(r"^!\[.+\]\((.*)\)$", PAGE, re.MULTILINE)
    assert {RENDER["PAGE"].parent / picture for picture in pictures} == set(
        RENDER["PAGE"].with_suffix("").iterdir()
    )


def test_one_address_stands_everywhere_and_no_other_placeholder():
    listed = run(["git", "ls-files", "*.md", "*.ipynb", "*.toml", "*.cff", "*.py"]).stdout.split()
    if not listed:
        pytest.skip("not a clone")
    path = RENDER["REPOSITORY"].removeprefix("https://github.com/")
    addresses = {}
    for name in listed:
        addresses[name] = set(RENDER["OWNED"].findall((ROOT / name).read_text()))
    assert addresses["notebooks/nvg_jax.ipynb"] == {path}  # it is filled in by notebooks/render.py
    assert set().union(*addresses.values()) == {path}
    for text in ("\n".join(cell.source for cell in NOTEBOOK.cells), PAGE):
        left = RENDER["OWNED"].sub("", text)
        assert re.findall("OWNER|ORG/|USER/|YOUR|TODO|FIXME|XXX|example.com", left) == []
    for cell in NOTEBOOK.cells:  # a relative link leads nowhere in Colab
        assert re.findall(r"\]\((?!https://)", cell.source) == []


# All together.

# Colab's upload of a file, and the stacks if a cell stands still.
STUBS = f"""
import faulthandler, sys, types
import PIL.Image
faulthandler.dump_traceback_later({TIMEOUT}, exit=True, file=open("stacks", "w"))

def upload():
    PIL.Image.new("RGB", (300, 200), "white").save("own.png")
    return {{"own.png": b""}}

files = types.SimpleNamespace(upload=upload)
sys.modules["google.colab"] = types.SimpleNamespace(files=files, output=None)  # JAX imports output
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # of Jupyter
def test_it_runs_and_shows_what_its_copy_shows(tmp_path):
    notebook = copy.deepcopy(NOTEBOOK)
    for cell in notebook.cells:
        cell.source = cell.source.replace("upload = False", "upload = True")
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STUBS))
    client = nbclient.NotebookClient(
        notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}
    )
    try:
        done = client.execute(env=os.environ | {"PYTHONPATH": str(ROOT)})
    except nbclient.exceptions.DeadKernelError:
        pytest.fail((tmp_path / "stacks").read_text())
    outputs = [output for cell in done.cells for output in cell.get("outputs", ())]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    printed = "".join(RENDER["texts"](cell) for cell in done.cells)
    copied = re.findall("^    (.*)", re.sub("```.*?```", "", PAGE, flags=re.DOTALL), re.MULTILINE)
    assert [line.rstrip() for line in printed.splitlines()] == [line.rstrip() for line in copied]
    size = lambda content: Image.open(io.BytesIO(content)).size
    data = [output.data["image/png"] for output in outputs if "data" in output]
    sizes = [size(base64.b64decode(picture)) for picture in data]
    folder = RENDER["PAGE"].with_suffix("")
    assert sizes == [size((folder / f"{n}.png").read_bytes()) for n in range(len(sizes))]
    assert len(sizes) == 7 and max(np.ravel(sizes)) < 1400


def run_alone(cell: str, **settings: str) -> dict:
    """What a cell shows with a model of its own, {label: images}; its form is filled in."""
    shown, samples = {}, types.SimpleNamespace(images="images")
    model = types.SimpleNamespace(class_names=("cat",), sample=lambda names: samples)
    names = {"packages": ROOT / "none", "Path": pathlib.Path, "sys": sys, "show": shown.update}
    names["Pipeline"] = types.SimpleNamespace(from_pretrained=lambda folder: model)
    for name, value in settings.items():
        assert f'{name} = ""  # @param' in cell
        cell = cell.replace(f'{name} = ""', f'{name} = "{value}"')
    exec(cell, names)
    return shown


@pytest.mark.parametrize("token", ["", "of the environment"])
def test_published_weights_are_fetched_with_a_token(monkeypatch, tmp_path, token):
    """That of the machine, or, without one, what the user enters."""
    from nvg_jax import hub
    from nvg_jax.jobs import conversion

    def download(name, generator):
        calls.append((name, generator, os.environ["HF_TOKEN"]))
        return "ae.ckpt", generator

    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("getpass.getpass", lambda prompt: "secret")
    used = token or "secret"
    monkeypatch.setattr(hub, "download_published", download)
    monkeypatch.setattr(conversion, "convert", lambda *arguments: calls.append(arguments))
    folder = tmp_path / "authors_nvg_d16.ckpt"
    folder.mkdir()  # a conversion was cut off
    shown = run_alone(HUB, hub_repository="authors/nvg", generator_file="d16.ckpt")
    assert shown == {"golden retriever": "images"}
    assert calls == [("authors/nvg", "d16.ckpt", used), (folder.name, "ae.ckpt", "d16.ckpt")]
    (folder / "config.json").touch()
    run_alone(HUB, hub_repository="authors/nvg", generator_file="d16.ckpt")
    assert len(calls) == 2  # it is there
    run_alone(HUB, hub_repository="authors/nvg", generator_file="d20.ckpt")
    assert calls[3][0] == "authors_nvg_d20.ckpt"  # and another generator is not


def test_the_last_cell_trains_on_the_given_folder(monkeypatch):
    from nvg_jax import train

    trained, log = [], logging.getLogger("nvg_jax")  # which the cell redirects
    for name in ("handlers", "propagate"):
        monkeypatch.setattr(log, name, getattr(log, name))
    monkeypatch.setattr(log, "setLevel", lambda level: None)
    monkeypatch.setattr(train, "train", lambda config, workdir: trained.append((config, workdir)))
    assert run_alone(TRAIN, pictures="flowers") == {"cat": "images"}
    ((config, workdir),) = trained
    assert (config.data.data_dir, workdir) == ("flowers", "runs/mine")
    assert config.tokenizer.image_size == (64, 64)
