"""`generate` and `chat`: prompts are training's own, on every kind of folder; a conversation in a terminal."""

import json
from argparse import Namespace
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dora_dist import cli, generate
from dora_dist.adapters.peft_format import PeftAdapter, write_peft_folder
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.checkpoint.manifest import write_manifest
from dora_dist.cli import speak
from dora_dist.config import DataConfig
from dora_dist.data.conversations import Conversation, render
from dora_dist.data.formats import FORMATS, Rendered
from dora_dist.data.texts import encode
from dora_dist.evaluation.generate import answered, made_prompts
from dora_dist.evaluation.inference import load_for_inference
from dora_dist.evaluation.speaking import Sampling, Speaker
from dora_dist.models.families import load_processor
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import write_json
from dora_dist.tasks.evaluations.answers import Exchange
from dora_dist.tasks.evaluations.pictures import answer_questions
from dora_dist.tasks.prompting.answering import Answer, _Streamer
from dora_dist.tasks.prompting.base import Picture, before
from tests import toy
from tests.terminal import CTRL_C, Terminal
from tests.unit.test_data import TOOLS
from tests.unit.test_evaluate_chats import ANSWERS, CHATML, chats
from tests.unit.test_evaluate_chats import folder as learnt  # noqa: F401
from tests.unit.test_evaluate_chats import one_thread as one_thread
from tests.unit.test_evaluate_pictures import NAMES, question
from tests.unit.test_evaluate_pictures import folder as seeing  # noqa: F401

QUERY = "model.layers.0.self_attn.q_proj"
ASKED = [{"messages": record["messages"][: 5 if i % 2 else 3]} for i, record in enumerate(chats())]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_was_learnt_by_heart_is_said_word_by_word(batch_size: int, learnt: Path) -> None:  # noqa: F811
    said = generate(learnt / "base", ASKED, dtype="fp32", batch_size=batch_size, progress=False)
    assert [each["answer"] for each in said] == ANSWERS
    assert {each["ended"] for each in said} == {"end"}
    assert all(each["prompt"].endswith("<|im_start|>assistant\n") for each in said)
    short = generate(learnt / "base", ASKED, dtype="fp32", max_new_tokens=1, progress=False)
    assert {(each["ended"], each["tokens"]) for each in short} == {("length", 1)}


def training_prompts(rendered: Rendered, tokenizer: Any) -> list[tuple[str, list[int]]]:
    """What training has before each answer: the text, and the tokens that it does not learn with that answer."""
    found = []
    for start, _ in rendered.answers:
        one = Rendered(rendered.text, ((start, len(rendered.text)),), rendered.complete)
        [(ids, answer)] = encode(tokenizer, [one])
        found.append((rendered.text[:start], ids[: answer.index(True)]))
    return found


def test_every_turn_s_prompt_is_what_training_rendered(learnt: Path) -> None:  # noqa: F811
    """Texts and tokens, of several turns with a system turn, and of each format of single answers."""
    prompting, turns = Speaker(str(learnt / "base")).prompting, ASKED[1]["messages"]
    rendered = FORMATS["messages"].render({"messages": turns}, prompting.tokenizer, True)
    made = [prompting.of_turns(turns[:i]) for i in (2, 4)]
    assert [(prompt.text, prompt.ids) for prompt in made] == training_prompts(rendered, prompting.tokenizer)
    assert prompting.of_record({"messages": turns}) == made[1]
    assert len(made[0].ids) < len(made[1].ids)

    records: dict[str, dict[str, str]] = {
        "instruction": {"instruction": "Is 2 even?", "output": "the correct answer is true"},
        "alpaca": {"instruction": "Is it even?", "input": "2", "output": "true"},
        "completion": {"prompt": "The answer is", "completion": " true"},
    }
    for format, record in records.items():
        prompting = Speaker(str(learnt / "base"), format=format).prompting
        prompt = prompting.of_record({name: record[name] for name in list(record)[:-1]})
        rendered = FORMATS[format].render(record, prompting.tokenizer, True)
        assert [(prompt.text, prompt.ids)] == training_prompts(rendered, prompting.tokenizer), format
        if format == "completion":
            assert prompting.of_turns([{"role": "user", "content": "The answer is"}]) == prompt


def test_what_a_record_says_besides_its_messages_is_in_its_prompt(learnt: Path) -> None:  # noqa: F811
    """Tools, "system" and the parts of a content, as training has them."""
    prompting = Speaker(str(learnt / "base")).prompting
    prompting.tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    parts = {"role": "user", "content": [{"type": "text", "text": "is 1 "}, {"type": "text", "text": "even?"}]}
    record = {"messages": [parts, {"role": "assistant", "content": "no"}], "system": "Be brief.", "tools": TOOLS}
    rendered = FORMATS["messages"].render(record, prompting.tokenizer, True)
    prompt = prompting.of_record(record, system="not this one")
    assert [(prompt.text, prompt.ids)] == training_prompts(rendered, prompting.tokenizer)
    assert prompt.text.startswith('[{"') and "Be brief." in prompt.text


def test_blanks_that_a_tokenizer_draws_into_the_answer_are_left_to_the_model() -> None:
    """As of GPT-2's kind, which has the last blank with the word: training's prompt ends before it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(["say   a true  a true"] * 9, trainers.BpeTrainer(special_tokens=["</s>"]))
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    rendered = Rendered("say   true", ((6, 10),))
    prompt = before(Exchange("say   ", "say   a", 6, 7, complete=False), tokenizer)
    assert [(prompt.text, prompt.ids)] == training_prompts(rendered, tokenizer)
    assert prompt.begins == " "
    assert prompt.ids != tokenizer("say   ").input_ids


@pytest.fixture(scope="module")
def processor(seeing: Path) -> Any:  # noqa: F811
    return load_processor(seeing / "base", DataConfig(train="-", format="llava", image_folder=str(seeing / "pictures")))


@pytest.mark.parametrize("template", ["vicuna_v1", "model"])
def test_a_conversation_about_pictures_is_rendered_as_in_training(
    template: str,
    seeing: Path,  # noqa: F811
    processor: Any,
    tmp_path: Path,
) -> None:
    tokenizer = processor.tokenizer
    if template == "model":
        tokenizer.chat_template = CHATML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
        for file in (seeing / "base").iterdir():
            (tmp_path / file.name).symlink_to(file)
        (tmp_path / "chat_template.jinja").write_text(tokenizer.chat_template)
    place = tmp_path if template == "model" else seeing / "base"
    prompting = Speaker(str(place), chat_template=template).prompting
    turns = [("user", "<image>\nis it red?"), ("assistant", "true"), ("user", "and <image> now?"), ("assistant", "no")]
    rendered = render(Conversation(tuple(turns), ("a", "b")), template, tokenizer, "<image>", spans=True)
    messages = [{"role": role, "content": text} for role, text in turns]
    expected = [(text, processor.stands.widened(ids)) for text, ids in training_prompts(rendered, tokenizer)]
    pictures = [Picture("a"), Picture("b")]
    made = [prompting.of_turns(messages[:1], pictures[:1]), prompting.of_turns(messages[:3], pictures)]
    assert [(prompt.text, prompt.ids) for prompt in made] == expected
    tokenizer.chat_template = None


def test_a_llava_says_of_pictures_what_it_says_in_evaluation(seeing: Path, processor: Any) -> None:  # noqa: F811
    model, _ = load_for_inference(str(seeing / "base"), "fp32")
    asked = [question("<image>\nis it red?", name) for name in NAMES[:3]]
    expected = answer_questions(model, processor, asked, max_new_tokens=8)
    assert len(set(expected)) > 1
    speaker = Speaker(str(seeing / "base"), dtype="fp32")
    speaker.load()
    pictures = [Picture(str(seeing / "pictures" / name)) for name in NAMES[:3]]
    prompts = [speaker.prompting.of_turns(speaker.prompting.opened("is it red?", None, 1), [p]) for p in pictures]
    said = speaker.answers(prompts, Sampling(max_new_tokens=8))
    assert [answer.text.strip() for answer in said] == expected


def test_a_run_its_adapter_and_the_merged_folder_say_the_same(learnt: Path, tmp_path: Path) -> None:  # noqa: F811
    """And the run's own format is kept."""
    layer = AdapterLayer(torch.full((2, 36), 0.1), torch.full((36, 2), 0.1), torch.ones(36), 1.0)
    adapter = tmp_path / "run" / "checkpoint-2" / "adapter"
    base = str(learnt / "base")
    write_peft_folder(adapter, PeftAdapter(base, 2, 2, 0.0, True, {QUERY: layer}))
    write_json(tmp_path / "run" / "config.json", {"model": {"path": base}, "data": {"format": "alpaca"}})
    write_manifest(adapter.parent, {"step": 2})
    consolidate(adapter, base, tmp_path / "merged", progress=False)
    how: dict[str, Any] = {"dtype": "fp32", "max_new_tokens": 6, "progress": False}
    asked = ["Is 2 even?", {"instruction": "Is it?", "input": "3"}]
    of_run = generate(tmp_path / "run", asked, **how)
    assert "### Input:\n3" in of_run[1]["prompt"]
    assert of_run == generate(adapter, asked, **how) == generate(tmp_path / "merged", asked, format="alpaca", **how)
    assert of_run != generate(base, asked, format="alpaca", **how)


def test_what_is_drawn_follows_from_its_seed(learnt: Path) -> None:  # noqa: F811
    how: dict[str, Any] = {"dtype": "fp32", "max_new_tokens": 12, "temperature": 5.0, "progress": False}
    first, second, other = (generate(learnt / "base", ["is 2 even?"], seed=seed, **how) for seed in (1, 1, 2))
    assert first == second != other
    sure = generate(learnt / "base", ASKED, dtype="fp32", top_k=1, progress=False)
    assert [each["answer"] for each in sure] == ANSWERS


def test_a_file_of_prompts_becomes_lines_of_answers(
    learnt: Path,  # noqa: F811
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({**row, "id": i}) + "\n" for i, row in enumerate(ASKED)))
    line = ["generate", str(learnt / "base"), "--dtype", "fp32", "--file"]
    assert cli.main([*line, str(tmp_path / "asked.jsonl"), "--output", str(tmp_path / "said.jsonl")]) == 0
    said = [json.loads(row) for row in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [(row["id"], row["answer"]) for row in said] == list(enumerate(ANSWERS))
    (tmp_path / "asked.txt").write_text("is 1 even?\n\nis 2 even?\n")
    capfd.readouterr()
    assert cli.main([*line, str(tmp_path / "asked.txt"), "--max-new-tokens", "4"]) == 0
    rows = [json.loads(row) for row in capfd.readouterr().out.splitlines()]
    assert ["is 2 even?" in row["prompt"] for row in rows] == [False, True]
    one = ["generate", str(learnt / "base"), "--dtype", "fp32", "--system", "answer 0", "--prompt", "is 0 even?"]
    assert cli.main(one) == 0
    assert capfd.readouterr().out == f"{ANSWERS[0]}\n"


def test_a_long_prompt_does_not_cut_the_answers_of_others(learnt: Path) -> None:  # noqa: F811
    """The last one leaves the model room for three tokens; its neighbours in the file have what they ask for."""
    speaker = Speaker(str(learnt / "base"), format="completion", dtype="fp32")
    prompting: Any = speaker.prompting
    short = [prompting.of_turns([{"role": "user", "content": text}]) for text in ("is 1 even?", "please answer")]
    positions = prompting.positions
    long = replace(short[0], ids=(short[0].ids * positions)[: positions - 3])
    asked: list[list[int]] = []
    rooms: list[int] = []

    class Heard:
        """Notes what would be asked together."""

        def __init__(self) -> None:
            self.prompting = prompting

        def answers(self, prompts: list[Any], sampling: Sampling) -> list[Answer]:
            asked.append([len(prompt.ids) for prompt in prompts])
            rooms.extend(prompting.room(prompt, sampling.max_new_tokens) for prompt in prompts)
            return [Answer(f"{len(prompt.ids)}", 1, "end") for prompt in prompts]

    said = list(answered(Heard(), [*short, long], Sampling(max_new_tokens=8), batch_size=8, progress=False))
    assert [answer.text for answer in said] == [f"{len(prompt.ids)}" for prompt in (*short, long)]
    assert len(asked) == 2 and asked[0] == [positions - 3] and sorted(rooms) == [3, 8, 8]


def test_answers_are_kept_whatever_ends_the_work(
    learnt: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of the first batches, where a later one is interrupted; fields that are not JSON's do not lose them either."""
    rows = [{**row, "at": datetime(2026, 1, 31), "odd": f"{i}"} for i, row in enumerate(ASKED)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "asked.parquet")
    output = tmp_path / "said.jsonl"
    line = ["generate", str(learnt / "base"), "--dtype", "fp32", "--max-new-tokens", "3", "--batch-size", "1"]
    line += ["--file", str(tmp_path / "asked.parquet"), "--output"]
    assert cli.main([*line, str(tmp_path / "nowhere" / "said.jsonl")]) == 2
    assert "cannot be written: No such file or directory" in capfd.readouterr().err
    assert cli.main([*line, str(output)]) == 0
    whole = output.read_text()
    assert len(whole.splitlines()) == len(rows) and json.loads(whole.splitlines()[0])["at"] == "2026-01-31 00:00:00"

    asked = Speaker.answers

    def interrupted(speaker: Speaker, prompts: Any, sampling: Any, **how: Any) -> Any:
        if left_to_say.pop() == 0:
            raise KeyboardInterrupt
        return asked(speaker, prompts, sampling, **how)

    left_to_say = list(range(5))
    monkeypatch.setattr(Speaker, "answers", interrupted)
    monkeypatch.setattr("dora_dist.evaluation.generate.WINDOW", 2)
    output.unlink()
    capfd.readouterr()
    assert cli.main([*line, str(output)]) != 0
    assert f"the first 4 answers are in {output}.partial" in capfd.readouterr().err
    assert Path(f"{output}.partial").read_text().splitlines() == whole.splitlines()[:4] and not output.exists()


def test_a_line_of_a_text_file_is_one_prompt(tmp_path: Path) -> None:
    (tmp_path / "asked.txt").write_bytes(b"\xef\xbb\xbfone\xe2\x80\xa8and more\r\n\r\ntwo")
    options = Namespace(prompt=None, file=str(tmp_path / "asked.txt"), limit=None)
    assert [text for _, text in speak._read(options)] == ["one\u2028and more", "two"]
    assert speak._as_line({"a": "\ud83d é"}) == '{"a": "\\ud83d é"}\n'


def test_the_text_that_ends_a_turn_is_not_shown() -> None:
    said: list[str] = []
    streamer = _Streamer(toy.tokenizer(), "", "[end]", said.append)
    for text in ("a [e", "asy] one [", "en", "d] more", " more"):
        streamer.on_finalized_text(text)
    assert "".join(said) == "a [easy] one "
    said.clear()
    streamer = _Streamer(toy.tokenizer(), "", "[end]", said.append)
    streamer.on_finalized_text("a [en")
    streamer.on_finalized_text("", stream_end=True)
    assert "".join(said) == "a [en"


def test_chats_may_be_the_cells_of_a_table(learnt: Path) -> None:  # noqa: F811
    speaker = Speaker(str(learnt / "base"))
    cell = {"messages": json.dumps(ASKED[0]["messages"])}
    assert made_prompts(speaker, [("a", cell)], None) == made_prompts(speaker, [("a", ASKED[0])], None)
    with pytest.raises(UserError, match='a: "messages" must be a list'):
        made_prompts(speaker, [("a", {"messages": "[1"})], None)


def test_a_conversation_in_a_terminal(learnt: Path, tmp_path: Path) -> None:  # noqa: F811
    """Answers come as they were learnt, with earlier turns in the prompt; Ctrl-C ends an answer, Ctrl-D the program."""
    command = ["dora-dist", "chat", str(learnt / "base"), "--dtype", "fp32", "--system", "answer 1"]
    terminal = Terminal(100, command, folder=tmp_path)
    terminal.until(lambda text: text.rstrip().endswith(">"))
    terminal.press(b"is it even?\n")
    terminal.until(lambda text: text.count("\n>") == 2)
    terminal.press(b"is 1 even?\n")
    text = terminal.until(lambda text: text.count("\n>") == 3)
    assert "false" in text.rpartition("is 1 even?")[2]
    terminal.press(b"/reset\n")
    terminal.until(lambda text: "a new conversation" in text)
    terminal.press(b"/nonsense\n")
    terminal.until(lambda text: text.count("/reset forgets") == 2)
    terminal.press(CTRL_C)
    terminal.until(lambda text: "(Ctrl-D ends)" in text and text.rstrip().endswith(">"))
    terminal.press(b"\x04")
    assert terminal.end() == 0, terminal.text
    assert "Traceback" not in terminal.text


def test_ctrl_c_ends_an_answer_and_not_the_conversation(learnt: Path, tmp_path: Path) -> None:  # noqa: F811
    toy.base_model(tmp_path / "base", max_position_embeddings=1_000_000, eos_token_id=None)
    options = ["--dtype", "fp32", "--format", "completion", "--max-new-tokens", "900000"]
    terminal = Terminal(100, ["dora-dist", "chat", "base", *options], folder=tmp_path)
    terminal.until(lambda text: text.rstrip().endswith(">"))
    terminal.press(b"please answer\n")
    terminal.until(lambda text: len(text.rpartition("please answer")[2]) > 20)
    terminal.press(CTRL_C)
    terminal.until(lambda text: "ended by Ctrl-C" in text.replace("\n", "") and text.rstrip().endswith(">"))
    terminal.press(b"/quit\n")
    assert terminal.end() == 0, terminal.text
