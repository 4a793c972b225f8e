"""An export: config.json and safetensors, in three dtypes and any number of files."""

import hashlib
import json
import os
import pickle
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import flip_bit, python
from safetensors import safe_open

from nvg_jax import Pipeline
from nvg_jax.errors import UserError
from nvg_jax.runtime import export
from nvg_jax.runtime.storage import fingerprint, sealed

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_weights_are_rounded_once_and_other_tools_can_read_them(pipe, tmp_path, dtype):
    pipe.save_pretrained(tmp_path / "unfinished", dtype)
    assert Pipeline.from_pretrained(tmp_path / "unfinished").metadata.fingerprint is None
    finished = fingerprint(jax.device_get(pipe.params["tokenizer"]))
    pipe = Pipeline(pipe.metadata.replace(fingerprint=finished), pipe.params)
    pipe.save_pretrained(tmp_path, dtype)
    numbers = dict(float32=np.float32, bfloat16=ml_dtypes.bfloat16, float16=np.float16)[dtype]
    expected = jax.tree.map(lambda x: np.asarray(x).astype(numbers), pipe.params)
    with safe_open(tmp_path / WEIGHTS, "numpy") as file:
        bias = file.get_tensor("content.token_head.bias")
        assert len(file.keys()) == len(jax.tree.leaves(pipe.params))
    # Others may read them as far as any new file.
    modes = {(tmp_path / name).stat().st_mode for name in (WEIGHTS, "config.json")}
    assert len(modes) == 1
    assert bias.dtype == numbers
    np.testing.assert_array_equal(bias, expected["content"]["token_head"]["bias"])

    again = Pipeline.from_pretrained(tmp_path)
    expected = jax.tree.map(lambda x: x.astype(np.float32), expected)
    jax.tree.map(np.testing.assert_array_equal, again.params, expected)
    # Generators are matched with their tokenizer by the weights that are read.
    name = pipe.metadata.fingerprint if dtype == "float32" else fingerprint(expected["tokenizer"])
    assert again.metadata == pipe.metadata.replace(fingerprint=name)


def test_a_large_model_is_in_several_files_with_an_index(pipe, tmp_path, monkeypatch):
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(pipe.params)]
    limit = max(*sizes, sum(sizes) // 3)
    monkeypatch.setattr(export, "MAX_FILE", limit)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 2 and index["metadata"]["total_size"] == sum(sizes)
    assert files == [f"model-0000{i + 1}-of-0000{count}.safetensors" for i in range(count)]
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "numpy") as opened:
            assert name in opened.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", INDEX, *files}
    assert all((tmp_path / file).stat().st_size < limit + 2**16 for file in files)
    again = Pipeline.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, pipe.params)
    # A smaller one leaves nothing of it.
    monkeypatch.undo()
    pipe.save_pretrained(tmp_path, "float16")
    config, weights = sorted(path.name for path in tmp_path.iterdir())
    assert config == "config.json" and re.fullmatch(r"model-[0-9a-f]{8}\.safetensors", weights)
    with safe_open(tmp_path / weights, "numpy") as file:
        assert file.get_tensor("content.token_head.bias").dtype == np.float16


def test_damage_is_found_and_named(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["files"]
    assert stored == {WEIGHTS: hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()}
    for name, message in (
        (WEIGHTS, "model.safetensors is damaged .its SHA-256 differs"),
        ("config.json", "config.json is (damaged or was edited|not JSON)"),
    ):
        flip_bit(tmp_path / name, (tmp_path / name).stat().st_size // 2)
        with pytest.raises(UserError, match=message):
            Pipeline.from_pretrained(tmp_path)
        flip_bit(tmp_path / name, (tmp_path / name).stat().st_size // 2)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UserError, match="lacks model.safetensors. Copy the folder again, whole"):
        Pipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("files", [{"/etc/hostname": "x"}, {"../model.safetensors": "x"}, {}, None])
def test_a_config_names_no_other_files(pipe, tmp_path, files):
    """Anyone can compute its checksum; a message must not advise to delete /etc/hostname."""
    pipe.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["digest"]
    (tmp_path / "config.json").write_text(sealed(content | {"files": files}))
    with pytest.raises(UserError, match="config.json does not name the files of a model"):
        Pipeline.from_pretrained(tmp_path)


def test_a_model_that_is_replaced_while_it_is_read_is_read_again(pipe, tmp_path, monkeypatch):
    """As the best one of a training that goes on."""
    pipe.save_pretrained(tmp_path)
    params, digest = jax.tree.map(lambda x: 2 * x, pipe.params), export.sha256

    def replaced(path):
        monkeypatch.setattr(export, "sha256", digest)
        Pipeline(pipe.metadata, params).save_pretrained(tmp_path)
        return digest(path)

    monkeypatch.setattr(export, "sha256", replaced)
    found = Pipeline.from_pretrained(tmp_path).params
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_weights_that_do_not_fit_are_refused(pipe, tmp_path):
    params = {**pipe.params, "structure": {"head": np.full(3, 1e5, np.float32)}}
    with pytest.raises(UserError, match="structure.head has values .* too large for float16"):
        Pipeline(pipe.metadata, params).save_pretrained(tmp_path, "float16")
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="float32, bfloat16, float16, got 'int8'"):
        pipe.save_pretrained(tmp_path, "int8")


def test_the_model_of_another_program_is_left_alone(pipe, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    with pytest.raises(UserError, match="holds a model of another program; export to another fol"):
        pipe.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == b"weights"


def test_an_interrupted_export_leaves_the_earlier_one(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path, "float16")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe.save_pretrained(tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    Pipeline.from_pretrained(tmp_path)


def test_an_export_stopped_after_its_weights_leaves_the_earlier_one(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path, "float16")
    before = Pipeline.from_pretrained(tmp_path).params
    replace = os.replace

    def interrupted(source, target):
        if target.name == "config.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe.save_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, Pipeline.from_pretrained(tmp_path).params, before)
    monkeypatch.undo()
    pipe.save_pretrained(tmp_path)
    after = Pipeline.from_pretrained(tmp_path).params
    jax.tree.map(np.testing.assert_array_equal, after, pipe.params)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_an_export_has_no_paths_of_this_machine(pipe, tmp_path):
    config = {"data": {"name": "tfds:a/b", "data_dir": "/disk/data"}, "init_from": "gs://b/x"}
    metadata = pipe.metadata.replace(config=config, tokenizer_workdir="/disk/run")
    Pipeline(metadata, pipe.params).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["config"] == {"data": {"name": "tfds:a/b", "data_dir": ""}, "init_from": ""}
    assert written["tokenizer_workdir"] is None


@pytest.mark.slow
def test_opening_a_model_imports_nothing_that_only_training_needs():
    script = """
import sys
from nvg_jax import Pipeline
Pipeline.from_pretrained("fashion_mnist")
print(*(set(sys.argv[1].split()) & set(sys.modules)))
"""
    trained = "orbax tensorflow tensorflow_datasets clu grain sklearn optax ml_collections"
    done = python("-c", script, trained)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_assigned_settings_are_saved(pipe, tmp_path):
    pipe = Pipeline(pipe.metadata, pipe.params)  # the tests share the other one
    pipe.metadata = pipe.metadata.replace(fid=1.5)
    top_p = np.linspace(1, 0.5, pipe.tokenizer.config.num_stages)
    pipe.settings = pipe.settings.updated(
        {"flow_steps": np.int64(3), "temperature": np.float64(0.5), "top_p": top_p}
    )
    pipe.save_pretrained(tmp_path)
    again = Pipeline.from_pretrained(tmp_path)
    assert (again.settings.flow_steps, again.settings.temperature) == (3, 0.5)
    assert again.settings.top_p == tuple(top_p)
    assert again.metadata.fid is None  # it was of the settings before


def test_changed_weights_are_not_taken_for_the_tokenizer_of_before(pipe, tmp_path):
    """In files of float32, too; what is known of the model's quality is forgotten."""
    finished = fingerprint(jax.device_get(pipe.params["tokenizer"]))
    changed = Pipeline(pipe.metadata.replace(fid=1.5, fingerprint=finished), pipe.params)
    changed.save_pretrained(tmp_path / "same")
    same = Pipeline.from_pretrained(tmp_path / "same").metadata
    assert (same.fingerprint, same.fid) == (finished, 1.5)
    before = changed.fingerprint
    changed.params = jax.tree.map(lambda x: 2 * x, pipe.params)
    assert changed.fingerprint != before
    changed.save_pretrained(tmp_path / "other")
    other = Pipeline.from_pretrained(tmp_path / "other").metadata
    assert other.fingerprint not in (None, finished) and other.fid is None


def test_a_pipeline_is_pickled(pipe):
    again = pickle.loads(pickle.dumps(pipe))
    assert (again.fingerprint, again.dtype) == (pipe.fingerprint, pipe.dtype)
    assert again.metadata == pipe.metadata
    with pytest.raises(AttributeError, match="dtype"):
        again.dtype = "float16"
