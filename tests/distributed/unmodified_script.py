"""A training script as they are, for `snrweights launch`: accelerate, two micro-batches a step, no weights."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from attach_worker import STEPS, batch, make, mse, sgd
from safetensors.torch import save_file

torch.set_num_threads(1)
accelerator = Accelerator(gradient_accumulation_steps=2)
model = make("condition")
model, optimizer = accelerator.prepare(model, sgd(model))
rank, world = accelerator.process_index, accelerator.num_processes
for step in range(STEPS):
    for micro_batch in range(2):
        inputs, noise, t = batch("condition", step, 2 * rank + micro_batch, 2 * world)
        with accelerator.accumulate(model):
            accelerator.backward(mse(model(**inputs).sample, noise, t))
            optimizer.step()
            optimizer.zero_grad()
save_file(accelerator.unwrap_model(model).state_dict(), Path(sys.argv[1]) / f"tensors-{rank}.safetensors")
accelerator.end_training()
