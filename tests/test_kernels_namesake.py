"""Hugging Face's package `kernels` beside ours: transformers finds it, and so do we ours.

`make namesake` runs this with the real package; it is no dependency of ours.
"""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__"}


def run(program: str, *folders: Path) -> str:
    """What the program prints in a process of its own, where these folders come first."""
    path = f"import sys; sys.path[:0] = {[str(folder) for folder in folders]}\n"
    command = [sys.executable, "-c", path + program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# A package of that shape: modules import each other by the package's name while it is imported.
STUB = {
    "__init__.py": "import sys\nsys.stub = 1\n__version__ = '9'\nfrom kernels.layer import Mode\n",
    "layer/__init__.py": "from kernels.layer.mode import Mode\nfrom .mode import Mode as Same\n",
    "layer/mode.py": "from kernels import __version__\nclass Mode: version = __version__\n",
    "head.py": "raise ImportError('ours comes first')\n",
    "broken.py": "from kernels import nothing_like_this\n",
}
ASKED = """
import kernels, torch
assert not hasattr(sys, "stub"), "imported before anybody asked"
hidden, weight = torch.ones(2, 4), torch.ones(5, 4)
assert kernels.linear_topk(hidden, weight, 2)[1].shape == (2, 2)
assert not hasattr(kernels, "__wrapped__") and not hasattr(sys, "stub")
from kernels import Mode, __version__
from kernels.layer import Mode as same, Same
import kernels.layer.mode
assert Mode is same is Same is kernels.layer.mode.Mode and Mode.version == __version__ == "9"
for wrong in ("kernels.nothing", "__import__('kernels.broken')"):
    try: eval(wrong)
    except (AttributeError, ImportError) as error: assert "nothing" in str(error), error
    else: raise AssertionError(wrong)
assert kernels.head.linear_topk is kernels.linear_topk and "kernels.head" in sys.modules
"""


def test_an_installed_package_of_the_same_name_is_found_too(tmp_path):
    for name, text in STUB.items():
        path = tmp_path / "kernels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    run(ASKED, ROOT, tmp_path)


REAL = """
import json, tempfile, torch
import kernels
assert "huggingface_hub" not in sys.modules, "imported before anybody asked"
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import hub_kernels
from transformers.utils import is_kernels_available
small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **small))
with tempfile.TemporaryDirectory() as place:
    model.save_pretrained(place)
    model = LlamaForCausalLM.from_pretrained(place)
assert model(torch.arange(4)[None]).logits.shape == (1, 4, 50)
from kernels import LayerRepository, get_kernel
assert kernels.layer.LayerRepository is LayerRepository
assert not is_kernels_available() or hub_kernels.LayerRepository is LayerRepository
assert kernels.linear_topk(torch.ones(2, 4), torch.ones(5, 4), 2)[1].shape == (2, 2)
"""


def test_transformers_works_beside_the_real_package():
    try:
        real = distribution("kernels")
    except PackageNotFoundError:
        pytest.skip("Hugging Face's package kernels is not installed: make namesake")
    theirs = {
        Path(file).parts[1].split(".")[0] for file in real.files if file.parts[0] == "kernels"
    }
    assert not OURS & theirs, "two modules of one name"
    run(REAL, ROOT, Path(real.locate_file("")))
