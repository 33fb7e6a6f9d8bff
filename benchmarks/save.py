"""How long training stands still for a checkpoint, and how long writing it takes. `--help` lists the flags.

Ranks save an adapter of 50 million trained numbers by default (600 MB of master weights and moments): every time
once while nothing else happens, and once while training steps go on.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from stepbench.models import TARGETS, write_base
from stepbench.settings import Settings, default_ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, default=50.0, help="trained numbers, in millions (%(default)s)")
    parser.add_argument("--ranks", type=int, default=default_ranks(), help="%(default)s")
    parser.add_argument("--saves", type=int, default=5, help="of each kind (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="folder for JSON (%(default)s)")
    options = parser.parse_args()
    settings = Settings(hidden=1024, ffn=2816, heads=16, layers=4, vocab=500, tokens=64, ranks=options.ranks)
    components = settings.layers * (4 * 2 * settings.hidden + 3 * (settings.hidden + settings.ffn))
    r = max(1, round(options.millions * 1e6 / components))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        base = Path(temporary) / "base"
        base.mkdir()
        write_base(base, settings)
        torch.multiprocessing.spawn(rank_main, (settings, r, options.saves, Path(temporary)), nprocs=settings.ranks)
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
    print(f"written: {options.output / 'save.json'}")


def rank_main(rank: int, settings: Settings, r: int, saves: int, folder: Path) -> None:
    size = str(settings.ranks)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    from dora_dist.runtime import distributed

    distributed.choose_accelerator("auto")  # before DeepSpeed is imported, which settles on one

    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from dora_dist.adapters.inject import by_pattern
    from dora_dist.adapters.methods import LowRank, WeightDecomposed
    from dora_dist.checkpoint.saving import Origin, Saver
    from dora_dist.models.build import build_model
    from dora_dist.zero3.placement import ShardedPlacement

    world = distributed.start()
    method, config = WeightDecomposed(LowRank(r, 2.0 * r)), settings.deepspeed_config()
    model = build_model(folder / "base", by_pattern(method, [TARGETS]), ShardedPlacement(config)).model
    trained = [p for p in model.parameters() if p.requires_grad]
    numbers = sum(p.ds_numel for p in trained)
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained), config=config)[0]
    ids = torch.ones(1, settings.tokens, dtype=torch.int64, device=engine.device)

    def now() -> float:
        """Seconds, once the device has done what it was given."""
        get_accelerator().synchronize()
        return time.perf_counter()

    def step() -> float:
        started = now()
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        return now() - started

    saver = Saver(engine, model, Origin(method=method, base_model="base"), timeout_s=600.0)
    found: dict[str, list[float]] = {"synchronous_s": [], "stall_s": [], "step_during_save_s": []}
    alone = statistics.median([step() for _ in range(4)][1:])
    saver.save(folder / "checkpoint-0", {"step": 0}, {})
    saver.wait()
    first = saver.ended()
    for number in range(1, saves + 1):
        torch.distributed.barrier()
        started = now()
        saver.save(folder / "checkpoint-1", {"step": number}, {})
        saver.wait()
        found["synchronous_s"].append(now() - started)
        saver.ended()
        step()
        torch.distributed.barrier()
        saver.save(folder / "checkpoint-1", {"step": number}, {})
        found["step_during_save_s"].append(step())
        saver.wait()
        ended = saver.ended()
        assert ended is not None and ended.failure is None, ended
        found["stall_s"].append(ended.stall_s)
    if world.first:
        assert first is not None
        written = sum(p.stat().st_size for p in (folder / "checkpoint-1").rglob("*") if p.is_file())
        result: dict[str, Any] = {"trained": numbers, "bytes": written, "step_s": alone, **found}
        result["first_stall_s"] = first.stall_s
        result["share"] = statistics.median(found["stall_s"]) / statistics.median(found["synchronous_s"])
        (folder / "result.json").write_text(json.dumps(result))
    saver.close()
    distributed.stop()


if __name__ == "__main__":
    main()
