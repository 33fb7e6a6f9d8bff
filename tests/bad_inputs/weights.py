"""Base models whose files are missing, damaged or something else, or hold other tensors than they should."""

import json
import os
from collections.abc import Callable
from typing import Any

import torch

from dora_dist.runtime.exit_codes import DONE
from tests.bad_inputs.bases import BOTH, UP_PROJ, Tensors, asked, named, rewrite
from tests.bad_inputs.case import Folder, Table, Words

CASES = Table()


# --- files ------------------------------------------------------------------------------------------------------------


@CASES.bad(says='model.path = "base": no config.json in it')
def an_empty_folder(folder: Folder) -> Words:
    (folder / "base").mkdir()
    return folder.run()


@CASES.bad(says='model.path = "base/model.safetensors": is a file; give the folder that it is in, "base"')
def a_file_of_weights(folder: Folder) -> Words:
    folder.base()
    return folder.run("--model.path=base/model.safetensors")


@CASES.bad(says=('model.path = "model.gguf"', "dora-dist import-gguf"))
def a_gguf_file(folder: Folder) -> Words:
    folder.text("model.gguf", b"GGUF\x03\x00\x00\x00")
    return folder.run("--model.path=model.gguf")


@CASES.bad(says=("model.gguf", "dora-dist import-gguf"))
def a_folder_of_a_gguf_file(folder: Folder) -> Words:
    folder.base()
    (folder / "base/model.safetensors").unlink()
    folder.text("base/model.gguf", b"GGUF\x03\x00\x00\x00")
    return folder.run()


@CASES.bad(says=("model.gguf", "dora-dist import-gguf"))
def a_gguf_file_evaluated(folder: Folder) -> Words:
    folder.text("model.gguf", b"GGUF\x03\x00\x00\x00")
    return asked(folder, "model.gguf")


@CASES.bad(says=("no .safetensors file", "save_pretrained"))
def pickled(folder: Folder) -> Words:
    folder.base()
    (folder / "base/model.safetensors").rename(folder / "base/pytorch_model.bin")
    return folder.run()


@CASES.bad(says=('model.path = "link"', "a link to nowhere, which does not exist"))
def a_dangling_link(folder: Folder) -> Words:
    os.symlink("nowhere", folder / "link")
    return folder.run("--model.path=link")


@CASES.bad(says=('model.path = "./link"', "links that lead in a circle"))
def a_link_to_itself(folder: Folder) -> Words:
    os.symlink("link", folder / "link")
    return folder.run("--model.path=./link")


@CASES.bad(says=("base/model.safetensors", "a link to blob, which does not exist"))
def weights_a_dangling_link(folder: Folder) -> Words:
    folder.base()
    (folder / "base/model.safetensors").unlink()
    os.symlink("blob", folder / "base/model.safetensors")
    return folder.run()


@CASES.bad(says=("base/model.safetensors", "truncated"), ranks=BOTH)
def truncated(folder: Folder) -> Words:
    with (folder.base() / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    return folder.run()


@CASES.bad(says=("base/model.safetensors", "truncated"))
def truncated_evaluated(folder: Folder) -> Words:
    with (folder.base() / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    return asked(folder)


@CASES.bad(says=("base/model.safetensors", "not a safetensors file"))
def weights_a_git_lfs_pointer(folder: Folder) -> Words:
    folder.base()
    folder.text("base/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return folder.run()


@CASES.bad(says=("base/model.safetensors", "not a safetensors file"))
def weights_of_no_bytes(folder: Folder) -> Words:
    folder.base()
    folder.text("base/model.safetensors", b"")
    return folder.run()


def index(name: str, content: Any, *says: str, ranks: tuple[int, ...] = (1,)) -> None:
    def make(folder: Folder) -> Words:
        base = folder.base()
        (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
        folder.text("base/model.safetensors.index.json", content if isinstance(content, str) else json.dumps(content))
        return folder.run()

    CASES.bad(says, ranks=ranks)(named(make, f"index_{name}"))


index("cut", '{"weight_map": ', "model.safetensors.index.json", "not a safetensors index")
index("without_a_map", {"metadata": {}}, "model.safetensors.index.json", "no weight_map")
index("of_numbers", {"weight_map": {UP_PROJ: 1}}, "model.safetensors.index.json")
index("leads_outside", {"weight_map": {UP_PROJ: "../m.safetensors"}}, "'../m.safetensors'", "plain file name")
index("of_a_missing_file", {"weight_map": {UP_PROJ: "b.safetensors"}}, "base/b.safetensors: missing", ranks=BOTH)
index("of_a_missing_tensor", {"weight_map": {"x": "model-00001-of-00001.safetensors"}}, "'x' is not in it")
index("of_nothing", {"weight_map": {}}, "base: its weight files hold no tensor")


# --- tensors ----------------------------------------------------------------------------------------------------------


def tensors(name: str, change: Callable[[Tensors], Any], *says: str, code: int = 2, evaluated: bool = False) -> None:
    def make(folder: Folder) -> Words:
        rewrite(folder.base(), lambda found: (change(found), None)[1])
        return asked(folder) if evaluated else folder.run()

    CASES.bad(says, code=code, ranks=(1,) if evaluated or code == DONE else BOTH)(named(make, name))


def without(found: Tensors) -> None:
    del found[UP_PROJ]


def narrow(found: Tensors) -> None:
    found["model.norm.weight"] = torch.ones(35)


def nan(found: Tensors) -> None:
    found[UP_PROJ][7, 11] = float("nan")


def infinite(found: Tensors) -> None:
    found["model.norm.weight"][30] = float("inf")


tensors("a_missing_tensor", without, f"no tensor {UP_PROJ!r}")
tensors("a_missing_tensor_evaluated", without, UP_PROJ, "missing", evaluated=True)
tensors("a_tensor_of_another_shape", narrow, "'model.norm.weight'", "[35]", "[36]")
tensors("a_tensor_of_another_shape_evaluated", narrow, "'model.norm.weight'", "[35]", "[36]", evaluated=True)
tensors("nan", nan, UP_PROJ, "NaN")
tensors("infinity", infinite, "'model.norm.weight'", "infinit")
tensors("nan_evaluated", nan, UP_PROJ, "NaN", evaluated=True)
tensors(
    "biases_that_config_json_lacks",
    lambda found: found.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(36)}),
    "warning:",
    "'model.layers.0.self_attn.q_proj.bias'",
    "not used",
    code=DONE,
    evaluated=True,
)


@CASES.bad(says=("warning:", "num_hidden_layers = 1", "2 layers"), code=DONE, ranks=BOTH)
def fewer_layers_than_the_files(folder: Folder) -> Words:
    folder.base()
    folder.edited("base/config.json", num_hidden_layers=1)
    return folder.run()


@CASES.bad(says=("warning:", "tie_word_embeddings", "'lm_head.weight'"), code=DONE, ranks=BOTH)
def tied_but_different(folder: Folder) -> Words:
    folder.base()
    folder.edited("base/config.json", tie_word_embeddings=True)
    return folder.run()
