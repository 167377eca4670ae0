"""Images from every kind of source, and what is said when they are not there."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from snrweights.integrations.data import ImageTensors, SeededBatches, load_images

from snrweights.seeds import generator


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((10, 12, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_digits_are_the_1797_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = ImageTensors(load_images("digits"), "image", 8, 1)
    assert len(data) == 1797
    expected = torch.from_numpy(load_digits().images[5]).float()[None] / 8 - 1
    assert (data[5][0] - expected).abs().max() < 1 / 255  # 17 grey levels on 256


def test_image_folder_is_resized_cropped_and_converted(folder):
    data = ImageTensors(load_images(str(folder)), "image", 5, 1)
    assert data[2][0].shape == (1, 5, 5)
    torch.testing.assert_close(data[2][0], torch.full((1, 5, 5), 80 / 127.5 - 1))
    assert ImageTensors(load_images(str(folder)), "image", 16, 3)[0][0].shape == (3, 16, 16)


@pytest.mark.parametrize("split", [None, "train"])
def test_saved_data_set_with_the_schema_of_cifar(tmp_path, split):
    image = Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3))
    data = datasets.Dataset.from_dict({"img": [image] * 2, "label": [0, 1]}).cast_column("img", datasets.Image())
    (data if split is None else datasets.DatasetDict({split: data})).save_to_disk(str(tmp_path / "cifar"))
    loaded = ImageTensors(load_images(str(tmp_path / "cifar"), column="img"), "img", 32, 3)
    torch.testing.assert_close((loaded[1][0] + 1) * 127.5, torch.from_numpy(np.array(image)).permute(2, 0, 1).float())


def test_a_source_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'no/such_data' is neither a folder here nor a hub data set"):
        load_images("no/such_data")


def test_wrong_column_and_split_list_the_choices(folder):
    with pytest.raises(ValueError, match=r"`column` 'img' is not in .*\['image'\]"):
        load_images(str(folder), column="img")
    with pytest.raises(ValueError, match=r"`split` 'test' is not in .*\['train'\]"):
        load_images(str(folder), split="test")


def test_an_image_that_cannot_be_decoded_is_named(folder):
    (folder / "1.png").write_bytes(b"not a picture")
    data = ImageTensors(load_images(str(folder)), "image", 8, 3)
    with pytest.raises(ValueError, match=r"Image 1 of the data set \(.*1\.png\) cannot be decoded"):
        data[1]


def test_sixteen_bits_and_orientation_are_read_as_a_viewer_would(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)).save(tmp_path / "grey.png")
    turned = np.zeros((8, 8, 3), np.uint8)
    turned[0] = 255  # a bright line at the top, at the right once turned clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(turned).save(tmp_path / "photo.jpg", exif=exif, quality=100, subsampling=0)
    data = ImageTensors(load_images(str(tmp_path)), "image", 8, 1)
    torch.testing.assert_close(data[0][0].flatten(), torch.linspace(-1, 1, 64), rtol=0, atol=1 / 127)
    assert data[1][0][0, :, -1].min() > 0.8
    assert data[1][0][0, :, 0].max() < -0.8


def test_channels_and_empty_data_are_refused(folder):
    data = load_images(str(folder))
    with pytest.raises(ValueError, match=r"`channels` must be one of \[1, 3\], got 2"):
        ImageTensors(data, "image", 8, 2)
    with pytest.raises(ValueError, match="no images"):
        ImageTensors(data.select([]), "image", 8, 3)


def test_batches_depend_on_seed_and_step_only():
    one = list(SeededBatches(20, 6, seed=3, steps=range(7)))
    assert (
        one == list(SeededBatches(20, 6, seed=3, steps=range(7))) != list(SeededBatches(20, 6, seed=4, steps=range(7)))
    )
    ranks = [list(SeededBatches(20, 3, seed=3, steps=range(7), rank=rank, world=2)) for rank in range(2)]
    assert one == [a + b for a, b in zip(*ranks, strict=True)]
    assert len({i for batch in one[:3] for i in batch}) == 18  # within an epoch no image comes twice
    with pytest.raises(ValueError, match="`batch_size` 21 on 1 process"):
        SeededBatches(20, 21, seed=0, steps=range(1))


def test_generator_streams_differ_by_key():
    draws = {torch.rand((), generator=generator(*keys)).item() for keys in [(0,), (0, 0), (0, 1), (1, 0)]}
    assert len(draws) == 4
