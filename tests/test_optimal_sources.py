"""The optimal loss of the same pixels from everywhere: tensor, array, memmap, file, folder, data sets."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from snrweights.integrations.data import ImageTensors, load_images
from snrweights.integrations.reference_data import ImageBytes, load_reference

from snrweights.optimal import optimal_loss
from snrweights.optimal.reference import ReferenceSet
from snrweights.optimal.sources import as_tensor
from snrweights.seeds import generator

SIGMAS = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)
PIXELS = torch.randint(256, (150, 3, 4, 4), generator=generator(0), dtype=torch.uint8)  # more than two batches
LABELS = torch.arange(150) % 3


class Pixels(torch.utils.data.Dataset):
    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, i):
        return PIXELS[i], i


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(PIXELS)


def saved(folder):
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in PIXELS]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": images, "label": LABELS.tolist()}, features=features)
    data.save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def image_folder(folder):
    for number, (image, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        (folder / "images" / str(int(label))).mkdir(parents=True, exist_ok=True)
        path = folder / "images" / str(int(label)) / f"{number:03}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder / "images"


def memmap(folder):
    np.save(folder / "x.npy", PIXELS.numpy())
    return np.load(folder / "x.npy", mmap_mode="r")


def latents(folder, **tensors):
    save_file(tensors, folder / "l.safetensors")
    return folder / "l.safetensors"


SOURCES = {
    "array": lambda folder: PIXELS.numpy(),
    "memmap": memmap,
    "safetensors": lambda folder: latents(folder, x=PIXELS),
    "torch Dataset": lambda folder: Pixels(),
    "torch IterableDataset": lambda folder: Streamed(),
    "generator": lambda folder: (image for image in PIXELS),
    "saved data set": saved,
    "data set": lambda folder: datasets.load_from_disk(saved(folder)),
}


def assert_same(one, other):
    assert torch.equal(one.value, other.value)
    assert torch.equal(one.stderr, other.stderr)
    assert (one.how, one.made) == (other.how, other.made)


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_pixels_give_the_same_curve(name, tmp_path):
    whole = optimal_loss(PIXELS, SIGMAS, draws=32, flips=True)
    assert_same(optimal_loss(SOURCES[name](tmp_path), SIGMAS, draws=32, flips=True), whole)


def test_labels_come_from_a_column(tmp_path):
    by_class = optimal_loss(PIXELS, SIGMAS, draws=32, labels=LABELS)
    for source in (latents(tmp_path, x=PIXELS, label=LABELS), saved(tmp_path)):
        assert_same(optimal_loss(source, SIGMAS, draws=32, labels="label"), by_class)
    assert by_class.made["groups"] == 3


def test_a_folder_of_images_with_a_folder_for_each_class(tmp_path):
    order = LABELS.argsort(stable=True)
    found = optimal_loss(image_folder(tmp_path), SIGMAS, draws=32, labels="label")
    assert_same(found, optimal_loss(PIXELS[order], SIGMAS, draws=32, labels=LABELS[order]))


def test_images_are_fitted_and_cut_as_for_training(tmp_path):
    for number, size in enumerate([(9, 14), (20, 12), (12, 12)]):
        noise = torch.randint(256, (*size, 3), generator=generator(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / f"{number}.png")
    data = load_images(str(tmp_path))
    for resolution, channels in ((8, 3), (12, 1)):
        bytes_ = ImageBytes(data, "image", resolution, channels)
        trained_on = ImageTensors(data, "image", resolution, channels)
        for i in range(3):
            assert torch.equal(bytes_[i] / 127.5 - 1, trained_on[i][0])
    assert ImageBytes(data, "image")[1].shape == (3, 9, 9)


def test_workers_decode_the_same(tmp_path):
    path = saved(tmp_path)
    alone, three = (optimal_loss(load_reference(path)[0], SIGMAS, draws=16, workers=n) for n in (0, 2))
    assert_same(alone, three)


def test_a_decoded_copy_is_used_again_and_only_for_the_same_data(tmp_path):
    path, folder = saved(tmp_path), tmp_path / "state"
    folder.mkdir()

    def read(images):
        stages = []
        tensor = as_tensor(images, workers=0, folder=folder, report=lambda stage, _: stages.append(stage))
        return tensor, stages

    first, decoded = read(load_reference(path)[0])
    again, read_back = read(load_reference(path)[0])
    grey, decoded_anew = read(load_reference(path, channels=1)[0])
    assert torch.equal(first, PIXELS)
    assert torch.equal(again, PIXELS)
    assert grey.shape == (150, 1, 4, 4)
    assert torch.equal(grey[3], ImageBytes(load_images(path), "image", 4, 1)[3])
    assert (bool(decoded), bool(read_back), bool(decoded_anew)) == (True, False, True)
    (folder / "rows.bin").write_bytes(b"short")
    assert torch.equal(read(load_reference(path)[0])[0], PIXELS)
    (folder / "rows.json").write_text("{}")
    assert torch.equal(read(load_reference(path)[0])[0], PIXELS)
    assert sorted(path.name for path in folder.iterdir()) == ["rows.bin", "rows.json"]


def test_nothing_is_left_of_a_data_set_that_ends_in_an_error(tmp_path):
    def broken():
        yield PIXELS[0]
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        as_tensor(broken(), workers=0, folder=tmp_path, report=lambda *_: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_latents_are_streamed_as_they_are(dtype):
    x = torch.randn(70, 5, generator=generator(1)).to(dtype)
    found = as_tensor(iter(x), workers=0, folder=None, report=lambda *_: None)
    assert found.dtype == dtype
    assert torch.equal(found, x)


def test_mean_and_variance_of_bytes_are_exact_whatever_the_chunks():
    sets = [ReferenceSet(PIXELS, LABELS, True, "cpu", chunk) for chunk in (1, 7, 1000)]
    assert len({reference.variance for reference in sets}) == 1
    rows = PIXELS.double().flatten(1) / 127.5 - 1
    mirrored = (PIXELS.double().flip(-1)).flatten(1) / 127.5 - 1
    both = [torch.cat([rows[c == LABELS], mirrored[c == LABELS]]) for c in range(3)]
    variance = sum(float((group - group.mean(0)).square().sum()) for group in both) / 300
    assert sets[0].variance == pytest.approx(variance, rel=1e-13)
    for number, group in enumerate(both):
        torch.testing.assert_close(sets[1]._means[number], group.mean(0), rtol=1e-12, atol=1e-14)


def test_the_variance_of_data_far_from_the_origin():
    x = 1e7 + torch.randn(40, 6, generator=generator(2), dtype=torch.float64)
    reference = ReferenceSet(x, None, False, "cpu", 11)
    assert reference.variance == pytest.approx(float((x - x.mean(0)).square().sum() / 40), rel=1e-8)


def test_the_fingerprint_tells_data_labels_and_shapes_apart():
    def made(data, labels=None):
        return ReferenceSet(data, labels, False, "cpu", 64).provenance()["data"]

    other = PIXELS.clone()
    other[-1, 0, 0, 0] ^= 1
    prints = [made(PIXELS), made(other), made(PIXELS.flatten(1)), made(PIXELS, LABELS), made(PIXELS, LABELS.sort()[0])]
    two = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])  # of one order when sorted
    prints += [made(PIXELS[:4], labels) for labels in two]
    assert len(set(prints)) == len(prints)
    assert made(PIXELS, LABELS) == made(PIXELS, 5 * LABELS + 2)


def test_what_is_not_there_is_named_with_the_choices(tmp_path):
    path = saved(tmp_path)
    for arguments, message in (
        ({"column": "img"}, r"`column` 'img' is not in .*\['image', 'label'\]"),
        ({"labels": "lable"}, r"`labels` 'lable' is not in the data set; choose one of \['image', 'label'\]"),
        ({"channels": 2}, r"`channels` must be one of \[1, 3\], got 2"),
        ({"labels": "image"}, "`labels` 'image' holds neither integers nor text"),
        ({"split": "test"}, r"`split` 'test' is not in .*choose one of \['train'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reference(path, **arguments)
    two = latents(tmp_path, a=torch.zeros(3, 2), b=torch.zeros(3, 2))
    for arguments, message in (
        ({}, r"`column` None is not in .*l.safetensors'; choose one of \['a', 'b'\]"),
        ({"column": "c"}, r"`column` 'c' is not in .*choose one of \['a', 'b'\]"),
        ({"labels": "y"}, r"is not in .*choose one of \['a', 'b'\]"),
        ({"resolution": 8}, "`resolution` 8 is for images"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reference(two, **arguments)
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_reference(tmp_path / "nothing.npy")


def test_labels_of_a_npy_are_another(tmp_path):
    for name, array in (("x", PIXELS), ("y", LABELS)):
        np.save(tmp_path / f"{name}.npy", array.numpy())
    data, labels = load_reference(tmp_path / "x.npy", labels=str(tmp_path / "y.npy"))
    assert_same(
        optimal_loss(data, SIGMAS, draws=8, labels=labels), optimal_loss(PIXELS, SIGMAS, draws=8, labels=LABELS)
    )
    with pytest.raises(ValueError, match=r"`column` 'image' is not in .*a \.npy holds one array"):
        load_reference(tmp_path / "x.npy", column="image")


def test_a_stream_of_datasets_is_refused_with_what_to_do(tmp_path):
    stream = datasets.load_from_disk(saved(tmp_path)).to_iterable_dataset()
    with pytest.raises(TypeError, match=r"give its images as uint8 tensors .* for row in source\)"):
        optimal_loss(stream, SIGMAS)
    images = (torch.from_numpy(np.array(row["image"])).permute(2, 0, 1) for row in stream)
    assert_same(optimal_loss(images, SIGMAS, draws=16), optimal_loss(PIXELS, SIGMAS, draws=16))


def test_data_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="`data` must be a tensor, an array, a data set or the path of one, got int"):
        optimal_loss(3, SIGMAS)
    with pytest.raises(TypeError, match="`data` must yield tensors; item 0 is of int"):
        optimal_loss(iter([1]), SIGMAS)
    with pytest.raises(ValueError, match=r"item 1 is \(3,\) of torch.float32, the first \(2,\)"):
        optimal_loss(iter([torch.zeros(2), torch.zeros(3)]), SIGMAS)
    with pytest.raises(ValueError, match="`data` holds nothing"):
        optimal_loss(iter([]), SIGMAS)
    with pytest.raises(TypeError, match=r"`data` must be floating or uint8, got torch\.complex64"):
        optimal_loss(np.zeros((4, 2), np.complex64), SIGMAS)
    with pytest.raises(TypeError, match="an array of <U1 that torch does not take"):
        optimal_loss(np.array([["a"], ["b"]]), SIGMAS)
    with pytest.raises(ValueError, match="`labels` 'label' names a column, and `data` has none: Tensor"):
        optimal_loss(PIXELS, SIGMAS, labels="label")
