"""The models that are to be served: a file that is always whole, and a lock that one operator holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.local import modelset


def test_it_is_written_whole_and_read_in_order(tmp_path: Path) -> None:
    """What is not there, or is none of ours, is empty."""
    assert modelset.read(tmp_path) == {}
    modelset.write(tmp_path, {"b": 2, "a": 1})
    assert list(modelset.read(tmp_path).items()) == [("b", 2), ("a", 1)]
    for text in ("", "[]", '{"models": {"a": "x"}}', '{"models": 1}'):
        modelset.path(tmp_path).write_text(text)
        assert modelset.read(tmp_path) == {}
    modelset.clear(tmp_path)
    modelset.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_operator_at_a_time(tmp_path: Path) -> None:
    """The second is refused after its wait and told who works on what; the supervisor sees it, too."""
    assert modelset.changed_now(tmp_path) is None
    with modelset.changing(tmp_path, "demo", 0.0):
        assert modelset.changed_now(tmp_path) == "demo"
        with (
            pytest.raises(modelset.Busy, match=r"working on demo \(process \d+\)"),
            modelset.changing(tmp_path, "b", 0.2),
        ):
            raise AssertionError("two at once")
    assert modelset.changed_now(tmp_path) is None
    with modelset.changing(tmp_path, "b", 0.0):
        assert modelset.changed_now(tmp_path) == "b"


def test_an_operator_and_the_supervisor_do_not_work_on_one_model_at_once(tmp_path: Path) -> None:
    """Nor on a model and its graph; what the supervisor mends is none that an operator changes, and holds up no other
    model.
    """
    with modelset.mending(tmp_path, "mood--engine"):
        assert modelset.changed_now(tmp_path) is None
        with pytest.raises(modelset.Busy, match=r"the supervisor is working on mood--engine \(process \d+\)"):
            with modelset.changing(tmp_path, "mood", 0.2):
                raise AssertionError("two at once")
        with modelset.changing(tmp_path, "demo", 0.0), pytest.raises(modelset.Busy, match="working on demo"):
            with modelset.mending(tmp_path, "demo"):
                raise AssertionError("two at once")
    with modelset.changing(tmp_path, "mood", 0.0), modelset.mending(tmp_path, "demo"):
        pass


def test_a_model_is_mended_on_several_servers_at_once(tmp_path: Path) -> None:
    """An operator waits until the last one is done."""
    with modelset.mending(tmp_path, "demo"):
        with modelset.mending(tmp_path, "demo"):
            pass
        with pytest.raises(modelset.Busy, match="the supervisor is"), modelset.changing(tmp_path, "demo", 0.0):
            raise AssertionError("two at once")
    with modelset.changing(tmp_path, "demo", 0.0):
        pass
