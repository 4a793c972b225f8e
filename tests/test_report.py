"""Trainings side by side: tables and curves."""

import json

import pytest
from etils import epath
from PIL import Image

from launch import sweep
from nvg_jax.errors import UserError
from nvg_jax.training import curves
from nvg_jax.training.metrics import EventWriter


@pytest.fixture
def workdirs(tmp_path):
    """Two trainings of a tokenizer; the second one went on from its second step."""
    for name, rate, psnr in (("a", 0.1, 20.0), ("b", 0.2, 21.0)):
        folder = tmp_path / name / "tokenizer"
        writer = EventWriter(epath.Path(folder))
        writer.begin(1)
        for step in (1, 2, 3):
            writer.write_scalars(step, {"loss": 1 / step, "quantizer_stage_loss/0": 1.0})
        writer.flush()
        if name == "b":
            writer = EventWriter(epath.Path(folder))
            writer.begin(3)
            writer.write_scalars(3, {"loss": 0.25})
        writer.write_scalars(3, {"test_psnr": psnr})
        writer.flush()
        config = {"tokenizer_training": {"optimizer": {"learning_rate": rate}, "batch_size": 8}}
        (tmp_path / name / "run.json").write_text(json.dumps({"config": config}))
    return {name: str(tmp_path / name) for name in ("a", "b")}


def test_each_step_once_with_the_value_that_counts(workdirs):
    loss = curves.read_curves(epath.Path(workdirs["b"]))["tokenizer"]["loss"]
    assert loss == {1: 1.0, 2: 0.5, 3: 0.25}


def test_a_table_of_differences_and_last_numbers_the_best_run_first(workdirs):
    text = curves.tables(*curves.read(workdirs))
    assert [line.split() for line in text.splitlines()] == [
        ["settings", "that", "differ"],
        ["b", "a"],
        ["tokenizer_training.optimizer.learning_rate", "0.2", "0.1"],
        [],
        ["tokenizer"],
        ["step", "test_psnr", "loss"],
        ["b", "3", "21", "0.25"],
        ["a", "3", "20", "0.3333"],
    ]


def test_the_lowest_fid_wins():
    runs = {
        "a": {"generators": {"fid": {10: 5.0, 20: 9.0}}},
        "b": {"generators": {"fid": {10: 7.0, 20: 6.0}}},
    }
    assert curves.rank(runs) == ["a", "b"]


def test_a_folder_without_a_training(tmp_path):
    with pytest.raises(UserError, match="holds no training with curves"):
        curves.read({"x": str(tmp_path)})


def test_settings_that_are_damaged(workdirs, tmp_path):
    (tmp_path / "a" / "run.json").write_text('{"config": {"seed"')
    with pytest.raises(UserError, match="run.json is damaged .* training writes it again"):
        curves.read(workdirs)


def test_one_picture_of_all_curves(workdirs, tmp_path):
    runs, _ = curves.read(workdirs)
    curves.draw(runs, epath.Path(tmp_path / "out" / "report.png"))
    picture = Image.open(tmp_path / "out" / "report.png")
    assert picture.width > picture.height > 300 and len(picture.convert("RGB").getcolors(10**6)) > 9


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
def test_a_sweep_ends_with_the_table(workdirs, tmp_path, monkeypatch, capsys):
    """The runs start in the repository, whatever the folder of the sweep's command."""
    for name, run in (("a", "seed=1"), ("b", "seed=2")):
        (tmp_path / name).rename(tmp_path / run)
    file = tmp_path / "mine.py"
    file.write_text(
        "CONFIG = 'digits:demo'\ndef get_sweep():\n    return [{'seed': 1}, {'seed': 2}]\n"
    )
    started = []
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sweep, "run", lambda command: started.append(command) or 0)
    command = ["sweep.py", f"--sweep={file}", "--workdir=.", "--submit"]
    monkeypatch.setattr("sys.argv", command)
    sweep.main()
    assert len(started) == 2
    runs = {name: str(tmp_path / name) for name in ("seed=1", "seed=2")}
    assert capsys.readouterr().out.endswith(f"\n{curves.tables(*curves.read(runs))}\n")
