"""LLaVA on real ranks: pictures and plain texts in one batch, the projector in full, the tower untouched."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_dist.checkpoint import run_folder
from dora_dist.weights.safetensors_io import TensorFolder
from tests import llava
from tests.distributed import training_runs
from tests.ranks import run_ranks

PROJECTOR_RATE = 0.002


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava-training")
    llava.model(folder / "base")
    llava.write(folder, 10, 6)  # 17 conversations: the third global batch of an epoch has 5
    return folder


def llava_config(folder: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    sections: dict[str, dict[str, Any]] = {
        "model": {"task": "image_text_to_text"},
        "adapter": {"target_modules": None},
        "data": {
            "format": "llava",
            "image_folder": str(folder / "pictures"),
            "validation_samples": 0,
            "loss_on": "answer",
            "cutoff_len": 256,
            "cache": str(folder / "cache"),
            "group_by_modality_length": False,
        },
        "training": {"learning_rates": {"multi_modal_projector": PROJECTOR_RATE}},
    }
    for section, fields in changes.items():
        sections[section] = {**sections.get(section, {}), **fields}
    return training_runs.config(folder / "base", folder / "data.json", folder / name, **sections)


def run(*configurations: dict[str, Any]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)  # for models as small as these, threads only wait for one another
    return training_runs.run(*configurations)


RECIPES = ["llava7b_pretrain", "llava7b_dora", "llava13b_dora", "llava7b_dora_dynamic"]
GROUPED = {"group_by_modality_length": True}
CHECKPOINTING = {"activation_checkpointing": True}


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Any]:
    """The same six steps in many ways; every entry is rank 0's metrics."""
    one = {
        "one": llava_config(folder, "one"),
        "one-grouped": llava_config(folder, "one-grouped", data=GROUPED, training={"micro_batch_size": 3}),
    }
    two = {
        "two": llava_config(folder, "two"),
        "two-checkpointed": llava_config(folder, "two-checkpointed", training=CHECKPOINTING),
        "two-grouped": llava_config(
            folder,
            "two-grouped",
            data={**GROUPED, "num_workers": 2},
            training={**CHECKPOINTING, "micro_batch_size": 3},
            checkpoint={"save_every": 2, "keep_last": 3},
        ),
        "two-resumed": llava_config(folder, "two-resumed", checkpoint={"resume": str(folder / "two" / "checkpoint-3")}),
        "projector": llava_config(
            folder,
            "projector",
            adapter={"target_modules": []},
            data={"chat_template": "plain", "train": str(plain_records(folder))},
            training={"learning_rates": {}},
        ),
    }
    three = {
        "three": llava_config(folder, "three", training=CHECKPOINTING),
        "three-from-two": llava_config(  # in the middle of the first epoch, and into the second
            folder, "three-from-two", data=GROUPED, checkpoint={"resume": str(folder / "two-grouped" / "checkpoint-2")}
        ),
    }
    found: dict[str, Any] = {}
    for ranks, configurations in ((1, one), (2, two), (3, three)):
        found |= dict(zip(configurations, run_ranks(run, ranks, *configurations.values())[0], strict=True))
    return found


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_other_towers_and_adapters_in_them_train_the_same_on_any_number_of_ranks(folder: Path, kind: str) -> None:
    """Though one rank has no picture at times, whose adapters in the tower then get gradients of zeros."""
    base = llava.model(folder / kind, kind)
    found = []
    for ranks in (1, 2):
        name = f"{kind}-{ranks}"
        everywhere = {"target_modules": [r".*(vision_tower|language_model)\..*\.(q|v)_proj"]}
        raw = llava_config(folder, name, model={"path": str(base)}, adapter=everywhere, training=CHECKPOINTING)
        found.append(run_ranks(run, ranks, raw)[0][0]["losses"])
        moved = tensors(folder / name / "checkpoint-6" / "adapter" / "adapter_model.safetensors")
        in_tower = [tensor for tensor in moved if "vision_tower" in tensor and "lora_B" in tensor]
        assert len(in_tower) == 2 * llava.TOWER_SIZES["num_hidden_layers"]
        # Features are the last layer but one's: nothing reaches what comes after.
        assert sum(bool(moved[tensor].any()) for tensor in in_tower) == len(in_tower) - 2
    assert [found[1][step] for step in range(1, 7)] == pytest.approx([found[0][step] for step in range(1, 7)], abs=1e-5)


def plain_records(folder: Path) -> Path:
    """The records with one question about one picture, as projector pre-training has them."""
    records = json.loads((folder / "data.json").read_text())
    chosen = [r for r in records if isinstance(r.get("image"), str) and len(r["conversations"]) == 2]
    path = folder / "plain.json"
    path.write_text(json.dumps(chosen))
    return path


def losses(runs: dict[str, Any], name: str, first: int = 1) -> list[float]:
    return [runs[name]["losses"][step] for step in range(first, 7)]


def test_ranks_see_batches_with_and_without_pictures_at_once(folder: Path) -> None:
    from dora_dist.data import EpochBatches

    records = json.loads((folder / "data.json").read_text())
    sizes = {"global_batch_size": 6, "micro_batch_size": 1, "world_size": 2, "seed": 42}
    batches = [list(EpochBatches(len(records), rank=rank, **sizes)) for rank in range(2)]
    kinds = [[i >= 0 and "image" in records[i] for [i] in of_rank] for of_rank in batches]
    assert {(True, True), (True, False), (False, False)} <= set(zip(*kinds, strict=True))


@pytest.mark.parametrize("other", ["two", "two-checkpointed", "three"])
def test_same_losses_whatever_the_ranks_or_checkpointing(runs: dict[str, Any], other: str) -> None:
    assert losses(runs, other) == pytest.approx(losses(runs, "one"), abs=1e-5)
    assert losses(runs, "one")[-1] < losses(runs, "one")[0] - 0.05


def test_grouped_batches_are_the_same_at_every_world_size_and_after_a_resume(runs: dict[str, Any]) -> None:
    assert losses(runs, "two-grouped") == pytest.approx(losses(runs, "one-grouped"), abs=1e-5)
    assert losses(runs, "three-from-two", 3) == pytest.approx(losses(runs, "one-grouped", 3), abs=1e-5)
    assert losses(runs, "one-grouped") != pytest.approx(losses(runs, "one"), abs=1e-3)


def test_a_resume_that_would_find_another_order_is_refused(runs: dict[str, Any], folder: Path) -> None:
    records = json.loads((folder / "data.json").read_text())
    records[-1]["conversations"][1]["value"] += " indeed"
    (folder / "longer.json").write_text(json.dumps(records))
    resume = {"resume": str(folder / "two-grouped" / "checkpoint-2")}
    other_order = llava_config(folder, "x1", checkpoint=resume)
    other_lengths = llava_config(
        folder, "x2", checkpoint=resume, data={**GROUPED, "train": str(folder / "longer.json")}
    )
    [(order, lengths)] = run_ranks(both_fail, 1, other_order, other_lengths)
    assert "was written with data.group_by_modality_length = true, this run has false" in order
    assert "was trained on other records, or the same in another order: " in lengths


def both_fail(*raws: dict[str, Any]) -> list[str]:
    return [training_runs.fails(raw) for raw in raws]


def rates(folder: Path, name: str, step: int) -> list[float]:
    manifest = json.loads((folder / name / f"checkpoint-{step}" / "manifest.json").read_text())
    return sorted(set(manifest["learning_rates"]))


def test_the_projector_has_its_own_rate_after_a_resume_too(runs: dict[str, Any], folder: Path) -> None:
    # Linear decay after 2 warm-up steps: 3/4 of the peak after step 3, and 0 after step 6.
    assert rates(folder, "two", 3) == pytest.approx([PROJECTOR_RATE * 0.75, 0.01 * 0.75])
    assert losses(runs, "two-resumed", 4) == losses(runs, "two", 4)
    one, other = (tensors(folder / name / "checkpoint-6" / "state.safetensors") for name in ("two", "two-resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)  # a rate of its own would move the projector apart


def tensors(folder: Path) -> dict[str, Tensor]:
    opened = TensorFolder.open(folder)
    return {name: opened.read(name) for name in opened.entries}


def test_merged_models_differ_from_the_base_in_what_was_trained_only(runs: dict[str, Any], folder: Path) -> None:
    from dora_dist.checkpoint.consolidate import consolidate

    base = tensors(folder / "base")
    for name, changed in (
        ("two", ("_proj.weight", "multi_modal_projector")),
        ("projector", ("multi_modal_projector",)),
    ):
        consolidate(
            folder / name / "checkpoint-6" / "adapter", folder / "base", folder / f"{name}-only", progress=False
        )
        merged = tensors(folder / f"{name}-only")
        assert merged.keys() == base.keys()
        for tensor, values in merged.items():
            trained = not tensor.startswith("vision_tower") and any(part in tensor for part in changed)
            assert torch.equal(values, base[tensor]) != trained, tensor


@pytest.mark.parametrize("name", ["two", "projector"])
def test_merged_unmerged_and_peft_give_the_same_logits(runs: dict[str, Any], folder: Path, name: str) -> None:
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    from dora_dist.checkpoint.consolidate import consolidate
    from dora_dist.evaluation.inference import load_for_inference

    adapter = folder / name / "checkpoint-6" / "adapter"
    consolidate(adapter, folder / "base", folder / f"{name}-merged", progress=False)
    batch = batch_of(folder)
    merged, _ = load_for_inference(str(folder / f"{name}-merged"), dtype="fp32")
    assert isinstance(merged, LlavaForConditionalGeneration)
    unmerged, _ = load_for_inference(str(folder / name), dtype="fp32")
    base = LlavaForConditionalGeneration.from_pretrained(folder / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        found, plain = unmerged(**batch).logits, base(**batch).logits
        peft = PeftModel.from_pretrained(base, str(adapter)).eval()(**batch).logits
        assert (merged(**batch).logits - found).abs().max() <= 1e-4
        assert (peft - found).abs().max() <= 1e-4
        assert (plain - found).abs().max() > 1e-3


def test_a_run_its_adapter_alone_and_the_merged_model_give_the_same_answers(runs: dict[str, Any], folder: Path) -> None:
    from dora_dist.checkpoint.consolidate import consolidate
    from dora_dist.evaluation import evaluate

    records = [r for r in json.loads((folder / "data.json").read_text()) if len(r["conversations"]) == 2]
    asked = [{**r, "text": r["conversations"][0]["value"], "answer": r["conversations"][1]["value"]} for r in records]
    (folder / "asked.json").write_text(json.dumps(asked))
    adapter = folder / "two" / "checkpoint-6" / "adapter"
    consolidate(adapter, folder / "base", folder / "two-evaluated", progress=False)
    shutil.copytree(adapter, folder / "two-alone")
    given = {"fields": {"image_folder": str(folder / "pictures")}, "dtype": "fp32"}
    results = {"two": evaluate(folder / "two", {"asked": folder / "asked.json"}, instruction="", progress=False)}
    for name in ("two-alone", "two-evaluated", "base"):
        results[name] = evaluate(
            folder / name, {"asked": folder / "asked.json"}, instruction="", progress=False, **given
        )
    answers = {name: result["tasks"]["asked"]["predictions"] for name, result in results.items()}
    assert answers["two"] == answers["two-alone"] == answers["two-evaluated"] != answers["base"]
    assert results["two"]["settings"] == results["two-alone"]["settings"]  # its own configuration says the same
    assert all(prediction["answer"] for prediction in answers["two"])


def batch_of(folder: Path, count: int = 3) -> dict[str, Tensor]:
    """Conversations with pictures as training batches have them, with the labels left out."""
    from dora_dist.config import DataConfig
    from dora_dist.data import ConversationReader, PictureCollator, read
    from dora_dist.models.families import load_processor

    data = DataConfig(train=str(folder / "data.json"), format="llava", image_folder=str(folder / "pictures"))
    processor = load_processor(folder / "base", data)
    dataset = read(ConversationReader(data, processor), data, seed=0, progress=False).train
    batch = PictureCollator(0, processor.size)([dataset[i] for i in range(count)])
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


# --- the model on the engine ---------------------------------------------------------------------------------------


def step_and_compare(base: str, batch: dict[str, Tensor], text: Tensor) -> dict[str, Any]:
    """Logits before training, then one step in which only rank 0 sees pictures; what moved here and what did not."""
    import deepspeed
    import torch.distributed as dist

    from dora_dist.adapters.methods import LowRank, WeightDecomposed
    from dora_dist.models.build import build_model
    from dora_dist.models.families import adapter_plan, family_of_model
    from dora_dist.models.heads import IMAGE_TEXT_TO_TEXT
    from dora_dist.zero3.norms import ShardedNormRefresher
    from dora_dist.zero3.partition import local_values
    from dora_dist.zero3.placement import ShardedPlacement

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    engine_json = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 30},
        "zero_allow_untested_optimizer": True,
    }
    plan = adapter_plan(WeightDecomposed(LowRank(4, 8.0)))
    placement, head = ShardedPlacement(engine_json), IMAGE_TEXT_TO_TEXT
    run = build_model(Path(base), plan, placement, refresher=ShardedNormRefresher, dtype="fp32", head=head)
    family_of_model(run.model).prepare_for_training(run.model)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=run.model, optimizer=torch.optim.AdamW(trained, lr=0.1), config=engine_json)
    with torch.no_grad():
        engine.eval()
        before = engine(**batch).logits
    engine.train()
    shards = {name: local_values(p).clone() for name, p in run.model.named_parameters()}
    unused = {"input_ids": text, "pixel_values": torch.zeros_like(batch["pixel_values"][:1])}
    given = batch if rank == 0 else unused
    engine.backward(engine(**given, labels=given["input_ids"]).loss)
    engine.step()
    same = {n: torch.equal(local_values(p), shards[n]) for n, p in run.model.named_parameters() if len(shards[n])}
    wanted = {name: p.requires_grad for name, p in run.model.named_parameters()}
    return {"logits": before, "same": same, "trained": wanted}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_step_0_is_transformers_and_one_step_moves_what_trains_alone(folder: Path, world_size: int) -> None:
    from transformers import LlavaForConditionalGeneration

    batch, text = batch_of(folder), torch.arange(5, 40)[None]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = LlavaForConditionalGeneration.from_pretrained(folder / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(**batch).logits
    torch.set_num_threads(threads)
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
    for found in run_ranks(step_and_compare, world_size, str(folder / "base"), batch, text):
        assert torch.equal(found["logits"], expected)
        for name, same in found["same"].items():
            assert same != found["trained"][name] or name.endswith("lora_A"), name  # lora_B is 0 in the first step
            assert same or "vision_tower" not in name


# --- recipes and bad pictures --------------------------------------------------------------------------------------


def test_recipes_train_scaled_down_by_overrides_alone(folder: Path) -> None:
    small = {
        "model.path": folder / "base",
        "data.train": folder / "data.json",
        "data.image_folder": folder / "pictures",
        "data.num_workers": 0,
        "training.max_steps": 8,
        "training.global_batch_size": 4,
        "training.micro_batch_size": 2,
        "training.learning_rate": 0.01,
        "adapter.r": 4,
        "adapter.lora_alpha": 8,
        "adapter.prune_every": 2,
        "logging.every": 1,
        "logging.progress_bar": "false",
    }
    changed = {name: {**small, "checkpoint.run_dir": folder / name} for name in RECIPES}
    changed["llava7b_pretrain"]["data.train"] = plain_records(folder)
    recipes = {name: training_runs.options(fields) for name, fields in changed.items()}
    for losses in run_ranks(training_runs.train_recipes, 2, recipes, timeout=500)[0].values():
        assert min(losses[step] for step in (7, 8)) < losses[1]


def with_a_broken_picture(folder: Path) -> Path:
    """The data, with one picture's file cut short."""
    broken = folder / "broken"
    if not broken.exists():
        names = llava.pictures(broken)
        whole = (broken / names[4]).read_bytes()
        (broken / names[4]).write_bytes(whole[: len(whole) // 2])
    return broken


def skip_then_fail(folder: Path, skipping: dict[str, Any], failing: dict[str, Any]) -> str:
    """Each rank finds the pictures by a path of its own, which the other does not have, as on the disks of nodes."""
    own = Path(f"pictures-{os.environ['RANK']}")
    place = folder / f"node-{os.environ['RANK']}"
    place.mkdir()
    (place / own).symlink_to(skipping["data"]["image_folder"])
    os.chdir(place)
    skipping["data"]["image_folder"] = str(own)
    run(skipping)
    return training_runs.fails(failing)


def test_a_picture_that_cannot_be_read_ends_the_run_on_every_rank_or_is_counted(folder: Path) -> None:
    llava.write(folder / "eight", 8, 4)
    data = {"image_folder": str(with_a_broken_picture(folder)), "train": str(folder / "eight" / "data.json")}
    records = json.loads((folder / "eight" / "data.json").read_text())
    (folder / "two.json").write_text(json.dumps(records[:2]))
    skips = {"bad_images": "skip", "validation": str(folder / "two.json")}
    asked: dict[str, Any] = {
        "training": {"max_steps": 5, "eval_every": 5},
        "logging": {"samples": 2, "sample_tokens": 2},
    }
    skipping = llava_config(folder, "skipping", data={**data, **skips}, **asked)
    failing = llava_config(folder, "unreadable", data={**data, "num_workers": 1})
    messages = run_ranks(skip_then_fail, 2, folder, skipping, failing)
    assert all("(id 'p4'): picture" in message and "cannot be read" in message for message in messages)
    lines = run_folder.metrics(folder / "skipping")
    assert [line["records_skipped"] for line in lines if "records_skipped" in line] == [1.0, 2.0]  # once an epoch
    [samples] = [line["samples"] for line in lines if line["event"] == "evaluation"]
    assert [sample["expected"] for sample in samples] == [
        record["conversations"][-1]["value"] for record in records[:2]
    ]
