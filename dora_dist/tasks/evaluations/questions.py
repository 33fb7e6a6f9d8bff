"""Questions about pictures: record formats, what the model is asked, and how each format's answers are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dora_dist.data.conversations import MARK, picture_paths
from dora_dist.data.records import Record, read_records
from dora_dist.metrics.captions import caption_metrics
from dora_dist.metrics.choices import LETTERS, choice_metrics, chosen, says_yes, yes_no_metrics
from dora_dist.metrics.vqa import vqa_metrics
from dora_dist.runtime import extras
from dora_dist.runtime.errors import UserError

SHORT = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class PictureQuestion:
    """What the user says, with a mark for every picture, and what is right.

    references: the answers or captions that count; of a choice the right letter, of POPE "Yes" or "No".
    options: the texts of a choice's options, A first.
    candidates: the answers that likelihood compares.
    """

    id: Any
    place: str  # of its record, for messages
    text: str
    pictures: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()


_Texts = dict[str, tuple[str, ...]]
Metrics = dict[str, float]


@dataclass(frozen=True)
class QuestionFormat:
    """One kind of records. `instruction` follows the question's text, as it did when LLaVA-1.5 was trained."""

    instruction: str
    max_new_tokens: int
    read: Callable[[Record], _Texts]  # a question's references, options and candidates
    score: Callable[[Sequence[PictureQuestion], Sequence[str]], Metrics]
    has_candidates: bool = False
    needs_text: bool = True
    packages: tuple[str, ...] = ()  # modules of extras that scoring imports


def read_questions(
    file: str, format: str, instruction: str | None = None, *, limit: int | None = None
) -> list[PictureQuestion]:
    """The questions of a file of records (.json, .jsonl, .parquet or a hub data set), each one checked.

    `instruction`: None: the format's own; "": none. Raises UserError, naming the record, for one that does not fit.
    """
    questions = []
    for number, (place, record) in enumerate(list(read_records([file], {}))[:limit]):
        id = next((record[name] for name in ("question_id", "id") if name in record), number)
        try:
            questions.append(_question(id, f"{place} (id {id!r})", record, format, instruction))
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
    return questions


def _question(id: Any, place: str, record: Record, format: str, instruction: str | None) -> PictureQuestion:
    how = FORMATS[format]
    text = next((record[name] for name in ("text", "question") if record.get(name) is not None), "")
    if not isinstance(text, str) or (how.needs_text and not text.strip()):
        raise UserError(f'has no "text" (or "question") that asks something, found {text!r}')
    texts = how.read(record)
    options = texts.get("options", ())
    pictures = picture_paths(record.get("image"))
    if not (text or pictures):
        raise UserError('has neither "image" nor "text"; there is nothing to caption')
    marks = text.count(MARK)
    if marks not in (0, len(pictures)):
        raise UserError(f'has {marks} {MARK} in its text and {len(pictures)} pictures in "image"; give one for each')
    wanted = how.instruction if instruction is None else instruction
    if text.rstrip().endswith(wanted) or (text and instruction is None and not how.needs_text):
        wanted = ""  # the record says it already
    hint = next((record[name] for name in ("hint", "context") if options and isinstance(record.get(name), str)), "")
    lines = [hint, text, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)), wanted]
    said = "\n".join(line for line in lines if line)
    return PictureQuestion(id, place, f"{MARK}\n" * (len(pictures) - marks) + said, pictures, **texts)


def _answers(record: Record) -> _Texts:
    return _references(record, "answers", "answer")


def _captions(record: Record) -> _Texts:
    return _references(record, "captions", "references", "caption")


def _references(record: Record, *names: str) -> _Texts:
    """The first of these fields: a text or several; one may be an object that holds its text as "answer"."""
    name = next((name for name in names if record.get(name) is not None), names[0])
    given = record.get(name)
    listed = given if isinstance(given, list) else [given]
    found = [element.get("answer") if isinstance(element, dict) else element for element in listed]
    texts = [text for text in found if isinstance(text, str) and text.strip()]
    if not texts or len(texts) < len(found):
        raise UserError(f'"{name}" must be a text or a list of texts, found {given!r}')
    return {"references": tuple(texts)}


def _choice(record: Record) -> _Texts:
    options, answer = record.get("choices"), record.get("answer")
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise UserError(f'"choices" must be a list of texts, found {options!r}')
    if not 2 <= len(options) <= len(LETTERS):
        raise UserError(f'"choices" has {len(options)} options; give 2 to {len(LETTERS)}')
    letters = LETTERS[: len(options)]
    meant = {letters[i] for i, option in enumerate(options) if option == answer}
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        meant = {letters[answer]}
    elif isinstance(answer, str) and len(answer) == 1 and answer in letters:
        meant.add(answer)
    if len(meant) != 1:
        raise UserError(
            f'"answer" is {answer!r}, which is {"several" if meant else "none"} of the {len(options)} "choices"; give '
            f"a position from 0 to {len(options) - 1}, a letter from A to {letters[-1]}, or the text of one"
        )
    return {"references": tuple(meant), "options": tuple(options), "candidates": tuple(letters)}


def _yes_or_no(record: Record) -> _Texts:
    label = record.get("label", record.get("answer"))
    if not isinstance(label, str) or label.lower() not in ("yes", "no"):
        raise UserError(f'"label" is {label!r}; it must be "yes" or "no"')
    return {"references": (label.capitalize(),), "candidates": ("Yes", "No")}


def _score_vqa(questions: Sequence[PictureQuestion], answers: Sequence[str]) -> Metrics:
    return vqa_metrics(answers, [question.references for question in questions])


def _score_choices(questions: Sequence[PictureQuestion], answers: Sequence[str]) -> Metrics:
    found = [chosen(text, question.options) for text, question in zip(answers, questions, strict=True)]
    return choice_metrics(found, [question.references[0] for question in questions])


def _score_yes_no(questions: Sequence[PictureQuestion], answers: Sequence[str]) -> Metrics:
    return yes_no_metrics([says_yes(text) for text in answers], [q.references == ("Yes",) for q in questions])


def _score_captions(questions: Sequence[PictureQuestion], answers: Sequence[str]) -> Metrics:
    return caption_metrics(answers, [question.references for question in questions])


FORMATS = {
    "vqa": QuestionFormat(SHORT, 16, _answers, _score_vqa),
    "multiple_choice": QuestionFormat(
        "Answer with the option's letter from the given choices directly.",
        16,
        _choice,
        _score_choices,
        has_candidates=True,
    ),
    "pope": QuestionFormat(SHORT, 16, _yes_or_no, _score_yes_no, has_candidates=True, packages=("sklearn",)),
    "captions": QuestionFormat(
        "Provide a one-sentence caption for the provided image.",
        64,
        _captions,
        _score_captions,
        needs_text=False,
        packages=("pycocoevalcap", "nltk"),
    ),
}


def check_format(format: str, mode: str) -> None:
    """Raise UserError for an unknown format, and for one that cannot be scored here or in this mode."""
    if format not in FORMATS:
        raise UserError(f"--format {format}: is not about pictures; give one of {', '.join(FORMATS)}")
    if mode == "likelihood" and not FORMATS[format].has_candidates:
        comparable = " and ".join(name for name, how in FORMATS.items() if how.has_candidates)
        raise UserError(f"--format {format}: has no candidates to compare with --mode likelihood; {comparable} have")
    extras.need(*FORMATS[format].packages, purpose=f"--format {format}")
