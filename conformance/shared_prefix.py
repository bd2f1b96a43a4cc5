"""Does a trainer that shares prefixes compute what separate sequences do?

Responses to one prompt begin with the same tokens. A trainer may compute these once, but each
response token must keep the log-probability, and each parameter the gradient, that it has when all
sequences are ordinary ones. To test a trainer, write two functions,

    separate(tokens (n,) int64) -> logits (n, V)    the model on one ordinary sequence
    shared(groups) -> [[log p (n,) of the tokens of each response] of each group]

both with gradients, on the parameters' device, for a small random model in fp32 or fp64, and call
`check`. Each case holds what a published trainer got wrong (conformance/README.md). This file needs
PyTorch only.
"""

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Nats, and relative errors of gradients; right trainers differ by a hundredth of these. Responses
# that begin one position late are 0.04 to 2.2 nats off in the cases below.
TOLERANCE = {torch.float64: (1e-9, 1e-8), torch.float32: (1e-4, 1e-3)}
NOISE = 1e-3  # of the norm of all gradients: a smaller one is compared as if it were so large


@dataclass(frozen=True)
class Response:
    """Tokens to be trained behind prefix[:fork] and a stem, which is context."""

    tokens: tuple[int, ...]
    stem: tuple[int, ...] = ()
    fork: int | None = None  # how many tokens of the prefix it sees; None: all


@dataclass(frozen=True)
class Group:
    """A prefix and its responses."""

    prefix: tuple[int, ...]
    responses: tuple[Response, ...]

    def context(self, response: Response) -> tuple[int, ...]:
        return self.prefix[: response.fork] + response.stem


Separate = Callable[[Tensor], Tensor]
Shared = Callable[[Sequence[Group]], Sequence[Sequence[Tensor]]]


def cases(vocabulary: int, seed: int = 0) -> dict[str, tuple[Group, ...]]:
    """Return groups by the name of what is special about them."""
    rng = random.Random(seed)
    some = lambda n: tuple(rng.randrange(vocabulary) for _ in range(n))
    answers = lambda *lengths: tuple(Response(some(n)) for n in lengths)
    one, first = Group(some(9), answers(4, 4)), some(3)
    inner = [Response(some(3), fork=fork) for fork in (1, 5, 9)]
    stems = [Response(some(n), stem, 7) for stem in (some(2), some(5)) for n in (1, 3)]
    return {
        "responses of one length": (one,),
        "responses of other lengths": (Group(some(9), answers(1, 6, 3)),),
        "one response": (Group(some(9), answers(5)),),
        "a prefix of one token": (Group(some(1), answers(3, 2)),),
        "a long prefix": (Group(some(150), answers(3, 2)),),
        "groups of other sizes": (
            one,
            Group(some(3), answers(2)),
            Group(some(14), answers(1, 2, 7)),
        ),
        "the same response twice": (Group(some(6), (Response(first), Response(first))),),
        "a response that begins another": (
            Group(some(6), (Response(first), Response(first + some(2)))),
        ),
        "the same prefix in two groups": (one, replace(one, responses=answers(2, 5))),
        "forks": (Group(some(9), tuple(inner)),),
        "stems": (Group(some(9), tuple(stems)),),
    }


def check(
    separate: Separate,
    shared: Shared,
    parameters: Sequence[Tensor],
    vocabulary: int,
    skip: Collection[str] = (),
) -> dict[str, str]:
    """Return what is wrong in each case, "" if nothing; `skip` names cases that are not supported.

    parameters: those whose gradients are compared; of one dtype, fp32 or fp64. ValueError else.
    """
    dtypes = {p.dtype for p in parameters}
    if len(dtypes) != 1 or not dtypes <= TOLERANCE.keys():
        said = ", ".join(sorted(map(str, dtypes))) or "none"
        raise ValueError(
            f"parameters are {said}; give some, of one dtype, float32 or float64: rounding "
            "hides faults"
        )
    (dtype,) = dtypes
    known = cases(vocabulary)
    if unknown := set(skip) - known.keys():
        raise ValueError(f"skip has {sorted(unknown)}; the cases are {list(known)}")
    return {
        name: _fault(separate, shared, list(parameters), groups, *TOLERANCE[dtype])
        for name, groups in known.items() if name not in skip
    }  # fmt: skip


def _fault(
    separate: Separate, shared: Shared, parameters: list[Tensor], groups: tuple[Group, ...],
    nats: float, relative: float,
) -> str:  # fmt: skip
    """Return the first difference between the two, in words; "" if there is none."""
    device = parameters[0].device
    alone = [[_alone(separate, device, g, r) for r in g.responses] for g in groups]
    together = shared(groups)
    if [len(g.responses) for g in groups] != [len(x) for x in together]:
        return "not one tensor of log-probabilities for each response"
    for name, found, wanted in _pairs(together, alone):
        if found.shape != wanted.shape:
            return f"{name} has log-probabilities {tuple(found.shape)} for {len(wanted)} tokens"
        off = (found - wanted).abs()
        if not off.max() <= nats:  # nan is above
            token = int(off.nan_to_num(float("inf")).argmax())
            return (
                f"token {token} of {name} has log p {found[token]:.4f}, alone {wanted[token]:.4f}"
            )
    rng = torch.Generator().manual_seed(0)
    weights = [[torch.randn(len(x), generator=rng).to(x) for x in group] for group in alone]
    loss = lambda logprobs: sum((x * w).sum() for _, x, w in _pairs(logprobs, weights))
    gradients = [
        torch.autograd.grad(loss(logprobs), parameters, materialize_grads=True)
        for logprobs in (together, alone)
    ]
    everything = float(torch.stack([wanted.norm() for wanted in gradients[1]]).norm())
    for number, (found, wanted) in enumerate(zip(*gradients)):
        off, size = float((found - wanted).norm()), float(wanted.norm())
        # A gradient that is 0 in theory, as of a bias of keys, is noise in both.
        if not off <= relative * max(size, NOISE * everything):
            return f"the gradient of parameter {number} is off by {off / max(size, 1e-30):.0e}"
    return ""


def _alone(separate: Separate, device: torch.device, group: Group, response: Response) -> Tensor:
    context = group.context(response)
    tokens = torch.tensor([*context, *response.tokens], device=device)
    predicted = separate(tokens)[len(context) - 1 : -1].log_softmax(dim=-1)
    return predicted.gather(1, tokens[len(context) :, None])[:, 0]


def _pairs(a, b):
    """Yield the name of each response, and its tensors in a and b."""
    for g, group in enumerate(zip(a, b)):
        for r, pair in enumerate(zip(*group)):
            yield f"response {r} of group {g}", *pair


def table(results: dict[str, dict[str, str]]) -> str:
    """Return a Markdown table: trainer -> results of `check`."""
    rows = [["case", *results], ["---"] * (len(results) + 1)]
    for case in dict.fromkeys(case for found in results.values() for case in found):
        said = (found.get(case) for found in results.values())
        rows.append([case, *("–" if x is None else x or "same" for x in said)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
