"""`evaluate` of what was trained on chats: the last assistant turn as reference, under the run's own settings."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from dora_dist import cli
from dora_dist.adapters.peft_format import PeftAdapter, write_peft_folder
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.checkpoint.manifest import write_manifest
from dora_dist.data.formats import FORMATS
from dora_dist.data.texts import encode
from dora_dist.evaluation import as_table, evaluate
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import write_json
from dora_dist.tasks.evaluations.answers import exchange, reference, turn_ends
from tests import toy
from tests.unit.test_data import GENERATION, TOOLS, WITH_TOOLS

# Turns end with a token that is not the tokenizer's end of sequence, which nothing here is trained to say.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWERS = ["true", "false", "it is true", "is it even? false", "true", "please answer: true"]


def chats() -> list[dict[str, Any]]:
    """Six chats; every other one has a turn before its last question, and the last one a question after it."""
    found = []
    for i, answer in enumerate(ANSWERS):
        before = [("user", "is it even?"), ("assistant", "question")] if i % 2 else []
        turns = [("system", f"answer {i}"), *before, ("user", f"is {i} even?"), ("assistant", answer)]
        turns += [("user", "please?")] if i == 5 else []
        found.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return found


def questions_and_answers(records: list[dict[str, Any]]) -> list[list[dict[str, str]]]:
    return [record["messages"][: 5 if i % 2 else 3] for i, record in enumerate(records)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For models as small as these, threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, which was taught the last turns of `chats.jsonl` by heart, with `training.json`, its last loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("chats")
    tokenizer = toy.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**toy.SIZES, vocab_size=len(tokenizer)))
    batch, optimizer = labelled(tokenizer), torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = answer_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.02
    model.save_pretrained(folder / "base")
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chats()))
    return folder


def labelled(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (6, length): training's own, of which only the last turn's count."""
    samples = [
        FORMATS["messages"].render({"messages": turns}, tokenizer, True) for turns in questions_and_answers(chats())
    ]
    encoded = encode(tokenizer, [type(s)(s.text, s.answers[-1:], complete=True) for s in samples])
    ids, labels = torch.zeros(6, 120, dtype=torch.long), torch.full((6, 120), -100)
    for i, (tokens, answer) in enumerate(encoded):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        labels[i, : len(tokens)] = torch.where(torch.tensor(answer), torch.tensor(tokens), -100)
    return ids, labels


def answer_loss(model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    ids, labels = batch
    return cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def ask(folder: Path, model: str = "base", **arguments: Any) -> dict[str, Any]:
    return evaluate(folder / model, {"dev": folder / "chats.jsonl"}, dtype="fp32", progress=False, **arguments)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_was_learnt_by_heart_is_said_word_by_word(batch_size: int, folder: Path) -> None:
    result = ask(folder, format="messages", batch_size=batch_size)
    row = result["tasks"]["dev"]
    assert [each["answer"] for each in row["predictions"]] == ANSWERS
    assert (row["exact_match"], row["correct"], row["total"]) == (1.0, 6, 6)
    assert row["predictions"][1]["record"].endswith("chats.jsonl, line 2")
    assert "average" not in result
    lines = as_table(result).splitlines()
    assert lines[0].split() == ["task", "exact_match", "correct", "total", "loss", "perplexity"]


def test_another_reference_is_not_met_and_blanks_do_not_count(folder: Path, tmp_path: Path) -> None:
    records = chats()
    records[0]["messages"][2]["content"] = "false"
    records[1]["messages"][4]["content"] = " false\n"
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shutil.copytree(folder / "base", tmp_path / "base")
    row = ask(tmp_path, format="messages")["tasks"]["dev"]
    assert row["exact_match"] == 5 / 6
    assert row["loss"] > 0.1  # of some 40 tokens, one is all wrong


def test_the_loss_is_that_of_training_on_the_last_answers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model.save_pretrained(folder / "noisy")
        expected = float(answer_loss(model, labelled(AutoTokenizer.from_pretrained(folder / "base"))))
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "noisy")
    assert expected > 0.05
    result = ask(folder, model="noisy", format="messages", mode="loss", batch_size=4)
    assert result["tasks"]["dev"]["loss"] == pytest.approx(expected, rel=1e-4)
    assert result["tasks"]["dev"]["perplexity"] == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-4)
    assert "predictions" not in result["tasks"]["dev"]


def test_the_papers_labels_are_read_from_chats_and_candidates_take_the_answers_place(
    folder: Path, tmp_path: Path
) -> None:
    labels = ["true" if "true" in answer else "false" for answer in ANSWERS]
    records = [{**chat, "answer": label} for chat, label in zip(chats(), labels, strict=True)]
    (tmp_path / "boolq.json").write_text(json.dumps(records))
    options: dict[str, Any] = {"format": "messages", "dtype": "fp32", "progress": False}
    result = evaluate(folder / "base", {"boolq": tmp_path / "boolq.json"}, **options)
    assert (result["average"], result["tasks"]["boolq"]["correct"]) == (1.0, 6)
    choices = [{**chat, "choices": sorted({*ANSWERS})} for chat in chats()]
    (tmp_path / "mine.json").write_text(json.dumps(choices))
    result = evaluate(folder / "base", {"mine": tmp_path / "mine.json"}, mode="likelihood", **options)
    assert result["average"] == 1.0


THINKING = (
    "{% for m in messages %}[{{ m.role }}]{% if loop.last and m.role == 'assistant' %}<think></think> {% endif %}"
    "{{ m.content }}[end]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_what_a_template_writes_around_an_answer_is_not_the_answer() -> None:
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = THINKING
    chat = chats()[5]
    found = exchange(chat, "messages", reference(chat, "messages"), tokenizer)
    before = "[system]answer 5[end][user]is it even?[end][assistant]question[end][user]is 5 even?[end][assistant]"
    assert (found.prompt, found.lead, found.end) == (before, "<think></think> ", "[end]")
    assert found.words == ANSWERS[5]
    assert turn_ends([found], tokenizer) == ([], "[end]")  # no special token: the text ends it
    itself = exchange(chat, "messages", "the [end] of it", tokenizer)
    assert turn_ends([found, itself], tokenizer) == ([], None)
    tokenizer.add_tokens("[end]", special_tokens=True)
    assert turn_ends([found], tokenizer) == ([tokenizer.convert_tokens_to_ids("[end]")], None)


def test_what_a_record_says_besides_its_messages_is_asked_as_it_was_learnt() -> None:
    """Tools, "system", parts of a content and tool calls: the prompt is where training's answer begins."""
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = GENERATION.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    record = {"messages": WITH_TOOLS[1:], "system": "Be brief.", "tools": TOOLS}
    learnt = FORMATS["messages"].render(record, tokenizer, True)
    found = exchange(record, "messages", reference(record, "messages"), tokenizer)
    assert found.words == "Two." and "Be brief." in found.prompt and '"add"' in found.prompt
    assert (found.prompt, found.text) == (learnt.text[: learnt.answers[-1][0]], learnt.text)
    with pytest.raises(UserError, match="its last assistant turn is a tool call"):
        reference({"messages": WITH_TOOLS[:4]}, "messages")


def test_a_table_of_tasks_with_other_metrics_keeps_its_columns() -> None:
    tasks = {"boolq": {"accuracy": 0.5, "total": 4, "loss": 1.0}, "dev": {"exact_match": 0.25, "total": 4, "loss": 2.0}}
    lines = as_table({"tasks": tasks}).splitlines()
    assert lines[0].split() == ["task", "accuracy", "total", "loss", "exact_match"]
    for line, cell, column in ((lines[1], "0.5000", "accuracy"), (lines[2], "0.2500", "exact_match")):
        assert line.index(cell) + len(cell) == lines[0].index(column) + len(column)


def run_on(folder: Path, base: str) -> None:
    """A run on chats, its base named `base`, whose adapter adds little; the tokenizer lies with the adapter."""
    name = "model.layers.0.self_attn.q_proj"
    layer = AdapterLayer(torch.full((2, 36), 1e-4), torch.full((36, 2), 1e-4), None, 1.0)
    adapter = folder / "run/checkpoint-2/adapter"
    write_peft_folder(adapter, PeftAdapter(base, 2, 2, 0.0, False, {name: layer}))
    write_json(folder / "run/config.json", {"model": {"path": base}, "data": {"format": "messages"}})
    shutil.copy(folder / "base/tokenizer.json", adapter)
    shutil.copy(folder / "base/tokenizer_config.json", adapter)
    shutil.copy(folder / "base/chat_template.jinja", adapter)
    write_manifest(folder / "run/checkpoint-2", {"step": 2})


def test_a_run_is_evaluated_as_it_was_trained_and_on_the_base_that_is_given(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    run_on(tmp_path, "base")
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "run", "--tasks", f"dev={folder / 'chats.jsonl'}", "--dtype", "fp32"]
    assert cli.main(words) == 0
    answer = capsys.readouterr()
    assert answer.out.splitlines()[1].split()[:4] == ["dev", "1.0000", "6", "6"]
    assert 'records are read as the run\'s data.format says, "messages"; --format gives another' in answer.err

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "base/tokenizer_config.json").write_text("{}")  # the adapter's own is the one that counts
    (tmp_path / "base/chat_template.jinja").unlink()
    monkeypatch.chdir(tmp_path / "elsewhere")
    words[1] = "../run"
    assert cli.main(words) == 2
    assert "give its folder or hub name with --base MODEL" in capsys.readouterr().err
    assert cli.main([*words, "--base", "../base"]) == 0
    assert capsys.readouterr().out == answer.out
