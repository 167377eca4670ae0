"""examples/photo_crops.py: small images out of photographs."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "photo_crops.py"))


@pytest.fixture
def folder(tmp_path):
    noise = np.random.default_rng(0)
    for name, level in (("a.png", 0), ("b.jpg", 128)):
        Image.fromarray(noise.integers(level, level + 64, (40, 48, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a photograph")
    return tmp_path


def cut(folder, *flags):
    SCRIPT["main"]([str(folder), "-o", str(folder / "out.npy"), "--size", "8", *flags])
    return np.load(folder / "out.npy")


def test_crops_are_different_images_of_all_photographs_and_a_function_of_the_seed(folder):
    pixels = cut(folder, "--count", "60")
    assert pixels.shape == (60, 3, 8, 8)
    assert pixels.dtype == np.uint8
    assert len({image.tobytes() for image in pixels}) == 60
    bright = (pixels.mean((1, 2, 3)) > 96).sum()
    assert 15 <= bright <= 45  # half of them, 3.9 standard deviations wide
    assert np.array_equal(pixels, cut(folder, "--count", "60"))
    assert not np.array_equal(pixels, cut(folder, "--count", "60", "--seed", "1"))


def test_a_crop_of_a_photographs_own_size_is_the_photograph():
    ramp = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3) % 251
    photo = Image.fromarray(ramp.astype(np.uint8))
    pixels = SCRIPT["crops"]([photo], 200, 8, 0)
    channels_first = ramp.astype(np.uint8).transpose(2, 0, 1)
    places = {channels_first[:, y : y + 8, x : x + 8].tobytes() for y in range(25) for x in range(25)}
    unscaled = [image for image in pixels if image.tobytes() in places]
    assert len(unscaled) >= 2  # squares of side 8 are copied pixel by pixel


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--size", "11"], "44 pixels a side, got \\(48, 40\\)"), (["--count", "9999999"], "is more than")],
)
def test_what_cannot_be_cut_is_refused(folder, flags, message, monkeypatch):
    monkeypatch.setitem(SCRIPT["crops"].__globals__, "TRIES", 0)
    with pytest.raises(SystemExit, match=message):
        cut(folder, *flags)


def test_a_folder_without_photographs_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"has no \.jpg"):
        cut(tmp_path)
