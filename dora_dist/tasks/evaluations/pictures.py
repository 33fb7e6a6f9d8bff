"""A LLaVA on questions about pictures: answers generated, or the likeliest candidates; scored by format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dora_dist.config import DataConfig
from dora_dist.data.conversations import Conversation, render, render_question
from dora_dist.data.pictures import PictureProcessor, missing_pictures
from dora_dist.models.families import load_processor
from dora_dist.runtime import console
from dora_dist.runtime.errors import UserError
from dora_dist.tasks.evaluations.base import Asked, Evaluation, Settings, Subject
from dora_dist.tasks.evaluations.generation import beam_search
from dora_dist.tasks.evaluations.lengths import check_lengths, positions_of
from dora_dist.tasks.evaluations.likelihood import candidate_log_probs
from dora_dist.tasks.evaluations.questions import FORMATS, PictureQuestion, check_format, read_questions

if TYPE_CHECKING:
    from torch import Tensor

    from dora_dist.data.formats import Rendered

FIELDS = ("image_folder", "image_aspect_ratio", "max_image_pixels", "chat_template")
"""Fields of the configuration's data section that matter here."""
KNOWN = (*FIELDS, "mode", "format", "instruction", "normalise", "num_beams", "max_new_tokens")


class PicturesEvaluation(Evaluation):
    """FIELDS and dtype are by default those of the run in which the model was trained, else the configuration's
    defaults, and bf16; the format is "vqa".
    """

    def __init__(self, task: str, subject: Subject, settings: Settings) -> None:
        settings.refuse_loss(task)
        settings.refuse_other_modes()
        settings.refuse_all_but(KNOWN, task)
        self.mode, self._format = settings.mode or "generate", settings.format or "vqa"
        check_format(self._format, self.mode)
        how = FORMATS[self._format]
        self._subject, self._limit, self._instruction = subject, settings.limit, settings.instruction
        self._data = data_of(task, subject, settings.fields or {})
        self.work: dict[str, Any] = {"batch_size": settings.batch_size}
        if self.mode == "generate":
            new = settings.max_new_tokens or how.max_new_tokens
            self.work |= {"num_beams": settings.num_beams or 1, "max_new_tokens": new}
        else:
            self.work |= {"normalise": settings.normalise or "sum"}
        self.dtype = settings.dtype or subject.run.get("model", {}).get("dtype", "bf16")
        self.facts = {"task": task, "mode": self.mode}
        instruction = how.instruction if settings.instruction is None else settings.instruction
        self.settings = {
            "format": self._format,
            "instruction": instruction,
            **self.work,
            "dtype": self.dtype,
            "limit": settings.limit,
            "data": self._data.model_dump(include={*FIELDS}),
        }

    @cached_property
    def processor(self) -> PictureProcessor:
        return load_processor(self._subject.base, self._data, self._subject.run.get("model", {}).get("tokenizer"))

    @cached_property
    def _positions(self) -> int | None:
        return positions_of(self._subject.base)

    def read(self, name: str, file: str) -> Asked:
        """Records, prompts and whether all pictures are there are checked. Raises UserError."""
        questions = read_questions(file, self._format, self._instruction, limit=self._limit)
        template = self._data.chat_template
        if template == "plain" and FORMATS[self._format].needs_text:
            raise UserError(
                f'--format {self._format}: under data.chat_template = "plain" a model sees no question, only pictures; '
                "evaluate its captions (--format captions), or give the template that it answers under "
                "(--chat-template vicuna_v1 or model)"
            )
        _check_pictures(questions, self._data.image_folder)
        texts = _prompts(questions, template, self.processor)
        lengths = [len(prompt) for prompt in _tokens(texts, self.processor)]
        new = self.work.get("max_new_tokens", 0)
        check_lengths([question.place for question in questions], lengths, self._positions, new_tokens=new)
        return _Questions(name, questions, self._format, evaluation=self, template=template)


class _Questions(Asked):
    def __init__(
        self,
        name: str,
        questions: Sequence[PictureQuestion],
        format: str,
        *,
        evaluation: PicturesEvaluation,
        template: str,
    ) -> None:
        self._label, self._questions, self._format = f"{name} ({evaluation.mode})", questions, format
        how = answer_questions if evaluation.mode == "generate" else likeliest_answers
        self._answer = partial(how, template=template, **evaluation.work)
        self._evaluation = evaluation

    def score(self, model: Any, *, progress: bool) -> dict[str, Any]:
        """The format's metrics, "total", and "predictions" by record."""
        questions = self._questions
        with console.progress(len(questions), self._label, " questions", shown=progress) as bar:
            answers = self._answer(model, self._evaluation.processor, questions, advance=bar.update)
        predictions = [{"id": question.id, "answer": text} for question, text in zip(questions, answers, strict=True)]
        metrics = FORMATS[self._format].score(questions, answers)
        return {**metrics, "total": len(questions), "predictions": predictions}


def data_of(task: str, subject: Subject, fields: Mapping[str, Any]) -> DataConfig:
    """How pictures and questions become input: `fields`, else those of a run's data section, else the defaults.

    image_folder is None where nothing says it, as it may be where no question has a picture.
    """
    known = {name: value for name, value in subject.run.get("data", {}).items() if name in FIELDS}
    data = {"train": "-", **known, **fields, "format": "llava", "loss_on": "answer"}
    unset = data.get("image_folder") is None
    model = {"path": subject.path, "task": task}
    raw = {"model": model, "data": {**data, "image_folder": "."} if unset else data}
    found = subject.configuration(raw).data
    return found.model_copy(update={"image_folder": None}) if unset else found


def _tokens(prompts: Sequence[str], processor: PictureProcessor) -> list[list[int]]:
    """What the model reads: a picture is as many tokens as it has features."""
    tokenizer, stands = processor.tokenizer, processor.stands
    return [stands.widened(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in prompts]


def _check_pictures(questions: Sequence[PictureQuestion], folder: str | None) -> None:
    """Raise UserError if a question's picture is not there."""
    shown = [question for question in questions if question.pictures]
    if shown and folder is None:
        raise UserError(f"{shown[0].place}: has a picture, and image_folder is not set; give it (--image-folder)")
    below = Path(folder or "")
    missing = missing_pictures(below, {path for question in shown for path in question.pictures})
    for question in shown:
        if absent := missing.intersection(question.pictures):
            raise UserError(
                f"{question.place}: picture {below / min(absent)} does not exist ({len(missing):,} are missing "
                "in all); give the folder that they are in (--image-folder)"
            )


@torch.no_grad()
def answer_questions(
    model: Any,
    processor: PictureProcessor,
    questions: Sequence[PictureQuestion],
    *,
    template: str = "vicuna_v1",
    batch_size: int = 8,
    num_beams: int = 1,
    max_new_tokens: int = 64,
    advance: Callable[[int], object] = lambda questions: None,
) -> list[str]:
    """What a LLaVA in evaluation mode says to each question, by greedy or beam search, blanks around it removed.

    `template` is data.chat_template; under "plain", answers are captions and end with their line, as in training.
    Questions of similar length share a batch, padded on the left; an answer does not depend on its batch. `advance`
    is called with the number of questions finished, as they are. Raises UserError for a picture that cannot be read.
    """
    tokenizer = processor.tokenizer
    stop = "\n" if template == "plain" else None
    search = beam_search(tokenizer, num_beams=num_beams, max_new_tokens=max_new_tokens, stop=stop)
    prompts = _tokens(_prompts(questions, template, processor), processor)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    device = next(model.parameters()).device
    answers = [""] * len(questions)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in chosen]}, padding_side="left", return_tensors="pt")
        output = model.generate(
            **batch.to(device),
            **_pictures(processor, [questions[i] for i in chosen], device),
            generation_config=search,
            tokenizer=tokenizer if stop else None,
        )[:, batch["input_ids"].shape[1] :]
        for i, text in zip(chosen, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
            answers[i] = text.strip()
        advance(len(chosen))
    return answers


def likeliest_answers(
    model: Any, processor: PictureProcessor, questions: Sequence[PictureQuestion], **options: Any
) -> list[str]:
    """Each question's most probable candidate; `options` as of `candidate_scores`."""
    scores = candidate_scores(model, processor, questions, **options)
    return [
        max(zip(row, question.candidates, strict=True), key=lambda pair: pair[0])[1]
        for row, question in zip(scores, questions, strict=True)
    ]


def candidate_scores(
    model: Any,
    processor: PictureProcessor,
    questions: Sequence[PictureQuestion],
    *,
    template: str = "vicuna_v1",
    normalise: str = "sum",
    batch_size: int = 8,
    advance: Callable[[int], object] = lambda questions: None,
) -> list[list[float]]:
    """The log-probability of each question's candidates, in the place of training's answer after the same prompt.

    The sum over a candidate's tokens, or with `normalise` "mean" their average. `advance` is called as by
    `answer_questions`. Raises UserError for a picture that cannot be read.
    """
    tokenizer, token, device = processor.tokenizer, processor.stands.token, next(model.parameters()).device

    def answered(question: PictureQuestion, answer: str) -> Rendered:
        turns = (("user", question.text), ("assistant", answer))
        rendered = render(Conversation(turns, question.pictures), template, tokenizer, token, spans=True)
        [(start, _)] = rendered.answers
        end = rendered.text.index(answer, start) + len(answer)  # the turn's own end is not part of the candidate
        return replace(rendered, answers=((start, end),))

    return candidate_log_probs(
        model,
        tokenizer,
        [[answered(question, candidate) for candidate in question.candidates] for question in questions],
        batch_size=batch_size,
        mean=normalise == "mean",
        widened=processor.stands.widened,
        inputs_of=lambda numbers: _pictures(processor, [questions[i] for i in numbers], device),
        advance=advance,
    )


def _prompts(questions: Sequence[PictureQuestion], template: str, processor: PictureProcessor) -> list[str]:
    texts = []
    for question in questions:
        try:
            texts.append(render_question(question.text, template, processor.tokenizer, processor.stands.token))
        except UserError as error:
            raise UserError(f"{question.place}: {error}") from error
    return texts


def _pictures(
    processor: PictureProcessor, questions: Sequence[PictureQuestion], device: torch.device
) -> dict[str, Tensor]:
    """pixel_values (pictures, 3, height, width) fp32 of all pictures in order; nothing where there are none."""
    found = []
    for question in questions:
        try:
            found += [processor.reader(path) for path in question.pictures]
        except UserError as error:
            raise UserError(f"{question.place}: {error}") from error
    return {"pixel_values": torch.stack(found).to(device)} if found else {}
