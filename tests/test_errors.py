"""What ends a command: a user's mistake with one line and code 2, all else with its traceback."""

import errno
import json
import os
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from helpers import Process, finish, forked, free_port, python, raising, tiny_config

from nvg_jax.data.sources import ArraySource
from nvg_jax.errors import UserError, is_damage, is_failure, is_mistake, reported
from nvg_jax.runtime import checkpoint, hardware, sharding
from nvg_jax.train import train


def wrong_shape():
    return jnp.zeros(3) + jnp.zeros(4)


# As the network, the disk, TensorStore and a programmer raise them.
FAILURES = {
    "timeout": raising(TimeoutError("timed out")),
    "connection": raising(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")),
    "device": raising(OSError(errno.EIO, "Input/output error")),
    "tensorstore": raising(
        ValueError("ABORTED: All 1 retry attempts failed: UNAVAILABLE: Error reading gs://b/d/4")
    ),
    "array_record": raising(
        RuntimeError("pread() failed: Transport endpoint is not connected; reading 24 bytes")
    ),
    "shape": lambda *args, **kwargs: wrong_shape(),
}


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(trained / "tokenizer", folder / "tokenizer")
    return folder


def config():
    """The tokenizer alone."""
    config = tiny_config(part="tokenizer")
    config.tokenizer_training.save_every = 2
    return config


PLACES = {
    "step": (sharding, "global_batch"),
    "save": (ocp.CheckpointManager, "save"),
    "restore": (ocp.CheckpointManager, "restore"),
    "checks": (checkpoint, "damage"),
    "loader": (ArraySource, "__getitem__"),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_passes_unchanged_and_changes_no_checkpoint(
    place, kind, workdir, tmp_path, monkeypatch
):
    monkeypatch.setattr(*PLACES[place], FAILURES[kind])
    monkeypatch.setattr(checkpoint, "PAUSES", ())
    folder = workdir if place in ("restore", "checks") else tmp_path
    before = sorted(path.name for path in (folder / "tokenizer").glob("*"))
    with pytest.raises(Exception) as raised:
        train(config(), folder)
    assert not isinstance(raised.value, UserError)
    with pytest.raises(type(raised.value)) as expected:
        FAILURES[kind]()
    assert str(raised.value) == str(expected.value)
    if folder == workdir:
        assert sorted(path.name for path in (folder / "tokenizer").glob("*")) == before


def run(command: str, *arguments: str, start=forked, **environment):
    """Runs a command of `cli.main` in a process of its own."""
    script = f"from nvg_jax import cli\ndef command(_):\n    {command}\ncli.main(command)"
    return start("-c", script, *arguments, env=os.environ | environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", ["ConnectionError('gone')", "ValueError('ABORTED: All 1 retry attempts failed')"]
)
def test_a_failure_ends_with_its_traceback_and_a_code_that_is_restarted(error):
    done = run(f"raise {error}")
    assert done.returncode not in (0, 2, 75)
    assert "Traceback" in done.stderr and error.split("'")[1] in done.stderr


@pytest.mark.slow
def test_a_mistake_ends_with_one_line_and_code_2():
    mistake = "from nvg_jax.errors import UserError; raise UserError('Give --out.')"
    done = run(mistake)
    assert (done.returncode, done.stderr) == (2, "error: Give --out.\n")


@pytest.mark.parametrize(
    "line, said",
    [
        ("def get_config(): return {}['rate']", "KeyError: 'rate'"),
        # ml_collections raises others in the place of these.
        ("def get_config(): return int('many')", "ValueError: invalid literal"),
        ("def get_config(): return 'a' + 1", "TypeError: can only concatenate"),
        ("def get_config(): return json.loads('')", "JSONDecodeError: Expecting value"),
        ("def get_config(): return open('absent')", "FileNotFoundError: [Errno 2] No such file"),
        ("{}['rate']", "KeyError: 'rate'"),
    ],
)
def test_a_mistake_in_a_config_file_is_named_with_its_line(tmp_path, line, said):
    config = tmp_path / "mine.py"
    config.write_text(f"import json\n{line}\n")
    done = forked("-m", "nvg_jax.train", f"--config={config}", f"--workdir={tmp_path}")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {config}, line 2: {said}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("platforms", ["cuda", "gpu,cpu", "quantum", "tpu,cpu"])
def test_a_platform_that_is_not_there_is_a_mistake(platforms):
    done = run("print('never')", JAX_PLATFORMS=platforms)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(
        rf"error: JAX cannot use JAX_PLATFORMS={platforms} on this machine.*\n", done.stderr
    )


def test_a_tpu_that_a_launcher_asks_for_may_come_back(tmp_path):
    environment = {"JAX_PLATFORMS": "tpu,cpu", "NVG_HEARTBEAT": str(tmp_path / "beat")}
    assert run("print('never')", **environment).returncode == 1


def test_what_is_left_over_on_the_command_line_is_refused():
    done = run("print('never')", "--verbosity=-1", "1", "2")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: Unexpected arguments: 1 2. ")


def test_a_tuple_of_stages_may_be_empty_and_a_number_may_not():
    script = """
from nvg_jax import cli
cli.define_sampling_flags()
cli.parse_flags(["sample", "--structure_solves="])
print(cli.sampling_settings())
cli.parse_flags(["sample", "--flow_shift=1", "--top_p="])
"""
    done = forked("-c", script)
    assert (done.returncode, done.stdout) == (2, "{'structure_solves': ()}\n")
    assert done.stderr == "error: --top_p is empty: give a value, or leave the flag out.\n"


@pytest.mark.slow
def test_options_of_jax_from_outside_are_pinned_or_named():
    command = "import jax; print(jax.numpy.arange(3).dtype, jax.random.key(0).dtype)"
    changed = {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg"}
    done = run(command, start=python, JAX_DEFAULT_MATMUL_PRECISION="highest", **changed)
    assert done.stdout == "int32 key<fry>\n"
    lines = [line.split(" ", 1)[1] for line in done.stderr.splitlines()]
    assert lines == [
        "JAX_ENABLE_X64=True is not used: nvg_jax needs False",
        "JAX_DEFAULT_PRNG_IMPL=rbg is not used: nvg_jax needs threefry2x32",
        "JAX_DEFAULT_MATMUL_PRECISION=highest: results differ from those without it",
    ]


def test_options_of_jax_in_python_are_refused_for_training():
    with jax.enable_x64(True):
        with pytest.raises(UserError, match="Training needs jax_enable_x64=False, and .* True"):
            hardware.check_options()
        with hardware.usual_options():
            hardware.check_options()
        assert hardware.changed_options() == {"jax_enable_x64": True}
    hardware.check_options()


def test_no_home_and_no_cache_folder_is_a_mistake(monkeypatch):
    from nvg_jax import pretrained

    monkeypatch.delenv("NVG_CACHE", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(UserError, match="needs a home folder.*NVG_CACHE"):
        pretrained.cache_folder()


ONE_FAILS = """
import jax

from nvg_jax import cli
from nvg_jax.errors import UserError
from nvg_jax.runtime.processes import barrier

def command(_):
    barrier("both are there")
    if jax.process_index():
        raise {error}
    barrier("never")

cli.main(command)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "error, code, text",
    [
        ("UserError('the disk is full')", 2, "error: the disk is full"),
        ("RuntimeError('the client is closed')", 1, "RuntimeError: the client is closed"),
    ],
)
def test_one_of_several_processes_ends_without_the_others(error, code, text):
    """At its exit, JAX would wait for them, which wait for it, for five minutes."""
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    command = [sys.executable, "-c", ONE_FAILS.format(error=error), address, "--num_processes=2"]
    with Process([*command, "--process_id=0"]), Process([*command, "--process_id=1"]) as one:
        (done,) = finish(one)
    assert done.returncode == code and done.stderr.splitlines()[-1] == text


def test_kinds_of_errors():
    full, gone = OSError(errno.ENOSPC, "No space left on device"), TimeoutError("timed out")
    assert is_mistake(full) and not is_failure(full)
    assert is_failure(gone) and not is_mistake(gone)
    permission = ValueError("PERMISSION_DENIED: Error writing gs://b: HTTP 403")
    assert is_mistake(permission) and not is_failure(permission)
    busy = ValueError("RESOURCE_EXHAUSTED: Quota exceeded for requests per second: HTTP 429")
    assert is_failure(busy) and not is_mistake(busy)
    expired = ValueError("PERMISSION_DENIED: Error writing gs://b [http_response_code='401']")
    assert is_failure(expired) and not is_mistake(expired)
    disk = ValueError(
        "RESOURCE_EXHAUSTED: Error writing local file: No space left on device "
        "[os_error_code='28'] [source locations='file_util.cc:1']"
    )
    assert is_mistake(disk) and not is_failure(disk)
    denied = OSError("Forbidden: https://b/o\nx does not have storage.objects.create access")
    assert is_mistake(denied) and not is_failure(denied)
    limited = OSError("Quota exceeded for quota metric 'writes'")
    limited.code = 429  # of gcsfs
    assert is_failure(limited) and not is_mistake(limited)
    damaged = ValueError("DATA_LOSS: checksum does not match")
    assert not is_failure(damaged) and not is_mistake(damaged)


def test_only_malformed_content_is_damage():
    class HttpError(Exception):  # as gcsfs raises it
        pass

    def caused(error: Exception) -> Exception:
        wrapped = Exception("Encountered error while reading array index")
        wrapped.__cause__ = error
        return wrapped

    damage = [
        FileNotFoundError(errno.ENOENT, "state/_METADATA"),
        json.JSONDecodeError("Expecting value", "", 0),
        KeyError("metadata"),
        ValueError("DATA_LOSS: Error reading local file: CRC-32C mismatch"),
        caused(ValueError("OUT_OF_RANGE: Requested byte range is not valid")),
    ]
    others = [
        TimeoutError("late"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError("Forbidden: b/run/2"),
        HttpError("Backend error, 503"),
        ValueError("UNAVAILABLE: HTTP 503"),
        ValueError("UNAUTHENTICATED: HTTP 401"),
        ValueError("PERMISSION_DENIED: HTTP 403"),
        caused(ValueError("DEADLINE_EXCEEDED: 60s")),
        RuntimeError("the client is closed"),
    ]
    assert [is_damage(error) for error in damage] == [True] * len(damage)
    assert [is_damage(error) for error in others] == [False] * len(others)


def test_reported_passes_failures_and_explains_mistakes(tmp_path):
    with pytest.raises(TimeoutError), reported("it cannot be read"):
        raise TimeoutError
    with (
        pytest.raises(
            UserError, match=r"it cannot be read: No such file or directory \(.*missing\)\. Fix"
        ),
        reported("it cannot be read"),
    ):
        (tmp_path / "missing").read_bytes()
