"""What diffusers' training scripts use of torchvision, for machines where that cannot be imported. For tests only."""

from torchvision import transforms

__all__ = ["transforms"]
__version__ = "0.0.0"
