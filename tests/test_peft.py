"""A PEFT-wrapped network trains with the weights as any other does."""

import torch
from diffusers import DDPMScheduler, UNet2DModel
from peft import LoraConfig, get_peft_model
from snrweights.integrations.processes import DiscreteProcess

import snrweights


def test_lora_gradients_are_those_of_the_weighted_loss():
    torch.manual_seed(0)
    network = UNet2DModel(
        8, 1, 1, block_out_channels=(32,), down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",)
    )
    wrapped = get_peft_model(network, LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    process = DiscreteProcess("epsilon", "linear", 1000, rescale_betas_zero_snr=False)
    model = process.wrap(wrapped)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora" in name for name in trainable)
    images, noise, t = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([5, 100, 800])
    x, target = process.noisy_and_target(images, noise, process.schedule.log_snr(t))

    snrweights.weighted_loss(model(x, t), target, t, DDPMScheduler(), "smoothed_kl", tau=0.2).backward()
    found = {name: p.grad.clone() for name, p in trainable.items()}
    weight = (1 - DDPMScheduler().alphas_cumprod[t]) / (1.2 - DDPMScheduler().alphas_cumprod[t])
    model.zero_grad()
    (weight * (model(x, t) - target).square().mean((1, 2, 3))).mean().backward()
    for name, parameter in trainable.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)
    assert all(float(gradient.abs().max()) > 0 for gradient in found.values())
