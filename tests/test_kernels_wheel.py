"""The wheel of kernels/ works outside of the repository, under its own name, beside the folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BESIDE = """
import torch, rmt_kernels, kernels
x, w = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
y, loss = torch.arange(5), lambda logprob, entropy, index: (logprob - entropy).sum()
for package in (rmt_kernels, kernels):
    assert package.linear_entropy_logprob(x, w, y)[0].grad_fn
    ours, theirs = (f.linear_objective(x, w, y, loss)[0] for f in (package, package.reference))
    torch.testing.assert_close(ours, theirs)
print(rmt_kernels.__file__, kernels.__file__)
"""
AS_KERNELS = """
import importlib, pkgutil, sys, pytest, rmt_kernels
sys.modules["kernels"] = rmt_kernels
for module in pkgutil.iter_modules(rmt_kernels.__path__):
    sys.modules[f"kernels.{module.name}"] = importlib.import_module(f"rmt_kernels.{module.name}")
status = pytest.main(sys.argv[1:])
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
assert not [file for file in files if "/kernels/" in file and "site-packages" not in file]
sys.exit(status)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the unpacked wheel; building it leaves nothing in the repository."""
    pytest.importorskip("setuptools", reason="builds the wheel: pip install setuptools")
    place = tmp_path_factory.mktemp("wheel")
    leave_out = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT / "kernels", place / "source", ignore=leave_out)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    build = [*pip, "--wheel-dir", place, place / "source"]
    subprocess.run(build, check=True, capture_output=True, cwd=place)
    (wheel,) = place.glob("rmt_kernels-*.whl")
    with zipfile.ZipFile(wheel) as file:
        assert any(name.endswith("licenses/LICENSE") for name in file.namelist())
        file.extractall(place / "site")
    return place / "site"


def python(site, *arguments, **more):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, site))} | more
    return subprocess.run(
        [sys.executable, *arguments], cwd=site[0], env=environment, capture_output=True, text=True
    )


def test_it_is_a_package_of_its_own_beside_the_folder(site):
    ran = python([site, ROOT], "-c", BESIDE)
    assert ran.returncode == 0, ran.stderr
    mine, folder = ran.stdout.split()
    assert Path(mine).parent == site / "rmt_kernels" and Path(folder).parent == ROOT / "kernels"


@pytest.mark.slow
def test_the_tests_of_the_kernels_pass_with_it(site):
    files = [str(ROOT / "tests" / f"test_kernels{name}.py") for name in ("", "_branch_attention")]
    # A few of each Triton kernel: the rest is tested in the folder, and the wheel is the same code.
    few = "50-words or edges-and-padding or 1003-columns or few or pieces or topk"
    chosen = ["-m", "not slow", "-k", f"triton and float32 and ({few})"]
    flags = ["-q", *chosen, "-p", "no:cacheprovider", f"--rootdir={ROOT}", *files]
    ran = python([site], "-c", AS_KERNELS, *flags)
    assert ran.returncode == 0 and "[100%]" in ran.stdout, ran.stdout + ran.stderr
