"""Dynamic sampling (DAPO, arXiv 2503.14476), as RPT uses it.

A group whose matches are all equal is replaced by one about another position.

Departures: RPT fills its batch with groups of other prompts; here the new position is one of the
same document, so that a step has the documents that its epoch gave it. Groups are judged by r_match
(the composite reward nearly always differs), at most `resample_tries` times.
"""

from collections.abc import Callable, Sequence

from rmt.config.config import Config
from rmt.curriculum import Curriculum
from rmt.grpo import has_both_outcomes
from rmt.questions import (
    RolloutBatch,
    TrainingSet,
    ask,
    budget_of_step,
    draw_positions,
    joined,
    roll_out,
)
from rmt.system.dist import World, gather_objects
from rmt.system.metrics import Clock


def replace_zero_variance(
    c: Config, data: TrainingSet, curriculum: Curriculum, batch: RolloutBatch, sampler,
    generate: Callable, step: int, world: World, clock: Clock,
) -> tuple[RolloutBatch, int]:  # fmt: skip
    """Replace groups of equal matches as far as possible; also returns the tokens thrown away.

    generate: of rmt/rollout.py or rmt/naive.py. All ranks.
    """
    budget, dropped = budget_of_step(c, step, data.total_steps), 0
    taken: dict[int, set[int]] = {}  # positions of each document that this step has asked about
    for question in batch.questions:
        taken.setdefault(question.document, set()).add(question.position)
    tries = c.resample_tries if 0 <= c.resample_from <= step else 0
    for attempt in range(1, 1 + tries):
        equal = (~has_both_outcomes(batch.rewards["match"])).nonzero()[:, 0].tolist()
        draws = _draw_again(c, data, curriculum, batch, equal, taken, step, attempt, world)
        if draws is None:
            break
        replaced = {i: ask(c, data, *drawn, budget) for i, drawn in draws.items()}
        questions = list(replaced.values())
        for question in questions:
            taken[question.document].add(question.position)
        with clock("sampling"):
            fresh = roll_out(c, data, sampler, generate, questions, step, attempt=attempt)
        dropped += sum(len(r.tokens) for i in replaced for r in batch.responses[i])
        count = len(batch.questions)
        places = {i: count + number for number, i in enumerate(replaced)}
        batch = joined([batch, fresh]).rows([places.get(i, i) for i in range(count)])
    return batch, dropped


def _draw_again(
    c: Config, data: TrainingSet, curriculum: Curriculum, batch: RolloutBatch,
    equal: Sequence[int], taken: dict[int, set[int]], step: int, attempt: int, world: World,
) -> dict[int, tuple[int, int]] | None:  # fmt: skip
    """Draw positions anew for the groups `equal`: index in the batch -> (document, position).

    Groups whose document has no more positions are missing; None when no rank has any. All ranks,
    each of which draws for all.
    """
    places: dict[int, list[int]] = {}
    for i in equal:
        places.setdefault(batch.questions[i].document, []).append(i)
    wanted = [(index, len(group), sorted(taken[index])) for index, group in places.items()]
    drawn = [
        [draw_positions(c, data, curriculum, step, *request, attempt)[0] for request in part]
        for part in gather_objects(wanted, world)
    ]
    if not any(positions for part in drawn for positions in part):
        return None
    return {
        i: (index, position)
        for (index, group), positions in zip(places.items(), drawn[world.rank])
        for i, position in zip(group, positions)
    }
