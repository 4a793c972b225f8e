"""Grids of hand-made tiles."""

import numpy as np
import pytest
from PIL import Image

from nvg_jax.errors import UserError
from nvg_jax.visualize import (
    FONTS,
    GAP,
    class_grid,
    image_grid,
    label_font,
    labeled_grid,
    marked,
    reconstruction_grid,
    save_png,
    structure_colors,
    to_uint8,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def tile(color, height=64, width=64):
    return np.broadcast_to(np.array(color, np.uint8), (height, width, 3))


def is_all(part, color):
    return part.size > 0 and (part == np.array(color)).all()


def test_floats_become_bytes_truncated_and_clipped():
    got = to_uint8(np.array([-1, 0, 1, -1.5, 7, 3 / 255 - 1], np.float32))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, [0, 127, 255, 0, 255, 1])  # 127.5 and 1.5 lose their half


def test_integers_of_an_unknown_range_are_refused():
    for values in ([0, 1, 128, 255], [True]):
        with pytest.raises(UserError, match="in uint8, or float in .-1, 1., got (int64|bool)"):
            to_uint8(np.array(values))


def test_exact_pixels_stay_as_they_are():
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(pixels.astype(np.float32) / 127.5 - 1), pixels)


def test_tiles_lie_in_rows_on_white():
    tiles = np.stack([tile(RED, 70, 80), tile(GREEN, 70, 80), tile(BLUE, 70, 80)])
    grid = image_grid(tiles, columns=2)
    assert grid.dtype == np.uint8 and GAP == 2
    assert grid.shape == (2 * 70 + 2, 2 * 80 + 2, 3)
    assert is_all(grid[:70, :80], RED)
    assert is_all(grid[:70, 82:], GREEN)
    assert is_all(grid[72:, :80], BLUE)
    assert is_all(grid[70:72], WHITE) and is_all(grid[:, 80:82], WHITE)
    assert is_all(grid[72:, 82:], WHITE)  # no fourth tile


def test_small_tiles_are_enlarged_by_a_whole_factor():
    pixels = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8)
    grid = image_grid(pixels[None], columns=1)
    assert grid.shape == (64, 64, 3)
    assert is_all(grid[:32, :32], RED) and is_all(grid[:32, 32:], GREEN)
    assert is_all(grid[32:, :32], BLUE)
    assert image_grid(np.zeros((1, 28, 28, 3), np.uint8), columns=1).shape == (56, 56, 3)


def test_float_tiles():
    grid = image_grid(np.zeros((1, 64, 64, 3), np.float32), columns=1)
    assert is_all(grid, (127, 127, 127))


def test_originals_are_above_their_reconstructions():
    originals = np.stack([np.full((64, 64, 3), value, np.float32) for value in (-1, 1)])
    labeled = reconstruction_grid(originals, np.zeros_like(originals))
    assert (labeled[:, :-130] < 128).any()  # what the rows are
    grid = labeled[:, -130:]
    assert len(grid) == 130
    assert is_all(grid[:64, :64], 0) and is_all(grid[:64, 66:], 255)
    assert is_all(grid[66:, :64], 127) and is_all(grid[66:, 66:], 127)
    named = reconstruction_grid(originals, np.zeros_like(originals), columns=["best", "worst"])
    np.testing.assert_array_equal(named[-130:], labeled)
    heads = (named[:-130, -130:] < 128).any((0, 2))
    assert heads[:64].any() and heads[66:].any()


def test_colors_of_labels_keep_the_family():
    colors = structure_colors(np.arange(256).reshape(16, 16), 8)
    assert colors.shape == (16, 16, 3) and colors.dtype == np.uint8
    assert len(np.unique(colors.reshape(-1, 3), axis=0)) == 256
    # The mean color of two siblings is closer to their parent's color than to any other's.
    for stage in range(2, 6):
        parents = structure_colors(np.arange(2**stage), stage).astype(float)
        children = structure_colors(np.arange(2 ** (stage + 1)), stage + 1).astype(float)
        siblings = children.reshape(-1, 2, 3).mean(1)
        distance = np.linalg.norm(siblings[:, None] - parents, axis=-1)
        np.testing.assert_array_equal(distance.argmin(1), np.arange(2**stage))
    # Siblings of the finest stage, whose hues are nearly the same, differ in lightness.
    finest = colors.reshape(128, 2, 3).astype(float)
    assert np.linalg.norm(finest[:, 0] - finest[:, 1], axis=-1).min() > 6


def test_a_grid_with_texts():
    tiles = [[tile(RED), tile(GREEN), tile(BLUE)], [tile(BLUE), tile(RED), tile(GREEN)]]
    picture = labeled_grid(tiles, ["one", "a longer one"], ["left", "right", "right"])
    grid = image_grid(np.asarray(tiles).reshape(-1, 64, 64, 3), columns=3)
    height, width, _ = grid.shape
    np.testing.assert_array_equal(picture[-height:, -width:], grid)
    left, top = picture.shape[1] - width, picture.shape[0] - height
    dark = (picture < 128).all(-1)
    rows = [dark[top : top + 64, :left], dark[top + 66 :, :left]]
    assert all(part.any() for part in rows) and rows[1].sum() > rows[0].sum()
    heads = dark[:top, left:]
    # "right" is written once, in the middle of its two columns.
    assert heads[:, :64].any() and heads[:, 120:140].any() and not heads[:, 180:].any()
    labeled_grid([[tile(RED)]], [""], [""])
    # A head that is too wide for its column has a line for each word.
    broken = labeled_grid(tiles, ["one", "a longer one"], ["left", "head of words", "right"])
    added = broken.shape[0] - picture.shape[0]
    np.testing.assert_array_equal(broken[-height:, -width:], grid)
    lines = (broken[: top + added, left + 66 : left + 130] < 128).all(-1).any(1)
    assert added > top and np.diff(lines.astype(int)).clip(0).sum() == 3
    assert not (broken[: top + added, left + 60 : left + 66] < 128).all(-1).any()


def test_letters_of_all_languages_are_drawn_or_replaced(monkeypatch):
    for fonts in (FONTS, ()):  # without one of the system, too
        monkeypatch.setattr("nvg_jax.visualize.FONTS", fonts)
        font, (plain, umlaut, other) = label_font(["cat", "Bl\u00fcte", "\U00012345"], 12)
        assert plain == "cat" and umlaut in ("Bl\u00fcte", "Blute") and other == "?"
        box = bytes(font.getmask("\U000ffffd"))
        assert all(bytes(font.getmask(letter)) != box for letter in umlaut)
    assert umlaut == "Blute"  # Pillow's own font has ASCII alone


def test_what_a_mask_covers_is_tinted():
    image = np.full((2, 1, 3), 200, np.uint8)
    got = marked(image, np.array([[True], [False]]))
    np.testing.assert_array_equal(got[:, 0], [[227, 122, 175], [200, 200, 200]])
    assert got.dtype == np.uint8


def test_a_grid_of_larger_tiles_has_larger_texts():
    tiles = [[tile(RED), tile(GREEN)]]
    small, large = (labeled_grid(tiles, ["a row"], ["left", "right"], size) for size in (64, 192))
    height, width = 192, 2 * 192 + 2
    grid = large[-height:, -width:]
    assert is_all(grid[:, :192], RED) and is_all(grid[:, 194:], GREEN)
    texts = [(picture < 128).all(-1).any(1).sum() for picture in (small, large)]  # rows of pixels
    assert texts[1] > 1.4 * texts[0]


def test_a_png_holds_the_very_pixels(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    save_png(tmp_path / "picture.png", picture)
    with Image.open(tmp_path / "picture.png") as image:
        np.testing.assert_array_equal(np.asarray(image), picture)


def test_every_class_begins_a_row_with_its_name():
    images = [tile(RED), tile(GREEN), tile(BLUE), tile(RED)]
    picture = class_grid(np.stack(images), ["cat", "cat", "cat", "dog"], columns=2)
    grid = picture[:, -130:]
    assert grid.shape == (3 * 66 - 2, 130, 3)
    for row, column, expected in (
        (0, 0, RED), (0, 1, GREEN), (1, 0, BLUE), (1, 1, 255), (2, 0, RED), (2, 1, 255)
    ):  # fmt: skip
        top, left = 66 * row, 66 * column
        assert is_all(grid[top : top + 64, left : left + 64], expected)
    dark = (picture[:, :-130] < 128).any((1, 2))
    assert dark[:64].any() and dark[66:130].any() and dark[132:].any()
