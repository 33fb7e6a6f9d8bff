"""Free answers: what each record asks under its format, its reference, and how a model's own text and the
reference's likelihood are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dora_dist.data.chats import read_chat
from dora_dist.data.formats import ANSWER_FIELDS, Rendered, candidate, templated, templated_prompt
from dora_dist.data.records import Record
from dora_dist.runtime.errors import UserError
from dora_dist.tasks.evaluations.commonsense import PAPER_TASKS
from dora_dist.tasks.evaluations.generation import generate_texts
from dora_dist.tasks.evaluations.likelihood import answer_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAPER, CHAT = "instruction", "messages"
ANSWERED = {**ANSWER_FIELDS, CHAT: None}
"""Formats of records that have an answer, and the field that holds it; a chat's is its last assistant turn."""


@dataclass(frozen=True)
class Exchange:
    """A prompt and one answer to it, as training would see them: `text[start:stop]` is the answer's own words.

    What lies before, back to the end of `prompt`, and behind it is what the chat template writes around an answer.
    """

    prompt: str
    text: str
    start: int
    stop: int
    complete: bool

    @property
    def words(self) -> str:
        return self.text[self.start : self.stop]

    @property
    def lead(self) -> str:
        return self.text[len(self.prompt) : self.start]

    @property
    def end(self) -> str:
        return self.text[self.stop :]

    def rendered(self, with_end: bool) -> Rendered:
        """For training's loss, or (without the turn's end) for the comparison of candidates."""
        answers = ((len(self.prompt), len(self.text) if with_end else self.stop),)
        return Rendered(self.text, answers, self.complete)


def reference(record: Record, format: str) -> str:
    """The answer that a record has: of a chat the last assistant turn. Raises UserError if there is none."""
    if format != CHAT:
        return str(record[ANSWER_FIELDS[format]])
    _, turn, _ = _last_turn(record)
    if turn.get("tool_calls") and not turn["content"]:
        raise UserError("its last assistant turn is a tool call, which has no words to compare with; take the turn out")
    return str(turn["content"])


def exchange(record: Record, format: str, answer: str, tokenizer: PreTrainedTokenizerFast) -> Exchange:
    """The record's prompt with `answer`; of a chat everything before its last assistant turn, under the template.

    Raises UserError where an answer has no words, and where the template writes the prompt differently once an answer
    follows.
    """
    if not answer.strip():
        raise UserError("its answer is empty: there is nothing to compare with")
    if format != CHAT:
        rendered = candidate(record, format, answer, tokenizer)
        [(start, stop)] = rendered.answers
        if not rendered.text[:start].strip():
            raise UserError("its prompt is empty: there is nothing to answer")
        return Exchange(rendered.text[:start], rendered.text, start, stop, complete=False)
    if not tokenizer.chat_template:
        raise UserError(
            "--format messages: the tokenizer has no chat template; evaluate a model whose tokenizer has one, or give "
            "another --format"
        )
    before, turn, tools = _last_turn(record)
    prompt = templated_prompt(before, tokenizer, tools)
    text = templated([*before, {**turn, "content": answer}], tokenizer, False, tools=tools).text
    words = answer.strip()  # many templates trim
    start = text.find(words, len(prompt))
    if not text.startswith(prompt) or start < 0:
        raise UserError(
            "the tokenizer's chat template writes the messages before the answer differently when the answer follows, "
            "so that prompt and answer cannot be told apart; give a tokenizer whose template keeps it as it is"
        )
    return Exchange(prompt, text, start, start + len(words), complete=True)


def _last_turn(record: Record) -> tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, Any]] | None]:
    """The messages before the last one of the assistant, that one, and the tools; what follows it is left out."""
    chat = read_chat(record, CHAT)
    messages = chat.messages
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    if not last:
        raise UserError('"messages" has no assistant turn that answers something; the last one is the reference')
    return messages[:last], messages[last], chat.tools


@dataclass(frozen=True)
class AnswerScores:
    """Metrics of one task's answers, and what the model said to each record (nothing if it only read)."""

    metrics: dict[str, float]
    texts: list[str]


def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    exchanges: Sequence[Exchange],
    *,
    gold: Sequence[str],
    task: str,
    generate: bool,
    batch_size: int,
    num_beams: int = 1,
    max_new_tokens: int = 64,
    advance: Callable[[int], object] = lambda records: None,
) -> AnswerScores:
    """How well a model in evaluation mode answers; `gold` is what each answer must be (`gold_answers`).

    "loss" is the mean over the references' tokens, the end of the answer included, as in training with loss_on
    "answer", and "perplexity" its exponential. With `generate`, "exact_match": how often the model's own text equals
    the reference, but for blanks; of one of the paper's tasks "accuracy", how often its first label does. `advance`
    is called with the number of records finished, as they are (with `generate`, of texts generated).
    """
    metrics: dict[str, float] = {}
    texts: list[str] = []
    if generate:
        search = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        texts = _generated(model, tokenizer, exchanges, advance, **search)
        metrics = _comparison(texts, gold, task)
    rendered = [each.rendered(with_end=True) for each in exchanges]
    seen: Callable[[int], object] = (lambda records: None) if generate else advance
    scores = answer_log_probs(model, tokenizer, rendered, batch_size=batch_size, advance=seen)
    loss = -sum(total for total, _ in scores) / sum(count for _, count in scores)
    metrics |= {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    return AnswerScores(metrics, texts)


def gold_answers(
    task: str, places: Sequence[str], records: Sequence[Record], exchanges: Sequence[Exchange]
) -> list[str]:
    """What each answer is compared with: the reference, or of one of the paper's tasks the label in "answer" or in it.

    Raises UserError for a record of such a task that has no label.
    """
    if task not in PAPER_TASKS:
        return [each.words for each in exchanges]
    known = PAPER_TASKS[task]
    gold = []
    for place, record, each in zip(places, records, exchanges, strict=True):
        label = record.get("answer", known.find(each.words))
        if label not in known.labels:
            raise UserError(
                f'{place}: its answer {each.words!r} has no label of task "{task}" ({", ".join(known.labels)}); give '
                "the task another name with --tasks NAME=FILE, and its whole answers are compared"
            )
        gold.append(str(label))
    return gold


def _comparison(texts: Sequence[str], gold: Sequence[str], task: str) -> dict[str, float]:
    if task in PAPER_TASKS:
        found: list[str | None] = [PAPER_TASKS[task].find(text) for text in texts]
        name = "accuracy"
    else:
        found, gold, name = [_plain(text) for text in texts], [_plain(text) for text in gold], "exact_match"
    correct = sum(text == wanted for text, wanted in zip(found, gold, strict=True))
    return {name: correct / len(gold), "correct": correct, "total": len(gold)}


def _plain(text: str) -> str:
    return " ".join(text.split())


def _generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    exchanges: Sequence[Exchange],
    advance: Callable[[int], object],
    **search: int,
) -> list[str]:
    """The model's answers in their own words: what the template writes around an answer is taken off."""
    ends, stop = turn_ends(exchanges, tokenizer)
    texts = generate_texts(
        model,
        tokenizer,
        [each.prompt for each in exchanges],
        complete=exchanges[0].complete,
        ends=ends,
        stop=stop,
        advance=advance,
        **search,
    )
    leads = [_decoded(tokenizer, each.lead).strip() for each in exchanges]
    cut = [text.partition(stop)[0] if stop else text for text in texts]
    return [text.strip().removeprefix(lead).strip() for text, lead in zip(cut, leads, strict=True)]


def _decoded(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def turn_ends(exchanges: Sequence[Exchange], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], str | None]:
    """What ends an assistant's turn: the special tokens that the chat template has there (which need not be the
    tokenizer's end of sequence), or, where it has none, the text that it has there, unless answers hold that, too."""
    ends: dict[int, None] = {}
    stops: dict[str, None] = {}
    for each in exchanges if exchanges[0].complete else ():
        ids = tokenizer(each.end.strip(), add_special_tokens=False).input_ids
        if ids and ids[0] in tokenizer.added_tokens_decoder:
            ends[ids[0]] = None
        elif each.end:
            stops[each.end] = None
    usable = [stop for stop in stops if not ends and not any(stop in each.words for each in exchanges)]
    return list(ends), usable[0] if len(usable) == 1 else None
