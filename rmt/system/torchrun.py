"""Read torchrun's environment, and explain an error caused by another rank.

With --max-restarts torchrun starts all ranks again when one fails: the same command, perhaps on
other nodes. Nothing here communicates; rmt/system/dist.py does.
"""

import os
import re
from collections.abc import Sequence

import torch.distributed as dist

GLOO = r"\bgloo\b|caused pair closure"  # gloo raises plain RuntimeErrors: the first, later ones


def restarts() -> bool:
    """Return whether torchrun starts all ranks again when one fails.

    Its count of restarts cannot tell: each node has its own, and a new node begins at 0.
    """
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def check_store() -> None:
    """ValueError when restarted ranks would connect to the addresses of dead ones.

    torchrun's store outlives the ranks. It keys addresses by the count of restarts, which differs
    between nodes.
    """
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if nodes > 1 and restarts() and shared:
        raise ValueError(
            f"torchrun --max-restarts {os.environ['TORCHELASTIC_MAX_RESTARTS']} on {nodes} nodes: "
            "its store keeps the addresses of dead ranks, to which restarted ones would "
            "connect; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun on every node"
        )


def copies(asked: int, local: Sequence[int]) -> int:
    """Return the number of copies of the model: `asked`, or one per node for 0.

    local: the number of ranks on each rank's node. ValueError when ranks do not divide equally.
    """
    size = len(local)
    if asked and size % asked:
        divisors = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ValueError(
            f"--replicate {asked}: {size} ranks cannot hold {asked} copies of the model in equal "
            f"parts; choose one of {divisors}, or 0 for a copy per node"
        )
    if not asked and len(set(local)) > 1:
        raise ValueError(
            f"--replicate 0: a copy of the model per node, but nodes have {min(local)} to "
            f"{max(local)} ranks; start equally many on each, or shard over all with --replicate 1"
        )
    return asked or size // local[0]


def lost_contact(error: RuntimeError, remedy: str) -> str | None:
    """Return a message if a collective failed because of another rank, else None."""
    text = str(error).strip()
    if not isinstance(error, dist.DistError) and not re.search(GLOO, text, re.IGNORECASE):
        return None
    reason = re.sub(r"\[\S*/gloo/\S*\] ", "", text.splitlines()[0]).split(". This is typ")[0]
    if restarts():
        remedy = f"torchrun starts all ranks again; else {remedy}"
    return (
        f"rank {os.environ.get('RANK', 0)} has lost another rank ({reason}): a process or host "
        "died, the network is cut, or a rank took longer than --timeout; the others' output may "
        f"say more; {remedy}"
    )
