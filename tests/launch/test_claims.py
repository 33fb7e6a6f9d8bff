"""benchmarks/claims.py and first_steps.py as a user types them, scaled down: a toy model on yes/no questions, BERT-tiny
on sentences of editorials that people rated."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import real, toy

ROOT = Path(__file__).parents[2]
VARIANT = (
    "short dynamic --adapter.component_init=paper "
    "--adapter.prune_every=1 --adapter.prune_start=0.2 --adapter.prune_stop=0.6 "
    "'--training.learning_rates={\"lora_gates\": 0.1}'"
)


def typed(script: str, folder: Path, flags: str) -> str:
    """What the script prints; its results go to folder / "out"."""
    small = ["--data", folder, "--output", folder / "out", "--variant", VARIANT, "--r", "2", "--batch", "4"]
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *map(str, small), *flags.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    logs = "\n".join(log.read_text() for log in folder.glob("out/runs/*.log"))
    assert done.returncode == 0, done.stderr + logs
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("claims")
    toy.base_model(folder / "out" / "models" / "smollm2")
    toy.write_records(folder / "even.json", 60)
    return folder


def test_methods_are_compared_and_finished_runs_are_kept(folder: Path) -> None:
    flags = "--tasks even news --methods lora short --half --seeds 1 --rates 1e-2 --steps 6 --test 40"
    flags += f" --encoder bert-tiny --packages {real.CACHE}"
    said = typed("claims.py", folder, flags)
    found = json.loads((folder / "out" / "claims.json").read_text())
    lora, short, *encoders = found["test"]
    widths = sum(layer[0] + layer[1] for layer in _shapes()) * toy.SIZES["num_hidden_layers"]
    assert lora["trained_numbers"] == [2 * widths]
    assert lora["trained_numbers"][0] / 2 < short["trained_numbers"][0] < 1.5 * lora["trained_numbers"][0]  # 3 pruned
    assert found["steps"] == {"even": 6, "news": 12}
    assert [(row["task"], row["method"]) for row in encoders] == [("news", "lora"), ("news", "short")]
    texts = {"even": 15, "news": 40}
    for row in (lora, short, *encoders):
        assert row["learning_rate"] == 1e-2
        assert f"{row['accuracy'][0]:.4f}" in said
        result = folder / "out" / "results" / f"{row['task']}-{row['method']}-r2-0.01-seed1-test.json"
        right = json.loads(result.read_text())["right"]
        assert len(right) == texts[row["task"]]
        assert right.count("1") / len(right) == row["accuracy"][0]
    lines = (folder / "out" / "texts" / "news-test.jsonl").read_text().splitlines()
    liked = [json.loads(line)["label"] for line in lines]
    most = max(liked.count(0), liked.count(1)) / 40
    assert found["baselines"]["news"] == {"most frequent label": most}
    head = 128 * (128 + 1) + 2 * (128 + 1)  # with the pooler, which a masked language model does not have
    assert encoders[0]["trained_numbers"] == [2 * 2 * (4 * (128 + 128) + 2 * (128 + 512)) + head]
    assert (folder / "out" / "claims.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("out/runs/*/checkpoint-*"))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("out/results/*")}
    assert len(before) == 5
    typed("claims.py", folder, flags)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("out/results/*")} == before


def test_the_first_steps_are_recorded_kind_by_kind(folder: Path) -> None:
    typed("first_steps.py", folder, "--task even --methods lora short --steps 10 --record 3 --rate 1e-2")
    found: dict[str, list[dict[str, Any]]] = {
        file.name.split("-")[1]: json.loads(file.read_text())["steps"]
        for file in (folder / "out" / "first-steps").glob("*.json")
    }
    assert list(found["lora"][0]["kinds"]) == ["lora_A", "lora_B"]
    assert list(found["short"][0]["kinds"]) == ["lora_A", "lora_B", "lora_gates"]
    for steps in found.values():
        assert [step["step"] for step in steps] == [1, 2, 3]
        for step in steps:  # the gradient that the optimizer got is the engine's, clipped at 1
            whole = sum(kind["numbers"] * kind["gradient"] ** 2 for kind in step["kinds"].values()) ** 0.5
            assert whole == pytest.approx(min(step["grad_norm"], 1.0), rel=1e-2)
        assert all(kind["update"] > 0 for kind in steps[-1]["kinds"].values())
    first = found["lora"][0]["kinds"]
    assert (first["lora_A"]["gradient"], first["lora_B"]["size"]) == (0.0, 0.0)
    assert first["lora_B"]["gradient"] > 0
    gates = found["short"][-1]["kinds"]["lora_gates"]
    assert 0 < gates["size"] < 3 * 0.1
    table = (folder / "out" / "first-steps-even.md").read_text()
    assert "| short | loss |" in table and "| | lora_gates, update |" in table
    assert (folder / "out" / "first-steps-even.png").read_bytes().startswith(b"\x89PNG")


def _shapes() -> list[tuple[int, int]]:
    """(out, in) of the seven adapted matrices of a layer."""
    hidden, ffn, heads = (toy.SIZES[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
    narrow = hidden // heads * toy.SIZES["num_key_value_heads"]
    attention = [(hidden, hidden), (narrow, hidden), (narrow, hidden), (hidden, hidden)]
    return [*attention, (ffn, hidden), (ffn, hidden), (hidden, ffn)]
