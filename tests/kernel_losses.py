"""One small loss for each public function of the kernels, on the same inputs."""

import torch

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V, USED, C = 37, 34, 8  # rows of the head, of which the last are padding


def inputs(n=7, dtype=torch.float32, seed=0):
    """hidden, weight, logits, targets and temperature of n tokens, every third without a target."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, C), (V, C), (n, V))
    real = [torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes]
    targets = torch.randint(0, USED, (n,), generator=generator)
    targets[1::3] = -100
    return *real, targets.to(DEVICE), torch.rand(n, generator=generator).to(DEVICE) + 0.5


def combined(logprob, entropy, index=None):
    return (2 * logprob - 0.3 * entropy).sum()


def from_logits(x, w, z, y, t):
    return combined(*kernels.entropy_logprob(z, y, t))


def cross_entropy(x, w, z, y, t):
    return kernels.masked_cross_entropy(z, y.clamp(min=0), y >= 0)


def from_head(x, w, z, y, t):
    return combined(*kernels.linear_entropy_logprob(x, w, y, t, USED, 4)[:2])


def one_pass(x, w, z, y, t):
    return kernels.linear_objective(x, w, y, combined, t, USED, 4)[0]
