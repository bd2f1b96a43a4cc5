"""Log-probability, entropy and losses of a head without its logits; attention of branches.

kernels/reference.py defines each function but the vocab-parallel one; kernels/dispatch.py selects
the backend.

Hugging Face's kernel loader is a package of the same name, and transformers imports it where it is
installed. So this package serves its modules and names too: ours come first, and nothing of it is
imported before its first use.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from .branch_attention import branch_attention
from .branch_tiles import Seen, TrunkGroups
from .head import linear_entropy_logprob, linear_topk, linear_topk_entropy
from .logits import entropy_logprob, masked_cross_entropy
from .one_pass import linear_objective
from .reference import IGNORE, matmul
from .vocab_parallel import vocab_parallel_entropy_logprob

__all__ = [
    "IGNORE",
    "Seen",
    "TrunkGroups",
    "branch_attention",
    "entropy_logprob",
    "linear_entropy_logprob",
    "linear_objective",
    "linear_topk",
    "linear_topk_entropy",
    "masked_cross_entropy",
    "matmul",
    "vocab_parallel_entropy_logprob",
]


def _namesake() -> ModuleSpec | None:
    """Find the installed package that this folder shadows."""
    here = Path(__file__).resolve().parent.parent
    found = PathFinder.find_spec("kernels", [x for x in sys.path if Path(x).resolve() != here])
    return found if found and found.origin and found.submodule_search_locations else None


_INSTALLED = _namesake() if __name__ == "kernels" else None
if _INSTALLED:  # its modules import each other as kernels.NAME
    __path__.extend(_INSTALLED.submodule_search_locations)


def __getattr__(name: str):
    """Return a public name of the installed package; its __init__.py is loaded under an alias."""
    if _INSTALLED is None or (name.startswith("__") and name != "__version__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    alias = "kernels._installed"
    if alias not in sys.modules:
        spec = spec_from_file_location(alias, _INSTALLED.origin, submodule_search_locations=None)
        sys.modules[alias] = module_from_spec(spec)  # before it runs: its modules import it
        try:
            spec.loader.exec_module(sys.modules[alias])
        except BaseException:
            del sys.modules[alias]
            raise
    return getattr(sys.modules[alias], name)
