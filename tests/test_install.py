"""What is installed: requirements, the command `nvg`, presets by name, wheel and sdist."""

import os
import re
import runpy
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from etils import epy
from helpers import ROOT, python, run
from test_imports import LEVELS

from configs import digits
from nvg_jax import __main__, presets
from nvg_jax.errors import UserError, comes_with
from nvg_jax.runtime import interrupts

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_the_requirements_are_a_plain_installation_and_training():
    text = (ROOT / "requirements.txt").read_text()
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    assert [line for line in lines if line] == PROJECT["dependencies"] + EXTRAS["train"]


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with epy.lazy_imports(error_callback=comes_with("train")):
        import no_such_package.inner
    command = f'pip install -e "{ROOT}[train]"'  # in a clone; a test below has an installed one
    message = f"needs no_such_package, which is not installed. Run: {command}"
    with pytest.raises(UserError, match=re.escape(message)):
        no_such_package.inner.function()
    assert {"train", "app", "tfds"} <= EXTRAS.keys()


# The command.


def nvg(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["nvg", *arguments])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    return end.value.code


def test_every_command_is_listed_and_another_is_refused(monkeypatch, capsys):
    assert set(__main__.COMMANDS) == set(LEVELS[-1])
    assert nvg(monkeypatch) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in LEVELS[-1])
    assert nvg(monkeypatch, "trian") == 2
    assert "error: nvg has no command 'trian'.\nusage:" in capsys.readouterr().err


def test_a_command_handles_ctrl_c_before_it_imports_anything(monkeypatch):
    calls = []
    monkeypatch.setattr(interrupts, "listen", lambda: calls.append("listen"))
    monkeypatch.setattr(runpy, "run_module", lambda module, **_: calls.append(module))
    monkeypatch.setattr(sys, "argv", ["nvg", "sample"])
    __main__.main()
    assert calls == ["listen", "nvg_jax.sample"]


# Presets.


def test_presets_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert presets.load("digits:demo") == digits.get_config("demo")
    assert presets.load(str(ROOT / "configs" / "digits.py")) == digits.get_config()
    assert presets.names() == ["digits", "emoji", "fashion_mnist", "image_folder", "imagenet256"]
    for name in ("cats", "configs/digits.py", "common"):
        with pytest.raises(UserError, match=f"no configuration {name}. .* a preset: digits, emoji"):
            presets.load(f"{name}:demo")
    with pytest.raises(UserError, match="Unknown variant 'dmo'; choose from demo, runlocal"):
        presets.load("digits:dmo")


def test_a_file_of_ones_own_builds_on_presets(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != ROOT])
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "rates.py").write_text("RATE = 7")
    (folder / "mine.py").write_text(
        "from configs import digits, rates\n"
        "def get_config(arg=None):\n"
        "    config = digits.get_config(arg)\n"
        "    config.seed = rates.RATE\n"
        "    return config\n"
    )
    config = presets.load(f"{folder / 'mine.py'}:demo")
    assert config.seed == 7
    config.seed = 0
    assert config == digits.get_config("demo")


# Wheel and sdist.


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(tracked files, sdist, wheel made from the unpacked sdist)."""
    pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    folder = tmp_path_factory.mktemp("built")
    listed = ["git", "ls-files"]
    tracked = [name for name in run(listed).stdout.splitlines() if (ROOT / name).is_file()]
    for name in tracked:
        copy = folder / "clone" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())

    def build(kind: str, source: Path) -> Path:
        script = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
        done = python("-c", script, cwd=source)
        assert done.returncode == 0, done.stderr
        assert "is absent from" not in done.stderr  # a folder that only newer setuptools leave out
        return next(folder.glob("*.tar.gz" if kind == "sdist" else "*.whl"))

    sdist = build("sdist", folder / "clone")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return tracked, sdist, build("wheel", folder / sdist.name.removesuffix(".tar.gz"))


@pytest.mark.slow
def test_the_sdist_is_the_whole_repository(built):
    tracked, sdist, _ = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked) <= names


@pytest.mark.slow
def test_the_wheel_has_the_package_and_the_presets(built):
    tracked, _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {name for name in tracked if name.startswith("nvg_jax/")}
    presets = {name for name in tracked if name.startswith("configs/")}
    assert names == expected | {f"nvg_jax/{name}" for name in presets}
    assert wheel.stat().st_size < 10e6


# Runs `nvg` without what the extras would install.
PLAIN = "import sys; sys.modules |= dict.fromkeys(sys.argv.pop(1).split(','))\n"
MISSING = "tensorflow,tensorflow_datasets,grain,array_record,sklearn,tensorboard,gcsfs,gradio"
MISSING += ",clu,huggingface_hub"
NVG = PLAIN + "from nvg_jax.__main__ import main; main()"
SAMPLE = (
    PLAIN
    + """
import nvg_jax
from nvg_jax import presets
pipe = nvg_jax.Pipeline.from_pretrained("fashion_mnist")
images = pipe.sample(["Bag"], flow_steps=1).images
print(nvg_jax.__file__, images.shape, presets.load("digits:demo").data.name)
"""
)


@pytest.mark.slow
def test_a_wheel_without_extras_samples_and_says_what_else_needs(built, tmp_path):
    *_, wheel = built
    site = tmp_path / "site"
    place = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)})
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", f"--target={site}", wheel]
    done = python(*pip, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run([site / "bin" / "nvg", "--help"], **place)
    assert done.returncode == 0 and "\n  sample " in done.stdout, done.stderr

    def without_extras(script, *arguments):
        return python("-c", script, MISSING, *arguments, **place)

    done = without_extras(SAMPLE)
    package = site / "nvg_jax" / "__init__.py"
    assert done.stdout == f"{package} (1, 32, 32, 3) digits\n", done.stderr
    config = "--config=digits:demo"
    for command, package, extra in (
        (["train", config, f"--workdir={tmp_path / 'run'}"], "sklearn", "train"),
        (["report", "--workdir=x"], "tensorboard", "train"),
        (["app"], "gradio", "app"),
    ):
        done = without_extras(NVG, *command)
        message = (
            f'This needs {package}, which is not installed. Run: pip install "nvg_jax[{extra}]"'
        )
        assert (done.returncode, done.stderr) == (2, f"error: {message}\n")
