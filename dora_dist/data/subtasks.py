"""The tasks that VL-BART learns together: of each its records, prompt, targets and scores.

They are those of Liu et al., section 5.3 (after Sung et al., arXiv 2112.06825). "Task" alone is model.task; one of
these is a subtask. Its object here is all that the rest knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from dora_dist.data.features import About
from dora_dist.data.files import shown
from dora_dist.data.records import Record, check_characters
from dora_dist.metrics.captions import caption_metrics
from dora_dist.metrics.choices import chosen_option
from dora_dist.metrics.vqa import accuracy, label_score
from dora_dist.runtime.errors import UserError

Scores = dict[str, float]
_VIDEO_IDS = ("vid_name", "video_id", "vid_id", "video")
_TRUTHS = {"true": "true", "1": "true", "false": "false", "0": "false"}


@dataclass(frozen=True, kw_only=True)
class Example:
    """What a record comes to.

    visual: ids of its pictures, or of its video. before: text in front of `text`, which is shortened first. targets:
    each text to be learnt, with its score. reference: what an answer is compared with; plain JSON.
    """

    visual: tuple[str, ...]
    text: str
    targets: tuple[tuple[str, float], ...]
    reference: Any
    before: str = ""


class PromptedText(NamedTuple):
    """A text as the model reads it. prompt: where in it the prompt is; before: so many characters are shortened first,
    then what is not the prompt.
    """

    text: str
    prompt: range
    before: int


@dataclass(frozen=True, kw_only=True)
class Subtask:
    """One of the tasks. metric: the score that counts, of those that `score` gives of answers and references.

    about: what its records are about; the prompt is in front of a text about pictures, and behind one about a video.
    drawn: an epoch has one of a record's targets, drawn by score; otherwise it has each. packages: modules of extras
    that `score` imports.
    """

    about: About
    prompt: str
    read: Callable[[Record], Example]
    score: Callable[[Sequence[str], Sequence[Any]], Scores]
    metric: str
    others: tuple[str, ...] = ()
    drawn: bool = False
    packages: tuple[str, ...] = field(default=())

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric, *self.others)

    def prompted(self, example: Example, prompt: str | None) -> PromptedText:
        """The text with the prompt (None: the subtask's own)."""
        prompt = self.prompt if prompt is None else prompt
        first = f"{example.before} " if example.before else ""
        if self.about == "videos":
            whole = first + " ".join(part for part in (example.text, prompt) if part)
            start = len(whole) - len(prompt)
        else:
            whole, start = f"{first}{prompt}{example.text}", len(first)
        return PromptedText(whole, range(start, start + len(prompt)), len(example.before))


# --- fields of records ------------------------------------------------------------------------------------------------


def _given(record: Record, *names: str) -> Any:
    """The first of these fields that a record has. Raises UserError where it has none."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise UserError(f'has no "{names[0]}"' + (f" (nor {', '.join(names[1:])})" if names[1:] else ""))


def _text(record: Record, *names: str) -> str:
    value = _given(record, *names)
    if not isinstance(value, str):
        raise UserError(f'"{names[0]}" must be a text, found {shown(value)}')
    check_characters(f'"{names[0]}"', value)
    return value


def _id(record: Record, *names: str) -> str:
    """The id of a picture or video: a text, or a number as COCO has them."""
    value = _given(record, *names)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(f'"{names[0]}" must be the id of a picture or video, found {shown(value)}')
    return str(value)


def _strings(record: Record, *names: str, inside: str = "") -> list[str]:
    """A text or a list of them, some perhaps empty; one may be an object that holds its text as `inside`."""
    value = _given(record, *names)
    elements = value if isinstance(value, list) else [value]
    said = [element.get(inside) if isinstance(element, dict) else element for element in elements]
    texts = [text for text in said if isinstance(text, str)]
    if len(texts) < len(said):
        raise _no_texts(value, names[0])
    for text in texts:
        check_characters(f'"{names[0]}"', text)
    return texts


def _texts(record: Record, *names: str, inside: str = "") -> list[str]:
    """As `_strings`, of which there must be some, and none may be empty."""
    texts = _strings(record, *names, inside=inside)
    if not texts or not all(text.strip() for text in texts):
        raise _no_texts(_given(record, *names), names[0])
    return texts


def _no_texts(value: Any, name: str) -> UserError:
    return UserError(f'"{name}" must be a text or a list of texts, found {shown(value)}')


def _labels(record: Record) -> dict[str, float]:
    """Answers with scores from 0 to 1, the best first: "label" as LXMERT's files have it, or from "answers"."""
    if record.get("label") is not None:
        label = record["label"]
        fits = isinstance(label, dict) and all(
            isinstance(score, int | float) and not isinstance(score, bool) and 0 <= score <= 1
            for score in label.values()
        )
        if not fits:
            raise UserError(f'"label" must hold answers with scores from 0 to 1, found {shown(label)}')
    else:
        answers = _texts(record, "answers", "answer", inside="answer")
        # The official accuracy, without leaving the annotator out who gave the answer.
        label = {text: min(1.0, answers.count(text) / 3) if len(answers) > 1 else 1.0 for text in answers}
    return dict(sorted(label.items(), key=lambda pair: -pair[1]))


def _time(record: Record) -> str:
    """The time stamp as the record has it: "[TS] (12.5-17.25)", or "[TS] ([12.5, 17.25])"."""
    stamp = record.get("ts")
    if stamp is None or stamp == "":
        return ""
    numbers = isinstance(stamp, list) and len(stamp) == 2 and all(isinstance(value, int | float) for value in stamp)
    if not numbers and not isinstance(stamp, str):
        raise UserError(f'"ts" must be the two ends of a stretch in seconds, found {shown(stamp)}')
    return f"[TS] ({stamp})"


def _subtitles(record: Record) -> str:
    """Subtitles, if any: a text, or a list of texts or of {"text": ...}, of which some may be empty."""
    present = next((name for name in ("subtitles", "sub") if record.get(name)), None)
    said = _joined(*_strings(record, present, inside="text")) if present else ""
    return f"[Subs] {said}" if said else ""


def _joined(*parts: str) -> str:
    return " ".join(part.strip() for part in parts if part.strip())


# --- pictures ---------------------------------------------------------------------------------------------------------


def _question(record: Record) -> Example:
    label = _labels(record)
    voted = [text for text, score in label.items() if score > 0]
    answers = _texts(record, "answers", inside="answer") if record.get("answers") is not None else []
    return Example(
        visual=(_id(record, "img_id", "image_id", "imageId", "image"),),
        text=_text(record, "sent", "question"),
        # A question on whose answer nobody agrees teaches nothing, and still counts, as in the authors' runs.
        targets=tuple((text, float(label[text])) for text in voted) or (("", 0.0),),
        reference={"label": label, "answers": answers},
    )


def _pair(record: Record) -> Example:
    label = record.get("label")
    said = _TRUTHS.get(str(label).lower()) if isinstance(label, str | int) else None  # a bool is an int, too
    if said is None:
        raise UserError(f'"label" must be true or false (or 1 or 0), found {shown(label)}')
    if record.get("img0") is not None:
        pictures = _id(record, "img0"), _id(record, "img1")
    else:  # NLVR2's own files: the pictures of "dev-850-0-0" are "dev-850-0-img0" and "dev-850-0-img1"
        stem = _text(record, "identifier", "img0").rpartition("-")[0]
        pictures = f"{stem}-img0", f"{stem}-img1"
    text = _text(record, "sent", "sentence")
    return Example(visual=pictures, text=text, targets=((said, 1.0),), reference=said)


def _captioned(record: Record) -> Example:
    captions = _texts(record, "sentences", "captions", "caption", "sent", inside="raw")
    known = any(record.get(name) is not None for name in ("img_id", "image_id"))
    # Karpathy's splits name the file; features are kept by its stem.
    picture = _id(record, "img_id", "image_id") if known else PurePosixPath(_id(record, "filename", "img_id")).stem
    return Example(
        visual=(picture,), text="", targets=tuple((text.strip(), 1.0) for text in captions), reference=captions
    )


# --- videos -----------------------------------------------------------------------------------------------------------


def _multiple_choice(record: Record) -> Example:
    options = [record[f"a{i}"] for i in range(10) if f"a{i}" in record] or record.get("choices")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) for o in options):
        raise UserError(f'must have the choices "a0", "a1", ... (or a list "choices"), found {shown(options)}')
    options = [_bare(option) for option in options]
    answer = _right_option(record, options)
    numbered = [f"a{i}: {option}." for i, option in enumerate(options)]
    return Example(
        visual=(_id(record, *_VIDEO_IDS),),
        before=_subtitles(record),
        text=_joined("[Q]", _text(record, "q", "question"), _time(record), "[Choices]", *numbered),
        targets=((f"a{answer}", 1.0),),
        reference={"options": options, "answer": answer},
    )


def _bare(option: str) -> str:
    """As the model reads it: full stops and spaces around it are left out."""
    return option.strip(". ")


def _right_option(record: Record, options: Sequence[str]) -> int:
    """Its number from 0, as a field says by number, by number in a text, or by the very text of one (bare) option.

    "0" is a number first in a field for numbers, and the text of an option first in "answer".
    """
    answer = _given(record, "answer_idx", "answer_id", "answer")
    numbers = [str(number) for number in range(len(options))]
    by_number = any(record.get(name) is not None for name in ("answer_idx", "answer_id"))
    for known in (numbers, options) if by_number else (options, numbers):
        if isinstance(answer, str) and known.count(_bare(answer)) == 1:
            return known.index(_bare(answer))
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
        raise UserError(f'"answer_idx" must be a number from 0 to {len(options) - 1}, found {shown(answer)}')
    return answer


def _described(record: Record) -> Example:
    captions = _texts(record, "descs", "captions", "caption", "desc", inside="desc")
    return Example(
        visual=(_id(record, *_VIDEO_IDS),),
        before=_subtitles(record),
        text="",
        targets=tuple((text.strip(), 1.0) for text in captions),
        reference=captions,
    )


def _described_stretch(record: Record) -> Example:
    return replace(_described(record), text=_time(record))


# --- scores -----------------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _vqa(answers: Sequence[str], references: Sequence[Any]) -> Scores:
    """The official accuracy where annotators' answers are known, else the score of the answer's label."""
    scores = [
        accuracy(answer, known["answers"]) if known["answers"] else label_score(answer, known["label"])
        for answer, known in zip(answers, references, strict=True)
    ]
    return {"accuracy": _mean(scores)}


def _exact(answers: Sequence[str], references: Sequence[Any]) -> Scores:
    """Whether an answer is the best one; a question that has none is answered wrong."""
    right = [max(known["label"], key=known["label"].get, default=None) for known in references]
    pairs = zip(answers, right, strict=True)
    return {"accuracy": _mean([float(best is not None and answer.strip() == best.strip()) for answer, best in pairs])}


def _true_or_false(answers: Sequence[str], references: Sequence[str]) -> Scores:
    return {"accuracy": _mean([float(a.strip().lower() == b) for a, b in zip(answers, references, strict=True)])}


def _choice(answers: Sequence[str], references: Sequence[Any]) -> Scores:
    pairs = zip(answers, references, strict=True)
    return {"accuracy": _mean([float(chosen_option(a, known["options"]) == known["answer"]) for a, known in pairs])}


_OF_CAPTIONS: Mapping[str, Any] = {
    "score": caption_metrics,
    "metric": "cider",
    "others": ("bleu4", "rougeL"),
    "packages": ("pycocoevalcap", "nltk"),
}

_OF_QUESTIONS: Mapping[str, Any] = {"about": "pictures", "read": _question, "metric": "accuracy", "drawn": True}
_OF_CHOICES: Mapping[str, Any] = {"about": "videos", "read": _multiple_choice, "score": _choice, "metric": "accuracy"}

SUBTASKS: dict[str, Subtask] = {
    "vqa": Subtask(prompt="vqa: ", score=_vqa, **_OF_QUESTIONS),
    # So spelt in the authors' runs; data.prompts can say "gqa: ".
    "gqa": Subtask(prompt="gpa: ", score=_exact, **_OF_QUESTIONS),
    "nlvr2": Subtask(about="pictures", prompt="nlvr: ", read=_pair, score=_true_or_false, metric="accuracy"),
    "caption": Subtask(about="pictures", prompt="caption: ", read=_captioned, **_OF_CAPTIONS),
    "tvqa": Subtask(prompt="tvqa: ", **_OF_CHOICES),
    "how2qa": Subtask(prompt="how2qa: ", **_OF_CHOICES),
    "tvc": Subtask(about="videos", prompt="tvc: ", read=_described_stretch, **_OF_CAPTIONS),
    "yc2c": Subtask(about="videos", prompt="yc2c: ", read=_described, **_OF_CAPTIONS),
}


def metrics_of(subtasks: Iterable[str]) -> list[str]:
    """The names of the scores of these subtasks, as `scores_of` has them; without "average"."""
    return [f"{name}_{metric}" for name in subtasks for metric in SUBTASKS[name].metrics]


def scores_of(subtasks: Sequence[str], answers: Sequence[str], references: Sequence[Any]) -> Scores:
    """Each subtask's scores as "{subtask}_{score}", and "average": the mean of those that count (the paper's average).

    All three have an entry for each sample, whose order does not matter.
    """
    found: Scores = {}
    for name in dict.fromkeys(subtasks):
        chosen = [i for i, other in enumerate(subtasks) if other == name]
        scores = SUBTASKS[name].score([answers[i] for i in chosen], [references[i] for i in chosen])
        found |= {f"{name}_{score}": value for score, value in scores.items()}
    counting = [found[f"{name}_{SUBTASKS[name].metric}"] for name in dict.fromkeys(subtasks)]
    return {**found, "average": _mean(counting)}
