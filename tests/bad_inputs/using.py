"""`generate`, `chat` and what else is done with a trained model: prompts, options and folders that do not fit."""

from pathlib import Path

from tests.bad_inputs.case import Folder, Table, Words
from tests.bad_inputs.evaluating import adapter

CASES = Table()


def generate(folder: Folder, *options: str, model: str = "base") -> Words:
    if not (folder / "base").exists():
        folder.base()
    return ["generate", model, *options]


def classifier(path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertForSequenceClassification(BertConfig(vocab_size=10, **sizes)).save_pretrained(path)


@CASES.bad(says="./nowhere: no such folder; give a model, adapter, checkpoint or run folder")
def generate_from_nowhere(folder: Folder) -> Words:
    return generate(folder, "--prompt", "a", model="./nowhere")


@CASES.bad(says=("task is sequence_classification", "measure it (dora-dist evaluate)"))
def generate_from_a_classifier(folder: Folder) -> Words:
    folder.made("classifier", classifier)
    return generate(folder, "--prompt", "a", model="classifier")


@CASES.bad(says="data file nowhere.jsonl: no such file in ")
def prompts_missing(folder: Folder) -> Words:
    return generate(folder, "--file", "nowhere.jsonl")


@CASES.bad(says=("--file nowhere.txt: cannot be read", "give another file"))
def lines_missing(folder: Folder) -> Words:
    return generate(folder, "--file", "nowhere.txt")


@CASES.bad(says="--file empty.txt: holds no prompts; write one on each line")
def lines_empty(folder: Folder) -> Words:
    folder.text("empty.txt", "\n\n")
    return generate(folder, "--file", "empty.txt")


@CASES.bad(says=('asked.jsonl, line 2: has no "instruction"', 'format "instruction"', "it has question"))
def prompts_of_other_fields(folder: Folder) -> Words:
    folder.text("asked.jsonl", '{"instruction": "a"}\n{"question": "b"}\n')
    return generate(folder, "--file", "asked.jsonl", "--format", "instruction")


@CASES.bad(says=("asked.jsonl, line 1: it has ", "the model reads 512 at most"))
def prompt_too_long(folder: Folder) -> Words:
    folder.text("asked.jsonl", '{"prompt": "%s"}\n' % ("is it even? " * 300))
    return generate(folder, "--file", "asked.jsonl")


@CASES.bad(says="--prompt: is empty; give what to ask")
def prompt_empty(folder: Folder) -> Words:
    return generate(folder, "--prompt", " ")


@CASES.bad(says=("--system: prompts of", "have no place for it; leave it out"))
def system_without_chats(folder: Folder) -> Words:
    return generate(folder, "--prompt", "a", "--system", "be kind")


@CASES.bad(says="--image: the model reads no pictures; leave it out")
def picture_for_a_language_model(folder: Folder) -> Words:
    return generate(folder, "--prompt", "a", "--image", "a.png")


@CASES.bad(says="the tokenizer has no chat template")
def chats_without_a_template(folder: Folder) -> Words:
    return ["chat", *generate(folder)[1:], "--format", "messages"]


@CASES.bad(says="--temperature -1.0: must be between 0 and 100")
def temperature_below_zero(folder: Folder) -> Words:
    return generate(folder, "--prompt", "a", "--temperature", "-1")


@CASES.bad(says="--temperature 0: takes the likeliest token")
def temperature_of_nothing(folder: Folder) -> Words:
    return generate(folder, "--prompt", "a", "--temperature", "0", "--top-p", "0.9")


@CASES.bad(says="--top-p 1.5: must be above 0 and at most 1")
def top_p_above_one(folder: Folder) -> Words:
    return generate(folder, "--prompt", "a", "--top-p", "1.5")


@CASES.bad(says="give the folder or hub name of a model with --base")
def chat_on_a_base_that_is_not_there(folder: Folder) -> Words:
    adapter(folder)
    return ["chat", "adapter", "--base", "./nowhere"]


@CASES.bad(says="--rank 1: the nearest LoRA loses")
def lora_that_loses_much(folder: Folder) -> Words:
    folder.base()
    adapter(folder)
    return ["export", "adapter", "--to", "lora", "--rank", "1", "--output", "lora", "--max-error", "0.001"]


@CASES.bad(says=("base: no adapter_config.json or ", "give an adapter folder, a checkpoint or a run folder"))
def lora_of_a_model(folder: Folder) -> Words:
    folder.base()
    return ["export", "base", "--to", "lora", "--output", "lora"]


def gguf(path: str, *options: str) -> Words:
    return ["export", path, "--to", "gguf", "--output", "model.gguf", *options]


@CASES.bad(says=("base/config.json: hidden_act = 'gelu' cannot be written as GGUF", "llama.cpp computes silu"))
def gguf_of_another_activation(folder: Folder) -> Words:
    folder.base()
    folder.edited("base/config.json", hidden_act="gelu")
    return gguf("base")


@CASES.bad(says="nowhere: no such folder; give an adapter folder, a checkpoint or a run folder")
def gguf_of_nothing(folder: Folder) -> Words:
    return gguf("nowhere")


@CASES.bad(says="--rank: is for --to lora, and has no meaning with --to gguf; leave it out")
def gguf_of_a_rank(folder: Folder) -> Words:
    folder.base()
    return gguf("base", "--rank", "8")


@CASES.bad(says="--type: is for --to gguf, and has no meaning with --to lora; leave it out")
def lora_of_a_type(folder: Folder) -> Words:
    return ["export", "adapter", "--to", "lora", "--output", "lora", "--type", "f16"]


@CASES.bad(says="--base base: base is a whole model; leave it out")
def gguf_of_a_model_with_a_base(folder: Folder) -> Words:
    folder.base()
    return gguf("base", "--base", "base")


@CASES.bad(says="model.gguf: is a folder; give the name of a file")
def gguf_into_a_folder(folder: Folder) -> Words:
    folder.base()
    folder.text("model.gguf/notes.txt", "mine")
    return gguf("base")


@CASES.bad(says="model.gguf: already exists and is not a GGUF file")
def gguf_over_something_else(folder: Folder) -> Words:
    folder.base()
    folder.text("model.gguf", "my notes")
    return gguf("base", "--overwrite")


@CASES.bad(says=("tokenizer cuts words by Whitespace", "known are those of gpt-2"))
def gguf_of_a_tokenizer_that_is_not_known(folder: Folder) -> Words:
    folder.base()
    folder.edited("base/tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    return gguf("base")


@CASES.bad(says="nowhere: no such folder; give an adapter folder, a merged folder or a run")
def push_nothing(folder: Folder) -> Words:
    return ["push", "nowhere", "org/name", "--dry-run"]


@CASES.bad(says=("has no weights that belong on the hub", "merge a run first (dora-dist consolidate)"))
def push_a_checkpoint_without_an_adapter(folder: Folder) -> Words:
    folder.text("checkpoint/state.safetensors", "moments")
    return ["push", "checkpoint", "org/name"]
