"""The command line: its options, its exit codes, and what it prints when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dora_dist import cli
from dora_dist.adapters.methods import chosen
from dora_dist.config import RunConfig
from dora_dist.config.fields import field_specs
from dora_dist.runtime.exit_codes import DONE, USERS_MISTAKE

REPOSITORY = Path(__file__).parents[2]
RECIPE = str(REPOSITORY / "configs/llama7b_dora.json")
COMMANDS = [
    "train",
    "validate",
    "schema",
    "consolidate",
    "export-peft",
    "import-gguf",
    "assemble-llava",
    "extract-features",
    "evaluate",
    "analyze",
    "report",
    "env",
]

# Users' scripts depend on these: whoever changes one changes the interface.
CONFIG_OPTIONS = {
    "model": (
        "path revision tokenizer dtype attn_implementation task num_labels feature_dim storage storage_settings "
        "trust_remote_code"
    ),
    "adapter": (
        "method settings weight_decomposed r lora_alpha use_rslora dropout dropout_mode norm_gradient "
        "target_modules magnitude_only_modules trained_modules trained_parameters init_from dynamic_rank "
        "start_rank_factor component_init component_scale prune_start prune_stop prune_every prune_schedule "
        "importance_beta dem_weight dem_form pruned_moments compact"
    ),
    "data": (
        "train validation validation_samples format text_fields label_field loss_on prompt_template answer_field "
        "train_on cutoff_len target_len doc_stride packing packing_length cache features prompts image_folder "
        "image_aspect_ratio max_image_pixels streaming shuffle_buffer bad_records bad_images chat_template "
        "group_by_modality_length num_workers"
    ),
    "training": (
        "optimizer learning_rate learning_rates schedule schedule_settings warmup_steps warmup_ratio epochs max_steps "
        "global_batch_size micro_batch_size weight_decay max_grad_norm adam_beta1 adam_beta2 adam_epsilon "
        "neftune_alpha activation_checkpointing recompute_all loss_chunk eval_every metric early_stopping "
        "early_stopping_min_delta num_beams seed"
    ),
    "checkpoint": "run_dir save_every keep_last on_failure keep_best resume",
    "engine": (
        "accelerator offload_param offload_optimizer hpz_partition_size param_persistence_threshold "
        "prefetch_bucket_size reduce_bucket_size max_live_parameters max_reuse_distance allgather_sequential "
        "start_timeout_s step_timeout_s deepspeed"
    ),
    "logging": "every trackers tensorboard progress_bar report samples sample_tokens peak_flops",
    "analysis": "every modules",
}
SPEAKING = [
    "--system",
    "--image",
    "--format",
    "--chat-template",
    "--base",
    "--dtype",
    "--max-new-tokens",
    "--temperature",
    "--top-p",
    "--top-k",
    "--repetition-penalty",
    "--seed",
    "--plugins",
]
"""Of every command that asks a model."""
OWN_OPTIONS: dict[str, list[str]] = {
    "train": ["--config", "--resume", "--local_rank", "--local-rank"],
    "validate": ["--data", "--world-size", "--no-files"],
    "schema": [],
    "consolidate": [
        "--output",
        "--overwrite",
        "--base",
        "--dtype",
        "--base-precision",
        "--max-shard-size",
        "--plugins",
    ],
    "export-peft": ["--output", "--overwrite", "--base", "--plugins"],
    "export": [
        "--to",
        "--output",
        "--overwrite",
        "--base",
        "--plugins",
        "--rank",
        "--max-error",
        "--force",
        "--no-logits",
        "--dtype",
        "--type",
    ],
    "import-gguf": ["--output", "--overwrite", "--dtype"],
    "assemble-llava": [
        "--vision",
        "--language",
        "--output",
        "--overwrite",
        "--image-token",
        "--feature-layer",
        "--image-size",
        "--seed",
    ],
    "extract-features": [
        "--tower",
        "--output",
        "--layer",
        "--grid",
        "--boxes",
        "--image-size",
        "--image-aspect-ratio",
        "--image-folder",
        "--max-image-pixels",
        "--bad-images",
        "--frames-per-second",
        "--most-frames",
        "--batch-size",
        "--num-workers",
        "--dtype",
        "--store",
        "--part",
    ],
    "evaluate": [
        "--tasks",
        "--format",
        "--instruction",
        "--mode",
        "--base",
        "--batch-size",
        "--num-beams",
        "--max-new-tokens",
        "--normalise",
        "--limit",
        "--dtype",
        "--output",
        "--text-fields",
        "--label-field",
        "--cutoff-len",
        "--doc-stride",
        "--features",
        "--bad-images",
        "--image-folder",
        "--image-aspect-ratio",
        "--max-image-pixels",
        "--chat-template",
        "--plugins",
    ],
    "generate": ["--prompt", "--file", "--output", "--batch-size", "--limit", *SPEAKING],
    "chat": SPEAKING,
    "analyze": ["--modules", "--recordings", "--steps", "--output", "--overwrite"],
    "report": ["--output", "--overwrite"],
    "push": ["--base", "--public", "--message", "--dry-run"],
    "env": ["--json", "--timeout"],
}


def declared_options() -> dict[str, list[str]]:
    commands = next(action for action in cli.build_parser()._actions if action.dest == "command").choices
    assert isinstance(commands, dict)
    return {
        name: [
            option for action in parser._actions for option in action.option_strings if option not in ("-h", "--help")
        ]
        for name, parser in commands.items()
    }


def test_options_of_every_command_are_pinned() -> None:
    fields = [f"--{section}.{key}" for section, keys in CONFIG_OPTIONS.items() for key in keys.split()] + ["--plugins"]
    wanted = {name: own + (fields if name in ("train", "validate") else []) for name, own in OWN_OPTIONS.items()}
    assert declared_options() == wanted


def test_config_options_are_the_schemas_fields_with_their_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    text, letters = " ".join(printed.split()), "".join(printed.split())  # lines end at hyphens, too
    for name, spec in field_specs(RunConfig).items():
        assert f"--{name} " in text
        assert "".join(spec.help().split()) in letters
    assert "(>= 1; default: 16)" in text
    assert "linear|cosine|constant" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    assert f"example:  dora-dist {command}" in capsys.readouterr().out


def test_evaluate_lists_the_choices_of_the_configurations_fields(capsys: pytest.CaptureFixture[str]) -> None:
    for option, choices in (("--image-aspect-ratio", "pad,processor"), ("--chat-template", "vicuna_v1,plain,model")):
        with pytest.raises(SystemExit) as left:
            cli.main(["evaluate", "model", "--tasks", "a=b.json", option, "other"])
        assert left.value.code == 2
        assert f"{option} {{{choices}}}" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    overview = capsys.readouterr().out
    assert all(f"    {command}" in overview for command in COMMANDS)
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("dora-dist ")


HEAVY = (
    "torch transformers deepspeed datasets numpy accelerate huggingface_hub safetensors tokenizers pyarrow PIL "
    "matplotlib scipy sklearn rich tqdm"
)
"""Packages that take long to import: whoever asks for help, or has misspelt a field, is answered without them."""


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--help"], DONE, "dora-dist COMMAND --help"),
        (["train", "--help"], DONE, "--adapter.r INT"),
        (["evaluate", "--help"], DONE, "--tasks NAME=FILE"),
        (["schema"], DONE, json.dumps(RunConfig.json_schema(), indent=2)),
        (["validate", RECIPE, "--no-files"], DONE, "is valid: DoRA"),
        (["validate", RECIPE, "--no-files", "--adapter.rr=8"], USERS_MISTAKE, "did you mean adapter.r?"),
        (["train", "--config", RECIPE, "--adapter.r=0"], USERS_MISTAKE, "adapter.r = 0: must be a whole number >= 1"),
        (["train", "--config", RECIPE, "--data.train=no.json"], USERS_MISTAKE, "no such file"),
    ],
)
def test_answers_that_need_no_model_load_nothing_heavy(words: list[str], code: int, says: str) -> None:
    program = (
        f"import sys; from dora_dist.cli import main\ntry: code = main({words!r})\nexcept SystemExit as left: "
        f"code = left.code\nheavy = set({HEAVY!r}.split()) & set(sys.modules); sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.returncode, says in done.stdout + done.stderr) == (code, True), done.stderr


@pytest.mark.parametrize("module", ["dora_dist", "dora_dist.config", "dora_dist.cli"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print(set({HEAVY!r}.split()) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_recipe_validates(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", str(recipe), "--no-files"]) == 0
    adapter = RunConfig.load(recipe).adapter
    assert f"{recipe} is valid: {chosen(adapter).title} " in capsys.readouterr().err


def test_validate_prints_the_deepspeed_json(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--training.micro_batch_size", "1", "--engine.hpz_partition_size=2"]
    assert cli.main(["validate", "--world-size", "4", RECIPE, "--no-files", *overrides]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == RunConfig.load(RECIPE, overrides).deepspeed_config(4)
    assert "DoRA r=32 on huggyllama/llama-7b, 16 records a step; runs on 1 to 16 ranks" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate", "nowhere.json"], "error: nowhere.json: no such config file"),
        (["validate", RECIPE, "--data.train=a.json"], 'error: data.train = "a.json": no such file'),
        (["validate", RECIPE, "--no-files", "--world-size", "32"], "no record for each of 32 ranks"),
        (
            ["validate", RECIPE, "--adapter.rank", "3"],
            "--adapter.rank: unknown option; did you mean adapter.r?",
        ),
        (["validate", RECIPE, "--adapter.r", "none"], 'adapter.r = "none": must be a whole number >= 1'),
        (
            ["validate", RECIPE, "--no-files", "--adapter.dynamic_rank=true", "--training.max_steps=20"],
            "the pruning window, steps 3 to 10 of 20, is shorter than 10 steps; lower it, widen adapter.prune_start",
        ),
        (
            ["validate", RECIPE, "--no-files", '--engine.deepspeed={"zero_optimization": {"x": 1}}'],
            "zero_optimization.x: unknown key",
        ),
        (["train", "--config", RECIPE, "--local_rank=1", "--data.train=a.json"], 'error: data.train = "a.json"'),
        (["train", "--config", RECIPE, "--data.trian", "a.json"], "did you mean data.train?"),
        (["import-gguf", "nowhere.gguf", "--output", "out"], "nowhere.gguf"),
        (
            ["assemble-llava", "--vision", "./no", "--language", "./lm", "--output", "out"],
            "--language lm: no such folder",
        ),
        (["consolidate", "nowhere", "--output", "out"], "nowhere: no such folder"),
        (["evaluate", "m", "--tasks", "boolq=nowhere.json"], "nowhere.json"),
        (
            ["evaluate", "m", "--tasks", "boolq=a.json", "boolq=b.json"],
            "a name is given twice in boolq, boolq",
        ),
    ],
)
def test_user_error_is_one_message_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert message in text
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["train"], "required: --config"),
        (["train", "--config", RECIPE, "--adapter", "3"], "unrecognized arguments: --adapter 3"),
        (["validate", RECIPE, "--world-size", "0"], "'0' is not a whole number above 0"),
        (["consolidate", "x", "--output", "y", "--max-shard-size", "5 apples"], "'5 apples' is not a size"),
        (["evaluate", "m", "--tasks", "boolq.json"], "'boolq.json' is not NAME=FILE"),
    ],
)
def test_misuse_is_explained_by_the_parser(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5_000_000_000), ("1.5 mb", 1_500_000), ("2GiB", 2 << 30), ("700", 700)]
)
def test_sizes(text: str, size: int) -> None:
    options = cli.build_parser().parse_args(["consolidate", "x", "--output", "y", "--max-shard-size", text])
    assert options.max_shard_size == size


def test_overrides_reach_the_config_in_order() -> None:
    options = cli.build_parser().parse_args(
        [
            "train",
            "--adapter.r=4",
            "--local-rank",
            "0",
            "--config",
            RECIPE,
            "--training.learning_rate",
            "1e-3",
            "--adapter.r",
            "8",
        ]
    )
    config = RunConfig.load(options.config, options.overrides)
    assert (config.adapter.r, config.training.learning_rate) == (8, 1e-3)


def test_resume_is_short_for_auto_and_an_explicit_folder_wins() -> None:
    def resumed(*arguments: str) -> str | None:
        options = cli.build_parser().parse_args(["train", "--config", RECIPE, *arguments])
        return cli.load_config(options, check_files=False).checkpoint.resume

    assert resumed() is None
    assert resumed("--resume") == "auto"
    assert resumed("--checkpoint.resume", "a/checkpoint-2", "--resume") == "a/checkpoint-2"


@pytest.mark.parametrize(
    ("environment", "prefix"),
    [
        ({}, "error: "),
        (
            {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"},
            "error on rank 1: ",
        ),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, "error on rank 2: "),
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, "error on rank 3: "),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "5"}, "error on rank 4: "),
        ({"RANK": "left over"}, "error: "),
    ],
)
def test_error_names_the_rank_when_there_are_several(
    environment: dict[str, str], prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "--config", "nowhere.json"]) == 2
    assert capsys.readouterr().err.startswith(f"{prefix}nowhere.json: no such config file")


def test_what_deepspeeds_launcher_puts_before_the_command_is_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--local_rank=1", "train", "--config", RECIPE, "--data.trian", "a.json"]) == 2
    assert "did you mean data.train?" in capsys.readouterr().err


def test_interrupt_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunConfig, "load", interrupted)
    assert cli.main(["validate", RECIPE]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.fixture
def adapted(tmp_path: Path) -> Path:
    """A folder with a small real LLaMA in `base`, and in `adapter` a PEFT DoRA of it that does not say so."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    targets = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, targets).save_pretrained(str(tmp_path / "adapter"))
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = None
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_consolidate_merges_as_its_options_say(adapted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    merged = adapted / "merged"
    arguments = ["consolidate", str(adapted / "adapter"), "--output", str(merged), "--max-shard-size", "20KB"]
    assert cli.main(arguments) == 2
    assert "does not say what its base model is; give it with --base MODEL" in capsys.readouterr().err
    arguments += ["--base", str(adapted / "base")]
    assert cli.main(arguments) == 0
    assert f"{merged}: 4 of " in capsys.readouterr().out
    assert len(list(merged.glob("*.safetensors"))) > 1

    tokens = torch.arange(16)[None]
    peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(adapted / "base"), adapted / "adapter")
    plain = LlamaForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, peft(tokens).logits, atol=1e-5, rtol=0)

    assert cli.main(arguments) == 2  # it is there already
    assert cli.main([*arguments, "--overwrite", "--dtype", "bf16"]) == 0
    assert {w.dtype for file in merged.glob("*.safetensors") for w in load_file(file).values()} == {torch.bfloat16}


def launched(*arguments: str, flags: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_launch_script_is_the_train_command() -> None:
    done = launched("launch/train.py", "--local_rank=0", "--config", "nowhere.json", PYTHONPATH=str(REPOSITORY))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere.json: no such config file")
    done = launched("-m", "dora_dist", "validate", "nowhere.json")
    assert (done.returncode, done.stderr[:21]) == (2, "error: nowhere.json: ")


def test_launch_script_without_the_package_says_how_to_install_it() -> None:
    done = launched("launch/train.py", "--config", RECIPE, flags=("-E", "-S"))  # no site-packages, no PYTHONPATH
    assert done.returncode == 1
    assert done.stderr.startswith("error: dora_dist is not installed here; run `pip install -e .`")
