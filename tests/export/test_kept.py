"""What an export keeps of the config.pbtxt that it takes the place of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export import kept
from export.encoder_config import EncoderServing, encoder_pbtxt
from export.manifest import Serving, config_pbtxt


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "m").mkdir(exist_ok=True)
    (tmp_path / "m" / "config.pbtxt").write_text(text, encoding="utf-8")
    return tmp_path


@given(st.integers(1, 1024), st.integers(1, 8192), st.integers(0, 1024))
def test_a_decoder_keeps_what_was_tuned(
    tmp_path_factory: pytest.TempPathFactory, slots: int, chunk: int, threads: int
) -> None:
    """Slots, chunk and threads of any former file of ours are those of the next version, and that is said."""
    former = Serving(slots, chunk, threads=threads)
    root = written(tmp_path_factory.mktemp("kept"), config_pbtxt("m", "fp32", 64, True, former))
    serving, told = kept.decoder(root, "m", Serving(), ())
    assert serving == former and bool(told) == (former != Serving())
    assert config_pbtxt("m", "fp32", 64, True, serving) == (root / "m" / "config.pbtxt").read_text()


def test_an_encoder_keeps_what_was_tuned(tmp_path: Path) -> None:
    """Everything that can be tuned of an encoder, and of one whose graph runs elsewhere all but the size of a batch."""
    former = EncoderServing(256, 4096, 1, 4, 500, 128, (128,))
    root = written(
        tmp_path, encoder_pbtxt("m", "embeddings", 8, {"max_tokens_per_batch": "4096", "threads": "1"}, former)
    )
    serving, told = kept.encoder(root, "m", EncoderServing(), (), native=False)
    assert serving == former
    assert told == ("kept from the former config.pbtxt: max_tokens_per_batch 4096, threads 1, instances 4, "
                    "queue_delay_us 500, max_texts 128, preferred 128")  # fmt: skip
    native = kept.encoder(root, "m", EncoderServing(), (), native=True)[0]
    assert native.max_texts == 64 and native.preferred == EncoderServing().preferred and native.queue_delay_us == 500


def test_a_first_or_unchanged_file_keeps_nothing(tmp_path: Path) -> None:
    """Without a former file, or with one that has the usual values, nothing is said."""
    assert kept.decoder(tmp_path, "m", Serving(), ()) == (Serving(), "")
    parameters = {"max_tokens_per_batch": "16384", "threads": "0"}
    for native in (False, True):
        root = written(tmp_path, encoder_pbtxt("m", "embeddings", 8, parameters, EncoderServing(), native))
        assert kept.encoder(root, "m", EncoderServing(), (), native) == (EncoderServing(), "")


def test_what_the_command_says_wins(tmp_path: Path) -> None:
    """A flag, also one with the usual value, and options that differ from the usual ones are not overruled."""
    root = written(tmp_path, config_pbtxt("m", "fp32", 64, True, Serving(32, 64, threads=2)))
    assert kept.decoder(root, "m", Serving(), ("slots",))[0] == Serving(16, 64, threads=2)
    assert kept.decoder(root, "m", Serving(slots=3), ())[0] == Serving(3, 64, threads=2)


@pytest.mark.parametrize("text", [
    "backend: \"encoder\" parameters { key: \"slots\" value: { string_value: \"32\" } }",
    '# backend: "inflight"\nparameters { key: "slots" value: { string_value: "32" } }',
    'backend: "inflight" # parameters { key: "slots" value: { string_value: "32" } }',
    'backend: "inflight" parameters { key: "slots" value: { string_value: "2000" } }',
    "\x00\x01 no configuration at all {{{",
])  # fmt: skip
def test_another_models_or_a_senseless_file_keeps_nothing(tmp_path: Path, text: str) -> None:
    """Another backend's file, comments, values out of range and garbage are as if they were not there."""
    assert kept.decoder(written(tmp_path, text), "m", Serving(), ()) == (Serving(), "")


def test_files_written_by_hand_are_read(tmp_path: Path) -> None:
    """The spellings that people use: no colon before a message, commas, several lines."""
    text = 'backend: "inflight"\nparameters [ {\n  key: "slots",\n  value { string_value: "8" }\n} ] # slots: eight'
    assert kept.decoder(written(tmp_path, text), "m", Serving(), ())[0] == replace(Serving(), slots=8)
