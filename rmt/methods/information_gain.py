"""Reward a thought by what it tells about the text: RLP (arXiv 2510.01265), a baseline.

The reward of a response is how much likelier its thought makes the true token (Eq. 16), whatever
it answers: a number for each thought, also where all or none would be right. Each thought becomes a
stem that ends with an opened box, and the token its response, so one pass of the forest scores all.

Departures: RLP subtracts the plain log-probability, of a moving average of the model; all responses
of a group have the same, so that Eq. 7 cancels it, and it is not computed. RLP ends a response with
its thought; here the answer is sampled and trained too, which leaves the gradient unbiased.

Shapes: P questions, G responses to each.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rmt.config.config import Config
from rmt.methods.cold_start import boxed_ids, opened_box
from rmt.objective import Targets, target_logprobs
from rmt.prompt import PromptIds
from rmt.questions import RolloutBatch, TrainingSet, prompts_of, question_trees
from rmt.sampling import Rollout
from rmt.trees import micro_batches


def information_gain(
    c: Config, data: TrainingSet, policy, batch: RolloutBatch, pack: Callable
) -> Tensor:
    """Return log π(true token | context, thought) of each response, in nats. (P, G) fp64

    A thought that was cut off counts as it is. pack: of rmt/forest.py or rmt/naive.py.
    """
    tokenizer, box = data.tokenizer, opened_box(data.tokenizer)
    prompts = prompts_of(c, tokenizer, batch.questions)
    questions, thoughts, tokens = [], [], []
    for number, (question, prompt) in enumerate(zip(batch.questions, prompts)):
        token = int(data.documents[question.document].tokens[question.position])
        said = Rollout(boxed_ids(tokenizer, token))
        for response, answer in zip(batch.responses[number], batch.answers[number]):
            thought = response.tokens[: answer.thinking_length]  # None: all of it
            questions.append(question)
            thoughts.append(PromptIds(prompt.header, (*prompt.footer, *thought, *box)))
            tokens.append([said])
    trees = question_trees(questions, data.documents, thoughts, tokens)
    device = next(policy.parameters()).device
    gain = torch.zeros(len(questions), dtype=torch.float64)
    for row in micro_batches(trees, c.tokens_per_micro_batch):
        forest = pack(row, device)
        logprob = target_logprobs(policy, forest, 1.0, tokenizer.vocab_size)
        gain.index_add_(0, Targets.of(forest).rollout.cpu(), logprob.double().cpu())  # Eq. 16
    return gain.view_as(batch.rewards["total"])
