"""VQA accuracy as the challenge measures it (Antol et al., arXiv 1505.00468; visualqa.org/evaluation)."""

import re
from collections.abc import Mapping, Sequence

ANNOTATORS = 10
"""From so many reference answers on they count as votes; fewer are alternatives, each of them right."""
# Only these, and the period, are punctuation to the official comparison: "$", "%", ":" and the apostrophe stay.
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_ARTICLES = ("a", "an", "the")
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
    "needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've won't "
    "would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"
)


def _short_of_one(contraction: str) -> list[str]:
    return [contraction[:i] + contraction[i + 1 :] for i, letter in enumerate(contraction) if letter == "'"]


_MENDED = {short: whole for whole in _CONTRACTIONS.split() for short in _short_of_one(whole)}


def normalised(text: str) -> str:
    """What the official comparison looks at: an answer in lower case, its words put in one form.

    Punctuation becomes a blank, or nothing where the text has such a mark next to a blank or groups digits by commas
    (100,978); periods go unless a digit follows. Number words up to ten become digits, articles go, and apostrophes
    that contractions lack come back.
    """
    text = re.sub(r"[\n\t]", " ", text).strip()
    grouped = re.search(r"\d,\d", text) is not None
    bare = text
    for mark in _MARKS:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if grouped or beside_blank else " ")
    words = [_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", bare).lower().split()]
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """0 to 1. Of ten annotators or more, each is compared with: right by a third for every other one who says the
    same, at most 1, and the mean of that over all annotators. With fewer references, whether it is one of them."""
    found = normalised(answer)
    same = [normalised(reference) == found for reference in references]
    if len(same) < ANNOTATORS:
        return float(any(same))
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def label_score(answer: str, label: Mapping[str, float]) -> float:
    """The score of an answer among those with scores from 0 to 1, all compared as `accuracy` compares; else 0."""
    found = normalised(answer)
    return max((float(score) for text, score in label.items() if normalised(text) == found), default=0.0)


def vqa_metrics(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The mean accuracy of answers to questions with their references."""
    return {"accuracy": sum(map(accuracy, answers, references)) / len(answers)}
