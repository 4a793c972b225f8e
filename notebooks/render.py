"""Runs the notebook and writes docs/notebook.md: `.venv/bin/python notebooks/render.py`.

Before, it writes the address of the repository, which pyproject.toml has, into the notebook's links
and its installation.
"""

import base64
import re
import shutil
import tomllib
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "nvg_jax.ipynb"
PAGE = ROOT / "docs" / "notebook.md"
HEAD = f"*[{NOTEBOOK.name}](../notebooks/{NOTEBOOK.name}), run on a CPU.*"
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
OWNED = re.compile(r"(?<=github\.com/)[\w-]+/nvg_jax|(?<=/github/)[\w-]+/nvg_jax")


def shown(cell) -> str:
    """A cell as Colab shows it, with forms instead of code; links stay within docs/."""
    if cell.cell_type == "markdown":
        return cell.source.replace(f"{REPOSITORY}/blob/main/docs/", "")
    if "display-mode" in cell.source:
        fields = re.findall("^(.*?) = .*# @param", cell.source, re.MULTILINE)
        return f"*A form: {', '.join(f'`{field}`' for field in fields)}.*"
    return "```python\n" + re.sub("^# @title.*\n|  # @param.*", "", cell.source) + "\n```"


def texts(cell) -> str:
    """What a cell printed."""
    return "".join(output.get("text", "") for output in cell.get("outputs", ()))


def main():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = OWNED.sub(REPOSITORY.removeprefix("https://github.com/"), cell.source)
    nbformat.write(notebook, NOTEBOOK)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}).execute()
    shutil.rmtree(PAGE.with_suffix(""), ignore_errors=True)
    PAGE.with_suffix("").mkdir()
    parts, heading, count = [], "", 0
    for cell in notebook.cells:
        parts.append(shown(cell))
        heading = [heading, *re.findall("^#+ (.*)", shown(cell), re.MULTILINE)][-1]
        if texts(cell):
            parts.append("\n".join(f"    {line}" for line in texts(cell).splitlines()))
        for output in cell.get("outputs", ()):
            if "data" in output:
                picture = PAGE.with_suffix("") / f"{count}.png"
                picture.write_bytes(base64.b64decode(output.data["image/png"]))
                parts.append(f"![{heading}]({picture.relative_to(PAGE.parent)})")
                count += 1
    PAGE.write_text("\n\n".join([parts[0], HEAD, *parts[1:]]) + "\n")


if __name__ == "__main__":
    main()
