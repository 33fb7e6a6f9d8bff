"""How a record becomes text: prompt strings, and which stretches of the text are answer.

A format is a function from (record, tokenizer, whether the answers' ranges are wanted) to `Rendered`.
Everything that must agree between training and evaluation by likelihood, the prompt and where the answer
starts, is decided here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dora_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The commonsense recipe of Liu et al. (arXiv 2402.09353). The indents and the spaces before line ends belong
# to it; its two prompts differ by one space after "request." and by the blank line.
TRAIN_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.  \n\n"
    "                ### Instruction:\n"
    "                {instruction}\n"
    "                \n"
    "                ### Response:\n"
    "                "
)
GENERATION_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request. \n\n"
    "                ### Instruction:\n"
    "                {instruction}\n"
    "\n"
    "                ### Response:\n"
    "                "
)
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Rendered:
    """One sample as text.

    answers: character ranges [start, stop) of `text` that the model is to produce.
    complete: the text already holds its special tokens (a chat template's does). Otherwise the tokenizer adds
        those it puts in front, and the end-of-sequence token follows the text as part of the answer.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    complete: bool = False


def answered(prompt: str, answer: str) -> Rendered:
    """`prompt` followed by `answer`."""
    return Rendered(prompt + answer, ((len(prompt), len(prompt) + len(answer)),))


def training_prompt(record: dict[str, Any]) -> str:
    """The commonsense training text up to the first character of the output."""
    return TRAIN_PROMPT.format(instruction=_instruction(record))


def generation_prompt(record: dict[str, Any]) -> str:
    """The prompt that the paper's evaluation lets the model continue."""
    return GENERATION_PROMPT.format(instruction=_instruction(record))


def _instruction(record: dict[str, Any]) -> str:
    if record.get("input"):
        raise UserError('the instruction format has no place for a non-empty "input"; use format "alpaca"')
    return record["instruction"]


def _instruction_format(record: dict[str, Any], tokenizer: PreTrainedTokenizerFast, spans: bool) -> Rendered:
    return answered(training_prompt(record), record["output"])


def _alpaca_format(record: dict[str, Any], tokenizer: PreTrainedTokenizerFast, spans: bool) -> Rendered:
    text = record.get("input") or ""
    template = ALPACA_PROMPT_WITH_INPUT if text else ALPACA_PROMPT
    return answered(template.format(instruction=record["instruction"], input=text), record["output"])


def _completion_format(record: dict[str, Any], tokenizer: PreTrainedTokenizerFast, spans: bool) -> Rendered:
    return answered(record["prompt"], record["completion"])


def _messages_format(record: dict[str, Any], tokenizer: PreTrainedTokenizerFast, spans: bool) -> Rendered:
    if not tokenizer.chat_template:
        raise UserError(
            'format "messages" needs a tokenizer with a chat template and this one has none; '
            'give the tokenizer of an instruction-tuned model, or use format "alpaca"'
        )
    _check_messages(record["messages"])
    return templated(record["messages"], tokenizer, spans)


def templated(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, spans: bool) -> Rendered:
    """The conversation under the tokenizer's chat template; assistant turns are the answers.

    A turn's range is found by templating the messages before it (with the generation prompt) and up to it:
    both must begin the whole text, else the template rewrites earlier turns and no range can be trusted.
    """
    text = _template(tokenizer, messages)
    answers = []
    for turn, message in enumerate(messages):
        if not spans or message["role"] != "assistant":
            continue
        if turn == 0:
            raise UserError('the first message is the assistant\'s, which answers nothing; set data.loss_on to "all"')
        before = _template(tokenizer, messages[:turn], add_generation_prompt=True)
        upto = _template(tokenizer, messages[: turn + 1])
        if not (text.startswith(upto) and upto.startswith(before)):
            raise UserError(
                f"the tokenizer's chat template writes message {turn + 1} differently when later messages "
                "follow or when it asks for an answer, so the assistant's turns cannot be told apart; set "
                'data.loss_on to "all", or give a tokenizer whose template keeps earlier text as it is'
            )
        answers.append((len(before), len(upto)))
    return Rendered(text, tuple(answers), complete=True)


def templated_prompt(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> str:
    """The conversation under the tokenizer's chat template, up to where the assistant answers its last message."""
    return _template(tokenizer, messages, add_generation_prompt=True)


def _check_messages(messages: list[Any]) -> None:
    if not messages:
        raise UserError('"messages" is empty')
    for turn, message in enumerate(messages, start=1):
        fields = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None,)
        if not all(isinstance(field, str) for field in fields):
            raise UserError(f'message {turn} must be an object with the strings "role" and "content"')


def _template(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], add_generation_prompt: bool = False
) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError) as error:  # such as text + list, where it knows no typed parts
        raise UserError(f"the tokenizer's chat template refuses these messages: {error}") from error
    return str(text)


Format = Callable[[dict[str, Any], "PreTrainedTokenizerFast", bool], Rendered]
FORMATS: dict[str, Format] = {
    "instruction": _instruction_format,
    "alpaca": _alpaca_format,
    "completion": _completion_format,
    "messages": _messages_format,
}
ANSWER_FIELDS = {"instruction": "output", "alpaca": "output", "completion": "completion"}
"""Where a record of each single-answer format holds its answer."""


def candidate(record: dict[str, Any], format: str, answer: str, tokenizer: PreTrainedTokenizerFast) -> Rendered:
    """The record as training would see it, had it this answer."""
    return FORMATS[format]({**record, ANSWER_FIELDS[format]: answer}, tokenizer, True)
