"""What drawing timesteps and learning from their losses costs, as a share of a training step of 200 ms.

A call is one draw of 64 timesteps and one update, refreshes of q among them.
"""

import statistics
import time

import pytest
import torch

from snrweights import DiscreteSchedule, FlowSchedule, ImportanceSampler, TimestepSampler
from snrweights.importance import RULES

BATCH, STEP, MOST = 64, 0.2, 0.01
SCHEDULES = {"discrete": DiscreteSchedule.from_name("linear"), "flow": FlowSchedule(num_train_timesteps=1000)}


def seconds(function, calls):
    """Return the mean time of a call."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def share_of_a_step(function, request):
    """Return the median over rounds of the time of a call over that of a step."""
    seconds(function, 200)
    median = statistics.median(seconds(function, 100) for _ in range(20))
    print(f"\n{request.node.callspec.id}: {1e6 * median:.0f} µs, {100 * median / STEP:.2f} % of a step")
    return median / STEP


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rule", RULES)
def test_drawing_and_learning(rule, schedule, request):
    sampler = ImportanceSampler(SCHEDULES[schedule], rule)
    loss, weight = torch.rand(BATCH), torch.rand(BATCH)

    def round_of_training():
        t, _ = sampler.draw(BATCH)
        sampler.update(t, loss, weight=weight)

    assert share_of_a_step(round_of_training, request) <= MOST


@pytest.mark.parametrize("world_size", [1, 64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_drawing_for_many_processes(schedule, world_size, request):
    sampler = TimestepSampler(SCHEDULES[schedule], "cosine", world_size=world_size)
    assert share_of_a_step(lambda: sampler.draw(BATCH), request) <= MOST
