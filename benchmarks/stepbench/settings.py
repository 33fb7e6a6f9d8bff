"""What the step benchmark is told: one record, made from the command line's flags, the same for every variant."""

import argparse
import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from dora_dist.adapters import storage
from dora_dist.runtime import distributed

_STORAGES = {"dora": "plain", **{f"dora-{name}": name for name in storage.names() if name != "plain"}}
DORA: dict[str, dict[str, Any]] = {
    **{variant: {"storage": name} for variant, name in _STORAGES.items()},
    **{f"{variant}-selective": {"storage": name, "selective": True} for variant, name in _STORAGES.items()},
}
"""Variants that are "dora" with other settings: another storage of the base weights, selective checkpointing."""
VARIANTS = {
    "dora": "this project, DoRA",
    **{variant: f"  on {name}" for variant, name in _STORAGES.items() if variant != "dora"},
    **{f"{variant}-selective": f"  {name}, selective" for variant, name in _STORAGES.items()},
    "recorded": "  recording every step",
    "lora": "this project, LoRA",
    "none": "no adapter",
    "peft-lora": "PEFT, LoRA",
    "peft-dora": "PEFT, DoRA",
    "gated": "this project, gated DoRA",
    "dynamic": "  with scoring, DEM",
    "closed": "this project, gates closed",
    "compacted": "this project, compacted",
    "full": "this project, full",
    "deepspeed-full": "plain DeepSpeed, full",
}
DEFAULT_VARIANTS = ["dora", "lora", "none", "peft-lora", "peft-dora"]
TARGETS = r"(?!.*vision_tower).*\.(q|k|v|o|gate|up|down)_proj"
"""The language model's seven projections; a CLIP tower's layers have some of the names too."""
PATCH = 14


@dataclass(frozen=True)
class Settings:
    """Sizes are those of two LLaMA-7B layers by default; `engine` is merged into the DeepSpeed JSON last.

    `pictures` makes a LLaVA of it, with a tower of CLIP ViT-L/14-336's size: each rank's record then begins with a
    picture, whose tokens come on top of `tokens`. `kept` is the share of a layer's components that "closed" leaves
    open, and that "compacted" has. `selective`: our checkpointing keeps the outputs of adapted layers.
    """

    hidden: int = 4096
    ffn: int = 11008
    layers: int = 2
    heads: int = 32
    vocab: int = 1000
    tokens: int = 512
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    pictures: bool = False
    picture_side: int = 336
    tower_hidden: int = 1024
    tower_ffn: int = 4096
    tower_heads: int = 16
    tower_layers: int = 24
    kept: float = 0.5
    storage: str = "plain"
    checkpointing: bool = True
    selective: bool = False
    peft_fp32: bool = False
    ranks: int = 2  # `default_ranks` on the command line
    rounds: int = 3
    warmup: int = 3
    steps: int = 5
    reuse_distance: int = 0
    live_parameters: int = 250_000_000
    engine: dict[str, Any] | None = None

    def deepspeed_config(self) -> dict[str, Any]:
        """The engine's JSON, the same for all variants.

        A model of two layers would stay gathered whole under DeepSpeed's defaults (10^9 elements), and its steps
        would communicate a third of what a layer of a 70B model does. So nothing is kept for a later use
        (reuse distance 0) and about one layer may be live: every use of a weight gathers it.
        """
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {
                "stage": 3,
                "stage3_max_reuse_distance": self.reuse_distance,
                "stage3_max_live_parameters": self.live_parameters,
                "reduce_bucket_size": 50_000_000,  # allocated whole; only adapter gradients use it
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1_000_000_000,
        }
        return _merged(config, self.engine or {})

    @property
    def picture_tokens(self) -> int:
        """Image tokens at the start of a record, one a patch of its picture."""
        return (self.picture_side // PATCH) ** 2 if self.pictures else 0

    @property
    def start_rank(self) -> int:
        """Components of a layer at the start of a dynamic-rank run: half as many again as it ends with."""
        return -(-3 * self.r // 2)

    @property
    def kept_rank(self) -> int:
        """Those of them that are left in "closed" and "compacted"."""
        return max(1, round(self.kept * self.start_rank))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolved(variant: str, settings: Settings) -> tuple[str, Settings]:
    """What ranks build for a variant, and with which settings: "dora-nf4" is "dora" on NF4."""
    return ("dora", replace(settings, **DORA[variant])) if variant in DORA else (variant, settings)


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    nested = {k: _merged(base[k], v) for k, v in extra.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **extra, **nested}


def default_ranks() -> int:
    """One rank for each GPU, two where there is none. Settles the device, so call it before importing deepspeed."""
    distributed.choose_accelerator("auto")
    return 2 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.accelerator.device_count()


def parse(arguments: list[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    """The command line: the settings, and what is not a setting (variants, output, profile)."""
    parser = argparse.ArgumentParser(
        description="Seconds, memory and bytes of one training step, side by side: "
        + "; ".join(f"{name} ({text})" for name, text in VARIANTS.items())
    )
    numbers = {f.name: f.default for f in fields(Settings) if type(f.default) in (int, float)}
    for name, default in {**numbers, "ranks": default_ranks()}.items():
        kind = float if isinstance(default, float) else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help="%(default)s")
    parser.add_argument(
        "--pictures", action="store_true", help="a LLaVA: frozen tower, projector trained in full, a picture a record"
    )
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument(
        "--peft-fp32", action="store_true", help="leave PEFT's adapters in fp32, which is its default, not in bf16"
    )
    parser.add_argument("--engine", type=json.loads, default={}, help="DeepSpeed JSON, merged last, for all variants")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=DEFAULT_VARIANTS)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-step"), help="folder for JSON and PNG")
    parser.add_argument("--base", type=Path, help="keep the synthetic base model in this folder, or reuse it")
    parser.add_argument("--profile", choices=VARIANTS, help="print one step's top operations on rank 0 instead")
    options = parser.parse_args(arguments)
    given = {f.name: getattr(options, f.name) for f in fields(Settings) if hasattr(options, f.name)}
    return Settings(**given), options
