"""Data sets of Hugging Face: a known file of one, or any whose name is ORG/NAME or ORG/NAME:SUBSET.

The datasets library keeps it on the disk; its rows are read one at a time.
"""

import os
import re
from collections.abc import Iterable
from typing import Any

from rmt.data.files import suffix_of

FILES = {  # downloaded as they are
    "KbsdJames/Omni-MATH": "test.jsonl",
    "Skywork/Skywork-OR1-RL-Data": "data/math-00000-of-00001.parquet",
}
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")


def is_name(path: str) -> bool:
    """Tell the name of a data set from that of a file or folder."""
    return bool(NAME.fullmatch(path)) and not os.path.exists(path) and not suffix_of(path)


def rows(name: str) -> Iterable[dict[str, Any]]:
    """Return the rows of split "train"; ValueError or FileNotFoundError with the remedy."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"--data {name} does not exist here; to fetch it from Hugging Face `pip install "
            "datasets`"
        ) from None
    path, _, subset = name.partition(":")
    try:
        return load_dataset(path, subset or None, split="train")
    except Exception as error:  # of several packages, without a common base class
        raise FileNotFoundError(
            f"--data {name} does not exist here, and was not fetched from Hugging Face "
            f"({_reason(error)}); check the name (ORG/NAME, or ORG/NAME:SUBSET), or on a machine "
            f"with a network run `hf download --repo-type dataset {path} --local-dir DIR`, then "
            "give --data the files in DIR to train on (a folder would be read whole, with test "
            "splits)"
        ) from None


def download(name: str) -> str:
    """Return the path of the file of a data set in FILES; FileNotFoundError with the remedy."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(name, FILES[name], repo_type="dataset")
    except Exception as error:  # requests, httpx and hub errors share no base class
        raise FileNotFoundError(
            f"data set {name} could not be fetched ({_reason(error)}); on a machine with a "
            f"network run `hf download --repo-type dataset {name} --local-dir DIR`, "
            f"then give --data DIR/{FILES[name]}"
        ) from None


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
