"""What a run says while it trains: a progress bar, one readable line per logging step, metrics.jsonl."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm
from transformers import TrainerCallback

from dora_dist.adapters.norms import NormRefresher
from dora_dist.analysis.rank_map import rank_table, write_rank_map
from dora_dist.distributed import World
from dora_dist.run_folder import METRICS
from dora_dist.safetensors_io import disk_errors

PEAK_BF16_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "V100": 125e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,
}
"""Dense bf16 (fp16 for V100) peak, FLOP/s per device, from the vendors' data sheets."""


class ReportCallback(TrainerCallback):
    """Progress and metrics on rank 0; counters are summed over ranks at each log.

    Logged: loss, gradient norm, learning rate, tokens/s over all ranks, MFU where the device's peak is known (4
    FLOP per weight and token: forward and input gradients, as the base is frozen), peak memory of the fullest
    rank, the norm refresh's share of the time and its bytes received per rank and step.
    """

    def __init__(self, world: World, norms: NormRefresher, run_dir: Path, weights: int, options: Any) -> None:
        self.trainer: Any = None
        self._world, self._norms, self._weights = world, norms, weights
        self._file = run_dir / METRICS
        self._peak = options.peak_flops or _known_peak()
        self._show_bar = options.progress_bar and world.first
        self._bar: Any = None
        self._since = (time.perf_counter(), 0, 0, 0.0, 0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._show_bar:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="training")
        self._since = self._counters(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        pruner = self.trainer.pruner
        if pruner is not None and pruner.events and self._world.first:
            print(f"adapter ranks after step {pruner.events[-1].step}:\n{rank_table(pruner.events[-1])}")
            write_rank_map(pruner.events, pruner.budget, self._file.with_name("rank_map.png"))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = dict(logs or {})
        if "loss" in logs:
            logs.update(self._throughput(state))
        for unwanted in ("total_flos", "train_samples_per_second", "train_steps_per_second"):
            logs.pop(unwanted, None)
        if self._world.first:
            record: dict[str, Any] = {"step": state.global_step, **logs}
            if "components_kept" in logs:
                record["components_by_layer"] = self.trainer.pruner.events[-1].by_layer
            with disk_errors(self._file), self._file.open("a") as file:
                file.write(json.dumps(record) + "\n")
            tqdm.write(_line(record, state.max_steps))

    def _counters(self, state: Any) -> tuple[float, int, int, float, int, float]:
        tokens = self.trainer.tokens_seen if self.trainer is not None else 0
        received = getattr(self._norms, "bytes_received", 0)
        pruner = self.trainer.pruner if self.trainer is not None else None
        scoring = pruner.stopwatch.seconds if pruner is not None else 0.0
        return time.perf_counter(), state.global_step, tokens, self._norms.stopwatch.seconds, received, scoring

    def _throughput(self, state: Any) -> dict[str, float]:
        now = self._counters(state)
        seconds, steps, tokens, refreshing, received, scoring = (b - a for a, b in zip(self._since, now, strict=True))
        self._since = now
        device = self.trainer.args.device
        total = torch.tensor(float(tokens), device=device)
        dist.all_reduce(total)
        peak = torch.tensor(float(_peak_memory()), dtype=torch.float64, device=device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        rate = float(total) / seconds
        result = {"tokens_per_second": rate, "seconds_per_step": seconds / max(steps, 1)}
        if self._peak:
            result["mfu"] = 4 * self._weights * rate / (self._peak * self._world.world_size)
        result["peak_memory_gb"] = float(peak) / 1e9
        result["norm_refresh_share"] = refreshing / seconds
        result["norm_refresh_bytes_per_step"] = received / max(steps, 1)
        if scoring:
            result["scoring_share"] = scoring / seconds
        return result


def _line(record: dict[str, Any], max_steps: int) -> str:
    shown = {
        "components_kept": ("components kept", "{:,}"),
        "components": ("of", "{:,}"),
        "components_budget": ("budget", "{:,}"),
        "dem_penalty": ("DEM penalty", "{:.4g}"),
        "loss": ("loss", "{:.4f}"),
        "eval_loss": ("eval loss", "{:.4f}"),
        "eval_accuracy": ("accuracy", "{:.4f}"),
        "eval_exact_match": ("exact match", "{:.4f}"),
        "eval_f1": ("F1", "{:.4f}"),
        "eval_matthews": ("Matthews", "{:.4f}"),
        "eval_pearson": ("Pearson", "{:.4f}"),
        "eval_spearman": ("Spearman", "{:.4f}"),
        "eval_rouge1": ("ROUGE-1", "{:.4f}"),
        "eval_rouge2": ("ROUGE-2", "{:.4f}"),
        "eval_rougeL": ("ROUGE-L", "{:.4f}"),
        "save_stall_seconds": ("checkpoint saved; training stood still", "{:.2f} s"),
        "save_seconds": ("writing took", "{:.1f} s"),
        "train_loss": ("mean training loss", "{:.4f}"),
        "train_runtime": ("seconds", "{:.1f}"),
        "grad_norm": ("grad norm", "{:.3f}"),
        "learning_rate": ("lr", "{:.2e}"),
        "tokens_per_second": ("tokens/s", "{:,.0f}"),
        "mfu": ("MFU", "{:.1%}"),
        "peak_memory_gb": ("peak memory", "{:.2f} GB"),
        "norm_refresh_share": ("norms", "{:.1%}"),
    }
    parts = [f"{label} {form.format(record[key])}" for key, (label, form) in shown.items() if key in record]
    return f"step {record['step']}/{max_steps}  " + "  ".join(parts)


def _known_peak() -> float | None:
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return None
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for known, peak in PEAK_BF16_FLOPS.items() if known in name), None)


def _peak_memory() -> int:
    """Bytes: the device's allocator peak, or this process's resident peak on a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(accelerator.max_memory_allocated())
