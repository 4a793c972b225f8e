"""Everything that is written and read in a bucket, while the bucket fails on purpose."""

import os
import random
import signal
import time
import types

import jax
import numpy as np
import pytest
from bucket import RESET, shorten_pauses, some_requests_fail
from helpers import fork, random_pipeline, tiny_config
from test_checkpoint import META, make_state, restore, same
from test_faults import content

from nvg_jax import Pipeline, report
from nvg_jax.errors import UserError
from nvg_jax.evaluation.sets import Archive
from nvg_jax.jobs import encoding, sampling_runs
from nvg_jax.runtime import checkpoint
from nvg_jax.runtime.storage import storage_path
from nvg_jax.train import train
from nvg_jax.training import curves
from nvg_jax.training.metrics import EventWriter

KILLS = int(os.environ.get("NVG_JAX_TEST_KILLS", "2"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning"),  # gcsfs sends it
]


def outage(seconds: float, begins):
    """The bucket is gone for some time, from the first request for which `begins(method, path)`."""
    start = []

    def fault(method, path):
        if not start and begins(method, path):
            start.append(time.monotonic())
        gone = start and time.monotonic() < start[0] + seconds
        return random.choice([503, RESET]) if gone else None

    return fault


def save(*steps):
    with checkpoint.Checkpoints("gs://bucket/run", keep=2) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), META, {"next_index": step})


def assert_newest(step: int):
    state, position, found = restore("gs://bucket/run")
    assert (found, position) == (step, {"next_index": step}) and same(state, make_state(step))


def test_commands_write_to_a_bucket_and_read_from_it(bucket, tmp_path):
    pipe = random_pipeline()
    pipe.save_pretrained("gs://bucket/model")
    again = Pipeline.from_pretrained("gs://bucket/model/")
    jax.tree.map(np.testing.assert_array_equal, pipe.params, again.params)
    job = sampling_runs.SamplingJob(again, [0, 1, 2], 2, 4, 0, {})
    for place in (str(tmp_path), "gs://bucket/out"):
        sampling_runs.write_array(job, f"{place}/samples.npz")
        sampling_runs.write_pictures(job, f"{place}/pictures", 2)
    there, here = (
        {str(path)[len(str(root)) :]: path.read_bytes() for path in root.iterdir()}
        for root in (storage_path("gs://bucket/out/pictures"), storage_path(tmp_path / "pictures"))
    )
    assert len(here) == 6 + 3 and there == here
    images = [
        next(Archive(f"{p}/samples.npz", 6).batches([0])) for p in (tmp_path, "gs://bucket/out")
    ]
    np.testing.assert_array_equal(*images)
    assert not any("tmp" in name or "parts" in name for name in bucket.names())
    before = bucket.requests
    with pytest.raises(UserError, match="out must be a path on this machine, not gs://bucket/seq"):
        encoding.encode_data_set(pipe, "gs://bucket/seq", {"name": "digits", "data_dir": ""})
    assert bucket.requests == before


def test_curves_are_read_and_drawn_in_a_bucket(bucket, monkeypatch):
    folder = storage_path("gs://bucket/run")
    writer = EventWriter(folder / "tokenizer")
    writer.begin(1)
    for step, loss in ((1, 0.5), (2, 0.25)):
        writer.write_scalars(step, {"loss": loss})
        writer.flush()  # into another object
    assert curves.read_curves(folder) == {"tokenizer": {"loss": {1: 0.5, 2: 0.25}}}
    given = types.SimpleNamespace(workdir=[str(folder)], out="gs://bucket/report.png")
    monkeypatch.setattr(report, "FLAGS", given)
    report.main(None)
    assert storage_path("gs://bucket/report.png").read_bytes().startswith(b"\x89PNG")


def test_a_bucket_that_does_not_exist_is_refused(bucket):
    with pytest.raises(UserError, match="There is no bucket gs://typo"):
        checkpoint.Checkpoints("gs://typo/run")
    assert list(bucket.storage.buckets) == ["bucket"]


def test_a_tenth_of_the_requests_fails(bucket):
    bucket.fault = some_requests_fail(0.1)
    save(1, 2, 3)
    assert_newest(3)


def test_the_bucket_is_gone_during_a_save(bucket):
    save(1)
    bucket.fault = outage(3, lambda method, path: "run%2F2" in path and method == "POST")
    save(2)
    assert_newest(2)


@pytest.mark.parametrize("begin", [1, 5, 20, 60])
def test_the_bucket_is_gone_while_a_run_is_resumed(bucket, begin):
    save(1, 2)
    objects, first = bucket.names(), bucket.requests
    bucket.fault = outage(3, lambda method, path: bucket.requests >= first + begin)
    assert_newest(2)
    assert bucket.names() == objects


def test_a_failure_is_not_an_empty_folder(bucket):
    save(1)
    bucket.fault = lambda method, path: 403
    with pytest.raises(OSError, match="Forbidden"):
        storage_path("gs://bucket/run/1").is_dir()


@pytest.mark.parametrize("status", [401, 403])
def test_credentials_that_expire_and_a_full_quota(bucket, status):
    """The save fails, the checkpoint before it stays, and the run goes on from there."""
    save(1)
    bucket.fault = lambda method, path: status if method == "POST" and "run%2F2" in path else None
    with pytest.raises(Exception) as raised:
        save(2)
    assert isinstance(raised.value, UserError) == (status == 403)
    bucket.fault = lambda method, path: None
    assert_newest(1)
    save(3)  # not 2: in this process, what is left of the failed save may still write there
    assert_newest(3)


def run():
    """The work of a process."""
    train(tiny_config(part="tokenizer"), "gs://bucket/run")


def run_to_be_killed(environment):
    """`run` with the emulator, which has started after the server that forks this process."""
    os.environ |= environment
    shorten_pauses(pytest.MonkeyPatch())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # no half entries
    run()


def assert_same_run(trained):
    """As on a disk."""
    state, meta = content(storage_path("gs://bucket/run/tokenizer"))
    expected, expected_meta = content(trained / "tokenizer")
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert meta == expected_meta


def test_training_ends_with_the_same_bits(bucket, trained):
    bucket.fault, bucket.latency = some_requests_fail(0.05), 0.005
    run()
    bucket.fault = lambda method, path: None
    assert_same_run(trained)
    names = {name.split("/")[-1].split(".")[0] for name in bucket.names()}
    assert {"heartbeat", "events", "assessed"} <= names


def test_kills_change_nothing(bucket, trained):
    """Kills while requests are on their way; the run after each of them goes on."""
    rng = random.Random(int(os.environ.get("NVG_JAX_TEST_SEED", "0")))
    bucket.fault = some_requests_fail(0.01)
    reached = []
    for _ in range(KILLS):
        process = fork(run_to_be_killed, bucket.environment)
        last = bucket.requests + rng.randrange(10, 600)
        while bucket.requests < last and process.is_alive():
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        done = [name.split("/")[2:] for name in bucket.names()]
        steps = [int(place[0]) for place in done if place[1:] == ["commit_success.txt"]]
        reached.append(max(steps, default=0))
    assert reached == sorted(reached), "a kill lost finished checkpoints"
    run()
    assert_same_run(trained)
    print("after each kill:", reached)
