"""Metrics of answers about pictures, against values worked by hand from their definitions."""

import math
from collections import Counter

import pytest

from dora_dist.metrics.captions import caption_metrics, tokenised
from dora_dist.metrics.choices import choice_metrics, chosen, says_yes, yes_no_metrics
from dora_dist.metrics.vqa import accuracy, normalised, vqa_metrics

# --- VQA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Dog.", "dog"),
        ("an apple and a pear", "apple and pear"),
        ("Two", "2"),
        ("none", "0"),
        ("ten of one", "10 of 1"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("Youre right", "you're right"),
        ("well", "well"),  # "we'll" without its apostrophe is a word of its own
        ("2:50 pm", "2:50 pm"),
        ("girl's", "girl's"),
        ("100,978", "100978"),
        ("3.5", "3.5"),
        ("3.5.", "3.5"),
        ("a.m.", "am"),
        ("yes?", "yes"),
        ("t-shirt", "t shirt"),
        ("red, white", "red white"),
        ("black/white", "black white"),
        ("well-lit - room", "welllit room"),  # one mark beside a blank, and all of its kind go without one
        ("1,000 t-shirts", "1000 tshirts"),  # as do all marks of a text with a grouped number
        ("$5", "$5"),
        ("50%", "50%"),
        (" two\nwords\t", "2 words"),
        ("a", ""),
    ],
)
def test_normalised(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


@pytest.mark.parametrize(("agree", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_is_the_mean_over_all_sets_of_nine_annotators(agree: int, expected: float) -> None:
    others = ["dog", "puppy", "wolf"]
    references = ["The cat"] * agree + [others[i % 3] for i in range(10 - agree)]
    assert accuracy("cat.", references) == pytest.approx(expected)


def test_fewer_references_are_alternatives() -> None:
    assert accuracy("2", ["two"]) == accuracy("two", ["1", "2"]) == 1.0
    assert accuracy("three", ["1", "2"]) == 0.0
    assert vqa_metrics(["2", "no"], [["two"], ["yes"]]) == {"accuracy": 0.5}


# --- a choice, yes and no -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b.", "B"),
        ("(C)", "C"),
        ("B. a dog", "B"),
        ("(B) a dog", "B"),
        ("C: red", "C"),
        ("A Dog.", "B"),
        ("a bird", "C"),
        ("The answer is B.", "B"),
        ("The answer is: (C)", "C"),
        ("I choose option A", "A"),
        ("The answer is A because", None),
        ("A cat and a dog", None),
        ("D", None),
        ("I do not know", None),
        ("", None),
        ("Because", None),
    ],
)
def test_the_letter_that_a_text_means(text: str, letter: str | None) -> None:
    assert chosen(text, ["a cat", "a dog", "a bird"]) == letter


def test_the_text_of_an_option_counts_before_a_letter_in_it() -> None:
    assert chosen("B. subtilis", ["E. coli", "B. cereus", "B. subtilis"]) == "C"
    assert chosen("B", ["B", "A"]) == "B"  # what was asked for is a letter


def test_choices_without_an_answer_are_wrong_and_counted() -> None:
    found = choice_metrics(["A", None, "C", None], ["A", "B", "B", "A"])
    assert found == {"accuracy": 0.25, "correct": 1, "without_answer": 2}


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("yes, there is no doubt", False),
        ("No", False),
        ("no, there is", False),
        ("There is not. Yes", False),
        ("Yes. It is not far", True),
        ("Nothing", True),
        ("", True),
    ],
)
def test_yes_unless_the_first_sentence_has_no(text: str, yes: bool) -> None:
    assert says_yes(text) is yes


def test_yes_and_no_by_hand() -> None:
    # 2 right yes, 1 wrong yes, 3 right no, 2 wrong no
    said = [True, True, True, False, False, False, False, False]
    right = [True, True, False, False, False, False, True, True]
    found = yes_no_metrics(said, right)
    assert found == pytest.approx(
        {"accuracy": 5 / 8, "precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7, "yes_ratio": 3 / 8}
    )
    assert yes_no_metrics([False], [True])["f1"] == 0.0


# --- captions -------------------------------------------------------------------------------------------------------

REFERENCES = [
    ["A dog runs in the park.", "a brown dog is running in a park"],
    ["a red car on the road"],
    ["Two cats sleep on a bed."],
]
CAPTIONS = ["a dog is running in the park", "a red car on the road", "a dog on a bed, asleep"]


def cider(captions: list[str], references: list[list[str]]) -> float:
    """CIDEr-D from its formula: counts are clipped to the reference's, lengths that differ cost (sigma 6)."""

    def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    total = 0.0
    for n in (1, 2, 3, 4):
        having = Counter(gram for texts in references for gram in set().union(*(grams(text, n) for text in texts)))

        def weights(text: str, n: int = n, having: Counter[tuple[str, ...]] = having) -> dict[tuple[str, ...], float]:
            idf = {gram: math.log(len(references) / max(1, having[gram])) for gram in grams(text, n)}
            return {gram: count * idf[gram] for gram, count in grams(text, n).items()}

        for caption, texts in zip(captions, references, strict=True):
            for text in texts:
                ours, theirs = weights(caption), weights(text)
                clipped = sum(min(ours[gram], theirs[gram]) * theirs[gram] for gram in ours.keys() & theirs.keys())
                norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
                length = math.exp(-((len(caption.split()) - len(text.split())) ** 2) / (2 * 6**2))
                total += clipped / norm * length / len(texts) if norm else 0.0
    return 10 * total / 4 / len(captions)


def test_cider_is_its_formula() -> None:
    words = [tokenised(caption) for caption in CAPTIONS], [[tokenised(t) for t in texts] for texts in REFERENCES]
    found = caption_metrics(CAPTIONS, REFERENCES)
    assert found["cider"] == pytest.approx(cider(*words), abs=1e-6)
    assert 3 < found["cider"] < 8
    assert 0 < found["bleu4"] < 1 and 0 < found["rougeL"] < 1
    same = caption_metrics([texts[0].upper() for texts in REFERENCES[1:]], REFERENCES[1:])
    assert same == pytest.approx({"cider": 10.0, "bleu4": 1.0, "rougeL": 1.0})
    assert caption_metrics(["", "nothing of it"], REFERENCES[1:])["cider"] == 0.0


def test_captions_are_lower_case_words_without_punctuation() -> None:
    assert tokenised('A "man" (left), isn\'t he? Two-wheeled: yes.') == "a man left is n't he two-wheeled yes"
    assert tokenised("A dog runs. It is 3.5 m long; red.") == "a dog runs it is 3.5 m long red"
