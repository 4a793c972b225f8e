"""Emoji as a folder of images: `python -m nvg_jax.data.emoji --out=data/emoji`.

Draws every emoji of Unicode's list with Noto Color Emoji (SIL Open Font License 1.1) on white, with
136 x 136 pixels. Classes are Unicode's groups. One emoji in ten, with all of its skin tones and
hair, goes to the test split. On Debian and Ubuntu:

    apt-get install fonts-noto-color-emoji unicode-data
"""

import argparse
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from nvg_jax.errors import UserError

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
LIST = "/usr/share/unicode/emoji/emoji-test.txt"
FONT_SIZE = 109  # the only size of the font's bitmaps
SIDE = 136  # of a picture, in pixels


class Emoji(NamedTuple):
    """text: its characters. name: its name in Unicode's list. group: its class."""

    text: str
    name: str
    group: str

    @property
    def split(self) -> str:
        """The split, "train" or "test": the same for all skin tones and hair styles of an emoji."""
        base = re.sub(": .*(skin tone|hair|bald|beard).*", "", self.name)
        return "test" if zlib.crc32(base.encode()) % 10 == 0 else "train"

    @property
    def path(self) -> Path:
        """Its path inside the folder."""
        return Path(self.split, self.group, slug(self.name) + ".png")


def slug(name: str) -> str:
    name = name.replace("#", "hash").replace("*", "asterisk")
    return re.sub(r"\W+", "-", name).strip("-").lower()


def read_list(text: str) -> Iterator[Emoji]:
    """The emoji of Unicode's emoji-test.txt that keyboards show."""
    group = ""
    for line in text.splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").replace("&", "and").lower()
        match = re.match(r"([0-9A-F ]+?) *; fully-qualified *# \S+ E[\d.]+ (.*)", line)
        if match:
            text = "".join(chr(int(code, 16)) for code in match[1].split())
            yield Emoji(text, match[2], group)


def draw(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The picture of an emoji, or None if the font lacks it and would draw several in a row."""
    left, top, right, bottom = font.getbbox(text)
    if not 0 < right - left <= SIDE or bottom - top > SIDE:
        return None
    image = Image.new("RGB", (SIDE, SIDE), "white")
    place = (SIDE - right - left) // 2, (SIDE - bottom - top) // 2
    ImageDraw.Draw(image).text(place, text, font=font, embedded_color=True)
    return image


def write_folder(out: Path, font_file: str, list_file: str) -> int:
    """Writes OUT/SPLIT/GROUP/NAME.png for every emoji; returns the number of pictures.

    Raises:
        UserError: the font or the list is missing, or `out` holds something else.
    """
    for file in (font_file, list_file):
        if not Path(file).is_file():
            raise UserError(
                f"There is no {file}: apt-get install fonts-noto-color-emoji unicode-data, or give "
                "--font and --list."
            )
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give another folder.")
    font, count = ImageFont.truetype(font_file, FONT_SIZE), 0
    for emoji in read_list(Path(list_file).read_text(encoding="utf-8")):
        image = draw(emoji.text, font)
        if image is not None:
            path = out / emoji.path
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            count += 1
    return count


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="Folder for the pictures.")
    parser.add_argument("--font", default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--list", default=LIST, help="Unicode's emoji-test.txt")
    arguments = parser.parse_args()
    try:
        count = write_folder(arguments.out, arguments.font, arguments.list)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{count} pictures: {arguments.out}")


if __name__ == "__main__":
    main()
