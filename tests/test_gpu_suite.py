"""The measurements of a GPU, with commands that need none."""

import argparse
import contextlib
import json
import re
import signal
from pathlib import Path

import jax
import pytest
from helpers import ROOT, tiny_config, wait_for

from benchmarks import gpu_suite, sampling, timed
from benchmarks.timed import Entry, run_all

HANGS = "sleep 60"


def rows(out) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def results(out) -> dict[str, str]:
    """{name: result} in the order of the lines."""
    return {row["name"]: row["result"] for row in rows(out)}


def test_order_and_results(tmp_path, capsys):
    numbers = """sh -c 'echo one; echo "{\\"seconds\\": [1, 2]}"; echo "two | three"'"""
    run_all([Entry("b", numbers, 0), Entry("a", "sh -c 'echo >&2 oh; exit 3'", 0)], tmp_path, 1)
    first, second = rows(tmp_path)
    assert (first["name"], first["code"], first["numbers"]) == ("b", 0, [{"seconds": [1, 2]}])
    assert first["last"] == ["one", '{"seconds": [1, 2]}', "two | three"]
    assert (second["name"], second["code"], second["last"]) == ("a", 3, ["oh"])
    table = (tmp_path / "results.md").read_text().splitlines()
    assert table[2].startswith("| b | done | ") and table[2].endswith(" | two   three |")
    assert table[3].startswith("| a | exit code 3 | ")
    assert (tmp_path / "b.log").read_text().startswith("one\n")
    assert capsys.readouterr().out == "b: done two | three\na: exit code 3 oh\n"


def test_an_entry_at_its_limit_ends_with_its_children(tmp_path):
    child = f"""sh -c 'trap "" TERM; {HANGS} & echo $!; wait; wait'"""
    run_all([Entry("slow", child, 0, limit=1), Entry("next", "echo", 0)], tmp_path, 1)
    assert results(tmp_path) == {"slow": "ended at its limit", "next": "done"}
    pid = rows(tmp_path)[0]["last"][0]
    wait_for(lambda: not command_of(pid))


def command_of(pid: str) -> bytes:
    """The command of a process, empty if it ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_a_training_may_save_at_its_limit(tmp_path):
    saves = f"""sh -c 'trap "echo saved; exit 75" TERM; {HANGS} & wait'"""
    run_all([Entry("train", saves, 0, limit=3)], tmp_path, 1)
    (row,) = rows(tmp_path)
    assert (row["result"], row["last"], row["final"]) == ("saved", ["saved"], True)


def test_when_the_minutes_end_results_are_kept_and_the_next_run_goes_on(tmp_path):
    count = tmp_path / "count"
    counts = f"sh -c 'echo x >> {count}'"
    hangs_once = f"sh -c 'test -e {tmp_path}/again || {{ touch {tmp_path}/again; {HANGS}; }}'"
    chosen = [
        Entry("first", counts, 0),
        Entry("cut", hangs_once, 0, limit=60),
        Entry("later", "echo", 2),
        Entry("kept", "echo", 0, keep=600),
        Entry("no_package", "echo", 0, needs="no_such_package"),
        Entry("no_file", "echo", 0, needs=f"{tmp_path}/made"),
    ]
    run_all(chosen[:1], tmp_path, minutes=1)
    run_all(chosen, tmp_path, minutes=1 / 30)
    assert list(results(tmp_path)) == [entry.name for entry in chosen]
    assert results(tmp_path)["cut"] == "ended with the minutes"
    assert re.fullmatch("not run: [01] s left, needs 2", results(tmp_path)["later"])
    assert results(tmp_path)["kept"] == "not run: 0 s left, needs 0"
    assert results(tmp_path)["no_package"] == "not run: there is no no_such_package"

    (tmp_path / "made").touch()
    run_all(chosen, tmp_path, minutes=20)
    assert count.read_text() == "x\n"
    after = results(tmp_path)
    assert after.pop("no_package").startswith("not run")
    assert set(after.values()) == {"done"}
    table = (tmp_path / "results.md").read_text().splitlines()
    assert len(table) == 2 + len(chosen)


def test_lines_that_were_cut_are_left_out(tmp_path):
    chosen = [Entry("a", "echo '{\"seconds\": [1, '", 0), Entry("b", "echo", 0)]
    run_all(chosen, tmp_path, 1)
    assert [row["numbers"] for row in rows(tmp_path)] == [[], []]
    file = tmp_path / "results.jsonl"
    file.write_text(file.read_text()[:-10])
    run_all(chosen, tmp_path, 1)
    first, cut, again = file.read_text().splitlines()
    assert [json.loads(line)["name"] for line in (first, again)] == ["a", "b"]
    run_all(chosen, tmp_path, 1)
    assert file.read_text().splitlines() == [first, cut, again]


def test_an_entry_ends_with_the_suite(tmp_path, monkeypatch):
    started = []

    def interrupt(process, timeout):
        monkeypatch.undo()
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(timed.subprocess.Popen, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_all([Entry("hangs", HANGS, 0)], tmp_path, 1)
    assert started[0].returncode == -signal.SIGKILL
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("tiny", [True, False])
def test_the_entries(tmp_path, tiny):
    args = argparse.Namespace(out=tmp_path, work=tmp_path, data_dir=tmp_path, sequences=None)
    args.tiny = tiny
    chosen = list(gpu_suite.entries(args))
    names = [entry.name for entry in chosen]
    assert len(set(names)) == len(names)
    assert names[:2] == ["sample_published_64", "sample_published_1"] and names[-1] == "parity"
    for entry in chosen:
        module = entry.command.split("python -m ")[1].split()[0]
        assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").exists()
        assert entry.least + entry.keep < 60 * 12 and entry.least < entry.limit
    encoded = tmp_path / "sequences"
    encoded.mkdir()
    (encoded / "meta.json").touch()
    assert names[8] == "emoji_encode"
    assert [entry.name for entry in gpu_suite.entries(args)] == names[:8] + names[9:]


@pytest.mark.parametrize(
    "tokenizer, solves, solutions", [({}, (), 3), ({}, (0, 2), 2), ({"structure": "grid"}, (), 0)]
)
def test_every_part_of_the_sampler_is_timed_as_often_as_it_runs(
    monkeypatch, tokenizer, solves, solutions
):
    monkeypatch.setattr(
        sampling, "seconds", lambda call, *inputs: bool(jax.eval_shape(call, *inputs))
    )
    config = tiny_config(tokenizer=tokenizer, sampling={"structure_solves": solves})
    model, settings = sampling.read_config(config)
    assert model.tokenizer.num_stages == 5
    parts = sampling.measure(sampling.random_params(model), model, 2, settings)
    once = {"decoder": 1, "structure": solutions}
    assert parts == dict.fromkeys(("content", "tokens", "canvas"), 5) | once
