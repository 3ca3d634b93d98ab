import numpy as np
import pytest

from backends.encoder.answer import best_labels, gathered, scores
from backends.inflight.errors import Internal, InvalidArgument, Unavailable

ROW = np.array([1.0, 2.0], np.float32)


def test_rows_are_stacked():
    """Good rows become one float32 matrix."""
    rows = gathered([ROW, ROW + 1], 2)
    assert isinstance(rows, np.ndarray) and rows.dtype == np.float32 and rows.tolist() == [[1, 2], [2, 3]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_an_error(bad: float):
    """NaN and infinity name their text and never become a score."""
    answer = gathered([ROW, np.array([0.5, bad], np.float32)], 2)
    assert isinstance(answer, Internal) and "text_input[1]" in str(answer) and "not finite" in str(answer)


def test_a_failed_run_and_a_wrong_shape_are_errors():
    """What a run raised is told, an engine's own error kept, and rows of another width are refused."""
    assert "ValueError: broken" in str(gathered([ROW, ValueError("broken")], 2))
    mine = Unavailable("closing")
    assert gathered([mine], 2) is mine
    assert "not 3" in str(gathered([ROW], 3))


def test_a_token_beyond_the_table_is_the_texts_fault():
    """It is refused by the text's place, whether the session says so or an engine in front of it."""
    said = "INVALID_ARGUMENT : ... indices element out of data bounds, idx=200 must be within [-100,99]"
    for error in (ValueError(said), Internal(f"mood--engine failed: {said}")):
        answer = gathered([ROW, error], 2)
        assert isinstance(answer, InvalidArgument) and str(answer).startswith("text_input[1] has a token ")


def test_scores_by_problem():
    """Softmax sums to 1, sigmoid is label by label, regression is as it is; extreme logits stay finite."""
    logits = np.array([[1000.0, -1000.0], [0.0, 0.0]], np.float32)
    assert scores(logits, "single_label").tolist() == [[1, 0], [0.5, 0.5]]
    assert scores(logits, "multi_label").tolist() == [[1, pytest.approx(0)], [0.5, 0.5]]
    assert scores(logits, "regression") is logits
    assert scores(logits, "single_label").dtype == np.float32 == scores(logits, "multi_label").dtype


def test_the_best_label_is_the_highest_score():
    """One label a row."""
    assert best_labels(np.array([[0.1, 0.9], [0.8, 0.2]]), ("bad", "good")) == ["good", "bad"]
