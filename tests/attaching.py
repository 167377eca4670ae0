"""What the tests of ``attach`` share: tiny denoisers, batches, and the gradients of a loop with explicit weights."""

import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import nn

import snrweights
from snrweights.predictions import convert_log_weight

F64 = torch.float64
INDICES = torch.tensor([5, 100, 500, 900])  # SNR 1118, 8.5, 0.09, 0.0003 of the linear table: on both sides of 5
FLOW = torch.tensor([20.0, 250.0, 600.0, 980.0], dtype=F64)  # sigma * 1000; SNR 2401, 9, 0.4, 0.0004
SIGMAS = torch.tensor([0.02, 0.3, 1.0, 20.0], dtype=F64)


def cases():
    """A scheduler and timesteps for each prediction type; fresh schedulers, as tests change them."""
    indices = {name: (DDPMScheduler(prediction_type=name), INDICES) for name in ("epsilon", "v_prediction", "sample")}
    return {
        **indices,
        "flow": (FlowMatchEulerDiscreteScheduler(), FLOW),
        "edm": (EDMEulerScheduler(), 0.25 * SIGMAS.log()),
    }


class Denoiser(nn.Module):
    """Two convolutions; what it returns, and of which shape, is up to ``form``."""

    def __init__(self, out=1, form=lambda prediction: prediction):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, out, 3, padding=1)
        self.form = form

    def forward(self, sample, timestep):
        t = torch.as_tensor(timestep).to(sample).reshape(-1, 1, 1, 1) / 1000
        return self.form(self.last(torch.tanh(self.first(sample) + t)))


def given(sample, timestep, *args, **kwargs):
    """Say what t is in a call of ``Denoiser``."""
    return timestep


def denoiser(**options):
    """Make a Denoiser in float64, always with the same parameters."""
    return Denoiser(**options).double()


def unet(**options):
    """Make a tiny UNet2DModel in float64, always with the same parameters."""
    torch.manual_seed(0)
    shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (32,), "norm_num_groups": 8}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "layers_per_block": 1}
    return UNet2DModel(**{**shape, **blocks, **options}).double()


def batch(rows=4, channels=1):
    """Return an input and a target, (rows, channels, 8, 8), always the same."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(rows, channels, 8, 8, generator=generator, dtype=F64) for _ in range(2))


X, Y = batch()


def weights(t, scheduler, **options):
    """Return the exact weights, (B, 1, 1, 1)."""
    options = {"dtype": F64, **options}
    return snrweights.loss_weight(torch.as_tensor(t).reshape(-1), scheduler, **options).reshape(-1, 1, 1, 1)


def attach(model, scheduler, method="min_snr", **options):
    """Attach in float64; Denoiser's timestep is told."""
    if isinstance(model, Denoiser):
        options = {"timestep": given, **options}
    return snrweights.attach(model, scheduler, method, **{"dtype": F64, **options})


def output(result):
    """Return the prediction of either model."""
    return result if isinstance(result, torch.Tensor) else result[0]


def gradient(model):
    """Return the gradient of all parameters that have one, in one vector."""
    return torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])


def train(model, t, weight=None, call=None):
    """Do a step of a plain mean MSE loop, or of an explicitly weighted one; return the gradients."""
    model.zero_grad()
    error = (output((call or model)(X, t)) - Y).square()
    (error if weight is None else weight * error).mean().backward()
    return gradient(model)


def expected(make, t, scheduler, **options):
    """Return the gradients of a fresh model with explicit weights, and those without any."""
    return train(make(), t, weights(t, scheduler, **options)), train(make(), t)


def distance(actual, wanted):
    """Largest deviation relative to the largest gradient."""
    assert actual.shape == wanted.shape
    return float((actual - wanted).abs().max() / wanted.abs().max())


def assert_weighted(actual, wanted, plain, tolerance=1e-10):
    """Compare with the explicitly weighted gradients, which must be far from the plain ones."""
    assert distance(plain, wanted) > max(0.05, 10 * tolerance), "the weights make no difference here"
    assert distance(actual, wanted) <= tolerance


def in_epsilon(loss, t, scheduler):
    """Turn errors of a scheduler's own target into those of epsilon, the tracker's unit."""
    schedule = snrweights.as_schedule(scheduler)
    log_snr = schedule.log_snr(t)
    return convert_log_weight(loss.log(), log_snr, "epsilon", schedule.prediction_type, schedule.sigma_data).exp()
