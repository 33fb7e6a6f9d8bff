"""How long training stands still for a checkpoint, how long writing it takes, and the memory. `--help` lists the flags.

Ranks save an adapter of 50 million trained numbers by default (600 MB of master weights and moments), or with --full a
whole model: every time once while nothing else happens, and once while training steps go on.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from stepbench.measure import join, peak_rss, reset_peak_rss
from stepbench.models import TARGETS, write_base
from stepbench.settings import Settings, default_ranks

SMALL_STEPS = {"zero_optimization": {"sub_group_size": 50_000_000}}
"""AdamW's temporary tensors are those of so many numbers, and not of all."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, default=50.0, help="trained numbers, in millions (%(default)s)")
    parser.add_argument("--full", action="store_true", help="train the whole model, of as many layers as that takes")
    parser.add_argument("--ranks", type=int, default=default_ranks(), help="%(default)s")
    parser.add_argument("--saves", type=int, default=5, help="of each kind (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="folder for JSON (%(default)s)")
    options = parser.parse_args()
    settings, adapter = full(options) if options.full else adapted(options)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        base = Path(temporary) / "base"
        base.mkdir()
        write_base(base, settings)
        torch.multiprocessing.spawn(
            rank_main, (settings, adapter, options.saves, Path(temporary)), nprocs=settings.ranks
        )
        result = json.loads((Path(temporary) / "result.json").read_text())
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "save.json").write_text(json.dumps(result, indent=1))
    whole, still, slower = (result[key] for key in ("synchronous_s", "stall_s", "step_during_save_s"))
    print(
        f"{result['trained']:,} trained numbers on {settings.ranks} ranks, {result['bytes'] / 1e6:,.0f} MB a checkpoint"
    )
    print(f"  saving and waiting for it   {statistics.median(whole):8.3f} s  (median of {len(whole)})")
    print(f"  training stands still for   {statistics.median(still):8.3f} s  = {result['share']:.1%} of it")
    print(f"  the first save's stall      {result['first_stall_s']:8.3f} s")
    print(f"  a step alone, and meanwhile {result['step_s']:8.3f} s, {statistics.median(slower):.3f} s")
    print(f"  state of a rank             {result['state_bytes'] / 1e6:8,.0f} MB")
    print(f"  memory added by a save      {result['save_peak_bytes'] / 1e6:8,.0f} MB, by a resume ", end="")
    print(f"{result['load_peak_bytes'] / 1e6:,.0f} MB (the worst rank)")
    print(f"written: {options.output / 'save.json'}")


def adapted(options: argparse.Namespace) -> tuple[Settings, dict[str, Any]]:
    """Four small layers with large DoRA adapters."""
    settings = Settings(hidden=1024, ffn=2816, heads=16, layers=4, vocab=500, tokens=64, ranks=options.ranks)
    components = settings.layers * (4 * 2 * settings.hidden + 3 * (settings.hidden + settings.ffn))
    r = max(1, round(options.millions * 1e6 / components))
    return settings, {"r": r, "lora_alpha": 2.0 * r, "target_modules": [TARGETS]}


def full(options: argparse.Namespace) -> tuple[Settings, dict[str, Any]]:
    """Layers of a model of a billion numbers, all of which are trained."""
    settings = Settings(hidden=2048, ffn=5632, heads=16, vocab=1000, tokens=64, ranks=options.ranks, engine=SMALL_STEPS)
    layer = 4 * settings.hidden**2 + 3 * settings.hidden * settings.ffn
    return replace(settings, layers=max(1, round(options.millions * 1e6 / layer))), {"method": "full"}


def rank_main(rank: int, settings: Settings, adapter: dict[str, Any], saves: int, folder: Path) -> None:
    join(rank, settings.ranks, folder)
    run = Run(settings, adapter, folder)
    result = run.measured(saves)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    run.saver.close()
    torch.distributed.destroy_process_group()


class Run:
    """An engine, and what saves its state into `folder`."""

    def __init__(self, settings: Settings, adapter: dict[str, Any], folder: Path) -> None:
        import deepspeed

        from dora_dist import build_model
        from dora_dist.adapters.methods import chosen
        from dora_dist.checkpoint.adapter_of_model import Origin
        from dora_dist.checkpoint.saving import Saver
        from dora_dist.config import AdapterConfig

        section, config = AdapterConfig(**adapter), settings.deepspeed_config()
        self.folder = folder
        self.model = build_model(str(folder / "base"), section, deepspeed=config).model
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(self.trained)
        self.engine = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)[0]
        self.ids = torch.ones(1, settings.tokens, dtype=torch.int64, device=self.engine.device)
        origin = Origin(method=chosen(section), base_model="base")
        self.saver = Saver(self.engine, self.model, origin, run_dir=folder, timeout_s=600.0)

    def measured(self, saves: int) -> dict[str, Any]:
        """Times in seconds, and sizes in bytes, those of memory of the worst rank (collective)."""
        from dora_dist.checkpoint.format import load_checkpoint

        alone = statistics.median([self._step() for _ in range(4)][1:])
        first, _, peak = self._save_and_wait(0)
        peaks, whole, stalls, meanwhile = [peak], [], [], []
        for _ in range(saves):
            torch.distributed.barrier()
            _, seconds, peak = self._save_and_wait(1)
            whole.append(seconds)
            peaks.append(peak)
            self._step()
            torch.distributed.barrier()
            self.saver.save(self.folder / "checkpoint-1", {"step": 1}, {})
            meanwhile.append(self._step())
            stalls.append(self._ended().stall_s)
        with Memory() as load:
            load_checkpoint(self.folder / "checkpoint-1", self.engine, self.model)
        added = torch.tensor([max(peaks), load.added], device=self.engine.device)
        torch.distributed.all_reduce(added, op=torch.distributed.ReduceOp.MAX)
        save_peak, load_peak = added.tolist()
        files = [p for p in (self.folder / "checkpoint-1").rglob("*") if p.is_file()]
        return {
            "trained": sum(p.ds_numel for p in self.trained),
            "bytes": sum(file.stat().st_size for file in files),
            "step_s": alone,
            "synchronous_s": whole,
            "stall_s": stalls,
            "step_during_save_s": meanwhile,
            "save_peak_bytes": save_peak,
            "load_peak_bytes": load_peak,
            "state_bytes": 12 * sum(p.ds_tensor.ds_numel for p in self.trained),
            "first_stall_s": first.stall_s,
            "share": statistics.median(stalls) / statistics.median(whole),
        }

    def _now(self) -> float:
        """Seconds, once the device has done what it was given."""
        from deepspeed.accelerator import get_accelerator

        get_accelerator().synchronize()
        return time.perf_counter()

    def _step(self) -> float:
        started = self._now()
        self.engine.backward(self.engine(input_ids=self.ids, labels=self.ids).loss)
        self.engine.step()
        return self._now() - started

    def _save_and_wait(self, step: int) -> tuple[Any, float, int]:
        """What the saver says of it, its seconds, and the memory that it added."""
        started = self._now()
        with Memory() as memory:
            self.saver.save(self.folder / f"checkpoint-{step}", {"step": step}, {})
            self.saver.wait()
        seconds = self._now() - started
        return self._ended(), seconds, memory.added

    def _ended(self) -> Any:
        self.saver.wait()
        ended = self.saver.ended()
        assert ended is not None and ended.failure is None, ended
        return ended


class Memory:
    """The most resident memory of this process inside the context, beyond what there was before: `added`, in bytes."""

    def __enter__(self) -> "Memory":
        reset_peak_rss()
        self.before, self.added = peak_rss(), 0
        return self

    def __exit__(self, *_: object) -> None:
        self.added = peak_rss() - self.before


if __name__ == "__main__":
    main()
