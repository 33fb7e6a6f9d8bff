"""What a run prints before its first step (ranks, data, model, schedule, files) and after its last (results)."""

import math
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from dora_dist.adapters.folders import is_native
from dora_dist.adapters.methods import chosen
from dora_dist.adapters.patterns import kinds_of
from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.resuming import optimizer_steps
from dora_dist.config import AdapterConfig, CheckpointConfig, DataConfig, RunConfig, TrainingConfig
from dora_dist.config.names import listed
from dora_dist.config.schema import BatchPlan
from dora_dist.data import TokenizedData
from dora_dist.data.sampler import batches_of
from dora_dist.models.build import AdaptedModel
from dora_dist.runtime.agreement import package_version
from dora_dist.runtime.console import say, width
from dora_dist.runtime.distributed import World
from dora_dist.training.optimizers import state_bytes
from dora_dist.training.table import duration
from dora_dist.zero3.partition import full_numel

_LABEL = 12  # columns


def line(label: str, text: str) -> None:
    """A labelled line, wrapped to the screen."""
    wrap = textwrap.TextWrapper(
        width(), initial_indent=f"{label:<{_LABEL}}", subsequent_indent=" " * _LABEL, break_long_words=False
    )
    wrap.break_on_hyphens = False
    say(wrap.fill(text))


def opening(run_dir: Path, world: World, resume: Path | None) -> None:
    """As soon as the ranks have met: versions, where the run is written, and on what it runs."""
    libraries = ", ".join(f"{name} {package_version(name)}" for name in ("torch", "deepspeed", "transformers"))
    say(f"dora_dist {package_version('dora_dist')} ({libraries})\n")
    line("run", f"{run_dir}, from the beginning" if resume is None else f"{run_dir}, goes on from {resume.name}")
    nodes = -(-world.world_size // world.local_world_size)
    ranks, machines = _count(world.world_size, "rank"), _count(nodes, "node")
    device = get_accelerator().device_name()
    starter = "" if world.launcher == "none" else f", started by {world.launcher}"
    line("ranks", f"{ranks} on {machines}; device {device}, collectives by {dist.get_backend()}{starter}")


def about_data(options: DataConfig, data: TokenizedData) -> None:
    """Once the data is read: how much there is to learn from, and what was left out."""
    line("data", f"{', '.join(listed(options.train))}: {data.train.described(data.train_stats)}")
    if shares := data.train.shares:
        line("sources", "; ".join(map(str, shares)))
    if data.validation_stats is not None:
        held_out = f"{options.validation_samples} samples held out of it"
        line("validation", f"{', '.join(listed(options.validation)) or held_out}: {data.validation_stats}")


def about_model(
    config: RunConfig, run: AdaptedModel, world: World, *, parts: Mapping[str, int], plan: BatchPlan
) -> None:
    """Once the model is built: model, adapter, batch, schedule, memory, files. `parts`: of the training set."""
    model, adapter, training = config.model, config.adapter, config.training
    parameters = list(run.model.parameters())
    trained = sum(full_numel(p) for p in parameters if p.requires_grad)
    line("model", f"{model.path}: {type(run.model).__name__}, {_number(run.weights)} parameters, {model.dtype}")
    where = f" on {len(run.adapted)} modules ({', '.join(_kinds(run.adapted))})" if run.adapted else ""
    share = f"{_number(trained)} parameters are trained ({trained / run.weights:.2%})"
    line("adapter" if run.adapted else "method", f"{_method(adapter)}{where}; {share}")
    single = run.trained_parameters.names
    if run.adapted and single:
        line("besides", kinds_of(single, steps=2))
    if run.trained and (run.adapted or run.fresh or not single):
        new = f"; new, not in the base: {', '.join(run.fresh)}" if run.fresh else ""
        line("in full", f"{', '.join(run.trained)}{new}")
    empty = f"; {plan.empty} places of the last micro-batches stay empty" if plan.empty else ""
    if config.data.packing:
        alone = training.batch_plan(world.world_size).accumulation_steps
        empty = f", in rows of at most {config.data.longest_row:,} tokens (unpacked: {_count(alone, 'step')})"
    rows = f" {'row' if plan.micro_batch_size == 1 else 'rows'}" if config.data.packing else ""
    line(
        "batch",
        f"{training.global_batch_size} records a step: {_count(world.world_size, 'rank')} x "
        f"{plan.micro_batch_size}{rows} x {_count(plan.accumulation_steps, 'accumulation step')}{empty}",
    )
    counted = not config.data.streaming
    line("training", _schedule(training, config.checkpoint, parts, counted=counted))
    line("memory", f"{_memory(run.model, world, state_bytes(training))} a rank, before gathered layers and activations")
    files = f"{run_folder.LOG} (everything that ranks and libraries print), {run_folder.METRICS}, {run_folder.CONFIG}"
    line("files", f"{config.checkpoint.run_dir}/: {files}")
    for text in _notes(model.path, run):
        line("note", text)
    if adapter.init_from:
        line("note", f"the adapter starts as {adapter.init_from} has it")


def closing(checkpoint: Path, seconds: float) -> None:
    """After the last save: what was learnt, where it is, and what to type next."""
    run_dir = checkpoint.parent
    records = run_folder.metrics(run_dir)
    if losses := [record["loss"] for record in records if "loss" in record]:
        rates = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
        memory = max(record.get("peak_memory_gb", 0.0) for record in records)
        speed = f"{sorted(rates)[len(rates) // 2]:,.0f} tokens/s, peak memory {memory:.2f} GB a rank"
        say()
        line("finished", f"{run_folder.step_of(checkpoint):,} steps; this start took {duration(seconds)} ({speed})")
        line("loss", f"training {losses[0]:.4f} -> {losses[-1]:.4f}{_validation(records)}")
    choice = run_folder.chosen(run_dir)
    result = choice.folder if choice is not None else checkpoint  # rank 0's folder may lie on another node
    line("result", str(result) if choice is None else f"{result}, {choice.reason}")
    adapter = result / run_folder.ADAPTER
    if adapter.is_dir():
        written = "in PEFT's format"
        if is_native(adapter):
            written = "in our own format, which other tools do not read (merge it for them)"
        line("adapter", f"{adapter}, {written}, with the tokenizer")
    if choice is not None and choice.newest is not None:
        line("newest", f"{choice.newest}; merge that one: dora-dist consolidate {choice.newest} --output merged/")
    line("merge", f"dora-dist consolidate {run_dir} --output merged/")
    line("evaluate", f"dora-dist evaluate {run_dir} --tasks NAME=FILE")


def _validation(records: list[dict[str, Any]]) -> str:
    found = [record["eval_loss"] for record in records if record.get("eval_loss") is not None]
    if not found:
        return ""
    return f"; validation {found[0]:.4f} -> {found[-1]:.4f}"


def _method(adapter: AdapterConfig) -> str:
    method = chosen(adapter)
    settings, rank = method.settings(), ""
    if "r" in settings:
        rank = f", r {settings['r']}" + (f" pruned to {adapter.r} on average" if adapter.dynamic_rank else "")
    dropout = f", dropout {adapter.dropout:g}" if adapter.dropout else ""
    alpha = f", alpha {adapter.lora_alpha:g}" if "lora_alpha" in settings else ""
    rooted = " over the root of r" if adapter.use_rslora else ""
    return f"{method.title}{rank}{alpha}{rooted}{dropout}"


def _schedule(
    training: TrainingConfig, checkpoint: CheckpointConfig, parts: Mapping[str, int], *, counted: bool
) -> str:
    """counted: whether it is known how many samples an epoch has."""
    steps = optimizer_steps(training, parts)
    epochs = steps / batches_of(parts.values(), training.global_batch_size)
    warmup = training.warmup_steps
    if warmup is None:
        warmup = math.ceil((training.warmup_ratio or 0) * steps)  # as the Trainer rounds it
    shape = training.schedule.replace("_", " ")
    shape += " decay" if training.schedule in ("linear", "cosine") else ""
    words = [
        _count(steps, "step") + (f" ({_epochs(epochs)})" if counted else ""),
        f"learning rate {training.learning_rate:g}, {shape} after {_count(warmup, 'warm-up step')}",
        f"evaluated every {training.eval_every}" if training.eval_every else "",
        f"saved every {checkpoint.save_every}" if checkpoint.save_every else "saved at the end",
    ]
    return ", ".join(part for part in words if part)


def _memory(model: nn.Module, world: World, of_trained: float) -> str:
    """Bytes that a rank holds all the time: its share of the weights, and `of_trained` for each number that trains."""
    share = [(-(-full_numel(p) // world.world_size), p) for p in model.parameters()]
    weights = sum(count * p.element_size() for count, p in share)
    states = sum(count * of_trained for count, p in share if p.requires_grad)
    return f"{_size(weights)} of weights + {_size(states)} of optimizer states"


def _notes(path: str, run: AdaptedModel) -> list[str]:
    notes = [
        f"{name} starts from new values: its shape is {there} in {path} and {here} for model.num_labels here"
        for name, (there, here) in run.resized.items()
    ]
    if run.untied:
        notes.append(f"untied from the weight that they share with others in {path}: {', '.join(run.untied)}")
    return notes


def _kinds(names: list[str]) -> list[str]:
    """Last parts of the modules' names, the most frequent first."""
    return [kind for kind, _ in Counter(name.rpartition(".")[2] for name in names).most_common()]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _epochs(epochs: float) -> str:
    text = f"{epochs:,.2f}".rstrip("0").rstrip(".")
    return f"{text} epoch{'' if text == '1' else 's'}"


def _number(count: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"


def _size(count: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= size / 10:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"
