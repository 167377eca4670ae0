"""A model trained with each weight: its ELBO on a joint that is solved exactly is near the entropy."""

import pytest
import torch
from joints import LENGTH, MASK_ID, TOKENS, Joint, exact_negative_elbo

from snrweights.masked import draw_times, list_masked_weightings, mask_tokens, masked_loss, negative_elbo

STEPS, BATCH = 400, 512


class Model(torch.nn.Module):
    """Logits of its own for every masked sequence."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros((TOKENS + 1) ** LENGTH, LENGTH, TOKENS))
        self.radix = (TOKENS + 1) ** torch.arange(LENGTH)

    def forward(self, masked):
        return self.logits[(masked * self.radix).sum(1)]


def trained(joint, method, schedule, counts):
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    tokens = joint.sample(STEPS * BATCH, 1).split(BATCH)
    generator = torch.Generator().manual_seed(2)
    for batch in tokens:
        t = draw_times(BATCH, generator=generator)
        masked, mask = mask_tokens(batch, t, schedule, MASK_ID, counts=counts, generator=generator)
        loss = masked_loss(model(masked), batch, mask, t, schedule, method, counts=counts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
    return model


CASES = [(method, schedule, "independent") for method in list_masked_weightings() for schedule in ("linear", "cosine")]


@pytest.mark.parametrize(
    ("method", "schedule", "counts"), [*CASES, ("elbo", "linear", "exact"), ("edm", "cosine", "exact")]
)
def test_training_with_any_weight_brings_the_elbo_within_two_percent_of_the_entropy(method, schedule, counts):
    joint = Joint()
    model = trained(joint, method, schedule, counts)
    with torch.no_grad():
        negative = exact_negative_elbo(joint, lambda masked: model(masked).double())
    assert joint.entropy < negative < 1.02 * joint.entropy
    measured = negative_elbo(model, joint.sample(2000, 3), MASK_ID, generator=torch.Generator().manual_seed(4))
    assert abs(measured.nats - negative.item()) < 4 * measured.error


def test_an_untrained_model_is_far_from_it():
    joint = Joint()
    assert exact_negative_elbo(joint, lambda masked: torch.zeros(len(masked), LENGTH, TOKENS)) > 1.2 * joint.entropy
