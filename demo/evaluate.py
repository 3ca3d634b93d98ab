"""Measure the demo model on the held-out questions: ``python -m demo.evaluate`` (exit code 1 under the bar).

A question passes if the greedy answer carries the marking words of its topic (`marker` in `demo/data`), is in the
question's language and ends by itself. `demo/heldout.jsonl` was written by hand apart from the corpus.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.corpus import LANGUAGES, detect_language, load

HELDOUT = Path(__file__).parent / "heldout.jsonl"
MODEL_DIR = Path(__file__).parent / "model"
BAR = 0.8


@dataclass(frozen=True)
class Question:
    """One held-out question and the topic that its answer must have."""

    lang: str
    topic: str
    text: str


@dataclass(frozen=True)
class Result:
    """One answer and whether it passes."""

    question: Question
    answer: str
    ok: bool


def heldout(path: Path = HELDOUT) -> list[Question]:
    """Return the held-out questions. Raises OSError or json.JSONDecodeError."""
    return [Question(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def judge(question: Question, answer: str, *, finished: bool) -> bool:
    """Return whether `answer` has the right topic and language and came to its end."""
    right_topic = load(question.lang).topics[question.topic].recognises(answer)
    return finished and right_topic and detect_language(answer) == question.lang


class Chat:
    """The checkpoint in `folder`, in fp32 on the CPU, answering batches greedily."""

    def __init__(self, folder: Path = MODEL_DIR) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, chats: list[list[str]], max_new_tokens: int = 80) -> list[tuple[str, bool]]:
        """Return (text, ended by itself) for every chat, a list of messages of which the last is the user's."""
        prompts = [
            self.tokenizer.apply_chat_template([{"role": "user", "content": text} for text in chat], tokenize=False)
            for chat in chats
        ]
        encoded = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        size = encoded["input_ids"].shape[1]
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        eos = self.tokenizer.eos_token_id
        answers = []
        for row in output[:, size:].tolist():
            finished = eos in row
            answers.append((self.tokenizer.decode(row[: row.index(eos)] if finished else row), finished))
        return answers


def evaluate(chat: Chat, questions: list[Question], before: list[str] | None = None) -> list[Result]:
    """Return one result a question; `before` holds earlier messages of the conversation (none: a first turn)."""
    results = []
    for start in range(0, len(questions), 100):
        some = questions[start : start + 100]
        answers = chat.answer([[*(before or []), question.text] for question in some])
        for question, (text, finished) in zip(some, answers, strict=True):
            results.append(Result(question, text, judge(question, text, finished=finished)))
    return results


def score(results: list[Result]) -> float:
    """Return the share of results that pass."""
    return sum(result.ok for result in results) / len(results)


def later_turn(chat: Chat, questions: list[Question]) -> float:
    """Return the score of the same questions asked as the third turn of a conversation in their language."""
    results = []
    for code in LANGUAGES:
        topics = load(code).topics
        first = {"en": "Hi, how are you?", "es": "Hola, ¿cómo estás?"}[code]
        second = {"en": "What can you do?", "es": "¿Qué puedes hacer?"}[code]
        before = [first, topics["how_are_you"].answers[0], second, topics["capabilities"].answers[0]]
        results += evaluate(chat, [q for q in questions if q.lang == code], before)
    return score(results)


def table(results: list[Result]) -> str:
    """Return the passes per topic and language as text."""
    cells: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        cells[result.question.topic][result.question.lang].append(result.ok)
    lines = [f"{'topic':<20}" + "".join(f"{code:>8}" for code in LANGUAGES)]
    for topic, row in cells.items():
        lines.append(f"{topic:<20}" + "".join(f"{sum(row[code])}/{len(row[code])}".rjust(8) for code in LANGUAGES))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate and print; return 0 if the score reaches the bar, else 1."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description="Score the demo model.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="folder of the checkpoint (default: demo/model)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--failures", action="store_true", help="print the questions that fail, with their answers")
    chosen = parser.parse_args(arguments)
    chat = Chat(chosen.model)
    questions = heldout()
    results = evaluate(chat, questions)
    by_language = {code: score([r for r in results if r.question.lang == code]) for code in LANGUAGES}
    total, later = score(results), later_turn(chat, questions)
    if chosen.json:
        document = {"score": total, **by_language, "third_turn": later, "bar": BAR}
        print(json.dumps({**document, "results": [asdict(r) for r in results]}, ensure_ascii=False, indent=1))
        return 0 if total >= BAR else 1
    print(table(results))
    if chosen.failures:
        for result in results:
            if not result.ok:
                print(f"{result.question.lang} {result.question.topic}: {result.question.text} -> {result.answer}")
    shares = ", ".join(f"{code} {share:.1%}" for code, share in by_language.items())
    print(f"held-out: {total:.1%} of {len(results)} ({shares}); as a third turn {later:.1%}; bar {BAR:.0%}")
    return 0 if total >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
