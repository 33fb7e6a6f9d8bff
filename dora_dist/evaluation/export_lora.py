"""`export_lora`: an adapter as a plain LoRA, with what that loses measured on weights and logits, or refused."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_dist.adapters.folders import CONFIG_NAMES
from dora_dist.checkpoint.adapter_folders import find_adapter, open_adapter
from dora_dist.checkpoint.merging import check_place
from dora_dist.checkpoint.model_card import about_adapter, add_card, of_packed_base
from dora_dist.checkpoint.nearest_lora import Nearest, error_of_all, write_nearest_lora
from dora_dist.evaluation.inference import base_folder, load_for_inference
from dora_dist.evaluation.speaking import Speaker
from dora_dist.runtime.console import note
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import new_folder

TEXTS = (
    "The capital of France is Paris, and the river that runs through it is called",
    "Question: Which is heavier, a kilogram of feathers or a kilogram of lead? Answer:",
    "def mean(values):\n    return sum(values) /",
    "She put the letter back into the drawer because she did not want anyone to",
)
"""What logits are compared on."""
MAX_ERROR = 0.3


def export_lora(
    path: str | Path,
    output: Path,
    *,
    r: int,
    base: str | None = None,
    max_error: float = MAX_ERROR,
    force: bool = False,
    logits: bool = True,
    dtype: str = "fp32",
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the nearest plain LoRA of an adapter (of DoRA, MoRA, any method) as a PEFT folder without magnitudes.

    Args:
        path: a run, a checkpoint, or an adapter folder.
        output: the folder to write; it appears under its name once it is complete.
        r: the rank of the LoRA. More keeps more: a magnitude changes every singular value of a weight.
        base: folder or hub name of the base; None: as the run, or else the adapter, says.
        max_error: the largest share of the adapter's effect that may be lost.
        force: write it whatever is lost.
        logits: whether to load the model, with the adapter and with the LoRA, and compare what they answer on a few
            texts, in `dtype` ("bf16", "fp16" or "fp32"); without it the bound is for the weights' own error.

    Returns: {"output", "modules", "r", "error": share of all weights' change that is lost, "errors": by module,
    "logits": {"lost": ‖LoRA − adapter‖ / ‖adapter − base‖ of the logits, "agreement": how often both have the same
    likeliest token} or None}.

    Raises UserError, with nothing left behind, for more than `max_error` unless `force`, an adapter without layers, a
    base that does not fit it, and an `output` that exists unless `overwrite`.

    Example::

        export_lora("runs/mine", Path("lora"), r=64)
    """
    if r < 1:
        raise UserError(f"--rank {r}: must be 1 or more")
    adapter, _ = find_adapter(Path(path))
    base_at = base_folder(str(adapter), base)
    output = Path(output)
    check_place(output, base_at, adapter, what="an adapter", marks=CONFIG_NAMES)
    with new_folder(output, overwrite) as folder:
        found = write_nearest_lora(adapter, base_at, folder, r=r, progress=progress)
        compared = _logits(adapter, folder, base_at, dtype) if logits else None
        error = error_of_all(found)
        _refuse(error, compared, max_error=max_error, force=force, found=found, r=r)
        about = replace(about_adapter(open_adapter(adapter)), method=_told(r, error, compared))
        add_card(folder, about, replaced=output)
    if packed := of_packed_base(about.storage):
        note(packed)
    return {
        "output": str(output),
        "modules": len(found),
        "r": r,
        "error": error,
        "errors": {name: each.error for name, each in found.items()},
        "logits": compared,
    }


def _told(r: int, error: float, compared: Mapping[str, float] | None) -> str:
    on_logits = f", and {compared['lost']:.1%} of its effect on logits" if compared else ""
    return f"the nearest LoRA of rank {r} to its adapter (which loses {error:.1%} of the weights' change{on_logits})"


def _refuse(
    error: float,
    compared: Mapping[str, float] | None,
    *,
    max_error: float,
    force: bool,
    found: dict[str, Nearest],
    r: int,
) -> None:
    lost, of = (compared["lost"], "effect on the logits") if compared else (error, "change of the weights")
    if lost <= max_error or force:
        return
    worst = max(found, key=lambda name: found[name].error)
    raise UserError(
        f"--rank {r}: the nearest LoRA loses {lost:.0%} of the adapter's {of} (the weights' change: {error:.0%}, most "
        f"in {worst!r}: {found[worst].error:.0%}), more than --max-error {max_error:g}; give a higher --rank, merge "
        "(dora-dist consolidate), or write it all the same with --force"
    )


@torch.no_grad()
def _logits(adapter: Path, lora: Path, base: Path, dtype: str) -> dict[str, float] | None:
    """How the LoRA's answers differ; one model at a time is loaded. None for a model that writes no texts."""
    try:
        tokenizer = Speaker(str(adapter), base=str(base)).prompting.tokenizer
    except UserError:
        return None
    plain = _answers(base, None, dtype, tokenizer)
    theirs = _answers(adapter, base, dtype, tokenizer)
    ours = _answers(lora, base, dtype, tokenizer)
    change = sum(float((a - b).square().sum()) for a, b in zip(theirs, plain, strict=True))
    lost = sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True))
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in zip(ours, theirs, strict=True)])
    return {"lost": (lost / change) ** 0.5 if change else 0.0, "agreement": float(same.float().mean())}


def _answers(path: Path, base: Path | None, dtype: str, tokenizer: Any) -> list[Tensor]:
    """Logits (1, tokens, vocabulary) fp32 of each text, on the host."""
    model, _ = load_for_inference(str(path), dtype, None if base is None else str(base))
    place = next(model.parameters()).device
    found = [model(tokenizer(text, return_tensors="pt").input_ids.to(place)).logits.float().cpu() for text in TEXTS]
    del model
    gc.collect()  # before the next is loaded
    return found
