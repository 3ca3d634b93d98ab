"""The corpus: deterministic, complete, in two correct languages and apart from the held-out questions."""

import itertools
import random
from collections import Counter

import pytest

from demo.corpus import LANGUAGES, Topic, conversations, could_write, detect_language, load
from demo.evaluate import HELDOUT, Question, heldout, judge
from demo.grammar import normal, sample, tidy

TOPICS = [(code, topic) for code in LANGUAGES for topic in load(code).topics.values()]
each_topic = pytest.mark.parametrize(("code", "topic"), TOPICS, ids=[f"{c}-{t.name}" for c, t in TOPICS])


def test_the_same_seed_gives_the_same_conversations() -> None:
    """The corpus is reproducible, and another seed gives another one."""
    first, again, other = (list(itertools.islice(conversations(seed), 300)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_every_topic_is_drawn_in_both_languages() -> None:
    """In 6,000 conversations of 1 to 8 turns each topic of each language is asked at least ten times."""
    drawn = list(itertools.islice(conversations(3), 6000))
    seen = Counter((turn.language, turn.topic) for turns in drawn for turn in turns)
    assert all(seen[code, topic.name] >= 10 for code, topic in TOPICS)
    assert set(map(len, drawn)) == {1, 2, 3, 4, 5, 6, 8}


def test_the_languages_have_the_same_topics() -> None:
    """Nothing can be asked in one language only."""
    assert set(load("en").topics) == set(load("es").topics)


@each_topic
def test_an_answer_is_recognised_by_its_topic_alone(code: str, topic: Topic) -> None:
    """A topic's marker finds its own answers and no other topic's in that language, so a pass means the right topic."""
    for answer in topic.answers:
        assert [other.name for other in load(code).topics.values() if other.recognises(answer)] == [topic.name]
        assert detect_language(answer) == code


@each_topic
def test_answers_are_short(code: str, topic: Topic) -> None:
    """Answers have 6 to 40 words."""
    assert all(6 <= len(answer.split()) <= 40 for answer in topic.answers)


@each_topic
def test_templates_recognise_what_they_write(code: str, topic: Topic) -> None:
    """`could_write` finds a sample of every template, so its silence about the held-out questions means something."""
    rng = random.Random(f"{code}{topic.name}")
    for question in topic.questions:
        sentence = tidy(sample(question, rng))
        assert could_write(sentence), sentence
        assert could_write(sentence.upper().replace("¿", "").replace("?", "")), sentence


def test_no_template_can_write_a_heldout_question() -> None:
    """The held-out questions are outside the whole grammar, whatever case, accents, punctuation, opener or closer."""
    assert [(q.text, could_write(q.text)) for q in heldout() if could_write(q.text)] == []


def test_no_heldout_question_is_in_the_corpus_as_written() -> None:
    """Nor does one appear in the first 40,000 conversations, slips and dropped words included."""
    wanted = {normal(question.text) for question in heldout()}
    drawn = itertools.islice(conversations(20), 40_000)
    assert {normal(turn.question) for turns in drawn for turn in turns} & wanted == set()


def test_heldout_has_two_questions_a_topic_and_language() -> None:
    """200 distinct held-out questions, 100 a language, two for each of the 50 topics."""
    questions = heldout()
    assert len({normal(question.text) for question in questions}) == len(questions) == 200
    assert Counter((q.lang, q.topic) for q in questions) == {(code, topic.name): 2 for code, topic in TOPICS}
    assert HELDOUT.read_text(encoding="utf-8").isascii() is False  # Spanish kept its accents


def test_the_rule_refuses_wrong_topic_wrong_language_and_endless_answers() -> None:
    """The scoring rule can fail: only a finished answer of the right topic in the right language passes."""
    english, spanish = load("en").topics, load("es").topics
    question = Question("en", "license", "Is it free?")
    assert judge(question, english["license"].answers[0], finished=True)
    assert not judge(question, english["license"].answers[0], finished=False)
    assert not judge(question, english["ports"].answers[0], finished=True)
    assert not judge(question, spanish["license"].answers[0], finished=True)
    assert not judge(question, "", finished=True)


@pytest.mark.parametrize(
    ("text", "code"), [("Hi, how are you?", "en"), ("Hola, ¿cómo estás? Es muy tarde.", "es"), ("42", None)]
)
def test_language_detection(text: str, code: str | None) -> None:
    """Small words decide the language; a text without any has none."""
    assert detect_language(text) == code
