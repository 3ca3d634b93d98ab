import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from backends.inflight.pieces import BYTES, Pieces

SPECIAL = "<|end|>"


def byte_level() -> Tokenizer:
    """One token a byte, a few longer ones that begin or end inside a character, and added ones."""
    letters = {byte: character for character, byte in BYTES.items()}
    longer = ["".join(letters[b] for b in part) for part in (b" hola", b"\xe3\x81", b"\x82\xe3", b"\xbf")]
    names = dict.fromkeys([*sorted(BYTES), *longer])
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([SPECIAL])
    tokenizer.add_tokens([AddedToken("dos espacios", normalized=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: words with a mark for the space, and a token for each byte that no word has."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581hola", "\u2581", "s", "\u2581mundo"]
    tokenizer = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [], unk_token=names[0], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([SPECIAL])
    return tokenizer


def word_piece() -> Tokenizer:
    names = ["[UNK]", "play", "##ing", "ball"]
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([SPECIAL])
    return tokenizer


def words() -> Tokenizer:
    names = ["one", "two"]
    return Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))


BYTE_LEVEL = byte_level()
PIECE = Pieces(BYTE_LEVEL).piece


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1).filter(lambda i: i != BYTE_LEVEL.token_to_id(SPECIAL))))
def test_the_bytes_of_a_byte_level_answer_join_to_its_text(ids):
    """Also where a token is a part of a character, or ends one and begins the next."""
    data = b"".join(PIECE(token, i == 0)[1] for i, token in enumerate(ids))
    assert data.decode("utf-8", "replace") == BYTE_LEVEL.decode(ids)


def test_a_part_of_a_character_has_its_true_bytes():
    """The text shows what UTF-8 makes of them alone."""
    letters = {byte: character for character, byte in BYTES.items()}
    token = BYTE_LEVEL.token_to_id(letters[0xE3] + letters[0x81])
    assert PIECE(token, False) == ("\ufffd", b"\xe3\x81")


@pytest.mark.parametrize(
    ("tokenizer", "names", "expected"),
    [
        (byte_fallback(), ["\u2581hola", "s", "\u2581mundo", "\u2581"], ["hola", "s", " mundo", " "]),
        (word_piece(), ["play", "##ing", "ball"], ["play", "ing", " ball"]),
        (words(), ["two", "one", "one"], ["two", " one", " one"]),
    ],
)
def test_the_texts_of_other_tokenizers_join_to_the_answer(tokenizer: Tokenizer, names: list[str], expected: list[str]):
    """A word that begins the answer has no space in front, one behind others has what the tokenizer puts there."""
    ids = [tokenizer.token_to_id(name) for name in names]
    said = [Pieces(tokenizer).piece(token, i == 0) for i, token in enumerate(ids)]
    assert [text for text, _ in said] == expected and [data for _, data in said] == [t.encode() for t in expected]
    assert "".join(expected) == tokenizer.decode(ids)


def test_a_tokens_json_needs_only_its_log_probability():
    """The part of an entry that does not change is made once."""
    token = BYTE_LEVEL.token_to_id(BYTE_LEVEL.encode('"').tokens[0])
    head = Pieces(BYTE_LEVEL).head(token, False)
    assert json.loads(f"{head}-0.5}}") == {"id": token, "token": '"', "bytes": [34], "logprob": -0.5}


def test_a_byte_that_no_word_has_is_that_byte():
    """SentencePiece's byte fallback: é comes as two tokens, each with its own byte."""
    tokenizer = byte_fallback()
    piece = Pieces(tokenizer).piece
    said = [piece(tokenizer.token_to_id(name), False) for name in ("<0xC3>", "<0xA9>")]
    assert [data for _, data in said] == [b"\xc3", b"\xa9"] and {text for text, _ in said} == {"\ufffd"}


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback(), word_piece()])
def test_a_special_token_is_its_name_and_an_id_without_token_is_empty(tokenizer: Tokenizer):
    """An end token has no text in the answer, yet a reader of log-probabilities has to see it."""
    piece = Pieces(tokenizer).piece
    assert piece(tokenizer.token_to_id(SPECIAL), False) == (SPECIAL, SPECIAL.encode())
    assert piece(tokenizer.get_vocab_size() + 7, False) == ("", b"")
