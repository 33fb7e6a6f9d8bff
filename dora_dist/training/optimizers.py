"""What `training.optimizer` names: the packages that each needs, what it holds, how the Trainer is told of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dora_dist.config import EngineConfig, TrainingConfig
from dora_dist.runtime import extras
from dora_dist.runtime.distributed import together
from dora_dist.runtime.errors import UserError
from dora_dist.zero3 import eight_bit

Made = tuple[type[torch.optim.Optimizer], dict[str, Any]]
"""A class and what it is made with besides the parameters, as Hugging Face's Trainer takes them."""


@dataclass(frozen=True)
class Optimizer:
    """One way of AdamW."""

    moments_bytes: float
    """Bytes of both moments for each trained number."""
    packages: tuple[str, ...] = ()
    made: Callable[[TrainingConfig, EngineConfig, torch.device], Made | None] = lambda *_: None
    """None: torch's AdamW, which is what the Trainer makes by itself."""


def _eight_bits(training: TrainingConfig, engine: EngineConfig, device: torch.device) -> Made:
    with together("trying bitsandbytes"):
        kind = _tried(torch.device("cpu") if engine.offload_optimizer == "cpu" else device)  # where DeepSpeed steps
    betas = training.adam_beta1, training.adam_beta2
    return kind, {"lr": training.learning_rate, "betas": betas, "eps": training.adam_epsilon}


def _tried(device: torch.device) -> Any:
    """bitsandbytes' class, after a step on this device. Raises UserError where there is none.

    Its step waits for the device after each group, which is once a step unless DeepSpeed parts groups (sub_group_size).
    """
    what = f'training.optimizer = "adamw_8bit": bitsandbytes cannot do that on {device.type}'
    remedy = 'install a version of it for this device, or set training.optimizer to "adamw"'
    weight = nn.Parameter(torch.ones(1 << 14, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        extras.import_bitsandbytes()
        from bitsandbytes.optim import AdamW8bit

        AdamW8bit([weight], lr=0.5).step()
    except Exception as error:  # no kernel for the device, one for another version of its driver, ...
        raise UserError(f"{what}: {error}; {remedy}") from error
    if not bool((weight < 1).all()):
        raise UserError(f"{what}: its step changes nothing; {remedy}")
    return AdamW8bit


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(moments_bytes=8),
    "adamw_8bit": Optimizer(moments_bytes=2 * eight_bit.MOMENT_BYTES, packages=("bitsandbytes",), made=_eight_bits),
}


def check(training: TrainingConfig) -> None:
    """Raise UserError where a package is missing that the optimizer needs."""
    extras.need(*OPTIMIZERS[training.optimizer].packages, purpose=f'training.optimizer: "{training.optimizer}"')


def state_bytes(training: TrainingConfig) -> float:
    """Bytes for each trained number: fp32 master and gradient, and the moments."""
    return 8 + OPTIMIZERS[training.optimizer].moments_bytes
