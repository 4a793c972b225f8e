"""A rehearsal of a training: what it says, what it leaves behind, and what it adds up."""

import itertools
import re
import time
import types
from unittest.mock import Mock

import jax
import pytest
from helpers import tiny_config
from ml_collections import ConfigDict

from nvg_jax.errors import UserError
from nvg_jax.jobs.encoding import encode_data_set
from nvg_jax.parts import CHOICES
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime import checkpoint, sharding, storage
from nvg_jax.runtime.storage import storage_path
from nvg_jax.train import train
from nvg_jax.training import plan, rehearsal
from nvg_jax.training.rehearsal import Cost, summary


def test_what_a_run_costs():
    costs = [Cost(60, 3000, 300, 0, 240), Cost(60, 6000, 900, 300, 0.0)]
    # 10,860 s are 3.02 h; on 4 devices 12.1 h, at 2.50 an hour 30.17.
    assert summary(costs, 4, 2.5) == (
        "3.02 h on 4 devices, 12.1 device-hours (compiling 1%, steps 83%, evaluations 11%, fid 3%, "
        "saving 2%), 30.17 at 2.5 an hour"
    )
    assert summary(costs[:1], 1, 0).startswith("1 h on 1 device, 1 device-hours (compiling 2%, ")


@pytest.mark.slow
def test_a_rehearsal_ticks_what_works_and_leaves_nothing(tmp_path, capsys):
    config = tiny_config()
    config.generator_training.update(fid_every=6, fid_samples=32)
    train(config, tmp_path / "run", check=True, price=3.0)
    text = capsys.readouterr().out
    assert "classes: 10: 0 (148), 1 (152), " in text
    assert "✓ data: 1,497 and 300 images open" in text
    assert "✓ workdir: a checkpoint is written and read back in " in text
    for part in ("tokenizer", "generators"):
        assert re.search(rf"✓ {part}: compiled in \d+ s", text)
        assert re.search(rf"✓ {part}: needs [\d.e-]+ GiB of memory per device", text)
        assert re.search(rf"✓ {part}: a step of 16 images takes [\d.]+ s and its data", text)
        assert re.search(rf"✓ {part}: a save takes [\d.e-]+ s", text)
    assert "tokenizer: a measurement of FID" not in text
    assert re.search(r"✓ generators: a measurement of FID takes [\d.]+ s", text)
    assert re.search(r"the whole run: [\d.e-]+ h on \d+ devices?, .* at 3 an hour", text)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rehearsal_on_cached_sequences(trained, tmp_path, capsys):
    pipe = Pipeline.from_pretrained(trained)
    encode_data_set(pipe, tmp_path / "cache", pipe.metadata.config["data"])
    config = tiny_config(part="generators", tokenizer_workdir=str(trained))
    config.data.update(name="sequences", data_dir=str(tmp_path / "cache"))
    train(config, tmp_path / "run", check=True)
    assert "✓ generators: a step of 16 images takes" in capsys.readouterr().out


def test_a_rehearsal_leaves_what_others_write_meanwhile(tmp_path):
    run = types.SimpleNamespace(workdir=storage_path(tmp_path / "run"))
    with rehearsal.scratch_folder(run):
        (tmp_path / "run" / "notes.txt").touch()
    assert [path.name for path in run.workdir.iterdir()] == ["notes.txt"]


def test_an_evaluation_is_timed_with_its_picture(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def taking(*seconds):
        """What takes longer the first time, when it compiles."""
        times = iter(seconds)

        def call(*_):
            now[0] += next(times)

        return call

    trainer = types.SimpleNamespace(
        part=CHOICES["all"][1], held_out=taking(60.0, 2.0), picture=taking(90.0, 7.0)
    )
    run = types.SimpleNamespace(
        config=ConfigDict(dict(generator_training=dict(eval_images=0))),
        test_source=range(10),
        test_batches=lambda recipe: iter([{"label": range(4)}]),
    )
    # Three batches of 2 s, and a picture of 7 s.
    assert rehearsal.evaluation_seconds(run, trainer, None, (None, None), 1.0) == 13.0
    trainer.held_out, trainer.picture = taking(60.0, 2.0), taking(90.0, 7.0)
    assert rehearsal.evaluation_seconds(run, trainer, None, (None, None), 5.0) == 22.0


def test_data_are_timed_without_what_was_made_ahead(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def batches():
        for number in itertools.count():
            now[0] += 2.0 if number >= 24 else 0.0  # 3 workers with 4 batches each, made and sent
            yield {"number": number}

    data = ConfigDict(dict(num_workers=3, num_threads=2, prefetch=4))
    assert rehearsal.time_data(batches(), data)[1] == 2.0


def test_only_what_is_left_is_rehearsed(monkeypatch, capsys):
    run = types.SimpleNamespace(
        train_source="12", test_source="1", pretrained={}, mesh=types.SimpleNamespace(size=1),
        config=tiny_config(wandb_project="nvg"),
    )  # fmt: skip
    parts = [types.SimpleNamespace(part=part, steps=9, open=Mock()) for part in CHOICES["all"]]
    monkeypatch.setattr(plan, "describe", lambda run, trainers: [])
    monkeypatch.setattr(rehearsal, "check_workdir", lambda run: 1.0)
    rehearsed = Mock(return_value=(Cost(0, 3600, 0, 0, 0), []))
    monkeypatch.setattr(rehearsal, "rehearse_part", rehearsed)
    rehearsal.rehearse(run, [(parts[0], 9), (parts[1], 4)], {})
    rehearsed.assert_called_once_with(run, parts[1], 4, parts[1].open(run), None)
    said = capsys.readouterr().out
    assert "what is left of the run: 1 h on 1 device" in said and "✓ wandb: version " in said
    rehearsal.rehearse(run, [(part, 9) for part in parts], {})
    assert "nothing is left to train" in capsys.readouterr().out


def test_a_workdir_that_forgets_is_named(monkeypatch, tmp_path):
    """Such as a folder that every machine of a pod has for itself."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    run = types.SimpleNamespace(workdir=storage_path(tmp_path), replicated=place)
    assert rehearsal.check_workdir(run) > 0
    assert not list(tmp_path.iterdir())
    (tmp_path / "rehearsal" / "1").mkdir(parents=True)  # of a check that was killed
    assert rehearsal.check_workdir(run) > 0
    monkeypatch.setattr(checkpoint, "read", lambda *arguments: None)
    with pytest.raises(UserError, match="rehearsal does not read back"):
        rehearsal.check_workdir(run)
    assert not list(tmp_path.iterdir())
    # Another process does not see the folder. Nothing may then wait for it.
    monkeypatch.setattr(storage, "everywhere", lambda seen: not seen)
    monkeypatch.setattr(checkpoint, "Checkpoints", None)
    with pytest.raises(UserError, match="Not every process sees .*that all processes share"):
        rehearsal.check_workdir(run)
    assert not list(tmp_path.iterdir())
