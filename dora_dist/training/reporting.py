"""What a run says while it trains: a progress bar, a row of a table per logging step, metrics.jsonl."""

import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers import TrainerCallback

from dora_dist.analysis.rank_map import rank_table, write_rank_map
from dora_dist.checkpoint.history import History
from dora_dist.config import LoggingConfig
from dora_dist.models.build import AdaptedModel
from dora_dist.runtime.console import progress, say, visible, width
from dora_dist.runtime.distributed import World, together
from dora_dist.runtime.folders import DISK_IS_FULL, disk_errors
from dora_dist.training.pruning import Pruning
from dora_dist.training.rates import rates_by_pattern
from dora_dist.training.table import Table
from dora_dist.training.trackers import Trackers

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

    Logged: loss, gradient norm, learning rate, seconds since this start and to the end, tokens/s and tokens a step over
    all ranks, the share of the batches' places that are not padding, MFU
    where the device's peak is known (4 FLOP per weight and token: forward and input gradients, as the base is frozen),
    peak memory of the fullest rank, the norm refresh's share of the time and its bytes received per rank and step.
    """

    def __init__(
        self,
        world: World,
        run: AdaptedModel,
        pruning: Pruning,
        *,
        history: History,
        trackers: Trackers,
        run_dir: Path,
        options: LoggingConfig,
    ) -> None:
        self._tokens = self._places = 0
        self._samples: list[dict[str, str]] = []
        self._world, self._norms, self._pruning = world, run.norms, pruning
        self._weights = run.weights
        self._history, self._trackers, self._run_dir = history, trackers, run_dir
        self._peak = options.peak_flops or _known_peak()
        self._show_bar = options.progress_bar
        self._bar: Any = None
        self._rates: dict[str, float] = {}
        self._since = (time.perf_counter(), 0, 0, 0, 0.0, 0, 0.0)

    def saw(self, tokens: int, *, places: int) -> None:
        """Count a batch of this rank: its tokens, and with padding its places."""
        self._tokens += tokens
        self._places += places

    def answered(self, samples: list[dict[str, str]]) -> None:
        """What the model said in the evaluation that is logged next: {"prompt", "answer", "expected"}."""
        self._samples = samples

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._table = Table(state.max_steps, width())
        if self._world.first:
            self._trackers.begin(args, state, kwargs["model"], parameters=self._weights)
        self._begun = time.perf_counter(), state.global_step
        self._bar = progress(
            state.max_steps, "training", "step", initial=state.global_step, leave=False, shown=self._show_bar
        )
        self._since = self._counters(state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._rates = rates_by_pattern(kwargs["lr_scheduler"])  # the step's own, which is over when they are logged

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update()
        self._history.step = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()
        events, budget = self._pruning.events, self._pruning.budget
        if not events or budget is None:
            return
        picture = self._run_dir / "rank_map.png"
        with together("drawing the rank map"):
            if self._world.first:
                say(f"\nadapter ranks after step {events[-1].step}:\n{rank_table(events[-1])}")
                with disk_errors(picture, only=DISK_IS_FULL):
                    write_rank_map(events, budget, picture)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Collective: every rank logs the same kinds of lines."""
        logs = dict(logs or {})
        if "loss" in logs:
            logs.update(self._throughput(state, args.device))
            logs.update(self._clock(state))
            if len(self._rates) > 1:
                logs["learning_rates"] = self._rates
        for unwanted in ("total_flos", "train_samples_per_second", "train_steps_per_second"):
            logs.pop(unwanted, None)
        self._history.step = state.global_step  # of a pruning before `on_step_end`, too
        with together("writing the log"):  # or the other ranks would go on, and wait for rank 0
            if self._world.first:
                self._write(logs)
                self._trackers.log(args, state, logs)  # numbers alone

    def _write(self, logs: dict[str, Any]) -> None:
        if "components_kept" in logs:
            logs["components_by_layer"] = self._pruning.events[-1].by_layer
        if self._samples and event_of(logs) == "evaluation":
            logs, self._samples = {**logs, "samples": self._samples}, []
        self._show(self._history.add(event_of(logs), **logs))

    def _show(self, record: dict[str, Any]) -> None:
        if "loss" in record:
            for line in self._table.row(record):
                say(line)
            names = [key for key in record if key.startswith("loss/")]
            if by_source := ", ".join(f"{name.removeprefix('loss/')} {record[name]:.4f}" for name in names):
                say(self._table.event(record["step"], f"loss by source: {by_source}"))
        elif text := event_text(record):
            say(self._table.event(record["step"], text))
            for number, sample in enumerate(record.get("samples", ()), start=1):
                say(self._table.event(record["step"], sample_text(number, sample, width())))

    def _clock(self, state: Any) -> dict[str, float]:
        """Seconds of training in this start, and those to the last step at this pace."""
        since, first = self._begun
        elapsed = time.perf_counter() - since
        pace = elapsed / max(state.global_step - first, 1)
        return {"elapsed": elapsed, "left": pace * (state.max_steps - state.global_step)}

    def _counters(self, state: Any) -> tuple[float, int, int, int, float, int, float]:
        norms, scoring = self._norms, self._pruning.seconds
        refreshing, received = norms.stopwatch.seconds, norms.bytes_received
        seen = self._tokens, self._places
        return time.perf_counter(), state.global_step, *seen, refreshing, received, scoring

    def _throughput(self, state: Any, device: torch.device) -> dict[str, float]:
        now = self._counters(state)
        seconds, steps, tokens, places, refreshing, received, scoring = (
            b - a for a, b in zip(self._since, now, strict=True)
        )
        self._since = now
        total = torch.tensor([tokens, places], dtype=torch.float64, device=device)
        dist.all_reduce(total)
        peak = torch.tensor(float(_peak_memory()), dtype=torch.float64, device=device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        tokens, places = total.tolist()
        rate = tokens / seconds
        result = {"tokens_per_second": rate, "seconds_per_step": seconds / max(steps, 1)}
        result |= {"tokens_per_step": tokens / max(steps, 1), "filled": tokens / max(places, 1)}
        if self._peak:
            result["mfu"] = 4 * self._weights * rate / (self._peak * self._world.world_size)
        result["peak_memory_gb"] = float(peak) / 1e9
        result["norm_refresh_share"] = refreshing / seconds
        result["norm_refresh_bytes_per_step"] = received / max(steps, 1)
        if scoring:
            result["scoring_share"] = scoring / seconds
        return result


_EVALUATED = {
    "eval_loss": "loss",
    "eval_accuracy": "accuracy",
    "eval_exact_match": "exact match",
    "eval_f1": "F1",
    "eval_matthews": "Matthews correlation",
    "eval_pearson": "Pearson correlation",
    "eval_spearman": "Spearman correlation",
    "eval_rouge1": "ROUGE-1",
    "eval_rouge2": "ROUGE-2",
    "eval_rougeL": "ROUGE-L",
}
_WORTH_SAYING_S = 0.5
"""A save that training waits for less than this is reported without its wait."""


_EVENTS = {
    "components_kept": "pruning",
    "saved_step": "save",
    "save_failed": "save_failed",
    "records_skipped": "skipped",
    "train_runtime": "trained",
}


def event_of(logs: dict[str, Any]) -> str:
    """What kind of line of the history these are."""
    if any(key.startswith("eval_") for key in logs):
        return "evaluation"
    return next((event for key, event in _EVENTS.items() if key in logs), "log")


def event_text(record: dict[str, Any]) -> str:
    """A record of metrics.jsonl without a training loss, in words; "" for what the closing lines say anyway."""
    if "components_kept" in record:
        return (
            f"pruned: {record['components_kept']:,} of {record['components']:,} components are left, "
            f"{record['components_budget']:,} may be"
        )
    if "saved_step" in record:
        waited = record["save_stall_seconds"]
        stall = f", {waited:.1f} s of which training waited" if waited > _WORTH_SAYING_S else ""
        return f"saved checkpoint-{record['saved_step']:.0f} in {record['save_seconds']:.1f} s{stall}"
    if "records_skipped" in record:
        return f"{record['records_skipped']:,.0f} records left out so far, because they cannot be read"
    others = {key for key in record if key.startswith("eval_")} - {*_EVALUATED}
    names = _EVALUATED | {key: key.removeprefix("eval_").replace("_", " ") for key in record if key in others}
    found = [f"{name} {record[key]:.4f}" for key, name in names.items() if key in record]
    return f"evaluation: {', '.join(found)}" if found else ""


def sample_text(number: int, sample: Mapping[str, str], width: int) -> str:
    """A line about an answer that the model gave in an evaluation, for a screen of that many columns."""
    most = max(width // 2 - 20, 16)
    words = (visible(" ".join(sample[field].split())) for field in ("answer", "expected"))
    said, wanted = (text if len(text) <= most else f"{text[: most - 2]} …" for text in words)
    return f"sample {number}: {said or 'no words'} (expected: {wanted})"


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
