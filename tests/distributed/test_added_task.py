"""A task from outside of the package, in one file: trained on ranks, checked, evaluated and merged."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dora_dist import RunConfig
from dora_dist.checkpoint import run_folder
from dora_dist.runtime import plugins
from dora_dist.runtime.errors import UserError
from dora_dist.tasks import problems
from tests import encoders
from tests.conftest import ROOT
from tests.distributed import training_runs
from tests.distributed.training_runs import config
from tests.ranks import run_ranks

EXAMPLES = ROOT / "examples"
PLUGIN = "add_a_task"
STEPS = 8


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    sys.path.insert(0, str(EXAMPLES))
    plugins.load([PLUGIN])


def tagged(count: int) -> list[dict[str, Any]]:
    """Words of which those about quality have tag 2, numbers 1, others 0."""
    records = []
    for row in encoders.labelled(count):
        words = row["sentence1"].split()
        tags = [2 if word in ("awful", "weak", "decent", "great") else int(word.isdigit()) for word in words]
        records.append({"words": words, "tags": tags})
    return records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("added_task")
    encoders.plain_encoder(folder / "bert")
    (folder / "tagged.json").write_text(json.dumps(tagged(27)))
    return folder


def tagging(folder: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, dict[str, Any]] = {
        "model": {"task": "tagging", "num_labels": 3},
        "adapter": {"target_modules": None},
        "data": {"format": "tagged", "cutoff_len": 32},
        "training": {"eval_every": STEPS // 2, "max_steps": STEPS, "metric": "accuracy"},
    }
    merged = {section: {**fields.get(section, {}), **changes.get(section, {})} for section in {**fields, **changes}}
    return config(folder / "bert", folder / "tagged.json", folder / name, **merged) | {"plugins": [PLUGIN]}


def run(*configurations: dict[str, Any]) -> list[dict[str, Any]]:
    sys.path.insert(0, str(EXAMPLES))
    return training_runs.run(*configurations)


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[int, dict[str, Any]]:
    return {world: run_ranks(run, world, tagging(folder, f"at-{world}"))[0][0] for world in (1, 2)}


def test_it_learns_and_losses_do_not_know_the_ranks(runs: dict[int, dict[str, Any]]) -> None:
    one, two = runs[1], runs[2]
    assert len(one["losses"]) == STEPS and one["losses"][STEPS] < 0.8 * one["losses"][1]
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-6)
    assert two["eval"] == pytest.approx(one["eval"], abs=2e-6) and len(one["eval"]) == 2


def test_a_checkpoint_and_the_merged_model_have_the_metrics_of_the_run(runs: dict, folder: Path) -> None:
    from dora_dist import consolidate, evaluate

    lines = run_folder.metrics(folder / "at-2")
    last = [line for line in lines if "eval_accuracy" in line][-1]
    validation = evaluate_set(folder)
    adapter = folder / "at-2" / f"checkpoint-{STEPS}" / "adapter"
    consolidate(adapter, folder / "bert", folder / "merged", progress=False)
    for model in ("at-2", "merged"):
        result = evaluate(folder / model, {"held out": validation}, fields={"cutoff_len": 32}, progress=False)
        assert result["task"] == "tagging" and result["tasks"]["held out"]["total"] == 5
        for name in ("loss", "accuracy"):
            assert result["tasks"]["held out"][name] == pytest.approx(last[f"eval_{name}"], abs=2e-5)


def evaluate_set(folder: Path) -> Path:
    """The five records that the runs hold out."""
    from dora_dist.data.reading import held_out

    records = tagged(27)
    chosen = [records[i] for i in sorted(held_out(27, 5, 42))]
    (folder / "held_out.json").write_text(json.dumps(chosen))
    return folder / "held_out.json"


def test_its_rules_are_told_with_all_others(folder: Path) -> None:
    raw = tagging(folder, "no", data={"format": "squad"}, training={"metric": "f1", "warmup_ratio": 0.1})
    with pytest.raises(UserError) as caught:
        RunConfig.from_dict(raw, origin="mine.json", rules=problems)
    title, *lines = str(caught.value).splitlines()
    assert title == "mine.json: 4 problems"
    found = "\n".join(lines)
    assert 'training.metric = "f1": there is none for model.task = "tagging"; use loss, accuracy' in found
    assert 'model.task = "tagging" and data.format = "squad": tagging and the format tagged go together' in found
    assert "question_answering and the format squad go together" in found


def test_an_unknown_name_is_answered_with_the_known_ones(folder: Path) -> None:
    raw = tagging(folder, "no", model={"task": "taging"}, data={"format": "taged"})
    with pytest.raises(UserError) as caught:
        RunConfig.from_dict(raw, rules=problems)
    assert 'model.task = "taging": must be one of "causal_lm"' in str(caught.value)
    assert 'did you mean "tagging"?' in str(caught.value) and 'did you mean "tagged"?' in str(caught.value)


@pytest.mark.parametrize("tags", [[1, 0], [0, 0, 0, 3], ["a", 0, 0, 0]])
def test_a_record_that_does_not_fit_is_named(tags: list, folder: Path, tmp_path: Path) -> None:
    records = tagged(4)
    records[2]["tags"] = tags
    (tmp_path / "bad.json").write_text(json.dumps(records))
    from dora_dist.data import read
    from dora_dist.tasks import task_named

    settings = RunConfig.from_dict(tagging(folder, "no", data={"train": str(tmp_path / "bad.json"), "cache": None}))
    reader = task_named("tagging").reader(encoders.tokenizer(), model=settings.model, data=settings.data)
    with pytest.raises(UserError, match='record 3: "tags" must hold a number from 0 to 2 for each of "words"'):
        read(reader, settings.data, seed=0, progress=False)
