"""A model, a corpus and a run that take seconds: started as users start them, and read back."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import Fork
from safetensors.torch import load_file, save_file
from toy_models import write_tokenizer

import train
from models.config import ModelConfig
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from models.weights import SINGLE

ROOT = Path(__file__).resolve().parent.parent
STEPS = 8
MEASURED = ("time/", "speed/", "memory/")
CONTROL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.4,  # so that some of its tokens are likelier than others
}
SENTENCE = "the sum of two odd numbers is even while their product stays odd and grows"
FLAGS = {
    "holdout": 0, "document_tokens": 64, "batch_size": 2, "group_size": 4, "max_response": 24,
    "budget_start": 12, "steps": STEPS, "save_every": 2, "keep": 10, "learning_rate": 1e-3,
    "warmup_steps": 6, "tiers": "quantile", "tier_thresholds": (0.2, 0.5, 0.8), "min_context": 8,
    "probe_documents": 0,
}  # fmt: skip


def write_small_model(directory: Path, **changes) -> Path:
    """A random instruct model in Hugging Face format: bytes as tokens, a chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory, special=CONTROL, eos_token="<|im_end|>", chat_template=TEMPLATE)
    shape = SHAPE | changes
    (directory / "config.json").write_text(json.dumps(shape))
    model = Transformer(ModelConfig.from_dict(shape))
    model.reset_parameters(0)
    save_file({k: v.detach().clone() for k, v in model.state_dict().items()}, directory / SINGLE)
    assert Tokenizer(directory).chat_parts()
    return directory


def write_corpus(path: Path, documents: int = 10) -> Path:
    """JSON lines with texts that all differ, each of one document."""
    words = SENTENCE.split()
    with path.open("w") as file:
        for i in range(documents):
            text = f"{i}: " + " ".join(words[i * j % len(words)] for j in range(1, 15))
            file.write(json.dumps({"text": text[:60]}) + "\n")
    return path


def flags(**values) -> list[str]:
    """{"batch_size": 4} -> ["--batch-size", "4"]; True and False are --name and --no-name."""
    out = []
    for name, value in values.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            out.append(f"--{'' if value else 'no-'}{name}")
        else:
            out += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return out


def arguments(place: Path, **changes) -> list[str]:
    """Of a run in a folder that holds model/ and train.jsonl."""
    paths = dict(model=place / "model", data=place / "train.jsonl", out=place / "run")
    return flags(**FLAGS | paths | changes)


def command(*arguments, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(launcher if ranks > 1 else ()), str(ROOT / "train.py"), *arguments]


def start(*arguments, ranks: int = 1, **options) -> subprocess.Popen | Fork:
    """train.py in its own process, without a GPU; with options of Popen it is no fork."""
    if ranks == 1 and not options:
        return Fork(list(arguments))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command(*arguments, ranks=ranks), cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def finish(process: subprocess.Popen | Fork) -> str:
    """What a process printed until it ended."""
    return process.communicate(timeout=120)[0]


def completed(*arguments, **options) -> str:
    """Run train.py to its end, which must be a good one."""
    process = start(*arguments, **options)
    output = finish(process)
    assert process.returncode == 0, output
    return output


def wait_until(condition, process: subprocess.Popen | Fork, pause: float = 0.002) -> None:
    """Poll until condition() holds; the process must not end before."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing happened for two minutes"
        time.sleep(pause)


def metrics(out: Path) -> list[dict]:
    """Lines of metrics.jsonl without what differs from one process to the next."""
    path = out / "metrics.jsonl"
    read = json.JSONDecoder(parse_constant=pytest.fail).decode  # nan is not JSON
    rows = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [{k: v for k, v in read(row).items() if not k.startswith(MEASURED)} for row in rows]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / SINGLE)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refusal(script, arguments, fragments, capsys) -> str:
    """Run a script's main, which must exit with one message that holds the fragments."""
    with pytest.raises(SystemExit) as exit:
        script.main([str(argument) for argument in arguments])
    message, printed = str(exit.value.code), "".join(capsys.readouterr())
    assert message.startswith("error: "), message
    assert "Traceback" not in message + printed
    for fragment in fragments:
        assert str(fragment) in message, f"{fragment!r} is not in: {message}"
    return printed


def run_here(*arguments) -> None:
    """train.py in this process, for what is not about processes."""
    train.main([str(argument) for argument in arguments])
