"""Runs the notebook in a runtime like Colab's: `tests/fresh_machine.sh trixie FOLDER colab`.

Inside of that folder, it first gives Python the versions that Colab has (googlecolab/backend-info,
August 2026). As a GPU and as a TPU runtime, with stand-ins for their driver and device, pip is only
asked what it would install. As a CPU runtime, the notebook runs to its end, with a file uploaded
and a training; seconds and sizes are printed.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1]
CONTENT = Path("/content")
NOTEBOOK = SOURCE / "notebooks" / "nvg_jax.ipynb"
FIRST_CELL = "".join(json.loads(NOTEBOOK.read_text())["cells"][2]["source"])
COLAB = """absl-py==1.4.0 array_record==0.8.3 etils==1.14.0 flax==0.11.2 fsspec==2025.3.0
gcsfs==2025.3.0 jax==0.7.2 ml_dtypes==0.5.4 numpy==2.1.3 optax==0.2.8 orbax-checkpoint==0.12.0
pillow==11.3.0 pip==24.1.2 protobuf==5.29.6 safetensors==0.7.0 scikit-learn==1.6.1 scipy==1.16.3
setuptools==75.2.0 tensorstore==0.1.84 ipykernel nbclient""".split()
# What Colab's kernel does before the first cell, and its upload of a file.
STARTUP = """
import sys, types
import numpy, PIL.Image

def upload():
    PIL.Image.new("RGB", (300, 200), "white").save("own.png")
    return {"own.png": b""}

files = types.SimpleNamespace(upload=upload)
sys.modules["google.colab"] = types.SimpleNamespace(files=files, output=None)
"""
PIP = ("python3", "-m", "pip")
ENVIRONMENT = os.environ | {"PIP_NO_CACHE_DIR": "1", "PIP_ROOT_USER_ACTION": "ignore"}
ENVIRONMENT |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PATH": f"/stub:{os.environ['PATH']}"}


def run(*command, **options) -> str:
    options = {"check": True, "stdout": subprocess.PIPE, "env": ENVIRONMENT} | options
    return subprocess.run(command, text=True, **options).stdout


def prepare():
    """Colab's packages, and the repository at the address that the notebook has."""
    if not CONTENT.exists():
        for marker in Path("/usr/lib").glob("python3*/EXTERNALLY-MANAGED"):
            marker.unlink()
        venv = tempfile.mkdtemp()
        run("python3", "-m", "venv", venv)
        run(f"{venv}/bin/pip", "--python=/usr/bin/python3", "install", "--quiet", *COLAB)
        CONTENT.mkdir()
    startup = Path.home() / ".ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    (startup / "colab.py").write_text(STARTUP)
    address = re.search('repository = "(.*?)"', FIRST_CELL)[1]
    run("git", "config", "--global", f"url.{SOURCE}.insteadOf", address)


def would_install(*plugins: str) -> str:
    """What the first cell would install; the cell then fails, since nothing is installed.

    Args:
        plugins: of JAX, that must be among it, and no other.
    """
    report = Path(tempfile.mkdtemp()) / "report.json"
    code = f"""import subprocess
def dry_run(command, run=subprocess.run, **options):
    if "install" in command:
        command += ["--dry-run", "--report={report}"]
    return run(command, **options)
subprocess.run = dry_run
{FIRST_CELL}"""
    run("python3", "-c", code, cwd=CONTENT, check=False, stderr=subprocess.DEVNULL)
    packages = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    report.unlink()
    run("rm", "-r", CONTENT / "nvg_jax_packages")
    names = {package["name"] for package in packages}
    assert names & {"jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"} == {*plugins}, names
    return ", ".join(f"{package['name']} {package['version']}" for package in packages)


def as_gpus():
    stub = Path("/stub/nvidia-smi")
    stub.parent.mkdir(exist_ok=True)
    cuda12, cuda13 = "jax-cuda12-plugin", "jax-cuda13-plugin"
    for driver, plugin, *needed in (
        (510, True),
        (550, True, cuda12),
        (570, True, cuda12),
        (580, True, cuda12),
        (590, False, cuda13),
    ):
        stub.write_text(f"#!/bin/sh\necho {driver}.54.15\n")
        stub.chmod(0o755)
        if plugin:
            run(*PIP, "install", "--no-deps", f"{cuda12}==0.7.2")
        text = would_install(*needed)
        print(f"driver {driver}{', with a plugin for CUDA 12' * plugin}: {text}\n")
        if plugin:
            run(*PIP, "uninstall", "--yes", cuda12)
    stub.unlink()


def as_tpu():
    """In a /dev over that of the machine, which this process's mounts hide from others."""
    run(*PIP, "install", "--no-deps", "libtpu==0.0.21.1")
    folder = Path(tempfile.mkdtemp())
    for name in ("upper", "work"):
        (folder / name).mkdir()
    layers = f"lowerdir=/dev,upperdir={folder}/upper,workdir={folder}/work"
    run("mount", "-t", "overlay", "overlay", "-o", layers, "/dev")
    Path("/dev/accel0").touch()
    print(f"TPU: {would_install('libtpu')}\n")
    run("umount", "/dev")
    run(*PIP, "uninstall", "--yes", "libtpu")


def as_cpu():
    import nbclient
    import nbformat

    notebook, start = nbformat.read(NOTEBOOK, as_version=4), time.time()
    changes = {"upload = False": "upload = True", 'pictures = ""': 'pictures = "pictures"'}
    changes["image_folder:small"] = "image_folder:small,runlocal"
    for cell in notebook.cells:
        for old, new in changes.items():
            cell.source = cell.source.replace(old, new)
    make_pictures = (
        "import numpy, PIL.Image, pathlib\n"
        "for i in range(200):\n"
        "    path = pathlib.Path(f'pictures/{'ab'[i % 2]}/{i}.png')\n"
        "    path.parent.mkdir(parents=True, exist_ok=True)\n"
        "    PIL.Image.fromarray(numpy.random.randint(0, 255, (64, 64, 3), 'uint8')).save(path)\n"
    )
    run("python3", "-c", make_pictures, cwd=CONTENT)

    def say(cell, cell_index, **_):
        outputs = cell.get("outputs", ())
        text = "".join(output.get("text", "") for output in outputs)
        size = run("du", "-sm", CONTENT / "nvg_jax_packages", stderr=subprocess.DEVNULL)
        pictures = sum("data" in output for output in outputs)
        print(f"{time.time() - start:.0f} s, {size.split()[0]} MB, cell {cell_index}:", flush=True)
        print(text + f"{pictures} picture" * pictures, flush=True)

    os.environ.update(ENVIRONMENT)
    nbclient.NotebookClient(
        notebook, resources={"metadata": {"path": str(CONTENT)}}, on_cell_executed=say
    ).execute()


def imported_too_early() -> str:
    """What the first cell says if an older JAX is in use when it has installed its own."""
    code = f"import jax\n{FIRST_CELL}"
    done = subprocess.run(["python3", "-c", code], capture_output=True, text=True, cwd=CONTENT)
    return done.stderr


def main():
    if SOURCE != Path("/nvg_jax"):
        sys.exit(__doc__)
    prepare()
    run("rm", "-rf", *(CONTENT / name for name in ("nvg_jax_packages", "runs", "pictures")))
    as_gpus()
    as_tpu()
    before = run(*PIP, "freeze"), run(*PIP, "check", check=False)
    as_cpu()
    print(imported_too_early())
    after = run(*PIP, "freeze"), run(*PIP, "check", check=False)
    assert after == before, (before, after)
    print(f"pip freeze is as before, pip check too: {after[1]}")


main()
