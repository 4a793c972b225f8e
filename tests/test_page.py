"""The page of `nvg_jax.app`: what its buttons do, and a visit in headless Chromium."""

import shutil
import sys
import time

import gradio
import numpy as np
import pytest
from gradio.components.image_editor import EditorData, EditorDataBlobs
from gradio.data_classes import ImageData
from helpers import Process, free_port, random_pipeline
from PIL import Image

from nvg_jax import page
from nvg_jax.jobs.sampling_runs import SamplingJob
from nvg_jax.sampling.settings import Settings
from nvg_jax.visualize import image_grid

SIZE = 64
# The settings of the tiny model, as fields.
DEFAULTS = (
    "1",
    "0",
    "1",
    "1",
    "1",
    "2",
    "euler",
    "0",
    "",
    "1",
    False,
)


def layer(part, color):
    """A stroke of the editor: RGBA, transparent outside `part`."""
    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
    pixels[part] = (*color, 255)
    return pixels


LEFT = np.mgrid[:SIZE, :SIZE][1] < SIZE // 2
HALVES = np.where(LEFT[..., None], 255, layer(~LEFT, (0, 0, 0)))  # white and black


@pytest.fixture(scope="module")
def opened():
    pipe = random_pipeline()
    pipe.metadata = pipe.metadata.replace(sampling=Settings(flow_steps=2))
    pipe.settings = pipe.metadata.sampling
    return page.Page(pipe, "tiny")


def test_a_field_for_every_setting(opened):
    fields = page.settings_fields(opened.pipe.settings)
    assert [field.label for field in fields] == list(Settings.specs())
    assert tuple(field.value for field in fields) == DEFAULTS
    assert opened.settings(DEFAULTS) == {}
    changed = ("0.5", "0", "1, 0.5", "1", "2", "2", "heun", "0", "0,1", "1", True)
    assert opened.settings(changed) == {
        "temperature": 0.5,
        "top_p": (1.0, 0.5),
        "structure_guidance": 2.0,
        "solver": "heun",
        "structure_solves": (0, 1),
        "gumbel": True,
    }


def test_a_drawing_takes_the_nearest_color_of_the_brush():
    stroke = layer(LEFT, (30, 10, 20))  # nearly black
    stroke[:, SIZE // 2] = (0, 0, 0, 60)  # the soft edge, more white than black
    drawing = page.drawing_of({"layers": [stroke], "composite": stroke})
    expected = np.where(LEFT[..., None], 0, 255)
    np.testing.assert_array_equal(drawing, np.broadcast_to(expected, (SIZE, SIZE, 3)))


def test_a_drawing_is_followed_and_its_lines_make_the_same_samples(opened, tmp_path, monkeypatch):
    painted = {"layers": [layer(LEFT, (0, 0, 0))], "composite": layer(LEFT, (0, 0, 0))}
    frames = list(opened.sample(opened.drawing, 1, painted, "3", 7, *DEFAULTS))
    assert len(frames) == 5  # one for each stage
    images, _, text, code, files, first = frames[-1]
    assert "16 tokens" in text and first.shape == (8, 8, 3)
    # The lines, run where the files lie, write the same picture.
    monkeypatch.chdir(tmp_path)
    shutil.copy(files[0], tmp_path)
    monkeypatch.setattr(
        "nvg_jax.Pipeline.from_pretrained",
        lambda folder, dtype: {("tiny", "float32"): opened.pipe}[folder, dtype],
    )
    exec(code, {})
    with Image.open("samples.png") as saved:
        np.testing.assert_array_equal(page.enlarged(np.asarray(saved)), images)
    # Its halves are the first map of the samples.
    job = SamplingJob(opened.pipe, [3], 4, 4, 7, {}, opened.drawing(painted).constraint)
    structure = job.sample(0).sequence.structure[:, 1].reshape(4, 4, 4)
    assert (structure[:, :, :2] == structure[:, :1, :1]).all()
    assert (structure[:, :, 2:] != structure[:, :1, :1]).all()


def test_a_part_of_a_picture_is_resampled(opened):
    picture = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    painted = {
        "background": np.concatenate([picture, np.full((SIZE, SIZE, 1), 255, np.uint8)], -1),
        "layers": [layer(LEFT, (255, 255, 255))],
    }
    kept = opened.edit(painted, 1.0, True)
    np.testing.assert_array_equal(kept.constraint.region.reshape(4, 4)[:, 2:], False)
    assert (
        kept.constraint.region.reshape(4, 4)[:, 0].all() and kept.constraint.structure_stages == 1
    )
    *_, last = opened.sample(opened.edit, 3, painted, 1.0, True, "0", 0, *DEFAULTS)
    # The right columns of every sample are the picture's pixels.
    shown = page.enlarged(image_grid(kept.constraint.image[None].repeat(4, axis=0), 2))
    right = slice(-shown.shape[1] // 10, None)
    np.testing.assert_allclose(last[0][:, right].astype(int), shown[:, right].astype(int), atol=2)


@pytest.mark.parametrize(
    "keep, inputs, values, message",
    [
        ("drawing", [None], {}, "Paint a drawing first"),
        ("drawing", [{"layers": [np.zeros((4, 4, 4), np.uint8)]}], {}, "Paint a drawing first"),
        ("picture", [None, 1, 0], {}, "Upload a picture first"),
        ("picture", ["x.png", 1, 2], {}, "keep at least as many maps"),
        ("picture", ["/nothing.png", 2, 1], {}, "^'There is no file nothing.png.'$"),
        ("edit", [None, 0, True], {}, "Upload a picture first"),
        (
            "edit",
            [{"background": np.full((4, 4, 4), 255, np.uint8), "layers": []}, 0, True],
            {},
            "The picture is blank",
        ),
        ("edit", [{"background": HALVES, "layers": []}, 0, True], {}, "Paint over the part"),
        ("nothing", [], {0: "11"}, "Unknown class 11"),
        ("nothing", [], {1: None}, "The seed is a whole number"),
        ("nothing", [], {1: 1.5}, "The seed is a whole number"),
        ("nothing", [], {1: float("inf")}, "The seed is a whole number"),
        ("nothing", [], {1: "one"}, "The seed is a whole number"),
        ("nothing", [], {1: -1}, "seed must be a whole number in 0"),
        ("nothing", [], {2: "warm"}, "temperature takes numbers, got 'warm'"),
        ("nothing", [], {4: "2"}, "top_p must be above 0 and at most 1, got 2.0"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(opened, keep, inputs, values, message):
    arguments = ["0", 0, *DEFAULTS]
    for index, value in values.items():
        arguments[index] = value
    with pytest.raises(gradio.Error, match=message):
        next(opened.sample(getattr(opened, keep), len(inputs), *inputs, *arguments))


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """Files that are not pictures, or too large ones of a few kilobytes."""
    folder = tmp_path_factory.mktemp("uploads")
    (folder / "text.png").write_text("Not a picture.")
    Image.effect_noise((64, 64), 50).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:1000])
    Image.new("1", (20_000, 4_000)).save(folder / "wide.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")  # too large for Pillow to open
    return folder


LARGE = "The picture has more than 25 megapixels; make it smaller."
FAULTS = {
    "text.png": "text.png is not an image of a known format.",
    "cut.png": "cut.png is not a readable image (image file is truncated).",
    "wide.png": LARGE,
    "bomb.png": LARGE,
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_with_an_upload_is_said_in_a_sentence(opened, uploads, name):
    """Through the fields, whose own decoding would fail without a sentence."""
    path = str(uploads / name)
    reference = page.raw_upload(gradio.Image()).preprocess(ImageData(path=path))
    with pytest.raises(gradio.Error) as error:
        next(opened.sample(opened.picture, 3, reference, 1, 0, "0", 0, *DEFAULTS))
    assert error.value.message == FAULTS[name]  # without the folder
    fault = LARGE if FAULTS[name] == LARGE else "The picture is not a readable image."
    editor = page.checked_uploads(gradio.ImageEditor())
    content = (uploads / name).read_bytes()  # which the editor can have sent before
    editor.blob_storage["sent"] = EditorDataBlobs(background=content, layers=[], composite=None)
    for sent in (EditorData(background=gradio.FileData(path=path)), EditorData(id="sent")):
        with pytest.raises(gradio.Error) as error:
            editor.preprocess(sent)
        assert error.value.message == fault


def test_a_readable_upload_passes_the_fields(opened, tmp_path):
    Image.fromarray(HALVES.astype(np.uint8)).save(tmp_path / "halves.png")
    path = str(tmp_path / "halves.png")
    reference = page.raw_upload(gradio.Image())
    assert reference.preprocess(None) is None
    kept = opened.picture(reference.preprocess(ImageData(path=path)), 1, 0)
    assert kept.constraint.structure_stages == 1
    editor = page.checked_uploads(gradio.ImageEditor())
    painted = editor.preprocess(EditorData(background=gradio.FileData(path=path)))
    np.testing.assert_array_equal(painted["background"], HALVES)
    assert painted["layers"] == [] and painted["composite"] is None


def test_progress_says_when_it_compiles(opened, monkeypatch):
    said = []
    monkeypatch.setattr(gradio.Progress, "__call__", lambda _, step, desc: said.append(desc))
    monkeypatch.setattr(opened, "_compiled", set())
    for temperature in ("1", "0.5"):  # the same program
        next(opened.sample(opened.nothing, 0, "0", 0, temperature, *DEFAULTS[1:]))
    assert said == [
        *("Preparing", "Compiling (first time only)", "Decoding the stages"),
        *("Preparing", "Sampling", "Decoding the stages"),
    ]


def chromium():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if path is None:
        pytest.skip("needs Chromium")
    return sync_api, path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the browser's driver
def test_a_visit(tmp_path):
    sync_api, path = chromium()
    port = free_port()
    command = [sys.executable, "-m", "nvg_jax.app", f"--port={port}"]
    with Process(command), sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_page(viewport=dict(width=1300, height=1030))
        try:
            visit(tab, f"http://127.0.0.1:{port}", tmp_path)
        finally:
            tab.screenshot(path=tmp_path / "page.png")
            browser.close()


def visit(tab, url, folder):
    """Clicks, a painted stroke, an uploaded picture and a mask, as a visitor makes them."""
    for _ in range(60):
        try:
            tab.goto(url)
            break
        except Exception:  # the server still starts
            time.sleep(1)

    def wait_for_samples():
        for stage in (0, 4):  # the picture grows from the first stage to the last
            tab.wait_for_function(
                f"document.querySelector('#stage').innerText.includes('Stage {stage} ')",
                timeout=180_000,
            )

    def stroke(editor, rows):
        tab.locator(f"{editor} button[aria-label='Brush']").first.click()
        box = tab.locator(f"{editor} canvas").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        tab.mouse.move(x - 60, y + rows[0])
        tab.mouse.down()
        for row in rows:
            tab.mouse.move(x - 60, y + row, steps=3)
            tab.mouse.move(x + 60, y + row, steps=10)
        tab.mouse.up()
        time.sleep(1)

    tab.fill("#seed input", "1.5")
    tab.click("#free")
    tab.get_by_text("The seed is a whole number.").first.wait_for()
    tab.fill("#seed input", "0")
    tab.click("#free")
    tab.get_by_text("Compiling (first time only)").first.wait_for()
    wait_for_samples()
    tab.get_by_role("tab", name="Draw a structure").click()
    tab.click("#draw")
    tab.get_by_text("Paint a drawing first").wait_for()
    stroke("#drawing", (-60, -20, 20, 60))
    tab.click("#draw")
    wait_for_samples()
    tab.get_by_role("tab", name="Structure of a picture").click()
    (folder / "text.png").write_text("Not a picture.")
    tab.locator("#reference input[type=file]").set_input_files(folder / "text.png")
    tab.wait_for_timeout(2000)
    tab.click("#keep")
    tab.get_by_text("text.png is not an image of a known format.").first.wait_for()
    tab.locator("#reference button[aria-label='Remove Image']").click()
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    tab.locator("#reference input[type=file]").set_input_files(folder / "red.png")
    tab.wait_for_timeout(2000)
    tab.click("#keep")
    wait_for_samples()
    tab.get_by_role("tab", name="Edit a picture").click()
    tab.click("#take")
    tab.wait_for_timeout(2000)
    stroke("#mask", (-60,))
    tab.click("#edit")
    wait_for_samples()
    tab.get_by_text("Python lines that make this picture").click()
    code = tab.locator("#code").inner_text()
    assert 'editing.edit_region(pipe, "picture.png", "mask.png", 0, 2)' in code
