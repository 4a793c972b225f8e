"""Makes resizing.json: photographs as albumentations and OpenCV prepare them.

    pip install albumentations==2.0.8 opencv-python-headless scikit-image
    python tests/reference/resizing.py

The published preparation: SmallestMaxSize(288, INTER_LANCZOS4), CenterCrop(256), on cuts of
scikit-image's photographs. Stored are the SHA-256 of each result and every 64th of its pixels. The
tests import this file; only `main` imports albumentations and OpenCV. OpenCV 4.14.0 and 5.0.0 give
the same file.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from skimage import data

FILE = Path(__file__).with_name("resizing.json")
# (photograph, height, width): shrunk and enlarged, upright and wide, with odd room for the crop,
# and two of which the long side is 288 / 64 times an odd number, exactly between two integers.
SIZES = (
    ("astronaut", 512, 511),
    ("astronaut", 383, 509),
    ("astronaut", 301, 289),
    ("chelsea", 299, 451),
    ("chelsea", 173, 201),
    ("chelsea", 64, 67),
    ("coffee", 399, 599),
    ("coffee", 65, 64),
)


def photograph(name: str, height: int, width: int) -> np.ndarray:
    """The upper left corner of a photograph, uint8 (height, width, 3)."""
    return np.ascontiguousarray(getattr(data, name)()[:height, :width])


def summary(crop: np.ndarray) -> dict:
    return {
        "sha256": hashlib.sha256(np.ascontiguousarray(crop)).hexdigest(),
        "pixels": crop[::64, ::64].tolist(),
    }


def main():
    import albumentations
    import cv2

    prepare = albumentations.Compose(
        [
            albumentations.SmallestMaxSize(288, interpolation=cv2.INTER_LANCZOS4),
            albumentations.CenterCrop(256, 256),
        ]
    )
    found = [summary(prepare(image=photograph(*size))["image"]) for size in SIZES]
    lines = ",\n".join(json.dumps(one) for one in found)
    FILE.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
