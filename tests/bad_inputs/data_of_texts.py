"""Records of single texts, and sets of them, that cannot be meant, or probably are not."""

import json
import os
from functools import partial
from typing import Any

from dora_dist.runtime.exit_codes import DONE
from tests import toy
from tests.bad_inputs.case import Folder, Table, Words
from tests.bad_inputs.records import BOTH, Says, add, lines, refused, validated

CASES = Table()
records = partial(refused, CASES)
ROW = {"instruction": "is 1 even?", "output": "false"}
GOOD = json.dumps(ROW)


def odd(name: str, content: str, says: Says, **fields: Any) -> None:
    """A data.jsonl that is warned of when it is looked at, and accepted."""

    def make(folder: Folder) -> Words:
        folder.text("data.jsonl", content)
        data = {"train": "data.jsonl", "validation_samples": 0, "loss_on": "answer", "cutoff_len": 400, **fields}
        return validated(folder, data=data, training={"global_batch_size": 2})

    add(CASES, name, make, says, DONE)


# ----------------------------------------------------------------------------------------------- single texts

records(
    "missing_field",
    "a.jsonl",
    lines(GOOD, {"instruction": "x", "outputs": "y"}),
    'a.jsonl, line 2 has no "output"; this format needs "instruction", "output" (did you mean to rename "outputs"?)',
)
records(
    "another_format",
    "a.jsonl",
    lines({"prompt": "x", "completion": "y"}),
    'line 1 has no "instruction"; this format needs "instruction", "output"; it has "prompt", "completion"',
)
records("null_field", "a.jsonl", lines(ROW, {**ROW, "output": None}), 'a.jsonl, line 2: "output" is null')
records(
    "number_for_text",
    "a.jsonl",
    lines(ROW, {**ROW, "output": 7}),
    'a.jsonl, line 2: "output" must be a string, found 7',
)
records(
    "list_for_text",
    "a.json",
    json.dumps([{**ROW, "instruction": ["a", "b"]}]),
    'a.json, record 1: "instruction" must be a string, found ["a", "b"]',
)
records("nan_for_text", "a.jsonl", lines('{"instruction": "x", "output": NaN}'), '"output" must be a string, found NaN')
records(
    "list_for_input",
    "a.jsonl",
    lines({**ROW, "input": ["a"]}),
    'a.jsonl, line 1: "input" must be a string, found ["a"]',
    format="alpaca",
)
records("zero_for_input", "a.jsonl", lines({**ROW, "input": 0}), 'a.jsonl, line 1: "input" must be a string, found 0')
records(
    "input_without_place",
    "a.jsonl",
    lines({**ROW, "input": "x"}),
    'the instruction format has no place for a non-empty "input"; use format "alpaca"',
)
records(
    "half_a_character",
    "a.jsonl",
    lines(GOOD, '{"instruction": "smile \\ud83d", "output": "y"}'),
    'a.jsonl, line 2: "instruction" holds half a character (\\ud83d without its other half, after "smile ")',
)
records(
    "half_a_character_in_input",
    "a.json",
    '[{"instruction": "x", "input": "\\udc00", "output": "y"}]',
    "a.json, record 1 holds half a character (\\udc00",
    format="alpaca",
)
records(
    "every_output_empty",
    "a.jsonl",
    lines(*[{**ROW, "output": " "}] * 3),
    'data.train: "output" of every record is empty (first: a.jsonl, line 1); there is nothing to learn from',
    loss_on="all",
)
records(
    "every_completion_empty",
    "a.jsonl",
    lines(*[{"prompt": "x", "completion": ""}] * 3),
    'data.train: "completion" of every record is empty',
    format="completion",
)
records(
    "nothing_within_cutoff",
    "a.jsonl",
    lines({"instruction": "x " * 300, "output": "y"}),
    (
        "none of the 1 samples of data.train has a token to learn from within data.cutoff_len = 192 (the shortest has ",
        "raise it",
    ),
)
records(
    "all_held_out",
    "a.jsonl",
    lines(ROW, ROW),
    "data.validation_samples is 2 but data.train holds 2 records",
    validation_samples=2,
)


@CASES.bad(says='data.validation: "output" of every record is empty (first: v.jsonl, line 1)', ranks=BOTH)
def validation_without_answers(folder: Folder) -> Words:
    folder.text("v.jsonl", lines(*[{**ROW, "output": ""}] * 2))
    return folder.run(data={"validation": "v.jsonl", "validation_samples": 0})


CASES.option(
    "template_without_use",
    "--data.chat_template=plain",
    says='data.chat_template = "plain": has no meaning for data.format = "instruction", only for llava',
)
CASES.option(
    "template_for_messages",
    "--data.chat_template=plain",
    "--data.format=messages",
    says='data.chat_template = "plain": data.format = "messages" takes the tokenizer\'s',
)
CASES.option(
    "mixture_with_a_slip",
    '--data.train=[{"path": "data.json", "wieght": 2}]',
    says='data.train, source 1: unknown key "wieght"; a source has path, weight, name, format',
)
CASES.option(
    "mixture_without_weight",
    '--data.train=[{"path": "data.json", "weight": 0}]',
    says='data.train, source 1, "weight": 0: input should be greater than 0',
)
CASES.option(
    "mixture_of_tasks",
    '--data.train=[{"path": "data.json", "format": "llava"}]',
    says='data.train, source 1: format = "llava" does not go with data.format = "instruction"; a mixture is of',
)
CASES.option(
    "mixture_of_one_name",
    '--data.train=[{"path": "data.json", "name": "a"}, {"path": "data.json", "name": "a"}]',
    says='data.train: two sources have the name "a"; give each its own',
)
CASES.option(
    "mixture_of_a_missing_file",
    '--data.train=[{"path": "data.json"}, {"path": "date.json"}]',
    says='data.train = "date.json": no such file',
)
CASES.option(
    "template_missing",
    "--data.format=template",
    says='data.format = "template": data.prompt_template is not set; give one, such as "Question: {question}',
)
CASES.option(
    "template_of_another_format",
    "--data.prompt_template={question}",
    says='data.prompt_template = "{question}": has no meaning for data.format = "instruction", only for template',
)
CASES.option(
    "template_with_a_lookup",
    "--data.format=template",
    "--data.prompt_template={question.__class__}",
    says='data.prompt_template = "{question.__class__}": {question.__class__} is not the name of a field',
)
CASES.option(
    "template_without_fields",
    "--data.format=template",
    "--data.prompt_template=Q: ",
    says='data.prompt_template = "Q: ": names no field of a record',
)
CASES.option(
    "template_with_the_answer",
    "--data.format=template",
    "--data.prompt_template={instruction} {output}",
    says="holds the answer, {output} (data.answer_field); it follows the prompt by itself",
)
CASES.option(
    "train_on_without_use",
    '--data.train_on=["user"]',
    says='data.train_on = ["user"]: has no meaning for data.format = "instruction", only for messages and sharegpt',
)
CASES.option(
    "train_on_with_all",
    '--data.train_on=["user"]',
    "--data.format=sharegpt",
    says='data.train_on = ["user"]: data.loss_on = "all" learns every turn; set it to "answer"',
)
CASES.option(
    "train_on_speakers",
    '--data.train_on=["gpt"]',
    "--data.format=sharegpt",
    "--data.loss_on=answer",
    says='data.train_on = ["gpt"]: "gpt" is called "assistant" here; give that',
)
CASES.option(
    "texts_without_use",
    '--data.text_fields=["question"]',
    says='data.text_fields = ["question"]: has no meaning for data.format = "instruction", only for',
)
CASES.option(
    "folder_without_use",
    "--data.image_folder=base",
    says='data.image_folder = "base": has no meaning for data.format = "instruction"',
)

# --------------------------------------------------------------------------------------------- odd, and accepted

COMPLETIONS = [{"prompt": f"is {i} even?", "completion": "true"} for i in range(20)]
odd(
    "some_empty",
    lines(ROW, {**ROW, "output": ""}, ROW, {**ROW, "output": "\n"}),
    'warning: data.train: "output" of 2 of 4 records is empty (first: data.jsonl, line 2); take them out',
)
odd(
    "only_prompts",
    lines(*[{"prompt": "x", "completion": ""}] * 2),
    'data.train: "completion" of every record is empty (first: data.jsonl, line 1); only the prompts are learnt',
    format="completion",
    loss_on="all",
)
odd(
    "control_tokens",
    lines(ROW, {**ROW, "instruction": "<s>a</s>"}, {**ROW, "output": "b</s>"}),
    "the text of 2 of 3 records holds special tokens (</s>, <s>; first: data.jsonl, line 2), which",
)
odd(
    "many_cut",
    lines(*[{**ROW, "instruction": "even? " * 10 * i, "output": "true"} for i in range(1, 5)]),
    ("data.train: 1 of 4 samples (25%) are longer than data.cutoff_len = 400 tokens and lose their end"),
    cutoff_len=400,
    loss_on="all",
)


@CASES.bad(
    says="warning: data.train has 3 samples and training.global_batch_size = 6: every step",
    code=DONE,
)
def fewer_than_a_batch(folder: Folder) -> Words:
    folder.data("three.json", 3)
    return validated(folder, data={"train": "three.json", "validation_samples": 0, "cutoff_len": 300})


def validation(name: str, says: str, put: Any) -> None:
    """Six training records, and a validation file that `put` makes of their file."""

    def make(folder: Folder) -> Words:
        put(folder, folder.text("data.jsonl", lines(*COMPLETIONS[:6])))
        data = {"train": "data.jsonl", "validation": "v.jsonl", "validation_samples": 0, "format": "completion"}
        return validated(folder, data=data)

    add(CASES, name, make, says, DONE)


KNOWN = "warning: data.validation: 6 of its 6 samples are in data.train, too"
validation(
    "validation_is_a_link",
    f"{KNOWN} (v.jsonl is a file of data.train)",
    lambda folder, file: os.symlink(file, folder / "v.jsonl"),
)
validation(
    "validation_is_a_copy", f"{KNOWN}; what is measured", lambda folder, file: folder.text("v.jsonl", file.read_text())
)
validation(
    "validation_has_some",
    "warning: data.validation: 2 of its 4 samples are in data.train, too",
    lambda folder, file: folder.text("v.jsonl", lines(*COMPLETIONS[4:8])),
)


@CASES.bad(
    says=(
        "warning: data.validation: 25 of its 25 samples are in data.train, too (data.json is a file of data.train)",
        "finished ",
    ),
    code=DONE,
    ranks=BOTH,
)
def training_on_the_validation_file(folder: Folder) -> Words:
    return folder.run(data={"validation": "data.json", "validation_samples": 0})


@CASES.bad(
    says=('warning: data.train: "output" of 1 of 7 records is empty (first: odd.jsonl, line 7)', "finished "),
    code=DONE,
    ranks=BOTH,
)
def training_on_an_empty_answer(folder: Folder) -> Words:
    folder.text("odd.jsonl", lines(*toy.records(6), {**ROW, "output": ""}))
    return folder.run(data={"train": "odd.jsonl", "validation_samples": 1})
