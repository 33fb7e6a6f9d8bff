"""Run folders as runs write them, for tests of their page."""

import json
from pathlib import Path
from typing import Any

from dora_dist.config import RunConfig

BEGAN = 1_790_000_000.0
HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
LAYERS = [f"model.layers.{n}.{kind}" for n in range(3) for kind in ("self_attn.q_proj", "mlp.down_proj")]
VERSIONS = {"dora_dist": "0.1.0", "torch": "2.13.0"}


def configuration(**training: Any) -> dict[str, Any]:
    raw = {
        "model": {"path": "models/small"},
        "adapter": {"r": 4, "dynamic_rank": True},
        "data": {"train": "train.jsonl"},
        "training": {"max_steps": 120, **training},
    }
    return json.loads(RunConfig.from_dict(raw).to_json())


def history(steps: int = 120, *, slower: float = 1.0, ended: bool = True) -> list[dict[str, Any]]:
    """A start that is killed at step 60, another that loses a rank at 90, and a third that takes the last step."""
    lines: list[dict[str, Any]] = []

    def add(event: str, step: int, **fields: Any) -> None:
        lines.append({"event": event, "step": step, "time": BEGAN + 10 * len(lines), **fields})

    for first, last in ((0, 60), (60, 90), (90, steps)):
        origin = f"runs/one/checkpoint-{first}" if first else None
        start = {"steps": 120, "resumed_from": origin, "ranks": 2, "nodes": 1, "host": "n0", "launcher": "torchrun"}
        add("start", first, changed={}, device="cpu", versions=VERSIONS, **start)
        add("model", first, parameters=135_000_000, trained_parameters=4_800_000)
        for step in range(first + 2, last + 1, 2):
            rates = {"": 1e-3 * (1 - step / 121), "lora_B": 4e-3 * (1 - step / 121)}
            add(
                "log",
                step,
                loss=slower * 4 / (1 + step / 20) + (0.2 if step % 4 else 0.0),
                grad_norm=0.5,
                learning_rate=rates[""],
                learning_rates=rates,
                tokens_per_second=900.0 + step,
                peak_memory_gb=1.5,
                norm_refresh_share=0.02,
                elapsed=float(step - first),
                left=120.0 - step,
            )
            if step % 30 == 0:
                samples = [
                    {"prompt": f"Question <{n}>?", "answer": f"{HOSTILE} at {step}", "expected": "b"} for n in (1, 2)
                ]
                add(
                    "evaluation",
                    step,
                    eval_loss=slower * 3 / (1 + step / 30),
                    eval_accuracy=step / 200,
                    samples=samples,
                )
                ranks = {name: max(6 - step // 30 - n % 2, 0) for n, name in enumerate(LAYERS)}
                kept = sum(ranks.values())
                add(
                    "pruning",
                    step,
                    components=36,
                    components_kept=kept,
                    components_budget=kept,
                    components_by_layer=ranks,
                )
                add("save", step, saved_step=step, save_seconds=1.0, save_stall_seconds=0.1)
        if first == 60:
            add("end", last, how="lost", text=f"lost rank 1 (host n1, process 7): {HOSTILE}", seconds=30.0)
    if ended:
        add("end", steps, how="finished", text="", seconds=30.0)
    return lines


def write(folder: Path, lines: list[dict[str, Any]], **training: Any) -> Path:
    """A run folder with configuration, history and recordings."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(configuration(**training)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recorded: list[dict[str, Any]] = [
        {
            "step": step,
            "method": "DoRA with dynamic rank",
            "matrices": {
                n: {"delta_m": step * k / 1e4, "delta_d": step / 1e3, "rows": 8} for k, n in enumerate(LAYERS)
            },
        }
        for step in (40, 80, 120)
    ]
    (folder / "analysis.jsonl").write_text("".join(json.dumps(line) + "\n" for line in recorded))
    return folder
