"""Which chat template an entry gets, and whether it renders where it will be served.

The server renders with a plain jinja2 sandbox and the variables ``messages``, ``bos_token``, ``eos_token`` and
``add_generation_prompt``; so does the check here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from export.errors import ExportError
from export.source import Source
from export.tokenizer import Tokens

# How DialoGPT was trained (arXiv:1911.00536, section 3): every turn, whoever speaks, ends with the end-of-text token.
DIALOGPT = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"


def chat_template(source: Source, tokenizer: PreTrainedTokenizerBase, given: Path | None, tokens: Tokens) -> str | None:
    """The template given by the user, else the checkpoint's own, else DialoGPT's for a DialoGPT, else None.

    Raises:
        ExportError: the file cannot be read, or the template does not render.
    """
    template: str | None
    if given is not None:
        try:
            template = given.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ExportError(
                f"The chat template {given} cannot be read: {error}.", "Give a Jinja file in UTF-8 that you may read."
            ) from error
    else:
        template = _own(tokenizer) or (DIALOGPT if is_dialogpt(source) else None)
    if template is not None:
        try:
            render(template, [{"role": "user", "content": "Hola"}], tokens)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ExportError(
                f"The chat template does not render: {error}.", "Give another with --chat-template FILE."
            ) from error
    return template


def is_dialogpt(source: Source) -> bool:
    """Whether the checkpoint is a GPT-2 that was trained on turns that end with the end-of-text token."""
    if source.config.get("model_type") != "gpt2":
        return False
    names = (source.id, source.path.name, source.config.get("_name_or_path", ""))
    named = any("dialogpt" in str(name).lower() for name in names)
    return named or "conversational" in (source.config.get("task_specific_params") or {})


def render(template: str, messages: list[dict[str, Any]], tokens: Tokens, add_generation_prompt: bool = True) -> str:
    """Render as the server does. Raises ``jinja2.TemplateError`` and what the template's own expressions raise."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template).render(
        messages=messages,
        bos_token=tokens.bos_token or "",
        eos_token=tokens.eos_token or "",
        add_generation_prompt=add_generation_prompt,
    )


def _own(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or None


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
