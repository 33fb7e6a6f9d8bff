"""Values of a configuration that cannot be meant."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dora_dist.runtime.exit_codes import DONE, USERS_MISTAKE
from tests import encoders
from tests.bad_inputs.case import Folder, Table, Words

CASES = Table()
RANKS = (1, 2)

CASES.option("misspelt", "--data.trian", "a.json", says="did you mean data.train?")
CASES.option("no_records", "--data.train=nowhere.json", says='data.train = "nowhere.json": no such file', ranks=RANKS)

# --- numbers that cannot be meant -------------------------------------------------------------------------------------

CASES.option(
    "rate_1e300", "--training.learning_rate=1e300", says="training.learning_rate = 1e+300: is more than any run"
)
CASES.option(
    "stream",
    *("--data.streaming", "true", "--training.max_steps", "null", "--data.packing", "true"),
    says=(
        "data.streaming = true: nobody knows how many records an epoch has; say with training.max_steps",
        "data.streaming = true and data.packing = true: which records share a row follows from the lengths of all",
        "data.streaming = true and data.validation_samples = 5: a stream has nothing to choose them from",
    ),
)
CASES.option("buffer", "--data.shuffle_buffer=5", says="data.shuffle_buffer = 5: means nothing without data.streaming")
CASES.option(
    "stream_of_pictures",
    *("--data.streaming=true", "--model.task=image_text_to_text", "--data.format=llava"),
    says='data.streaming = true: has no meaning for data.format = "llava", only for instruction',
)
CASES.option("rate_nan", "--training.learning_rate=NaN", says="training.learning_rate: NaN is not a JSON number")
CASES.option("rate_infinite", "--training.learning_rate=-Infinity", says="training.learning_rate: -Infinity is not")
CASES.option("rate_1e999", "--training.learning_rate=1e999", says="1e999 is too large for a number; give a finite")
CASES.option("rate_zero", "--training.learning_rate=0", says="training.learning_rate = 0: must be a number > 0")
CASES.option(
    "rate_is_true", "--training.learning_rate=true", says="training.learning_rate = true: must be a number > 0"
)
CASES.option("one_modules_rate_nan", '--training.learning_rates={"a": NaN}', says="training.learning_rates: NaN is not")
CASES.option(
    "one_modules_rate_1e300", '--training.learning_rates={"a": 1e300}', says='learning_rates, "a" = 1e+300: is more'
)
CASES.option(
    "steps_1e23", f"--training.max_steps={10**23}", says="training.max_steps = 1e+23: is more than any run needs"
)
CASES.option(
    "steps_of_5000_digits", f"--training.max_steps={'9' * 5000}", says="has 5,000 digits; give a smaller number"
)
CASES.option(
    "steps_with_a_point", "--training.max_steps=1e3", says="training.max_steps = 1000.0: must be a whole number"
)
CASES.option("epochs_1e18", "--training.epochs=1e18", says="training.epochs = 1e+18: is more than any run needs; give")
CASES.option("batch_1e12", f"--training.global_batch_size={10**12}", says="global_batch_size = 1000000000000: is more")
CASES.option(
    "rank_1e8", f"--adapter.r={10**8}", says="adapter.r = 100000000: is more than any run needs; give at most 65"
)
CASES.option("alpha_nan", "--adapter.lora_alpha=nan", says='adapter.lora_alpha = "nan": must be a number > 0')
CASES.option("alpha_zero", "--adapter.lora_alpha=0", says="adapter.lora_alpha = 0: must be a number > 0")
CASES.option("alpha_negative", "--adapter.lora_alpha=-16", says="adapter.lora_alpha = -16: must be a number > 0")
CASES.option(
    "alpha_1e300", "--adapter.lora_alpha=1e300", says="adapter.lora_alpha = 1e+300: is more than any run needs"
)
CASES.option("dropout_1", "--adapter.dropout=1.0", says="adapter.dropout = 1.0: must be a number >= 0 and < 1")
CASES.option(
    "row_length_unpacked",
    "--data.packing_length=1024",
    says="data.packing_length = 1024: rows hold one record each; set data.packing to true",
)
CASES.option(
    "row_length_below_records",
    "--data.packing=true",
    "--data.packing_length=32",
    "--data.cutoff_len=64",
    says="data.packing_length = 32: a row must have room for the longest record, data.cutoff_len = 64; raise it",
)
CASES.option(
    "labels_packed",
    "--data.packing=true",
    "--data.format=classification",
    "--model.task=sequence_classification",
    says='data.packing = true: has no meaning for data.format = "classification", only for instruction and alpaca and',
)
CASES.option("seed_negative", "--training.seed=-1", says="training.seed = -1: must be a whole number >= 0 and <=")
CASES.option(
    "seed_2_64", f"--training.seed={2**64}", says="training.seed = 18446744073709551616: must be a whole number"
)
CASES.option("workers_10000", "--data.num_workers=10000", says="data.num_workers = 10000: is more than any run needs")
CASES.option("timeout_1e300", "--engine.step_timeout_s=1e300", says="engine.step_timeout_s = 1e+300: is more than")
CASES.option("decay_1e300", "--training.weight_decay=1e300", says="training.weight_decay = 1e+300: is more than")
CASES.option(
    "decay_of_everything",
    "--training.weight_decay=200",
    says="training.weight_decay = 200: times the learning rate, 0.01, it is the share of each weight that a step takes",
)
CASES.option(
    "start_rank_1e300",
    *("--adapter.dynamic_rank=true", "--adapter.start_rank_factor=1e300"),
    says="adapter.start_rank_factor = 1e+300: is more than",
)
CASES.option("path_with_nul", "--checkpoint.run_dir=a\0b", says='checkpoint.run_dir = "a\\u0000b": must be text')
CASES.option("path_of_5000_letters", f"--model.path={'a' * 5000}", says='model.path = "aaaa')
CASES.option("path_with_half_a_letter", "--model.path=\udc80", says='model.path = "\\udc80": must be text')

CASES.option(
    "schedule_settings_of_another",
    '--training.schedule_settings={"power": 2}',
    says='"power" (of polynomial) is not a setting of training.schedule = "linear"; it has none; take it out',
)
CASES.option(
    "schedule_settings_that_cannot_be",
    *("--training.schedule=polynomial", '--training.schedule_settings={"lr_end": 1.0}'),
    says='correct it for training.schedule = "polynomial" over 2 steps',
    ranks=RANKS,
)
CASES.option(
    "schedule_that_follows_losses",
    "--training.schedule=reduce_lr_on_plateau",
    says='training.schedule = "reduce_lr_on_plateau": must be one of "linear"',
)
CASES.option("samples_below_none", "--logging.samples=-1", says="logging.samples = -1: must be a whole number >= 0")
CASES.option("noise_of_nothing", "--training.neftune_alpha=0", says="training.neftune_alpha = 0: must be a number > 0")
CASES.option(
    "rslora_without_a_scale",
    *("--adapter.method=mora", "--adapter.r=null", "--adapter.lora_alpha=32", "--adapter.use_rslora=true"),
    says="adapter.use_rslora = true: the method 'mora' does not scale its update; set it to false",
)
CASES.option("method_unknown", "--adapter.method=dvora", says='adapter.method = "dvora": there is no such method; name')
CASES.option("storage_unknown", "--model.storage=nf5", says='model.storage = "nf5": no such storage (known: plain')
CASES.option(
    "storage_setting_unknown",
    *("--model.storage=int8", '--model.storage_settings={"double_quant": true}'),
    says="model.storage_settings: \"double_quant\" is not a setting of the storage 'int8'; it has: block_size",
)
CASES.option(
    "storage_block_size_100",
    *("--model.storage=nf4", '--model.storage_settings={"block_size": 100}'),
    says="model.storage_settings: block_size = 100: must be one of 64, 128, 256, 512",
)


@CASES.bad(
    says=(
        'model.storage = "int8": holds weights that are frozen, and adapter.method = "full" trains them',
        'set model.storage to "plain", or train an adapter',
    ),
    ranks=RANKS,
)
def storage_of_what_is_trained(folder: Folder) -> Words:
    return folder.run(model={"storage": "int8"}, adapter={"method": "full", "r": None, "target_modules": None})


CASES.option("plugin_absent", "--plugins=absent", says='plugins = "absent": there is no such Python module; install it')

# --- numbers that do not go with the model or the length of the run ---------------------------------------------------

CASES.option(
    "rank_above_both_sides",
    "--adapter.r=4000",
    says="adapter.r: 4,000 components for 'model.layers.0.mlp.down_proj', which is (36, 53); more than 36 add nothing",
    ranks=RANKS,
)
CASES.option(
    "rank_above_one_side",
    "--adapter.r=16",
    says="adapter.r: 16 components for 'model.layers.0.self_attn.v_proj', which is (12, 36), and 1 other layers",
    code=DONE,
    ranks=RANKS,
)
CASES.option(
    "warmup_beyond_the_run",
    "--training.warmup_steps=9",
    says="warning: training.warmup_steps = 9: the run has 2 steps, so the learning rate never reaches",
    code=DONE,
    ranks=RANKS,
)
CASES.option(
    "saving_beyond_the_run",
    "--checkpoint.save_every=50",
    says="note: checkpoint.save_every = 50: the run has 2 steps",
    code=DONE,
)
CASES.option(
    "evaluation_beyond_the_run", "--training.eval_every=50", says="eval_every = 50: the run has 2 steps", code=DONE
)
CASES.option("patience_without_evaluation", "--training.early_stopping=3", says="training.eval_every is null; give")
CASES.option("patience_of_0", "--training.early_stopping=0", says="training.early_stopping = 0: must be a whole number")
CASES.option(
    "gain_without_patience", "--training.early_stopping_min_delta=0.1", says="means nothing without training.early_st"
)
CASES.option("no_such_optimizer", "--training.optimizer=adam", says='must be one of "adamw", "adamw_8bit"')
CASES.option("rate_of_1", "--training.learning_rate=1", says="learning_rate = 1: AdamW moves every", code=DONE)
CASES.option(
    "evaluation_of_nothing",
    *("--training.eval_every=1", "--data.validation_samples=0"),
    says="training.eval_every = 1: there is nothing to evaluate on",
)
CASES.option(
    "cutoff_beyond_the_positions",
    "--data.cutoff_len=600",
    says="warning: data.cutoff_len = 600: the model was trained on texts of at most 512 tokens",
    code=DONE,
    ranks=RANKS,
)


def encoder(name: str, says: str, code: int, *, words: int) -> None:
    """A case: a classifier with 63 learned positions, a cutoff_len of 64, and texts of about this many words."""

    def make(folder: Folder) -> Words:
        encoders.plain_encoder(folder / "base", "roberta")
        records = [{"text": "great film " * (words // 2), "label": i % 2} for i in range(12)]
        folder.text("data.json", json.dumps(records))
        return folder.run(
            model={"task": "sequence_classification"},
            data={"format": "classification", "cutoff_len": 64, "validation_samples": 0},
            adapter={"target_modules": None},
        )

    make.__name__ = name
    CASES.bad(says=says, code=code, ranks=RANKS)(make)


encoder(
    "records_beyond_learned_positions",
    "data.cutoff_len = 64: records have up to 64 tokens, and the model learned positions for 63 only; lower it to 63",
    USERS_MISTAKE,
    words=200,
)
encoder("cutoff_beyond_learned_positions", "warning: data.cutoff_len = 64: the model was trained", DONE, words=8)

# --- patterns ---------------------------------------------------------------------------------------------------------

CASES.option("bad_expression", "--adapter.target_modules=(q_proj", says='"(q_proj" is not a regular expression')
CASES.option(
    "no_such_module",
    "--adapter.target_modules=query",
    says="adapter.target_modules: 'query' matches no linear layer of this model; it has: q_proj (2), k_proj (2)",
    ranks=RANKS,
)
CASES.option(
    "embeddings",
    "--adapter.target_modules=embed_tokens",
    says="no linear layer of this model, only 'model.embed_tokens' (Embedding); adapter.trained_modules trains such",
    ranks=RANKS,
)
CASES.option(
    "norms",
    "--adapter.target_modules=.*norm",
    says="only 'model.layers.0.input_layernorm' (LlamaRMSNorm)",
    ranks=RANKS,
)
CASES.option(
    "no_trained_module",
    "--adapter.trained_modules=score",
    says="adapter.trained_modules: 'score' matches no module with parameters; the outermost are: model, lm_head",
    ranks=RANKS,
)
CASES.option(
    "adapted_and_trained",
    "--adapter.trained_modules=q_proj",
    says="adapter.target_modules and adapter.trained_modules both match 'model.layers.0.self_attn.q_proj'",
    ranks=RANKS,
)
CASES.option(
    "a_rate_of_nothing",
    '--training.learning_rates={"projector": 1e-3}',
    says="training.learning_rates: 'projector' matches no module with parameters",
    ranks=RANKS,
)
CASES.option(
    "a_rate_of_what_is_frozen",
    '--training.learning_rates={"embed_tokens": 1e-3}',
    says="training.learning_rates: nothing in 'embed_tokens' is trained; leave it out, or train it",
    ranks=RANKS,
)

# --- engine.deepspeed -------------------------------------------------------------------------------------------------


def deepspeed(name: str, says: str | tuple[str, ...], **options: Any) -> None:
    """A case: these options of DeepSpeed's own."""
    CASES.option(f"deepspeed_{name}", f"--engine.deepspeed={json.dumps(options)}", says=says)


deepspeed("unknown", "steps_per_prnt: unknown key; did you mean steps_per_print?", steps_per_prnt=5)
deepspeed("unknown_section", "zero_optimisation: unknown key; did you mean zero_optimization?", zero_optimisation={})
deepspeed("unlike_any", "mixed_bread: unknown key; DeepSpeed would ignore it; leave it out", mixed_bread=True)
deepspeed(
    "unknown_below", "sub_group_sise: unknown key; did you mean sub_group", zero_optimization={"sub_group_sise": 5}
)
deepspeed(
    "unknown_two_below",
    "zero_optimization.offload_param.pin_memry: unknown key; did you mean pin_memory?",
    zero_optimization={"offload_param": {"pin_memry": True}},
)
deepspeed("unknown_in_a_section", "did you mean flops_profiler.profile_step?", flops_profiler={"profile_stp": 1})
deepspeed("unknown_in_a_strict_section", "comms_logger.verbos: unknown key", comms_logger={"verbos": True})
deepspeed("text_for_a_number", "steps_per_print = 'often': must be a whole number", steps_per_print="often")
deepspeed("text_for_a_flag", "wall_clock_breakdown = 'no': must be true or false", wall_clock_breakdown="no")
deepspeed("number_for_a_section", "aio = 5: must be a JSON object", aio=5)
deepspeed("number_for_our_section", "zero_optimization = 5: must be a JSON object", zero_optimization=5)
deepspeed("list_for_a_section", "tensorboard = [1]: must be a JSON object", tensorboard=[1])
deepspeed(
    "text_below",
    "zero_optimization.sub_group_size = 'big': Input should be a valid integer",
    zero_optimization={"sub_group_size": "big"},
)
deepspeed("unknown_format", "data_types.grad_accum_dtype = 'fp33': must be", data_types={"grad_accum_dtype": "fp33"})
deepspeed("ours", "train_batch_size is decided elsewhere; use training.global_batch_size", train_batch_size=8)
deepspeed("impossible", "sequence_parallel_size = 2: cannot be used", sequence_parallel_size=2)
deepspeed("nan", "engine.deepspeed: NaN is not a JSON number", prescale=float("nan"))
deepspeed(
    "several",
    ("  steps_per_print = 'often': must be a whole number", "  zero_optimization.a: unknown key; leave it out"),
    steps_per_print="often",
    zero_optimization={"a": 1},
)

# --- config files -----------------------------------------------------------------------------------------------------


def file(name: str, content: str | bytes, says: str) -> None:
    """A case: a config file with this content."""

    def make(folder: Folder) -> Words:
        folder.text("config.json", content)
        return ["train", "--config", "config.json"]

    make.__name__ = name
    CASES.bad(says=says)(make)


file("not_json", '{"model": }', "config.json: line 1, column 11: not valid JSON: Expecting value")
file("empty", "", "config.json: line 1, column 1: not valid JSON")
file("blank_lines", "\n\n\n", "config.json: line 4, column 1: not valid JSON")
file("long_line", '{"a": [' + "1, " * 100_000 + "x", "column 300008: not valid JSON: Expecting value\n    , 1, 1, 1")
file("list", "[1, 2]", "config.json: must hold one JSON object")
file("null", "null", "config.json: must hold one JSON object")
file("deep", '{"a": ' * 100_000, "config.json: brackets are nested more than 100 levels deep")
file("fairly_deep", '{"a":' * 300 + "1" + "}" * 300, "config.json: brackets are nested more than 100 levels deep")
file(
    "utf16",
    '{"model": {}}'.encode("utf-16"),
    "config.json: is not UTF-8 text (byte 0); save it as UTF-8",
)
file("binary", bytes(range(256)), "config.json: is not UTF-8 text (byte 128)")
file("repeated_key", '{"adapter": {"r": 4, "r": 8}}', 'config.json: the key "r" is given twice in one section')
file("repeated_section", '{"adapter": {}, "adapter": {}}', 'config.json: the key "adapter" is given twice')
file("nan", '{"training": {"learning_rate": NaN}}', "config.json: NaN is not a JSON number; give a finite value")
file("overflow", '{"training": {"learning_rate": 1e999}}', "config.json: 1e999 is too large for a number")
file("digits", f'{{"adapter": {{"r": {"1" * 5000}}}}}', "config.json: 111111111111... has 5,000 digits")
file("section_is_null", '{"model": null, "data": {"train": "a"}}', "model: null; must be a section {...} with path")
file("bom_and_nothing_in_it", b"\xef\xbb\xbf{}", "config.json: 2 problems")


def path(name: str, says: str, make: Callable[[Path], Any]) -> None:
    """A case: something else than a file where the config file should be."""

    def prepare(folder: Folder) -> Words:
        make(folder / "config.json")
        return ["train", "--config", "config.json"]

    prepare.__name__ = name
    CASES.bad(says=says)(prepare)


path("missing", "config.json: no such config file", lambda place: None)
path("folder", "config.json: is a folder; give one JSON or YAML file", lambda place: place.mkdir())
path("link_in_a_circle", "config.json: cannot be read (Too many levels", lambda place: place.symlink_to(place.name))


@CASES.bad(says='the key "zero_optimization" is given twice in one section')
def repeated_key_in_an_option(folder: Folder) -> Words:
    return folder.run('--engine.deepspeed={"zero_optimization": {}, "zero_optimization": {"sub_group_size": 5}}')


@CASES.bad(says="one.json: extends leads in a circle, two.yaml -> one.json -> two.yaml; take one of them out")
def files_that_extend_each_other(folder: Folder) -> Words:
    folder.text("one.json", '{"extends": "two.yaml"}')
    folder.text("two.yaml", "extends: one.json")
    return ["train", "--config", "two.yaml"]


@CASES.bad(says=("training.epochs = -1: must be a number > 0", "(in config.json)"), ranks=RANKS)
def wrong_value_in_an_extended_file(folder: Folder) -> Words:
    folder.run(training={"epochs": -1})
    folder.text("mine.yaml", "extends: config.json\ntraining: {seed: 3}")
    return ["train", "--config", "mine.yaml"]


@CASES.bad(says="config.yaml: not valid YAML: line 2, column 1: found character '\\t' that cannot start any token")
def tabs_in_yaml(folder: Folder) -> Words:
    folder.text("config.yaml", "model:\n\tpath: base\n")
    return ["train", "--config", "config.yaml"]
