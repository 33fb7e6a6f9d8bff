"""PEFT adapters that a run is to start from, or that are to be merged or evaluated: broken, odd, or another model's."""

import json
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_dist.runtime.exit_codes import DONE
from tests import toy
from tests.bad_inputs.case import Folder, Table, Words

CASES = Table()
RANKS = (1, 2)
SHAPES = {"self_attn.q_proj": (36, 36), "self_attn.v_proj": (12, 36), "self_attn.o_proj": (36, 36)}
SHAPES |= {"mlp.down_proj": (36, 53)}
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "use_dora": True}
CONFIG |= {"target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}
Spoil = Callable[[dict[str, Tensor]], Any]


def adapter(
    folder: Folder,
    spoil: Spoil = lambda tensors: None,
    shapes: dict[str, tuple[int, int]] = SHAPES,
    r: int = 4,
    layers: int = 2,
    **config: Any,
) -> str:
    """A PEFT folder `adapter` as toy runs would have it, with its tensors spoilt and its configuration changed."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for layer in range(layers):
        for module, (rows, columns) in shapes.items():
            stem = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(r, columns) / 8
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, r) / 8
            tensors[f"{stem}.lora_magnitude_vector"] = torch.rand(rows) + 0.1
    spoil(tensors)
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    folder.text("adapter/adapter_config.json", json.dumps({**CONFIG, "r": r, **config}))
    return "adapter"


def start(name: str, says: str, *, code: int | None = None, options: tuple[str, ...] = (), **kwargs: Any) -> None:
    """A case: a run that starts from such an adapter."""

    def make(folder: Folder) -> Words:
        return folder.run("--adapter.init_from", adapter(folder, **kwargs), *options)

    named = CASES.bad(says=says, ranks=RANKS) if code is None else CASES.bad(says=says, code=code, ranks=RANKS)
    make.__name__ = name
    named(make)


def plain(tensors: dict[str, Tensor]) -> None:
    """Leave a LoRA of a DoRA."""
    for name in [name for name in tensors if name.endswith("magnitude_vector")]:
        del tensors[name]


def changed(ending: str, change: Callable[[Tensor], Tensor]) -> Spoil:
    """Change the first layer's tensor with this ending."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        name = f"{FIRST}.{ending}"
        tensors[name] = change(tensors[name])

    return spoil


def without(*words: str) -> Spoil:
    """Leave out tensors whose names have all of these words."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if all(word in name for word in words)]:
            del tensors[name]

    return spoil


def filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


# --- shapes and layers ------------------------------------------------------------------------------------------------

WIDER = {module: (48 if rows == 36 else 16, 71 if columns == 53 else 48) for module, (rows, columns) in SHAPES.items()}
start("wider", "it adapts 'model.layers.0.self_attn.q_proj' as (48, 48), but base has it as (36, 36)", shapes=WIDER)
longer = {**SHAPES, "mlp.down_proj": (36, 106)}
start("longer_rows", "'model.layers.0.mlp.down_proj' as (36, 106), but base has it as (36, 53)", shapes=longer)
fewer = {**SHAPES, "self_attn.v_proj": (36, 36)}
start("other_heads", "'model.layers.0.self_attn.v_proj' as (36, 36), but base has it as (12, 36)", shapes=fewer)
start("deeper", "it adapts 'model.layers.2.mlp.down_proj', which base does not have", layers=3)
start(
    "a_layer_is_missing",
    "no tensors for 'model.layers.1.self_attn.q_proj' and 3 others, which this run adapts; its target_modules name it",
    layers=1,
)
start(
    "a_module_is_missing",
    "no tensors for 'model.layers.0.self_attn.o_proj' and 1 others, which this run adapts; set adapter.target_modules "
    "to the adapter's (down_proj, q_proj, v_proj)",
    spoil=without("o_proj"),
    target_modules=["q_proj", "v_proj", "down_proj"],
)
start(
    "a_module_too_many",
    "adapts 'model.layers.0.self_attn.k_proj', too, which this run does not adapt",
    shapes={**SHAPES, "self_attn.k_proj": (12, 36)},
    target_modules=["q_proj", "v_proj", "o_proj", "down_proj", "k_proj"],
)
start(
    "a_factor_is_missing",
    "q_proj' has lora_A, magnitude, but with use_dora=True",
    spoil=without("0", "q_proj", "lora_B"),
)
start(
    "factors_of_different_ranks",
    "'model.layers.0.self_attn.q_proj' has lora_A (3, 36), lora_B (36, 4)",
    spoil=changed("lora_A.weight", lambda A: A[:3].clone()),
)
start(
    "magnitudes_of_another_layer",
    "magnitude (12,); with r=4 they must be",
    spoil=changed("lora_magnitude_vector", lambda m: m[:12].clone()),
)

# --- numbers ----------------------------------------------------------------------------------------------------------

start("int32_factors", "lora_B.weight' is int32, not floating", spoil=changed("lora_B.weight", lambda B: B.int()))
start("uint8_factors", "lora_A.weight' is uint8, not", spoil=changed("lora_A.weight", lambda A: A.abs().byte()))
start(
    "nan_factors",
    f"tensor '{FIRST}.lora_B.weight' holds 144 numbers that are NaN",
    spoil=changed("lora_B.weight", filled(float("nan"))),
)
start(
    "infinite_magnitudes",
    f"tensor '{FIRST}.lora_magnitude_vector' holds 36 numbers",
    spoil=changed("lora_magnitude_vector", filled(float("inf"))),
)
start(
    "too_large_for_fp32",
    f"tensor '{FIRST}.lora_A.weight' holds 144 numbers that are NaN, infinite or too large for fp32",
    spoil=changed("lora_A.weight", lambda A: A.double() + 1e300),
)
start(
    "negative_magnitudes",
    "warning: adapter: 36 magnitudes are 0 or below (first in 'model.layers.0.self_attn.q_proj')",
    code=DONE,
    spoil=changed("lora_magnitude_vector", lambda m: -m),
)
start("silent_layer", "36 magnitudes are 0", code=DONE, spoil=changed("lora_magnitude_vector", filled(0)))

# --- against this run's configuration ---------------------------------------------------------------------------------

start("another_rank", "its r is 8, adapter.r = 4 (set it to 8), its scaling is 1, ", r=8)
start("another_alpha", "adapter.lora_alpha / adapter.r = 2 (set adapter.lora_alpha to 16)", lora_alpha=16)
start("rank_stabilised", "its scaling is 4, adapter.lora_alpha / adapter.r = 2 (set", use_rslora=True)
start("one_layers_alpha", "at 'model.layers.0.mlp.down_proj': its scaling is 4", alpha_pattern={"down_proj": 16})
start("one_layers_rank", "with r=2 they must be", rank_pattern={"down_proj": 2})
start("lora_into_dora", "it is LoRA (set adapter.weight_decomposed to false)", spoil=plain, use_dora=False)
start("dora_into_lora", "it is DoRA (set", options=("--adapter.weight_decomposed", "false"))
start(
    "factors_where_magnitudes_are_meant",
    "it has low-rank factors there (take it out of adapter.magnitude_only_modules)",
    options=("--adapter.target_modules=q_proj,v_proj,o_proj", "--adapter.magnitude_only_modules=down_proj"),
)
start(
    "a_head_that_was_trained",
    "'lm_head.weight' was trained in full in adapter and is not here; name its module in adapter.trained_modules",
    spoil=lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(300, 36)}),
    modules_to_save=["lm_head"],
)
start("another_task", "trained with task_type=SEQ_CLS, and model.task = 'causal_lm'", code=DONE, task_type="SEQ_CLS")
start(
    "another_base_by_name",
    "was trained on meta-llama/Llama-2-7b-hf, and the base here is base",
    code=DONE,
    base_model_name_or_path="meta-llama/Llama-2-7b-hf",
)

# --- adapter_config.json ----------------------------------------------------------------------------------------------

start("wrong_targets", "leave out 'model.layers.0.self_attn.v_proj'", target_modules=["q_proj", "o_proj", "down_proj"])
start("excluded_targets", "leave out 'model.layers.0.mlp.down_proj'", exclude_modules="model.*down_proj")
start("targets_are_no_expression", "target_modules has the bad pattern '(q_proj'", target_modules="(q_proj")
start("targets_are_a_number", "target_modules=5 must be text or a list of module names", target_modules=5)
start("saved_modules_are_text", "modules_to_save='lm_head' must be a list", modules_to_save="lm_head")
start("saved_modules_without_tensors", "modules_to_save=['lm_head'] have no tensors", modules_to_save=["lm_head"])
start("another_method", "peft_type='ADALORA' is not supported; LORA", peft_type="ADALORA")
start("biases", "bias='some' is not supported", bias="some")
start("lora_bias", "lora_bias=True is not supported", lora_bias=True)
start("transposed_weights", "fan_in_fan_out=True is not supported", fan_in_fan_out=True)
start("changes_the_base", "init_lora_weights='pissa' changes the base weights", init_lora_weights="pissa")
start("alpha_is_nan", "lora_alpha=nan must be a positive number", lora_alpha=float("nan"))
start("alpha_is_zero", "lora_alpha=0 must be a positive number", lora_alpha=0)
start("alpha_is_text", "lora_alpha='16' must be", lora_alpha="16")
start("alpha_is_huge", f"lora_alpha={10**40} must be", lora_alpha=10**40)
start("dropout_of_two", "lora_dropout=2 must be a number from 0 to 1", lora_dropout=2)
start("dora_is_text", "use_dora='false' must be true or false", use_dora="false")
start("base_is_a_list", "base_model_name_or_path=['a'] must be text", base_model_name_or_path=["a"])


def config_file(name: str, text: str | bytes, says: str, ranks: tuple[int, ...] = RANKS) -> None:
    """A case: an adapter_config.json that holds `text`."""

    def make(folder: Folder) -> Words:
        words = folder.run("--adapter.init_from", adapter(folder))
        folder.text("adapter/adapter_config.json", text)
        return words

    make.__name__ = name
    CASES.bad(says=says, ranks=ranks)(make)


config_file("config_is_cut_off", '{"peft_type": "LO', "adapter_config.json: not readable as JSON (Unterminated string")
config_file("config_is_empty", "", "adapter_config.json: not readable as JSON (Expecting value")
config_file("config_is_a_list", "[]", "adapter_config.json: not a JSON object; save the adapter again")
config_file("config_is_null", "null", "adapter_config.json: not a JSON object")
config_file("config_is_deep", "[" * 100_000, "adapter_config.json: not readable as JSON (")
config_file("config_is_utf16", '{"r": 4}'.encode("utf-16"), "adapter_config.json: not readable as JSON ('utf-8'")
config_file("config_has_nothing", "{}", "peft_type=None is not supported")

# --- files ------------------------------------------------------------------------------------------------------------


@CASES.bad(says="no adapter_model.safetensors; save the adapter as safetensors; pickled", ranks=RANKS)
def pickled(folder: Folder) -> Words:
    words = folder.run("--adapter.init_from", adapter(folder))
    weights = folder / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter" / "adapter_model.bin")
    weights.unlink()
    return words


@CASES.bad(says="adapter_model.safetensors: truncated", ranks=RANKS)
def cut_off(folder: Folder) -> Words:
    words = folder.run("--adapter.init_from", adapter(folder))
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return words


@CASES.bad(says="lora_embedding_A' is not supported; only adapters of linear layers", ranks=RANKS)
def adapted_embeddings(folder: Folder) -> Words:
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    return folder.run("--adapter.init_from", adapter(folder, lambda tensors: tensors.update({name: torch.ones(4, 9)})))


@CASES.bad(says="the adapter has no tensors", ranks=RANKS)
def no_tensors(folder: Folder) -> Words:
    return folder.run("--adapter.init_from", adapter(folder, lambda tensors: tensors.clear()))


@CASES.bad(says='adapter.init_from = "base": no adapter_config.json or dora_dist_adapter.json in it; give an adapter')
def a_whole_model(folder: Folder) -> Words:
    return folder.run("--adapter.init_from", "base")


@CASES.bad(says='did you mean "checkpoint-4/adapter"?')
def the_checkpoint_around_it(folder: Folder) -> Words:
    adapter(folder)
    (folder / "checkpoint-4").mkdir()
    (folder / "adapter").rename(folder / "checkpoint-4" / "adapter")
    return folder.run("--adapter.init_from", "checkpoint-4")


@CASES.bad(says=("a checkpoint without an adapter", "`dora-dist consolidate checkpoint-4 --output FOLDER`"))
def a_checkpoint_without_one(folder: Folder) -> Words:
    folder.text("checkpoint-4/manifest.json", "{}")
    return folder.run("--adapter.init_from", "checkpoint-4")


@CASES.bad(says='adapter.init_from = "adapter/adapter_model.safetensors": no adapter_config.json')
def its_weights_file(folder: Folder) -> Words:
    return folder.run("--adapter.init_from", f"{adapter(folder)}/adapter_model.safetensors")


# --- another base, as our own adapters know it ------------------------------------------------------------------------


def trained(folder: Folder) -> Words:
    """The command that trains the adapter run/checkpoint-2/adapter."""
    words = folder.run()
    return [*words, "--checkpoint.run_dir", "first"]


def other_base(folder: Folder) -> None:
    """`base` of the same shapes with other weights: the command that is run first has read the old one."""
    toy.base_model(folder / "other" / "base", initializer_range=0.05)


WEIGHTS = "/base, on other weights than those in other/base"


@CASES.bad(says=("warning: first/checkpoint-2/adapter was trained on ", WEIGHTS), code=DONE, ranks=RANKS)
def start_on_another_base(folder: Folder) -> list[Words]:
    other_base(folder)
    words = trained(folder)
    start = ["--model.path=other/base", "--adapter.init_from=first/checkpoint-2/adapter"]
    return [words, [*words, *start, "--checkpoint.run_dir", "second"]]


@CASES.bad(says=("warning: first/checkpoint-2/adapter was trained on ", WEIGHTS), code=DONE)
def merge_into_another_base(folder: Folder) -> list[Words]:
    other_base(folder)
    merge = ["consolidate", "first/checkpoint-2/adapter", "--base", "other/base", "--output", "merged"]
    return [trained(folder), merge]


# --- merging and evaluating -------------------------------------------------------------------------------------------


def merge(name: str, says: str, *, code: int | None = None, **kwargs: Any) -> None:
    """A case: such an adapter merged."""

    def make(folder: Folder) -> Words:
        folder.base()
        return ["consolidate", adapter(folder, **kwargs), "--base", "base", "--output", "merged"]

    make.__name__ = f"merge_{name}"
    (CASES.bad(says=says) if code is None else CASES.bad(says=says, code=code))(make)


merge("nan", f"tensor '{FIRST}.lora_B.weight' holds 144 numbers", spoil=changed("lora_B.weight", filled(float("nan"))))
merge("alpha_is_nan", "lora_alpha=nan must be a positive number", lora_alpha=float("nan"))
merge("int32", "lora_B.weight' is int32", spoil=changed("lora_B.weight", lambda B: B.int()))
merge("wider", "it adapts 'model.layers.0.mlp.down_proj' as (48, 71), but base has it as", shapes=WIDER)
merge("wrong_targets", "target_modules=['q_proj'] leave out", target_modules=["q_proj"])
merge("negative", "warning: adapter: 36 magnitudes", code=DONE, spoil=changed("lora_magnitude_vector", lambda m: -m))
merge("a_layer_is_missing", "warning: adapter has no tensors for 'model.layers.1.", code=DONE, layers=1)
merge("another_base", "was trained on x/y, and the base here is base", code=DONE, base_model_name_or_path="x/y")


def evaluated(name: str, says: str, *, code: int | None = None, **kwargs: Any) -> None:
    """A case: such an adapter evaluated on its base."""

    def make(folder: Folder) -> Words:
        folder.base()
        folder.data(count=4)
        adapter(folder, base_model_name_or_path="base", **kwargs)
        return ["evaluate", "adapter", "--tasks", "boolq=data.json", "--limit", "2"]

    make.__name__ = f"evaluate_{name}"
    (CASES.bad(says=says) if code is None else CASES.bad(says=says, code=code))(make)


evaluated("nan", f"tensor '{FIRST}.lora_A.weight' holds", spoil=changed("lora_A.weight", filled(float("nan"))))
evaluated("wider", "'model.layers.0.self_attn.q_proj' as (48, 48), but base has it as (36, 36)", shapes=WIDER)
evaluated("deeper", "'model.layers.2.", layers=3)
evaluated("a_layer_is_missing", "warning: adapter has no tensors for 'model.layers.1.", code=DONE, layers=1)
