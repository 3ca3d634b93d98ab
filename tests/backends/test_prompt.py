import json
from pathlib import Path

import pytest

from backends.inflight import entry
from backends.inflight.errors import InvalidArgument
from backends.inflight.prompt import PromptCodec
from backends.inflight.request import parse
from tests.counting import write_entry


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> PromptCodec:
    """The codec of the counting model: three words and a template that joins messages."""
    folder: Path = write_entry(tmp_path_factory.mktemp("repository"))
    return PromptCodec(entry.load(folder / "1", {}))


def test_text_and_messages_become_ids(codec: PromptCodec):
    """The same words give the same ids as text and through the template."""
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "three"}]
    chat, _ = parse(b"", json.dumps({"messages": messages}).encode())
    assert codec.encode(parse(b"one three", None)[0]) == codec.encode(chat) == [0, 2]
    assert codec.decode([0, 2]) == "one three"


def test_half_of_a_surrogate_pair_is_the_clients_error(codec: PromptCodec):
    """JSON can spell what is no text; it is refused and not reported as a fault of the server."""
    prompt, _ = parse(b"", b'{"messages": [{"role": "user", "content": "one \\ud800"}]}')
    with pytest.raises(InvalidArgument, match="messages"):
        codec.encode(prompt)


@pytest.mark.parametrize("ids", [[], [3], [-1], [10**30]])
def test_token_ids_outside_the_vocabulary_are_refused(codec: PromptCodec, ids):
    """Ids index the embedding: none outside of it may pass."""
    prompt, _ = parse(b"", json.dumps({"prompt_token_ids": ids}).encode())
    with pytest.raises(InvalidArgument):
        codec.encode(prompt)
