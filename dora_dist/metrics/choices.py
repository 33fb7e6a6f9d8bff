"""Answers out of a few: the letter of an option, or yes and no; read from generated text."""

import re
import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase


def chosen(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a generated text means, None if it means none.

    In this order: a letter alone, the very text of an option, a letter in front ("B. a dog", "(B) a dog"), and "the
    answer is B". "A" before a word in lower case is an article.
    """
    text, letters = text.strip(), LETTERS[: len(options)]
    if alone := re.fullmatch(rf"\(?([{letters}])[).:]*", text, re.IGNORECASE):
        return alone[1].upper()
    plain = [_plain(option) for option in options]
    if plain.count(_plain(text)) == 1:
        return letters[plain.index(_plain(text))]
    marked = re.match(rf"\(([{letters}])\)|([{letters}])[).:](?:\s|$)", text)
    said = re.search(rf"\b(?i:answer|option)(?i:\s+is)?:?\s+\(?(?!A\s+[a-z])([{letters}])\b(?!')", text)
    found = marked or said
    return next((letter for letter in found.groups() if letter), None) if found else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def chosen_option(text: str, options: Sequence[str]) -> int | None:
    """The position from 0 that a generated text means: a number alone ("a1", "1", "(1)"), the very text of one option,
    a number in front, in this order.
    """
    text, numbers = text.strip(), [str(number) for number in range(len(options))]
    if (alone := re.fullmatch(r"\(?a?(\d+)\)?", text)) and alone[1] in numbers:
        return numbers.index(alone[1])
    plain = [_plain(option) for option in options]
    if plain.count(_plain(text)) == 1:
        return plain.index(_plain(text))
    marked = re.match(r"(?:a(\d+):|\(?(\d+)\)?)\s", text)
    said = marked and (marked[1] or marked[2])
    return numbers.index(said) if said in numbers else None


def choice_metrics(found: Sequence[str | None], right: Sequence[str]) -> dict[str, float]:
    """Accuracy of the letters found; None, no letter found, counts as wrong and is counted in "without_answer"."""
    correct = sum(letter == wanted for letter, wanted in zip(found, right, strict=True))
    return {"accuracy": correct / len(right), "correct": correct, "without_answer": list(found).count(None)}


def says_yes(text: str) -> bool:
    """How POPE reads an answer (Li et al., arXiv 2305.10355): yes, unless its first sentence has "no" or "not"."""
    words = text.partition(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(words)


def yes_no_metrics(said: Sequence[bool], right: Sequence[bool]) -> dict[str, float]:
    """Accuracy; precision, recall and F1 of yes; and how often it is said. All 0 to 1."""
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(right, said, average="binary", zero_division=0.0)
    scores = {"precision": precision, "recall": recall, "f1": f1, "yes_ratio": sum(said) / len(said)}
    return {name: float(value) for name, value in {"accuracy": accuracy_score(right, said), **scores}.items()}
