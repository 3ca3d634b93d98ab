from hypothesis import given
from hypothesis import strategies as st

from orchestrator.local.healing import PATIENCE_S, SUSPECT_S, Action, Evidence, backoff_s, decide

evidences = st.builds(
    Evidence,
    failing_s=st.floats(0, 100),
    stub_runs=st.booleans(),
    server_runs=st.booleans(),
    server_answers=st.booleans(),
    pending=st.booleans(),
)


@given(evidences)
def test_nothing_is_done_on_a_moments_silence(evidence: Evidence):
    """Below the suspicion threshold no action is taken, whatever else is seen."""
    if evidence.failing_s < SUSPECT_S:
        assert decide(evidence) is Action.WAIT


@given(evidences)
def test_a_live_server_that_answers_is_never_restarted(evidence: Evidence):
    """A restart ends the streams of every model, so it needs a dead, stopped or mute server."""
    if decide(evidence) is Action.RESTART:
        assert not evidence.server_runs or not evidence.server_answers


@given(evidences)
def test_a_failing_model_is_always_mended_in_the_end(evidence: Evidence):
    """After the patience has run out and no answer is under way, some action is taken on any evidence."""
    if evidence.failing_s >= PATIENCE_S and not evidence.pending:
        assert decide(evidence) is not Action.WAIT


def test_a_dead_stub_is_reloaded_at_once_and_a_slow_one_is_waited_for():
    """Proof of a dead process is acted on; a slow model gets its time."""
    assert decide(Evidence(1.1, stub_runs=False, server_runs=True, server_answers=True)) is Action.RELOAD
    assert decide(Evidence(1.1, stub_runs=True, server_runs=True, server_answers=True)) is Action.WAIT
    assert decide(Evidence(1.1, stub_runs=False, server_runs=False, server_answers=False)) is Action.RESTART


@given(evidences)
def test_while_an_answer_is_under_way_only_a_dead_process_counts(evidence: Evidence):
    """An encoder in a long batch is left alone for as long as the batch may take."""
    if evidence.pending and evidence.stub_runs and evidence.server_runs:
        assert decide(evidence) is Action.WAIT
    assert decide(Evidence(2.0, False, True, True, pending=True)) is Action.RELOAD
    assert decide(Evidence(2.0, False, False, True, pending=True)) is Action.RESTART


def test_backoff_starts_at_nothing_and_is_bounded():
    """The first mending is immediate, repeated ones wait longer, none longer than 4 s."""
    pauses = [backoff_s(n) for n in range(1, 50)]
    assert pauses[0] == 0 and pauses == sorted(pauses) and max(pauses) == 4.0
