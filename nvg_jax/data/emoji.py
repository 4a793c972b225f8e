"""Emoji of three designs as a folder of images, 64 x 64 pixels with transparency.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 \
        @lobehub/fluent-emoji-3d@1.1.0
    python -m nvg_jax.data.emoji --packages=. --out=data/emoji

Reads the three npm packages as `npm pack` fetches them. The classes are design x category: "noto
flags", "twemoji flags", "fluent flags", ... One concept in ten, with all its designs, skin tones
and genders, is in the test split. Beside the folders `train` and `test` lie `index.csv`, which says
what every picture shows, and `LICENSES.md`.

    python -m nvg_jax.data.emoji --packages=. --out=data/emoji_kinds --classes=subcategory --yellow

makes it easier for small models: the 292 classes are design x subcategory ("noto animal-bird"), and
people, who are half of all pictures, have no skin tones. A concept alone in its class is trained.
"""

import argparse
import csv
import io
import json
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from nvg_jax.errors import UserError, reported

SIDE = 64  # pixels on each side of a picture
# The archive of each design, and the folder of its pictures inside.
PACKAGES = {
    "noto": ("emoji-datasource-google-*.tgz", "package/img/google/64/"),
    "twemoji": ("emoji-datasource-twitter-*.tgz", "package/img/twitter/64/"),
    "fluent": ("lobehub-fluent-emoji-3d-*.tgz", "package/assets/"),
}
# Microsoft draws no flags of countries and regions; those in its package resemble Noto's.
FOREIGN = {"fluent": ("country-flag", "subdivision-flag")}
NAMES = "package/emoji.json"  # in noto's archive: the names of the emoji of all designs
SKIN_TONES = {
    0x1F3FB: "light",
    0x1F3FC: "medium-light",
    0x1F3FD: "medium",
    0x1F3FE: "medium-dark",
    0x1F3FF: "dark",
}
VARIATION_SELECTOR, JOINER = 0xFE0F, 0x200D
# Characters that leave the concept of a sequence the same: variation selector, joiner, skin tones,
# signs of gender, hair styles, and "facing right".
DETAILS = {VARIATION_SELECTOR, JOINER, *SKIN_TONES}
DETAILS |= {0x2640, 0x2642, 0x1F9B0, 0x1F9B1, 0x1F9B2, 0x1F9B3, 0x27A1}
# Woman, man -> person; girl, boy -> child.
PEOPLE = {0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1, 0x1F466: 0x1F9D2, 0x1F467: 0x1F9D2}
LICENSES = """\
# Licenses of the pictures

- `noto ...`: Noto Emoji by Google, Apache License 2.0, from npm's emoji-datasource-google.
- `twemoji ...`: Twemoji by Twitter and other contributors, CC-BY 4.0, from npm's
  emoji-datasource-twitter.
- `fluent ...`: Fluent Emoji by Microsoft, MIT, from npm's @lobehub/fluent-emoji-3d.

The names are from emoji-data by Cal Henderson, MIT. The Fluent pictures were reduced from 256 to 64
pixels; the others are unchanged.

CC-BY 4.0 asks for a credit wherever Twemoji, or pictures made from it, are shown: "Twemoji by
Twitter and other contributors, CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/".
"""


class Emoji(NamedTuple):
    """name: its short name, with skin tones. codes: its code points. category: Unicode's group.
    subcategory: Unicode's subgroup."""

    name: str
    codes: tuple[int, ...]
    category: str
    subcategory: str

    @property
    def concept(self) -> str:
        """What it shows, as code points in hex: alike for skin tones, genders and hair styles."""
        essential = [code for code in self.codes if code not in DETAILS] or self.codes
        return text(PEOPLE.get(code, code) for code in essential)

    @property
    def split(self) -> str:
        """The split of its concept, "train" or "test"."""
        return "test" if zlib.crc32(self.concept.encode()) % 10 == 0 else "train"

    @property
    def skin_tones(self) -> str:
        return "-".join(SKIN_TONES[code] for code in self.codes if code in SKIN_TONES)


def text(codes) -> str:
    return "-".join(f"{code:x}" for code in codes)


def code_points(name: str) -> tuple[int, ...]:
    """ "1F6E1-FE0F" -> (0x1F6E1,): without variation selectors, which not all designs write."""
    codes = (int(code, 16) for code in re.split("[-_]", name))
    return tuple(code for code in codes if code != VARIATION_SELECTOR)


def read_names(entries: list[dict]) -> Iterator[Emoji]:
    """Every emoji of emoji.json, followed by its skin tones; not the skin tones by themselves."""
    for entry in entries:
        if entry["category"] == "Component":
            continue
        for variant in (entry, *entry.get("skin_variations", {}).values()):
            emoji = Emoji(
                name=entry["short_name"],
                codes=code_points(variant["unified"]),
                category=entry["category"].replace("&", "and").lower(),
                subcategory=entry["subcategory"],
            )
            yield emoji._replace(name="-".join(filter(None, (emoji.name, emoji.skin_tones))))


def square(content: bytes) -> Image.Image:
    """A picture file as RGBA of 64 x 64 pixels."""
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    if image.size == (SIDE, SIDE):
        return image
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)  # weights the colors by their opacity
    canvas = Image.new("RGBA", (SIDE, SIDE))
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return canvas


def read_package(packages: Path, design: str) -> tuple[dict[tuple[int, ...], bytes], list[dict]]:
    """The picture files of a design by code points, and the entries of emoji.json if it has one.

    Raises:
        UserError: there is not exactly one archive of the package, or it is damaged or lacks the
            pictures or their names.
    """
    pattern, folder = PACKAGES[design]
    archives = sorted(packages.glob(pattern))
    if len(archives) != 1:
        raise UserError(
            f"There must be one file {pattern} in {packages}, but there are {len(archives)}; "
            "`npm pack` fetches it (the docstring of nvg_jax.data.emoji has the command)."
        )
    pictures, entries = {}, []
    try:
        with reported(f"{archives[0]} cannot be read"), tarfile.open(archives[0]) as archive:
            for member in archive:
                path, file = Path(member.name), archive.extractfile(member)
                if file is None:  # a folder
                    continue
                if member.name == NAMES:
                    entries = json.load(file)
                elif member.name.startswith(folder) and path.suffix in (".png", ".webp"):
                    pictures[code_points(path.stem)] = file.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archives[0]} is damaged or incomplete; fetch it again.") from error
    if not pictures:
        raise UserError(f"{archives[0]} has no pictures in {folder}; fetch another version.")
    if design == "noto" and not entries:
        raise UserError(f"{archives[0]} has no {NAMES}; fetch another version.")
    return pictures, entries


def write_design(
    out: Path,
    design: str,
    pictures: Mapping[tuple[int, ...], bytes],
    emoji: list[Emoji],
    classes: str,
    index,
) -> int:
    """Writes OUT/SPLIT/DESIGN CATEGORY/NAME.png and rows of the index; returns their number.

    A picture that stands for several emoji (the flags of Norway and of Bouvet Island) is written
    once, for the first of them.
    """
    seen = set()
    trained = {getattr(each, classes) for each in emoji if each.split == "train"}
    for each in emoji:
        if each.codes not in pictures or each.subcategory in FOREIGN.get(design, ()):
            continue
        image = square(pictures[each.codes])
        if image.tobytes() in seen:
            continue
        seen.add(image.tobytes())
        group = getattr(each, classes)
        split = each.split if group in trained else "train"
        path = Path(split, f"{design} {group}", each.name + ".png")
        (out / path.parent).mkdir(parents=True, exist_ok=True)
        image.save(out / path)
        index.writerow(
            [path.as_posix(), design, each.category, each.subcategory, each.name]
            + [text(each.codes), each.concept, each.skin_tones]
        )
    return len(seen)


def write_folder(
    packages: Path, out: Path, classes: str = "category", skin_tones: bool = True
) -> int:
    """Writes the pictures, index.csv and LICENSES.md to `out`; returns the number of pictures.

    Args:
        classes: what makes a class of a design, "category" or "subcategory".
        skin_tones: with those of people; otherwise only the yellow ones.

    Raises:
        UserError: an archive is missing or has no pictures, or `out` holds something else.
    """
    if out.exists() and any(out.iterdir()):
        cut = (out / "index.csv").exists() and not (out / "LICENSES.md").exists()
        what = "holds an interrupted preparation; delete it, or" if cut else "is not empty;"
        raise UserError(f"{out} {what} give another folder.")
    contents = {design: read_package(packages, design) for design in PACKAGES}
    emoji = [x for x in read_names(contents["noto"][1]) if skin_tones or not x.skin_tones]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "index.csv", "w", encoding="utf-8", newline="") as file:
        index = csv.writer(file)
        columns = "file design category subcategory name codes concept skin_tones"
        index.writerow(columns.split())
        count = sum(
            write_design(out, design, pictures, emoji, classes, index)
            for design, (pictures, _) in contents.items()
        )
    (out / "LICENSES.md").write_text(LICENSES, encoding="utf-8")  # last: the folder is whole
    return count


def main():
    place = lambda name: Path(name).expanduser()  # as every command
    parser = argparse.ArgumentParser(description="Prepares the emoji of three npm packages.")
    parser.add_argument("--packages", required=True, type=place, help="Folder of the .tgz files.")
    parser.add_argument("--out", required=True, type=place, help="Folder for the pictures.")
    parser.add_argument(
        "--classes",
        choices=("category", "subcategory"),
        default="category",
        help="What makes a class of a design.",
    )
    parser.add_argument("--yellow", action="store_true", help="People without skin tones.")
    arguments = parser.parse_args()
    try:
        with reported(f"{arguments.out} cannot be written"):
            count = write_folder(
                arguments.packages, arguments.out, arguments.classes, not arguments.yellow
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{count} pictures: {arguments.out}")


if __name__ == "__main__":
    main()
