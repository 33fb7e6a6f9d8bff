"""Records to labels: prompts to the letter, who gets the loss, and what is cut."""

import json
from pathlib import Path
from typing import Any

import pytest

from dora_dist.config import DataConfig
from dora_dist.config.templates import PromptTemplate
from dora_dist.data import RaggedDataset, TextReader, read
from dora_dist.data.chats import read_chat
from dora_dist.data.formats import answered, asked_as, generation_prompt, training_prompt
from dora_dist.data.texts import encode
from dora_dist.runtime.errors import UserError
from tests import toy

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes, one."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "No."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    loaded = toy.tokenizer()
    loaded.chat_template = CHATML
    return loaded


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def build(tokenizer: Any, train: str | list[str], **fields: Any) -> Any:
    data = DataConfig(train=train, **{"cutoff_len": 512, **fields})
    return read(TextReader(data, tokenizer), data, seed=1, progress=False)


def texts(tokenizer: Any, dataset: RaggedDataset) -> list[tuple[str, str]]:
    """Each sample's text, and the part of it that carries loss."""
    samples = [dataset[i] for i in range(len(dataset))]
    for sample in samples:
        pairs = zip(sample["input_ids"], sample["labels"], strict=True)
        assert all(label in (-100, token) for token, label in pairs)
    learnt = [[label for label in sample["labels"] if label != -100] for sample in samples]
    return [
        (tokenizer.decode(sample["input_ids"]), tokenizer.decode(labels))
        for sample, labels in zip(samples, learnt, strict=True)
    ]


# ------------------------------------------------------------------------------------------------- formats


def test_the_papers_prompts_are_letter_for_letter() -> None:
    record = {"instruction": "Is {this} it?", "input": "", "output": "yes"}
    start = "Below is an instruction that describes a task. Write a response that appropriately completes the "
    tab = " " * 16
    asked, answered_here = f"{tab}### Instruction:\n{tab}Is {{this}} it?\n", f"{tab}### Response:\n{tab}"
    assert training_prompt(record) == f"{start}request.  \n\n{asked}{tab}\n{answered_here}"
    assert generation_prompt(record) == f"{start}request. \n\n{asked}\n{answered_here}"


def test_alpaca_prompts_with_and_without_input(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "La"},
        {"instruction": "Hum.", "output": "Hm"},
    ]
    data = build(tokenizer, write(tmp_path / "a.jsonl", rows), format="alpaca", loss_on="answer")
    (first, first_answer), (second, second_answer), (third, _) = texts(tokenizer, data.train)
    assert first == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
        "### Input:\n1 and 2\n\n### Response:\n3</s>"
    )
    assert first_answer == "3</s>"
    assert second == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nSing.\n\n### Response:\nLa</s>"
    )
    assert second_answer == "La</s>"
    assert third.endswith("### Instruction:\nHum.\n\n### Response:\nHm</s>")


def test_an_input_that_the_instruction_format_would_drop_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    rows = [*toy.records(1), {"instruction": "Add.", "input": "1 and 2", "output": "3"}]
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match='a.jsonl, line 2: .* no place for a non-empty "input".* "alpaca"'):
        build(tokenizer, file)


def test_in_a_conversation_only_the_assistants_turns_carry_loss(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "m.jsonl", [{"messages": MESSAGES}])
    (text, answers), *_ = texts(tokenizer, build(tokenizer, file, format="messages", loss_on="answer").train)
    whole = (
        "<|system|>Be brief.</s>\n<|user|>One?</s>\n<|assistant|>Yes, one.</s>\n"
        "<|user|>Two?</s>\n<|assistant|>No.</s>\n"
    )
    assert text == whole
    assert answers == "Yes, one.</s>\nNo.</s>\n"
    assert texts(tokenizer, build(tokenizer, file, format="messages").train) == [(whole, whole)]


@pytest.mark.parametrize(
    ("template", "messages", "complaint"),
    [
        ("{% for m in messages[-2:] %}{{ m.content }}{% endfor %}", MESSAGES, "writes message 3 differently"),
        (CHATML.replace("<|assistant|>", "<|assistant|><think>"), MESSAGES, "writes message 3 differently"),
        (
            "{{ raise_exception('roles must alternate') }}",
            MESSAGES,
            "refuses these messages: roles must alternate",
        ),
        (CHATML, MESSAGES[2:], "the first message is the assistant's"),
        (CHATML, [], '"messages" is empty'),
        (CHATML, [{"role": "user"}], 'message 1 must have a string "content", found "nothing"'),
        (CHATML, [{"role": "gpt", "content": "a"}], r'has the role "gpt", .* \(did you mean "assistant"\?\)'),
        (CHATML, [{"role": "critic", "content": "a"}], 'has the role "critic", which is none of system, user'),
        ("{{ messages[0].content / 0 }}", MESSAGES, "refuses these messages: unsupported operand"),
        ("{{ messages[9].content.text }}", MESSAGES, "refuses these messages: .* has no element 9"),
    ],
)
def test_conversations_that_cannot_be_told_apart_are_refused(
    template: str | None, messages: list[Any], complaint: str, tmp_path: Path
) -> None:
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = template
    file = write(tmp_path / "m.jsonl", [{"messages": messages}])
    with pytest.raises(UserError, match=f"m.jsonl, line 1: .*{complaint}"):
        build(tokenizer, file, format="messages", loss_on="answer")


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"name": "add", "arguments": {"a": 1}}
GENERATION = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}</s>\n{% endgeneration %}"
    "{% else %}{{ m.content }}</s>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITH_TOOLS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "One and "}, {"type": "text", "text": "one?"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "Two."},
]
SHARED = {
    "system": "Be brief.",
    "tools": json.dumps(TOOLS),
    "conversations": [
        {"from": "human", "value": "One and one?"},
        {"from": "function_call", "value": json.dumps({**CALL, "arguments": json.dumps(CALL["arguments"])})},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Two."},
    ],
}


def test_what_is_learnt_of_a_chat_with_tools_is_the_templates_own_assistant_mask(tmp_path: Path) -> None:
    plain: list[dict[str, Any]] = [*WITH_TOOLS]
    plain[1], plain[2] = {"role": "user", "content": "One and one?"}, {**WITH_TOOLS[2], "content": ""}
    rewriting = GENERATION.replace("{{ m.content }}{% for", "{{ m.content if loop.last else '-' }}{% for")
    for template in (GENERATION, rewriting):
        tokenizer = toy.tokenizer()
        tokenizer.chat_template = template
        truth = tokenizer.apply_chat_template(
            plain, tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        assert 0 < sum(truth["assistant_masks"]) < len(truth["input_ids"])
        for format, row in (("messages", {"messages": WITH_TOOLS, "tools": TOOLS}), ("sharegpt", SHARED)):
            file = write(tmp_path / "a.jsonl", [row])
            data = build(tokenizer, file, format=format, loss_on="answer", cache=None)
            masked = zip(truth["input_ids"], truth["assistant_masks"], strict=True)
            assert data.train[0]["input_ids"] == truth["input_ids"]
            assert data.train[0]["labels"] == [token if learnt else -100 for token, learnt in masked]


@pytest.mark.parametrize(
    ("marks", "train_on", "expected"),
    [
        ({}, ["assistant"], ["Yes, one.</s>\n", "No.</s>\n"]),
        ({2: {"weight": 0}}, ["assistant"], ["No.</s>\n"]),
        ({4: {"train": False}, 1: {"train": True}}, ["assistant"], ["One?</s>\n", "Yes, one.</s>\n"]),
        ({}, ["user"], ["One?</s>\n", "Two?</s>\n"]),
        (
            {0: {"weight": 1}, 2: {"weight": 0}},
            ["user", "assistant"],
            ["Be brief.</s>\n", "One?</s>\n", "Two?</s>\n", "No.</s>\n"],
        ),
    ],
)
def test_roles_and_turns_that_say_so_are_learnt(
    tokenizer: Any, tmp_path: Path, marks: dict[int, Any], train_on: list[str], expected: list[str]
) -> None:
    messages = [{**message, **marks.get(turn, {})} for turn, message in enumerate(MESSAGES)]
    file = write(tmp_path / "m.jsonl", [{"messages": messages}])
    data = build(tokenizer, file, format="messages", loss_on="answer", train_on=train_on)
    [(_, learnt)] = texts(tokenizer, data.train)
    assert learnt == "".join(expected)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1 has a picture in its content"),
        (
            {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
            "message 1 has a part of its content that is not",
        ),
        ({"messages": [{**MESSAGES[0], "weight": 0.5}]}, 'message 1: "weight" must be 0 or 1, found 0.5'),
        ({"messages": [{**MESSAGES[0], "weight": 0, "train": True}]}, '"weight" and "train" contradict each other'),
        ({"messages": [{**MESSAGES[2], "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "each of its"),
        ({"messages": MESSAGES, "tools": "add"}, '"tools" must be a list of objects that describe functions'),
        ({"messages": MESSAGES, "system": 1, "tools": 0}, None),
        ({"messages": MESSAGES[1:], "system": 1}, '"system" must be a string, found 1'),
    ],
)
def test_chats_that_cannot_be_meant_are_refused(
    tokenizer: Any, tmp_path: Path, row: Any, complaint: str | None
) -> None:
    file = write(tmp_path / "m.jsonl", [row])
    if complaint is None:
        assert len(build(tokenizer, file, format="messages", loss_on="answer").train) == 1
        return
    with pytest.raises(UserError, match=f"m.jsonl, line 1: .*{complaint}"):
        build(tokenizer, file, format="messages", loss_on="answer")


def test_a_template_of_ones_own_is_filled_with_fields_alone(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"question": "Is {answer} {it}?", "topic": "sums", "reply": "yes"}]
    how = {"prompt_template": "{{{topic}}} {question}\nA: ", "answer_field": "reply", "format": "template"}
    data = build(tokenizer, write(tmp_path / "a.jsonl", rows), loss_on="answer", **how)
    assert texts(tokenizer, data.train) == [("{sums} Is {answer} {it}?\nA: yes</s>", "yes</s>")]
    format, prepare = asked_as(how)
    assert format == "completion" and prepare is not None
    asked = prepare(rows[0])
    assert (asked["prompt"], asked["completion"]) == ("{sums} Is {answer} {it}?\nA: ", "yes")
    wrong = write(tmp_path / "b.jsonl", [{"questions": "x", "topic": "y", "reply": "z"}])
    with pytest.raises(UserError, match='b.jsonl, line 1 has no "question".*set data.prompt_template .*"questions"'):
        build(tokenizer, wrong, **how)


def test_a_run_is_asked_in_the_format_of_its_sources() -> None:
    """Of a mixture not in data.format, which none of them may have; in several, the user has to say which."""
    chats, shared, plain = ({"path": "a", "format": name} for name in ("messages", "sharegpt", "completion"))
    assert asked_as({"format": "instruction", "train": [chats]}) == ("messages", None)
    assert asked_as({"format": "completion", "train": ["a", "b"]}) == ("completion", None)
    assert asked_as({}) == (None, None)
    format, prepare = asked_as({"format": "instruction", "train": [chats, shared]})
    assert format == "messages" and prepare is not None and prepare({"messages": MESSAGES}) == {"messages": MESSAGES}
    for train, named in (([chats, plain], "messages"), ([chats, {"path": "b"}], "instruction")):
        with pytest.raises(UserError, match=f"data.train of the run has sources of several formats.*--format.*{named}"):
            asked_as({"format": "instruction", "train": train})


def test_texts_alone_fill_a_template_of_one_field() -> None:
    one = {"format": "template", "prompt_template": "Q: {question}", "answer_field": "reply"}
    _, prepare = asked_as(one)
    assert prepare is not None
    assert prepare({"prompt": "a", "id": 3})["prompt"] == "Q: a"
    with pytest.raises(UserError, match=r'"reply" \(data.answer_field of the run\) must be a string, found 3'):
        prepare({"question": "a", "reply": 3})
    _, prepare = asked_as({**one, "prompt_template": "{topic}: {question}"})
    assert prepare is not None
    with pytest.raises(UserError, match=r"has several fields \(topic, question\), and a text is one"):
        prepare({"prompt": "a"})


def test_fields_of_messages_that_are_null_are_left_out() -> None:
    """As a Parquet file has them, in which each message has every field that one has. (transformers leaves them out of
    what it renders, too, but not where the marks of {% generation %} are read.)"""
    nulls = {"tool_calls": None, "name": None, "from": None, "value": None, "weight": None}
    chat = read_chat({"messages": [{**message, **nulls} for message in MESSAGES]}, "messages")
    assert chat.messages == MESSAGES and set(chat.marks) == {None}
    with pytest.raises(UserError, match='message 1 must have a string "content", found null'):
        read_chat({"messages": [{"role": "user", "content": None, "name": None}]}, "messages")


@pytest.mark.parametrize("bad", ["{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{a", "a}"])
def test_what_is_not_a_template_is_refused(bad: str) -> None:
    with pytest.raises(ValueError):
        PromptTemplate.of(bad)


def test_a_chat_template_may_name_roles_of_its_own(tmp_path: Path) -> None:
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'critic' %}" + CHATML + "{% endif %}"
    file = write(tmp_path / "m.jsonl", [{"messages": [{"role": "critic", "content": "true"}]}])
    [(text, _)] = texts(tokenizer, build(tokenizer, file, format="messages").train)
    assert text == "<|critic|>true</s>\n"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, 'data.format = "messages": the tokenizer has no chat template'),
        ("{% for m in messages %}\n{{ m.content }", r"is not valid Jinja \(line 2: "),
    ],
)
def test_a_chat_template_that_is_missing_or_broken_is_no_records_fault(
    template: str | None, complaint: str, tmp_path: Path
) -> None:
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = template
    file = write(tmp_path / "m.jsonl", [{"messages": MESSAGES}])
    with pytest.raises(UserError, match=f"^(model.tokenizer: its chat template )?{complaint}"):
        build(tokenizer, file, format="messages")


# -------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("loss_on", ["all", "answer"])
def test_the_instruction_format_ends_with_eos_and_masks_the_prompt_on_request(
    loss_on: str, tokenizer: Any, tmp_path: Path
) -> None:
    file = toy.write_records(tmp_path / "train.json", 5)
    for record, (text, learnt) in zip(
        toy.records(5), texts(tokenizer, build(tokenizer, str(file), loss_on=loss_on).train), strict=True
    ):
        assert text == training_prompt(record) + record["output"] + "</s>"
        assert learnt == (text if loss_on == "all" else record["output"] + "</s>")


def test_prompt_and_completion_are_trained_on_as_they_are(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", [{"prompt": "is 3 even?", "completion": " false"}])
    [(text, learnt)] = texts(tokenizer, build(tokenizer, str(file), format="completion", loss_on="answer").train)
    assert (text, learnt) == ("is 3 even? false</s>", " false</s>")


def test_a_token_across_the_border_belongs_to_the_answer(tokenizer: Any) -> None:
    text = tokenizer("is true")["input_ids"]
    assert tokenizer.decode(text[-1:]) == " true"  # it starts with the prompt's last character
    [(ids, answer)] = encode(tokenizer, [answered("is ", "true")])
    assert ids == [*text, tokenizer.eos_token_id]
    assert answer == [False] * (len(ids) - 2) + [True, True]


def test_bos_is_kept_and_a_tokenizers_own_eos_is_not_doubled() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = toy.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)],
    )
    [(ids, answer)] = encode(tokenizer, [answered("", "true")])
    assert tokenizer.decode(ids) == "<s>true</s>"
    assert answer == [False] + [True] * (len(ids) - 1)


def test_what_is_cut_is_counted_and_what_has_no_label_left_is_left_out(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": "b " * 200},
        {"instruction": "a " * 300, "output": "b"},
    ]
    file = write(tmp_path / "a.jsonl", rows)
    length = len(tokenizer(training_prompt(rows[0]))["input_ids"])
    answer = build(tokenizer, file, loss_on="answer", cutoff_len=length + 3)
    assert (len(answer.train), answer.train_stats.samples) == (2, 2)
    assert (answer.train_stats.truncated, answer.train_stats.without_labels) == (2, 1)
    cut = answer.train[1]
    assert len(cut["input_ids"]) == length + 3
    assert tokenizer.eos_token_id not in cut["input_ids"]
    assert answer.train_stats.tokens == sum(len(answer.train[i]["input_ids"]) for i in range(2))
    assert answer.train_stats.label_tokens == sum(
        label != -100 for i in range(2) for label in answer.train[i]["labels"]
    )
    assert "2 cut at" in str(answer.train_stats)
    assert "1 left out: nothing to learn" in str(answer.train_stats)

    everything = build(tokenizer, file, cutoff_len=length + 3).train_stats
    assert (everything.samples, everything.truncated, everything.without_labels) == (3, 2, 0)
    with pytest.raises(UserError, match="none of the 3 samples of data.train .* data.cutoff_len = 8"):
        build(tokenizer, file, loss_on="answer", cutoff_len=8)


def test_a_first_token_teaches_nothing_since_nothing_predicts_it(tmp_path: Path) -> None:
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("a", "ab")]
    stats = build(tokenizer, write(tmp_path / "m.jsonl", rows), format="messages").train_stats
    assert (stats.samples, stats.without_labels, stats.label_tokens) == (1, 1, 1)


def test_held_out_samples_are_chosen_by_the_seed_and_not_trained_on(tokenizer: Any, tmp_path: Path) -> None:
    file = str(toy.write_records(tmp_path / "train.json", 40))
    whole = [text for text, _ in texts(tokenizer, build(tokenizer, file).train)]
    data = build(tokenizer, file, validation_samples=7)
    train, held_out = ([text for text, _ in texts(tokenizer, part)] for part in (data.train, data.validation))
    assert (len(train), len(held_out)) == (33, 7)
    assert sorted(train + held_out) == sorted(whole)
    assert held_out not in (whole[:7], whole[-7:])
    again = build(tokenizer, file, validation_samples=7)
    assert [text for text, _ in texts(tokenizer, again.validation)] == held_out
    config = DataConfig(train=file, validation_samples=7)
    other = read(TextReader(config, tokenizer), config, seed=2, progress=False)
    assert other.validation is not None
    assert [text for text, _ in texts(tokenizer, other.validation)] != held_out
    with pytest.raises(UserError, match="data.validation_samples is 40 but data.train holds 40 records"):
        build(tokenizer, file, validation_samples=40)


def test_a_validation_file_and_several_training_files(tokenizer: Any, tmp_path: Path) -> None:
    train = [str(toy.write_records(tmp_path / "a.json", 3)), str(toy.write_records(tmp_path / "b.json", 2))]
    validation = str(toy.write_records(tmp_path / "c.json", 4))
    data = build(tokenizer, train, validation=validation)
    assert (len(data.train), len(data.validation)) == (5, 4)
    assert data.train[3] == data.train[0]
    assert (data.train_stats.samples, data.validation_stats.samples) == (5, 4)
