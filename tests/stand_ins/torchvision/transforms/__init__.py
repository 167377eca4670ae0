"""A few transforms of PIL images and tensors; their chance comes from torch's generator."""

import enum

import numpy as np
import torch
from PIL import Image

from torchvision.transforms.functional import crop


class InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class Lambda:
    def __init__(self, function):
        self.function = function

    def __call__(self, image):
        return self.function(image)


class Resize:
    """To this length of the shorter edge."""

    def __init__(self, size, interpolation=InterpolationMode.BILINEAR):
        self.size = size
        self.resample = Image.Resampling[interpolation.name.removesuffix("_EXACT")]

    def __call__(self, image):
        scale = self.size / min(image.size)
        return image.resize(tuple(max(self.size, round(edge * scale)) for edge in image.size), self.resample)


class _Crop:
    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        if isinstance(image, torch.Tensor):
            top, left = (self.offset(edge - self.size) for edge in image.shape[-2:])
            return crop(image, top, left, self.size, self.size)
        left, top = (self.offset(edge - self.size) for edge in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class CenterCrop(_Crop):
    def offset(self, room):
        return room // 2


class RandomCrop(_Crop):
    def offset(self, room):
        return int(torch.randint(room + 1, ()))


class RandomHorizontalFlip:
    def __init__(self, p=0.5):
        self.p = p

    def __call__(self, image):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < self.p else image


class PILToTensor:
    def __call__(self, image):
        pixels = torch.from_numpy(np.array(image))
        return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


class ToTensor(PILToTensor):
    def __call__(self, image):
        return super().__call__(image).float() / 255


class ConvertImageDtype:
    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, pixels):
        return pixels.to(self.dtype) / 255 if pixels.dtype == torch.uint8 else pixels.to(self.dtype)


class Normalize:
    def __init__(self, mean, std):
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __call__(self, pixels):
        return (pixels - self.mean) / self.std
