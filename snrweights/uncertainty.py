"""The uncertainty of the loss at each noise level, learnt beside the model: EDM2's way of balancing noise levels."""

from __future__ import annotations

import math
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from snrweights.files import save_tensors
from snrweights.seeds import generator

_REACH = 20.0  # log-SNR, beyond which a noise level is taken for the last one: there is nothing there to tell apart
_SETTINGS = {"features": int, "bandwidth": float, "seed": int}


class LearnedUncertainty(nn.Module):
    """u(log_snr), the logarithm of the expected loss at a noise level, trained through ``losses · exp(-u) + u``.

    Fourier features of c_noise = ln(sigma_hat) / 4 = -log_snr / 8, of fixed random frequencies and phases, under one
    linear layer without bias, which starts at 0: at first the loss is what it is without this. At the optimum
    ``u = ln E[loss | log_snr]``, so that every noise level counts alike, whatever weight the losses had.

    Train it by the model's optimizer and throw it away afterwards: sampling does not need it.

    Args:
        features: number of Fourier features, >= 1.
        bandwidth: standard deviation of their frequencies, in turns per unit of c_noise, > 0.
        seed: of frequencies and phases.

    Raises:
        ValueError: a bad value.

    Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696,
    Sec. 2.2 and Appendix B; 128 features there too.

    Example:
        >>> uncertainty = LearnedUncertainty()
        >>> uncertainty.loss(torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 3.0]))  # before any step: the losses
        tensor([0.5000, 2.0000], grad_fn=<AddBackward0>)
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int = 128, bandwidth: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"`LearnedUncertainty(features=...)` must be >= 1, got {features!r}.")
        if not 0 < bandwidth < math.inf:
            raise ValueError(f"`LearnedUncertainty(bandwidth=...)` must be > 0, got {bandwidth!r}.")
        self.features, self.bandwidth, self.seed = features, bandwidth, seed
        draw = generator(seed)
        self.register_buffer("frequencies", 2 * math.pi * bandwidth * torch.randn(features, generator=draw))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features, generator=draw))
        self.weight = nn.Parameter(torch.zeros(features))

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"features={self.features}, bandwidth={self.bandwidth}, seed={self.seed}"

    def forward(self, log_snr: Tensor) -> Tensor:
        """Return u, shape of ``log_snr`` (B,); finite at infinite log-SNR, too."""
        c_noise = (-log_snr.clamp(-_REACH, _REACH) / 8).to(self.weight)
        waves = torch.cos(c_noise[..., None] * self.frequencies + self.phases)
        return math.sqrt(2 / self.features) * (waves * self.weight).sum(-1)  # no matmul, which autocast would round

    def loss(self, losses: Tensor, log_snr: Tensor) -> Tensor:
        """Return ``losses · exp(-u) + u``, (B,), of weighted losses (B,) at ``log_snr`` (B,)."""
        return with_uncertainty(losses, self(log_snr))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and settings as safetensors, aside and then renamed."""
        state = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        save_tensors(path, state, {name: repr(getattr(self, name)) for name in _SETTINGS})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LearnedUncertainty:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is something else, or damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                stated = file.metadata() or {}
            uncertainty = cls(**{name: kind(stated[name]) for name, kind in _SETTINGS.items()})
            state = load_file(path)
            if not all(bool(value.isfinite().all()) for value in state.values()):
                raise ValueError("it holds values that are not finite")
            uncertainty.load_state_dict(state)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"`path` {os.fspath(path)!r} is not the file of a LearnedUncertainty: {error}.") from None
        return uncertainty


def with_uncertainty(losses: Tensor, u: Tensor) -> Tensor:
    """Return ``losses · exp(-u) + u``, shape of both; least at ``u = ln losses``.

    Example:
        >>> with_uncertainty(torch.tensor([2.0]), torch.tensor([2.0]).log())
        tensor([1.6931])
    """
    return losses * torch.exp(-u) + u
