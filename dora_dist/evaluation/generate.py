"""`generate`: a model's answers to prompts, from a list or a file, in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from dora_dist.data.chats import listed_in
from dora_dist.evaluation.speaking import Sampling, Speaker
from dora_dist.runtime import console
from dora_dist.runtime.errors import UserError
from dora_dist.tasks.prompting.answering import Answer
from dora_dist.tasks.prompting.base import Prompt

WINDOW = 16
"""Batches whose prompts are sorted by length together, so that those of a batch need little padding."""


def generate(
    model_path: str | Path,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    base: str | None = None,
    system: str | None = None,
    format: str | None = None,
    chat_template: str | None = None,
    dtype: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """What a model answers to each prompt: a run, an adapter folder, a merged folder or any model's, in one process.

    Args:
        prompts: texts, or records in the format of the run's training without their answer ({"instruction"},
            {"prompt"}, {"messages"}; of a LLaVA {"text", "image"}). A prompt is rendered as in training.
        base: folder or hub name of the model that an adapter goes on; None: as its run, or else the adapter, says.
        system: what a chat's system turn says, in front of each prompt that has none.
        format, chat_template: as data.format and data.chat_template; None: the run's. Where no run says it, prompts are
            chats if the tokenizer has a chat template, else plain texts ("completion").
        dtype: "bf16", "fp16" or "fp32"; None: bf16, or a LLaVA's run's.
        batch_size: prompts at a time.
        sampling: the fields of `Sampling`: max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed.
            Without temperature, top_p and top_k the likeliest token is taken each time.

    Returns: for each prompt {"prompt": as rendered, "answer", "tokens": how many were written, "ended": "end" or
    "length"}.

    Raises UserError for what is not a model that writes texts, a prompt that cannot be used (by its number) or is too
    long, and NaN in the model. What can be checked without the model's weights is checked before they are read.

    Example::

        [said] = generate("runs/mine", ["Is water wet?"], max_new_tokens=64)
        print(said["answer"])
    """
    chosen = Sampling(**sampling)
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be 1 or more")
    speaker = Speaker(str(model_path), base=base, format=format, chat_template=chat_template, dtype=dtype)
    places = [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    made = made_prompts(speaker, list(zip(places, prompts, strict=True)), system)
    speaker.load()
    answers = list(answered(speaker, made, chosen, batch_size=batch_size, progress=progress))
    return [as_record(prompt, answer) for prompt, answer in zip(made, answers, strict=True)]


def as_record(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    return {"prompt": prompt.text, "answer": answer.text, "tokens": answer.tokens, "ended": answer.ended}


def made_prompts(
    speaker: Speaker,
    located: Sequence[tuple[str, str | Mapping[str, Any]]],
    system: str | None,
) -> list[Prompt]:
    """A prompt of each text or record with its place. Raises UserError, which begins with the place."""
    made = []
    for place, given in located:
        try:
            prompt = _prompt(speaker, given, system)
            speaker.prompting.room(prompt, 1)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        made.append(prompt)
    return made


def _prompt(speaker: Speaker, given: str | Mapping[str, Any], system: str | None) -> Prompt:
    prompting = speaker.prompting
    if isinstance(given, str):
        return prompting.of_turns(prompting.opened(given, system))
    given = {**prompting.prepared(given)}
    for name in (name for name, kind in prompting.fields.items() if kind is list and name in given):
        given[name] = listed_in(given[name])
    if lacking := [name for name in prompting.fields if name not in given]:
        if isinstance(text := given.get("prompt"), str):
            return prompting.of_turns(prompting.opened(text, system))
        raise UserError(f'has no "{lacking[0]}", which prompts of {prompting.name} need; it has {", ".join(given)}')
    for name, kind in prompting.fields.items():
        if not isinstance(given[name], kind):
            raise UserError(f'"{name}" must be a {"list" if kind is list else "string"}')
    return prompting.of_record(given, system)


def answered(
    speaker: Speaker, prompts: Sequence[Prompt], sampling: Sampling, *, batch_size: int, progress: bool
) -> Iterator[Answer]:
    """The answers in the prompts' order, as they come: after each WINDOW of batches."""
    with console.progress(len(prompts), "generating", " prompts", shown=progress) as bar:
        for first in range(0, len(prompts), WINDOW * batch_size):
            part = prompts[first : first + WINDOW * batch_size]
            found: dict[int, Answer] = {}
            for chosen in _batches(speaker, part, sampling.max_new_tokens, batch_size):
                answers = speaker.answers([part[i] for i in chosen], sampling)
                found |= dict(zip(chosen, answers, strict=True))
                bar.update(len(chosen))
            yield from (found[i] for i in range(len(part)))


def _batches(speaker: Speaker, prompts: Sequence[Prompt], longest: int, batch_size: int) -> Iterator[list[int]]:
    """Prompts of similar length, by number. Where the model's positions leave less than `longest` tokens for an answer,
    only prompts of one length: a batch ends where its longest prompt has no more room.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids), reverse=True)
    for _, alike in groupby(order, key=lambda i: speaker.prompting.room(prompts[i], longest)):
        of_room = list(alike)
        yield from (of_room[start : start + batch_size] for start in range(0, len(of_room), batch_size))
