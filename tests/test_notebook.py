"""The notebook, run from top to bottom as a visitor would."""

import ast
import copy
import os

import nbclient
import nbformat
import pytest
from helpers import ROOT, TIMEOUT

NOTEBOOK = nbformat.read(ROOT / "notebooks" / "nvg_jax.ipynb", as_version=4)


def test_outputs_are_stripped():
    for cell in NOTEBOOK.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_what_it_takes_from_the_package_exists():
    code = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code")
    objects = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("nvg_jax"):
            exec(ast.unparse(node), objects)
    objects |= {name: objects["Pipeline"] for name in ("pipe", "imagenet")}
    called = []
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attribute)):
                if name in objects:
                    assert callable(getattr(objects[name], attribute, None)), ast.unparse(node)
                    called.append(f"{name}.{attribute}")
    assert {"pipe.sample", "control.paste"} <= set(called)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # of Jupyter
def test_it_runs_and_shows_pictures(tmp_path):
    notebook = copy.deepcopy(NOTEBOOK)
    stacks = f"""import faulthandler
faulthandler.dump_traceback_later({TIMEOUT}, exit=True, file=open("stacks", "w"))"""
    notebook.cells.insert(0, nbformat.v4.new_code_cell(stacks))
    client = nbclient.NotebookClient(
        notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}
    )
    try:
        done = client.execute(env=os.environ | {"PYTHONPATH": str(ROOT)})
    except nbclient.exceptions.DeadKernelError:
        pytest.fail((tmp_path / "stacks").read_text())
    texts, pictures = [], 0
    for cell in done.cells:
        for output in cell.get("outputs", ()):
            assert output.get("name") != "stderr", output.text
            pictures += "image/png" in output.get("data", {})
            texts.append(output.get("text", ""))
    assert pictures == 5  # samples, stages, a drawing, variations, an edit
    skipped = [text for text in texts if text.startswith("Skipped: ")]
    assert len(skipped) == 2  # what needs the published weights
