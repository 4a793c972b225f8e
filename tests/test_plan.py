"""What a training says before its first step, by numbers that a person can check."""

import dataclasses
import json
import re
import subprocess
import types
from unittest.mock import Mock

import jax
import pytest
from helpers import ROOT, tiny_config
from PIL import Image

from nvg_jax.data import open_source
from nvg_jax.errors import UserError
from nvg_jax.jobs import training
from nvg_jax.parts import CHOICES, TOKENIZER
from nvg_jax.runtime import sharding
from nvg_jax.runtime.storage import storage_path
from nvg_jax.training import plan, registry
from nvg_jax.training.length import Origin
from nvg_jax.training.run import open_run


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    config = tiny_config()
    config.generator_training.optimizer.warmup_steps = -1
    config.generator_training.save_every = -1
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with sharding.in_mesh(mesh):
        run = open_run(config, storage_path(tmp_path_factory.mktemp("run") / "new"), mesh)
        return run, [registry.open_trainer(run, part) for part in CHOICES["all"]]


def test_what_it_is_about_to_do(opened):
    run, trainers = opened
    lines = plan.describe(run, trainers)
    assert lines[0] == (
        "data: digits: 1,497 images to train on, 300 held out; unreadable ones stop the run "
        "(--config.data.on_bad=skip)"
    )
    assert lines[1].startswith("classes: 10: 0 (148), 1 (152), ")
    assert lines[2] == "devices: 1 x cpu (mesh: data 1, fsdp 1, tensor 1) of 1 process"
    text = "\n".join(lines)
    # 12 steps of 16 images are 0.128 of 1,497; 1e-3 at batch 256 is 6.25e-5 at 16.
    assert (
        "generators: 12 steps of 16 images (0.128 epochs), evaluated every 12 steps, saved every 1"
        in text
    )
    assert (
        "generators: learning rate 6.25e-05 (linear, 0 steps of warm-up), float32, state of" in text
    )
    assert "tokenizer: tokenizer of 209,771 parameters" in text
    assert lines[-1] == f"results: {run.workdir} (tensorboard --logdir {run.workdir})"
    # 6 steps of 16 images came before, and perhaps 6 of 32.
    later = plan.describe(run, [trainers[0].restated(Origin(6, 6 * 32))])
    assert any("12 steps of 16 images (0.192 epochs)" in line for line in later)
    # Parameters, their average and Adam's two moments, and a few counters: 16 bytes a parameter.
    assert plan.state_bytes(trainers[0]) == pytest.approx(16 * 209_771, abs=100)


def test_it_says_how_many_classes_the_model_has_that_it_starts_from(opened, monkeypatch):
    run, trainers = opened
    config = run.config.copy_and_resolve_references()
    config.init_from = "model"
    known = types.SimpleNamespace(class_names=("7", "cat", "0"))
    monkeypatch.setattr(plan, "read_model_metadata", lambda folder: known)
    line = "generators: 2 of 10 classes are those of init_from, by name"
    assert line in plan.describe(dataclasses.replace(run, config=config), trainers)
    assert line not in plan.describe(run, trainers)


def test_the_plan_is_kept(opened):
    run, trainers = opened
    plan.announce(run, trainers)
    kept = json.loads((run.workdir / "run.json").read_text())
    assert kept["config"]["generator_training"]["save_every"] == 1  # not -1
    assert kept["config"]["tokenizer"]["image_size"] == [8, 8]
    assert kept["versions"]["jax"] == jax.__version__
    assert set(kept) == {"config", "command", "commit", "versions"}
    (events,) = run.workdir.glob("events*")
    assert b"codebook_size" in events.read_bytes()
    assert b"Total: 209,771" in events.read_bytes()  # the tokenizer's parameters


def test_nothing_is_written_for_a_run_that_is_refused(opened, monkeypatch):
    run, _ = opened
    refused = Mock(side_effect=UserError("other settings"))
    monkeypatch.setattr(training.resume, "standing", refused)
    monkeypatch.setattr(plan, "announce", None)
    with pytest.raises(UserError, match="other settings"):
        training.train_parts(run, [TOKENIZER])


def test_a_commit_is_that_of_this_code(tmp_path, monkeypatch):
    """A wheel in PROJECT/.venv is not of PROJECT's commit."""
    if (ROOT / ".git").exists():  # not in a ZIP of this repository
        assert re.fullmatch("[0-9a-f]{40}(-dirty)?", plan.provenance()["commit"])
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x@x", *command], cwd=tmp_path, check=True
        )
    (tmp_path / "plan.py").write_text("")
    monkeypatch.setattr(plan, "__file__", str(tmp_path / "plan.py"))
    assert plan.provenance()["commit"] is None


def test_a_folder_is_counted_by_class(tmp_path):
    for split, counts in {"train": {"b": 3, "a": 1}, "test": {"a": 1, "b": 1}}.items():
        for name, count in counts.items():
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{index}.png")
    config = tiny_config()
    config.data.update(name="image_folder", data_dir=str(tmp_path), on_bad="skip")
    train, test = (
        open_source("image_folder", s, data_dir=str(tmp_path)) for s in ("train", "test")
    )
    run = types.SimpleNamespace(config=config, train_source=train, test_source=test)
    assert plan.describe_data(run) == [
        f"data: image_folder {tmp_path}: 4 images to train on, 2 held out; unreadable ones are "
        "skipped",
        "classes: 2: a (1), b (3)",
    ]
