"""benchmarks/step.py as a user types it, scaled down. Nothing about time is asserted."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HIDDEN, FFN, LAYERS, R = 64, 96, 2, 4
SIZES = f"--hidden {HIDDEN} --ffn {FFN} --heads 4 --layers {LAYERS} --tokens 32 --r {R} --vocab 50"
# At this width the engine would keep every weight resident, or fetch the whole model ahead of its first use.
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 1000, "stage3_prefetch_bucket_size": 0}}
TOWER = {"hidden": 32, "ffn": 512, "heads": 2, "layers": 3}
COMPARED = ["dora", "lora", "none", "peft-lora", "peft-dora"]
VARIANTS = [*COMPARED, "gated", "dynamic", "closed", "compacted", "full", "deepspeed-full", "recorded"]
VARIANTS += ["dora-nf4", "dora-selective", "dora-nf4-selective"]
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(FFN, HIDDEN)] * 2 + [(HIDDEN, FFN)]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "step.py"), *SIZES.split(), "--engine", json.dumps(SHARDED), *flags],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one round of every variant writes."""
    output = tmp_path_factory.mktemp("benchmark")
    flags = ("--rounds", "1", "--warmup", "2", "--steps", "2", "--variants", *VARIANTS)
    done = run(*flags, "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert "this project, DoRA" in done.stdout
    return output


@pytest.fixture(scope="module")
def variants(output: Path) -> dict[str, Any]:
    """What was measured of each variant."""
    return json.loads((output / "step.json").read_text())["variants"]


def test_the_plot_is_drawn(output: Path) -> None:
    assert (output / "step.png").read_bytes().startswith(b"\x89PNG")


def test_without_options_adapters_are_compared_with_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from stepbench.settings import parse

    assert parse([])[1].variants == COMPARED


def test_all_variants_train_the_same_model(variants: dict[str, Any]) -> None:
    assert list(variants) == list(VARIANTS)
    for name, entry in variants.items():
        assert len(entry["seconds"]) == 2
        assert len(entry["losses"]) == 2 + 2 + 1  # warm-up, measured, the one with bytes counted
        assert all(math.isfinite(loss) for loss in entry["losses"]), name
        rounded = 0.02 if "nf4" in name else 2**-8  # its base weights are others
        assert entry["first_loss"] == pytest.approx(variants["none"]["first_loss"], rel=rounded)
        assert entry["peak_rss_bytes"] >= entry["peak_rss_steps_bytes"] > 0


def test_keeping_outputs_changes_no_loss(variants: dict[str, Any]) -> None:
    for name in ("dora", "dora-nf4"):
        assert variants[f"{name}-selective"]["losses"] == variants[name]["losses"]


def test_our_adapters_have_the_sizes_of_pefts(variants: dict[str, Any]) -> None:
    trainable = {name: entry["trainable"] for name, entry in variants.items()}
    factors = LAYERS * sum(R * (out + into) for out, into in SHAPES)
    magnitudes = LAYERS * sum(out for out, _ in SHAPES)
    assert trainable["lora"] == trainable["peft-lora"] == factors
    assert trainable["dora"] == trainable["peft-dora"] == factors + magnitudes
    assert trainable["none"] == HIDDEN


def test_bytes_are_counted(variants: dict[str, Any]) -> None:
    """A weight is gathered three times a step with recompute, two times where its outputs are kept; PEFT's DoRA does it
    twice more for its norms.

    A rank of two receives half of each: in bf16 as many bytes as the weight has elements.
    """
    weights = LAYERS * sum(out * into for out, into in SHAPES)
    gathered = {name: entry["received_bytes_by_kind"]["all_gather_into_tensor"] for name, entry in variants.items()}
    for name in (*COMPARED, "dora-selective"):
        times = gathered[name] / weights
        expected = {"peft-dora": 5, "dora-selective": 2}.get(name, 3)
        assert expected <= times <= expected + 0.5, name  # the rest: adapters, embedding, head
    assert 4.25 / 16 < gathered["dora-nf4"] / gathered["dora"] < 0.36  # embedding and head stay plain
    rows = LAYERS * sum(out for out, _ in SHAPES)
    norm_bytes = {name: variants[name]["norm_refresh_bytes"] for name in COMPARED}
    assert norm_bytes == {"dora": 4 * rows, "lora": 0, "none": 0, "peft-lora": 0, "peft-dora": 0}


def test_of_a_llava_projector_and_language_model_train_and_the_tower_is_read_once(tmp_path: Path) -> None:
    tower = [word for name, value in TOWER.items() for word in (f"--tower-{name}", str(value))]
    flags = ("--rounds", "1", "--warmup", "1", "--steps", "1", "--variants", "none", "dora", "peft-lora", "peft-dora")
    done = run("--pictures", "--picture-side", "28", *tower, *flags, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    variants = json.loads((tmp_path / "step.json").read_text())["variants"]
    projector = HIDDEN * (TOWER["hidden"] + 1) + HIDDEN * (HIDDEN + 1)
    factors = LAYERS * sum(R * (out + into) for out, into in SHAPES)
    magnitudes = LAYERS * sum(out for out, _ in SHAPES)
    trained = {"none": 0, "dora": factors + magnitudes, "peft-lora": factors, "peft-dora": factors + magnitudes}
    assert {name: entry["trainable"] - projector for name, entry in variants.items()} == trained
    weights = LAYERS * sum(out * into for out, into in SHAPES)
    in_tower = TOWER["layers"] * (4 * TOWER["hidden"] ** 2 + 2 * TOWER["hidden"] * TOWER["ffn"])
    for name, entry in variants.items():
        rest = entry["received_bytes_by_kind"]["all_gather_into_tensor"] - weights * (5 if name == "peft-dora" else 3)
        assert 1 <= rest / in_tower <= 1.6, name  # a tower with gradients, or recomputed, would be gathered twice


def test_full_fine_tuning_trains_all_that_plain_deepspeed_does(variants: dict[str, Any]) -> None:
    whole = [variants[name]["trainable"] for name in ("full", "deepspeed-full")]
    norms, vocabulary = (2 * LAYERS + 1) * HIDDEN, 2 * 50 * HIDDEN
    assert whole == [LAYERS * sum(out * into for out, into in SHAPES) + norms + vocabulary] * 2
    assert variants["full"]["losses"] == pytest.approx(variants["deepspeed-full"]["losses"], rel=2**-8)


def test_recording_for_the_analysis_receives_three_numbers_a_row(variants: dict[str, Any]) -> None:
    rows = LAYERS * sum(out for out, _ in SHAPES)
    assert variants["recorded"]["norm_refresh_bytes"] >= 3 * 4 * rows  # where norms take one


def test_scoring_and_pruning_are_measured_beside_the_same_layer_without_them(variants: dict[str, Any]) -> None:
    assert variants["gated"]["scoring_share"] == 0 < variants["dynamic"]["scoring_share"]
    assert variants["gated"]["trainable"] == variants["dynamic"]["trainable"]


def test_compaction_drops_exactly_what_closed_gates_leave_idle(variants: dict[str, Any]) -> None:
    start, modules = 3 * R // 2, LAYERS * len(SHAPES)
    opened = [variants[name]["open_components"] // modules for name in ("gated", "closed", "compacted")]
    assert opened == [start, start // 2, start // 2]
    for name, r in (("gated", start), ("closed", start), ("compacted", start // 2)):
        numels = LAYERS * [numel for out, into in SHAPES for numel in (r * into, r * out, r, out)]
        assert variants[name]["trainable"] == sum(numels)
        shards = sum(-(-numel // 2) for numel in numels)  # a rank of two; fp32 master, two moments; Adam's step count
        assert variants[name]["optimizer_bytes"] == 3 * 4 * shards + 4


@pytest.mark.parametrize("whole", [[], ["--full"]])
def test_the_benchmark_of_saves_measures_both_kinds_of_saves(whole: list[str], tmp_path: Path) -> None:
    small = ["--millions", "0.3", "--saves", "1", *whole]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "save.py", *small, "--output", tmp_path],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "save.json").read_text())
    assert len(found["synchronous_s"]) == len(found["stall_s"]) == 1
    assert max(found["save_peak_bytes"], found["load_peak_bytes"]) <= found["state_bytes"] + 300e6
    assert found["bytes"] > 12 * found["trained"] > 12 * 200_000  # fp32 master and two moments, and the adapter itself


def test_a_gathers_cost_on_the_host_does_not_grow_with_the_number_of_ranks(tmp_path: Path) -> None:
    sizes = ["--hidden", "64", "--ffn", "96", "--heads", "4", "--layers", "2", "--worlds", "4", "200"]
    once = ["--rounds", "1", "--warmup", "1", "--steps", "1"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gathers.py", *sizes, *once, "--output", tmp_path],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    few, many = json.loads((tmp_path / "gathers.json").read_text())["worlds"].values()
    assert many["ours"]["operations"] == pytest.approx(few["ours"]["operations"], rel=0.05)
    assert many["DeepSpeed"]["operations"] > 3 * few["DeepSpeed"]["operations"]


def test_a_step_over_a_slow_wire_counts_what_the_interface_receives(tmp_path: Path) -> None:
    once = ["--rounds", "1", "--warmup", "1", "--steps", "1", "--gigabits", "1", "--engine", json.dumps(SHARDED)]
    only = ["--only", "PEFT LoRA", "ours, plain", "ours, int8"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "network.py", *SIZES.split(), *once, *only, "--output", tmp_path],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if os.geteuid() != 0:
        assert done.returncode == 1 and "must run as root" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    [variants] = json.loads((tmp_path / "network.json").read_text())["rates"].values()
    gathered = 3 * LAYERS * sum(out * into for out, into in SHAPES)  # bf16, half of each, three times a step
    packed = variants.pop("ours, int8")
    assert packed["wire_bytes"] < 0.75 * variants["ours, plain"]["wire_bytes"]
    for entry in variants.values():
        assert gathered < entry["wire_bytes"] < 3 * gathered


def test_a_wire_is_taken_down_when_what_happens_on_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from stepbench import wire

    if os.geteuid() != 0:
        assert "must run as root" in wire.missing()[0]
        return
    with pytest.raises(KeyboardInterrupt), wire.wire(1.0) as ends:
        assert all(Path("/run/netns", name).exists() for name in ends.namespaces)
        signal.raise_signal(signal.SIGTERM)
    assert not any(Path("/run/netns", name).exists() for name in ends.namespaces)


def test_the_floor_counts_a_steps_gathers_and_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from floor import floors
    from stepbench.settings import Settings

    layer = {"bytes": 100.0, "forward_seconds": 3.0, "backward_seconds": 4.0}
    measured = {"gather_bytes_per_second": 10.0, "storages": {"plain": layer}}
    found, once = floors(measured, Settings(layers=2, ranks=4)).values()
    assert found["received_bytes"] == 2 * 3 * 75  # three gathers of each layer, of which 3/4 come from others
    assert (found["gather_seconds"], found["product_seconds"]) == (45.0, 2 * (3 + 3 + 4))
    assert (once["received_bytes"], once["product_seconds"]) == (2 * 2 * 75, 2 * (3 + 4))


def test_a_whole_models_files_have_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import whole_model

    monkeypatch.setattr(whole_model, "SHARD_BYTES", 40)
    shapes = {"a": (10,), "b": (5, 2), "c": (3,), "d": (100,)}
    assert whole_model.shards(shapes) == [["a", "b"], ["c"], ["d"]]  # 20 + 20 bytes, 6, and one that is larger


def test_variants_of_different_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from step import check_first_losses, check_sizes

    check_first_losses({"variants": {"dora": {"first_loss": 7.0}, "lora": {"first_loss": 7.01}}})
    with pytest.raises(SystemExit, match="do not compute the same model"):
        check_first_losses({"variants": {"dora": {"first_loss": 7.0}, "lora": {"first_loss": 7.1}}})
    check_sizes({"variants": {"dora": {"trainable": 7}, "lora": {"trainable": 6}, "peft-dora": {"trainable": 7}}})
    with pytest.raises(SystemExit, match="do not train the same parameters"):
        check_sizes({"variants": {"lora": {"trainable": 6}, "peft-lora": {"trainable": 7}}})


def test_summary_takes_medians_over_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from stepbench.report import summary
    from stepbench.settings import Settings

    def ranks(seconds: list[float], peak: int) -> list[dict[str, Any]]:
        common = {
            "device": "test",
            "losses": [1.0],
            "trainable": 1,
            "optimizer_bytes": 12,
            "open_components": 0,
            "received_bytes": {"all_reduce": 3},
        }
        peaks = {"peak_rss_bytes": peak, "peak_rss_steps_bytes": peak, "peak_device_bytes": None}
        refresh = {"norm_refresh_seconds": 0.5, "norm_refresh_bytes": 7, "scoring_seconds": 1.0}
        calls = {"collectives": {"all_reduce": 1}}
        return [{**common, **peaks, **refresh, **calls, "seconds": seconds, "cpu_seconds": seconds}]

    results = {
        "dora": [ranks([2.0, 4.0], 10), ranks([6.0], 30)],
        "peft-lora": [ranks([5.0, 5.0], 20), ranks([50.0], 20)],
    }
    variants = summary(results, Settings())["variants"]
    assert variants["dora"]["median_seconds"] == 4.0
    assert variants["dora"]["min_seconds"] == 2.0
    assert variants["dora"]["ratios"] == {"peft-lora": 0.8}
    assert variants["dora"]["peak_rss_bytes"] == 30
    assert variants["dora"]["norm_refresh_share"] == 0.125
    assert variants["dora"]["scoring_share"] == 0.25


def test_profile_prints_the_operations() -> None:
    done = run("--profile", "dora", "--warmup", "1")
    assert done.returncode == 0, done.stderr
    assert "aten::mm" in done.stdout
    assert "_AdaptedProduct" in done.stdout
