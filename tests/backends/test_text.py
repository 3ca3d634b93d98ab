from hypothesis import given
from hypothesis import strategies as st

from backends.inflight.text import Detokenizer, StopFilter


def bytes_decoder(ids):
    """A byte-level tokenizer in its smallest form: one token a byte."""
    return bytes(ids).decode("utf-8", "replace")


@given(st.text(max_size=40))
def test_pieces_join_to_the_text_and_no_character_is_split(text):
    """Over every script: each piece is whole characters and together they are the text."""
    detokenizer, pieces = Detokenizer(bytes_decoder), []
    for byte in text.encode():
        pieces.append(detokenizer.push(byte))
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=200),
    st.lists(st.integers(1, 6), min_size=1, max_size=40),
)
def test_tokens_that_end_inside_characters_do_not_break_them(text, sizes):
    """Byte-level vocabularies have tokens that end one character and begin the next: the text is whole all the same."""
    detokenizer, data, pieces, at = Detokenizer(byte_tokens_decoder), text.encode(), [], 0
    while at < len(data):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(detokenizer.push(data[at : at + size]))
        at += size
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == text


def test_a_text_whose_tokens_never_end_with_a_character_flows_and_stays_cheap():
    """Each token brings the character that it completes, and what is decoded again does not grow with the answer."""
    windows = []

    def decode(ids):
        windows.append(len(ids))
        return byte_tokens_decoder(ids)

    detokenizer = Detokenizer(decode)
    assert detokenizer.push(b"\xe3\x81") == ""
    assert [detokenizer.push(b"\xae\xe3\x81") for _ in range(1000)] == ["\u306e"] * 1000
    assert detokenizer.push(b"\xae") == "\u306e" and max(windows) < 100


def test_a_space_after_a_token_without_text_is_kept():
    """SentencePiece decoders strip the first space of what they are given; a skipped special token is no context."""

    def decode(ids):
        return "".join(ids).removeprefix(" ")

    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.push(token) for token in (" one", "", " two", "", "", " three")]
    assert pieces == ["one", "", " two", "", "", " three"]


def byte_tokens_decoder(ids):
    """A byte-level tokenizer: a token is some bytes."""
    return b"".join(ids).decode("utf-8", "replace")


@given(st.binary(max_size=60))
def test_invalid_utf8_is_never_held_back_for_long(data):
    """Bytes that are no UTF-8 come out as replacement characters after at most four tokens, and nothing is lost."""
    detokenizer, held, out = Detokenizer(bytes_decoder), 0, ""
    for byte in data:
        piece = detokenizer.push(byte)
        held = 0 if piece else held + 1
        assert held < 4
        out += piece
    out += detokenizer.flush()
    assert out.replace("\ufffd", "") == data.decode("utf-8", "replace").replace("\ufffd", "")


@given(
    st.text(alphabet="abc", max_size=60),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), max_size=60),
)
def test_a_stop_string_never_leaks_however_the_text_is_cut(text, stops, cuts):
    """What comes out is the text up to the first stop string to be completed, for any split into pieces."""
    stop_filter, out, at = StopFilter(stops), "", 0
    for size in [*cuts, len(text) + 1]:
        piece, at = text[at : at + size], at + size
        out += stop_filter.push(piece)
        shown = out
        assert not any(stop in shown for stop in stops)
        if stop_filter.stopped:
            break
    if not stop_filter.stopped:
        out += stop_filter.flush()
    found = [text.find(stop) for stop in stops if stop in text]
    assert stop_filter.stopped == bool(found)
    if found:
        assert text.startswith(out) and not any(stop in out for stop in stops)
    else:
        assert out == text


def test_a_partial_stop_string_is_shown_once_it_cannot_complete():
    """Text held back as a possible stop string comes out when the next text proves it is none."""
    stop_filter = StopFilter(["\nUser:"])
    assert stop_filter.push("hello\nUs") == "hello"
    assert stop_filter.push("eful") == "\nUseful"
    assert stop_filter.push("\nUser: x") == "" and stop_filter.stopped
