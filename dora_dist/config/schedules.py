"""The learning rate's schedules, which are those of transformers, by name and with what each can be told."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

ScheduleName = Literal[
    "linear",
    "cosine",
    "constant",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
"""All but two: reduce_lr_on_plateau and greedy follow earlier losses, so a run that is resumed would need their state.

"constant" is transformers' constant_with_warmup.
"""

SETTINGS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "constant": (),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        *("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type"),
        *("min_lr_ratio", "num_cycles"),
    ),
}
"""What each can be told; a test compares it with transformers."""

_NEEDED = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
"""Of which one must be given."""


def conflicts(schedule: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the settings of a schedule, one line each."""
    known, needed = SETTINGS[schedule], _NEEDED.get(schedule, ())
    for name in settings:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none; take it out"
            others = [other for other, names in SETTINGS.items() if name in names]
            of = f" (of {', '.join(others)})" if others else ""
            yield (
                f'training.schedule_settings: "{name}"{of} is not a setting of training.schedule = "{schedule}"; {has}'
            )
    if needed and not any(name in settings for name in needed):
        given = f"training.schedule_settings = {json.dumps(dict(settings))}"
        yield f'{given}: training.schedule = "{schedule}" needs {" or ".join(needed)}; give it'
    if needed[1:] and all(name in settings for name in needed):
        yield f"training.schedule_settings: {' and '.join(needed)} say the same; give one of the two"
