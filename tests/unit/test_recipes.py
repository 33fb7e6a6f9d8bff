"""The recipes of configs/: each has the numbers of the paper, or of the authors' runs, that it repeats."""

import math
from pathlib import Path
from typing import Any

import pytest

from dora_dist.adapters.method import AdapterMethod
from dora_dist.adapters.methods import chosen
from dora_dist.config import AdapterConfig, RunConfig
from dora_dist.runtime.errors import UserError
from dora_dist.tasks import problems
from tests.unit.test_config import RECIPES, REPOSITORY

PAPER = {  # base model, learning rate at r = 32
    "llama7b_dora": ("huggyllama/llama-7b", 1e-4),
    "llama13b_dora": ("huggyllama/llama-13b", 2e-4),
    "llama2_7b_dora": ("meta-llama/Llama-2-7b-hf", 2e-4),
    "llama3_8b_dora": ("meta-llama/Meta-Llama-3-8B", 1e-4),
}


def test_the_mora_recipe_has_the_authors_numbers() -> None:
    """Of their runs on MetaMath; MoRA has no alpha."""
    config = RunConfig.load(REPOSITORY / "configs" / "llama2_7b_mora.json")
    adapter, training = config.adapter, config.training
    assert (adapter.method, adapter.settings, adapter.weight_decomposed) == ("mora", {"type": 6}, False)
    assert (adapter.r, adapter.dropout, len(adapter.target_modules or ())) == (8, 0.05, 7)
    assert (training.learning_rate, training.schedule, training.warmup_ratio) == (3e-4, "cosine", 0.03)
    assert (training.epochs, training.global_batch_size, training.weight_decay) == (3, 128, 0)
    assert (config.data.cutoff_len, config.data.loss_on, config.data.format) == (512, "answer", "alpaca")


def test_the_dvora_recipe_trains_the_papers_share_of_the_parameters() -> None:
    """0.04 % of LLaMA-7B's (Liu et al., section 5.5)."""
    adapter = RunConfig.load(REPOSITORY / "configs" / "llama7b_dvora.json").adapter
    method = chosen(adapter)
    assert isinstance(method, AdapterMethod) and method.title == "DVoRA"
    shapes = {"gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}
    layer = [method.parameters(shapes.get(name, (4096, 4096))) for name in adapter.target_modules or ()]
    trained = 32 * sum(math.prod(initial.shape) for parameters in layer for initial in parameters.values())
    assert round(100 * trained / 6_738_415_616, 2) == 0.04


# Mao et al., RoBERTa-base on GLUE: learning rate, batch, epochs; labels, metric; penalty, steps between prunings.
GLUE: dict[str, tuple[Any, ...]] = {
    "glue_rte": (2e-3, 16, 80, 2, "accuracy", 0.5, 10),
    "glue_mrpc": (2.5e-3, 16, 30, 2, "accuracy", 0.3, 50),
    "glue_stsb": (3e-3, 16, 45, 1, "pearson", 0.3, 10),
    "glue_cola": (2e-3, 16, 45, 2, "matthews", 0.3, 10),
    "glue_sst2": (8e-4, 64, 60, 2, "accuracy", 0.5, 10),
    "glue_qnli": (3.5e-3, 16, 12, 2, "accuracy", 0.5, 50),
    "glue_qqp": (1e-3, 16, 10, 2, "accuracy", 0.3, 50),
    "glue_mnli": (3e-3, 32, 10, 3, "accuracy", 0.3, 50),
}


def test_every_recipe_is_here() -> None:
    assert {path.stem for path in RECIPES} >= {"quickstart", "squad", "squad_v2", "xsum", *PAPER, *GLUE}


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipe_validates_and_has_the_papers_numbers(name: str) -> None:
    config = RunConfig.load(REPOSITORY / "configs" / f"{name}.json", check_files=True)
    assert config.data.train == "zwhe99/commonsense_170k"
    adapter, data, training = config.adapter, config.data, config.training
    assert (config.model.path, training.learning_rate) == PAPER[name]
    assert (adapter.weight_decomposed, adapter.r, adapter.lora_alpha, adapter.dropout) == (True, 32, 64, 0.05)
    assert (adapter.dropout_mode, adapter.norm_gradient) == ("exact", "detached")
    assert adapter.target_modules == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert (data.cutoff_len, data.validation_samples, data.loss_on, data.format) == (
        256,
        120,
        "all",
        "instruction",
    )
    assert (training.schedule, training.warmup_steps, training.epochs) == ("linear", 100, 3)
    assert (training.global_batch_size, training.weight_decay, training.eval_every) == (16, 0, 80)
    assert (config.checkpoint.save_every, config.checkpoint.keep_best) == (80, True)
    assert [config.training.batch_plan(ranks).accumulation_steps for ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]


def test_the_recipe_of_full_fine_tuning_differs_from_the_papers_in_method_and_rate_alone() -> None:
    full, paper = (RunConfig.load(REPOSITORY / "configs" / f"llama7b_{name}.json") for name in ("full", "dora"))
    assert full.adapter == AdapterConfig(method="full")
    own = ("learning_rate", "eval_every", "activation_checkpointing")  # nothing is frozen, whose outputs could be kept
    theirs = {name: getattr(paper.training, name) for name in own}
    assert full.training.model_copy(update=theirs) == paper.training and full.training.learning_rate == 2e-5
    assert full.training.eval_every == full.checkpoint.save_every == 2000  # a save is 81 GB, and so is a best one
    same = ("model", "data", "engine", "logging")
    assert all(getattr(full, name) == getattr(paper, name) for name in same)


@pytest.mark.parametrize("name", GLUE)
def test_glue_recipe_validates_and_has_the_papers_numbers(name: str) -> None:
    config = RunConfig.load(REPOSITORY / "configs" / f"{name}.json", check_files=True)
    model, adapter, training = config.model, config.adapter, config.training
    numbers = (training.learning_rate, training.global_batch_size, training.epochs, model.num_labels, training.metric)
    assert (*numbers, adapter.dem_weight, adapter.prune_every) == GLUE[name]
    assert adapter.dynamic_rank and not adapter.weight_decomposed
    assert (adapter.component_init, adapter.component_scale) == ("paper", "paper")
    assert (adapter.lora_alpha, adapter.dropout, adapter.target_modules, adapter.trained_modules) == (
        8,
        0.1,
        None,
        None,
    )
    assert (training.weight_decay, training.max_grad_norm, training.warmup_ratio) == (0.01, 1.0, 0.06)
    assert (training.schedule, model.task, config.data.format) == (
        "linear",
        "sequence_classification",
        "classification",
    )
    assert config.data.train == f"nyu-mll/glue:{name.removeprefix('glue_')}"
    assert config.training.batch_plan(1).accumulation_steps == training.global_batch_size // 8


@pytest.mark.parametrize(("name", "rate"), [("squad", 5e-3), ("squad_v2", 3.4e-3)])
def test_squad_recipe_validates_and_has_the_papers_numbers(name: str, rate: float) -> None:
    config = RunConfig.load(REPOSITORY / "configs" / f"{name}.json", check_files=True)
    adapter, training = config.adapter, config.training
    assert (training.learning_rate, training.global_batch_size, training.epochs) == (rate, 16, 14)
    assert (adapter.component_init, adapter.component_scale) == ("paper", "paper")
    assert (config.model.task, config.data.format, training.metric) == ("question_answering", "squad", "f1")
    assert config.data.train == f"rajpurkar/{name}"


def test_xsum_recipe_validates_and_has_the_papers_numbers() -> None:
    config = RunConfig.load(REPOSITORY / "configs" / "xsum.json", check_files=True)
    model, adapter, data, training = config.model, config.adapter, config.data, config.training
    assert (model.path, model.task) == ("facebook/bart-base", "seq2seq_lm")
    assert (training.learning_rate, training.global_batch_size, training.epochs) == (3.4e-3, 16, 15)
    assert (adapter.dem_weight, adapter.prune_every, adapter.target_modules) == (0.1, 100, None)
    assert (adapter.component_init, adapter.component_scale) == ("paper", "paper")
    assert adapter.dynamic_rank and not adapter.weight_decomposed
    assert (training.weight_decay, training.max_grad_norm, training.warmup_ratio) == (0.01, 1.0, 0.06)
    assert (data.train, data.format, training.metric) == ("EdinburghNLP/xsum", "summarisation", "rouge2")
    assert (data.text_fields, data.label_field) == (["document"], "summary")


VL_BART: dict[str, tuple[Any, ...]] = {
    "image": (
        {"vqa": 20, "gqa": 20, "nlvr2": 256, "caption": 20},  # the authors leave NLVR2's sentences whole
        {"vqa": 20, "gqa": 20, "nlvr2": 20, "caption": 40},
        ("vqa", "gqa", "nlvr2", "caption"),
        2048,
        20,
    ),
    "video": (600, 20, ("tvqa", "how2qa", "tvc", "yc2c"), 512, 7),
}
VL_BART_RUNS = {  # learning rate, global batch, alpha, kinds of parameters that are trained besides
    "image_dora": (1e-3, 300, 128, 2),
    "image_lora": (1e-3, 500, 32, 1),
    "image_full": (1e-4, 500, None, 0),
    "video_dora": (2.4e-4, 40, 128, 1),
    "video_lora": (3e-4, 50, 32, 1),
    "video_full": (1e-4, 40, None, 0),  # ours: the sources have none
}


@pytest.mark.parametrize("name", VL_BART_RUNS)
def test_vl_bart_recipe_has_the_authors_numbers(name: str) -> None:
    config = RunConfig.load(REPOSITORY / "configs" / f"vlbart_{name}.json", rules=problems)
    model, adapter, data, training = config.model, config.adapter, config.data, config.training
    kind, _, method = name.partition("_")
    longest, answer, tasks, width, epochs = VL_BART[kind]
    rate, batch, alpha, kinds = VL_BART_RUNS[name]
    assert (model.path, model.task, model.feature_dim) == ("facebook/bart-base", "vision_seq2seq_lm", width)
    assert isinstance(data.train, dict) and isinstance(data.validation, dict)
    assert tuple(data.train) == tuple(data.validation) == tasks and data.prompts == {}
    assert (data.cutoff_len, data.target_len) == (longest, answer)
    assert (training.learning_rate, training.global_batch_size, training.epochs) == (rate, batch, epochs)
    assert (training.adam_epsilon, training.weight_decay, training.max_grad_norm) == (1e-6, 0.01, 5)
    assert (training.schedule, training.warmup_ratio, training.num_beams) == ("linear", 0.1, 5)
    assert len(adapter.trained_parameters) == kinds
    if method == "full":
        assert adapter.method == "full"
        return
    assert (adapter.r, adapter.lora_alpha, adapter.dropout) == (128, alpha, 0)
    assert adapter.weight_decomposed == (method == "dora") == (adapter.norm_gradient == "full")
    assert adapter.target_modules == ["q_proj", "v_proj"] and adapter.trained_modules is None


LLAVA: dict[str, tuple[Any, ...]] = {
    "llava7b_pretrain": (1e-3, {}, "plain", []),
    "llava7b_dora": (2e-4, {"multi_modal_projector": 2e-5}, "vicuna_v1", None),
    "llava13b_dora": (2e-4, {"multi_modal_projector": 2e-5}, "vicuna_v1", None),
    "llava7b_dora_dynamic": (2e-4, {"multi_modal_projector": 2e-5}, "vicuna_v1", None),
}


@pytest.mark.parametrize("name", LLAVA)
def test_llava_recipe_has_the_papers_numbers(name: str) -> None:
    config = RunConfig.load(REPOSITORY / "configs" / f"{name}.json")
    adapter, data, training = config.adapter, config.data, config.training
    numbers = (training.learning_rate, training.learning_rates, data.chat_template, adapter.target_modules)
    assert numbers == LLAVA[name]
    assert (training.schedule, training.warmup_ratio, training.epochs) == ("cosine", 0.03, 1)
    assert (data.cutoff_len, data.loss_on, data.image_aspect_ratio) == (2048, "answer", "pad")
    if adapter.target_modules is None:
        assert (adapter.r, adapter.lora_alpha, adapter.dropout) == (128, 256, 0.05)
    assert adapter.dynamic_rank == name.endswith("dynamic")


@pytest.mark.parametrize(("name", "says"), [("llava7b_pretrain", "images.zip"), ("llava7b_dora", "gqa/images ")])
def test_llava_recipes_say_where_their_pictures_are(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = REPOSITORY / "configs" / f"{name}.json"
    with pytest.raises(UserError) as caught:
        RunConfig.load(file, ["--model.path=org/model"], check_files=True)
    text = str(caught.value)
    assert text.startswith(f'data.image_folder = "{RunConfig.load(file).data.image_folder}": no such folder')
    assert says in text
    (tmp_path / "data/images").mkdir(parents=True)
    (tmp_path / "data/pretrain_images").mkdir()
    RunConfig.load(file, ["--model.path=org/model"], check_files=True)  # its conversations are on the hub


@pytest.mark.parametrize("name", LLAVA)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16, 32])
def test_llava_recipes_take_128_records_a_step_whatever_the_ranks(name: str, ranks: int) -> None:
    plan = RunConfig.load(REPOSITORY / "configs" / f"{name}.json").training.batch_plan(ranks)
    assert plan.micro_batch_size * plan.accumulation_steps * ranks - plan.empty == 128
    assert (plan.empty == 0) == (ranks != 3)


def test_quickstart_trains_every_projection_with_dora() -> None:
    config = RunConfig.load(REPOSITORY / "configs/quickstart.json")
    assert config.adapter.weight_decomposed
    assert len(config.adapter.target_modules or []) == 7
    assert (config.data.loss_on, config.model.dtype) == ("answer", "bf16")
    assert config.checkpoint.run_dir == "runs/quickstart/train"
    assert config.training.batch_plan(2).accumulation_steps >= 1
