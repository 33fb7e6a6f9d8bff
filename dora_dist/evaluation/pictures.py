"""A LLaVA on questions about pictures: answers generated, or the likeliest candidates; scored by format."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dora_dist.config import DataConfig, RunConfig
from dora_dist.data.conversations import Conversation, render, render_question
from dora_dist.data.pictures import PictureProcessor, missing_pictures
from dora_dist.evaluation.generation import beam_search
from dora_dist.evaluation.lengths import check_lengths, positions_of
from dora_dist.evaluation.likelihood import candidate_log_probs
from dora_dist.evaluation.questions import FORMATS, Question, check_format, read_questions
from dora_dist.runtime import console
from dora_dist.runtime.errors import UserError
from dora_dist.tasks import problems

if TYPE_CHECKING:
    from torch import Tensor

    from dora_dist.data.formats import Rendered

PICTURE_FIELDS = ("image_folder", "image_aspect_ratio", "max_image_pixels", "chat_template")
"""Fields of the configuration's data section that matter here."""


def evaluate_pictures(
    model_path: str | Path,
    tasks: Mapping[str, str | Path],
    *,
    fields: Mapping[str, Any],
    mode: str = "generate",
    format: str = "vqa",
    instruction: str | None = None,
    normalise: str = "sum",
    num_beams: int = 1,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    dtype: str | None = None,
    base: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The result of `evaluation.evaluate` for a LLaVA, in one process.

    `fields` are some of PICTURE_FIELDS. They and `dtype` are by default those of the run, if `model_path` is a run
    folder, a checkpoint or a checkpoint's adapter; else the configuration's defaults, and bf16. Records, prompts and
    whether all pictures are there are checked before the model is loaded. Raises UserError for records that do not
    fit the format, and for pictures that cannot be read.
    """
    from dora_dist.evaluation.inference import base_folder, load_for_inference, run_of

    check_format(format, mode)
    run = run_of(str(model_path))
    data = _data(str(model_path), tasks, run.get("data", {}), fields)
    asked = {name: read_questions(str(file), format, instruction, limit) for name, file in tasks.items()}
    work: dict[str, Any] = {"batch_size": batch_size}
    if mode == "generate":
        work |= {"num_beams": num_beams, "max_new_tokens": max_new_tokens or FORMATS[format].max_new_tokens}
    else:
        work |= {"normalise": normalise}
    folder = base_folder(str(model_path), base)
    processor = _processor(folder, run, data, asked, format, work.get("max_new_tokens", 0))
    dtype = dtype or run.get("model", {}).get("dtype", "bf16")
    answer = partial(answer_questions if mode == "generate" else likeliest_answers, template=data.chat_template, **work)
    started = time.perf_counter()
    model, _ = load_for_inference(str(model_path), dtype, base)
    loaded, results = time.perf_counter(), {}
    for name, questions in asked.items():
        began = time.perf_counter()
        with console.progress(len(questions), f"{name} ({mode})", " questions", shown=progress) as bar:
            answers = answer(model, processor, questions, advance=bar.update)
        results[name] = {"file": str(tasks[name]), **_scores(questions, answers, format)}
        results[name] |= {"seconds": round(time.perf_counter() - began, 3)}
    given = {"format": format, "instruction": FORMATS[format].instruction if instruction is None else instruction}
    pictures = data.model_dump(include={*PICTURE_FIELDS})
    return {
        "model": str(model_path),
        "task": "image_text_to_text",
        "mode": mode,
        "settings": {**given, **work, "dtype": dtype, "limit": limit, "data": pictures},
        "tasks": results,
        "load_seconds": round(loaded - started, 3),
        "seconds": round(time.perf_counter() - loaded, 3),
    }


def _data(path: str, tasks: Mapping[str, Any], run: Mapping[str, Any], fields: Mapping[str, Any]) -> DataConfig:
    """How pictures and questions become input: `fields`, else those of a run's data section, else the defaults.

    image_folder is None where nothing says it, as it may be where no question has a picture.
    """
    known = {name: value for name, value in run.items() if name in PICTURE_FIELDS}
    data = {"train": [str(file) for file in tasks.values()], **known, **fields, "format": "llava", "loss_on": "answer"}
    unset = data.get("image_folder") is None
    model = {"path": path, "task": "image_text_to_text"}
    raw = {"model": model, "data": {**data, "image_folder": "."} if unset else data}
    found = RunConfig.from_dict(raw, origin="the evaluation", rules=problems).data
    return found.model_copy(update={"image_folder": None}) if unset else found


def _processor(
    base: Path,
    run: Mapping[str, Any],
    data: DataConfig,
    asked: Mapping[str, Sequence[Question]],
    format: str,
    new_tokens: int,
) -> PictureProcessor:
    """The model's processor. Raises UserError for questions that it, the chat template or the model cannot take."""
    from dora_dist.models.families import load_processor

    if data.chat_template == "plain" and FORMATS[format].needs_text:
        raise UserError(
            f'--format {format}: under data.chat_template = "plain" a model sees no question, only pictures; evaluate '
            "its captions (--format captions), or give the template that it answers under (--chat-template vicuna_v1 "
            "or model)"
        )
    for questions in asked.values():
        _check_pictures(questions, data.image_folder)
    processor, positions = load_processor(base, data, run.get("model", {}).get("tokenizer")), positions_of(base)
    for questions in asked.values():
        texts = _prompts(questions, data.chat_template, processor)
        lengths = [len(prompt) for prompt in _tokens(texts, processor)]
        check_lengths([question.place for question in questions], lengths, positions, new_tokens)
    return processor


def _tokens(prompts: Sequence[str], processor: PictureProcessor) -> list[list[int]]:
    """What the model reads: a picture is as many tokens as it has features."""
    tokenizer, stands = processor.tokenizer, processor.stands
    return [stands.widened(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in prompts]


def _check_pictures(questions: Sequence[Question], folder: str | None) -> None:
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


def _scores(questions: Sequence[Question], answers: Sequence[str], format: str) -> dict[str, Any]:
    """The format's metrics, "total", and "predictions" by record."""
    predictions = [{"id": question.id, "answer": text} for question, text in zip(questions, answers, strict=True)]
    return {**FORMATS[format].score(questions, answers), "total": len(questions), "predictions": predictions}


@torch.no_grad()
def answer_questions(
    model: Any,
    processor: PictureProcessor,
    questions: Sequence[Question],
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
    model: Any, processor: PictureProcessor, questions: Sequence[Question], **options: Any
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
    questions: Sequence[Question],
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

    def answered(question: Question, answer: str) -> Rendered:
        turns = (("user", question.text), ("assistant", answer))
        rendered = render(Conversation(turns, question.pictures), template, tokenizer, token, spans=True)
        [(start, _)] = rendered.answers
        end = rendered.text.index(answer, start) + len(answer)  # the turn's own end is no part of the candidate
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


def _prompts(questions: Sequence[Question], template: str, processor: PictureProcessor) -> list[str]:
    texts = []
    for question in questions:
        try:
            texts.append(render_question(question.text, template, processor.tokenizer, processor.stands.token))
        except UserError as error:
            raise UserError(f"{question.place}: {error}") from error
    return texts


def _pictures(processor: PictureProcessor, questions: Sequence[Question], device: torch.device) -> dict[str, Tensor]:
    """pixel_values (pictures, 3, height, width) fp32 of all pictures in order; nothing if there is none."""
    found = []
    for question in questions:
        try:
            found += [processor.reader(path) for path in question.pictures]
        except UserError as error:
            raise UserError(f"{question.place}: {error}") from error
    return {"pixel_values": torch.stack(found).to(device)} if found else {}
