"""The network of examples/train_masked.py: a bidirectional transformer that says what each masked pixel may be."""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class PixelTransformer(ModelMixin, ConfigMixin):
    """A pre-norm transformer over squares of pixels, each pixel of each channel a token of its own.

    The tokens of a square share a position: their embeddings are added, and each has a head of its own. That shortens
    the sequence and takes nothing from masked diffusion, where the tokens are drawn independently given those that are
    known. The noise level is no input: the mask shows it. A class is one more position.

    Args:
        resolution: pixels of a side.
        channels: of an image.
        levels: values of a token; ``levels`` itself stands for a masked one.
        patch_size: pixels of a side of a square; it divides the resolution.
        hidden_size: of the transformer.
        num_layers: its blocks.
        num_heads: of attention; they divide ``hidden_size``.
        dropout: in attention and after each half of a block.
        num_classes: condition on that many; 0: none.

    Raises:
        ValueError: ``patch_size`` or ``num_heads`` does not divide.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        resolution: int = 8,
        channels: int = 1,
        levels: int = 17,
        patch_size: int = 1,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        dropout: float = 0.0,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if resolution % patch_size:
            raise ValueError(f"`patch_size` must divide the resolution, {resolution}, got {patch_size}.")
        if hidden_size % num_heads:
            raise ValueError(f"`num_heads` must divide `hidden_size`, {hidden_size}, got {num_heads}.")
        slots, positions = channels * patch_size**2, (resolution // patch_size) ** 2
        self.embedding = nn.Embedding(slots * (levels + 1), hidden_size)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(2 * slots))  # their sum has the variance of a place
        self.places = nn.Parameter(torch.randn(positions, hidden_size) / math.sqrt(2))
        self.classes = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None  # the last: no class
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden_size, num_heads, 4 * hidden_size, dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, slots * levels)
        nn.init.zeros_(self.head.weight)
        self.register_buffer("slots", torch.arange(slots) * (levels + 1), persistent=False)
        self.gradient_checkpointing = False

    def forward(self, tokens: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Return logits of every token.

        Args:
            tokens: (B, L) in [0, levels], of (C, H, W) in that order; ``levels`` where masked.
            class_labels: (B,) in [0, num_classes], the last for none; for a model with classes.

        Returns:
            (B, L, levels).
        """
        x = self.embedding(self._squares(tokens) + self.slots).sum(2) + self.places
        if self.classes is not None:
            x = torch.cat([self.classes(class_labels)[:, None], x], 1)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        return self._pixels(self.head(self.norm(x[:, -len(self.places) :])))

    def _squares(self, tokens: Tensor) -> Tensor:
        """Turn (B, L) into (B, positions, tokens of a position)."""
        c = self.config
        side, p = c.resolution // c.patch_size, c.patch_size
        x = tokens.reshape(-1, c.channels, side, p, side, p).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(len(tokens), side**2, -1)

    def _pixels(self, logits: Tensor) -> Tensor:
        """Turn (B, positions, tokens of a position times levels) into (B, L, levels)."""
        c = self.config
        side, p = c.resolution // c.patch_size, c.patch_size
        x = logits.reshape(-1, side, side, c.channels, p, p, c.levels).permute(0, 3, 1, 4, 2, 5, 6)
        return x.reshape(len(logits), -1, c.levels)


def to_tokens(images: Tensor, levels: int) -> Tensor:
    """Turn images (B, C, H, W) in [-1, 1] into the nearest of so many levels: int64 (B, L).

    Example:
        >>> to_tokens(torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3), 17)
        tensor([[ 0,  8, 16]])
    """
    return ((images.clamp(-1, 1) + 1) * ((levels - 1) / 2)).round().long().flatten(1)


def to_images(tokens: Tensor, levels: int, channels: int, resolution: int) -> Tensor:
    """Turn tokens (B, L) back into images (B, C, H, W) in [-1, 1].

    Example:
        >>> to_images(torch.tensor([[0, 8, 16, 16]]), 17, 1, 2).flatten().tolist()
        [-1.0, 0.0, 1.0, 1.0]
    """
    return (tokens * (2 / (levels - 1)) - 1).reshape(-1, channels, resolution, resolution)
