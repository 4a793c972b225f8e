"""The page of `nvg_jax.app`: what its buttons do, and a visit in headless Chromium."""

import asyncio
import base64
import gc
import io
import os
import re
import shutil
import socket
import types
import urllib.request
import warnings

import numpy as np
import pytest
from etils import epy
from helpers import TIMEOUT, free_port, random_pipeline
from PIL import ExifTags, Image

from nvg_jax import Pipeline
from nvg_jax.errors import UserError
from nvg_jax.jobs import editing
from nvg_jax.jobs.sampling_runs import SamplingJob
from nvg_jax.sampling.settings import Settings
from nvg_jax.visualize import image_grid, png

with epy.lazy_imports():  # takes a third of the time in which pytest collects all tests
    import gradio as gr
    import huggingface_hub

    from nvg_jax import page

SIZE = 8  # of the tiny model's images
# The settings of the tiny model, as fields.
DEFAULTS = ("1", "0", "0.9", "1", "1", "2", "euler", "0", "", "1", False)
LEFT = np.mgrid[:SIZE, :SIZE][1] < SIZE // 2
RANDOM = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def url_of(pixels):
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def painted(part, color=(0, 0, 0), picture=None):
    """What the browser sends when `part` of a field is painted."""
    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
    pixels[part] = (*color, 255)
    return {"painted": url_of(pixels), "picture": picture is not None and url_of(picture)}


@pytest.fixture(scope="module", autouse=True)
def no_event_loop_stays():
    """Gradio leaves one open, which would warn in a later module."""
    yield
    with warnings.catch_warnings(action="ignore"):
        asyncio.set_event_loop(None)
        gc.collect()


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    pipe = random_pipeline()
    pipe.settings = Settings(flow_steps=2, top_p=(0.9, 0.9))
    return page.Page(pipe, str(tmp_path_factory.mktemp("tiny")))


def results(opened, keep, *inputs, label="3", seed=7, settings=DEFAULTS):
    """(message while it samples, samples, the first of them, lines of Python, links)"""
    waiting, (said, *shown) = opened.sample(keep, len(inputs), *inputs, label, seed, *settings)
    assert said == ""
    return waiting[0], *shown


def test_a_field_for_every_setting_in_plain_words_with_its_name(opened):
    fields = page.settings_fields(opened.pipe.settings)
    assert [field.label for field in fields] == list(page.LABELS.values())
    names = list(Settings.specs())
    assert [field.info.partition(": ")[0] for field in fields] == list(page.LABELS) == names
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


@pytest.mark.slow
def test_a_drawing_is_followed_and_its_lines_make_the_same_samples(opened, tmp_path, monkeypatch):
    drawing = painted(LEFT)
    waiting, shown, first, code, links = results(opened, opened.drawing, drawing)
    assert "compiles" in waiting and "<figcaption>your drawing" in shown
    # The lines, run where the file lies, write the same pictures.
    monkeypatch.chdir(tmp_path)
    name, url = re.search('href="(.*)" download="(.*)"', links).group(2, 1)
    with urllib.request.urlopen(url) as file:
        (tmp_path / name).write_bytes(file.read())
    monkeypatch.setattr(
        "nvg_jax.Pipeline.from_pretrained",
        lambda folder, dtype: {(opened.name, "float32"): opened.pipe}[folder, dtype],
    )
    exec(code, {})
    job = SamplingJob(opened.pipe, [3], 4, 4, 7, {}, opened.drawing(drawing).constraint)
    out = job.sample(0)
    with Image.open("samples.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), image_grid(out.images, 4))
    finals = re.findall('<img src="([^"]*)" alt="3, seed 7, sample', shown)
    assert [page.url_of(image) for image in page.to_uint8(out.images)] == finals
    assert finals[0] == first
    # The halves of the drawing are the first map of the samples.
    structure = out.sequence.structure[:, 1].reshape(4, 4, 4)
    assert (structure[:, :, :2] == structure[:, :1, :1]).all()
    assert (structure[:, :, 2:] != structure[:, :1, :1]).all()
    # Another number of kept stages needs no other program.
    picture = {"picture": page.url_of(RANDOM)}
    for maps, tokens in ((5, 5), (3, 1)):
        waiting, shown, *_ = results(opened, opened.picture, picture, maps, tokens)
        assert "compiles" not in waiting and f"its map: {2 ** (maps - 1)} regions" in shown


@pytest.mark.slow
def test_a_part_of_a_picture_is_resampled(opened):
    edit = painted(LEFT, picture=RANDOM), 1.0, True
    kept = opened.edit(*edit)
    np.testing.assert_array_equal(kept.constraint.region.reshape(4, 4), [[1, 1, 0, 0]] * 4)
    assert kept.constraint.structure_stages == 1 and list(kept.shown) == ["before", "to change"]
    # The right columns of every sample are the picture's pixels.
    _, shown, *_ = results(opened, opened.edit, *edit)
    for url in re.findall('<img src="([^"]*)" alt="3, seed 7, sample', shown):
        np.testing.assert_allclose(page.pixels_of(url)[:, -2:, :3], RANDOM[:, -2:], atol=1)


@pytest.mark.parametrize(
    "keep, inputs, changes, message",
    [
        ("drawing", [None], {}, "Paint a drawing first"),
        ("drawing", [painted([])], {}, "Paint a drawing first"),
        ("drawing", [painted(LEFT | True)], {}, "the drawing has one region only"),
        ("picture", [{"picture": None}, 1, 0], {}, "Upload a picture first"),
        ("picture", [painted([], picture=RANDOM), 1, 2], {}, "at least as many maps"),
        ("edit", [None, 0, True], {}, "Upload a picture first"),
        ("edit", [painted([], picture=RANDOM), 0, True], {}, "Paint over the part"),
        (None, [], {"label": "11"}, "Unknown class"),
        (None, [], {"seed": None}, "The seed must be a whole number in 0"),
        (None, [], {"seed": 1.5}, "The seed must be a whole number in 0"),
        (None, [], {"seed": float("inf")}, "The seed must be a whole number in 0"),
        (None, [], {"seed": -1}, "The seed must be a whole number in 0"),
        (None, [], {"settings": ["warm"]}, "Variety of the tokens takes numbers, got"),
        (None, [], {"settings": ["1 3.5"]}, "Variety of the tokens takes numbers, got"),
        (None, [], {"settings": [*DEFAULTS[:5], "1 2"]}, "takes whole numbers, got"),
        (None, [], {"settings": [*DEFAULTS[:5], "101"]}, "can be at most 100 on this page"),
        (None, [], {"settings": ["1", "0", "2"]}, "which probability must be above 0 and"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(opened, caplog, keep, inputs, changes, message):
    fields = {"label": "0", "seed": 0, "settings": DEFAULTS} | changes
    values = *inputs, fields["label"], fields["seed"], *fields["settings"]
    with caplog.at_level("INFO", "nvg_jax"):
        keep = getattr(opened, keep) if keep else page.Kept
        ((said, *rest),) = opened.sample(keep, len(inputs), *values)
    assert 'role="alert"' in said and message in said
    assert rest == [gr.skip()] * 4  # what was there stays
    (line,) = caplog.records
    assert message in line.getMessage() and not line.exc_info


LARGE = "The picture has more than 25 megapixels, or 65 as a JPEG; make it smaller."


@pytest.mark.parametrize(
    "name, fault",
    [
        ("text.png", "text.png is not an image of a known format."),
        ("cut.png", "cut.png is not a readable image (image file is truncated)."),
        ("wide.png", LARGE),
        ("wide.jpg", LARGE),
        ("bomb.png", LARGE),
        ("a.eps", "a.eps is not a readable image (a program in EPS; make it a PNG)."),
        ("gray.png", ""),
    ],
)
def test_an_upload_is_shown_as_the_model_sees_it_or_a_sentence(opened, tmp_path, name, fault):
    """Some are large pictures in a few kilobytes; Pillow does not even open the bomb."""
    path, sizes = tmp_path / name, {"wide.png": (9_000, 9_000), "bomb.png": (20_000, 20_000)}
    sizes["wide.jpg"] = sizes["wide.png"]
    Image.effect_noise((64, 48), 50).save(path)
    if name == "text.png":
        path.write_text("Not a picture.")
    elif name == "cut.png":
        path.write_bytes(path.read_bytes()[:1000])
    elif name in sizes:
        Image.new("1", sizes[name]).save(path)
    shown, said = opened.upload(str(path))
    if fault:
        assert shown == gr.skip()
        assert said == f'<p role="alert">{fault}</p>'  # without the folder
    else:
        assert said == ""
        assert page.pixels_of(shown["picture"]).shape == (SIZE, SIZE, 4)


def test_a_sample_is_used_once_there_is_one(opened):
    assert opened.use("data:,") == ({"picture": "data:,"}, "")
    kept, said = opened.use(None)
    assert kept == gr.skip() and "There is no sample yet: press Sample first." in said


def test_a_large_photo_is_scaled_down_and_upright(opened, tmp_path):
    """Of 50 megapixels, with red where the camera's top was when it was held upright."""
    photo, exif = Image.new("RGB", (8_160, 6_120), "blue"), Image.Exif()
    photo.paste("red", (0, 0, 4_080, 6_120))
    exif[ExifTags.Base.Orientation] = 6  # turned to the right
    path = tmp_path / "photo.jpg"
    photo.save(path, exif=exif)
    assert editing.read_picture(path, enough=page.ENOUGH).shape == (2_040, 1_530, 3)
    shown, said = opened.upload(str(path))
    assert said == ""
    pixels = page.pixels_of(shown["picture"])
    np.testing.assert_allclose(pixels[:3, :, :3], np.full((3, SIZE, 3), (254, 0, 0)), atol=9)
    np.testing.assert_allclose(pixels[-3:, :, :3], np.full((3, SIZE, 3), (0, 0, 254)), atol=9)


def test_a_picture_that_fills_the_memory_is_refused_from_any_browser(opened):
    file = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(file, "png")
    value = {"picture": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}
    with pytest.raises(UserError, match="more than 25 megapixels"):
        opened.picture(value, 1, 0)


def test_the_opening_of_another_model_is_not_shown(opened, tmp_path, monkeypatch):
    shown, random = page.Page(opened.pipe, str(tmp_path)), np.random.default_rng(0)
    stages = random.integers(0, 256, (2, 4, 5, SIZE, SIZE, 3), np.uint8)
    monkeypatch.setattr(page.Page, "stages", lambda self, out: stages)
    monkeypatch.setattr(SamplingJob, "sample", lambda self, batch: None)
    shown.write_opening()
    np.testing.assert_array_equal(shown.opening(), stages)
    names = ("tokenizer", "fingerprint", "settings", "class_names")
    same = {name: getattr(opened.pipe, name) for name in names}
    for change in (
        {"fingerprint": "newer"},
        {"settings": Settings(flow_steps=3)},
        {"class_names": ("other",)},
    ):
        shown.pipe = types.SimpleNamespace(**same)
        assert shown.opening() is not None
        shown.pipe = types.SimpleNamespace(**same | change)
        assert shown.opening() is None


@pytest.mark.parametrize("name", ["emoji", "fashion_mnist"])
def test_the_bundled_models_have_openings(name):
    assert page.Page(Pipeline.from_pretrained(name), name).opening() is not None


def test_too_little_memory_is_said_on_the_page(opened, caplog, monkeypatch):
    def fail(self, batch):
        raise MemoryError("128 GiB")

    monkeypatch.setattr(SamplingJob, "sample", fail)
    waiting, (said, *rest) = opened.sample(page.Kept, 0, "0", 0, *DEFAULTS)
    assert "Sampling." in waiting[0]
    assert said == '<p role="alert">Sampling failed; the log of this page says why.</p>'
    assert rest == [gr.skip()] * 4 and "128 GiB" in caplog.text


@pytest.mark.filterwarnings("ignore")  # of the server
def test_whom_a_model_credits_is_said(opened):
    said = lambda pipe: "Trained on" in str(page.build(page.Page(pipe, "a")).get_config_file())
    emoji = Pipeline.from_pretrained("emoji").metadata
    assert "Twemoji by Twitter" in emoji.credits
    assert said(Pipeline(opened.pipe.metadata.replace(config=emoji.config), opened.pipe.params))
    assert not said(Pipeline(opened.pipe.metadata.replace(config=None), opened.pipe.params))
    gc.collect()


@pytest.mark.filterwarnings("ignore")  # of the server
def test_the_page_starts_behind_a_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("no_proxy", "intranet")
    with gr.Blocks() as blocks:
        assert page.serve(blocks, "127.0.0.1", free_port()).startswith("http://127.0.0.1:")
    blocks.close()
    assert os.environ["no_proxy"] == "intranet,localhost,127.0.0.1"
    huggingface_hub.close_session()  # Gradio opened it, with this proxy
    gc.collect()


@pytest.mark.filterwarnings("ignore")  # of the server
def test_a_port_that_another_program_uses():
    with socket.create_server(("127.0.0.1", 0)) as taken, gr.Blocks() as blocks:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on port {port} of 127.0.0.1; .*--port"):
            page.serve(blocks, "127.0.0.1", port)
    gc.collect()


@pytest.fixture
def tab(opened):
    """The page in Chromium, with samples that are there already."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium")
    assert opened.opening() is None
    opened.write_opening()
    blocks = page.build(opened).queue()
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True)
    try:
        with sync_api.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
            tab = browser.new_page(viewport=dict(width=390, height=844))
            tab.set_default_timeout(TIMEOUT * 1000)
            tab.goto(url)
            yield tab
            browser.close()
    finally:
        blocks.close()
        gc.collect()  # the server's event loops, while warnings are ignored


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the browser's driver and of the server
def test_a_visit_with_a_phone(opened, tab, tmp_path):
    def sources():
        return tab.eval_on_selector_all("#samples img", "images => images.map(i => i.src)")

    def painted_pixels(field):
        url = tab.locator(f"{field} canvas").evaluate("canvas => canvas.toDataURL()")
        return page.pixels_of(url)

    def changes(shown, action):
        before = tab.evaluate(shown)
        action()
        tab.wait_for_function("before => " + shown + " !== before", arg=before)

    title = tab.locator("#samples h3")
    title.get_by_text("0, seed 0").wait_for()
    opening = sources()
    # All tabs are there, all pictures have texts, and the slider starts where regions are seen.
    assert all(tab.get_by_role("tab", name=n).is_visible() for n in ("Draw", "Picture", "Edit"))
    assert tab.locator("#samples figure img:not([alt])").count() == 0
    stage = tab.locator("#samples p")
    assert stage.inner_text().startswith("Stage 3 of 5: 4 tokens")
    tab.get_by_label("Stage 1 of 5: 1 token").click()
    tab.locator("#samples input").press("ArrowRight")
    assert stage.inner_text().startswith("Stage 2 of 5: 2 tokens")
    # What is wrong is said at the field, and the samples stay.
    tab.fill("#seed input", "1.5")
    tab.click("#free")
    tab.get_by_text("The seed must be a whole number").first.wait_for()
    assert sources() == opening
    # The same samples again, and those of another seed, at the stage that was chosen.
    changes("document.querySelector('#seed input').value", lambda: tab.click("#random"))
    tab.fill("#seed input", "1.5")
    said = tab.locator("#seed").get_by_text("The seed must be a whole number")
    said.wait_for()
    tab.fill("#seed input", "1")
    said.wait_for(state="detached")  # before a press, which would move the button away
    tab.click("#free")
    title.get_by_text("0, seed 1").wait_for()
    stage.get_by_text("Stage 2 of 5: 2 tokens").wait_for()
    assert sources() != opening
    tab.fill("#seed input", "0")
    tab.click("#free")
    title.get_by_text("0, seed 0").wait_for()
    assert sources() == opening
    # A brush is ready; what was painted is beside the samples.
    tab.get_by_role("tab", name="Draw").click()
    tab.get_by_label("Or begin with a drawing").click()
    changes(
        "document.querySelector('#drawing canvas').toDataURL()",
        tab.get_by_role("option", name="left right").click,
    )
    tab.locator("#drawing [aria-label=red]").click()
    canvas = tab.locator("#drawing canvas")
    canvas.hover()  # which waits until it stands still
    box = canvas.bounding_box()
    middle = box["y"] + box["height"] / 2
    tab.mouse.move(box["x"] + 2, middle)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] - 2, middle, steps=3)
    tab.mouse.up()
    tab.get_by_label("Or begin with a drawing").focus()
    tab.keyboard.press("Tab")  # which chooses nothing
    drawing = painted_pixels("#drawing")
    assert {tuple(color) for color in drawing[SIZE // 2, :, :3]} == {(220, 40, 40)}
    assert [tuple(drawing[0, x, :3]) for x in (0, SIZE - 1)] == [(0, 0, 0), (255, 255, 255)]
    tab.click("#draw")
    tab.get_by_text("your drawing").wait_for()
    np.testing.assert_array_equal(page.pixels_of(sources()[0]), drawing)
    # An upload, and what is wrong with one.
    tab.get_by_role("tab", name="Edit").click()
    (tmp_path / "text.png").write_text("Not a picture.")
    upload = tab.locator("input[type=file]").last
    upload.set_input_files(tmp_path / "text.png")
    tab.get_by_text("text.png is not an image of a known format.").wait_for()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    changes(
        "document.querySelector('#mask .board').style.backgroundImage",
        lambda: upload.set_input_files(tmp_path / "red.png"),
    )
    # A mask, painted with the keyboard.
    tab.locator("#mask canvas").focus()
    for key in (" ", "ArrowUp", " "):
        tab.keyboard.press(key)
    assert painted_pixels("#mask")[..., 3].any()
    tab.click("#edit")
    tab.get_by_text("to change", exact=True).wait_for()
    tab.get_by_text("Python lines that make these samples").click()
    tab.get_by_text('editing.edit_region(pipe, "picture.png", "mask.png", 0, 2)').wait_for()
    assert tab.locator("#files a").all_inner_texts() == ["picture.png", "mask.png"]
    # The largest part of the page fits the phone.
    assert tab.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.slow
def test_a_page_that_stays_open_keeps_a_limited_number_of_programs(opened, monkeypatch):
    monkeypatch.setattr(page, "PROGRAMS", 1)
    count = opened.pipe.program.sample._cache_size
    keep = lambda: page.Kept()
    for steps in ("1", "3"):
        opened._compiled.add(steps)  # as if there were others
        settings = [*DEFAULTS[:5], steps, *DEFAULTS[6:]]
        waiting, *_ = results(opened, keep, settings=settings)
        assert "compiles" in waiting and count() == 1
    assert len(opened._compiled) == 1
