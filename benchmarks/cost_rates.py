"""Matrix products with as few rows as a decode step has: a rate for benchmarks/cost_check.py.

    python -m benchmarks.cost_rates --threads 2 --json benchmarks/results/cpu-rates.json

The ceilings of benchmarks/machine.py are of large products. A decode step multiplies 32 rows with
the weights of all layers, one after another, so that none is in a cache when its turn comes. Here
are those products alone, on random numbers of a model's shape; the machine should be idle.
"""

import torch
import torch.nn.functional as F

from benchmarks import inputs, machine
from benchmarks.results import spread, write
from models.config import ModelConfig
from models.shapes import published

DTYPES = ("bfloat16", "float32")


def layer_weights(shape: ModelConfig, dtype: torch.dtype) -> list[torch.Tensor]:
    """The seven matrices of one layer, (out, in) each."""
    hidden, wide = shape.hidden_size, shape.intermediate_size
    queries, keys = (
        heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_key_value_heads)
    )
    sizes = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries),
             (wide, hidden), (wide, hidden), (hidden, wide)]  # fmt: skip
    return [torch.randn(size).to(dtype) for size in sizes]


def measure(shape: ModelConfig, dtype: torch.dtype, rows: int, rounds: int) -> dict:
    """Seconds of the products of all layers with so many rows; operations and bytes of weights."""
    weights = [w for _ in range(shape.num_hidden_layers) for w in layer_weights(shape, dtype)]
    given = {size: torch.randn(rows, size).to(dtype) for size in {w.shape[1] for w in weights}}

    @torch.inference_mode()
    def products() -> None:
        for weight in weights:
            F.linear(given[weight.shape[1]], weight)

    numbers = sum(weight.numel() for weight in weights)
    times = [machine.seconds(products, torch.device("cpu")) for _ in range(rounds + 2)][2:]
    return {
        "rows": rows, "operations": 2 * rows * numbers, "bytes": numbers * dtype.itemsize,
        **spread(times, rows),
    }  # fmt: skip


def main() -> None:
    parser = inputs.parser_of(
        __doc__, documents=None, group=None, prefix=None, response=None, layers=None, random=None,
        rounds=20,
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=32)
    o = parser.parse_args()
    try:
        shape = published(o.model)
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    o.threads = o.threads or torch.get_num_threads()
    torch.set_num_threads(o.threads)
    command = f"python -m benchmarks.cost_rates {' '.join(inputs.flags(o))}"
    result = {"command": command, **machine.about(torch.device("cpu")), "products": {}}
    for dtype in DTYPES:
        found = measure(shape, getattr(torch, dtype), o.rows, o.rounds)
        result["products"][dtype] = found
        print(f"{dtype}: {o.rows} rows through all layers in {1e3 * found['median']:.1f} ms, "
              f"{found['operations'] / found['median'] / 1e9:.0f} GFLOP/s")  # fmt: skip
    write(o.json, result)


if __name__ == "__main__":
    main()
