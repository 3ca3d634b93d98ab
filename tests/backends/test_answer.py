import json

from backends.inflight.answer import LEAST_LOGPROB, Answer, Part
from backends.inflight.sampling import Pick
from backends.inflight.sequence import Delta

from .fakes import letters


def head(token: int, first: bool) -> str:
    return f'{{"id":{token},"first":{str(first).lower()},"logprob":'


def test_an_entry_says_what_was_picked_and_what_else_was_likely():
    """Each token with its log-probability, and the likeliest of its place; a token that cannot come has -9999."""
    answer = Answer(letters, head)
    answer.write([Delta(Pick(7, -0.5, ((7, -0.5), (8, float("-inf")))))])
    answer.write([Delta(Pick(9, -1.5), "stop")])
    part = answer.cut()
    first = {"id": 7, "first": True, "logprob": -0.5}
    other = {"id": 8, "first": True, "logprob": LEAST_LOGPROB}
    assert json.loads(part.logprobs) == [
        {**first, "top": [first, other]},
        {"id": 9, "first": False, "logprob": -1.5, "top": []},
    ]
    assert part.tokens == 2 and part.finish == "stop" and part.text == letters([7])
    assert answer.mean_logprob == -1.0


def test_what_was_cut_does_not_come_again():
    """Text, finish reason, counts and entries are those since the last cut; the echo stands in front of the first."""
    answer = Answer(letters, head)
    answer.echo = "so: "
    assert answer.cut() == Part() and not answer.has_news
    answer.write([Delta(Pick(1, -1.0), "length")])
    assert answer.has_news and answer.cut().text == "so: " + letters([1])
    assert answer.cut() == Part() and not answer.has_news
