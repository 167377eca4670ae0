"""What examples/train.py trains: the network, the weighting, and one optimizer step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from base_trainer import NOISE, VALIDATION, BaseTrainer, Images, under
from diffusers import DDPMPipeline, UNet2DModel
from options import Options, SamplerOptions
from snrweights.integrations.accelerate import SumOverProcesses, log_loss_by_noise
from snrweights.integrations.processes import Process
from snrweights.integrations.results import MetricsLog
from torch import Tensor, nn

import snrweights
from snrweights import plots
from snrweights.importance import RULES
from snrweights.optimal import OptimalLossCurve, floor_by_bin, gap_by_bin
from snrweights.schedules import Schedule
from snrweights.seeds import generator
from snrweights.settings import parse_settings
from snrweights.statistics import LossStatistics
from snrweights.uncertainty import LearnedUncertainty, with_uncertainty
from snrweights.weightings.base import needed_by

UNCERTAINTY = "uncertainty.safetensors"


def make_model(options: Options) -> UNet2DModel:
    """Return the network, its weights drawn from the seed."""
    torch.manual_seed(options.run.seed)
    return make_network(options)


def make_network(options: Options) -> UNet2DModel:
    """Return the network, its weights drawn from the global random numbers."""
    model = options.model
    unet = UNet2DModel(
        sample_size=options.data.resolution,
        in_channels=options.data.channels,
        out_channels=options.data.channels,
        layers_per_block=model.layers_per_block,
        block_out_channels=model.block_out_channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in model.attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(model.attention)),
        dropout=model.dropout,
        num_class_embeds=model.num_classes + 1 if model.num_classes else None,  # the last stands for no class
    )
    if model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def make_weighting(options: Options, curve: OptimalLossCurve | None) -> snrweights.Weighting:
    """Return the weighting that the options name, with the optimal loss of the run where it needs one."""
    settings: dict[str, Any] = dict(parse_settings(options.weight.set))
    if "curve" in needed_by(options.weight.method) and "curve" not in settings:
        if curve is None:
            raise SystemExit(f"`--method {options.weight.method}` needs the optimal loss: give --optimal-loss measure.")
        settings["curve"] = curve
    return snrweights.get_weighting(options.weight.method, **settings)


class WithUncertainty(nn.Module):
    """A network and, trained beside it, the uncertainty of its loss: one module to wrap, shard, average and save."""

    def __init__(self, network: nn.Module, uncertainty: LearnedUncertainty, schedule: Schedule) -> None:
        super().__init__()
        self.network, self.uncertainty, self._schedule = network, uncertainty, schedule

    def forward(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the prediction, shape of ``x``, and u at the samples' noise levels, (B,)."""
        return self.network(x, t, *args, **kwargs), self.uncertainty(self._schedule.log_snr(t))


class Trainer(BaseTrainer[snrweights.Draw]):
    """Model, weighting and optimizer, and one step of training them.

    Whatever is random is a function of (seed, forward pass): noise and timesteps are drawn for the global batch, of
    which every process takes its slice, so that neither a restart nor the number of processes changes a run. (But
    dropout in the network is drawn per process.)
    """

    def __init__(
        self, options: Options, accelerator: Accelerator, process: Process, curve: OptimalLossCurve | None = None
    ) -> None:
        super().__init__(options, accelerator)
        self.process, self.curve = process, curve
        weighting = make_weighting(options, curve)
        self.sampler = self.make_sampler(weighting)
        self.weight = weighting.bind(
            process.schedule,
            prediction_type=process.prediction_type,
            density=self.sampler.density,
            normalize="mean" if options.weight.normalize == "mean" else None,
            clamp_max=options.weight.clamp_max,
        )
        self.weight.reduce = SumOverProcesses(accelerator)
        self.center_ahead = weighting.batch_dependent and self.accumulation > 1
        if self.center_ahead and weighting.needs_loss and not weighting.averaged_over_steps:
            raise SystemExit(
                f"{weighting!r} compares the losses of a whole step, which its first forward pass does not know: "
                "--set center=ema, or --gradient-accumulation-steps 1."
            )
        self.tracker = self.make_tracker(
            reduce=SumOverProcesses(accelerator), snapshot_every=options.output.logging_steps * self.accumulation
        )
        model = process.wrap(make_model(options))
        groups = [{"params": [*model.parameters()]}]
        if options.weight.learned_uncertainty:
            model = WithUncertainty(model, LearnedUncertainty(seed=options.run.seed), process.schedule)
            groups.append({"params": [*model.uncertainty.parameters()]})
        self.prepare(model, groups)

    def make_sampler(self, weighting: snrweights.Weighting) -> snrweights.TimestepSampler:
        """Return what draws timesteps: from the weighting's own density, by importance, or as the process has them."""
        options = self.options.sampler
        density = self.process.density_for(weighting)
        asked = None if weighting.own_density(self.process.prediction_type) else weighting.rule
        rule = options.importance or asked or "none"
        draws: dict[str, Any] = {
            "draws": options.draws,
            "seed": self.options.run.seed,
            "rank": self.accelerator.process_index,
            "world_size": self.accelerator.num_processes,
            "accumulation": self.accumulation,
        }
        if rule == "none":
            self.refuse_importance_flags()
            return snrweights.TimestepSampler(self.process.schedule, density, **draws)
        if weighting.batch_dependent and options.importance_mode != "reweight":
            raise SystemExit(
                f"{weighting!r} takes its centre from what is drawn, which `--importance {rule}` moves, and with it "
                "the objective: --set center=fixed, or --importance none."
            )
        return snrweights.ImportanceSampler(
            self.process.schedule,
            rule,
            optimum=self.optimum(rule),
            density=density,
            mode=options.importance_mode,
            floor=options.importance_floor,
            refresh_every=options.importance_refresh,
            reduce=SumOverProcesses(self.accelerator),
            **draws,
        )

    def optimum(self, rule: str) -> Callable[[Tensor], Tensor] | None:
        """Return the optimal loss on the model's own target, for a rule that needs it."""
        if not RULES[rule].excess:
            return None
        if self.curve is None:
            raise SystemExit(f"`--importance {rule}` needs the optimal loss: give --optimal-loss measure.")
        process = self.process
        options = {"prediction_type": process.prediction_type, "sigma_data": process.schedule.sigma_data}
        return functools.partial(self.curve.mean_loss, **options)

    def refuse_importance_flags(self) -> None:
        """Refuse what would be ignored."""
        for name in ("importance_mode", "importance_floor", "importance_refresh"):
            value = getattr(self.options.sampler, name)
            if value != getattr(SamplerOptions(), name):
                flag = f"--{name.replace('_', '-')} {value}"
                raise SystemExit(
                    f"`{flag}` does nothing where timesteps are not drawn by importance: give --importance."
                )

    def draw(self, images: Tensor, labels: Tensor, forward: int) -> tuple[Tensor, Tensor, Tensor]:
        """Flip images, drop labels, and draw noise for forward pass number ``forward``."""
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        here = slice(len(images) * rank, len(images) * (rank + 1))
        stream = generator(self.options.run.seed, NOISE, forward, device=device)
        everywhere = (len(images) * world, *images.shape[1:])
        noise = torch.randn(everywhere, generator=stream, device=device)[here]
        flip, drop = torch.rand((2, everywhere[0]), generator=stream, device=device)[:, here]
        images, labels = self.flipped_and_dropped(images, labels, flip, drop)
        return images, noise, labels

    def draw_timesteps(self, passes: range) -> list[snrweights.Draw]:
        """Draw the timesteps of all forward passes of a step, and let a weight that is centred on them know."""
        batch_size, device = self.options.optimizer.train_batch_size, self.accelerator.device
        drawn = [self.sampler.draw(batch_size, index=forward, device=device) for forward in passes]
        if self.center_ahead:
            self.weight.center_on(torch.cat([t for t, _ in drawn]))
        return drawn

    def losses(self, images: Tensor, noise: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the unweighted loss of each sample, its log-SNR, and the learnt uncertainty there, if any."""
        log_snr = self.process.schedule.log_snr(t)
        x, target = self.process.noisy_and_target(images, noise, log_snr)
        classes = {"class_labels": labels} if self.options.model.num_classes else {}
        output = self.model(x, t, **classes)
        prediction, u = output if self.options.weight.learned_uncertainty else (output, None)
        return snrweights.per_sample_mse(prediction, target), log_snr, u

    def losses_of_pass(
        self, images: Tensor, labels: Tensor, forward: int, drawn: snrweights.Draw
    ) -> tuple[Tensor, Tensor]:
        """Return the mean weighted loss, and the one to descend, of forward pass number ``forward``."""
        t, factor = drawn
        images, noise, labels = self.draw(images, labels, forward)
        losses, log_snr, u = self.losses(images, noise, t, labels)
        self.tracker.update(losses, log_snr, prediction_type=self.process.prediction_type)
        weight = self.weight(t, losses.detach())
        # of the gradient that is taken, which exp(-u) divides as well
        self.sampler.update(t, losses.detach(), weight=weight if u is None else weight * torch.exp(-u.detach()))
        losses = weight * losses
        descended = (factor * (losses if u is None else with_uncertainty(losses, u))).mean()
        return (factor * losses.detach()).mean(), descended

    def example_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean unweighted loss halfway of the noise levels."""
        t = self.process.timesteps(torch.full((len(images),), 0.5, device=images.device))
        return self.losses(images, torch.randn_like(images), t, labels)[0].mean()

    def describe(self, step: int) -> dict[str, float]:
        """Return the gap to the optimal loss, if it is known; the loss by noise level goes to the trackers."""
        since = (step - 1) * self.accumulation
        log_loss_by_noise(self.accelerator, self.tracker, step, since=since)
        return self.gap(since)

    @torch.no_grad()
    def validate(self, held_out: Images, step: int, log: MetricsLog) -> None:
        """Measure the averaged weights on held-out images: each at four noise levels, the same every time."""
        images, labels = (part.repeat_interleave(4, 0) for part in held_out)
        stream = generator(self.options.run.seed, VALIDATION)
        noise = torch.randn(images.shape, generator=stream)
        u = (torch.randperm(len(images), generator=stream) + 0.5) / len(images)
        tracker = self.make_tracker()
        parts = zip(
            *(x.split(self.options.optimizer.train_batch_size) for x in (images, noise, u, labels)), strict=True
        )
        with self.averaged_weights():
            for batch in parts:
                images, noise, u, labels = (part.to(self.accelerator.device) for part in batch)
                losses, log_snr, _ = self.losses(images, noise, self.process.timesteps(u), labels)
                tracker.update(losses, log_snr, prediction_type=self.process.prediction_type)
        log.write_validation(step, tracker.compute())

    def plot_weights(self, path: Path) -> None:
        """Draw the weight on the epsilon error, and the objective that it amounts to."""
        choices = {"prediction_type": self.process.prediction_type, "density": self.sampler.density}
        labelled = {self.options.weight.method: self.weight.curve.weighting}
        plots.save(plots.plot_weights(self.process.schedule, labelled, **choices), path)

    def gap(self, since: int) -> dict[str, float]:
        """Return the mean gap to the optimal loss on the model's own target, and its standard error, for the log.

        Over the losses after this update of the tracker, by bin of log-SNR, each bin by its share of the density that
        timesteps are drawn from. Nothing without a curve, or where no bin has two losses.
        """
        if self.curve is None:
            return {}
        process, seen = self.process, self.tracker.since(since)
        density, target = self.sampler.density, process.prediction_type
        mean, stderr = gap_by_bin(seen, self.curve, density, target, process.schedule.sigma_data).mean()
        return {} if math.isnan(mean) else {"gap": mean, "gap_stderr": stderr}

    def floor(self, statistics: LossStatistics) -> Tensor | None:
        """Return the optimal loss (bins,) in the tracker's unit; None without a curve."""
        return None if self.curve is None else floor_by_bin(statistics.edges, self.curve, self.sampler.density)

    def make_tracker(self, **options: Any) -> snrweights.LossVarianceTracker:
        """Return a tracker of the error of epsilon, whatever the model predicts."""
        return snrweights.LossVarianceTracker(unit="epsilon", sigma_data=self.process.schedule.sigma_data, **options)

    def state(self, running: Tensor) -> dict[str, Tensor]:
        """Return everything that a step changes, whole tensors; every process calls it."""
        self.tracker.sync()
        tracked = {f"tracker.{name}": value for name, value in self.tracker.state_dict().items()}
        tracked |= {f"sampler.{name}": value for name, value in self.sampler_state().items()}
        weight = {f"weight.{name}": value for name, value in self.weight.state_dict().items()}
        return {**super().state(running), **tracked, **weight}

    def sampler_state(self) -> dict[str, Tensor]:
        """Return the sampler's state on every process, stacked: each has a history of losses of its own."""
        self.sampler.sync()
        device, gather = self.accelerator.device, self.accelerator.gather
        return {name: gather(value.to(device)[None]).cpu() for name, value in self.sampler.state_dict().items()}

    def restore_sampler(self, state: dict[str, Tensor]) -> None:
        """Take over this process's part, or another's where there are more processes than there were."""
        rank = self.accelerator.process_index
        self.sampler.load_state_dict({name: value[rank % len(value)] for name, value in state.items()})

    def restore(self, step: int, state: dict[str, Tensor]) -> Tensor:
        """Take over the state of a checkpoint; return the running loss."""
        self.tracker.load_state_dict(under("tracker.", state))
        self.restore_sampler(under("sampler.", state))
        self.weight.load_state_dict(under("weight.", state))
        return super().restore(step, state)

    def averaged(self) -> tuple[nn.Module, LearnedUncertainty | None]:
        """Return the wrapped network with averaged weights, and the uncertainty, if any; every process calls it.

        The model that is trained, and the global random numbers, are left as they are.
        """
        with torch.random.fork_rng(devices=()):
            network = self.process.wrap(make_network(self.options))
        learnt = self.options.weight.learned_uncertainty
        uncertainty = LearnedUncertainty(seed=self.options.run.seed) if learnt else None
        modules = nn.ModuleList([network, uncertainty] if learnt else [network])  # in the order of WithUncertainty
        self.copy_average(modules)
        return network, uncertainty

    def save_model(self, folder: Path) -> None:
        """Save the averaged weights as a pipeline, and the uncertainty beside it; every process calls it."""
        network, uncertainty = self.averaged()
        if self.accelerator.is_main_process:
            DDPMPipeline(network.model, self.process.scheduler).save_pretrained(folder)
            if uncertainty is not None:
                uncertainty.save(folder.parent / UNCERTAINTY)
        self.accelerator.wait_for_everyone()
