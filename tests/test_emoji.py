"""Emoji as a folder of images, from small archives in the form of the three npm packages."""

import csv
import io
import json
import tarfile
import types

import numpy as np
import pytest
from PIL import Image

from benchmarks import structure_control
from nvg_jax.data import emoji, open_source, transforms
from nvg_jax.errors import UserError

NAMES = [
    {
        "unified": "1F44B",
        "short_name": "wave",
        "category": "People & Body",
        "subcategory": "hand-fingers-open",
        "skin_variations": {"1F3FB": {"unified": "1F44B-1F3FB"}},
    },
    {
        "unified": "1F6E1-FE0F",
        "short_name": "shield",
        "category": "Objects",
        "subcategory": "tool",
    },
    {
        "unified": "1F1F3-1F1F4",
        "short_name": "flag-no",
        "category": "Flags",
        "subcategory": "country-flag",
    },
    {
        "unified": "1F1E7-1F1FB",  # Bouvet Island has the flag of Norway
        "short_name": "flag-bv",
        "category": "Flags",
        "subcategory": "country-flag",
    },
    {
        "unified": "1F3FB",
        "short_name": "skin-tone-2",
        "category": "Component",
        "subcategory": "skin-tone",
    },
]
ARCHIVES = ("emoji-datasource-google-1.0.0", "emoji-datasource-twitter-1.0.0")
FLUENT = "lobehub-fluent-emoji-3d-1.0.0"


def picture(color, size=(64, 64), format="PNG") -> bytes:
    """A square of `color` that leaves a quarter of the width on every side transparent."""
    image = Image.new("RGBA", size)
    width, height = size
    image.paste(color, (width // 4, height // 4, width - width // 4, height - height // 4))
    file = io.BytesIO()
    image.save(file, format, lossless=True)
    return file.getvalue()


def write_archive(path, contents: dict[str, bytes]):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def packages(tmp_path):
    """A folder of three archives: five pictures of noto and twemoji, three of fluent."""
    colors = {"1f44b": "gold", "1f44b-1f3fb": "tan", "1f6e1-fe0f": "navy"}
    colors |= {"1f1f3-1f1f4": "red", "1f1e7-1f1fb": "red", "1f3fb": "tan"}
    for archive, design in zip(ARCHIVES, ("google", "twitter")):
        folder = f"package/img/{design}/64"
        contents = {f"{folder}/{codes}.png": picture(c) for codes, c in colors.items()}
        contents[f"package/img/{design}/sheets/32.png"] = picture("black")
        contents["package/emoji.json"] = json.dumps(NAMES).encode()
        write_archive(tmp_path / f"{archive}.tgz", contents)
    # Fluent: 256 pixels, without variation selectors, and a flag of somebody else's design.
    write_archive(
        tmp_path / f"{FLUENT}.tgz",
        {
            "package/assets/1f44b.webp": picture("orange", (256, 256), "WEBP"),
            "package/assets/1f6e1.webp": picture("blue", (256, 256), "WEBP"),
            "package/assets/1f1f3-1f1f4.webp": picture("red", (256, 256), "WEBP"),
        },
    )
    return tmp_path


def test_every_picture_of_the_packages_is_in_the_folder(packages):
    out = packages / "out"
    # noto and twemoji: wave, light wave, shield, one of the two equal flags; fluent: wave, shield.
    assert emoji.write_folder(packages, out) == 4 + 4 + 2
    files = {path.relative_to(out).as_posix().split("/", 1)[1] for path in out.rglob("*.png")}
    expected = {"people and body/wave.png", "objects/shield.png"}
    assert files == {f"{design} {file}" for design in emoji.PACKAGES for file in expected} | {
        f"{design} {file}"
        for design in ("noto", "twemoji")
        for file in ("people and body/wave-light.png", "flags/flag-no.png")
    }
    with open(out / "index.csv", encoding="utf-8", newline="") as file:
        rows = {row["file"].split("/", 1)[1]: row for row in csv.DictReader(file)}
    assert rows.keys() == files
    row = rows["noto people and body/wave-light.png"]
    assert (row["design"], row["category"]) == ("noto", "people and body")
    assert (row["subcategory"], row["name"]) == ("hand-fingers-open", "wave-light")
    assert (row["codes"], row["concept"], row["skin_tones"]) == ("1f44b-1f3fb", "1f44b", "light")
    assert "CC-BY 4.0" in (out / "LICENSES.md").read_text(encoding="utf-8")


def test_small_models_have_finer_classes_and_yellow_people(packages, monkeypatch):
    out = packages / "out"
    held_out = {"wave": "test", "shield": "test", "flag-no": "train", "flag-bv": "train"}
    monkeypatch.setattr(emoji.Emoji, "split", property(lambda each: held_out[each.name]))
    assert emoji.write_folder(packages, out, "subcategory", skin_tones=False) == 3 + 3 + 2
    files = {path.relative_to(out).as_posix() for path in out.rglob("noto*/*.png")}
    # Nothing else of its class is trained, so the wave and the shield are.
    kinds = ("hand-fingers-open/wave", "tool/shield", "country-flag/flag-no")
    assert files == {f"train/noto {kind}.png" for kind in kinds}


def test_pictures_keep_their_transparency_and_appear_on_white(packages):
    out = packages / "out"
    emoji.write_folder(packages, out)
    for design, color in (("noto", (0, 0, 128)), ("fluent", (0, 0, 255))):
        (path,) = out.glob(f"*/{design} objects/shield.png")
        image = Image.open(path)
        assert image.size == (64, 64) and image.mode == "RGBA"
        alpha = np.asarray(image)[..., 3]
        assert alpha[32, 32] == 255 and alpha[0, 0] == 0
        # The square's share of the picture: (1/2)**2.
        assert alpha.mean() / 255 == pytest.approx(0.25, abs=0.01)
        pixels = np.asarray(transforms.decode(path.read_bytes()))
        assert tuple(pixels[32, 32]) == color and tuple(pixels[0, 0]) == (255, 255, 255)


def test_the_folder_is_a_data_set(packages, monkeypatch):
    split = property(lambda each: "test" if each.name == "wave-light" else "train")
    monkeypatch.setattr(emoji.Emoji, "split", split)
    emoji.write_folder(packages, packages / "out")
    source = open_source("image_folder", "test", data_dir=str(packages / "out"))
    assert source.class_names[0] == "fluent objects" and len(source.class_names) == 2 + 3 + 3
    labels = [source.class_names[source[i]["label"]] for i in range(len(source))]
    assert labels == ["noto people and body", "twemoji people and body"]


def named(codes: str) -> emoji.Emoji:
    return emoji.Emoji("name", emoji.code_points(codes), "objects", "tool")


@pytest.mark.parametrize(
    "codes, concept",
    [
        ("1F9A9", "1f9a9"),  # flamingo
        ("1F6E1-FE0F", "1f6e1"),  # shield, with a variation selector
        ("1F44B-1F3FD", "1f44b"),  # waving hand, medium skin tone
        ("1F3C3-1F3FF-200D-2640-FE0F", "1f3c3"),  # woman running, dark skin tone
        ("1F3C3-200D-27A1-FE0F", "1f3c3"),  # running to the right
        ("1F468-200D-1F33E", "1f9d1-1f33e"),  # man farmer, woman farmer, farmer
        ("1F469-1F3FB-200D-1F33E", "1f9d1-1f33e"),
        ("1F9D1-200D-1F33E", "1f9d1-1f33e"),
        ("1F469-200D-1F9B0", "1f9d1"),  # woman with red hair
        ("1F467", "1f9d2"),  # girl, child
        ("2640-FE0F", "2640"),  # the sign itself
    ],
)
def test_a_concept_has_all_genders_skin_tones_and_hair_styles(codes, concept):
    assert named(codes).concept == concept


def test_one_concept_in_ten_is_held_out():
    splits = [named(f"{code:X}").split for code in range(0x1F300, 0x1F300 + 1000)]
    assert 70 < splits.count("test") < 130
    assert splits.count("test") + splits.count("train") == 1000


def test_mistakes_are_named(packages):
    out = packages / "out"
    (packages / f"{FLUENT}.tgz").rename(packages / f"{FLUENT}.tar")
    with pytest.raises(ValueError, match="one file lobehub-fluent.*tgz in .*there are 0; "):
        emoji.write_folder(packages, out)
    write_archive(packages / f"{FLUENT}.tgz", {"package/readme": b""})
    with pytest.raises(ValueError, match="has no pictures in package/assets/"):
        emoji.write_folder(packages, out)
    archive = next(packages.glob("emoji-datasource-google-*.tgz"))
    content = archive.read_bytes()
    for damaged in (b"no archive", content[: len(content) // 2]):
        archive.write_bytes(damaged)
        with pytest.raises(UserError, match="google.*is damaged or incomplete"):
            emoji.write_folder(packages, out)
    pictures = {"package/img/google/64/1f600.png": b""}
    write_archive(archive, pictures)
    with pytest.raises(UserError, match="google.* has no package/emoji.json"):
        emoji.write_folder(packages, out)
    assert not out.exists()
    out.mkdir()
    (out / "file").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        emoji.write_folder(packages, out)


# Measuring structure control.


def test_maps_agree_up_to_the_names_of_their_clusters():
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 4, (3, 64))
    assert structure_control.agreement(np.array([2, 0, 3, 1])[maps], maps) == 1
    halves = np.arange(64)[None] // 32
    thirds = np.arange(64)[None] // 24  # 24, 24 and 16 positions
    assert structure_control.agreement(thirds, halves) == (24 + 16) / 64


def test_the_overlap_of_silhouettes():
    squares = np.zeros((2, 8, 8), bool)
    squares[:, :4, :4] = True
    moved = np.roll(squares, 2, axis=1)
    assert structure_control.overlap(squares, moved) == pytest.approx(8 / 24)
    white = np.ones((1, 8, 8, 3), np.float32)
    assert not structure_control.colored(white).any()


def test_curves_over_the_kept_stages_with_their_bounds():
    table = [
        structure_control.Row(stages, asked, 0.1, 0.2 * stages, 0.9, 0.5 + n / 10, 0.3 + n / 10)
        for stages in (0, 2, 3)
        for n, asked in enumerate(("same class", "another design"))
    ]
    drawn = structure_control.curves(table, (0.4, 0.8), 0.7)
    lines = [[np.stack(line.get_data(), 1).tolist() for line in a.lines] for a in drawn.axes]
    given = [[2, 0.4], [3, pytest.approx(0.6)]]
    assert lines[0] == [given, given, [[2, 0.1], [3, 0.1]], [[2, 0.9], [3, 0.9]]]
    same, other = ([[stages, y] for stages in (0, 2, 3)] for y in (0.5, 0.6))
    assert lines[1] == [same, other, [[0, 0.4], [1, 0.4]], [[0, 0.8], [1, 0.8]]]
    assert [line[0][1] for line in lines[2]] == [0.3, 0.4, 0.7]


def test_classes_that_share_the_design_or_the_category():
    pipe = types.SimpleNamespace(class_names=("a x", "a y y", "b x", "b y y", "c x"))
    asked = structure_control.classes_to_ask(pipe, np.array([0, 0, 3]))
    assert asked["same class"].tolist() == [0, 0, 3]
    assert asked["another design"].tolist() == [2, 4, 1]
    assert asked["another category"].tolist() == [1, 1, 2]
