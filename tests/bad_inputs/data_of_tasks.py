"""Records for other tasks than plain texts that cannot be meant, or probably are not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py

from dora_dist.runtime.exit_codes import DONE, USERS_MISTAKE
from tests import encoders, llava, subtasks, summaries
from tests.bad_inputs.case import Folder, Table, Words
from tests.bad_inputs.records import Fields, Says, add, lines, validated

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


def other_task(name: str, rows: list[Any], says: Says, model: Fields, code: int = USERS_MISTAKE, **data: Any) -> None:
    """Records for another task: refused in training, or warned of when they are looked at."""

    def make(folder: Folder) -> Words:
        task = model["task"]
        base = {
            "seq2seq_lm": lambda: folder.made("bart", summaries.base_model),
            "image_text_to_text": lambda: folder.made("llava", llava.model),
        }.get(task, lambda: folder.made("bert", encoders.plain_encoder))()
        if task == "image_text_to_text":
            llava.pictures(folder / "pictures", 2)
        folder.text("a.jsonl", lines(*rows))
        sections: dict[str, Fields] = {
            "model": {"path": base.name, **model},
            "adapter": {"target_modules": None},
            "data": {"train": "a.jsonl", "validation_samples": 0, "cutoff_len": 48, **data},
            "training": {"global_batch_size": 2},
        }
        return validated(folder, **sections) if code == DONE else folder.run(**sections)

    add(CASES, name, make, says, code)


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
    other_task(name, rows, says, model, code, **{**PAIRS, **data})


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
other_task(
    "single_class",
    [{**row, "label": 0} for row in encoders.labelled(4)],
    'data.train: "label" is 0 in all 4 records; nothing tells labels apart there',
    CLASSIFIER,
    DONE,
    **PAIRS,
)
other_task(
    "single_rating",
    [{**row, "label": 0.5} for row in encoders.labelled(4)],
    'data.train: "label" is 0.5 in all 4 records',
    {**CLASSIFIER, "num_labels": 1},
    DONE,
    **PAIRS,
)


def squad(name: str, change: Fields, says: str, **answers: Any) -> None:
    """Three questions, the second changed, or its answers."""
    rows = encoders.questions(3)
    rows[1] |= change
    if answers:
        rows[1]["answers"] = {**rows[1]["answers"], **answers}
    other_task(name, rows, says, {"task": "question_answering"}, format="squad", doc_stride=6)


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
other_task(
    "original_squad",
    [{"title": "x", "paragraphs": []}],
    'line 1 has no "question"; this format needs "question", "context", "answers"; it has "title", "paragraphs"',
    {"task": "question_answering"},
    format="squad",
    doc_stride=6,
)
other_task(
    "no_answers_at_all",
    encoders.questions(4)[3:] * 2,
    "data.train: none of its 2 questions has an answer (a test split hides them)",
    {"task": "question_answering"},
    DONE,
    format="squad",
    doc_stride=6,
)

SUMMARIES: Fields = {"format": "summarisation", "text_fields": ["document"], "label_field": "summary", "target_len": 12}
WRITER = {"task": "seq2seq_lm"}
other_task(
    "no_summary",
    [{"document": "x"}],
    'a.jsonl, line 1 has no "summary"; this format needs "document", "summary"; it has "document": set data.',
    WRITER,
    **SUMMARIES,
)
other_task(
    "every_summary_empty",
    [{"document": "x", "summary": ""}] * 2,
    'data.train: "document" or "summary" of every record is empty',
    WRITER,
    **SUMMARIES,
)
other_task(
    "list_of_summaries",
    [{"document": "x", "summary": ["y"]}],
    '"summary" must be a string, found ["y"]',
    WRITER,
    **SUMMARIES,
)
other_task(
    "one_summary_empty",
    [*summaries.records(3), {"document": "x", "summary": " "}],
    'data.train: "document" or "summary" of 1 of 4 records is empty (first: a.jsonl, line 4)',
    WRITER,
    DONE,
    **SUMMARIES,
)
other_task(
    "long_summaries",
    [{"document": "x", "summary": "very long" * 20}] * 2,
    "data.train: 2 of 2 samples (100%) are longer than data.target_len = 12 tokens and lose their end",
    WRITER,
    DONE,
    **SUMMARIES,
)

# ---------------------------------------------------------------------------------------- talk about pictures

PICTURED = {
    "image": "a/0-red.jpg",
    "conversations": [{"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": "true"}],
}
LLAVA: Fields = {"format": "llava", "image_folder": "pictures", "loss_on": "answer", "cutoff_len": 256}


def pictured(name: str, says: str, *turns: Any, code: int = USERS_MISTAKE, **fields: Any) -> None:
    """A good conversation about a picture and one with these turns and fields."""
    talk = {"conversations": [{"from": who, "value": text} for who, text in turns]} if turns else {}
    row = {"id": 2, **PICTURED, **talk, **fields}
    other_task(name, [PICTURED, row], says, {"task": "image_text_to_text"}, code, **LLAVA)


pictured(
    "missing_picture",
    "a.jsonl, line 2 (id 2): picture pictures/a/9.png does not exist (1 pictures are missing in all)",
    image="a/9.png",
)
pictured(
    "picture_elsewhere", "a.jsonl, line 2 (id 2): \"image\": '../a.png' leaves data.image_folder", image="../a.png"
)
pictured(
    "picture_of_no_name", 'a.jsonl, line 2 (id 2): "image" must be the path of a picture, or a list of paths', image=3
)
pictured(
    "mark_without_picture",
    'a.jsonl, line 2 (id 2): has 1 <image> in its text and 0 pictures in "image"; give one for each',
    image=None,
)
pictured(
    "picture_without_mark",
    'a.jsonl, line 2 (id 2): has 0 <image> in its text and 1 pictures in "image"',
    ("human", "red?"),
    ("gpt", "true"),
)
pictured(
    "unknown_speaker",
    "a.jsonl, line 2 (id 2): turn 2 is from 'assistant'; known speakers are human, gpt",
    ("human", "<image>"),
    ("assistant", "true"),
)
pictured(
    "twice_in_a_row",
    'a.jsonl, line 2 (id 2): "conversations" has two turns of the user in a row',
    ("human", "<image>"),
    ("human", "red?"),
    ("gpt", "true"),
)
pictured(
    "number_said",
    'a.jsonl, line 2 (id 2): turn 2 must be an object with the strings "from" and "value"',
    ("human", "<image>"),
    ("gpt", 3),
)
pictured("no_question", "a.jsonl, line 2 (id 2): has no question with an answer", ("human", "<image>"))
pictured(
    "nothing_said",
    "data.train: what gpt says of 1 of 2 records is empty (first: a.jsonl, line 2 (id 2))",
    ("human", "<image>"),
    ("gpt", ""),
    code=DONE,
)
pictured(
    "control_tokens_said",
    "the text of 1 of 2 records holds special tokens (</s>; first: a.jsonl, line 2 (id 2))",
    ("human", "<image>"),
    ("gpt", "a </s>"),
    code=DONE,
)


# ----------------------------------------------------------------------------------------------- visual features


def visual(
    name: str,
    says: Says,
    *,
    change: Fields | None = None,
    pictures: int = 4,
    spoil: Callable[[Path], Any] = lambda file: None,
    model: Fields | None = None,
    **data: Any,
) -> None:
    """Four questions about pictures, the third changed, with features of some pictures whose file is spoilt."""

    def make(folder: Folder) -> Words:
        base = folder.made("bart", summaries.base_model)
        subtasks.features(folder.path, pictures)
        spoil(folder / "pictures.h5")
        rows = [subtasks.record("vqa", i) for i in range(4)]
        rows[2] |= change or {}
        folder.text("a.jsonl", lines(*rows))
        fields = {"train": {"vqa": "a.jsonl"}, "format": "vision_text", "features": "pictures.h5"}
        return folder.run(
            model={"path": base.name, "task": "vision_seq2seq_lm", "feature_dim": subtasks.WIDTH, **(model or {})},
            adapter={"target_modules": None},
            data={**fields, "validation_samples": 0, "cutoff_len": 40, "target_len": 12, **data},
            training={"global_batch_size": 2},
        )

    add(CASES, name, make, says, USERS_MISTAKE)


def _with_nan(file: Path) -> None:
    with h5py.File(file, "a") as opened:
        for picture in opened.values():
            picture["features"][:] = float("nan")


visual("features_missing", ("a.jsonl, line 4: there are no features of 'p3' in", "1 are missing in all"), pictures=3)
visual(
    "features_of_another_width",
    "pictures.h5 has features of width 7, and model.feature_dim is 9",
    model={"feature_dim": 9},
)
visual("features_damaged", "pictures.h5 cannot be read as HDF5", spoil=lambda file: file.write_bytes(b"nothing"))
visual("features_nan", "pictures.h5: the features of 'p0' hold NaN or infinity; extract them again", spoil=_with_nan)
visual("features_nowhere", 'data.features = "other.h5": no such file or folder', features="other.h5")
visual("question_without_picture", 'a.jsonl, line 3: as a record of vqa, has no "img_id"', change={"img_id": None})
visual("task_unknown", 'data.train: "okvqa" is not a task of vision_text records', train={"okvqa": "a.jsonl"})
