"""Emoji as a folder of images: Unicode's list, the split, and the font if it is installed."""

from pathlib import Path

import pytest

from nvg_jax.data import emoji
from nvg_jax.jobs.editing import read_picture

LIST = """
# group: Smileys & Emotion
# subgroup: face-smiling
1F600                                      ; fully-qualified     # \U0001f600 E1.0 grinning face
263A                                       ; unqualified         # \u263a E0.6 smiling face
# group: People & Body
1F44B                                      ; fully-qualified     # \U0001f44b E0.6 waving hand
1F44B 1F3FB                                ; fully-qualified     # \U0001f44b\U0001f3fb E1.0 \
waving hand: light skin tone
# group: Flags
1F1EB 1F1EF                                ; fully-qualified     # \U0001f1eb\U0001f1ef E2.0 \
flag: Fiji
"""


def test_the_list_gives_characters_names_and_groups():
    found = list(emoji.read_list(LIST))
    assert [e.name for e in found] == [
        "grinning face", "waving hand", "waving hand: light skin tone", "flag: Fiji"
    ]  # fmt: skip
    assert [len(e.text) for e in found] == [1, 1, 2, 2]
    assert [e.group for e in found] == [
        "smileys and emotion", "people and body", "people and body", "flags"
    ]  # fmt: skip
    assert found[1].split == found[2].split  # variants stay together
    assert found[2].path.name == "waving-hand-light-skin-tone.png"
    assert emoji.slug("keycap: #") != emoji.slug("keycap: *")


@pytest.mark.skipif(not Path(emoji.FONT).is_file(), reason="needs fonts-noto-color-emoji")
def test_a_folder_of_pictures(tmp_path):
    (tmp_path / "list.txt").write_text(LIST, encoding="utf-8")
    assert emoji.write_folder(tmp_path / "out", emoji.FONT, str(tmp_path / "list.txt")) == 4
    pictures = sorted((tmp_path / "out").rglob("*.png"))
    assert {path.parent.name for path in pictures} == {e.group for e in emoji.read_list(LIST)}
    colors = []
    for path in pictures:
        pixels = read_picture(path)
        assert pixels.shape == (136, 136, 3) and (pixels[[0, -1], :1] == 255).all()
        colors.append(pixels.reshape(-1, 3).mean(0).round(3).tolist())
    assert len({tuple(color) for color in colors}) == 4  # none is an empty box
    with pytest.raises(ValueError, match="is not empty"):
        emoji.write_folder(tmp_path / "out", emoji.FONT, str(tmp_path / "list.txt"))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="There is no .*font.ttf: apt-get install"):
        emoji.write_folder(tmp_path / "out", str(tmp_path / "font.ttf"), emoji.LIST)
