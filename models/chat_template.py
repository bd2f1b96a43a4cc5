"""Find and render the chat template of a model directory as transformers does.

The environment is that of transformers/utils/chat_template_utils.py.
"""

import json
import re
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

STARTED = datetime.now()  # a run has one date: after midnight its prompts stay the same
REMEDY = "mend it or take another instruct checkpoint"
# {% generation %} marks what an assistant says; rendered, it is its body in a scope of its own.
GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(?=\s*[-+]?%\})")


def find_template(directory: Path, description: dict) -> str:
    """Return the template that is used without tools; files go before `description`.

    description: tokenizer_config.json. ValueError if there is no template.
    """
    files = {path.stem: path for path in (directory / "additional_chat_templates").glob("*.jinja")}
    if (directory / "chat_template.jinja").is_file():
        files.setdefault("default", directory / "chat_template.jinja")
    template = description.get("chat_template")
    if isinstance(template, list):
        template = {str(t.get("name")): t.get("template") for t in template if isinstance(t, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    if files:
        template = _read(files["default"]) if "default" in files else None
    if not isinstance(template, str):
        raise ValueError(
            f"{directory} has no chat template; reinforcement mid-training starts from "
            'an instruct model: add chat_template.jinja (of several, one named "default") or take '
            "the instruct checkpoint"
        )
    return template


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); {REMEDY}") from None


def render_template(directory: Path, template: str, **arguments) -> str:
    """Render a template, in a sandbox: others wrote it. ValueError whatever goes wrong in it."""
    try:
        return _compiled(template).render(**arguments)
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"the chat template of {directory} fails, or refuses these messages ({reason}); "
            f"{REMEDY}"
        ) from None


@lru_cache(maxsize=8)  # 10 ms, and every prompt of a step needs it
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = STARTED.strftime
    return environment.from_string(GENERATION.sub(r"\1\2with", template))


def _refuse(message):
    raise ValueError(message)
