"""benchmarks/dynamic_rank.py as a user types it, scaled down: BERT-tiny on 320 real texts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(output: Path, *flags: str) -> dict[str, Any]:
    """The report; results go to `output`."""
    small = "--tasks rating --methods lora dynamic --seeds 1 2 --limit 320 --epochs 1 --rates 4e-3"
    done = subprocess.run(
        [sys.executable, "benchmarks/dynamic_rank.py", *small.split(), "--output", str(output), *flags],
        cwd=ROOT,  # packages are kept in its runs/packages
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| LoRA, r = 8 | 36,864 | 36,864 |" in done.stdout
    return json.loads((output / "dynamic_rank.json").read_text())


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of both methods with two seeds."""
    output = tmp_path_factory.mktemp("benchmark")
    run(output, "--adapter.prune_every", "5")
    return output


def width(module: str) -> int:
    """In plus out features of one of BERT-tiny's linear layers."""
    return 256 if "attention" in module else 640


def test_methods_are_compared_at_the_sizes_that_they_trained(output: Path) -> None:
    found = json.loads((output / "dynamic_rank.json").read_text())["tasks"]["rating"]
    assert found["learning_rates"] == {"lora": 4e-3, "dynamic": 4e-3}
    lora, dynamic = found["methods"]["lora"], found["methods"]["dynamic"]
    assert lora["parameters_at_end"] == [lora["parameters_at_start"]] * 2
    assert dynamic["parameters_at_start"] == 6 * lora["parameters_at_start"] // 8 + 12 * 6
    for seed, end in zip((1, 2), dynamic["parameters_at_end"], strict=True):
        folder = output / "runs" / f"rating-dynamic-0.004-seed{seed}-test"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        kept = [line["components_by_layer"] for line in lines if "components_by_layer" in line]
        assert len(kept) == 2  # after steps 5 and 10 of 20, every 5: the window is 3 to 10
        assert sum(kept[-1].values()) == 12 * 4
        assert end == sum(count * (1 + width(name)) for name, count in kept[-1].items())
    for entry in (lora, dynamic):
        assert entry["steps"] == 20
        assert len(set(entry["metric"])) == 2
        assert all(-1 <= value <= 1 for value in entry["metric"])
        assert min(entry["metric"]) < entry["mean"] < max(entry["metric"])
    assert (output / "dynamic_rank.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_repeated_and_learning_rates_are_chosen(output: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/result.json")}
    assert len(before) == 4
    report = run(output, "--adapter.prune_every", "5", "--rates", "4e-3", "1e-6", "--methods", "lora")
    found = report["tasks"]["rating"]
    assert found["learning_rates"] == {"lora": 4e-3}
    assert set(found["sweep"]["lora"]) == {"0.004", "1e-06"}
    assert {path: path.stat().st_mtime_ns for path in before} == before
