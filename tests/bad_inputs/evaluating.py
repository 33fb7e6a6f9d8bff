"""`evaluate`: models, records and places that do not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dora_dist.adapters.peft_format import PeftAdapter, write_peft_folder
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.checkpoint.manifest import write_manifest
from dora_dist.runtime.exit_codes import DONE
from tests.bad_inputs.case import Folder, Table, Words

CASES = Table()

QUERY = "model.layers.0.self_attn.q_proj"  # 36 x 36 in the toy base
CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "is 2 even?"}, {"role": "assistant", "content": "true"}]}


def evaluate(folder: Folder, *options: str, model: str = "base", task: str = "boolq=data.json") -> Words:
    """`evaluate` of toys, which are made if missing."""
    if not (folder / "base").exists():
        folder.base()
    if not (folder / "data.json").exists():
        folder.data(count=3)
    return ["evaluate", model, "--tasks", task, "--batch-size", "4", "--max-new-tokens", "2", *options]


def likelihood(folder: Folder, *options: str, **which: str) -> Words:
    """The same, of candidates."""
    words = evaluate(folder, "--mode", "likelihood", *options, **which)
    return [word for i, word in enumerate(words) if "--max-new-tokens" not in words[max(i - 1, 0) : i + 1]]


def records(folder: Folder, *rows: Any, name: str = "data.json") -> Path:
    return folder.text(name, json.dumps(list(rows)))


def adapter(folder: Folder, name: str = "adapter", base: str = "base", width: int = 36) -> Path:
    """A PEFT DoRA folder of one module of the toy base, or of a base of another width."""
    layer = AdapterLayer(torch.full((2, width), 0.1), torch.full((width, 2), 0.1), torch.ones(width), 1.0)
    write_peft_folder(folder / name, PeftAdapter(base, 2, 2, 0.0, True, {QUERY: layer}))
    return folder / name


def run(folder: Folder, base: str = "base", **data: Any) -> Path:
    """A run folder with one checkpoint."""
    folder.text("run/config.json", json.dumps({"model": {"path": base}, "data": data}))
    checkpoint = folder / "run/checkpoint-2"
    adapter(folder, "run/checkpoint-2/adapter", base)
    write_manifest(checkpoint, {"step": 2})
    return folder / "run"


def spoilt(folder: Folder, name: str, value: float, dtype: torch.dtype = torch.float32) -> None:
    """A toy base whose tensor `name` has `value` as its first number."""
    file = folder.base() / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name].to(dtype)
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, {"format": "pt"})


def template(folder: Folder, text: str = CHATML) -> None:
    """A toy base whose tokenizer has this chat template."""
    folder.base()
    folder.edited("base/tokenizer_config.json", chat_template=text)


# --- records --------------------------------------------------------------------------------------------------------


@CASES.bad(says="data file nowhere.json: no such file in ")
def tasks_file_missing(folder: Folder) -> Words:
    return evaluate(folder, task="boolq=nowhere.json")


@CASES.bad(says="data file data.json: the file is empty")
def tasks_file_empty(folder: Folder) -> Words:
    folder.text("data.json", "")
    return evaluate(folder)


@CASES.bad(says="data.json holds no records")
def tasks_file_without_records(folder: Folder) -> Words:
    records(folder)
    return evaluate(folder)


@CASES.bad(says="data.json, line 2 is not JSON")
def tasks_file_broken(folder: Folder) -> Words:
    folder.text("data.json", '[{"instruction": "a",\n oops}]')
    return evaluate(folder)


@CASES.bad(says=('data.json, record 1 has no "instruction"', 'did you mean to rename "instructions"'))
def wrong_fields(folder: Folder) -> Words:
    records(folder, {"instructions": "is 2 even?", "answer": "true"})
    return evaluate(folder)


@CASES.bad(says=('data.json, record 2: "answer" is None', 'no label of task "boolq" (true, false)'))
def no_answers(folder: Folder) -> Words:
    records(folder, {"instruction": "a", "answer": "true"}, {"instruction": "b", "output": "true"})
    return evaluate(folder)


@CASES.bad(says=("\"answer\" is 'yes'", "is the file another task's?"))
def unknown_label(folder: Folder) -> Words:
    records(folder, {"instruction": "a", "answer": "yes"})
    return evaluate(folder)


@CASES.bad(says="--tasks: a name is given twice in boolq, boolq")
def name_given_twice(folder: Folder) -> Words:
    words = evaluate(folder)
    return [*words[:4], "boolq=base/config.json", *words[4:]]


@CASES.bad(says='did you mean "boolq"?')
def misspelt_task(folder: Folder) -> Words:
    return evaluate(folder, task="bolq=data.json")


@CASES.bad(says=('task "mine" is none of the paper', "--mode likelihood", "another --format"))
def own_task_in_the_papers_way(folder: Folder) -> Words:
    return evaluate(folder, task="mine=data.json")


@CASES.bad(says="argument --limit: '0' is not a whole number above 0")
def limit_of_nothing(folder: Folder) -> Words:
    return evaluate(folder, "--limit", "0")


@CASES.bad(says="none of the \"choices\" ['a', 'b'] is the record's")
def no_right_choice(folder: Folder) -> Words:
    records(folder, {"instruction": "a", "output": "c", "choices": ["a", "b"]})
    return likelihood(folder, task="mine=data.json")


@CASES.bad(says='"choices" holds the same text twice')
def choices_twice(folder: Folder) -> Words:
    records(folder, {"instruction": "a", "output": "b", "choices": ["b", "b"]})
    return likelihood(folder, task="mine=data.json")


@CASES.bad(says=("data.json, record 2: it has", "the model reads 512 at most", "(1 of 2 records are too long)"))
def prompt_beyond_the_context(folder: Folder) -> Words:
    records(folder, *({"instruction": "is it? " * count, "answer": "true"} for count in (2, 400)))
    return evaluate(folder)


@CASES.bad(says=("record 1: it has", "600 more are to be generated (--max-new-tokens)", "or lower --max-new-tokens"))
def no_room_to_generate(folder: Folder) -> Words:
    return [*evaluate(folder), "--max-new-tokens", "600"]


@CASES.bad(says="data.json, record 1: it has")
def candidates_beyond_the_context(folder: Folder) -> Words:
    records(folder, {"instruction": "a", "output": "x", "choices": ["x", "is it? " * 400]})
    return likelihood(folder, task="mine=data.json")


@CASES.bad(says="data.json, record 1: its prompt is empty")
def loss_after_an_empty_prompt(folder: Folder) -> Words:
    records(folder, {"prompt": "", "completion": "true"})
    return ["evaluate", str(folder.base()), "--tasks", "a=data.json", "--format", "completion", "--mode", "loss"]


@CASES.bad(says="no prompt in front of the candidates")
def choice_after_an_empty_prompt(folder: Folder) -> Words:
    records(folder, {"prompt": "", "completion": "true", "choices": ["true", "false"]})
    return likelihood(folder, "--format", "completion", task="mine=data.json")


@CASES.bad(says="data.json, record 1: its answer is empty")
def empty_reference(folder: Folder) -> Words:
    records(folder, {"prompt": "is 2 even?", "completion": " "})
    return evaluate(folder, "--format", "completion", task="mine=data.json")


# --- chats ----------------------------------------------------------------------------------------------------------


@CASES.bad(says="has no assistant turn that answers something")
def chat_without_an_answer(folder: Folder) -> Words:
    template(folder)
    records(folder, {"messages": CHAT["messages"][:1]})
    return evaluate(folder, "--format", "messages", task="mine=data.json")


@CASES.bad(says='message 1 must be an object with "role" and "content", found "is 2 even?"')
def chat_of_texts(folder: Folder) -> Words:
    template(folder)
    records(folder, {"messages": ["is 2 even?", "true"]})
    return evaluate(folder, "--format", "messages", task="mine=data.json")


@CASES.bad(says=("data.json, record 1:", "chat template"))
def chat_without_a_template(folder: Folder) -> Words:
    records(folder, CHAT)
    return evaluate(folder, "--format", "messages", task="mine=data.json")


@CASES.bad(says="writes the messages before the answer differently when the answer follows")
def chat_template_that_rewrites(folder: Folder) -> Words:
    template(folder, "{{ messages | length }}{% for m in messages %} {{ m['content'] }}{% endfor %}")
    records(folder, CHAT)
    return evaluate(folder, "--format", "messages", task="mine=data.json")


@CASES.bad(says=("its answer 'maybe' has no label of task \"boolq\"", "give the task another name"))
def chat_of_a_paper_task_without_label(folder: Folder) -> Words:
    template(folder)
    chat = [CHAT["messages"][0], {"role": "assistant", "content": "maybe"}]
    records(folder, {"messages": chat})
    return evaluate(folder, "--format", "messages")


@CASES.bad(says=('the run\'s data.format says, "messages"', 'record 1 has no "messages"'))
def run_of_chats_on_other_records(folder: Folder) -> Words:
    run(folder, format="messages")
    return evaluate(folder, model="run", task="mine=data.json")


# --- models ---------------------------------------------------------------------------------------------------------


@CASES.bad(says=("base model 'gone/base.v2/x': no such folder", "run/checkpoint-2/adapter", "--base MODEL"))
def base_of_a_run_moved(folder: Folder) -> Words:
    run(folder, base="gone/base.v2/x")
    return evaluate(folder, model="run")


@CASES.bad(says=("lab/moved", "HF_HUB_OFFLINE is set", "--base MODEL"))
def base_that_looks_like_a_hub_name(folder: Folder) -> Words:
    adapter(folder, base="lab/moved")
    return evaluate(folder, model="adapter")


@CASES.bad(says=("base model './other': no such folder", "with --base"))
def base_option_that_is_nowhere(folder: Folder) -> Words:
    adapter(folder)
    return evaluate(folder, "--base", "./other", model="adapter")


@CASES.bad(says="--base base: base is a whole model, which needs no base; leave it out")
def base_option_for_a_whole_model(folder: Folder) -> Words:
    return evaluate(folder, "--base", "base")


@CASES.bad(says=(f"it adapts '{QUERY}' as (40, 40)", "base has it as (36, 36); give the base that it was trained on"))
def base_of_another_width(folder: Folder) -> Words:
    adapter(folder, width=40)
    return evaluate(folder, model="adapter")


@CASES.bad(says="does not say what its base model is; give it with --base MODEL")
def adapter_without_a_base(folder: Folder) -> Words:
    adapter(folder, base="")
    return evaluate(folder, model="adapter")


@CASES.bad(says=("run: a run that has no complete checkpoint yet", "wait for its first (checkpoint.save_every)"))
def run_without_a_checkpoint(folder: Folder) -> Words:
    shutil.rmtree(run(folder) / "checkpoint-2")
    folder.text("run/deepspeed.json", "{}")
    return evaluate(folder, model="run")


@CASES.bad(says=("empty:", "give an adapter folder, a checkpoint or a run folder"))
def folder_of_nothing(folder: Folder) -> Words:
    (folder / "empty").mkdir()
    return evaluate(folder, model="empty")


@CASES.bad(says=("base:", "pickled weights only, which are never loaded: save the model as safetensors first"))
def pickles_as_model(folder: Folder) -> Words:
    (folder.base() / "model.safetensors").rename(folder / "base/pytorch_model.bin")
    return evaluate(folder)


@CASES.bad(says="data.json: is a file; give the folder that it is in")
def file_as_model(folder: Folder) -> Words:
    return evaluate(folder, model="data.json")


@CASES.bad(says=("'nobody/nothing'", "HF_HUB_OFFLINE is set", "hf download nobody/nothing"))
def hub_name_offline(folder: Folder) -> Words:
    return evaluate(folder, model="nobody/nothing")


def overflowing(folder: Folder) -> None:
    """A toy base of finite weights whose logits are too large for any number."""
    file = folder.base() / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"].fill_(3e38)
    save_file(tensors, file, {"format": "pt"})


@CASES.bad(says=("the model's logits are NaN or infinite", "no answer of it means anything"))
def infinite_when_generating(folder: Folder) -> Words:
    overflowing(folder)
    return evaluate(folder)


@CASES.bad(says="the model's logits are NaN or infinite")
def infinite_in_likelihoods(folder: Folder) -> Words:
    overflowing(folder)
    return likelihood(folder)


@CASES.bad(says=("the model's logits are NaN or infinite", "too large for fp16: try --dtype bf16 or fp32"))
def infinite_in_fp16(folder: Folder) -> Words:
    file = folder.base() / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"].fill_(6e4)
    save_file(tensors, file, {"format": "pt"})
    return evaluate(folder, "--dtype", "fp16")


@CASES.bad(says=("generation_config.json asks for sampling", "searched for without it", "accuracy"), code=DONE)
def sampling_asked_for(folder: Folder) -> Words:
    folder.base()
    folder.edited("base/generation_config.json", do_sample=True, temperature=0.7)
    return evaluate(folder)


# --- options --------------------------------------------------------------------------------------------------------


@CASES.bad(says="--num-beams 3: means nothing with --mode likelihood; leave it out")
def beams_of_likelihood(folder: Folder) -> Words:
    return likelihood(folder, "--num-beams", "3")


@CASES.bad(says="--normalise mean: means nothing with --mode generate; leave it out")
def normalised_generation(folder: Folder) -> Words:
    return evaluate(folder, "--normalise", "mean")


@CASES.bad(says="--instruction Be brief.: means nothing to this model, whose task is causal_lm; leave it out")
def instruction_for_text(folder: Folder) -> Words:
    return evaluate(folder, "--instruction", "Be brief.")


@CASES.bad(says="--text-fields a b: means nothing to this model, whose task is causal_lm; leave it out")
def text_fields_of_a_language_model(folder: Folder) -> Words:
    return evaluate(folder, "--text-fields", "a", "b")


@CASES.bad(says="--format vqa: is not for a language model; give one of instruction, alpaca, completion, messages")
def pictures_of_a_language_model(folder: Folder) -> Words:
    return evaluate(folder, "--format", "vqa")


@CASES.bad(says="--output base: is a folder; give the name of a file in it")
def result_is_a_folder(folder: Folder) -> Words:
    return evaluate(folder, "--output", "base")


@CASES.bad(says="data.json/result.json: cannot be written: ")
def result_below_a_file(folder: Folder) -> Words:
    return evaluate(folder, "--output", "data.json/result.json")


@CASES.bad(says="/proc/nowhere/result.json: cannot be written: ")
def result_where_nothing_can_be_made(folder: Folder) -> Words:
    return evaluate(folder, "--output", "/proc/nowhere/result.json")


@CASES.bad(says=("x.json: cannot be written: File name too long"))
def result_of_a_long_name(folder: Folder) -> Words:
    return evaluate(folder, "--output", f"{'x' * 250}.json")


@CASES.bad(says="--output data.json: is there already and is not a result of evaluate; give another name")
def result_over_the_data(folder: Folder) -> Words:
    return evaluate(folder, "--output", "data.json")


@CASES.bad(says=("task     accuracy", "average", "/dev/full: cannot be written: No space left on device"))
def result_on_a_full_disk(folder: Folder) -> Words:
    return evaluate(folder, "--output", "/dev/full")
