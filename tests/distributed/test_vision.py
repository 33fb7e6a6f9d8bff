"""VL-BART's eight tasks in one run, on real ranks: losses do not know how many, resuming is exact, recipes learn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_dist.data.features import PictureFeatures, VideoFeatures
from dora_dist.data.subtasks import SUBTASKS, scores_of
from dora_dist.evaluation import evaluate
from dora_dist.evaluation.inference import load_for_inference
from tests import subtasks, summaries
from tests.distributed.test_classification import metrics
from tests.distributed.training_runs import config, options, run, train_recipes
from tests.ranks import run_ranks

ALL = (*subtasks.PICTURES, *subtasks.VIDEOS)
STEPS, EACH, HELD_OUT = 14, 6, 3
RECIPE_STEPS = 24
NORMS = r".*(layer_norm|layernorm_embedding)\.weight"


def several(folder: Path, name: str, micro: int, resume: str | None = None, **data: Any) -> dict[str, Any]:
    """An epoch has ten batches, each of one task; the run ends in its second epoch."""
    train, held_out = (subtasks.write(folder, n, ALL, first=first) for n, first in ((EACH, 0), (HELD_OUT, EACH)))
    return config(
        folder / "base",
        folder / "-",
        folder / name,
        model={"task": "vision_seq2seq_lm", "feature_dim": subtasks.WIDTH},
        adapter={"target_modules": None, "norm_gradient": "full", "trained_parameters": ["bias", NORMS]},
        data={**subtasks.section(folder, train, **data), "validation": held_out, "validation_samples": 0},
        training={
            "learning_rate": 3e-3,
            "max_steps": STEPS,
            "micro_batch_size": micro,
            "eval_every": STEPS,
            "metric": "average",
            "num_beams": 2,
        },
        checkpoint={"save_every": 6, "keep_last": 3, "keep_best": True, "resume": resume and str(folder / resume)},
        engine={"param_persistence_threshold": 400},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at worlds 1, 2 and 3; at world 2 also one that goes on from step 6, with loader processes."""
    folder = subtasks.features(tmp_path_factory.mktemp("vision"), EACH + HELD_OUT + 1)
    summaries.base_model(folder / "base", subtasks.texts(), size=500, init_std=0.1, encoder_layers=1, decoder_layers=1)
    run_ranks(run, 1, several(folder, "at-1", 6))
    resumed = several(folder, "resumed", 2, "at-2/checkpoint-6", num_workers=1)
    run_ranks(run, 2, several(folder, "at-2", 2), resumed)
    run_ranks(run, 3, several(folder, "at-3", 1))
    return folder


@pytest.mark.parametrize("world", [2, 3])
def test_losses_and_metrics_do_not_know_the_ranks(world: int, runs: Path) -> None:
    found, expected = metrics(runs, f"at-{world}"), metrics(runs, "at-1")
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (found, expected)]
    assert len(losses[0]) == STEPS and losses[0] == pytest.approx(losses[1], abs=1e-5)
    evaluated = [next(line for line in lines if "eval_loss" in line) for lines in (found, expected)]
    assert {f"eval_{task}_{score}" for task in ("vqa", "how2qa") for score in ("accuracy",)} <= set(evaluated[0])
    assert {"eval_average", "eval_caption_cider", "eval_tvc_cider", "eval_yc2c_bleu4"} <= set(evaluated[0])
    for key, value in evaluated[1].items():
        assert evaluated[0][key] == pytest.approx(value, abs=1e-5), key
    counting = [evaluated[0][f"eval_{task}_{SUBTASKS[task].metric}"] for task in ALL]
    assert evaluated[0]["eval_average"] == pytest.approx(sum(counting) / len(ALL))
    best = json.loads((runs / f"at-{world}" / "best.json").read_text())
    assert best == {"checkpoint": f"checkpoint-{STEPS}", "eval_average": evaluated[0]["eval_average"]}


def test_resuming_inside_an_epoch_is_exact(runs: Path) -> None:
    whole, rest = (
        {line["step"]: line["loss"] for line in metrics(runs, n) if "loss" in line} for n in ("at-2", "resumed")
    )
    assert set(rest) == set(range(7, STEPS + 1))
    assert rest == {step: whole[step] for step in rest}
    states = [(runs / name / f"checkpoint-{STEPS}" / "state.safetensors").read_bytes() for name in ("at-2", "resumed")]
    assert states[0] == states[1]


def test_evaluating_the_run_gives_what_it_reported(runs: Path) -> None:
    reported = next(line for line in metrics(runs, "at-1") if "eval_loss" in line)
    held_out = subtasks.write(runs, HELD_OUT, ("vqa", "tvc"), first=EACH)
    result = evaluate(runs / "at-1", held_out, batch_size=4, progress=False)
    for task, score in (("vqa", "accuracy"), ("tvc", "cider"), ("tvc", "rougeL")):
        assert result["tasks"][task][f"{task}_{score}"] == pytest.approx(reported[f"eval_{task}_{score}"], abs=1e-6)


def test_visual_embedding_biases_and_norms_are_trained(runs: Path) -> None:
    from safetensors import safe_open

    with safe_open(runs / "at-1" / f"checkpoint-{STEPS}" / "state.safetensors", "pt") as state:
        names = {name.removesuffix(".master") for name in state.offset_keys() if name.endswith(".master")}
    for part in (
        "encoder.visual_embedding.features.weight",
        "decoder.layernorm_embedding.weight",
        "fc1.bias",
        "q_proj.bias",
    ):
        assert any(name.endswith(part) for name in names), part
    assert not any("shared" in name or "lm_head" in name or name.endswith("fc1.weight") for name in names)


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[int, float]]]:
    """The six recipes, scaled down by overrides alone, on two ranks; losses of each."""
    folder = subtasks.features(tmp_path_factory.mktemp("recipes"), 49)  # a pair has the next picture, too
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    summaries.base_model(folder / "base", subtasks.texts(), size=500, init_std=0.1, **sizes)
    small = {}
    for kind, tasks in (("image", subtasks.PICTURES), ("video", subtasks.VIDEOS)):
        train, held_out = (subtasks.write(folder, n, tasks, first=first) for n, first in ((40, 0), (8, 40)))
        for method in ("dora", "lora", "full"):
            rank = {} if method == "full" else {"adapter.r": 16, "adapter.lora_alpha": 16}
            small[f"vlbart_{kind}_{method}"] = options(
                {
                    "model.path": folder / "base",
                    "model.feature_dim": subtasks.WIDTH,
                    **rank,
                    "data.train": json.dumps(train),
                    "data.validation": json.dumps(held_out),
                    "data.features": folder / ("pictures" if kind == "image" else "videos"),
                    "data.cutoff_len": json.dumps(dict.fromkeys(tasks, 64)),
                    "data.target_len": json.dumps({task: 12 - i for i, task in enumerate(tasks)}),
                    "data.num_workers": 0,
                    "data.cache": "null",
                    "training.learning_rate": 1e-2,
                    "training.global_batch_size": 20,
                    "training.micro_batch_size": 10,
                    "training.max_steps": RECIPE_STEPS,
                    "training.eval_every": RECIPE_STEPS,
                    "training.num_beams": 1,
                    "checkpoint.run_dir": folder / f"{kind}-{method}",
                    "logging.every": 1,
                    "logging.progress_bar": "false",
                }
            )
    return folder, run_ranks(train_recipes, 2, small, timeout=900.0)[0]


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("method", ["dora", "lora", "full"])
def test_recipes_scaled_down_learn(kind: str, method: str, recipes: tuple[Path, dict[str, dict[int, float]]]) -> None:
    folder, losses = recipes
    found = losses[f"vlbart_{kind}_{method}"]
    assert max(found) == RECIPE_STEPS
    first, last = (
        sum(found[step] for step in steps) / 5 for steps in (range(1, 6), range(RECIPE_STEPS - 4, RECIPE_STEPS + 1))
    )
    assert last < first - 1.2
    held_out = [line["eval_loss"] for line in metrics(folder, f"{kind}-{method}") if "eval_loss" in line]
    assert held_out[-1] < first - 1.2


def written(model: Any, tokenizer: Any, task: str, record: dict[str, Any], folder: Path) -> str:
    """What transformers' own generation says to one record."""
    asked = SUBTASKS[task].read(record)
    text = SUBTASKS[task].prompted(asked, None).text
    files = PictureFeatures(str(folder / "pictures.h5")), VideoFeatures(str(folder / "videos"))
    visual = [files[task in subtasks.VIDEOS](id).features for id in asked.visual]
    order = [(image, place) for image, features in enumerate(visual) for place in range(len(features))]
    images, objects = torch.tensor(order).T[:, None]
    tokens = model.generate(
        **tokenizer([text], return_tensors="pt"),
        visual_features=torch.cat(visual)[None],
        visual_boxes=torch.zeros(1, len(order), 4),
        visual_images=images,
        visual_objects=objects,
        visual_mask=torch.ones_like(images),
        num_beams=1,  # as the scaled run has it
        max_new_tokens=12,
    )
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)[0]


@pytest.mark.parametrize(("kind", "tasks"), [("image", ("vqa", "nlvr2")), ("video", ("how2qa", "tvc"))])
def test_metrics_are_those_of_what_transformers_writes(kind: str, tasks: tuple[str, ...], recipes: Any) -> None:
    folder, _ = recipes
    name = f"{kind}-full"
    model, tokenizer = load_for_inference(str(folder / name), "fp32")
    result = evaluate(folder / name, subtasks.write(folder, 8, tasks, first=40), batch_size=3, progress=False)
    reported = [line for line in metrics(folder, name) if "eval_loss" in line][-1]
    for task in tasks:
        records = [subtasks.record(task, i) for i in range(40, 48)]
        said = [written(model, tokenizer, task, record, folder) for record in records]
        expected = scores_of([task] * 8, said, [SUBTASKS[task].read(record).reference for record in records])
        row = result["tasks"][task]
        assert {name: row[name] for name in expected} == pytest.approx(expected) and row["total"] == 8
        expected.pop("average")
        assert {name: reported[f"eval_{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)
