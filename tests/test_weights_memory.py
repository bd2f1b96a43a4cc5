"""What reading weights takes beside the parameters, by what Linux counts for the process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toy_models import random_state, write_config

from models.export import export
from models.weights import SINGLE

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc"
)

# Prints MiB beyond the parameters: anonymous and of mapped files (the most that was seen, every
# fifth of a millisecond), and both together (Linux's own high-water mark, exact).
SCRIPT = """
import sys, threading
from pathlib import Path
import torch
from safetensors.torch import load_file
from models.weights import load, on_meta, shards

def status(*fields):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(lines[field].split()[0]) / 1024 for field in fields]

def watch():
    while not done.is_set():
        seen.append(status("RssAnon", "RssFile"))
        done.wait(0.0002)

torch.set_num_threads(1)
directory = Path(sys.argv[1])
model = on_meta(directory).to_empty(device="cpu")
for parameter in model.parameters():
    torch.nn.init.zeros_(parameter)
Path("/proc/self/clear_refs").write_text("5")
before, seen, done = status("RssAnon", "RssFile", "VmRSS"), [], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
load(model, directory)
done.set()
thread.join()
peaks = [*map(max, zip(*seen)), *status("VmHWM")]
print(*(peak - start for peak, start in zip(peaks, before)))
stored = {name: t for path in shards(directory) for name, t in load_file(path).items()}
assert all(torch.equal(p, stored[name].float()) for name, p in model.named_parameters())
"""


def read(directory: Path) -> list[float]:
    command = [sys.executable, "-c", SCRIPT, str(directory)]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [float(value) for value in result.stdout.split()]


def test_reading_takes_no_second_copy_of_a_tensor(tmp_path):
    """The embedding is a parameter of 246 MiB in fp32, 123 MiB in the file; reading may take 64.

    On a CPU blocks are views of the file and take none: the limit matters on the way to a GPU.
    """
    changes = {"vocab_size": 252_000, "hidden_size": 256, "tie_word_embeddings": True}
    write_config(tmp_path, **changes)
    state = {name: t.bfloat16() for name, t in random_state(**changes).items()}
    save_file(state, tmp_path / SINGLE)
    anonymous, _, _ = read(tmp_path)
    assert anonymous < 80, f"{anonymous} MiB"


def test_only_the_file_that_is_being_read_is_in_memory(tmp_path):
    """Pages of a mapped file are resident until it is closed."""
    source, directory = tmp_path / "source", tmp_path / "model"
    changes = {"vocab_size": 131_072, "hidden_size": 32, "intermediate_size": 43_690}
    write_config(source, **changes)
    export(random_state(**changes), source, directory, torch.float32, max_shard_bytes=2**24)
    sizes = [path.stat().st_size / 2**20 for path in directory.glob("*.safetensors")]
    anonymous, mapped, both = read(directory)
    assert len(sizes) == 5 and max(sizes) < 17, sizes
    assert anonymous < 2, f"{anonymous} MiB"
    assert mapped < 20, f"{mapped} MiB of files of {sizes}"
    assert both < 20, f"{both} MiB beside the parameters"
