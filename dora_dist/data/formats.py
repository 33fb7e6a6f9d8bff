"""Formats of records of texts: what a record must have, its prompt, and which stretches of its text are answer.

A format is an object in FORMATS. Everything that must agree between training and evaluation by likelihood, the prompt
and where the answer starts, is decided here and nowhere else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dora_dist.config.mixture import checked, formats_of
from dora_dist.config.names import SPEAKERS
from dora_dist.config.templates import PromptTemplate
from dora_dist.data.chats import Chat, listed_in, read_chat, texts_of
from dora_dist.data.files import shown
from dora_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dora_dist.config import DataConfig

Record = dict[str, Any]

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


ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython")
"""Roles of messages; a chat template may name others."""


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


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


def training_prompt(record: Record) -> str:
    """The commonsense training text up to the first character of the output."""
    return TRAIN_PROMPT.format(instruction=_instruction(record))


def generation_prompt(record: Record) -> str:
    """The prompt that the paper's evaluation lets the model continue."""
    return GENERATION_PROMPT.format(instruction=_instruction(record))


def _instruction(record: Record) -> str:
    if _input(record):
        raise UserError('the instruction format has no place for a non-empty "input"; use format "alpaca"')
    return record["instruction"]


def _input(record: Record) -> str:
    text = record.get("input")
    if not isinstance(text, str | None):
        raise UserError(f'"input" must be a string, found {shown(text)}')
    return text or ""


def _alpaca(record: Record) -> str:
    text = _input(record)
    template = ALPACA_PROMPT_WITH_INPUT if text else ALPACA_PROMPT
    return template.format(instruction=record["instruction"], input=text)


def templated(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    spans: bool,
    *,
    learnt: Sequence[bool] | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> Rendered:
    """The conversation under the tokenizer's chat template; the answers are the turns that are `learnt`.

    learnt: by default the assistant's. A turn's range is found by templating the messages before it (with the
    generation prompt, if it is the assistant's) and up to it: both must begin the whole text, else the template
    rewrites earlier turns, and only ranges that it marks itself ({% generation %}) can be trusted. Of another role's
    turn the answer begins with the content, where that is to be found.
    """
    text = _template(tokenizer, messages, tools)
    answers = []
    for turn, message in enumerate(messages):
        assistant = message["role"] == "assistant"
        if not spans or not (assistant if learnt is None else learnt[turn]):
            continue
        if assistant and turn == 0:
            raise UserError('the first message is the assistant\'s, which answers nothing; set data.loss_on to "all"')
        before = _template(tokenizer, messages[:turn], tools, add_generation_prompt=assistant) if turn else ""
        upto = _template(tokenizer, messages[: turn + 1], tools)
        if not (text.startswith(upto) and upto.startswith(before)):
            answers.append(_marked_by_template(tokenizer, messages, tools, turn=turn))
        elif assistant:
            answers.append((len(before), len(upto)))
        else:
            answers.append((max(upto.find(message["content"].strip(), len(before)), len(before)), len(upto)))
    return Rendered(text, tuple(answers), complete=True)


def _marked_by_template(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    *,
    turn: int,
) -> tuple[int, int]:
    """The range of an assistant's turn as the template's {% generation %} marks it. Raises UserError if none does."""
    template = tokenizer.get_chat_template(None, tools)
    if _GENERATION.search(template) and messages[turn]["role"] == "assistant":
        from transformers.utils.chat_template_utils import render_jinja_template

        settings: dict[str, Any] = {**tokenizer.special_tokens_map, "chat_template": template, "tools": tools}
        rendered: Any = render_jinja_template([messages], return_assistant_tokens_mask=True, **settings)
        [marked] = rendered[1]
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if len(marked) == len(turns):
            start, stop = marked[turns.index(turn)]
            return start, stop
    raise UserError(
        f"the tokenizer's chat template writes message {turn + 1} differently when later messages "
        "follow or when it asks for an answer, so the assistant's turns cannot be told apart; set "
        'data.loss_on to "all", or give a tokenizer whose template keeps earlier text as it is, or marks what the '
        "assistant says with {% generation %}"
    )


def templated_prompt(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, tools: list[dict[str, Any]] | None = None
) -> str:
    """The conversation under the tokenizer's chat template, up to where the assistant answers its last message."""
    return _template(tokenizer, messages, tools, add_generation_prompt=True)


def check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise UserError unless the tokenizer has a chat template, and one that is valid Jinja."""
    if not tokenizer.chat_template:
        raise UserError(
            'data.format = "messages": the tokenizer has no chat template; give that of an instruction-tuned model in '
            "model.tokenizer, put a chat_template.jinja into its folder, or use another format"
        )
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(
            f"model.tokenizer: its chat template is not valid Jinja (line {error.lineno}: {error.message}); correct "
            "chat_template.jinja, or chat_template in tokenizer_config.json"
        ) from error
    except Exception:  # one user's turn may be too little for it; what the records get is said with their place
        return


def _check_roles(messages: list[dict[str, Any]], template: str) -> None:
    for turn, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in ROLES and not re.search(rf"['\"]{re.escape(role)}['\"]", template):
            near = SPEAKERS.get(role.lower()) or next(iter(difflib.get_close_matches(role.lower(), ROLES, n=1)), None)
            raise UserError(
                f'message {turn} has the role "{role}", which is none of {", ".join(ROLES)}, and which the chat '
                "template does not name" + (f' (did you mean "{near}"?)' if near else "")
            )


def _template(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    from jinja2 import TemplateError

    try:
        known: dict[str, Any] = {"tools": tools, "add_generation_prompt": add_generation_prompt}
        text = tokenizer.apply_chat_template(messages, tokenize=False, **known)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # What it raises itself, or what is wrong in it: such as text + list, where it knows no typed parts.
        raise UserError(f"the tokenizer's chat template refuses these messages: {error}") from error
    return str(text)


@dataclass(frozen=True, kw_only=True)
class Format:
    """How records of one format become texts.

    fields: what a record must have, and of which type. learnt: words for what is learnt of it. render: the text of a
    record, for a tokenizer; the flag says whether the answers' ranges are wanted. It raises UserError for a record that
    cannot be used. texts: what a record asks, and what it answers, without what the format adds. check: raises
    UserError for a tokenizer that cannot be used. answer_field: where a record holds its answer; None: in several
    places. may_be_empty: whether all answers may be empty where prompts are learnt, too. configured: the format as
    the data section sets it up, where there is something to set up. named_by: fields of the configuration that name
    `fields`, where some do.
    """

    fields: Mapping[str, type]
    learnt: str
    render: Callable[[Record, PreTrainedTokenizerFast, bool], Rendered]
    texts: Callable[[Record], tuple[list[str], list[str]]]
    check: Callable[[PreTrainedTokenizerFast], None] = lambda tokenizer: None
    answer_field: str | None = None
    may_be_empty: bool = False
    named_by: Mapping[str, str] = field(default_factory=dict)
    configured: Callable[[DataConfig], Format] | None = None

    def of(self, data: DataConfig) -> Format:
        """The format as the data section sets it up."""
        return self if self.configured is None else self.configured(data)


def prompted(
    prompt: Callable[[Record], str], *asked: str, answer: str, optional: Sequence[str] = (), may_be_empty: bool = False
) -> Format:
    """A prompt made of the fields `asked`, of which a record may lack those that are `optional`, and an answer."""
    return Format(
        fields=dict.fromkeys([*(field for field in asked if field not in optional), answer], str),
        learnt=f'"{answer}"',
        render=lambda record, tokenizer, spans: answered(prompt(record), record[answer]),
        texts=lambda record: ([record.get(field) or "" for field in asked], [record[answer]]),
        answer_field=answer,
        may_be_empty=may_be_empty,
    )


def _conversation(
    record: Record, tokenizer: PreTrainedTokenizerFast, spans: bool, *, field: str, roles: tuple[str, ...]
) -> Rendered:
    check_template(tokenizer)
    chat = read_chat(record, field)
    _check_roles(chat.messages, str(tokenizer.chat_template))
    if not spans and any(mark is not None for mark in chat.marks):
        raise UserError(
            'some of its messages say by "weight" or "train" whether they are learnt, and data.loss_on = "all" learns '
            'everything; set data.loss_on to "answer"'
        )
    return templated(chat.messages, tokenizer, spans, learnt=chat.learnt(roles), tools=chat.tools)


def _sides(record: Record, *, field: str, roles: tuple[str, ...]) -> tuple[list[str], list[str]]:
    sides: tuple[list[str], list[str]] = ([], [])
    chat: Chat = read_chat(record, field)
    for message, learnt in zip(chat.messages, chat.learnt(roles), strict=True):
        sides[learnt].append(texts_of(message))
    return sides


def _chats(field: str, roles: tuple[str, ...] = ("assistant",)) -> Format:
    """Conversations in a field of the record, of which the turns of some roles are learnt."""
    return Format(
        fields={field: list},
        learnt="the text of the assistant" if roles == ("assistant",) else f"the text of {' and '.join(roles)}",
        render=partial(_conversation, field=field, roles=roles),
        texts=partial(_sides, field=field, roles=roles),
        check=check_template,
        configured=lambda data: _chats(field, tuple(data.train_on)),
    )


def _templated(data: DataConfig) -> Format:
    """Records under data.prompt_template, with their answer in data.answer_field."""
    template = PromptTemplate.of(data.prompt_template or "")
    named = dict.fromkeys(template.fields, "data.prompt_template") | {data.answer_field: "data.answer_field"}
    return replace(prompted(template.filled, *template.fields, answer=data.answer_field), named_by=named)


def asked_as(data: Mapping[str, Any]) -> tuple[str | None, Callable[[Record], Record] | None]:
    """The format by which a model is asked whose run had this data section, and what makes records records of it.

    Raises UserError where the sources of a mixture are asked in several ways.
    """
    found = formats_of(checked(data.get("train")), data.get("format") or "")
    ways = {_ASKED_AS.get(name, name) for name in found}
    if len(ways) > 1 or {"template", "completion"} <= found:
        raise UserError(
            f"data.train of the run has sources of several formats ({', '.join(sorted(found))}); say with --format "
            f"which of them is meant: {' or '.join(sorted(ways))}"
        )
    way = ways.pop() or None
    if "sharegpt" in found:
        return way, _as_messages
    if "template" in found:
        return way, partial(_as_completion, PromptTemplate.of(data["prompt_template"]), data["answer_field"])
    return way, None


_ASKED_AS = {"sharegpt": "messages", "template": "completion"}


def _as_messages(record: Record) -> Record:
    if "conversations" not in record:
        return record
    if not isinstance(turns := listed_in(record["conversations"]), list):
        raise UserError(f'"conversations" must be a list, found {shown(turns)}')
    return {**record, "messages": read_chat({**record, "conversations": turns}, "conversations").messages}


def _as_completion(template: PromptTemplate, answer: str, record: Record) -> Record:
    if isinstance(record.get("prompt"), str) and not any(name in record for name in template.fields):
        if len(template.fields) > 1:
            raise UserError(
                f"data.prompt_template of the run has several fields ({', '.join(template.fields)}), and a text is "
                "one; give records with all of them (generate --file), or the whole prompt with --format completion"
            )
        record = {**record, template.fields[0]: record["prompt"]}  # a text that was typed
    missing = [name for name in template.fields if not isinstance(record.get(name), str)]
    if missing:
        raise UserError(f'has no text in "{missing[0]}", which data.prompt_template of the run names')
    if not isinstance(record.get(answer, ""), str):
        raise UserError(f'"{answer}" (data.answer_field of the run) must be a string, found {shown(record[answer])}')
    there = {"completion": record[answer]} if answer in record else {}
    return {**record, "prompt": template.filled(record), **there}


FORMATS: dict[str, Format] = {
    "instruction": prompted(training_prompt, "instruction", answer="output"),
    "alpaca": prompted(_alpaca, "instruction", "input", answer="output", optional=["input"]),
    "completion": prompted(lambda record: record["prompt"], "prompt", answer="completion", may_be_empty=True),
    "messages": _chats("messages"),
    "sharegpt": _chats("conversations"),
    "template": replace(
        prompted(lambda record: "", answer="output"), answer_field=None, configured=_templated
    ),  # as the data section says
}
ANSWER_FIELDS = {name: format.answer_field for name, format in FORMATS.items() if format.answer_field is not None}
"""Where a record of each single-answer format holds its answer."""


def candidate(record: Record, format: str, answer: str, tokenizer: PreTrainedTokenizerFast) -> Rendered:
    """The record as training would see it, had it this answer."""
    return FORMATS[format].render({**record, ANSWER_FIELDS[format]: answer}, tokenizer, True)
