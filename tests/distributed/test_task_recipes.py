"""The recipes of SQuAD and XSum, scaled down by overrides alone, on two ranks and real text."""

import json
from pathlib import Path
from typing import Any

import pytest

from dora_dist import cli
from dora_dist.checkpoint import run_folder
from tests import real, summaries
from tests.distributed.training_runs import options, train_recipes
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: BERT-tiny finds how reviews begin and end; a random BART learns to repeat their first words."""
    folder = tmp_path_factory.mktemp("recipes")
    texts = [record["sentence"] for record in real.rated_snippets()]
    write(folder / "squad", [ends(text, i % 2) for i, text in enumerate(texts[:1400])], 200)
    pairs = [{"document": f"{a} {b}", "summary": a} for a, b in zip(texts[::2], texts[1::2], strict=False)]
    write(folder / "xsum", [pair for pair in pairs if len(pair["document"]) < 150][:672], 32)
    sizes = {"d_model": 128, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
    summaries.base_model(folder / "bart", texts, size=1000, init_std=0.1, **sizes)
    squad = overrides(
        folder / "squad",
        real.bert_tiny(folder / "base"),
        **{"data.cutoff_len": 64, "data.doc_stride": 16, "training.global_batch_size": 32},
        **{"training.micro_batch_size": 16, "training.eval_every": 40, "adapter.prune_every": 5},
    )
    xsum = overrides(
        folder / "xsum",
        folder / "bart",
        **{"data.cutoff_len": 32, "data.target_len": 12, "training.epochs": 6, "training.eval_every": 120},
        **{"training.num_beams": 1, "training.learning_rate": 1.5e-2, "adapter.r": 16, "adapter.dropout": 0},
        **{"adapter.prune_every": 10, "logging.tensorboard": "true"},
    )
    run_ranks(train_recipes, 2, {"squad": squad, "xsum": xsum}, timeout=600.0)
    return folder


def write(folder: Path, records: list[dict[str, Any]], held_out: int) -> None:
    folder.mkdir()
    (folder / "validation.json").write_text(json.dumps(records[:held_out]))
    (folder / "train.json").write_text(json.dumps(records[held_out:]))


def ends(text: str, last: int) -> dict[str, Any]:
    """A question in SQuAD's format about a text's first two words, or its last two."""
    words = text.split(" ")
    answer = " ".join(words[-2:] if last else words[:2])
    start = text.rindex(answer) if last else 0
    question = f"how does it {'end' if last else 'begin'}?"
    return {"question": question, "context": text, "answers": {"text": [answer], "answer_start": [start]}}


def overrides(folder: Path, base: Path, **fields: Any) -> list[str]:
    small = {
        "model.path": base,
        "data.train": folder / "train.json",
        "data.validation": folder / "validation.json",
        "training.epochs": 2,
        "checkpoint.run_dir": folder / "run",
        "logging.progress_bar": "false",
        **fields,
    }
    return options(small)


def lines(run_dir: Path, key: str) -> dict[int, Any]:
    """A metric by step."""
    found = run_folder.metrics(run_dir)
    return {line["step"]: line[key] for line in found if key in line}


def test_squad_scaled_down_learns_to_find_answers(folder: Path) -> None:
    run_dir = folder / "squad" / "run"
    assert max(lines(run_dir, "eval_f1").values()) > 0.5
    kept = lines(run_dir, "components_kept")
    assert kept[max(kept)] == 8 * 12  # r components for each of the six matrices of two layers, of twelve at the start


def test_xsum_scaled_down_learns_to_write(folder: Path) -> None:
    run_dir = folder / "xsum" / "run"
    losses, rouge = lines(run_dir, "eval_loss"), lines(run_dir, "eval_rouge1")
    assert losses[max(losses)] < 2.5 < 5 < next(iter(lines(run_dir, "loss").values()))
    assert rouge[max(rouge)] > 0.05
    kept = lines(run_dir, "components_kept")
    assert kept[max(kept)] == 16 * 16  # six matrices in the encoder, ten in the decoder


@pytest.mark.parametrize(("name", "metric"), [("squad", "f1"), ("xsum", "rouge2")])
def test_evaluate_finds_task_and_fields_by_itself(
    name: str, metric: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, output = folder / name / "run", folder / f"{name}.json"
    best = json.loads((run_dir / "best.json").read_text())
    task = f"dev={folder / name / 'validation.json'}"
    assert cli.main(["evaluate", str(run_dir), "--tasks", task, "--output", str(output)]) == 0
    assert metric in capsys.readouterr().out.splitlines()[0].split()
    assert json.loads(output.read_text())["tasks"]["dev"][metric] == pytest.approx(best[f"eval_{metric}"], abs=1e-6)


def test_tensorboard_has_every_pruning(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = folder / "xsum" / "run"
    assert {file.parent for file in run_dir.rglob("events.out.tfevents.*")} == {run_dir / "tensorboard"}
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    for key in ("components_kept", "components_budget", "dem_penalty", "loss"):
        expected = lines(run_dir, key)
        assert len(expected) > 5
        assert {event.step: event.value for event in board.Scalars(f"train/{key}")} == pytest.approx(expected)
    assert set(lines(run_dir, "eval_rouge1")) == {event.step for event in board.Scalars("eval/rouge1")}
