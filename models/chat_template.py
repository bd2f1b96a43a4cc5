"""The chat template of a model directory, found and rendered as transformers does.

The environment is that of transformers/utils/chat_template_utils.py.
"""

import json
from datetime import datetime
from pathlib import Path

REMEDY = "mend it or take another instruct checkpoint"


def find_template(directory: Path, description: dict) -> str:
    """The text of the template that is used without tools; files go before the configuration."""
    beside = {path.stem: path for path in (directory / "additional_chat_templates").glob("*.jinja")}
    if (directory / "chat_template.jinja").is_file():
        beside = {"default": directory / "chat_template.jinja"} | beside
    if beside:
        template = {name: _read(path) for name, path in beside.items()}
    else:
        template = description.get("chat_template")
    if isinstance(template, list):
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
    if isinstance(template, dict):
        template = template.get("default")
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
    """ValueError, whatever goes wrong in it: a template is a program that others wrote."""
    try:
        return _environment().from_string(template).render(**arguments)
    except _Refused as error:
        raise ValueError(
            f"the chat template of {directory} refuses these messages: {error}"
        ) from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"the chat template of {directory} fails ({reason}); {REMEDY}") from None


class _Refused(Exception):
    """What raise_exception raises."""


def _environment():
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what an assistant says; rendered, it is its body."""

        tags = frozenset(("generation",))

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            call = self.call_method("_body")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller):
            return caller()

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message):
    raise _Refused(message)
