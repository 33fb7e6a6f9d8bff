"""Base models that are quantised, of another kind, or not what their config.json says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_dist.adapters.peft_format import PeftAdapter, write_peft_folder
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.runtime.exit_codes import DONE
from tests.bad_inputs.case import Folder, Table, Words

CASES = Table()
BOTH = (1, 2)
UP_PROJ = "model.layers.0.mlp.up_proj.weight"
Tensors = dict[str, Tensor]


def rewrite(base: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a model folder in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})


def quantised(base: Path, method: str | None, codes: torch.dtype, parts: dict[str, Tensor], weight: str = "") -> Path:
    """Store a layer as other libraries do: its codes under `weight` ("": its own name), and what goes with them."""

    def change(tensors: Tensors) -> None:
        values = tensors.pop(UP_PROJ)
        tensors[UP_PROJ.removesuffix("weight") + (weight or "weight")] = (values * 100).to(codes)
        tensors.update({UP_PROJ.removesuffix("weight") + name: part for name, part in parts.items()})

    rewrite(base, change)
    if method is not None:
        config = json.loads((base / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method}
        (base / "config.json").write_text(json.dumps(config))
    return base


def fp8(base: Path) -> Path:
    return quantised(base, "fp8", torch.float8_e4m3fn, {"weight_scale_inv": torch.ones(1, 1)})


def adapter(folder: Folder) -> Path:
    """A PEFT folder with one layer of the toy base."""
    layer = AdapterLayer(torch.ones(2, 36), torch.ones(53, 2), None, 1.0)
    modules = {UP_PROJ.removesuffix(".weight"): layer}
    write_peft_folder(folder / "adapter", PeftAdapter("base", 2, 2, 0.0, False, modules))
    return folder / "adapter"


def asked(folder: Folder, model: str = "base") -> Words:
    """`evaluate` a model on two records."""
    folder.data("boolq.json", 2)
    search = ["--num-beams", "1", "--max-new-tokens", "2", "--dtype", "fp32"]
    return ["evaluate", model, "--tasks", "boolq=boolq.json", *search]


# --- quantised --------------------------------------------------------------------------------------------------------


@CASES.bad(says=("base/config.json: quantization_config", '"fp8"', UP_PROJ, "float8_e4m3fn"), ranks=BOTH)
def fp8_trained(folder: Folder) -> Words:
    fp8(folder.base())
    return folder.run()


@CASES.bad(says=("base/config.json: quantization_config", '"fp8"'))
def fp8_validated(folder: Folder) -> Words:
    fp8(folder.base())
    return ["validate", folder.run()[-1]]


@CASES.bad(says=("base/config.json: quantization_config", '"fp8"'))
def fp8_evaluated(folder: Folder) -> Words:
    fp8(folder.base())
    return asked(folder)


@CASES.bad(says=("base/config.json: quantization_config", '"fp8"'))
def fp8_evaluated_under_an_adapter(folder: Folder) -> Words:
    fp8(folder.base())
    adapter(folder)
    return asked(folder, "adapter")


@CASES.bad(says=("base/config.json: quantization_config", '"fp8"'))
def fp8_merged(folder: Folder) -> Words:
    fp8(folder.base())
    adapter(folder)
    return ["consolidate", "adapter", "--output", "merged"]


@CASES.bad(says=("other/config.json: quantization_config", '"fp8"'))
def fp8_merged_into_another_base(folder: Folder) -> Words:
    fp8(folder.base("other"))
    folder.base()
    adapter(folder)
    return ["consolidate", "adapter", "--base", "other", "--output", "merged"]


@CASES.bad(says=("base/config.json: quantization_config", '"fp8"'))
def fp8_assembled(folder: Folder) -> Words:
    fp8(folder.base())
    return ["assemble-llava", "--vision", "base", "--language", "base", "--output", "llava"]


@CASES.bad(says=("float8_e4m3fn", "is quantised", "weight_scale_inv"), ranks=BOTH)
def fp8_that_config_json_does_not_mention(folder: Folder) -> Words:
    quantised(folder.base(), None, torch.float8_e4m3fn, {"weight_scale_inv": torch.ones(1, 1)})
    return folder.run()


@CASES.bad(says=('quant_method "bitsandbytes"', "before quantisation"))
def bitsandbytes_4_bit(folder: Folder) -> Words:
    parts = {"weight.absmax": torch.ones(30), "weight.quant_map": torch.ones(16)}
    quantised(folder.base(), "bitsandbytes", torch.uint8, parts)
    return folder.run()


@CASES.bad(says=("int8", "is quantised", "bitsandbytes"))
def bitsandbytes_8_bit_without_its_settings(folder: Folder) -> Words:
    quantised(folder.base(), None, torch.int8, {"SCB": torch.ones(53)})
    return folder.run()


@CASES.bad(says=('quant_method "gptq"', "before quantisation"))
def gptq(folder: Folder) -> Words:
    quantised(folder.base(), "gptq", torch.int32, {"qzeros": torch.ones(2, 2).int()}, "qweight")
    return folder.run()


@CASES.bad(says=("up_proj.qweight", "int32", "GPTQ or AWQ"))
def awq_without_its_settings(folder: Folder) -> Words:
    quantised(folder.base(), None, torch.int32, {"scales": torch.ones(2, 2).half()}, "qweight")
    return folder.run()


@CASES.bad(says=('quant_method "compressed-tensors"', "before quantisation"))
def compressed_tensors(folder: Folder) -> Words:
    quantised(folder.base(), "compressed-tensors", torch.int32, {"weight_scale": torch.ones(53, 1)}, "weight_packed")
    return folder.run()


@CASES.bad(says=("int16", "is quantised", UP_PROJ), ranks=BOTH)
def weights_of_whole_numbers(folder: Folder) -> Words:
    quantised(folder.base(), None, torch.int16, {})
    return folder.run()


@CASES.bad(says=("quantization_config", "no tensor of it is quantised", "delete quantization_config"))
def settings_of_a_quantisation_that_is_undone(folder: Folder) -> Words:
    folder.base()
    folder.edited("base/config.json", quantization_config={"quant_method": "fp8"})
    return folder.run()


# --- config.json ------------------------------------------------------------------------------------------------------


def config_json(name: str, text: str | bytes, *says: str) -> None:
    def make(folder: Folder) -> Words:
        folder.base()
        folder.text("base/config.json", text)
        return folder.run()

    CASES.bad(("base/config.json", *says), ranks=BOTH if name == "cut" else (1,))(named(make, f"config_json_{name}"))


def fields(name: str, *says: str, **changes: Any) -> None:
    def make(folder: Folder) -> Words:
        folder.base()
        folder.edited("base/config.json", **changes)
        return folder.run()

    CASES.bad(says, ranks=BOTH if name == "heads" else (1,))(named(make, f"config_json_{name}"))


def named(make: Callable[[Folder], Words], name: str) -> Callable[[Folder], Words]:
    make.__name__ = name
    return make


config_json("cut", '{"model_type": "llama", ', "not readable as JSON")
config_json("empty", "", "not readable as JSON")
config_json("a_list", "[]", "not a JSON object")
config_json("deep", "[" * 100_000 + "]" * 100_000, "not readable as JSON")
config_json("bytes", b"\xff\xfe\x00\x01", "not readable as JSON")
config_json("without_model_type", '{"hidden_size": 36}', "no model_type", "config.json of the model's own")
fields("model_type_unknown", 'model_type "lama"', 'did you mean "llama"?', model_type="lama")
fields("model_type_a_list", "model_type", "must be text", model_type=["llama"])
fields("heads", "base/config.json", "not a multiple of the number of attention heads (8)", num_attention_heads=8)
fields("no_heads", "base/config.json", "num_attention_heads = 0", num_attention_heads=0)
fields("kv_heads", "base/config.json", "num_key_value_heads = 4", "num_attention_heads = 6", num_key_value_heads=4)
fields("text_for_a_size", "base/config.json", "'hidden_size' expected int, got str", hidden_size="36")
fields("size_below_zero", "base/config.json", "intermediate_size = -1", intermediate_size=-1)
fields("layers_beyond_the_files", "num_hidden_layers = 1000000", "21 tensors", num_hidden_layers=10**6)
fields("size_beyond_the_files", "vocab_size = 1000000000000000", vocab_size=10**15)
fields("another_vocabulary", "'model.embed_tokens.weight'", "[300, 36]", "[320, 36]", "vocab_size", vocab_size=320)
fields("unknown_activation", "base/config.json", "silly", hidden_act="silly")
fields("a_vision_tower", "'clip_vision_model' is not a causal language model", model_type="clip_vision_model")
fields(
    "own_code",
    "model.trust_remote_code",
    "auto_map",
    model_type="mine",
    auto_map={"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"},
)


@CASES.bad(says=("evaluate", "own code", "base"))
def own_code_evaluated(folder: Folder) -> Words:
    folder.base()
    folder.edited("base/config.json", model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"})
    return asked(folder)


@CASES.bad(says="base/generation_config.json: not readable as JSON")
def generation_config_cut(folder: Folder) -> Words:
    folder.text("base/generation_config.json", "{")
    folder.base()
    folder.text("base/generation_config.json", "{")
    return folder.run()


@CASES.bad(says=("base/generation_config.json", "max_new_tokens"))
def generation_config_out_of_range(folder: Folder) -> Words:
    folder.base()
    folder.edited("base/generation_config.json", max_new_tokens=-1)
    return folder.run()


@CASES.bad(says="base/generation_config.json: not a JSON object")
def generation_config_a_list_evaluated(folder: Folder) -> Words:
    folder.base()
    folder.text("base/generation_config.json", "[]")
    return asked(folder)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def tokenizer_file(name: str, file: str, text: str, *says: str, ranks: tuple[int, ...] = (1,)) -> None:
    def make(folder: Folder) -> Words:
        folder.base()
        folder.text(f"base/{file}", text)
        return folder.run()

    CASES.bad((f"base/{file}", *says), ranks=ranks)(named(make, name))


tokenizer_file("tokenizer_cut", "tokenizer.json", '{"version": "1.0", ', "not readable as JSON", ranks=BOTH)
tokenizer_file("tokenizer_a_list", "tokenizer.json", "[]", "not a JSON object")
tokenizer_file("tokenizer_of_nothing", "tokenizer.json", "{}", "is not a tokenizer")
tokenizer_file("tokenizer_config_cut", "tokenizer_config.json", '{"eos_token": ', "not readable as JSON")
tokenizer_file("tokenizer_config_a_list", "tokenizer_config.json", "[]", "not a JSON object")
tokenizer_file("special_tokens_cut", "special_tokens_map.json", "{", "not readable as JSON")
tokenizer_file(
    "tokenizer_with_own_code",
    "tokenizer_config.json",
    '{"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", null]}}',
    "model.trust_remote_code",
)


@CASES.bad(says=("tokenizer base", "holds no tokenizer"))
def no_tokenizer(folder: Folder) -> Words:
    for file in folder.base().glob("*token*"):
        file.unlink()
    return folder.run()


def longer_tokenizer(folder: Folder, *words: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder.base())
    tokenizer.add_tokens(list(words))
    tokenizer.save_pretrained(folder / "base")


@CASES.bad(says=("'even'", "300", "embedding"), ranks=BOTH)
def tokens_beyond_the_embedding(folder: Folder) -> Words:
    longer_tokenizer(folder, "even")
    return folder.run()


@CASES.bad(says=("warning:", "302 tokens", "300 rows"), code=DONE)
def a_tokenizer_longer_than_the_embedding(folder: Folder) -> Words:
    longer_tokenizer(folder, "never1", "never2")
    return asked(folder)


@CASES.bad(says=("'even'", "300", "embedding"))
def tokens_beyond_the_embedding_evaluated(folder: Folder) -> Words:
    longer_tokenizer(folder, "even")
    return asked(folder)


@CASES.bad(says=("warning:", "300 tokens", "1,000 rows"), code=DONE)
def a_tokenizer_of_another_model(folder: Folder) -> Words:
    folder.base()
    rewrite(
        folder / "base",
        lambda tensors: tensors.update(
            {name: torch.ones(1000, 36) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        ),
    )
    folder.edited("base/config.json", vocab_size=1000)
    return asked(folder)


# --- what goes with a model -------------------------------------------------------------------------------------------


@CASES.bad(says=("note:", "pad", "'</s>'"), code=DONE, ranks=BOTH)
def a_classifier_without_a_padding_token(folder: Folder) -> Words:
    folder.base()
    folder.edited("base/config.json", pad_token_id=None)
    folder.edited("base/tokenizer_config.json", pad_token=None)
    records = [{"sentence1": f"film {'very ' * (i % 5)}good", "label": i % 2} for i in range(12)]
    folder.text("data.json", json.dumps(records))
    return folder.run(
        model={"task": "sequence_classification"},
        data={"format": "classification", "text_fields": ["sentence1"], "validation_samples": 0},
        training={"micro_batch_size": 2, "metric": "accuracy"},
    )


CASES.option(
    "flash_attention_without_its_package",
    "--model.attn_implementation=flash_attention_2",
    "--model.dtype=bf16",
    says=('model.attn_implementation = "flash_attention_2"', "flash-attn", '"sdpa"'),
    ranks=BOTH,
)
CASES.option(
    "cuda_against_the_environment",
    "--engine.accelerator=cuda",
    says=('engine.accelerator = "cuda"', "DS_ACCELERATOR=cpu"),
    ranks=BOTH,
)
CASES.option("a_name_too_long", f"--model.path={'a' * 5000}", says="model.path")


@CASES.bad(says=("base/config.json", "not readable as JSON"))
def merged_with_a_config_json_that_is_cut(folder: Folder) -> Words:
    folder.base()
    adapter(folder)
    folder.text("base/config.json", "{")
    return ["consolidate", "adapter", "--output", "merged"]


@CASES.bad(says=("base/model.safetensors", "truncated"))
def merged_into_truncated_weights(folder: Folder) -> Words:
    with (folder.base() / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    adapter(folder)
    return ["consolidate", "adapter", "--output", "merged"]


@CASES.bad(says=("base/model.safetensors", "is a file"))
def merged_into_a_file(folder: Folder) -> Words:
    folder.base()
    adapter(folder)
    return ["consolidate", "adapter", "--base", "base/model.safetensors", "--output", "merged"]
