"""The scaling figures: their points, their rows, and an engine's step without a model."""

from __future__ import annotations

from pathlib import Path

from benchmarks import engine_report, scaling


def test_every_point_is_a_row_and_growth_is_that_of_the_queue() -> None:
    """Slots 1 to 64, context 128 to 1024, 1 to 10,000 waiting; only the longest queue against the shortest counts."""
    samples = {point: [0.002, 0.001 * (1 + (point[2] == 10_000)), 0.5] for point in scaling.points()}
    found = scaling.rows(samples)
    assert {row["x"] for row in found if row["figure"] == "slots"} == {1, 2, 4, 8, 16, 32, 64}
    assert {(row["rows"], row["x"]) for row in found if row["figure"] == "context"} >= {(1, 128), (16, 1024)}
    assert found[0]["ms_per_step"] == 2.0 and found[0]["tokens_per_s"] == 500.0
    assert scaling.growth(found) == 1.0


def test_an_engine_without_a_model_steps_and_ends() -> None:
    """What a step costs beside the model is measured with others waiting, and is some part of a second."""
    assert 0 < scaling.step_overhead_s(running=2, waiting=3) < 1


def test_the_result_says_whether_the_queue_is_flat(tmp_path: Path) -> None:
    """The page names it, and the drawing has all three figures."""
    samples = {point: [0.001 if point[2] < 10_000 else 0.01] for point in scaling.points()}
    found = scaling.rows(samples)
    result = {
        "date": "today", "commit": "x", "rounds": 1, "precision": "int8", "machine": engine_report.machine([1.0]),
        "rows": found, "queue_growth": scaling.growth(found), "queue_flat": False,
    }  # fmt: skip
    page = scaling.markdown(result)
    assert "10.00 times" in page and "NOT FLAT" in page and page.count("| 10,000 |") == 1
    assert scaling.plot(result, tmp_path / "x.png")
