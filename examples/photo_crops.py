"""Cut small colour images out of photographs: a stand-in for a set of natural images where none can be downloaded.

python examples/photo_crops.py -o photos.npy
python examples/photo_crops.py my-photos/ --count 50000 --size 64 -o photos.npy
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = {
    "sklearn.datasets": ("images/china.jpg", "images/flower.jpg"),
    "skimage": tuple(f"data/{name}" for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")),
}
SUFFIXES = (".jpg", ".jpeg", ".png")
TRIES = 20  # for every image
LARGEST = 4  # times the size: the side of the largest square that is cut out and scaled down


def photographs(folder: str | None) -> list[Image.Image]:
    """Return the photographs of a folder, or those that come with scikit-learn and scikit-image."""
    if folder is None:
        try:
            paths = [Path(str(files(package))) / name for package, names in PHOTOGRAPHS.items() for name in names]
        except ModuleNotFoundError as error:
            raise SystemExit(f"{error}. The photographs are those of scikit-image: pip install scikit-image.") from None
    else:
        paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"`folder` {folder!r} has no {', '.join(SUFFIXES)}.")
    return [Image.open(path).convert("RGB") for path in paths]


def crops(photos: Sequence[Image.Image], count: int, size: int, seed: int) -> np.ndarray:
    """Return (count, 3, size, size) uint8, all different: squares of 1 to 4 times ``size``, scaled down to it.

    Photographs are drawn alike, the side of a square log-uniformly, its place uniformly.
    """
    if small := [photo.size for photo in photos if min(photo.size) < LARGEST * size]:
        raise SystemExit(f"`size` {size} needs photographs of {LARGEST * size} pixels a side, got {small[0]}.")
    draw = np.random.default_rng(seed)
    seen: dict[bytes, np.ndarray] = {}
    for _ in range(TRIES * count + 1):
        if len(seen) == count:
            return np.stack([*seen.values()])
        photo = photos[draw.integers(len(photos))]
        side = round(size * LARGEST ** draw.random())
        left, top = (draw.integers(extent - side + 1) for extent in photo.size)
        square = photo.resize((size, size), Image.Resampling.BOX, (left, top, left + side, top + side))
        pixels = np.asarray(square).transpose(2, 0, 1)
        seen.setdefault(pixels.tobytes(), pixels)
    raise SystemExit(f"`count` {count} is more than these photographs have: found {len(seen)} different images.")


def main(argv: Sequence[str] | None = None) -> None:
    """Cut, and write the file."""
    parser = argparse.ArgumentParser(description="Cut small colour images out of photographs.")
    parser.add_argument("folder", nargs="?", help="of photographs (default: six of scikit-learn and scikit-image)")
    parser.add_argument("--count", type=int, default=20_000, help="images (default: 20000)")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("-o", "--output", default="photos.npy", help="file to write (default: photos.npy)")
    arguments = parser.parse_args(argv)
    pixels = crops(photographs(arguments.folder), arguments.count, arguments.size, arguments.seed)
    np.save(arguments.output, pixels)
    print(f"Wrote {arguments.output}: {pixels.shape} {pixels.dtype}")


if __name__ == "__main__":
    main()
