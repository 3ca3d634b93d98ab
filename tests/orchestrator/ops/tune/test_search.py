"""The candidates: which values there are, and in which order they come."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import models
from orchestrator.models import Entry
from orchestrator.ops.tune.errors import TuneError
from orchestrator.ops.tune.figures import Bounds, Figures, Workload
from orchestrator.ops.tune.knobs import Knob, Room, changes, key, knobs_of, point_of
from orchestrator.ops.tune.search import Search
from tests.counting import write_entry
from tests.encoding import EMBEDS, write_encoder

ROOM = Room(4, 8 << 30)
LOAD = Workload(8, 128, 64)
KNOBS = (Knob("slots", ("parameters", "slots"), ("2", "4", "8", "16"), "4"),
         Knob("threads", ("parameters", "threads"), ("0", "1", "2"), "0"))  # fmt: skip


def decoder(tmp_path: Path, cache: int = 0, **parameters: object) -> Entry:
    """An entry whose slots take so many bytes each."""
    folder = write_entry(tmp_path, max_len=512, **parameters)
    path = folder / "1" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["graph"] |= {"layers": 1, "kv_heads": 1, "head_dim": cache // (2 * 4 * 512), "max_len": 512}
    path.write_text(json.dumps(manifest))
    return models.get(tmp_path, "counting")


def values(entry: Entry, load: Workload = LOAD, room: Room = ROOM) -> dict[str, tuple[str, ...]]:
    source = entry.config_path.read_text()
    return {knob.name: knob.values for knob in knobs_of(entry, entry.newest, source, load, room)}


def test_a_decoder_has_slots_chunk_and_threads(tmp_path: Path) -> None:
    """As many slots as clients can use, chunks that a prompt has, threads that there are cores, and what is set now."""
    found = values(decoder(tmp_path, slots=5, threads=3))
    assert found == {
        "slots": ("2", "4", "5", "8"), "prefill_chunk": ("16", "32", "64", "128", "256", "512"),
        "threads": ("0", "1", "2", "3", "4"),
    }  # fmt: skip
    assert values(decoder(tmp_path / "b", slots=4, prefill_chunk=32))["prefill_chunk"] == ("16", "32")


def test_slots_that_do_not_fit_are_not_tried(tmp_path: Path) -> None:
    """More caches than half the free memory has room for; fewer slots than now always fit."""
    entry = decoder(tmp_path, cache=1 << 30, slots=4)
    assert values(entry, room=Room(4, 7 << 30))["slots"] == ("2", "4")
    assert values(entry, room=Room(4, 8 << 30))["slots"] == ("2", "4", "8")


def test_an_encoder_has_what_its_batches_are_made_by(tmp_path: Path) -> None:
    """Instances, threads, tokens of a run, delay and sizes; none by which a request is refused that is not now."""
    write_encoder(tmp_path, "embedder", EMBEDS)
    entry = models.get(tmp_path, "embedder")
    source = entry.config_path.read_text().replace('"python"', '"encoder"')
    found = {k.name: k for k in knobs_of(entry, entry.newest, source, Workload(200, 16, 0), ROOM)}
    names = {"instances", "threads", "max_tokens_per_batch", "queue_delay_us", "max_batch_size", "preferred"}
    assert set(found) == names
    assert found["max_batch_size"].values == ("64", "128", "256") and found["queue_delay_us"].current == "1000"
    assert found["max_tokens_per_batch"].values == ("512", "1024", "2048", "4096", "16384")
    assert found["preferred"].values == ("8,16,32,64", "64")
    few = {knob.name for knob in knobs_of(entry, entry.newest, source, Workload(8, 16, 0), ROOM)}
    assert few == names - {"max_batch_size"}, "eight clients never fill a larger batch"
    manifest = {"served_by": {"name": "e", "version": 1, "manifest_sha256": "0"}}
    native = replace(entry.newest, manifest={**(entry.newest.manifest or {}), **manifest})
    names = {knob.name for knob in knobs_of(entry, native, source, Workload(200, 16, 0), ROOM)}
    assert names == {"instances", "queue_delay_us", "preferred"}, "the graph is another's, and so is its size"


@pytest.mark.parametrize(("load", "said"), [
    (Workload(8, 500, 64), "takes 512 tokens in all"), (Workload(8, 128, 0), "output tokens"),
])  # fmt: skip
def test_a_load_that_the_model_cannot_bear_is_refused(tmp_path: Path, load: Workload, said: str) -> None:
    """Before anything is started, with the limit."""
    with pytest.raises(TuneError, match=said):
        values(decoder(tmp_path), load)


def test_entries_that_cannot_be_tuned_are_refused(tmp_path: Path) -> None:
    """Another backend, a graph that belongs to a model, engines that are built for their slots."""
    entry = decoder(tmp_path)
    source = entry.config_path.read_text()
    with pytest.raises(TuneError, match="backend 'python'"):
        knobs_of(entry, entry.newest, source.replace('"inflight"', '"python"'), LOAD, ROOM)
    for facts, said in (({"graph_only": True}, "graph of another"), ({"target": "tensorrt"}, "TensorRT engines")):
        with pytest.raises(TuneError, match=said):
            knobs_of(entry, replace(entry.newest, manifest=facts), source, LOAD, ROOM)
    with pytest.raises(TuneError, match="cannot be read"):
        knobs_of(entry, entry.newest, "parameters {", LOAD, ROOM)


def test_points_and_changes() -> None:
    """Only what differs from what is set is written."""
    assert point_of(KNOBS) == {"slots": "4", "threads": "0"}
    assert changes(KNOBS, {"slots": "8", "threads": "0"}) == {("parameters", "slots"): "8"}


def speed(point: dict[str, str]) -> Figures:
    """Best with all slots and one thread."""
    return Figures(float(point["slots"]) * (2 if point["threads"] == "1" else 1), 1 + int(point["slots"]) / 10)


def test_every_point_comes_once_and_the_first_ones_first() -> None:
    """The given points, then the others, until there are none; what was skipped or is no point never comes."""
    first = [{"slots": "16", "threads": "1"}, {"slots": "3", "threads": "1"}, {"slots": "2", "threads": "0"}]
    search = Search(KNOBS, Bounds(latency_s=2), 1)
    search.begin_with(first, 2)
    search.learn({"slots": "3", "threads": "9"}, Figures(1, 1))
    search.learn({"slots": "4", "threads": "0"}, Figures(4, 1))
    search.skip({"slots": "4", "threads": "0"})
    seen = []
    while (point := search.next()) is not None:
        seen.append(point)
        search.tell(point, None if point["threads"] == "2" else speed(point))
    assert seen[:2] == [first[0], first[2]]
    assert len({key(point) for point in seen}) == len(seen) == search.size - 1
    assert {"slots": "4", "threads": "0"} not in seen


def test_the_search_is_repeatable_and_finds_what_is_good() -> None:
    """The same seed gives the same candidates; most of them are good ones where only a few can be tried."""
    numbers = tuple(str(n) for n in range(30))
    knobs = (Knob("a", ("parameters", "a"), numbers, "0"), Knob("b", ("parameters", "b"), numbers, "0"))

    def tried(seed: int) -> list[tuple[int, int]]:
        search, found = Search(knobs, Bounds(latency_s=25), seed, enough_s=15), []
        for _ in range(40):
            point = search.next()
            assert point is not None
            a, b = int(point["a"]), int(point["b"])
            search.tell(point, Figures(100 + a - abs(b - 15), 1 + a))
            found.append((a, b))
        return found

    assert tried(3) == tried(3) != tried(4)
    later = [100 + a - abs(b - 15) for a, b in tried(3)[20:] if a < 25]
    assert len(later) > 10 and sum(later) / len(later) > 109, "of at most 124; the mean of all is 104.5"
