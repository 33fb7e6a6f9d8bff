"""Run folders, checkpoints and resumes that cannot be meant; and changes on the way, which are said.

`Folder.trained` is a run of four steps in `run`, with checkpoint-2 and checkpoint-4, and the words that resume it.
"""

import json
import shutil
from typing import Any

import torch

from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.manifest import write_manifest
from dora_dist.runtime.exit_codes import DONE, USERS_MISTAKE
from tests import toy
from tests.bad_inputs.case import Folder, Table, Words

CASES = Table()
BOTH = (1, 2)

# --- a run folder that cannot be one --------------------------------------------------------------------------------

CASES.option("run_dir_on_proc", "--checkpoint.run_dir=/proc/runs", says="nothing can be written there (No such file")
CASES.option("run_dir_with_a_long_name", f"--checkpoint.run_dir={'x' * 300}", says="there (File name too long)")
CASES.option("run_dir_is_a_file", "--checkpoint.run_dir=data.json", says="data.json is a file; give another folder")
CASES.option("run_dir_below_a_file", "--checkpoint.run_dir=data.json/a/b", says="data.json is a file; give another")
CASES.option("run_dir_is_the_base", "--checkpoint.run_dir=base", says='run_dir = "base": holds a model', ranks=BOTH)
CASES.option("run_dir_has_the_config", "--checkpoint.run_dir=.", says='run_dir = ".": holds a config.json that no run')


@CASES.bad(says="is a link to nowhere, where nothing can be found")
def run_dir_is_a_dangling_link(folder: Folder) -> Words:
    (folder / "link").symlink_to("nowhere")
    return folder.run("--checkpoint.run_dir=link/run")


@CASES.bad(says="link is a link to link, where nothing can be found")
def run_dir_is_a_link_to_itself(folder: Folder) -> Words:
    (folder / "link").symlink_to("link")
    return folder.run("--checkpoint.run_dir=link")


@CASES.bad(says=('run_dir = "run/checkpoint-4": is a checkpoint; give its run folder, ', "/run, or another"))
def run_dir_is_a_checkpoint(folder: Folder) -> Words:
    return folder.trained("--checkpoint.run_dir=run/checkpoint-4")


@CASES.bad(says='run_dir = "run/checkpoint-4/adapter": holds an adapter')
def run_dir_is_an_adapter(folder: Folder) -> Words:
    return folder.trained("--checkpoint.run_dir=run/checkpoint-4/adapter")


@CASES.bad(says="run already holds a run (checkpoint-4); go on with it by --checkpoint.resume auto", ranks=BOTH)
def run_dir_holds_a_run(folder: Folder) -> Words:
    return [word for word in folder.trained() if word != "--resume"]


# --- what is resumed from is no checkpoint --------------------------------------------------------------------------


@CASES.bad(says=("is an adapter without the optimizer's state; give it to adapter.init_from", "or run/checkpoint-4 to"))
def resumes_from_an_adapter(folder: Folder) -> Words:
    return folder.trained("--checkpoint.resume=run/checkpoint-4/adapter")


@CASES.bad(says='checkpoint.resume = "run/checkpoint-5": no complete checkpoint (no manifest.json in it); did you mean')
def resumes_from_nothing(folder: Folder) -> Words:
    return folder.trained("--checkpoint.resume=run/checkpoint-5")


@CASES.bad(says='"newest": no complete checkpoint (no manifest.json in it); it is a link to run/checkpoint-6, where')
def resumes_from_a_dangling_link(folder: Folder) -> Words:
    (folder / "newest").symlink_to("run/checkpoint-6")
    return folder.trained("--checkpoint.resume=newest")


@CASES.bad(says='model.path = "./link": links that lead in a circle')
def base_is_a_link_to_itself(folder: Folder) -> Words:
    (folder / "link").symlink_to("link")
    return folder.run("--model.path=./link")


@CASES.bad(says="run is a run folder; going on from its newest checkpoint, checkpoint-4", code=DONE, ranks=BOTH)
def resumes_from_a_run_folder(folder: Folder) -> Words:
    return folder.trained("--checkpoint.resume=run", "--checkpoint.run_dir=other", "--training.max_steps=5")


@CASES.bad(says="other already holds a run (checkpoint-4); go on with it", ranks=BOTH)
def resumes_in_the_folder_of_another_run(folder: Folder) -> Words:
    words = folder.trained("--checkpoint.resume=run/checkpoint-2", "--checkpoint.run_dir=other")
    shutil.copytree(folder / "run", folder / "other")
    return words


@CASES.bad(
    says=("warning: checkpoint.resume = auto: ruin does not exist (did you mean run?)", "from nothing"), code=DONE
)
def resumes_in_a_mistyped_folder(folder: Folder) -> Words:
    return folder.trained("--checkpoint.run_dir=ruin", "--training.max_steps=1")


CASES.option(
    "resumes_the_first_start",
    "--resume",
    says="warning: checkpoint.resume = auto: run does not exist, so the run starts from nothing",
    code=DONE,
    ranks=BOTH,
)

# --- checkpoints that are not what they say -------------------------------------------------------------------------


@CASES.bad(says="checkpoint-40 was renamed: it holds step 4; name it checkpoint-4 again", ranks=BOTH)
def checkpoint_was_renamed(folder: Folder) -> Words:
    words = folder.trained("--training.max_steps=50")
    (folder / "run/checkpoint-4").rename(folder / "run/checkpoint-40")
    return words


@CASES.bad(says="checkpoint-4/manifest.json was changed after it was written (its own checksum differs)", ranks=BOTH)
def manifest_was_edited(folder: Folder) -> Words:
    words = folder.trained("--training.max_steps=6")
    folder.edited("run/checkpoint-4/manifest.json", optimizer_steps=0)
    return words


@CASES.bad(says=("has format 1, this version of dora_dist reads 2", "init_from run/checkpoint-4/adapter"))
def manifest_is_of_an_earlier_version(folder: Folder) -> Words:
    words = folder.trained("--training.max_steps=6")
    folder.edited("run/checkpoint-4/manifest.json", format=1)
    return words


@CASES.bad(says="checkpoint-6 was written by another run than the one in run; move it elsewhere", ranks=BOTH)
def checkpoint_of_another_run(folder: Folder) -> Words:
    words = folder.trained("--training.max_steps=8")
    copied = shutil.copytree(folder / "run/checkpoint-4", folder / "run/checkpoint-6")
    fields = json.loads((copied / "manifest.json").read_text())
    write_manifest(copied, {**without(fields, "format", "files", "sha256"), "step": 6, "run": "theirs"})
    return words


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


@CASES.bad(
    says=("run/checkpoint-4/state.safetensors is damaged", "it is now checkpoint-4.damaged, looking for an earlier"),
    code=DONE,
    ranks=BOTH,
)
def newest_checkpoint_is_damaged(folder: Folder) -> Words:
    words = folder.trained("--training.max_steps=3")
    state = folder / "run/checkpoint-4/state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"\x55")
    return words


@CASES.bad(says="checkpoint-4 is later than checkpoint-2, which the run goes on from: checkpoint-4.later", code=DONE)
def goes_back_to_an_earlier_checkpoint(folder: Folder) -> Words:
    return folder.trained("--checkpoint.resume=run/checkpoint-2")


# --- a run that has nothing left to do ------------------------------------------------------------------------------

FINISHED = "the run is finished: run/checkpoint-4 is at step 4 of"


@CASES.bad(says=(f"{FINISHED} 4 (training.max_steps = 4)", "to train on, give a larger training.max_steps"), code=DONE)
def finished_by_steps(folder: Folder) -> Words:
    return folder.trained()


@CASES.bad(says=f"{FINISHED} 3 (training.max_steps = 3)", code=DONE, ranks=BOTH)
def finished_beyond_the_last_step(folder: Folder) -> Words:
    return folder.trained("--training.max_steps=3")


@CASES.bad(says=(f"{FINISHED} 4 (training.epochs = 1)", "larger training.epochs: --training.epochs 2"), code=DONE)
def finished_by_epochs(folder: Folder) -> Words:
    return folder.trained("--training.max_steps=null", "--training.epochs=1")


@CASES.bad(
    says=(
        "changed since checkpoint-4: training.max_steps 4 -> 6 (followed)",
        "the next step's learning rate is 0.00333, as a run of 6 steps with these settings has it there",
    ),
    code=DONE,
    ranks=BOTH,
)
def trains_on_after_the_end(folder: Folder) -> Words:
    return folder.trained("--training.max_steps=6")


# --- other settings than those of the checkpoint --------------------------------------------------------------------


def changed(
    name: str, *options: str, says: str | tuple[str, ...], code: int = USERS_MISTAKE, ranks: tuple[int, ...] = (1,)
) -> None:
    """A resume with these options, and one step to do."""

    def make(folder: Folder) -> Words:
        return folder.trained("--training.max_steps=5", *options)

    make.__name__ = name
    CASES.bad(says, code, ranks)(make)


CHANGED = "changed since checkpoint-4: "
changed("other_rank", "--adapter.r=5", says="written with adapter.r = 4, this run has 5", ranks=BOTH)
changed("other_alpha", "--adapter.lora_alpha=9", says="with adapter.lora_alpha = 8.0, this run has 9.0: what it holds")
changed("other_kind", "--adapter.weight_decomposed=false", says="adapter.weight_decomposed = true, this run has false")
changed("other_storage", "--model.storage=int8", says='with model.storage = "plain", this run has "int8"')
changed("now_dynamic", "--adapter.dynamic_rank=true", "--adapter.prune_every=1", says="adapter.dynamic_rank = false, ")
changed("other_seed", "--training.seed=43", says="training.seed = 42, this run has 43: the order of the data would not")
changed(
    "other_batch", "--training.global_batch_size=4", says="training.global_batch_size = 6, this run has 4: the order"
)
changed("several", "--training.seed=1", "--adapter.r=8", says=("adapter.r = 4, this run has 8", "training.seed = 42"))
changed("other_layers", '--adapter.target_modules=["q_proj"]', says="of another model or adapter: 'model.", ranks=BOTH)
changed("shorter_records", "--data.cutoff_len=20", says=("on other records", "data.cutoff_len 192 -> 20); set it back"))
changed("other_labels", "--data.loss_on=answer", "--data.cutoff_len=400", says='data.loss_on "all" -> "answer"')
changed("fewer_records", "--data.validation_samples=9", says="20 samples, sha256")
changed("other_rate", "--training.learning_rate=0.02", says=f"{CHANGED}training.learning_rate 0.01 -> 0.02", code=DONE)
changed(
    "other_number_format",
    "--model.dtype=bf16",
    "--adapter.dropout=0.1",
    says=(f'{CHANGED}model.dtype "fp32" -> "bf16" (followed)', f"{CHANGED}adapter.dropout 0.0 -> 0.1 (followed)"),
    code=DONE,
)
changed(
    "the_same_in_other_words",
    '--adapter.target_modules=["o_proj","down_proj","q_proj","v_proj"]',
    says='"v_proj"] (comes to the same)',
    code=DONE,
)
changed("another_start", "--adapter.init_from=run/checkpoint-4/adapter", says="only a new run starts from it; leave it")


@CASES.bad(says="changed since checkpoint-4: ranks 1 -> 2 (followed)", code=DONE, ranks=(2,))
def other_number_of_ranks(folder: Folder) -> Words:
    return folder.trained("--training.max_steps=5")


@CASES.bad(
    says=("on other records, or the same in another order", "--adapter.init_from run/checkpoint-4/adapter"), ranks=BOTH
)
def records_in_another_order(folder: Folder) -> Words:
    words = folder.trained("--training.max_steps=5")
    folder.text("data.json", json.dumps(toy.records(25)[::-1]))
    return words


@CASES.bad(says='was trained on another base: the weights in model.path = "base" are not those of "', ranks=BOTH)
def another_base_of_the_same_shapes(folder: Folder) -> Words:
    words = folder.trained("--training.max_steps=5")
    weights = folder / "base/model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"  # which is not adapted, so that no row norm tells
    tensors[name] = tensors[name] + torch.ones(())
    save_file(tensors, weights, {"format": "pt"})
    return words


@CASES.bad(says="changed since checkpoint-4: the base's config.json: rms_norm_eps 1e-06 -> 0.01 (followed)", code=DONE)
def another_config_of_the_base(folder: Folder) -> Words:
    words = folder.trained("--training.max_steps=5")
    folder.edited("base/config.json", rms_norm_eps=0.01)
    return words


# --- which checkpoint -----------------------------------------------------------------------------------------------


@CASES.bad(
    says=(
        "merging run/checkpoint-2, the best of 2 checkpoints by eval_loss (0.41)",
        "the newest: dora-dist consolidate run/checkpoint-4 --output out",
    ),
    code=DONE,
)
def merging_a_run(folder: Folder) -> Words:
    folder.trained()
    run_folder.set_best(folder / "run", folder / "run/checkpoint-2", 0.41)
    return ["consolidate", "run", "--output", "out"]


@CASES.bad(says="merging run/checkpoint-4, the newest of 2 checkpoints, as checkpoint-3, the best by eval_", code=DONE)
def merging_a_run_whose_best_is_gone(folder: Folder) -> Words:
    folder.trained()
    run_folder.set_best(folder / "run", folder / "run/checkpoint-3", 0.41)
    return ["consolidate", "run", "--output", "out"]


@CASES.bad(says=("evaluating run/checkpoint-4, the newest of 2 checkpoints", "average"), code=DONE)
def evaluating_a_run(folder: Folder) -> Words:
    folder.trained()
    return ["evaluate", "run", "--tasks", "boolq=data.json", "--limit", "2", "--max-new-tokens", "2"]
