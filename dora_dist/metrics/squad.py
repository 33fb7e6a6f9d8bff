"""SQuAD's answers and metrics (Rajpurkar et al., arXiv 1606.05250 and 1806.03822): spans of a text, EM and F1."""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

LONGEST_ANSWER, CANDIDATES = 30, 20
"""Tokens of the longest answer; starts and ends that are tried per window."""


@dataclass(frozen=True)
class Question:
    """The text that holds the answer, and every answer that counts; none: it has no answer."""

    context: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Window:
    """A stretch of a question's text that the model saw: the characters of each token, None outside of the text."""

    question: int
    offsets: Sequence[tuple[int, int] | None]


def predict(questions: Sequence[Question], windows: Sequence[Window], logits: Tensor) -> list[str]:
    """The likeliest answer to each question; logits (windows, length, 2) of start and end, in any window order.

    Where some question has no answer (SQuAD 2.0), "" competes, with the score of token 0.
    """
    may_be_empty = any(not question.answers for question in questions)
    spans: dict[int, list[tuple[float, str]]] = defaultdict(list)
    nothing: dict[int, list[float]] = defaultdict(list)
    for window, scores in zip(windows, logits, strict=True):
        context = questions[window.question].context
        spans[window.question] += _spans(window, scores, context)
        nothing[window.question].append(float(scores[0].sum()))
    found = []
    for i in range(len(questions)):
        score, answer = max(spans[i], default=(float("-inf"), ""))
        # The least likely "no answer": one window with the answer in it is enough.
        found.append("" if may_be_empty and min(nothing[i], default=0.0) > score else answer)
    return found


def _spans(window: Window, scores: Tensor, context: str) -> list[tuple[float, str]]:
    starts, ends = (scores[: len(window.offsets), side] for side in (0, 1))
    count = min(CANDIDATES, len(window.offsets))
    found = []
    for first in starts.topk(count).indices.tolist():
        for last in ends.topk(count).indices.tolist():
            begin, end = window.offsets[first], window.offsets[last]
            if begin is not None and end is not None and first <= last < first + LONGEST_ANSWER:
                found.append((float(starts[first] + ends[last]), context[begin[0] : end[1]]))
    return found


def squad_metrics(questions: Sequence[Question], predicted: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 of words, each against the closest of a question's answers; means over questions, 0 to 1."""
    exact = f1 = 0.0
    for question, answer in zip(questions, predicted, strict=True):
        wanted = question.answers or ("",)
        exact += max(float(normalised(answer) == normalised(text)) for text in wanted)
        f1 += max(_f1(normalised(answer).split(), normalised(text).split()) for text in wanted)
    return {"exact_match": exact / len(questions), "f1": f1 / len(questions)}


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and repeated blanks: what the official comparison looks at."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))
