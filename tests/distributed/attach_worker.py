"""What test_attach_two_processes.py trains: every wrapping under torchrun, and one process to compare with."""

import functools
import json
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, DownBlock2D
from leaving import leave
from safetensors.torch import save_file
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import snrweights

LOSS_ROWS = 4  # of a tracker's moments; below them are those of gradients
STEPS, GLOBAL_BATCH, LEARNING_RATE = 4, 8, 0.1
METHOD = {"method": "min_snr", "gamma": 0.1}
SCHEDULER = DDPMScheduler()
MIDWAY = (1, 2)  # the steps that are weighted where attach and detach happen during training


def make(kind):
    """Return a tiny UNet in float64, the same in every process."""
    torch.manual_seed(0)
    size = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
    if kind == "small":  # for the compiler
        blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        return UNet2DModel(**size, **blocks, add_attention=False).double()
    size |= {"block_out_channels": (8, 16), "attention_head_dim": 4}
    if kind == "unet":
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        return UNet2DModel(**size, **blocks).double()
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    model = UNet2DConditionModel(**size, down_block_types=down, up_block_types=up, cross_attention_dim=8).double()
    if kind == "unused":
        model.never_called = torch.nn.Linear(3, 2).double()
    return model


def batch(kind, step, rank=0, world=1):
    """Return a process's share of the global batch of a step: the model's arguments, the noise, t."""
    g = torch.Generator().manual_seed(100 + step)
    sample = torch.randn(GLOBAL_BATCH, 1, 8, 8, generator=g, dtype=torch.float64)
    noise = torch.randn(sample.shape, generator=g, dtype=torch.float64)
    condition = torch.randn(GLOBAL_BATCH, 3, 8, generator=g, dtype=torch.float64)
    t = torch.randint(0, 600, (GLOBAL_BATCH,), generator=g)
    inputs = {"sample": SCHEDULER.add_noise(sample, noise, t), "timestep": t}
    if kind in ("condition", "unused"):
        inputs["encoder_hidden_states"] = condition
    return {name: tensor[rank::world] for name, tensor in inputs.items()}, noise[rank::world], t[rank::world]


def mse(prediction, noise, t):
    """The loss of a script that does not weigh."""
    return F.mse_loss(prediction, noise)


def train(model, optimizer, kind, steps, loss=mse, rank=0, world=1):
    """Train for these steps on a process's shares."""
    for step in steps:
        inputs, noise, t = batch(kind, step, rank, world)
        loss(model(**inputs).sample, noise, t).backward()
        optimizer.step()
        optimizer.zero_grad()


def attach(model, **options):
    """Attach with weights as exact as the model."""
    return snrweights.attach(model, SCHEDULER, **METHOD, dtype=torch.float64, **options)


def sgd(model):
    """An optimizer without a state."""
    return torch.optim.SGD(model.parameters(), LEARNING_RATE)


def explicit(kind, weighted=range(STEPS), dtype=torch.float64):
    """Train one process on whole batches, by a loop that weighs its loss at these steps and tracks it at all."""
    model, tracker, schedule = make(kind), snrweights.LossVarianceTracker(), snrweights.as_schedule(SCHEDULER)
    optimizer = sgd(model)

    def weighted_mse(prediction, noise, t):
        losses = snrweights.per_sample_mse(prediction, noise)
        tracker.update(losses.detach(), schedule.log_snr(t))
        weight = snrweights.loss_weight(t, SCHEDULER, **METHOD, dtype=dtype) if step in weighted else 1.0
        return (weight * losses).mean()

    for step in range(STEPS):
        train(model, optimizer, kind, [step], weighted_mse)
    return model.state_dict(), tracker.state_dict()["moments"][:LOSS_ROWS]


def attached(kind):
    """Train one process on whole batches, attached."""
    model = make(kind)
    with attach(model):
        train(model, sgd(model), kind, range(STEPS))
    return model.state_dict()


class Wrapping:
    """A kind of model, what wraps it, and how its blocks are checkpointed: reentrant, not reentrant, or not at all."""

    def __init__(self, kind, wrap, reentrant=None):
        self.kind = kind
        self.wrap = wrap
        self.reentrant = reentrant
        self.checkpointed = 0

    def make(self):
        model = make(self.kind)
        if self.reentrant is not None:
            model.enable_gradient_checkpointing(self._checkpoint)
        return model

    def _checkpoint(self, *args):
        self.checkpointed += 1
        return checkpoint(*args, use_reentrant=self.reentrant)


def compiled(model):
    return torch.compile(model, backend="aot_eager")


def fsdp1(model):
    blocks = ModuleWrapPolicy({DownBlock2D, CrossAttnDownBlock2D})
    cpu = torch.device("cpu")  # without a device it insists on an accelerator
    return FullyShardedDataParallel(model, auto_wrap_policy=blocks, device_id=cpu, use_orig_params=True)


def fsdp2(model):
    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
        fully_shard(block)
    return fully_shard(model)


DDP = DistributedDataParallel
STATIC = functools.partial(DDP, static_graph=True)
WRAPPINGS = {
    "ddp": Wrapping("unet", DDP),
    "ddp-find-unused": Wrapping("unused", functools.partial(DDP, find_unused_parameters=True)),
    "ddp-static-graph": Wrapping("unet", STATIC),
    "ddp-checkpointing": Wrapping("condition", DDP, reentrant=False),
    "ddp-static-graph-checkpointing-reentrant": Wrapping("condition", STATIC, reentrant=True),
    "compiled-in-ddp": Wrapping("small", lambda model: DDP(compiled(model))),
    "ddp-in-compiled": Wrapping("small", lambda model: compiled(DDP(model))),
    "accelerate": Wrapping("condition", lambda model: Accelerator(cpu=True).prepare(model)),
    "fsdp1": Wrapping("condition", fsdp1),
    "fsdp2": Wrapping("condition", fsdp2),
}
WHEN = ("before", "after", "midway")


def whole_parameters(model):
    """Return the parameters of a wrapped model, by their names in the bare one."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return _whole_parameters(model)
    return _whole_parameters(model)


def _whole_parameters(model):
    found = {}
    for name, parameter in model.named_parameters():
        for wrapper in ("_orig_mod.", "module.", "_fsdp_wrapped_module."):
            name = name.replace(wrapper, "")
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        found[name] = whole.detach().clone()
    return found


def run(wrapping, when, rank, world):
    """Train on this process's shares, attached before the wrapping, after it, or for the steps MIDWAY only."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    wrapping.checkpointed, start = 0, time.perf_counter()
    model = wrapping.make()
    before = attach(model, track=True) if when == "before" else None
    model = wrapping.wrap(model)
    loop = functools.partial(train, model, sgd(model), wrapping.kind, rank=rank, world=world)
    if when == "midway":
        loop(range(MIDWAY[0]))
        with attach(model) as handle:
            loop(MIDWAY)
        loop(range(MIDWAY[-1] + 1, STEPS))
    else:
        handle = before or attach(model)
        loop(range(STEPS))
    tensors = whole_parameters(model)
    if handle.tracker is not None:
        tensors["moments"] = handle.tracker.state_dict()["moments"][:LOSS_ROWS]
    return tensors, {
        "weighted": handle.weighted,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "checkpointed": wrapping.checkpointed,
        "seconds": time.perf_counter() - start,
    }


def main(output):
    """Run all cases, on each process of torchrun, and write what came out of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    tensors, facts = {}, {}
    for name, wrapping in WRAPPINGS.items():
        for when in WHEN:
            case = f"{name}-{when}"
            try:
                found, facts[case] = run(wrapping, when, rank, world)
            except Exception:
                facts[case] = {"error": traceback.format_exc()}
            else:
                tensors |= {f"{case}/{key}": value for key, value in found.items()}
    save_file(tensors, Path(output) / f"tensors-{rank}.safetensors")
    (Path(output) / f"facts-{rank}.json").write_text(json.dumps(facts, indent=2))
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
