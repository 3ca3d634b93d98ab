"""How alerts fire, are told, repeated, resolved and forgotten, by clocks that the test turns."""

from __future__ import annotations

from copy import deepcopy

import pytest

from orchestrator.breaker import Breaker
from orchestrator.monitor import alertstate
from orchestrator.monitor.alerts import MAX_ALERTS, Acknowledged
from orchestrator.monitor.alertstate import AGAIN_S, KEPT_S, merge
from tests.orchestrator.monitor.looking import Looker

AWAY = {"redis_up": False}  # must hold for 10 s
LIMITS = {"limits_degraded": True}  # for 60 s
AUDIT = {"audit_up": False}  # at once


def test_it_fires_after_it_has_held_for_long_enough() -> None:
    """It is not in the book before, and `since` is when it began to hold."""
    looker = Looker()
    looker.looks(1000, 1050, **LIMITS)
    assert looker.document.alerts == {}
    looker.look(1060, **LIMITS)
    assert (looker.one().state, looker.one().since, looker.states) == ("firing", 1000, ["firing"])


def test_what_does_not_hold_in_between_begins_anew() -> None:
    """A condition that comes and goes within its time never fires; a short gap in what is known is no such thing."""
    looker = Looker()
    for at in range(1000, 1500, 20):
        looker.look(at, **LIMITS)
        looker.look(at + 10)
    assert looker.document.alerts == {}
    looker.look(2000, **LIMITS)
    looker.look(2030, limits_degraded=None)
    looker.look(2060, **LIMITS)
    assert looker.one().since == 2000


def test_null_does_not_fill_the_time() -> None:
    """What was null for longer than a while begins anew, and null alone never fires."""
    looker = Looker()
    looker.look(1000, **LIMITS)
    looker.looks(1010, 1200, limits_degraded=None)
    looker.look(1210, **LIMITS)
    assert looker.document.alerts == {}


def test_a_flickering_value_is_told_once() -> None:
    """It is resolved only after it has not held for a minute, so ten minutes of flicker are one message."""
    looker = Looker()
    for at in range(1000, 1600, 20):
        looker.look(at, **AUDIT)
        looker.look(at + 10)
    assert looker.states == ["firing"]
    looker.looks(1600, 1640)
    assert looker.one().firing
    looker.look(1650)  # a minute after the first look that found it well, at 1590
    assert (looker.one().state, looker.one().resolved, looker.states) == ("resolved", 1650, ["firing", "resolved"])


@pytest.mark.parametrize("every", [20, 110, 300])
def test_a_breaker_that_opens_again_and_again_is_told_once(every: int) -> None:
    """With a request that fails every five minutes or more often; where nobody asks any more it is resolved."""
    looker, breaker = Looker(repeat_s=1e6), Breaker(threshold=3, open_s=5.0)
    breaker.trip(1000)
    for at in range(1000, 5200, 10):
        if at <= 4600 and (at - 1000) % every == 0 and breaker.enter(at) == 0.0:
            breaker.fail(at)
        looker.look(at, models=[{"name": "demo", "breaker": breaker.state(at)}])
        assert at > 4600 or looker.states == ["firing"]
    assert looker.states == ["firing", "resolved"]
    assert 300 <= (looker.one().resolved or 0) - (breaker.until or 0) <= 310  # half open for five minutes


def test_a_breaker_that_closes_is_resolved_after_a_minute() -> None:
    """Having been half open before does not make that longer."""
    looker = Looker()
    looker.look(1000, models=[{"name": "demo", "breaker": "open"}])
    looker.looks(1010, 1050, models=[{"name": "demo", "breaker": "half_open"}])
    looker.looks(1060, 1070)
    assert looker.one().state == "resolved"


def test_unknown_is_not_well() -> None:
    """A firing alert whose figure is null stays, for hours, and the minute counts from when it is known to be well."""
    looker = Looker()
    looker.look(1000, **AUDIT)
    looker.looks(1010, 9000, audit_up=None, every=100)
    looker.looks(9010, 9060)
    assert looker.one().firing
    looker.look(9070)
    assert looker.one().state == "resolved"


def test_a_thing_that_is_gone_is_resolved() -> None:
    """The alert of a model that was unloaded ends; while the models are unknown it does not."""
    looker = Looker()
    looker.look(1000, models=[{"name": "demo", "fallback": True}])
    looker.looks(1010, 1500, models=None)
    assert looker.one().labels == {"model": "demo"} and looker.one().firing
    looker.looks(1510, 1570, models=[])
    assert looker.one().state == "resolved"


def test_it_is_kept_for_an_hour() -> None:
    """A resolved alert is in the book for an hour; another firing within it is a new message."""
    looker = Looker()
    looker.look(1000, **AUDIT)
    looker.looks(1010, 1070)
    looker.look(1070 + KEPT_S - 1)
    assert looker.one().state == "resolved"
    looker.look(1070 + KEPT_S)
    assert looker.document.alerts == {}
    looker.look(9000, **AUDIT)
    assert looker.states == ["firing", "resolved", "firing"]
    assert len({id for _, id in looker.sent}) == 3


def test_it_is_repeated_unless_somebody_looks_after_it() -> None:
    """Every `alert_repeat_s` it is told again; acknowledged it is not, until it is resolved, which is told."""
    looker = Looker(repeat_s=3600)
    looker.looks(1000, 1000 + 7300, every=100, **AUDIT)
    assert looker.states == ["firing"] * 3 and looker.one().message.repeats == 2
    looker.one().acknowledged = Acknowledged("ana", 9000)
    looker.looks(9000, 20_000, every=100, **AUDIT)
    assert looker.states == ["firing"] * 3
    looker.looks(20_100, 20_200)
    assert looker.states == ["firing"] * 3 + ["resolved"] and looker.one().acknowledged is None


def test_a_sender_that_gave_up_tries_again_later() -> None:
    """The newest message of an alert is sent again after some minutes, with the id it had."""
    looker = Looker(outcome="error")
    looker.look(1000, **AUDIT)
    looker.looks(1010, 1000 + AGAIN_S, **AUDIT)
    assert looker.states == ["firing"]
    looker.outcome = "ok"
    looker.looks(1020 + AGAIN_S, 3000, **AUDIT)
    assert looker.states == ["firing", "firing"] and len({id for _, id in looker.sent}) == 1


def test_a_message_on_its_way_is_not_sent_again() -> None:
    """While a sender has not said what became of it nobody sends it a second time."""
    looker = Looker(outcome="")
    looker.looks(1000, 2000, **AUDIT)
    assert looker.states == ["firing"]


def test_the_next_process_tells_what_was_not_told() -> None:
    """A process that died with a message on its way is taken over from once it is gone; what was told is not again."""
    for outcome, states in (("", ["firing"]), ("ok", [])):
        first = Looker(outcome=outcome)
        first.look(1000, **AUDIT)
        first.outcome = "ok"
        if outcome:
            first.look(1010, **AUDIT)
        second = Looker(document=first.document)
        second.looks(1020, 1060, **AUDIT)
        assert second.states == []
        second.looks(1070, 1300, **AUDIT)
        assert second.states == states
        assert [id for _, id in second.sent] == [id for _, id in first.sent][: len(states)]


def test_a_restart_does_not_resolve_what_still_holds() -> None:
    """The next process takes a firing alert as one that holds, until it has seen for a minute that it does not."""
    first = Looker()
    first.looks(1000, 1070, **LIMITS)
    second = Looker(document=first.document, repeat_s=1e6)
    second.look(9000, limits_degraded=None)
    second.looks(9010, 9060, **LIMITS)
    assert second.one().firing and second.states == []
    third = Looker(document=first.document, repeat_s=1e6)
    third.looks(20_000, 20_050)
    assert third.one().firing
    third.looks(20_060, 20_060)
    assert third.one().state == "resolved" and third.states == ["resolved"]


def test_two_gateways_with_one_home_tell_once() -> None:
    """Of two that look after one book the first tells; it is resolved once neither says that it holds."""
    one = Looker()
    other = Looker(document=one.document)
    for at in range(1000, 1100, 10):
        one.look(at, **AWAY)
        other.look(at + 5, **AWAY)
    assert (one.states, other.states) == (["firing"], [])
    for at in range(1100, 1200, 10):
        one.look(at)
        other.look(at + 5, **AWAY)
    assert one.one().firing and one.one().holders == [other.watch.instance]
    for at in range(1200, 1300, 10):
        one.look(at)
        other.look(at + 5)
    assert one.states + other.states == ["firing", "resolved"]


def test_a_gateway_that_is_gone_holds_nothing() -> None:
    """What another machine alone saw is resolved once that one has not looked for a minute."""
    one = Looker(host="a")
    other = Looker(host="b", document=one.document)
    other.look(1000, **AUDIT)
    one.looks(1010, 1060)
    assert one.one().firing and one.one().host == "b"
    one.look(1070)
    assert one.one().state == "resolved"


def test_the_book_is_bounded() -> None:
    """More alerts than it has room for are not taken; resolved ones make room, the oldest first."""
    looker = Looker(senders=())
    many = [{"name": f"m{number}", "fallback": True} for number in range(MAX_ALERTS + 50)]
    looker.look(1000, models=many)
    assert len(looker.document.alerts) == MAX_ALERTS
    looker.looks(1010, 1070, models=[])
    looker.looks(1080, 1080, models=many[-60:], **AUDIT)
    alerts = looker.document.alerts.values()
    assert len(alerts) == MAX_ALERTS and sum(alert.firing for alert in alerts) == 61


def test_a_new_sender_hears_of_what_fires_and_of_no_end_of_what_it_never_heard_of() -> None:
    """A sender that was configured later gets the alert that fires, but not the end of one before its time."""
    first = Looker(repeat_s=1e6)
    first.look(1000, models=[{"name": "m", "fallback": True}], **AUDIT)
    first.looks(1010, 1100, **AUDIT)
    assert sorted(alert.state for alert in first.document.alerts.values()) == ["firing", "resolved"]
    second = Looker(document=first.document, senders=("webhook", "slack"))
    second.looks(1200, 1300, **AUDIT)
    assert second.states == ["firing"]


def test_what_could_not_be_written_is_merged() -> None:
    """The memory's alerts count, and from the disk what others did meanwhile: an acknowledgement, another's alert."""
    one, other = Looker(host="a"), Looker(host="b")
    one.look(1000, **AUDIT)
    other.look(1000, **AUDIT)
    disk = deepcopy(one.document)
    disk.alerts |= other.document.alerts
    disk.alerts[one.one().id].acknowledged = Acknowledged("ana", 1001)
    one.one().value = 7.0
    merged = merge(disk, one.document)
    assert {alert.host for alert in merged.alerts.values()} == {"a", "b"}
    mine = merged.alerts[one.one().id]
    assert mine.value == 7.0 and mine.acknowledged is not None and mine.acknowledged.by == "ana"


@pytest.mark.parametrize(("interval_s", "clear", "absent"), [(10, 60, 60), (0.2, 1.2, 60), (3600, 60, 10_800)])
def test_the_times_follow_the_interval(interval_s: float, clear: float, absent: float) -> None:
    """With short intervals an alert is resolved after six looks; a gateway is gone after three at the least."""
    assert alertstate.clear_s(interval_s) == pytest.approx(clear)
    assert alertstate.absent_s(interval_s) == absent
