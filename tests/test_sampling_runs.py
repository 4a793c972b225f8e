"""Long sampling runs: resumed, refused, repaired, and by several processes."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import Process, finish, free_port, random_pipeline
from PIL import Image
from test_comparison import Judge

from nvg_jax import Pipeline
from nvg_jax.errors import UserError
from nvg_jax.evaluation import report, sets
from nvg_jax.jobs import classification, sampling_runs
from nvg_jax.runtime import resumable
from nvg_jax.runtime.processes import own_share
from nvg_jax.runtime.storage import locked

DATA = {"name": "digits", "data_dir": "", "resize": 8}
BATCH = 3
PER_CLASS = 5  # of the two classes below: 10 samples, four batches, the last of one sample
CLASSES = [7, 2]


def samples_of(pipe, **changes):
    values = dict(classes=CLASSES, per_class=PER_CLASS, batch_size=BATCH, seed=4, settings={})
    return sampling_runs.SamplingJob(pipe, **(values | changes))


@pytest.fixture(scope="module")
def expected(pipe):
    """The samples, made by hand: uint8 (10, 8, 8, 3)."""
    batches = ([7, 7, 7], 0), ([7, 7, 2], 3), ([2, 2, 2], 6), ([2, 2, 2], 9)
    images = [pipe.sample(ids, seed=4, first_index=first).images for ids, first in batches]
    return np.floor(255 * (np.concatenate(images)[:10] + 1) / 2).astype(np.uint8)


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory):
    """The file of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "all.npz"
    sampling_runs.write_array(samples_of(pipe), out)
    return out


def interrupted(pipe, out, after):
    """A run that ends with `after` parts written; gives the folder of its parts."""
    samples = samples_of(pipe)
    folder = out.with_name(out.name + ".parts")
    resumable.open_folder(folder, "*.npz", samples.describe(), "samples")
    for batch, output in samples.sample_all(range(after)):
        images = sampling_runs.to_uint8(output.images)
        resumable.write_arrays(folder / f"{batch:06d}.npz", {"arr_0": images})
    return folder


def start(code, *arguments):
    return Process([sys.executable, *(("-c", code) if "\n" in code else ("-m", code)), *arguments])


@pytest.mark.slow
def test_the_array_holds_the_samples_in_order_of_their_classes(whole, expected):
    with np.load(whole) as archive:
        assert archive.files == ["arr_0"]
        images = archive["arr_0"]
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, expected)
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10
    assert [path.name for path in whole.parent.iterdir()] == ["all.npz"]


def test_what_another_command_writes_is_left_to_it(pipe, tmp_path):
    write_pictures = lambda job, out: sampling_runs.write_pictures(job, out, 2)
    for place, name, write in (
        ("all.npz.parts", "all.npz", sampling_runs.write_array),
        ("pictures", "pictures", write_pictures),
    ):
        with (
            locked(tmp_path / place),
            pytest.raises(UserError, match=f"Another command is writing to .*{name}. Wait until"),
        ):
            write(samples_of(pipe), tmp_path / name)
        assert not list((tmp_path / place).iterdir())


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(pipe, exported, whole, tmp_path):
    out = tmp_path / "new" / "all.npz"
    parts = tmp_path / "new" / "all.npz.parts"
    for least in (1, 3):
        before = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
        with start(
            "nvg_jax.sample", f"--workdir={exported}", f"--out={out}", "--classes=7,2",
            f"--per_class={PER_CLASS}", f"--batch_size={BATCH}", "--seed=4",
        ) as process:  # fmt: skip
            while len(list(parts.glob("*.npz"))) < least and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            (done,) = finish(process)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        after = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
        # What was there is not made again.
        assert out.exists() or before.items() <= after.items()
    sampling_runs.write_array(samples_of(pipe), out)
    assert out.read_bytes() == whole.read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["all.npz"]


@pytest.mark.parametrize("moment", ["join", "removal"])
def test_a_run_killed_at_its_end_goes_on(pipe, whole, tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    def kill(*args, **kwargs):
        raise Killed

    out = tmp_path / "all.npz"
    parts = interrupted(pipe, out, 4)
    made = []
    monkeypatch.setattr(sampling_runs.SamplingJob, "sample", lambda *args: made.append(args))
    with monkeypatch.context() as patch:
        if moment == "join":
            patch.setattr(sampling_runs, "read_part", kill)
        else:
            patch.setattr("shutil.rmtree", kill)
        with pytest.raises(Killed):
            sampling_runs.write_array(samples_of(pipe), out)
    if moment == "removal":
        (parts / "000001.npz").unlink()  # removed in part
    assert out.exists() == (moment == "removal")
    sampling_runs.write_array(samples_of(pipe), out)
    assert out.read_bytes() == whole.read_bytes() and not made
    assert [path.name for path in tmp_path.iterdir()] == ["all.npz"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "gone"])
def test_damaged_parts_are_found_and_made_again(pipe, whole, tmp_path, monkeypatch, caplog, damage):
    out = tmp_path / "all.npz"
    path = interrupted(pipe, out, 4) / "000002.npz"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    join = sampling_runs.join_parts

    def damage_and_join(*args):
        path.unlink()
        if damage != "gone":
            path.write_bytes({"flip": content, "truncate": content[:-1], "empty": b""}[damage])
        join(*args)

    monkeypatch.setattr(sampling_runs, "join_parts", damage_and_join)
    sampling_runs.write_array(samples_of(pipe), out)
    assert out.read_bytes() == whole.read_bytes()
    assert "000002.npz is damaged or missing (" in caplog.text
    assert caplog.text.count("making it again") == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(seed=5), "seed was 4 and is 5 now"),
        (dict(classes=[2, 7]), r"classes was \[7, 2\] and is \[2, 7\] now"),
        (dict(per_class=6), "per_class was 5 and is 6 now"),
        (dict(batch_size=4), "batch_size was 3 and is 4 now"),
        (dict(settings={"top_p": 0.9}), r"top_p was \[0.5, .* and is \[0.9, 0.9, .* now"),
        (dict(settings={"flow_steps": 3}), "flow_steps was 2 and is 3 now"),
    ],
)
def test_other_settings_are_refused(pipe, whole, tmp_path, changes, message):
    out = tmp_path / "all.npz"
    parts = interrupted(pipe, out, 1)
    before = sorted(path.name for path in parts.iterdir())
    message = f"all.npz.parts holds samples made with other settings: {message}"
    with pytest.raises(UserError, match=message):
        sampling_runs.write_array(samples_of(pipe, **changes), out)
    assert sorted(path.name for path in parts.iterdir()) == before and not out.exists()
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UserError, match="folder.npz already exists and was made with other"):
        sampling_runs.write_array(samples_of(pipe), tmp_path / "folder.npz")
    with pytest.raises(UserError, match="all.npz already exists and was made with other"):
        sampling_runs.write_array(samples_of(pipe, **changes), whole)


def test_other_settings_replace_those_of_a_command_without_a_part(pipe, tmp_path):
    parts = interrupted(pipe, tmp_path / "all.npz", 0)
    open_folder = lambda seed: resumable.open_folder(parts, "*.npz", {"seed": seed}, "samples")
    (parts / "settings.json").write_text('{"seed": 1}')
    open_folder(2)
    assert json.loads((parts / "settings.json").read_text()) == {"seed": 2}
    (parts / "000000.npz").touch()
    with pytest.raises(UserError, match="seed was 2 and is 3 now"):
        open_folder(3)


def test_processes_with_different_settings_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "is_main", lambda: False)  # process 0 has written its own
    (tmp_path / "settings.json").write_text('{"seed": 1}')
    with pytest.raises(UserError, match="processes were started with .*: seed was 1 and is 2 now"):
        resumable.open_folder(tmp_path, "*.npz", {"seed": 2}, "samples")


def test_other_weights_and_unknown_files_are_refused(pipe, tmp_path):
    out = tmp_path / "all.npz"
    parts = interrupted(pipe, out, 1)
    leaves, tree = jax.tree.flatten(pipe.params)
    leaves[-1] = np.asarray(leaves[-1]) + np.float32(1e-3)
    other = Pipeline(pipe.metadata, jax.tree.unflatten(tree, leaves))
    with pytest.raises(UserError, match="model was '.*' and is '.*' now"):
        sampling_runs.write_array(samples_of(other), out)
    # Settings given by hand that are those of the folder are the same settings.
    same = dict(flow_steps=2, top_p=0.5)
    assert samples_of(pipe, settings=same).describe() == samples_of(pipe).describe()
    for content in ("[]", '{"editor.fontSize": 12}'):
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(UserError, match="settings.json is of another program. Give another"):
            sampling_runs.write_pictures(samples_of(pipe), tmp_path, 2)
    (parts / "settings.json").unlink()
    with pytest.raises(UserError, match="no settings.json that says how they were made"):
        sampling_runs.write_array(samples_of(pipe), out)
    out.write_bytes(b"something else")
    with pytest.raises(UserError, match="or not by this command"):
        sampling_runs.write_array(samples_of(pipe), out)
    assert out.read_bytes() == b"something else"


def test_a_class_of_a_long_name_has_a_file():
    name = "\u82b1" * 90  # 270 bytes
    cut = sampling_runs.in_file_name(name)
    assert name.startswith(cut) and len(cut.encode()) <= 200 < len(cut.encode()) + 3
    assert sampling_runs.in_file_name("a/b cat") == "a_b_cat"


def test_the_weights_are_hashed_once(monkeypatch):
    pipe, hashed = random_pipeline(), []
    monkeypatch.setattr("nvg_jax.pipeline.fingerprint", lambda tree: hashed.append(1) or "0")
    job = samples_of(pipe)
    descriptions = [job.describe(), job.describe(), job.with_settings({"top_p": 0.9}).describe()]
    assert len(hashed) == 1 and descriptions[0] == descriptions[1] != descriptions[2]
    pipe.params = pipe.params  # other weights
    job.describe()
    assert len(hashed) == 2


def test_a_folder_of_pictures_goes_on_where_it_was(pipe, whole, tmp_path, monkeypatch):
    out, make, made = tmp_path / "pictures", sampling_runs.SamplingJob.sample, []

    def limited(samples, batch):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(batch)
        return make(samples, batch)

    monkeypatch.setattr(sampling_runs.SamplingJob, "sample", limited)
    with pytest.raises(KeyboardInterrupt):
        sampling_runs.write_pictures(samples_of(pipe), out, columns=5)
    assert made == [0, 1] and not (out / "grid.png").exists()
    (out / "000004_7.png").rename(out / "000004_7.png.tmp")  # killed while writing it
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        sampling_runs.write_pictures(samples_of(pipe), out, columns=5)
    assert made == [1, 2]
    made.clear()
    sampling_runs.write_pictures(samples_of(pipe), out, columns=5)
    assert made == [3]
    names = [f"{i:06d}_{7 if i < 5 else 2}.png" for i in range(10)]
    others = {"grid.png", "stages.png", "settings.json"}
    assert {path.name for path in out.iterdir()} == {*names, *others}
    images = np.stack([np.asarray(Image.open(out / name)) for name in names])
    np.testing.assert_array_equal(images, np.load(whole)["arr_0"])
    with pytest.raises(UserError, match="seed was 4 and is 5 now"):
        sampling_runs.write_pictures(samples_of(pipe, seed=5), out, columns=5)
    (out / names[3]).write_bytes((out / names[3]).read_bytes()[:60])
    with pytest.raises(UserError, match="000003_7.png is not a readable image.*Delete it"):
        sampling_runs.write_pictures(samples_of(pipe), out, columns=5)


# NumPy 2.1 tries to write once more when it deletes the archive.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_and_missing_rights_end_in_a_sentence(pipe, whole, tmp_path):
    out = tmp_path / "all.npz"
    parts = interrupted(pipe, out, 3)
    message = (
        r"{} cannot be written: No space left on device. Fix the cause and run the same command"
    )
    for path in (parts / "000003.npz", out):
        temporary = path.with_name(path.name + ".tmp")
        temporary.symlink_to("/dev/full")
        with pytest.raises(UserError, match=message.format(path)):
            sampling_runs.write_array(samples_of(pipe), out)
        assert not temporary.is_symlink() and not out.exists()
    sampling_runs.write_array(samples_of(pipe), out)
    assert out.read_bytes() == whole.read_bytes()
    if os.getuid():  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(UserError, match="other.npz.parts cannot be created: Permission"):
            sampling_runs.write_array(samples_of(pipe), tmp_path / "other.npz")
        tmp_path.chmod(0o700)


TWO = """
import sys, jax
from pathlib import Path
jax.distributed.initialize("127.0.0.1:{port}", 2, int(sys.argv[1]))
from nvg_jax import Pipeline
from nvg_jax.evaluation.sets import load_split
from nvg_jax.jobs import classification, sampling_runs
from nvg_jax.runtime.processes import barrier
folder = Path({folder!r})
few = dict(name="image_folder", data_dir=str(folder / "few"), resize=8, on_bad="skip")
left = load_split(few, "train", (8, 8)).images[:, 0, 0, 0].tolist()
(folder / ("left_%d" % jax.process_index())).write_text(repr(left))
pipe = Pipeline.from_pretrained({workdir!r})
samples = sampling_runs.SamplingJob(pipe, {classes}, {per_class}, {batch}, 4, dict())
make, made = sampling_runs.SamplingJob.sample, []
sampling_runs.SamplingJob.sample = lambda self, batch: made.append(batch) or make(self, batch)
sampling_runs.write_array(samples, folder / "all.npz")
sampling_runs.write_pictures(samples, folder / "pictures", 5)
(folder / ("made_%d" % jax.process_index())).write_text(repr(made))
job = sampling_runs.SamplingJob(pipe, list(range(10)), 1, {batch}, 4, dict())
classification.report(pipe, {data}, job, folder, 64)
sys.path.insert(0, {tests!r})
from test_sampling_runs import compare_archives
compare_archives(folder / "all.npz", folder)
barrier("end")
"""


def compare_archives(samples, folder):
    """The five metrics of samples and of noise, in the features of test_comparison's stub."""
    judge = Judge()
    known = report.features_of(sets.Archive(folder / "noise.npz", 3), judge, folder / "noise")
    images = sets.Archive(samples, BATCH)
    return report.compare(images, known, judge, folder / "compared.json", {})


@pytest.mark.slow
def test_two_processes_share_the_work(pipe, exported, whole, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "noise.npz", noise)
    code = TWO.format(
        port=free_port(), folder=str(tmp_path), workdir=str(exported), data=DATA, classes=CLASSES,
        per_class=PER_CLASS, batch=BATCH, tests=str(Path(__file__).parent),
    )  # fmt: skip
    for split in ("train", "test"):
        (tmp_path / "few" / split / "cat").mkdir(parents=True)
    for number in range(7):  # numbers 2 and 5 are no pictures, process 0 looks at one of them
        file = tmp_path / "few" / "train" / "cat" / f"{number}.png"
        Image.new("L", (8, 8), number).save(file)
        if number in (2, 5):
            file.write_bytes(b"no image")
    with start(code, "0") as one, start(code, "1") as two:
        for done in finish(one, two):
            assert done.returncode == 0, done.stderr
    for index in (0, 1):
        assert (tmp_path / f"left_{index}").read_text() == "[0, 1, 3, 4, 6]"
    assert (tmp_path / "all.npz").read_bytes() == whole.read_bytes()
    assert not (tmp_path / "all.npz.parts").exists()
    # Batches 0 and 2, and 1 and 3: once for the array and once for the pictures.
    assert (tmp_path / "made_0").read_text() == "[0, 2, 0, 2]"
    assert (tmp_path / "made_1").read_text() == "[1, 3, 1, 3]"
    pictures = sorted((tmp_path / "pictures").glob("0*_*.png"))
    images = np.stack([np.asarray(Image.open(path)) for path in pictures])
    np.testing.assert_array_equal(images, np.load(whole)["arr_0"])
    assert (tmp_path / "pictures" / "stages.png").exists()
    # Measured on the same reconstructions and samples as by one process.
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "noise.npz", alone)
    figures = compare_archives(whole, alone)
    shared = json.loads((tmp_path / "compared.json").read_text())
    for name in ("fid", "sfid", "inception_score", "precision", "recall"):
        assert shared[name] == pytest.approx(figures[name], rel=1e-9), name
    job = sampling_runs.SamplingJob(pipe, list(range(10)), 1, BATCH, 4, {})
    one = classification.report(pipe, DATA, job, alone, 64)
    two = json.loads((tmp_path / "metrics.json").read_text())
    for name, value in flatten_dict(json.loads(json.dumps(one))).items():
        expected = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
        assert flatten_dict(two)[name] == expected, name
    for name in ("samples.png", "stages.png", "reconstructions.png"):
        assert (tmp_path / name).read_bytes() == (alone / name).read_bytes()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_item_has_one_process(monkeypatch, count):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    shares = []
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        shares += own_share(count)
    assert sorted(shares) == list(range(count))


def test_an_unreadable_image_is_named_or_left_out(tmp_path, caplog):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "b.png").write_bytes(b"no image")
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "train" / "cat" / "a.png")
    Image.new("RGB", (8, 8), (0, 0, 0)).save(tmp_path / "train" / "cat" / "c.png")
    data = {"name": "image_folder", "data_dir": str(tmp_path), "resize": 8, "on_bad": "error"}
    with pytest.raises(UserError, match="b.png: not an image of a known format. Repair it"):
        sets.load_split(data, "train", (8, 8))
    data["on_bad"] = "skip"
    loaded = sets.load_split(data, "train", (8, 8))
    np.testing.assert_array_equal(loaded.images[:, 0, 0], [[255, 0, 0], [0, 0, 0]])
    assert loaded.labels.tolist() == [0, 0] and "b.png" in caplog.text
    split = sets.Split(data, "train", (8, 8), batch_size=3)
    (batch,) = split.batches(range(split.num_batches))
    assert len(split) == 2 and sorted(batch[:, 0, 0, 0]) == [0, 255]
    with pytest.raises(UserError, match="None of the 1 images"):
        sets.load_split(data, "test", (8, 8))
