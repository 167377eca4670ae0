"""What the scripts of this folder share: a seed, a few steps of SGD, and the trained parameters saved at the end.

Each script trains as it stands. `--weigh attach` adds the one line of snrweights.attach, `--weigh formula` weighs the
loss by hand, which is what the others are compared with.
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file

import snrweights

GAMMA = 5.0


class Run:
    def __init__(self, *flags):
        parser = argparse.ArgumentParser()
        parser.add_argument("out", help="file for the parameters")
        parser.add_argument("--weigh", choices=["attach", "formula"])
        for flag in flags:
            parser.add_argument(flag, action="store_true")
        self.args = parser.parse_args()
        self.accelerator = Accelerator(cpu=True)
        self._log_snr = []
        torch.manual_seed(0)

    def attach(self, model, scheduler, **options):
        """The line that the documentation adds to a script."""
        if self.args.weigh == "attach":
            snrweights.attach(model, scheduler, "min_snr", gamma=GAMMA, **options)

    def uniform(self, n):
        """Draws that are spread over [0, 1), so that every batch has noise levels on both sides of gamma."""
        return (torch.arange(n) + torch.rand(n)) / n

    def mse(self, prediction, target, t, scheduler, **options):
        """The plain loss of the scripts, or the same weighted by hand."""
        if self.args.weigh != "formula":
            return F.mse_loss(prediction.float(), target.float(), reduction="mean")
        self._log_snr.append(snrweights.as_schedule(scheduler).log_snr(t))
        weights = snrweights.loss_weight(t, scheduler, "min_snr", gamma=GAMMA, **options)
        return (weights * (prediction.float() - target.float()).square().flatten(1).mean(1)).mean()

    def train(self, model, loss_of_a_batch, lr, steps=4):
        """Train the module's parameters that are not frozen; save them, and how they were before."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        tensors = {f"before.{name}": p.detach().clone() for name, p in trained.items()}
        optimizer = self.accelerator.prepare(torch.optim.SGD(trained.values(), lr=lr))
        for step in range(steps):
            loss = loss_of_a_batch()
            self.accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step}: loss {loss.item():.6f}")
        tensors |= {f"after.{name}": p.detach().clone() for name, p in trained.items()}
        if self._log_snr:
            tensors["log_snr"] = torch.cat(self._log_snr)
        save_file(tensors, self.args.out)


def small_unet(**options):
    """A UNet with cross attention, of 8 x 8 latents."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            **{"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4},
            **{"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)},
            **{"cross_attention_dim": 8, "attention_head_dim": 4},
            **options,
        }
    )
