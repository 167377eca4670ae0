"""A joint distribution of a few tokens, solved exactly: its conditionals, its entropy, and sums over all masks."""

import itertools

import torch

TOKENS, LENGTH = 3, 4
MASK_ID = TOKENS


class Joint:
    """A random joint of LENGTH tokens of TOKENS kinds, far from independent."""

    def __init__(self, seed=0):
        weights = torch.empty(TOKENS**LENGTH, dtype=torch.float64)
        weights.exponential_(generator=torch.Generator().manual_seed(seed))
        self.sequences = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))
        self.probabilities = weights**3 / (weights**3).sum()
        self.entropy = -(self.probabilities * self.probabilities.log()).sum()

    def sample(self, number, seed):
        places = torch.multinomial(self.probabilities, number, True, generator=torch.Generator().manual_seed(seed))
        return self.sequences[places]

    def predict(self, masked):
        """Logits of each token given those that are not masked, (B, L, K), exact."""
        fits = ((masked[:, None] == MASK_ID) | (masked[:, None] == self.sequences)).all(-1)  # (B, sequences)
        one_hot = torch.nn.functional.one_hot(self.sequences, TOKENS).double()
        joint = torch.einsum("bs,s,slk->blk", fits.double(), self.probabilities, one_hot)
        return (joint / joint.sum(-1, keepdim=True)).log()


MASKS = torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))[1:]  # but the empty one


def every_case(joint):
    """All sequences under all masks: masked tokens, tokens, masks and the sequences' probabilities."""
    tokens = joint.sequences.repeat_interleave(len(MASKS), 0)
    mask = MASKS.repeat(len(joint.sequences), 1)
    return tokens.masked_fill(mask, MASK_ID), tokens, mask, joint.probabilities.repeat_interleave(len(MASKS))


def sums_by_count(joint, predict):
    """Expected sum of cross entropies over n = 1..L masked tokens at random places."""
    masked, tokens, mask, probabilities = every_case(joint)
    losses = -predict(masked).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    sums = probabilities * torch.where(mask, losses, 0).sum(1)
    counts = mask.sum(1)
    per_sequence = torch.stack([(MASKS.sum(1) == n).sum() for n in range(1, LENGTH + 1)])
    return torch.stack([sums[counts == n].sum() for n in range(1, LENGTH + 1)]) / per_sequence


def exact_negative_elbo(joint, predict):
    """The negative ELBO of a model, in nats."""
    return (sums_by_count(joint, predict) / torch.arange(1, LENGTH + 1)).sum()


def wrong_model():
    """Logits that are not the joint's: the objective is to be right for any model."""
    logits = torch.randn((TOKENS + 1) ** LENGTH, LENGTH, TOKENS, generator=torch.Generator().manual_seed(5)).double()
    radix = (TOKENS + 1) ** torch.arange(LENGTH)
    return lambda masked: logits[(masked * radix).sum(1)]
