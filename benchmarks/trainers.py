"""The contenders of benchmarks/rl_step.py: ours, and TRL's GRPOTrainer in two settings.

A step is G responses to each prefix, a reward of each, advantages within the group, one loss over
all tokens, its gradient, clipping and AdamW. The reward is a pseudo-random function of the token
ids, so that every response has an advantage: ours skips those without.

All keep fp32 master weights. bf16 is autocast for TRL and FSDP2's mixed precision for ours, the
default of each. Ours recomputes the activations of a layer in the backward pass, in micro-batches
of up to ROW tokens. TRL runs `micro` responses at a time; `trl` keeps activations, which is faster,
and `trl-checkpointing`, its default, recomputes them as ours does. AdamW is fused in all. Ours
computes its metrics as in train.py, but has no raw text in its loss, since TRL has none.
"""

import argparse
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import inputs, machine
from benchmarks.contest import Turns, Unavailable
from rmt.config.config import Config
from rmt.forest import pack
from rmt.grpo import advantage_scale, advantages
from rmt.objective import Objective, forest_loss
from rmt.questions import RolloutBatch
from rmt.rollout import generate
from rmt.sampling import Rollout, Sampling
from rmt.system import dist
from rmt.system.metrics import Clock, Metrics
from rmt.update import Updated, adamw, global_objective, update

LEARNING_RATE = 1e-6
ROW = {"cpu": 4096, "cuda": 16384}  # as in the preset `small`, and the default


def reward(ids: list[int]) -> float:
    """Return a pseudo-random reward in [0, 1)."""
    return sum(ids) % 97 / 97


@dataclass
class Trainer:
    """State of train.py that an update needs."""

    config: Config
    model: Any
    optimizer: torch.optim.Optimizer
    world: dist.World
    source: Path
    step: int = 0


def make_run(o: argparse.Namespace, place: Path, compute: torch.dtype, row: int = 0) -> Trainer:
    """Load model and optimizer; row: tokens per micro-batch, default ROW."""
    world = dist.current(machine.device_here())
    config = Config(
        model=str(place), batch_size=o.documents, group_size=o.group, temperature=1.0,
        max_response=o.response, budget=False, ntp=False, learning_rate=LEARNING_RATE,
        warmup_steps=0, tokens_per_micro_batch=row or ROW[world.device.type], recompute="full",
    )  # fmt: skip
    model = dist.load_model(place, world, compute)
    model.configure_training(config.recompute, compiled=world.device.type == "cuda")
    optimizer = adamw(model, LEARNING_RATE, config.adam_betas, config.weight_decay)
    return Trainer(config, model, optimizer, world, place)


def respond(run: Trainer, trees, samples: int, tokens: int) -> list[list[Rollout]]:
    """Sample responses of exactly `tokens` tokens, as in train.py."""
    c = run.config
    branches = max(256, len(trees) * samples)
    sampling = Sampling(
        tokens, (), run.model.config.vocab_size, c.temperature, branches, c.seed, "train", run.step
    )
    run.optimizer.zero_grad(set_to_none=True)
    with dist.gathered_weights(run.model) as sampler:
        return generate(sampler, trees, samples, sampling)


def judge(run: Trainer, groups: list[list[Rollout]]) -> tuple[Tensor, Tensor]:
    """Return rewards and advantages, (P, G) each."""
    c = run.config
    rewards = torch.tensor([[reward(r.tokens) for r in group] for group in groups])
    scale = advantage_scale(rewards, c.advantage_norm, c.advantage_delta, [rewards])
    return rewards, advantages(rewards, scale)


def learn(run: Trainer, prefixes: list[list[int]], groups: list[list[Rollout]]) -> Metrics:
    """Compute rewards, advantages and loss of the rollouts, and update, as in train.py."""
    rewards, advantage = judge(run, groups)
    trees = inputs.trees(prefixes, [[r.tokens for r in group] for group in groups])
    metrics = Metrics()
    step_on(run, trees, groups, rewards, advantage, metrics)
    return metrics


def objective_of(run: Trainer, trees, groups, rewards: Tensor, advantage: Tensor) -> Objective:
    """Build the objective over all rows of the head; the tokenizer may have fewer tokens."""
    batch = RolloutBatch([], groups, [], {"match": (rewards > 0.5).float()})
    return global_objective(
        run.config, trees, batch, advantage, run.model.config.vocab_size, run.world
    )


def step_on(run: Trainer, trees, groups, rewards, advantage, metrics: Metrics) -> Updated:
    """Run one update, as in train.py."""
    objective = objective_of(run, trees, groups, rewards, advantage)
    clock = Clock(run.world.device)
    updated = update(
        run.config, run.model, run.optimizer, None, trees, objective, groups, pack, run.step,
        run.step + 1, run.world, clock, metrics,
    )  # fmt: skip
    run.step += 1
    if updated.refused:
        raise FloatingPointError("the update was refused: a loss or gradient was not finite")
    return updated


def ours(o: argparse.Namespace, turns: Turns) -> None:
    place = inputs.directory(o)
    prefixes = [ids for _, ids in inputs.prompts(place, o.documents, o.prefix)]
    run = make_run(o, place, inputs.dtype_of(o))
    trees = inputs.trees(prefixes)
    while turns.begin():
        groups = respond(run, trees, o.group, o.response)
        rollout_seconds = turns.elapsed()
        learn(run, prefixes, groups)
        tokens = sum(len(r.tokens) for group in groups for r in group)
        turns.end(tokens, rollout_seconds=rollout_seconds)
    dist.stop()


def trl(o: argparse.Namespace, turns: Turns, recompute: bool = False) -> None:
    """Take turns, each from on_step_begin to on_step_end, which includes generation."""

    class Over(Exception):
        pass

    lengths: list[int] = []

    def judge(completion_ids, **_) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [reward(ids) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(o, folder, judge, recompute)

        class Gate(_callback_class()):
            def on_step_begin(self, *_, **__):
                lengths.clear()
                if not turns.begin():
                    raise Over

            def on_step_end(self, *_, **__):
                turns.end(sum(lengths))

        trainer.add_callback(Gate())
        with suppress(Over):
            trainer.train()


def _callback_class() -> type:
    from transformers import TrainerCallback

    return TrainerCallback


def make_trainer(o: argparse.Namespace, folder: str, reward_function, recompute: bool = False):
    try:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise Unavailable(f"{error}; `make bench` installs it") from None
    place = inputs.directory(o)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place)  # tokenizer.json unchanged
    given = inputs.prompts(place, o.documents, o.prefix)
    texts = [text for text, _ in given]
    if tokenizer(text=texts)["input_ids"] != [ids for _, ids in given]:
        raise Unavailable("transformers' tokenizer reads the prompts differently; ours is exact")
    everyone = o.documents * o.group
    if everyone % o.micro:
        raise Unavailable(f"--micro {o.micro} does not divide {everyone} responses")
    config = GRPOConfig(
        output_dir=folder, use_cpu=not torch.cuda.is_available(), bf16=o.dtype == "bfloat16",
        beta=0.0, num_iterations=1, num_generations=o.group, max_completion_length=o.response,
        generation_kwargs={"min_new_tokens": o.response}, temperature=1.0, top_k=0,
        per_device_train_batch_size=o.micro, gradient_accumulation_steps=everyone // o.micro,
        gradient_checkpointing=recompute, learning_rate=LEARNING_RATE, weight_decay=0.01,
        lr_scheduler_type="constant", max_steps=10**6, shuffle_dataset=False, save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        cache_implementation=o.trl_cache,
    )  # fmt: skip
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32), args=config,
        reward_funcs=reward_function, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": texts}),
    )  # fmt: skip


def verify(o: argparse.Namespace, turns: Turns) -> None:
    """Compare our loss and TRL's own, on the same few responses, in fp32, in one turn.

    Answers with the largest difference of log-probabilities, and the difference of the gradients of
    all parameters together. Loss values are no test: on-policy, both are a sum of advantages, 0.
    """
    place = inputs.directory(o)
    prefixes = [ids for _, ids in inputs.prompts(place, o.documents, o.prefix)]
    run = make_run(o, place, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(o, folder, lambda completions, **_: [0.0] * len(completions))
        while turns.begin():
            groups = respond(run, inputs.trees(prefixes), o.group, o.response)
            theirs = _loss_of_trl(trainer, prefixes, groups, judge(run, groups)[1])
            mine = _loss_of_ours(run, prefixes, groups)
            a, b = (torch.cat([g[n].flatten().double() for n in mine[1]])
                    for g in (mine[1], theirs[1]))  # fmt: skip
            turns.end(
                tokens=mine[0].numel(),
                logprob_difference=float((mine[0] - theirs[0]).abs().max()),
                gradient_difference=float((a - b).norm() / b.norm()),
                gradient_cosine=float(a @ b / (a.norm() * b.norm())),
            )  # fmt: skip
            trainer.model.zero_grad()


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def _loss_of_ours(run: Trainer, prefixes, groups) -> tuple[Tensor, dict[str, Tensor]]:
    rewards, advantage = judge(run, groups)
    trees = inputs.trees(prefixes, [[r.tokens for r in group] for group in groups])
    objective = objective_of(run, trees, groups, rewards, advantage)
    loss, _, logprob, _ = forest_loss(run.model, pack(trees, run.world.device), objective)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    return logprob.detach().flatten(), _gradients(run.model)


def _loss_of_trl(trainer, prefixes, groups, advantage) -> tuple[Tensor, dict[str, Tensor]]:
    device = trainer.accelerator.device
    responses = torch.tensor([r.tokens for group in groups for r in group], device=device)
    prompts = torch.tensor(prefixes, device=device).repeat_interleave(len(groups[0]), dim=0)
    batch = {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts),
        "completion_ids": responses, "completion_mask": torch.ones_like(responses),
        "advantages": advantage.flatten().float().to(device),
        "num_items_in_batch": torch.tensor(float(responses.numel()), device=device),
    }  # fmt: skip
    model = trainer.model.to(device).eval()  # eval: divide by all tokens, not by its schedule
    loss = trainer._compute_loss(model, batch)
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        logprob, *_ = trainer._get_per_token_logps_and_entropies(
            model, torch.cat((prompts, responses), 1),
            torch.ones(len(prompts), prompts.shape[1] + responses.shape[1], device=device),
            responses.shape[1],
        )  # fmt: skip
    return logprob.flatten(), _gradients(model)


CONTENDERS = {
    "ours": ours,
    "trl": trl,
    "trl-checkpointing": lambda o, turns: trl(o, turns, recompute=True),
    "verify": verify,
}
