"""Images from every kind of source, and what is said when they are not there."""

import gzip
import struct

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


def write_idx(path, magic, array, cut=0):
    data = struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()
    data = data[: len(data) - cut]
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture(params=[".gz", ""], ids=["compressed", "plain"])
def idx(request, tmp_path):
    """A folder with the files of Fashion-MNIST, of 5 and of 2 images."""
    stream = np.random.default_rng(0)
    for prefix, count in (("train", 5), ("t10k", 2)):
        images = stream.integers(0, 256, (count, 28, 26), dtype=np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{request.param}", 0x803, images)
        labels = np.arange(count, dtype=np.uint8) % 10
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{request.param}", 0x801, labels)
    return tmp_path, request.param


def test_idx_files_are_read_as_they_are(idx):
    folder, end = idx
    stream = np.random.default_rng(0)
    for split, count in (("train", 5), ("test", 2)):
        expected = torch.from_numpy(stream.integers(0, 256, (count, 28, 26), dtype=np.uint8)[:, 1:27])
        data = ImageTensors(load_images(str(folder), split=split), "image", 26, 1, "label", 10)
        assert len(data) == count
        for i in (*range(count), 0):  # the first again: it is kept decoded
            torch.testing.assert_close((data[i][0][0] + 1) * 127.5, expected[i].float())
            assert data[i][1] == i
    with pytest.raises(ValueError, match=r"`split` 'valid' is not in .*\['train', 'test'\]"):
        load_images(str(folder), split="valid")
    (folder / f"train-labels-idx1-ubyte{end}").unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        load_images(str(folder))


def test_damaged_idx_files_are_named(tmp_path):
    images, labels = np.zeros((3, 4, 4), np.uint8), np.zeros(3, np.uint8)
    paths = [tmp_path / f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]

    def refused(said):
        with pytest.raises(ValueError, match=said):
            load_images(str(tmp_path))

    write_idx(paths[0], 0x801, images)
    refused(r"train-images-idx3-ubyte.gz' is not an IDX file of images: its magic number is 0x0801, not 0x0803")
    write_idx(paths[0], 0x803, images, cut=1)
    refused(r"of images: after its header are 47 bytes, not those of the shape \[3, 4, 4\]")
    paths[0].write_bytes(b"\x1f\x8b and then no more")
    refused("train-images-idx3-ubyte.gz' is not an IDX file of images")
    paths[0].write_bytes(gzip.compress(b""))
    refused("its magic number is 0x0000")
    write_idx(paths[0], 0x803, images)
    write_idx(paths[1], 0x801, labels[:2])
    refused("train-labels-idx1-ubyte.gz' has 2 labels for 3 images")


def test_shrinking_averages_what_it_takes_together():
    """A pattern of single pixels becomes grey, not another pattern."""
    board = (np.indices((28, 28)).sum(0) % 2 * 255).astype(np.uint8)
    data = datasets.Dataset.from_dict({"image": [Image.fromarray(board)]}).cast_column(
        "image", datasets.Image(decode=False)
    )
    assert ImageTensors(data, "image", 16, 1)[0][0].abs().max() < 0.15


def test_images_are_the_same_decoded_once_or_each_time(folder, monkeypatch):
    kept = ImageTensors(load_images(str(folder)), "image", 8, 3)
    monkeypatch.setattr("snrweights.integrations.data._SMALL", 0)
    read = ImageTensors(load_images(str(folder)), "image", 8, 3)
    for i in (0, 1, 2, 1):
        assert torch.equal(kept[i][0], read[i][0])
    (folder / "1.png").unlink()
    assert kept[1][0].shape == (3, 8, 8)
    with pytest.raises(ValueError, match="cannot be decoded"):
        read[1]


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
