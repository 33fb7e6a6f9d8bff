"""Records for other tasks than plain texts that cannot be meant, or probably are not."""

from typing import Any

from dora_dist.runtime.exit_codes import DONE, USERS_MISTAKE
from tests import encoders, summaries
from tests.bad_inputs.case import Folder, Table, Words
from tests.bad_inputs.records import Fields, Says, add, add_of_task, lines, validated

CASES = Table()

# ------------------------------------------------------------------------------------------------------ chats

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "is 1 even?"}, {"role": "assistant", "content": "false"}


def chats(name: str, says: Says, *turns: Any, template: str | None = TEMPLATE, code: int = USERS_MISTAKE) -> None:
    """A good conversation and one with these turns: refused in training, or warned of when it is looked at."""

    def make(folder: Folder) -> Words:
        folder.base()
        if template is not None:
            folder.text("base/chat_template.jinja", template)
        folder.text("a.jsonl", lines({"messages": [USER, ANSWER]}, {"messages": turns}))
        data = {"train": "a.jsonl", "validation_samples": 0, "format": "messages", "loss_on": "answer"}
        if code == DONE:
            return validated(folder, data=data)
        return folder.run(data=data)

    add(CASES, name, make, says, code)


chats(
    "no_template",
    ('data.format = "messages": the tokenizer has no chat template', "model.tokenizer"),
    USER,
    ANSWER,
    template=None,
)
chats(
    "broken_template",
    "model.tokenizer: its chat template is not valid Jinja (line 2: ",
    USER,
    ANSWER,
    template="\n{% for m in messages %}{{ m.content }",
)
chats(
    "raising_template",
    "a.jsonl, line 1: the tokenizer's chat template refuses these messages: no system here",
    USER,
    ANSWER,
    template="{{ raise_exception('no system here') }}",
)
chats(
    "failing_template",
    "a.jsonl, line 1: the tokenizer's chat template refuses these messages: unsupported operand",
    USER,
    ANSWER,
    template="{{ messages[0].content / 2 }}",
)
chats(
    "template_that_rewrites",
    "line 1: the tokenizer's chat template writes message 2 differently",
    USER,
    ANSWER,
    template="{{ messages | length }}" + TEMPLATE,
)
chats(
    "unknown_role",
    'a.jsonl, line 2: message 2 has the role "gpt", which is none of system, user, assistant',
    USER,
    {**ANSWER, "role": "gpt"},
)
chats("role_in_capitals", '(did you mean "assistant"?)', USER, {**ANSWER, "role": "Assistant"})
chats(
    "picture_in_content",
    "a.jsonl, line 2: message 1 has a picture in its content; pictures are for model.task",
    {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]},
    ANSWER,
)
chats(
    "untyped_part",
    'a.jsonl, line 2: message 1 has a part of its content that is not {"type": "text", "text": "..."}',
    {"role": "user", "content": [{"text": "x"}]},
    ANSWER,
)
chats(
    "null_content",
    'a.jsonl, line 2: message 2 must have a string "content", found null',
    USER,
    {**ANSWER, "content": None},
)
chats("sharegpt", 'a.jsonl, line 2: message 1 must have a string "value", found 1', {"from": "human", "value": 1})
chats("neither_form", 'a.jsonl, line 2: message 1 must have a string "role"', {"speaker": "human", "value": "x"})
chats("turn_of_text", 'a.jsonl, line 2: message 1 must be an object with "role" and "content", found "x"', "x")
chats("no_turns", 'a.jsonl, line 2: "messages" is empty')
chats("assistant_first", "a.jsonl, line 2: the first message is the assistant's, which answers nothing", ANSWER)
chats(
    "half_a_character_in_chat", "a.jsonl, line 2 holds half a character (\\ud800", {**USER, "content": "\ud800"}, ANSWER
)
chats(
    "empty_turn",
    "data.train: the text of the assistant of 1 of 2 records is empty (first: a.jsonl, line 2)",
    USER,
    {**ANSWER, "content": ""},
    code=DONE,
)
chats(
    "control_tokens_in_chat",
    "the text of 1 of 2 records holds special tokens (</s>; first: a.jsonl, line 2)",
    {**USER, "content": "a </s> b"},
    ANSWER,
    code=DONE,
)

# ------------------------------------------------------------------------------------- labels, answers, summaries


PAIRS = {"format": "classification", "text_fields": ["sentence1", "sentence2"]}


def labelled(
    name: str,
    change: Fields,
    says: str,
    *,
    drop: str = "",
    num_labels: int = 2,
    code: int = USERS_MISTAKE,
    **data: Any,
) -> None:
    """Four labelled records, the third changed, or with a field dropped."""
    rows: list[Fields] = encoders.labelled(4)
    rows[2] |= change
    rows[2].pop(drop, None)
    model = {"task": "sequence_classification", "num_labels": num_labels}
    add_of_task(CASES, name, rows, says, model=model, code=code, **{**PAIRS, **data})


NAMES = 'it has "sentence1", "sentence2", "label": set'
labelled(
    "label_out_of_range",
    {"label": 2},
    'a.jsonl, line 3: "label" is 2; with model.num_labels = 2 it must be a whole number from 0 to 1',
)
labelled("hidden_label", {"label": -1}, "(a test split hides its labels)")
labelled("float_label", {"label": 0.5}, '"label" is 0.5; with model.num_labels = 2 it must be a whole number')
labelled("named_label", {"label": "positive"}, "\"label\" is 'positive'; with model.num_labels = 2")
labelled("truth_as_label", {"label": True}, '"label" is True; with model.num_labels = 2')
labelled("null_label", {"label": None}, 'a.jsonl, line 3: "label" is null')
labelled("no_label", {}, 'a.jsonl, line 3 has no "label"', drop="label")
labelled(
    "nan_rating", {"label": float("nan")}, '"label" is nan; with model.num_labels = 1 it must be a number', num_labels=1
)
labelled(
    "unknown_text_field",
    {},
    f'line 1 has no "sentense1"; this format needs "sentense1", "label"; {NAMES} data.text_fields (did you mean "',
    text_fields=["sentense1"],
)
labelled(
    "unknown_label_field",
    {},
    f'a.jsonl, line 1 has no "class"; this format needs "sentence1", "sentence2", "class"; {NAMES} data.label_field',
    label_field="class",
)
labelled("number_for_sentence", {"sentence2": 3}, 'a.jsonl, line 3: "sentence2" must be a string, found 3')
labelled("half_a_character_in_sentence", {"sentence1": "\udfff"}, 'a.jsonl, line 3: "sentence1" holds half a character')
labelled(
    "label_that_never_comes",
    {},
    'data.train: "label" is never 2; model.num_labels = 3 counts labels from 0',
    num_labels=3,
    code=DONE,
)
labelled(
    "empty_text",
    {"sentence1": "", "sentence2": " "},
    "data.train: the text of 1 of 4 records is empty (first: a.jsonl, line 3)",
    code=DONE,
)
labelled(
    "control_tokens_in_text",
    {"sentence1": "a [SEP] b"},
    "the text of 1 of 4 records holds special tokens ([SEP]; first: a.jsonl, line 3)",
    code=DONE,
)
CLASSIFIER = {"task": "sequence_classification"}
add_of_task(
    CASES,
    "single_class",
    [{**row, "label": 0} for row in encoders.labelled(4)],
    'data.train: "label" is 0 in all 4 records; nothing tells labels apart there',
    model=CLASSIFIER,
    code=DONE,
    **PAIRS,
)
add_of_task(
    CASES,
    "single_rating",
    [{**row, "label": 0.5} for row in encoders.labelled(4)],
    'data.train: "label" is 0.5 in all 4 records',
    model={**CLASSIFIER, "num_labels": 1},
    code=DONE,
    **PAIRS,
)


def squad(name: str, change: Fields, says: str, **answers: Any) -> None:
    """Three questions, the second changed, or its answers."""
    rows = encoders.questions(3)
    rows[1] |= change
    if answers:
        rows[1]["answers"] = {**rows[1]["answers"], **answers}
    add_of_task(CASES, name, rows, says, model={"task": "question_answering"}, format="squad", doc_stride=6)


squad(
    "answer_elsewhere",
    {},
    "line 2: the answer 'weak very' is not at character 3 of \"context\" (it is at 37)",
    answer_start=[3],
)
squad("answer_nowhere", {}, "(it is nowhere in it)", text=["superb"])
squad("start_as_text", {}, 'line 2: "answer_start" holds "37", and must hold whole numbers from 0', answer_start=["37"])
squad("start_from_the_end", {}, 'line 2: "answer_start" holds -3', answer_start=[-3])
squad(
    "starts_without_answers",
    {},
    'line 2: "answers" must be {"text": [...], "answer_start": [...]}, lists of one length',
    text=[],
)
squad("answer_of_no_words", {}, 'line 2: "text" of "answers" holds 7, and must hold words of "context"', text=[7])
squad("answers_as_list", {"answers": ["weak"]}, 'line 2: "answers" must be an object, found ["weak"]')
squad("question_null", {"question": None}, 'line 2: "question" is null')
add_of_task(
    CASES,
    "original_squad",
    [{"title": "x", "paragraphs": []}],
    'line 1 has no "question"; this format needs "question", "context", "answers"; it has "title", "paragraphs"',
    model={"task": "question_answering"},
    format="squad",
    doc_stride=6,
)
add_of_task(
    CASES,
    "no_answers_at_all",
    encoders.questions(4)[3:] * 2,
    "data.train: none of its 2 questions has an answer (a test split hides them)",
    model={"task": "question_answering"},
    code=DONE,
    format="squad",
    doc_stride=6,
)

SUMMARIES: Fields = {"format": "summarisation", "text_fields": ["document"], "label_field": "summary", "target_len": 12}
WRITER = {"task": "seq2seq_lm"}
add_of_task(
    CASES,
    "no_summary",
    [{"document": "x"}],
    'a.jsonl, line 1 has no "summary"; this format needs "document", "summary"; it has "document": set data.',
    model=WRITER,
    **SUMMARIES,
)
add_of_task(
    CASES,
    "every_summary_empty",
    [{"document": "x", "summary": ""}] * 2,
    'data.train: "document" or "summary" of every record is empty',
    model=WRITER,
    **SUMMARIES,
)
add_of_task(
    CASES,
    "list_of_summaries",
    [{"document": "x", "summary": ["y"]}],
    '"summary" must be a string, found ["y"]',
    model=WRITER,
    **SUMMARIES,
)
add_of_task(
    CASES,
    "one_summary_empty",
    [*summaries.records(3), {"document": "x", "summary": " "}],
    'data.train: "document" or "summary" of 1 of 4 records is empty (first: a.jsonl, line 4)',
    model=WRITER,
    code=DONE,
    **SUMMARIES,
)
add_of_task(
    CASES,
    "long_summaries",
    [{"document": "x", "summary": "very long" * 20}] * 2,
    "data.train: 2 of 2 samples (100%) are longer than data.target_len = 12 tokens and lose their end",
    model=WRITER,
    code=DONE,
    **SUMMARIES,
)
