"""`consolidate`, `assemble-llava` and `import-gguf`: models and places that do not fit."""

from dora_dist.checkpoint.manifest import MANIFEST
from dora_dist.runtime.exit_codes import DONE
from tests import llava
from tests.bad_inputs.case import Folder, Table, Words
from tests.bad_inputs.evaluating import QUERY, adapter, evaluate, records, run, spoilt

CASES = Table()

# --- consolidate ----------------------------------------------------------------------------------------------------


def consolidate(folder: Folder, *options: str, path: str = "adapter", output: str = "merged") -> Words:
    """`consolidate` of toys, which are made if missing."""
    if not (folder / "base").exists():
        folder.base()
    if not (folder / "adapter").exists():
        adapter(folder)
    return ["consolidate", path, "--output", output, *options]


@CASES.bad(says="merged: already exists; choose another name, or replace it with --overwrite\n")
def merged_already(folder: Folder) -> list[Words]:
    return [consolidate(folder), consolidate(folder)]


@CASES.bad(says="holds the base that is to be read; choose another output folder")
def merged_over_the_base(folder: Folder) -> Words:
    return consolidate(folder, "--overwrite", output="base")


@CASES.bad(says=("lies in the base", "which must stay as it is"))
def merged_into_the_base(folder: Folder) -> Words:
    return consolidate(folder, output="base/merged")


@CASES.bad(says=("lies in the checkpoint", "which must stay as it is"))
def merged_into_a_checkpoint(folder: Folder) -> Words:
    run(folder)
    return consolidate(folder, path="run", output="run/checkpoint-2/merged")


@CASES.bad(says="checkpoint-9: is named as a run's checkpoints are, and would be taken for one; give another name")
def merged_model_named_as_a_checkpoint(folder: Folder) -> Words:
    return consolidate(folder, output="run/checkpoint-9")


@CASES.bad(says="notes: already exists and does not hold a model")
def merged_over_something_else(folder: Folder) -> Words:
    folder.text("notes/todo.txt", "keep me")
    return consolidate(folder, "--overwrite", output="notes")


@CASES.bad(says="base/config.json/merged: cannot be written: ")
def merged_below_a_file(folder: Folder) -> Words:
    folder.base("other")
    adapter(folder, base="other")
    return consolidate(folder, output="base/config.json/merged")


@CASES.bad(says="cannot be written: File name too long")
def merged_to_a_long_name(folder: Folder) -> Words:
    return consolidate(folder, output="x" * 250)


@CASES.bad(says=("tensor 'model.norm.weight' would not be finite", "too large for torch.float16", "--dtype bf16"))
def too_large_for_fp16(folder: Folder) -> Words:
    spoilt(folder, "model.norm.weight", 1e6)
    return consolidate(folder, "--dtype", "fp16")


@CASES.bad(says=(f"tensor '{QUERY}.weight' would not be finite", "its base, adapter or their sum holds NaN"))
def nan_in_the_base(folder: Folder) -> Words:
    spoilt(folder, f"{QUERY}.weight", float("nan"))
    return consolidate(folder)


@CASES.bad(says=f"it adapts '{QUERY}' as (40, 40)")
def merged_with_another_width(folder: Folder) -> Words:
    adapter(folder, width=40)
    return consolidate(folder)


@CASES.bad(says=("base model '/gone/base': no such folder", "--base MODEL"))
def merged_without_its_base(folder: Folder) -> Words:
    adapter(folder, base="/gone/base")
    return consolidate(folder)


@CASES.bad(says="base: no adapter_config.json or dora_dist_adapter.json and no complete checkpoint-* in it")
def whole_model_as_adapter(folder: Folder) -> Words:
    return consolidate(folder, path="base")


@CASES.bad(says="run/checkpoint-2: incomplete checkpoint (saving was cut short)")
def merged_from_an_incomplete_checkpoint(folder: Folder) -> Words:
    (run(folder) / "checkpoint-2" / MANIFEST).unlink()
    return consolidate(folder, path="run/checkpoint-2")


@CASES.bad(says=("21 tensors are larger than --max-shard-size", "get files of their own", "merged:"), code=DONE)
def shards_smaller_than_tensors(folder: Folder) -> Words:
    return consolidate(folder, "--max-shard-size", "1KB")


@CASES.bad(says="'0GB' is not a size; give 5GB, 500MB or 2GiB")
def shards_of_nothing(folder: Folder) -> Words:
    return consolidate(folder, "--max-shard-size", "0GB")


# --- assemble-llava -------------------------------------------------------------------------------------------------


def assemble(folder: Folder, *options: str, vision: str = "tower", language: str = "base") -> Words:
    """`assemble-llava` of toys, which are made if missing: a CLIP tower of 3 layers, pictures of 28 pixels."""
    if not (folder / "tower").exists():
        llava.tower(folder / "tower")
    if not (folder / "base").exists():
        folder.base()
    return ["assemble-llava", "--vision", vision, "--language", language, "--output", "llava", *options]


@CASES.bad(says="--vision base: 'llama' is not a vision tower")
def language_model_as_tower(folder: Folder) -> Words:
    return assemble(folder, vision="base")


@CASES.bad(says="--language tower: 'clip_vision_model' is not a causal language model")
def tower_as_language_model(folder: Folder) -> Words:
    return assemble(folder, language="tower")


@CASES.bad(says="--image-token '</s>': is the eos_token of base")
def image_token_in_use(folder: Folder) -> Words:
    return assemble(folder, "--image-token", "</s>")


@CASES.bad(says=("--feature-layer -9", "the tower has 3 layers"))
def feature_layer_out_of_range(folder: Folder) -> Words:
    return assemble(folder, "--feature-layer", "-9")


@CASES.bad(says=("--image-size 30", "14"))
def image_size_that_does_not_divide(folder: Folder) -> Words:
    return assemble(folder, "--image-size", "30")


@CASES.bad(says=("nowhere", "no such folder"))
def tower_that_is_nowhere(folder: Folder) -> Words:
    return assemble(folder, vision="./nowhere")


@CASES.bad(says="is it the model that its config.json describes?")
def tower_without_its_weights(folder: Folder) -> Words:
    llava.tower(folder / "tower")
    folder.edited("tower/config.json", num_hidden_layers=5)
    return assemble(folder)


@CASES.bad(says="holds the vision tower that is to be read; choose another output folder")
def llava_over_its_tower(folder: Folder) -> Words:
    return [*assemble(folder)[:-1], "tower", "--overwrite"]


@CASES.bad(says="llava: already exists and does not hold a model; choose another output folder")
def llava_already(folder: Folder) -> Words:
    folder.text("llava/notes.txt", "keep me")
    return assemble(folder)


@CASES.bad(says=("data.json, record 1 (id 'q'): it has", "the model reads 512 at most", "or lower --max-new-tokens"))
def question_about_pictures_too_long(folder: Folder) -> list[Words]:
    records(folder, {"id": "q", "text": "is it? " * 300, "answer": "true"})
    return [assemble(folder), evaluate(folder, model="llava")]


@CASES.bad(says="--mode loss: is for a language model, and this is image_text_to_text; leave it out")
def loss_of_a_llava(folder: Folder) -> list[Words]:
    return [assemble(folder), ["evaluate", "llava", "--tasks", "vqa=base/config.json", "--mode", "loss"]]


# --- import-gguf ----------------------------------------------------------------------------------------------------


def gguf(file: str) -> Words:
    return ["import-gguf", file, "--output", "imported"]


@CASES.bad(says="nowhere.gguf: no such file")
def gguf_missing(folder: Folder) -> Words:
    return gguf("nowhere.gguf")


@CASES.bad(says="a.gguf: not a GGUF file (it does not start with 'GGUF'); download it again")
def gguf_of_something_else(folder: Folder) -> Words:
    folder.text("a.gguf", "<html>Not found</html>")
    return gguf("a.gguf")


@CASES.bad(says=("a.gguf: cannot be converted", "use a complete file of a LLaMA model"))
def gguf_cut_short(folder: Folder) -> Words:
    folder.text("a.gguf", b"GGUF\x03\x00\x00\x00\x05")
    return gguf("a.gguf")


@CASES.bad(says="base: is a folder")
def gguf_folder(folder: Folder) -> Words:
    folder.base()
    return gguf("base")


@CASES.bad(says="holds the GGUF file that is to be read; choose another output folder")
def gguf_over_itself(folder: Folder) -> Words:
    folder.text("imported/a.gguf", b"GGUF\x03\x00\x00\x00\x05")
    return [*gguf("imported/a.gguf"), "--overwrite"]


@CASES.bad(says="imported: already exists and does not hold a model; choose another output folder")
def gguf_over_something(folder: Folder) -> Words:
    folder.text("imported/notes.txt", "keep me")
    folder.text("a.gguf", b"GGUF\x03\x00\x00\x00\x05")
    return gguf("a.gguf")
