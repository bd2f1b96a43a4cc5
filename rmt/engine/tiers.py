"""Tiers of a run's positions: measure difficulty once, keep it, sort positions by it.

Entropies are kept in the user's cache, under a hash of model, tokenizer, text and method.
"""

import hashlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from models.fingerprint import fingerprint
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from models.weights import cache_directory
from rmt.config.config import Config
from rmt.config.flags import as_flag
from rmt.curriculum import NO_TIER, TIERS, assign_tiers, quantile_thresholds
from rmt.data.corpus import Document
from rmt.difficulty import document_entropies
from rmt.engine.export import find_model
from rmt.evaluation.positions import Chosen, choose_positions
from rmt.questions import TrainingSet, asks_at_end
from rmt.system.dist import World, compute_dtype, from_rank_0, gathered_weights, load_model
from rmt.system.records import write_whole


def make_training_set(
    config: Config, world: World, model_dir: Path, tokenizer: Tokenizer, model: Transformer,
    documents: list[Document], order: np.ndarray, saved_thresholds: list[float] | None,
) -> tuple[TrainingSet, list[float]]:  # fmt: skip
    """Sort positions into tiers by their entropy under the initial model. All ranks.

    Only documents in `order` (steps, batch) are measured. Also returns the lower ends of the tiers
    in nats; a resumed run keeps its saved ones.
    """
    tiers = [np.full(len(document.tokens), NO_TIER) for document in documents]
    thresholds, measured = config.tier_thresholds, {}
    tiered = config.task == "next-token" and not asks_at_end(config)
    if tiered or config.ntp_scope == "low_entropy":
        drawn = np.unique(order).tolist()
        entropies, thresholds = measure_difficulty(
            config, world, model_dir, tokenizer, model, [documents[i] for i in drawn]
        )
        measured = dict(zip(drawn, entropies))
        thresholds = saved_thresholds or thresholds  # a longer run may have more documents
        for index, entropy in measured.items():
            tiers[index] = assign_tiers(entropy, thresholds, config.min_context)
        _check_tiers(np.concatenate([tiers[i] for i in drawn]), thresholds, world)
    data = TrainingSet(tokenizer, documents, tiers, measured, order)
    return data, [float(threshold) for threshold in thresholds]


def choose_held_out(
    config: Config, world: World, model_dir: Path, tokenizer: Tokenizer, model: Transformer,
    documents: list[Document],
) -> tuple[list[Document], Chosen]:  # fmt: skip
    """Choose the positions of evaluations by the initial model; none for problems. All ranks."""
    if config.task == "problems":
        return documents, Chosen([])
    entropies, thresholds = measure_difficulty(
        config, world, model_dir, tokenizer, model, documents
    )
    return documents, choose_positions(
        documents, entropies, thresholds, config.min_context, config.eval_positions, config.seed
    )


def difficulty_dir(config: Config, model_dir: Path, world: World) -> Path:
    """Return the directory of the model that measures difficulty. All ranks.

    ValueError when its tokenizer differs from that of `model_dir`.
    """
    if not config.difficulty_model:
        return model_dir
    with as_flag("model", "difficulty_model"):
        proxy_dir = find_model(config.difficulty_model, config.weights, world)
    own, other = ((path / "tokenizer.json").read_bytes() for path in (model_dir, proxy_dir))
    if own != other:
        raise ValueError(
            f"--difficulty-model {config.difficulty_model} has another tokenizer than "
            f"{config.model}; positions would not correspond: take a model of the same family"
        )
    return proxy_dir


def measure_difficulty(
    config: Config, world: World, model_dir: Path, tokenizer: Tokenizer, model: Transformer,
    documents: Sequence[Document],
) -> tuple[list[np.ndarray], tuple[float, ...]]:  # fmt: skip
    """Measure the entropies (T,) of documents, and return them with the tier thresholds in nats.

    `model` measures, or --difficulty-model. All ranks. ValueError for entropies of nan.
    """
    proxy_dir = difficulty_dir(config, model_dir, world)
    compute = compute_dtype(config.dtype, world)

    def measure() -> list[np.ndarray]:
        proxy = model
        if proxy_dir != model_dir:
            proxy = load_model(proxy_dir, world, compute, trainable=False)
        with gathered_weights(proxy) as gathered:
            entropies = document_entropies(
                gathered, documents, tokenizer.begin_ids, config.entropy_top_k,
                tokenizer.vocab_size, config.tokens_per_micro_batch, world,
            )  # fmt: skip
        broken = [d.source for d, entropy in zip(documents, entropies) if np.isnan(entropy).any()]
        if broken:
            raise ValueError(
                f"{proxy_dir} predicts nan for {len(broken)} of {len(documents)} documents, the "
                f"first {broken[0]}; its weights are damaged, or --dtype {config.dtype} overflows"
            )
        return entropies

    method = f"top-{config.entropy_top_k} {compute} of {tokenizer.vocab_size}"
    method += f" after {tokenizer.begin_ids}"
    entropies = cached_entropies(measure, proxy_dir, documents, method, world)
    thresholds = config.tier_thresholds
    if config.tiers == "quantile":
        thresholds = quantile_thresholds(entropies, thresholds, config.min_context)
    return entropies, thresholds


def _check_tiers(tiers: np.ndarray, thresholds: Sequence[float], world: World) -> None:
    """Print the sizes of tiers; ValueError when there is no position to reason about."""
    sizes = {name: int((tiers == tier).sum()) for tier, name in enumerate(TIERS)}
    lowest = ", ".join(f"{x:.2f}" for x in thresholds)
    if not any(sizes.values()):
        raise ValueError(
            f"all tiers are empty: no token's entropy reaches the thresholds {lowest} nats; "
            "lower --tier-thresholds, or use --tiers quantile --tier-thresholds 0.5 0.7 0.85"
        )
    if world.rank == 0:
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        print(f"positions by tier (from {lowest} nats): {shown}; {(tiers == NO_TIER).sum()} below")
        for name in (name for name, size in sizes.items() if not size):
            print(f"tier {name} is empty: its probability goes to the others")


# ---- the cache


def cached_entropies(
    measure: Callable[[], list[np.ndarray]], model_directory: Path,
    documents: Sequence[Document], method: str, world: World,
) -> list[np.ndarray]:  # fmt: skip
    """Return what an earlier run with the same model, text and method measured, or `measure()`.

    All ranks; rank 0 reads and writes the cache.
    """
    path = cache_directory() / "difficulty" / _key(model_directory, documents, method)
    entropies = from_rank_0(lambda: _read(path, [len(d.tokens) for d in documents]), world)
    if entropies is None:
        entropies = measure()
        if world.rank == 0:
            _write(path, entropies)
    return entropies


def _key(directory: Path, documents: Sequence[Document], method: str) -> str:
    digest = hashlib.sha256(f"{method} {sorted(fingerprint(directory).items())}".encode())
    for document in documents:
        digest.update(document.tokens.tobytes() + b"|")
    return digest.hexdigest()[:16]


def _read(path: Path, lengths: list[int]) -> list[np.ndarray] | None:
    """Read a file of a hash and the numbers it is of; None if there is none, or it is damaged."""
    with suppress(OSError):
        content = path.read_bytes()
        if content[:32] == _hash(content[32:]) and len(content) == 32 + 8 * sum(lengths):
            return np.split(np.frombuffer(content[32:], "<f8").copy(), np.cumsum(lengths)[:-1])
    return None


def _write(path: Path, entropies: Sequence[np.ndarray]) -> None:
    content = np.concatenate(entropies).astype("<f8").tobytes()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, _hash(content) + content)
    except OSError as error:
        print(
            f"difficulty is not kept, the next run measures it again ({path}: {error.strerror})",
            file=sys.stderr,
        )


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
