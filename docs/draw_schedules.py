"""Draws docs/schedules.png, the schedules of `training.schedule`: `python docs/draw_schedules.py`."""

from pathlib import Path
from typing import Any, get_args

import matplotlib.pyplot as plt

from dora_dist.config import TrainingConfig
from dora_dist.config.schedules import ScheduleName
from dora_dist.training.rates import shares

STEPS = 200
SETTINGS: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"power": 3.0},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.3},
    "warmup_stable_decay": {"num_decay_steps": 60, "min_lr_ratio": 0.05},
}


def draw(file: Path) -> None:
    figure, panels = plt.subplots(3, 3, figsize=(9, 6), sharex=True, sharey=True, layout="constrained")
    for panel, name in zip(panels.flat, get_args(ScheduleName), strict=True):
        given = SETTINGS.get(name, {})
        panel.plot(shares(TrainingConfig(schedule=name, schedule_settings=given, warmup_ratio=0.1), STEPS))
        panel.set_title("\n".join([name, ", ".join(f"{key} {value}" for key, value in given.items())]), fontsize=8)
    figure.supxlabel(f"optimizer step of {STEPS}, 10 % warm-up", fontsize=9)
    figure.supylabel("learning rate / training.learning_rate", fontsize=9)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    draw(Path(__file__).with_name("schedules.png"))
