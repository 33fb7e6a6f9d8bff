"""What runs on each rank: build one variant, warm up, measure steps."""

import json
import logging
import os
import resource
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import suppress
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dora_dist.runtime import distributed
from stepbench.settings import Settings
from stepbench.wire import received_bytes


def rank_main(rank: int, variant: str, base: Path, settings: Settings, folder: Path, profile: bool) -> None:
    """Measure `variant` as one of `settings.ranks` ranks; writes `folder`/<rank>.json."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet()
    join(rank, settings.ranks, folder)
    result = Run(variant, base, settings).measure(profile)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def join(rank: int, ranks: int, folder: Path) -> None:
    """Make this process one of so many ranks, which meet at a file in `folder`: no port can be taken."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    start_engine(rank, ranks, threads=threads, init_method=f"file://{folder}/store")


def start_engine(rank: int, ranks: int, *, threads: int, backend: str | None = None, **rendezvous: Any) -> None:
    """What a launcher and a run do before a model is built; `backend` is the accelerator's if there is none."""
    size = str(ranks)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, LOCAL_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # never bound
    torch.set_num_threads(threads)

    distributed.choose_accelerator("auto")  # before DeepSpeed is imported, which settles on one

    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # as in a run: no shared-memory all-reduce is compiled
    else:
        accelerator.set_device(rank)
    backend = backend or accelerator.communication_backend_name()
    dist.init_process_group(backend, rank=rank, world_size=ranks, **rendezvous)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False)


def _end_with_parent() -> None:
    """A benchmark that is ended leaves no rank behind that would go on computing."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def quiet() -> None:
    """Leave out what libraries say of themselves."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # the engine's use of renamed collectives, once per call


class Run:
    """One variant on one rank."""

    def __init__(self, variant: str, base: Path, settings: Settings) -> None:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
        from transformers.integrations import HfDeepSpeedConfig

        from dora_dist.adapters.layer import adapted_layers
        from stepbench.models import build, pruner, unsharded

        self.settings, self.accelerator = settings, get_accelerator()
        # As under HF Trainer: while it lives, from_pretrained makes shards and PEFT gathers what it reads.
        self.zero3_enabled = HfDeepSpeedConfig(settings.deepspeed_config())
        model, self.norms = build(variant, base, settings)
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.trainable = sum(getattr(p, "ds_numel", p.numel()) for p in trainable)
        optimizer = torch.optim.AdamW(trainable, lr=1e-4)
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings.deepspeed_config())[0]
        if wrong := list(unsharded(model, settings)):
            raise RuntimeError(f"{variant}: not sharded, or not bf16: {wrong[:5]}")
        self.recorded = adapted_layers(model) if variant == "recorded" else {}
        self.pruner = pruner(variant, model, self.engine, settings)
        self.losses: list[float] = []

    def measure(self, profile: bool) -> dict[str, Any]:
        """Warm-up (the engine's trace of modules must be complete), timed steps, one step with bytes counted."""
        from stepbench.models import open_components

        settings = self.settings
        for _ in range(settings.warmup):
            self.step()
        if profile:
            self._profile()
        built_peak = peak_rss()
        reset_peak_rss()
        refreshed = self.norms.stopwatch.seconds if self.norms else 0.0
        scored = self.pruner.stopwatch.seconds if self.pruner else 0.0
        on_wire = received_bytes()
        measured = [self.step() for _ in range(settings.steps)]
        on_wire = (received_bytes() - on_wire) // settings.steps
        scoring = (self.pruner.stopwatch.seconds - scored) / settings.steps if self.pruner else 0.0
        refresh = (self.norms.stopwatch.seconds - refreshed) / settings.steps if self.norms else 0.0
        refresh_bytes = self.norms.bytes_received if self.norms else 0
        with ReceivedBytes() as received:
            self.step()
        refresh_bytes = (self.norms.bytes_received if self.norms else 0) - refresh_bytes
        if self.pruner:
            self.pruner.settle()  # the last step has opened closed gates again
        on_gpu = self.accelerator.device_name() != "cpu"
        return {
            "device": device_description(),
            "seconds": [wall for wall, _ in measured],
            "cpu_seconds": [cpu for _, cpu in measured],
            "losses": self.losses,
            "trainable": self.trainable,
            "optimizer_bytes": optimizer_bytes(self.engine),
            "open_components": open_components(self.engine.module),
            "peak_rss_bytes": max(built_peak, peak_rss()),
            "peak_rss_steps_bytes": peak_rss(),
            "peak_device_bytes": self.accelerator.max_memory_allocated() if on_gpu else None,
            "received_bytes": dict(received.bytes),
            "wire_bytes": on_wire,
            "collectives": dict(received.calls),
            "norm_refresh_seconds": refresh,
            "norm_refresh_bytes": refresh_bytes,
            "scoring_seconds": scoring,
        }

    def step(self) -> tuple[float, float]:
        """One optimizer step on a new batch.

        Returns wall seconds between barriers, and this process's CPU seconds: those hardly change when something
        else shares the machine.
        """
        batch = self._batch()
        self._barrier()
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = self.engine(**batch).loss
        self.engine.backward(loss)
        self.engine.step()
        if self.recorded:
            self._record()
        self._barrier()
        seconds = time.perf_counter() - started, time.process_time() - cpu_started
        self.losses.append(loss.item())
        return seconds

    def _record(self) -> None:
        """What `analysis.every` does in a step that records: the next forward does not refresh norms again."""
        from dora_dist.analysis.decomposition import Recording, moved

        Recording(len(self.losses), "", moved(self.norms.record(self.recorded))).line()

    def _batch(self) -> dict[str, torch.Tensor]:
        """One record of random tokens, after a random picture if there are pictures; the same in every variant."""
        settings = self.settings
        generator = torch.Generator().manual_seed(len(self.losses) * settings.ranks + dist.get_rank())
        words = settings.vocab - settings.pictures  # the last one stands for pictures
        tokens = torch.randint(words, (1, settings.tokens), generator=generator)
        batch = {"input_ids": tokens, "labels": tokens}
        if settings.pictures:
            picture = torch.full((1, settings.picture_tokens), settings.vocab - 1)
            batch["input_ids"] = torch.cat([picture, tokens], dim=1)
            batch["labels"] = torch.cat([torch.full_like(picture, -100), tokens], dim=1)
            shape = (1, 3, settings.picture_side, settings.picture_side)
            batch["pixel_values"] = torch.randn(shape, generator=generator).to(torch.bfloat16)
        return {name: values.to(self.engine.device) for name, values in batch.items()}

    def _barrier(self) -> None:
        self.accelerator.synchronize()
        dist.barrier()

    def _profile(self) -> None:
        if dist.get_rank() != 0:
            self.step()
            return
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self.accelerator.device_name() != "cpu"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as profiler:
            seconds, _ = self.step()
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        print(profiler.key_averages(group_by_input_shape=False).table(sort_by=key, row_limit=25))
        print(f"one step under the profiler: {seconds:.2f} s", file=sys.stdout, flush=True)


class ReceivedBytes:
    """Counts the bytes that each kind of collective brings to this rank, where DeepSpeed calls its backend.

    Of an all-gather's output a rank receives all but its own part; of a reduce-scatter's input, the others' parts
    of its own output; an all-reduce is both. What another rank sends to this one alone is received whole. In each call
    the largest tensor is that output or input.
    """

    def __init__(self) -> None:
        others = (dist.get_world_size() - 1) / dist.get_world_size()
        self.shares = {
            "all_gather_into_tensor": others,
            "reduce_scatter_tensor": others,
            "all_reduce": 2 * others,
            "irecv": 1.0,
        }
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> "ReceivedBytes":
        from deepspeed.comm import comm

        self.backend = comm.cdb
        for name, share in self.shares.items():
            setattr(self.backend, name, self._counting(name, share))
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.shares:
            delattr(self.backend, name)  # the class's own method shows again

    def _counting(self, name: str, share: float) -> Any:
        real = getattr(self.backend, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            self.bytes[name] += int(max(t.numel() * t.element_size() for t in tensors) * share)
            self.calls[name] += 1
            return real(*args, **kwargs)

        return counted


def optimizer_bytes(engine: Any) -> int:
    """What this rank's optimizer holds: fp32 masters and their Adam state."""
    from dora_dist.zero3.optimizer_state import inner_optimizer

    state = inner_optimizer(engine).state
    tensors = [*state, *(value for entry in state.values() for value in entry.values())]
    return sum(t.numel() * t.element_size() for t in tensors)


def peak_rss() -> int:
    """This process's peak resident memory in bytes, since it began or since `reset_peak_rss`."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_rss() -> None:
    """Reset the peak to what is resident now (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def device_description() -> str:
    """The accelerator's name, or how many cores of which processor."""
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator().device_name()
    if name != "cpu":
        return torch.get_device_module(name).get_device_name()
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "processor")
    return f"{os.cpu_count()} cores of {model}"
