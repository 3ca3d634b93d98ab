from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from backends.encoder.tokens import MAX_BYTES, TextCodec, Texts
from backends.inflight.entry import EntryError
from backends.inflight.errors import InvalidArgument

WORDS = {"[": 0, "]": 1, "?": 2, "one": 3, "two": 4, "uno": 5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="?"))  # noqa: S106  (a token of text)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[ $A ]", special_tokens=[("[", 0), ("]", 1)])
    tokenizer.enable_padding(length=9)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def ids(answer) -> list[list[int]]:
    assert not isinstance(answer, Exception), answer
    return [tokens.ids for tokens in answer]


def test_texts_become_framed_tokens_and_keep_their_request(folder: Path):
    """Requests of one and of several texts get their own tokens back, with the frame; the file's padding is ignored."""
    codec = TextCodec(folder, 8)
    first, second = codec.encode([Texts([b"one", b""], False), Texts([b"two one"], True)])
    assert ids(first) == [[0, 3, 1], [0, 1]] and ids(second) == [[0, 4, 3, 1]]


def test_a_text_that_is_too_long_is_refused_or_cut(folder: Path):
    """Exactly max_len tokens pass; one more is refused with the numbers, or cut within its frame where asked."""
    codec = TextCodec(folder, 5)
    assert [len(t) for t in codec.encode([Texts([b"one one one"], False)])[0]] == [5]
    refused = codec.encode([Texts([b"one", b"one two one two"], False)])[0]
    assert isinstance(refused, InvalidArgument)
    assert str(refused) == "text_input[1] has 6 tokens; the model reads at most 5 (set truncate to cut)"
    assert ids(codec.encode([Texts([b"one two one two"], True)])[0]) == [[0, 3, 4, 3, 1]]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"one \xff", "text_input[1] is not valid UTF-8 (byte 4)"),
        ("half \ud800", "text_input[1] is not valid UTF-8 (byte 5)"),
        (b"x" * (MAX_BYTES + 1), f"text_input[1] has {MAX_BYTES + 1} bytes; at most {MAX_BYTES} are read"),
    ],
)
def test_a_bad_text_refuses_its_own_request(folder: Path, raw, said: str):
    """Bytes that are no text and texts beyond the limit name the text; the request beside it is answered."""
    bad, good = TextCodec(folder, 8).encode([Texts([b"one", raw], False), Texts([b"two"], False)])
    assert isinstance(bad, InvalidArgument) and str(bad) == said
    assert ids(good) == [[0, 4, 1]]


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"one": 0, "two": 1}, unk_token="[UNK]"),  # noqa: S106  (a token of text)
        models.WordPiece({"one": 0, "two": 1}, unk_token="[UNK]"),  # noqa: S106
        models.Unigram([("one", 0.0), ("two", 0.0), *((letter, -9.0) for letter in "onetw")]),
    ],
    ids=["WordLevel", "WordPiece", "Unigram"],
)
@pytest.mark.parametrize("truncate", [False, True])
def test_a_text_that_cannot_be_tokenised_refuses_its_own_request(tmp_path: Path, model: models.Model, truncate: bool):
    """A tokenizer without a token for the unknown refuses the word and names its text; neighbours are answered."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = [[b"one", b"two one"], [b"two", b"8"], [b"two"]]
    first, bad, last = TextCodec(tmp_path, 8).encode([Texts(each, truncate) for each in texts])
    assert ids(first) == [[0], [1, 0]] and ids(last) == [[1]]
    assert isinstance(bad, InvalidArgument) and str(bad).startswith("text_input[1] cannot be tokenised: ")


def test_a_text_without_tokens_is_refused(folder: Path):
    """Where a tokenizer frames nothing, an empty text has nothing to encode."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save(str(folder / "tokenizer.json"))
    answer = TextCodec(folder, 8).encode([Texts([b""], False)])[0]
    assert isinstance(answer, InvalidArgument) and str(answer) == "text_input[0] has no tokens"


def test_the_prompt_is_put_in_front(folder: Path):
    """A checkpoint's default prompt begins every text."""
    assert ids(TextCodec(folder, 8, "uno ").encode([Texts([b"one"], False)])[0]) == [[0, 5, 3, 1]]


def test_a_file_that_is_no_tokenizer_is_an_entry_error(tmp_path: Path):
    """The message names the file."""
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(EntryError, match="tokenizer.json is not a tokenizer"):
        TextCodec(tmp_path, 8)
