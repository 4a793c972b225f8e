"""Cheaper settings of the structure flow that sample as well."""

import numpy as np
import pytest
from helpers import forked, random_pipeline

from nvg_jax.jobs import tuning
from nvg_jax.jobs.tuning import Point
from nvg_jax.pipeline import Pipeline


def test_candidates_are_sorted_by_their_evaluations():
    pipe = Pipeline.from_pretrained("fashion_mnist")  # three splits, no structure guidance
    points = tuning.candidates(pipe)
    assert points[0] == Point(1, {"flow_steps": 1, "structure_solves": (0,)})
    assert points == sorted(points, key=lambda point: point.evaluations)
    for evaluations, settings in points:
        solved = len(settings["structure_solves"]) or 3
        assert evaluations == solved * settings["flow_steps"] < 3 * pipe.settings.flow_steps
    both = {"structure_guidance": 2.0, "flow_steps": 8, "structure_solves": (0, 1)}
    # Eight steps from noise, then those of the eight below 0.5, and the first at 0.5.
    assert tuning.evaluations(pipe, pipe.settings.updated(both)) == 2 * 2 * 8
    both |= {"flow_restart": 0.5, "flow_shift": 1.0}
    assert tuning.evaluations(pipe, pipe.settings.updated(both)) == 2 * (8 + 4)


def test_the_cheapest_point_within_the_noise_is_chosen():
    fids = {5: [8.0, 8.0], 10: [4.9, 5.3], 20: [1.0, 1.0], 100: [4.8, 5.2]}
    points = [Point(count, {"flow_steps": count}) for count in (5, 10, 20)]
    own = Point(100, {})
    tried = []

    def measure(point):
        tried.append(point.evaluations)
        return np.array(fids[point.evaluations])

    best, lines = tuning.tune(points, own, measure)
    assert best == points[1] and tried == [100, 5, 10]  # 5.1 is no worse than 5.2
    assert lines[2] == "FID 4.90, 5.30: flow_steps=10 (10 evaluations)"
    assert tuning.tune(points[:1], own, measure)[0] == own


@pytest.mark.slow
def test_the_command_exports_the_model_with_what_it_found(tmp_path):
    pipe = random_pipeline()
    pipe.metadata = pipe.metadata.replace(fid=12.5)
    pipe.save_pretrained(tmp_path / "model")
    command = ["-m", "nvg_jax.tune_sampling", f"--workdir={tmp_path / 'model'}", "--seeds=2"]
    command += [f"--out={tmp_path / 'tuned'}", "--data_name=digits", "--num_samples=11"]
    done = forked(*command)
    assert done.returncode == 0, done.stderr
    tuned = Pipeline.from_pretrained(tmp_path / "tuned")
    found = {name: getattr(tuned.settings, name) for name in ("flow_steps", "structure_solves")}
    points = [point.settings for point in tuning.candidates(pipe)]
    assert tuned.settings == pipe.settings or found in points
    assert tuned.settings == pipe.settings.updated(found)
    assert tuned.fingerprint == pipe.fingerprint
    assert tuned.metadata.fid == (12.5 if tuned.settings == pipe.settings else None)
    assert "times fewer evaluations" in done.stdout
