"""How many responses can be decoded at one time: what is left of the memory, in branches."""

import math

import torch
from torch.distributed.tensor import DTensor

from models.config import ModelConfig
from models.kv_cache import KVCache
from models.transformer import Transformer
from rmt.config import Config
from rmt.dist import World, free_memory, reduce_max
from rmt.prompt import PromptIds

CACHED_TOKENS = 1 << 15  # of documents that an evaluation holds at one time
MOST_BRANCHES = 256  # beyond, a GPU's decode step is bound by arithmetic, no longer by memory


def plan_branches(
    config: Config, prompt: PromptIds, model: Transformer, compute: torch.dtype, world: World
) -> int:
    """`config.max_branches`, or what every rank has the memory for. All ranks.

    To be asked when all models are loaded and nothing was trained yet.
    """
    if config.max_branches:
        return config.max_branches
    free, parameters = free_memory(world), list(model.parameters())
    own = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    if any(p.requires_grad for p in parameters):
        free -= 8 * sum(p.numel() for p in own)  # AdamW's two moments, in fp32
    if any(isinstance(p, DTensor) for p in parameters):
        free -= compute.itemsize * sum(p.numel() for p in parameters)  # see dist.rollout_mode
    documents = math.ceil(config.batch_size / world.size)
    trunks = documents * (len(prompt.header) + config.document_tokens)
    branches = branches_in(
        free, model.config, compute, max(trunks, CACHED_TOKENS),
        len(prompt.footer) + config.max_response,
    )  # fmt: skip
    return -int(reduce_max([-branches], world)[0])


def branches_in(
    free: float, shape: ModelConfig, dtype: torch.dtype, trunk_tokens: int, capacity: int
) -> int:
    """How many branches of `capacity` own tokens fit in `free` bytes: a power of two.

    ValueError when there is no room for one.
    """
    per_token = KVCache.bytes_per_token(shape, dtype)
    logits = 2 * 3 * 4 * shape.vocab_size  # fp32, exponentials and a copy; of a recorded step too
    branch = capacity * per_token + logits
    branches = min(MOST_BRANCHES, int((0.9 * free - trunk_tokens * per_token) / branch))
    if branches < 1:
        raise ValueError(
            f"{free / 1e9:.1f} GB are free for rollouts, but {trunk_tokens} tokens of documents "
            f"and a response of {capacity} need {trunk_tokens * per_token / 1e9:.1f} + "
            f"{branch / 1e9:.1f} GB; lower --batch-size, --document-tokens or --max-response, or "
            "set --max-branches"
        )
    return 1 << (branches.bit_length() - 1)
