"""From a request's prompt to token ids, and back: the tokenizer and the chat template of the entry."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from .entry import Entry, EntryError
from .errors import InvalidArgument
from .pieces import Pieces
from .request import Prompt


class PromptCodec:
    """Tokenizer and chat template of one entry; safe to use from several threads."""

    def __init__(self, entry: Entry) -> None:
        path = entry.folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise EntryError(f"{path} is not a tokenizer: {error}; export the model again") from error
        self.pieces = Pieces(self._tokenizer)
        self._vocab_size = entry.graph.vocab_size
        self._names = {"bos_token": entry.bos_token, "eos_token": entry.eos_token}
        self._template = None
        if entry.chat_template is not None:
            # A template comes with a checkpoint, so it is untrusted: sandboxed, and it cannot change what it is given.
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
            environment.globals["raise_exception"] = _raise
            environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
            try:
                self._template = environment.from_string(entry.chat_template)
            except TemplateError as error:
                raise EntryError(f"the chat template does not compile: {error}") from error

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises InvalidArgument: empty, out of vocabulary, or not renderable."""
        if prompt.token_ids is not None:
            ids = list(prompt.token_ids)
            bad = next((t for t in ids if not 0 <= t < self._vocab_size), None)
            if bad is not None:
                raise InvalidArgument(f"prompt_token_ids has {bad}, the vocabulary is 0 to {self._vocab_size - 1}")
        elif prompt.messages is not None:
            # The template writes the special tokens itself.
            ids = self._encode(self._render(prompt.messages), False)
        else:
            ids = self._encode(prompt.text, True) if prompt.text else []
        if not ids:
            raise InvalidArgument("the prompt is empty: give at least one token")
        return ids

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise InvalidArgument(f"messages: half of a character ({text[error.start]!r}) is not text") from error
        # The batch form alone lets other threads run meanwhile.
        return list(self._tokenizer.encode_batch([text], add_special_tokens=special)[0].ids)

    def decode(self, ids: Ids[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _render(self, messages: tuple[Any, ...]) -> str:
        if self._template is None:
            raise InvalidArgument(
                "messages: this model has no chat template; send a prompt, or export it with --chat-template FILE"
            )
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._names)
        except Exception as error:  # whatever a checkpoint's template may raise concerns this request only
            raise InvalidArgument(f"messages: the chat template refused them: {error}") from error


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
