"""The configuration: what it accepts, what it refuses and how it says so, and what is derived from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dora_dist.config import RunConfig, is_local
from dora_dist.config.fields import field_specs
from dora_dist.config.problems import OTHER_NAMES
from dora_dist.runtime.errors import UserError
from dora_dist.tasks import problems

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "configs").glob("*.json"))
MINIMAL = {"model": {"path": "org/model"}, "data": {"train": "org/data"}}
RECORD = {"instruction": "Is snow cold?", "output": "the correct answer is true", "answer": "true"}


PICTURES = {"path": "a", "task": "image_text_to_text"}


def with_fields(**sections: dict[str, Any]) -> dict[str, Any]:
    """MINIMAL with further fields, by section."""
    return {name: {**MINIMAL.get(name, {}), **sections.get(name, {})} for name in {**MINIMAL, **sections}}


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        RunConfig.from_dict(raw, origin="run.json", rules=problems)
    return str(caught.value)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a model folder `base` and a data file `train.json`, and a config over them."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": torch.ones(2, 2)}, base / "model.safetensors")
    (tmp_path / "train.json").write_text(json.dumps([RECORD]))
    raw = {"model": {"path": "base"}, "data": {"train": "train.json"}}
    (tmp_path / "mine.json").write_text(json.dumps(raw))
    return tmp_path


def test_defaults_fill_in_everything_but_the_model_and_the_data() -> None:
    config = RunConfig.from_dict(MINIMAL)
    assert (config.adapter.r, config.adapter.lora_alpha, config.adapter.weight_decomposed) == (16, 32.0, True)
    assert (config.training.global_batch_size, config.training.micro_batch_size) == (16, 4)
    title, model, data = refusal({}).splitlines()
    assert title == "run.json: 2 problems"
    assert model.startswith("  model: missing; must be a section {...} with path, revision, tokenizer, dtype")
    assert data.startswith("  data: missing; must be a section {...} with train, validation, validation_samples")


def test_configuration_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig.from_dict(MINIMAL).adapter.r = 3  # pydantic's runtime check is what is tested


def test_every_field_is_documented() -> None:
    missing = [name for name, spec in field_specs(RunConfig).items() if len(spec.description) < 10]
    assert missing == []


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (with_fields(adapter={"r": "3"}), 'adapter.r = "3": must be a whole number >= 1'),
        (with_fields(adapter={"r": "3"}), "write 3, without quotes"),
        (with_fields(adapter={"r": 3.0}), "adapter.r = 3.0: must be a whole number >= 1"),
        (with_fields(adapter={"r": True}), "adapter.r = true: must be a whole number >= 1"),
        (with_fields(adapter={"r": 0}), "adapter.r = 0: must be a whole number >= 1"),
        (with_fields(adapter={"dropout": 1.0}), "adapter.dropout = 1.0: must be a number >= 0 and < 1"),
        (
            with_fields(adapter={"weight_decomposed": "true"}),
            'adapter.weight_decomposed = "true": must be true or',
        ),
        (
            with_fields(training={"learning_rate": float("nan")}),
            "training.learning_rate = NaN: must be a number > 0",
        ),
        (with_fields(training={"learning_rate": "1e-4"}), "write 0.0001, without quotes"),
        (with_fields(model={"dtype": "fp16"}), 'model.dtype = "fp16": must be one of "bf16", "fp32"'),
        (with_fields(data={"train": 3}), "data.train = 3: must be text (not empty), or a list of text"),
        (with_fields(data={"train": []}), "data.train = []: must be text (not empty), or a list of text"),
        (
            with_fields(training={"activation_checkpointing": "some"}),
            'training.activation_checkpointing = "some": must be true or false, or "selective" (true: keep',
        ),
        (
            with_fields(training={"activation_checkpointing": "selective", "recompute_all": True}),
            'recompute_all = true: means nothing with activation_checkpointing = "selective"; set that to true',
        ),
        (
            with_fields(adapter={"target_modules": ["q", 2]}),
            "adapter.target_modules = 2: must be a list of text, or",
        ),
        (with_fields(engine={"deepspeed": [1]}), "engine.deepspeed = [1]: must be a JSON object"),
        (with_fields(training={"learning_rates": {"a": 0}}), "= 0: must be a JSON object, each value a number > 0"),
        ({**MINIMAL, "plugins": "mine"}, 'plugins = "mine": must be a list of text (Python modules to import first'),
        ({**MINIMAL, "plugins": ["mine", 3]}, "plugins = 3: must be a list of text (Python modules to import first"),
        (
            {**MINIMAL, "training": 7},
            "training: 7; must be a section {...} with optimizer, learning_rate, learning_rates",
        ),
        (
            {"model": {}, "data": {"train": "x"}},
            "model.path: missing; must be text (not empty) (Hugging Face model",
        ),
    ],
)
def test_wrong_value_names_field_value_and_what_is_right(raw: dict[str, Any], message: str) -> None:
    assert message in refusal(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            with_fields(training={"learning_rat": 1}),
            "training.learning_rat: unknown key; did you mean training.learning_rate?",
        ),
        (
            with_fields(training={"dropout": 0.1}),
            "training.dropout: unknown key; did you mean adapter.dropout?",
        ),
        (with_fields(training={"savee_every": 1}), "did you mean checkpoint.save_every?"),
        (with_fields(training={"lr": 1}), "training.lr: unknown key; did you mean training.learning_rate?"),
        (with_fields(adapter={"use_dora": True}), "did you mean adapter.weight_decomposed?"),
        ({**MINIMAL, "max_steps": 10}, "max_steps: unknown key; did you mean training.max_steps?"),
        ({**MINIMAL, "trainin": {}}, "trainin: unknown key; did you mean the section training?"),
        ({**MINIMAL, "zzz": {}}, "zzz: unknown key; the sections are model, adapter, data, training"),
        ({**MINIMAL, "plugin": []}, "plugin: unknown key; did you mean plugins?"),
        (with_fields(model={"plugins": []}), "model.plugins: unknown key; did you mean plugins?"),
        (with_fields(logging={"qqq": 1}), "logging.qqq: unknown key; logging has every, trackers"),
    ],
)
def test_unknown_key_says_what_was_meant(raw: dict[str, Any], message: str) -> None:
    assert message in refusal(raw)


def test_every_other_name_that_is_recognised_leads_to_a_field() -> None:
    assert set(OTHER_NAMES.values()) <= set(field_specs(RunConfig))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (with_fields(training={"warmup_steps": 5, "warmup_ratio": 0.1}), "give one of the two"),
        (with_fields(data={"validation": "v.json", "validation_samples": 3}), "give one of the two"),
        (with_fields(training={"eval_every": 5}), "nothing to evaluate on; give data.validation"),
        (
            with_fields(adapter={"weight_decomposed": False, "norm_gradient": "full"}),
            "plain LoRA has no norm",
        ),
        (
            with_fields(adapter={"weight_decomposed": False, "magnitude_only_modules": ["o_proj"]}),
            "plain LoRA has no magnitudes",
        ),
        (with_fields(adapter={"target_modules": []}), "nothing to train"),
        (with_fields(model=PICTURES, data={"format": "llava"}), "data.image_folder is not set"),
        (with_fields(model=PICTURES, data={"format": "llava"}), 'data.loss_on = "all": of conversations with pictures'),
        (with_fields(model=PICTURES), "image_text_to_text and the format llava go together"),
        (with_fields(adapter={"target_modules": [], "dynamic_rank": True}), "leaves no layer to prune"),
        (with_fields(model=PICTURES, training={"metric": "accuracy"}), 'is none for model.task = "image_text_to_text"'),
        (
            with_fields(adapter={"dynamic_rank": True, "prune_start": 0.6}),
            "adapter.prune_start = 0.6: must be before adapter.prune_stop = 0.5",
        ),
        (
            with_fields(adapter={"dynamic_rank": True, "start_rank_factor": 1.0}),
            "layers start with 16 components and adapter.r = 16 is to be left",
        ),
        (with_fields(adapter={"dynamic_rank": True, "init_from": "a"}), "its components have no gates"),
        (with_fields(adapter={"target_modules": ["*.q_proj"]}), '"*.q_proj" is not a regular expression'),
        (
            with_fields(adapter={"target_modules": ["q", "v"], "magnitude_only_modules": ["v"]}),
            'adapter.magnitude_only_modules: "v" is in adapter.target_modules too',
        ),
        (
            with_fields(model={"attn_implementation": "flash_attention_2", "dtype": "fp32"}),
            'needs model.dtype = "bf16" and a GPU',
        ),
    ],
)
def test_impossible_combination_is_refused(raw: dict[str, Any], message: str) -> None:
    assert message in refusal(raw)


def test_all_problems_are_told_at_once() -> None:
    lines = refusal(with_fields(adapter={"r": 0, "rr": 1}, training={"epochs": -1})).splitlines()
    assert lines[0] == "run.json: 3 problems"
    assert [line.split()[0].rstrip(":") for line in lines[1:]] == [
        "adapter.r",
        "adapter.rr",
        "training.epochs",
    ]


def test_malformed_json_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{\n  "model": {"path": "a"},\n  "data": {"train": "b",}\n}')
    with pytest.raises(UserError, match=r"x\.json: line 3, column 25: not valid JSON: .*\n +\"data\""):
        RunConfig.load(path)
    path.write_text("")
    with pytest.raises(UserError, match="line 1, column 1"):
        RunConfig.load(path)
    path.write_text('{"adapter": {"r": 1, "r": 2}}')
    with pytest.raises(UserError, match='the key "r" is given twice'):
        RunConfig.load(path)
    path.write_text('{"training": {"epochs": Infinity}}')
    with pytest.raises(UserError, match="Infinity is not a JSON number"):
        RunConfig.load(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match="must hold one JSON object"):
        RunConfig.load(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        RunConfig.load(path)
    with pytest.raises(UserError, match=r"no such config file; did you mean .*x\.json\?"):
        RunConfig.load(tmp_path / "xx.json")
    with pytest.raises(UserError, match="is a folder; give one JSON or YAML file"):
        RunConfig.load(tmp_path)


def test_overrides_take_every_kind_of_value(workplace: Path) -> None:
    config = RunConfig.load(
        "mine.json",
        [
            *("--training.max_steps", "10"),
            *("--training.max_steps", "12"),  # the later one wins
            "--training.learning_rate=3e-4",
            "--training.activation_checkpointing=false",
            "--training.warmup_ratio=null",
            "--adapter.target_modules=q_proj, v_proj",
            '--adapter.magnitude_only_modules=["o_proj"]',
            "--data.train=a.json,b.json",
            '--engine.deepspeed={"zero_optimization": {"sub_group_size": 5}}',
            "--model.revision=2",
            '--adapter.settings={"blocks": 2}',
            "--plugins=mine, yours.too",
        ],
    )
    assert config.training.max_steps == 12
    assert config.training.learning_rate == 3e-4
    assert config.training.activation_checkpointing is False
    assert config.training.warmup_ratio is None
    assert config.adapter.target_modules == ["q_proj", "v_proj"]
    assert config.adapter.magnitude_only_modules == ["o_proj"]
    assert config.data.train == ["a.json", "b.json"]
    assert config.engine.deepspeed == {"zero_optimization": {"sub_group_size": 5}}
    assert config.model.revision == "2"  # text stays text
    assert config.model.path == "base"  # from the file
    assert (config.adapter.settings, config.plugins) == ({"blocks": 2}, ["mine", "yours.too"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--training.max_step", "1"],
            "--training.max_step: unknown option; did you mean training.max_steps?",
        ),
        (["--training.max_steps"], "--training.max_steps: needs a value, a whole number >= 1, or null"),
        (["--training.max_steps", "--adapter.r=1"], "--training.max_steps: needs a value"),
        (["training.max_steps", "1"], "training.max_steps: not an option"),
        (
            ["--training.max_steps", "1e3"],
            "training.max_steps = 1000.0: must be a whole number >= 1, or null",
        ),
        (["--training.epochs", "many"], 'training.epochs = "many": must be a number > 0'),
        (["--logging.tensorboard=yes"], 'logging.tensorboard = "yes": must be true or false'),
        (["--engine.deepspeed={"], 'engine.deepspeed = "{": must be a JSON object'),
        (["--training.epochs=Infinity"], "training.epochs: Infinity is not a JSON number"),
    ],
)
def test_bad_override_is_refused(workplace: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig.load("mine.json", overrides)
    assert message in str(caught.value)


def test_run_folder_is_named_after_the_config_file(workplace: Path) -> None:
    assert RunConfig.load("mine.json").checkpoint.run_dir == "runs/mine"
    assert RunConfig.load("mine.json", ["--checkpoint.run_dir=out/{config}-2"]).checkpoint.run_dir == "out/mine-2"


def test_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = RunConfig.from_dict({"model": {"path": "~/llama"}, "data": {"train": ["~/a.json", "b.json"]}})
    assert config.model.path == "/home/ada/llama"
    assert config.data.train == ["/home/ada/a.json", "b.json"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_json_text_round_trips(recipe: Path, tmp_path: Path) -> None:
    config = RunConfig.load(recipe, ["--training.adam_epsilon=3e-7"])
    saved = tmp_path / "config.json"
    saved.write_text(config.to_json())
    assert RunConfig.load(saved) == config
    assert json.loads(saved.read_text())["checkpoint"]["run_dir"] == config.checkpoint.run_dir != "runs/config"


def test_schema_for_editors_agrees_with_the_fields() -> None:
    schema = RunConfig.json_schema()
    assert schema["required"] == ["model", "data"]
    adapter = schema["$defs"]["AdapterConfig"]
    assert adapter["additionalProperties"] is False
    assert [kind.get("minimum") for kind in adapter["properties"]["r"]["anyOf"]] == [1, None]
    assert adapter["properties"]["dropout_mode"]["enum"] == ["exact", "adapter"]
    assert "default" not in schema["$defs"]["ModelConfig"]["properties"]["path"]


def test_local_names_are_told_from_hub_names(workplace: Path) -> None:
    assert not is_local("meta-llama/Llama-2-7b-hf")
    assert not is_local("gpt2")
    for name in (
        "base",
        "./x",
        "../x",
        "/x",
        "~/x",
        "runs/quickstart/base",
        "a/b.jsonl",
        "data.json",
        "m/tokenizer.model",
    ):
        assert is_local(name), name


def test_files_that_are_there_pass(workplace: Path) -> None:
    config = RunConfig.load("mine.json", check_files=True)
    assert config.model.path == "base"
    RunConfig.from_dict(MINIMAL).check_files()  # hub names are not looked up


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.path=./bse"], 'model.path = "./bse": no such folder in'),
        (["--model.path=./bse"], "did you mean base?"),
        (["--model.path=runs/quickstart/base"], "`make demo` creates the quickstart's"),
        (["--model.path=x.gguf"], "convert it with `dora-dist import-gguf x.gguf --output FOLDER`"),
        (["--model.path=empty"], 'model.path = "empty": no config.json in it'),
        (["--model.path=pickled"], 'model.path = "pickled": no .safetensors file in it'),
        (
            ["--model.tokenizer=./tokenizer.model"],
            'model.tokenizer = "./tokenizer.model": no such file or folder',
        ),
        (["--data.train=tain.json"], 'data.train = "tain.json": no such file in'),
        (["--data.train=tain.json"], "did you mean train.json?"),
        (["--data.train=train.json,void.jsonl"], 'data.train = "void.jsonl": the file is empty'),
        (["--data.train=empty"], 'data.train = "empty": no .json, .jsonl, .parquet, .csv'),
        (["--data.train=base:train.json"], 'data.train = "base:train.json": no train.json in that folder'),
        (["--data.validation=./table.xlsx"], 'data.validation = "./table.xlsx": unknown kind of file'),
        (
            ["--adapter.init_from=base"],
            'adapter.init_from = "base": no adapter_config.json or dora_dist_adapter.json in it',
        ),
        (["--adapter.init_from=step"], 'did you mean "step/adapter"?'),
        (["--checkpoint.resume=step"], 'checkpoint.resume = "step": no complete checkpoint'),
        (["--checkpoint.run_dir=train.json/run"], "train.json is a file; give another folder"),
    ],
)
def test_missing_file_names_field_path_and_remedy(workplace: Path, overrides: list[str], message: str) -> None:
    for folder in ("empty", "pickled", "step/adapter"):
        (workplace / folder).mkdir(parents=True)
    (workplace / "pickled/config.json").write_text("{}")
    (workplace / "step/adapter/adapter_config.json").write_text("{}")
    (workplace / "void.jsonl").touch()
    (workplace / "table.xlsx").write_text("a,b\n")
    with pytest.raises(UserError) as caught:
        RunConfig.load("mine.json", overrides, check_files=True)
    assert message in str(caught.value)
    RunConfig.load("mine.json", overrides)  # only asked for, never a surprise


def test_several_missing_files_are_told_at_once(workplace: Path) -> None:
    with pytest.raises(UserError, match=r"^2 problems with files\n  model\.path = .*\n  data\.train = "):
        RunConfig.load("mine.json", ["--model.path=./no", "--data.train=no.json"], check_files=True)
