"""What becomes of answers: figures of a run, rows, ratios within rounds, and the bars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import engine_report, figures
from benchmarks.contest import Outcome, Plan
from benchmarks.figures import Case, Samples
from benchmarks.workloads import WORKLOADS


def answer(number: int = 0, due: float = 0.0, first: float = 0.5, last: float = 2.0, count: int = 4) -> dict[str, Any]:
    return {
        "conversation": number, "turn": 0, "due_s": due, "sent_s": due, "first_s": first, "last_s": last,
        "ids": [*range(count)],
    }  # fmt: skip


def run(tokens_per_s: float, ms: float = 10.0) -> dict[str, float]:
    return {"tokens_per_s": tokens_per_s, "ms_per_token": ms, "ttft_s": 0.1, "ttft_p99_s": 0.1, "distinct": 0.5}


def filled(rates: dict[str, float]) -> Samples:
    """Three rounds of W with 16 clients on a machine that is half as fast in the second; keys: engine and precision."""
    samples = Samples()
    for name, rate in rates.items():
        for number, speed in enumerate((1.0, 0.5, 1.0)):
            samples.add(Case("W", *name.rsplit(" ", 1), 16), number, run(rate * speed))
    return samples


def test_a_run_has_its_figures() -> None:
    """tokens/s from the first due to the last token; a token's time without the first token; the first from due."""
    found = figures.of_run([answer(0, 0.0, 0.5, 2.0), answer(1, 1.0, 2.5, 4.0)])
    assert found["tokens_per_s"] == 2.0
    assert found["ms_per_token"] == 500.0
    assert found["ttft_s"] == 1.0
    assert "good" not in found
    with pytest.raises(ValueError, match="without answers"):
        figures.of_run([])


def test_goodput_counts_who_meets_both_limits() -> None:
    """A late first token and slow ones after it make an answer none that counts; its time still does."""
    good = answer(0, 0.0, 0.9, 1.05, count=3)
    late, slow = answer(1, 0.0, 1.1, 1.2, count=3), answer(2, 0.0, 0.5, 2.0, count=3)
    assert [figures.is_good(one) for one in (good, late, slow)] == [True, False, False]
    found = figures.of_run([good, late, slow], open_loop=True)
    assert found["good"] == pytest.approx(1 / 3)
    assert found["goodput_tokens_per_s"] == 1.5


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_a_value_with_enough_at_or_below_it(values: list[float], q: float) -> None:
    """Nearest rank: the least value that at least the part q of all are no more than."""
    found = figures.quantile(values, q)
    least = min(v for v in values if sum(x <= v for x in values) >= q * len(values) - 1e-9)
    assert found == least


def test_ratios_are_of_what_was_measured_in_the_same_round() -> None:
    """A round in which the machine was slow changes nothing, and one that a side lacks is left out."""
    samples = filled({"truthgpt int8": 300, "transformers fp32": 50})
    ours, theirs = (Case("W", engine, how, 16) for engine, how in (("truthgpt", "int8"), ("transformers", "fp32")))
    assert figures.ratio(samples, ours, theirs) == 6.0
    samples.add(ours, 3, run(1000))
    assert figures.ratio(samples, ours, theirs) == 6.0
    assert figures.ratio(samples, ours, Case("W", "nobody", "fp32", 16)) is None
    assert figures.ratios(samples) == {"W 16: truthgpt int8 / transformers fp32": 6.0}


def test_ratios_compare_weights_of_one_width() -> None:
    """8 bits with 8 bits, however they are computed; transformers with everything; nothing with other clients."""
    samples = filled(
        {
            "truthgpt int8": 300, "truthgpt fp32": 100, "openvino int8+bf16": 200, "openvino f32": 100,
            "llamacpp q8_0": 100, "transformers fp32": 50,
        }
    )  # fmt: skip
    assert set(figures.ratios(samples)) == {
        "W 16: truthgpt int8 / openvino int8+bf16", "W 16: truthgpt int8 / llamacpp q8_0",
        "W 16: truthgpt int8 / transformers fp32", "W 16: truthgpt fp32 / openvino f32",
        "W 16: truthgpt fp32 / transformers fp32",
    }  # fmt: skip
    assert [figures.width(name) for name in ("f32", "bf16", "int8+bf16", "q8_0", "int4")] == [32, 16, 8, 8, 4]


def test_the_bars_are_named_and_judged() -> None:
    """B1 at 6 times transformers, B2 against the faster of OpenVINO's settings with 8 bits, B4 at most so much over the
    floor, B5 against the bare loop; what was not measured is no bar.
    """
    samples = filled(
        {
            "truthgpt int8": 300, "truthgpt gateway int8": 270, "engine loop int8": 320, "transformers fp32": 40,
            "openvino int8+bf16": 250, "openvino int8+f32": 200,
        }
    )  # fmt: skip
    samples.add(Case("W", "truthgpt", "int8", 1), 0, run(100, ms=4.0))
    found = {(bar.bar, bar.what): bar for bar in figures.bars(samples, {"int8": 3.4})}
    assert {bar for bar, _ in found} == {"B1", "B2", "B4", "B5"}
    assert found["B1", "int8, C=16 / transformers fp32"].reached
    best = found["B2", "W, C=16, int8 / OpenVINO int8+bf16"]
    assert (best.figure, best.reached) == (1.2, True)
    floor = found["B4", "int8, C=1: a token / reading its weights (3.40 ms)"]
    assert (floor.figure, floor.at_most, floor.reached) == (1.176, True, True)
    assert not found["B5", "int8, C=16, through Triton and the gateway / bare engine loop"].reached
    assert found["B5", "int8, C=16, through Triton / bare engine loop"].reached


def test_agreement_counts_whole_answers() -> None:
    """An answer agrees when all of its tokens do."""
    reference = [answer(0), answer(1), answer(2)]
    given = [answer(1), {**answer(0), "ids": [0, 1, 2, 9]}, answer(2)]
    assert figures.agreement(given, reference) == (2, 3)


@pytest.fixture
def outcome() -> Outcome:
    samples = filled({"truthgpt int8": 300, "engine loop int8": 320, "transformers fp32": 40})
    made = Outcome(samples, bandwidth_gb_s=[20.0, 30.0])
    made.samples.add(Case("mixed", "truthgpt", "int8", 2), 0, {**run(100), "good": 0.5, "goodput_tokens_per_s": 60.0})
    made.samples.failed[Case("W", "llamacpp", "q8_0", 0)] = "it | ended\nwith 139"
    made.agreement["truthgpt fp32"] = (15, 16)
    return made


def test_a_result_is_written_whole(outcome: Outcome, tmp_path: Path) -> None:
    """JSON with machine, rows, ratios and bars, a page that names what was left out and why, a drawing, and nothing
    else in the folder; the last line of the output is one JSON object with the named ratios.
    """
    plan = Plan([WORKLOADS["W"], WORKLOADS["mixed"]], 3)
    found = engine_report.result(outcome, plan, {"int8": 123_500_000})
    path = tmp_path / "results" / "peers.json"
    engine_report.save(found, engine_report.markdown(found, "Beside others"), engine_report.plot, path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    page = path.with_suffix(".md").read_text()
    assert "| truthgpt | int8 | 16 | 300.0 |" in page and "left out: W llamacpp q8_0: it | ended with 139" in page
    assert "| truthgpt | int8 | 2 | 100.0 |" in page and "15 of 16 answers" in page
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in path.parent.iterdir()) == ["peers.json", "peers.md", "peers.png"]
    last = json.loads(engine_report.line(found))
    assert {"engine", "precision", "clients", "tokens_per_s", "ms_per_token"} <= set(last["rows"][0])
    assert last["machine"]["read_gb_s"] == 30.0
    assert any(name.startswith("B1 ") for name in last["ratios"])


def test_rows_are_medians_of_rounds() -> None:
    """The slow round counts as one of three, and the best is shown beside it."""
    (row,) = figures.rows(filled({"truthgpt int8": 300}))
    assert (row["tokens_per_s"], row["best_tokens_per_s"]) == (300.0, 300.0)
    assert row["tokens_per_s_all"] == [300.0, 150.0, 300.0]
