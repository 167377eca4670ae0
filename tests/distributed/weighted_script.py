"""A training script that weighs its loss by itself, if told to on these ranks: `weighted_script.py OUTPUT [RANKS]`."""

import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from attach_worker import SCHEDULER, batch, make, sgd

torch.set_num_threads(1)
accelerator = Accelerator()
model = make("unet")
model, optimizer = accelerator.prepare(model, sgd(model))
rank, world = accelerator.process_index, accelerator.num_processes
output, ranks = Path(sys.argv[1]), sys.argv[2:]
for step in range(20):
    inputs, noise, t = batch("unet", step, rank, world)
    snr = 1 / (1 / SCHEDULER.alphas_cumprod[t] - 1)
    weight = snr.clamp(max=0.05) / snr if str(rank) in ranks else torch.ones(())
    loss = (weight * (model(**inputs).sample - noise).square().mean((1, 2, 3))).mean()
    try:
        accelerator.backward(loss)
    except ValueError as error:
        (output / f"error-{rank}.txt").write_text(f"{step} {type(error).__name__}: {error}")
        time.sleep(0.5)  # torchrun ends the other process when this one is gone
        raise
    optimizer.step()
    optimizer.zero_grad()
(output / f"ends-{rank}.txt").write_text("ends")
accelerator.end_training()
