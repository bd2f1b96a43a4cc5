# ruff: noqa: E402 (threads and paths are set before PyTorch is imported)
"""Broken files and command lines: each ends in a result or in one message, never in a traceback.

    python tests/fuzz.py --minutes 60              new seeds, from the clock; found ones are printed
    python tests/fuzz.py --kind config --seeds 17  one case again, with what it printed

A case is a number: the seed of everything random in it. Each runs in a fork of this process, in a
folder of its own, with a limit of time and memory. What counts as found: a traceback, an exit with
neither result nor message, a hang, memory, or a result that is not transformers'.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from small_run import FLAGS, arguments, flags, write_corpus, write_small_model

import eval
import sample
import train
from rmt.engine.checkpoint import CHECKSUMS, checksums
from rmt.report import report

torch.set_num_threads(1)
SECONDS, MEMORY = 60, 12 << 30
ASK = ["--prompt", "7 times 8", "--greedy", "--max-new-tokens", "3", "--json"]
NASTY = (
    None, True, False, 0, 1, -1, 2, 3, 0.0, -0.5, 1e-300, 1e308, 10**30, float("nan"), float("inf"),
    "", "x", "1", "nan", "\u2028", "\ud800", "a" * 5000, "../../etc", [], {}, [[]], [None], [0, 1],
    {"a": 1}, {"type": "yarn", "factor": 4.0}, "<|im_end|>", "float8", 255, 2**31, 2**63, 1 << 70,
)  # fmt: skip

JUNK = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x85", b"{", b"}", b'"', b"\n", b"\r", b"\xc3", b"NaN",
    "\u2028".encode(), b"[" * 100_000, b"1" * 5000,
)  # fmt: skip


def preload() -> None:
    """Import once what each fork would import anew."""
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo
    import torch.distributed.checkpoint  # noqa: F401

    with contextlib.suppress(ImportError):
        from transformers import (  # noqa: F401
            AutoModelForCausalLM,
            AutoTokenizer,
            LlamaForCausalLM,
            Qwen3ForCausalLM,
        )


def places(tree, at=()):
    """Paths of all values inside a JSON object."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(pairs)[:400]:
        yield (*at, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*at, key))


def break_tree(tree, rng):
    """A copy in which one to three values are other ones, gone, or under another name."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        depths = {}
        for path in places(tree):
            depths.setdefault(len(path), []).append(path)
        if not depths:
            return copy.deepcopy(rng.choice(NASTY))
        path = rng.choice(depths[rng.choice(list(depths))])
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        what = rng.randrange(6)
        if what == 0 and isinstance(parent, (dict, list)):
            del parent[path[-1]]
        elif what == 1 and isinstance(parent, dict):
            parent[rng.choice(list(parent))] = copy.deepcopy(parent[path[-1]])
        elif what == 2 and isinstance(parent[path[-1]], (int, float)):
            parent[path[-1]] = parent[path[-1]] * rng.choice((-1, 2, 0.5, 1000)) + rng.choice(
                (0, 1)
            )
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(NASTY))
    return tree


def break_bytes(content: bytes, rng) -> bytes:
    at = rng.randrange(len(content) + 1)
    junk = rng.choice(JUNK)
    return rng.choice((
        content[:at], content[at:], content[:at] + junk + content[at:], junk + content,
        content[:at] + content[at + 1 :], b"", content + content, content[:at] + junk,
    ))  # fmt: skip


def break_json(path: Path, rng, lines=False) -> None:
    """The file broken as text, or one of its values (of one line) replaced."""
    content = path.read_bytes()
    if rng.random() < 0.25:
        return path.write_bytes(break_bytes(content, rng)) and None
    rows = content.decode().split("\n") if lines else [content.decode()]
    at = rng.randrange(len([row for row in rows if row]))
    tree = break_tree(json.loads(rows[at]), rng)
    rows[at] = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    path.write_bytes("\n".join(rows).encode("utf-8", "surrogatepass"))


# ---- kinds: each prepares a folder (a copy of the base) and says what to run


def break_config(place, rng):
    break_json(place / "model/config.json", rng)
    return sample, ["--model", place / "model", *ASK], same_logits


def break_header(place, rng):
    """The header of a safetensors file: its JSON, its length, or where tensors begin and end."""
    path = place / "model/model.safetensors"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    if rng.random() < 0.2:
        path.write_bytes(break_bytes(content, rng))
    else:
        raw = json.dumps(break_tree(header, rng)).encode()
        length = len(raw) if rng.random() < 0.8 else rng.choice((0, 1, len(raw) - 1, 2**40, 2**63))
        path.write_bytes(struct.pack("<Q", length) + raw + data)
    return sample, ["--model", place / "model", *ASK], same_logits


def break_tokenizer(place, rng):
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
             "special_tokens_map.json")  # fmt: skip
    path = place / "model" / rng.choice(names)
    if not path.exists():
        path.write_text('{"eos_token_id": 257, "eos_token": "<|im_end|>", "bos_token_id": 256}')
    break_json(path, rng)
    chat = ["--chat"] if rng.random() < 0.5 else []
    return sample, ["--model", place / "model", *chat, *ASK], same_tokens


PARTS = (
    "{{ messages[0].content }}", "{{ messages[0]['role'] }}", "{% for m in messages %}", "{{ m }}",
    "{% endfor %}", "{% if tools is none %}", "{% if add_generation_prompt %}", "{% endif %}",
    "{{ m.content | trim }}", "{{ bos_token }}", "{{ eos_token }}", "{{ raise_exception('no') }}",
    "{{ messages | tojson }}", "{{ nothing.here }}", "{% generation %}", "{% endgeneration %}",
    "{{ 1 / 0 }}", "{% break %}", "{{ strftime_now('%Y') }}", "{{ 'x' * 3 }}", "{# remark #}", " ",
    "{% set ns = namespace(a=1) %}", "{{ ns.a }}", "<|im_start|>user\n", "<|im_end|>\n", "\n", "{%",
    "{{ m.content.split('x')[-1] }}", "<|im_start|>assistant\n", "{% macro f(x) %}{{ x }}",
    "{% endmacro %}", "{{ f('y') }}", "{{ messages[5].content }}", "{{ enable_thinking }}", "\x85",
    "{{ m.content.__class__ }}", "{% else %}", "{{ range(3) | list }}", "{{ documents }}", "}}",
)  # fmt: skip


def break_template(place, rng):
    path = place / "model/tokenizer_config.json"
    raw = json.loads(path.read_text())
    if rng.random() < 0.6:  # a good one with a part in it
        template, at = raw["chat_template"], rng.randrange(len(raw["chat_template"]))
        template = template[:at] + rng.choice(PARTS) + template[at:]
    else:
        template = "".join(rng.choice(PARTS) for _ in range(rng.randrange(1, 9)))
        template += rng.choice(("", "{{ messages[0].content }}", "{{ messages[-1].content }}!"))
    if rng.random() < 0.2:
        template = [{"name": rng.choice(("default", "tool_use")), "template": template}]
    path.write_text(json.dumps(raw | {"chat_template": template}))
    return sample, ["--model", place / "model", "--chat", *ASK], same_prompt


def break_corpus(place, rng):
    break_json(place / "train.jsonl", rng, lines=True)
    more = dict(steps=1, out=place / "new", probe_documents=1, probe_times=2)
    return train, arguments(place, **more), None


def break_run(place, rng):
    """run.json of a checkpoint, whose checksum is made to fit, or another file of it."""
    (newest,) = sorted((place / "run/checkpoints").iterdir())[-1:]
    path = newest / rng.choice(("run.json", "run.json", "run.json", CHECKSUMS, ".metadata"))
    if path.suffix == ".json":
        break_json(path, rng)
    else:
        path.write_bytes(break_bytes(path.read_bytes(), rng))
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        sums = json.loads((newest / CHECKSUMS).read_text())
        if path.name == "run.json":  # what else is broken, its checksum tells
            sums |= checksums([path])
            (newest / CHECKSUMS).write_text(json.dumps(sums))
    return train, ["--resume", place / "run", "--max-minutes", "0.2"], None  # T may be thousands


def break_records(place, rng):
    """What a run has written, before its report is made."""
    paths = [p for p in (place / "run").iterdir() if p.suffix in (".json", ".jsonl")]
    path = rng.choice(sorted(paths))
    break_json(path, rng, lines=path.suffix == ".jsonl")
    return report, [place / "run"], None


def break_positions(place, rng):
    break_json(place / "positions.json", rng)
    return eval, _evaluation(place), None


def _evaluation(place, mode="ntp"):
    shared = {k: FLAGS[k] for k in ("document_tokens", "tiers", "tier_thresholds", "min_context",
                                    "max_response")}  # fmt: skip
    return flags(
        model=place / "model", data=place / "train.jsonl", mode=mode, per_tier=4,
        positions=place / "positions.json", **shared,
    )  # fmt: skip


VALUES = ("0", "1", "-1", "2", "3", "0.5", "1.5", "nan", "inf", "-inf", "1e-9", "1e400", "", " ",
          "x", "none", "sampled", "9" * 40, "\u2028", "..", "/dev/null", "model", "0x10", "1_0",
          "2147483648", "--", "tiny", "runs", "train.jsonl", "1 2", "é", "\udcff")  # fmt: skip


def break_line(place, rng):
    """A command line that works with one to three flags more, of any script."""
    script, line = rng.choice((
        (train, arguments(place, steps=1, out=place / "new")), (eval, _evaluation(place, "rmt")),
        (train, ["--resume", str(place / "run")]), (eval, _evaluation(place)),
        (sample, ["--model", str(place / "model"), *ASK]), (report, [str(place / "run")]),
    ))  # fmt: skip
    known = _flags_of(script)
    for _ in range(rng.randrange(1, 4)):
        line = [*line, rng.choice(known), *rng.choices(VALUES, k=rng.choice((0, 1, 1, 1, 1, 2)))]
    return script, line, None


_KNOWN: dict[str, list[str]] = {}


def _flags_of(script) -> list[str]:
    if script.__name__ not in _KNOWN:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            script.main(["--help"])
        words = {w.strip("[],|.") for w in out.getvalue().split()}
        harmless = {"--timeout", "--max-minutes", "--epochs", "--help"}  # take time or none
        found = sorted(w for w in words if w.startswith("--") and w not in harmless)
        _KNOWN[script.__name__] = found
    return _KNOWN[script.__name__] or ["--x"]


KINDS = {
    "config": break_config, "header": break_header, "tokenizer": break_tokenizer,
    "template": break_template, "corpus": break_corpus, "run": break_run,
    "records": break_records, "positions": break_positions, "line": break_line,
}  # fmt: skip


# ---- oracles: what transformers makes of a folder that ours accepted; a difference, or None


def same_logits(place):
    from toy_models import causal
    from transformers import AutoModelForCausalLM

    from models.weights import build

    ids = torch.arange(24) * 7 % 250
    try:
        theirs = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
        expected = theirs(ids[None]).logits[0]
    except Exception:
        return None  # theirs does not open it
    model = build(place / "model", "cpu", torch.float32)
    ours = model(ids, torch.arange(24), causal, torch.nn.functional.linear)
    width = min(ours.shape[1], expected.shape[1])
    off = (ours[:, :width] - expected[:, :width]).abs().max().item()
    return None if off < 1e-3 * (1 + expected.abs().max().item()) else f"logits differ by {off:.2g}"


TEXTS = ("7 times 8?", " a  b\n\nc", "é ü \u2028 日本 x", "12345, 1.5", "")  # nothing like control


def same_tokens(place):
    from transformers import AutoTokenizer

    from models.tokenizer import Tokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(place / "model")
        expected = [theirs.encode(text, add_special_tokens=False) for text in TEXTS]
    except Exception:
        return None
    ours = [Tokenizer(place / "model").encode(t) for t in TEXTS]
    wrong = [text for text, a, b in zip(TEXTS, ours, expected) if a != b]
    return f"other tokens than transformers for {wrong[0]!r}" if wrong else None


def same_prompt(place):
    from transformers import AutoTokenizer

    from models.tokenizer import Tokenizer

    ask = [{"role": "user", "content": "7 times 8?"}]
    try:
        theirs = AutoTokenizer.from_pretrained(place / "model")
        expected = theirs.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    except Exception:
        return None
    ours = Tokenizer(place / "model").render(ask)
    return None if ours == expected else f"prompt {ours!r} where transformers has {expected!r}"


# ---- running


def make_base(place: Path) -> None:
    """A model, a corpus, a finished run with an evaluation, and stored positions."""
    place.mkdir(parents=True)
    write_small_model(place / "model", num_hidden_layers=1)
    write_corpus(place / "train.jsonl")
    more = dict(steps=2, save_every=1, probe_documents=1, probe_times=2, eval_positions=2)
    train.main(list(map(str, arguments(place, eval_data=place / "train.jsonl", **more))))
    line = [*_evaluation(place), "--json", str(place / "run/before.json")]
    eval.main(line)
    shutil.copy(place / "run/before.json", place / "run/after.json")


def child(action) -> tuple[int, str]:
    """Exit status of a fork that runs action, and what it printed; -9 after SECONDS."""
    with tempfile.TemporaryFile() as printed:
        number = os.fork()
        if number == 0:
            os.dup2(printed.fileno(), 1), os.dup2(printed.fileno(), 2)
            sys.stdout = os.fdopen(1, "w", buffering=1, errors="backslashreplace", closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            torch.set_num_threads(1)  # a fork has none of its parent's OpenMP threads, and waits
            status = 70
            try:
                action()
                status = 0
            except SystemExit as end:
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
                status = 1 if isinstance(end.code, str) else int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        deadline, ended = time.monotonic() + SECONDS, 0
        while not ended and time.monotonic() < deadline:
            ended, status = os.waitpid(number, os.WNOHANG)
            time.sleep(0.01)
        if not ended:
            os.kill(number, signal.SIGKILL)
            _, status = os.waitpid(number, 0)
        printed.seek(0)
        return os.waitstatus_to_exitcode(status), printed.read().decode("utf-8", "replace")


def case(kind: str, seed: int, base: Path) -> tuple[str | None, str]:
    """What was found in a case (None: nothing), and what was printed."""
    rng = random.Random(f"{kind} {seed}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        place = Path(folder) / "p"
        shutil.copytree(base, place)
        script, line, oracle = KINDS[kind](place, rng)
        line, told = [str(word) for word in line], []

        def action():
            os.chdir(place)
            script.main(line)
            if oracle and (difference := oracle(place)):
                print("ORACLE:", difference)
                raise SystemExit(71)

        status, printed = child(action)
        shown = f"{script.__name__} {' '.join(map(repr, line))}\n{printed}"
        if status in (0, 1, 2) and "Traceback" not in printed:
            message = "error: " in printed or "usage" in printed or "interrupted" in printed
            return (None if status == 0 or message else f"exit {status} without a message"), shown
        if status == 71:
            return printed[printed.index("ORACLE:") :].strip(), shown
        told = [row for row in printed.strip().splitlines() if row.strip()]
        return f"exit {status}: {told[-1] if told else 'nothing printed'}"[:300], shown


def main() -> int:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--seeds", type=int, nargs="*", help="these cases, with what they print")
    parser.add_argument("--out", help="append what was found to this file, a JSON line each")
    options = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory(prefix="fuzz-base-") as folder:
        base = Path(folder) / "base"
        status, printed = child(lambda: make_base(base))
        assert status == 0, printed
        kinds = options.kind or list(KINDS)
        end, first = time.monotonic() + 60 * options.minutes, int(time.time()) % 10**8 * 1000
        seeds = options.seeds or iter(range(first, first + 10**9))
        count = found = 0
        for seed in seeds:
            for kind in kinds:
                problem, shown = case(kind, seed, base)
                count += 1
                if options.seeds:
                    print(f"{kind} {seed}: {problem or 'nothing found'}\n{shown}")
                if problem:
                    found += 1
                    print(f"{kind} {seed}: {problem}", flush=True)
                    if options.out:
                        with open(options.out, "a", encoding="utf-8") as file:
                            record = {"kind": kind, "seed": seed, "found": problem}
                            file.write(json.dumps(record | {"printed": shown[-3000:]}) + "\n")
            if not options.seeds and time.monotonic() > end:
                break
        print(f"{count} cases, {found} found")
    return int(found > 0)


if __name__ == "__main__":
    raise SystemExit(main())
