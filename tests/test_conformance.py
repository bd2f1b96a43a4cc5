"""The suite for trainers that share prefixes: ours passes it, each published bug does not."""

import pytest
import torch

from conformance import adapters
from conformance.shared_prefix import Group, Response, cases, check, table


@pytest.fixture(scope="module")
def own():
    pytest.importorskip("transformers")
    return adapters.of_hugging_face()[0]


def test_ours_separate_sequences_and_prefix_grouper_pass():
    pytest.importorskip("transformers")
    found = adapters.results()
    assert found["ours"].keys() == cases(2).keys() == found["transformers"].keys()
    assert all(not fault for results in found.values() for fault in results.values()), table(found)


def garbage(found, groups):
    """AReaL #1308: one more log-probability behind each response."""
    return [[torch.cat((x, x[-1:])) for x in group] for group in found]


def unsupervised(found, groups):
    """Nothing predicts a response's first token (NeMo Automodel's prefix trees)."""
    return [[torch.cat((x[:1].detach() * 0, x[1:])) for x in group] for group in found]


def untrained_first(found, groups):
    """The first token has its log-probability, but no gradient."""
    return [[torch.cat((x[:1].detach(), x[1:])) for x in group] for group in found]


def once(found, groups):
    """Equal tokens of two responses are one node, whose gradient counts once."""
    return [
        [x.detach() if any(r == s for s in g.responses[:i]) else x
         for i, (r, x) in enumerate(zip(g.responses, group))]
        for g, group in zip(groups, found)
    ]  # fmt: skip


def inner(found, groups):
    """A response that ends within another is lost: only leaves of the tree are sequences."""
    ends = lambda r, g: any(s.tokens[: len(r.tokens)] == r.tokens and s != r for s in g.responses)
    return [
        [x[:0] if ends(r, g) else x for r, x in zip(g.responses, group)]
        for g, group in zip(groups, found)
    ]


AFTERWARDS = (garbage, unsupervised, untrained_first, once, inner)


@pytest.mark.parametrize("bug", AFTERWARDS, ids=lambda bug: bug.__name__)
def test_a_bug_behind_the_model_is_found(own, bug):
    separate, shared = adapters.ours(own)
    broken = lambda groups: bug(shared(groups), groups)
    assert any(check(separate, broken, list(own.parameters()), adapters.VOCABULARY).values())


def changed(monkeypatch, own, change):
    """Our forest with one of its vectors changed before it is computed."""
    pack = adapters.forest.pack
    monkeypatch.setattr(adapters.forest, "pack", lambda trees: change(pack(trees)))
    return check(*adapters.ours(own), list(own.parameters()), adapters.VOCABULARY)


def put(row, **vectors):
    for name, vector in vectors.items():
        object.__setattr__(row, name, vector)
    return row


def sees_all(row):
    """Responses see those before them: an ordinary causal mask over the row."""
    return put(row, attend=lambda layer, q, k, v: causal(q, k, v, row.tree))


def causal(q, k, v, tree):
    n = len(q)
    sees = torch.ones(n, n, dtype=torch.bool).tril() & (tree[:, None] == tree)
    heads = lambda x: x.transpose(0, 1)[None]
    out = torch.nn.functional.scaled_dot_product_attention(
        heads(q), heads(k), heads(v), attn_mask=sees, enable_gqa=True
    )
    return out[0].transpose(0, 1)


IN_THE_ROW = {
    "positions go on from one response to the next": lambda row: put(
        row, position=torch.arange(len(row))
    ),
    "a response begins a position late": lambda row: put(
        row, position=row.position + (row.branch != 0).long()
    ),
    "the token before in the row predicts the first": lambda row: put(
        row, predecessor=torch.arange(len(row)) - 1
    ),
    "responses see each other": sees_all,
}


@pytest.mark.parametrize("change", IN_THE_ROW.values(), ids=IN_THE_ROW)
def test_a_bug_in_the_row_is_found(own, monkeypatch, change):
    found = changed(monkeypatch, own, change)
    assert any(found.values())


def test_a_tolerance_of_0_7_nats_sees_no_position(own, monkeypatch):
    """Why TOLERANCE is what it is: unsloth #6871 checks itself with 0.7 nats."""
    shared = adapters.ours(own)[1]
    group = cases(adapters.VOCABULARY)["a long prefix"]
    right = torch.cat(shared(group)[0])
    pack = adapters.forest.pack
    late = IN_THE_ROW["a response begins a position late"]
    monkeypatch.setattr(adapters.forest, "pack", lambda trees: late(pack(trees)))
    off = (torch.cat(shared(group)[0]) - right).abs().max()
    assert 1e-3 < off < 0.7


def test_what_the_suite_cannot_do_is_refused(own):
    separate, shared = adapters.ours(own)
    with pytest.raises(ValueError, match="float32 or float64"):
        check(separate, shared, [torch.ones(1, dtype=torch.bfloat16)], 64)
    with pytest.raises(ValueError, match=r"torch\.bfloat16, torch\.float64"):
        check(separate, shared, [*own.parameters(), torch.ones(1, dtype=torch.bfloat16)], 64)
    with pytest.raises(ValueError, match="none; give some"):
        check(separate, shared, [], 64)
    with pytest.raises(ValueError, match="fork"):
        check(separate, shared, list(own.parameters()), 64, skip=("fork",))
    no = check(separate, lambda groups: [], list(own.parameters()), 64)
    assert all("not one tensor" in fault for fault in no.values())


def test_a_gradient_that_is_rounding_noise_is_no_fault():
    """log p does not depend on a number that is added to all logits."""
    generator = torch.Generator().manual_seed(0)
    table, head = (torch.randn(64, 8, generator=generator).double() for _ in range(2))
    shift = torch.zeros((), dtype=torch.float64)
    parameters = [x.requires_grad_() for x in (table, head, shift)]

    def separate(tokens):
        many = torch.arange(1, len(tokens) + 1)[:, None]
        return (table[tokens].cumsum(dim=0) / many) @ head.T + shift

    def shared(groups):  # the sums of rows of logits in another order
        of = lambda context, r: separate(torch.tensor([*context, *r.tokens]))[len(context) - 1 : -1]
        flipped = lambda rows, r: (
            rows.flip(1).log_softmax(dim=1).flip(1)[range(len(rows)), r.tokens]
        )
        return [[flipped(of(g.context(r), r), r) for r in g.responses] for g in groups]

    assert not any(check(separate, shared, parameters, 64).values())
    wrong = lambda groups: [[x + shift for x in group] for group in shared(groups)]
    assert all("parameter 2" in fault for fault in check(separate, wrong, parameters, 64).values())


def test_a_fault_is_named():
    said = table({"b": {"x": ""}, "a": {"x": "", "y": "nan"}})
    assert said.splitlines()[2:] == ["| x | same | same |", "| y | – | nan |"]
    group = Group((1, 2, 3), (Response((4,), stem=(7,), fork=2),))
    assert group.context(group.responses[0]) == (1, 2, 7)
