"""What a rank does: the actions of a job file, one after the other; one that fails leaves the others their turn.

The file is {name: {"do": action, **arguments}}; beside it rank 0 writes FILE.result.json with what each returned, or
{"error": traceback}. Started by a launcher, or alone.
"""

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from dora_dist.checkpoint import run_folder
from dora_dist.config import RunConfig
from dora_dist.runtime import distributed
from tests import toy
from tests.distributed import training_runs


def main() -> None:
    file = Path(sys.argv[-1])  # the launcher puts --local_rank before it
    distributed.choose_accelerator("auto")
    # fp32 is to mean fp32: cuDNN would round the products of convolutions to TF32's 10 bits.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)  # so that a resumed run can be equal to the last bit
    torch.utils.deterministic.fill_uninitialized_memory = False  # users' runs do not
    world = distributed.start(300.0)
    results = {}
    for name, action in json.loads(file.read_text()).items():
        do = action.pop("do")
        try:
            results[name] = ACTIONS[do](**action)
        except Exception:  # whatever one action meets, the report wants the others' results too
            results[name] = {"error": traceback.format_exc()}
        gc.collect()
    if world.first:
        file.with_suffix(".result.json").write_text(json.dumps(results))
    distributed.stop()


def train(**source: Any) -> dict[str, Any]:
    """A run of {"config": a dict} or of {"recipe": a name, "overrides": words}; its log by what it says."""
    from accelerate.state import AcceleratorState

    from dora_dist.training.run import train

    AcceleratorState._reset_state(reset_partial_state=True)
    if "config" in source:
        config = RunConfig.from_dict(source["config"])
    else:
        file = training_runs.CONFIGS / f"{source['recipe']}.json"
        config = RunConfig.load(file, source["overrides"], check_files=True)
    checkpoint = train(config)
    run_dir = Path(config.checkpoint.run_dir)
    lines = run_folder.metrics(run_dir)
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "evaluated": [line["eval_loss"] for line in lines if "eval_loss" in line],
        "kept": [kept for line in lines if (kept := line.get("components_kept"))],
        "compacted": bool(json.loads((checkpoint / "manifest.json").read_text()).get("compacted")),
    }


def train_sharded(**source: Any) -> dict[str, Any]:
    """As `train`, where every rank writes its own part of each checkpoint, in many pieces."""
    from unittest.mock import patch

    from dora_dist.checkpoint import format, state_writers

    with (
        patch.object(state_writers, "SHARDED_FROM_BYTES", 0),
        patch.object(state_writers, "PIECE", 100),
        patch.object(format, "PIECE", 100),
    ):
        return train(**source)


def step_0(base: str, task: str, dtype: str) -> dict[str, Any]:
    """How far the adapted model's logits on the engine are from the base's by transformers alone, before training."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from dora_dist.adapters.methods import LowRank, WeightDecomposed
    from dora_dist.config import ModelConfig
    from dora_dist.models.build import DTYPES, build_model
    from dora_dist.models.families import adapter_plan
    from dora_dist.tasks import task_named
    from dora_dist.zero3.norms import ShardedNormRefresher
    from dora_dist.zero3.placement import ShardedPlacement

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 30, "reduce_bucket_size": 100_000},
        "zero_allow_untested_optimizer": True,
    }
    device, head = get_accelerator().current_device_name(), task_named(task).head(ModelConfig(path=base))
    plain = head.reading_class().from_pretrained(base, dtype=DTYPES[dtype]).to(device).eval()
    plan, placement = adapter_plan(WeightDecomposed(LowRank(4, 8.0))), ShardedPlacement(settings)
    adapted = build_model(Path(base), plan, placement, refresher=ShardedNormRefresher, dtype=dtype, head=head)
    trained = [p for p in adapted.model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=adapted.model, optimizer=torch.optim.AdamW(trained), config=settings)[0]
    inputs = {name: values.to(device) for name, values in _inputs(plain.config, DTYPES[dtype]).items()}
    engine.eval()
    with torch.no_grad():
        found, expected = engine(**inputs).logits, plain(**inputs).logits
    engine.destroy()
    return {"equal": torch.equal(found, expected), "error": None, "off_by": toy.relative_error(found, expected)}


def merged(run_dir: str, base: str, output: str) -> dict[str, Any]:
    """How far the consolidated model's logits are from those of the adapter on its base, and these from the base's."""
    from transformers import AutoModelForCausalLM

    from dora_dist.checkpoint.adapter_folders import find_adapter
    from dora_dist.checkpoint.consolidate import consolidate
    from dora_dist.evaluation.inference import load_for_inference

    consolidate(find_adapter(Path(run_dir))[0], base, Path(output), progress=False)
    unmerged = load_for_inference(run_dir, dtype="fp32")[0]
    found = {}
    with torch.no_grad():
        ids = toy.tokens().to(next(unmerged.parameters()).device)
        expected = unmerged(ids).logits
        for name, folder in (("merged", output), ("base", base)):
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            found[name] = float((model.to(ids.device).eval()(ids).logits - expected).abs().max())
    return {**found, "device": ids.device.type}


def evaluate(**given: Any) -> dict[str, Any]:
    """What `evaluate` finds of each task."""
    from dora_dist.evaluation import evaluate

    return evaluate(progress=False, **given)["tasks"]


def _inputs(config: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tokens, behind a picture where the model sees pictures."""
    ids = toy.tokens(2, 17, 100)
    if not hasattr(config, "image_token_id"):
        return {"input_ids": ids}
    side = config.vision_config.image_size
    places = torch.full((2, config.image_seq_length), config.image_token_id)
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.cat([places, ids], dim=1), "pixel_values": pixels.to(dtype)}


ACTIONS = {"train": train, "train_sharded": train_sharded, "step_0": step_0, "merged": merged, "evaluate": evaluate}

if __name__ == "__main__":
    main()
