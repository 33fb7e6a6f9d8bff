"""The weight-decomposition analysis: its numbers on whole weights, its file, and the figure's command."""

import csv
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dora_dist import build_model
from dora_dist.adapters.methods import NoUpdate, WeightDecomposed
from dora_dist.adapters.norms import NormRefresher
from dora_dist.adapters.row_changes import RowChange
from dora_dist.adapters.storage.plain import PlainStorage
from dora_dist.analysis.decomposition import Moved, Recording, moved, read_recordings
from dora_dist.analysis.figure import what_colours_say
from dora_dist.analysis.points import Point, evenly
from dora_dist.checkpoint import run_folder
from dora_dist.cli import main
from dora_dist.config import AdapterConfig, AnalysisConfig, ModelConfig
from dora_dist.runtime.distributed import World
from dora_dist.runtime.errors import UserError
from dora_dist.training.recording import AnalysisCallback
from tests import toy
from tests.unit.test_methods import NAMES, OUT, delta, random_layer, update


def defined(w: Tensor, v: Tensor, magnitude: Tensor) -> tuple[float, float]:
    """ΔM and ΔD as the paper writes them, in fp64."""
    w, v = w.detach().double(), v.detach().double()
    cosine = (w * v).sum(1) / (w.norm(dim=1) * v.norm(dim=1))
    return float((magnitude.detach().double() - w.norm(dim=1)).abs().mean()), float((1 - cosine).mean())


@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["far", "near"])
@pytest.mark.parametrize("decomposed", [True, False], ids=["decomposed", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_every_method_are_the_definitions(name: str, decomposed: bool, size: float) -> None:
    layer = random_layer(WeightDecomposed(update(name)))
    with torch.no_grad():
        for parameter in layer.adapter_parameters().values():
            parameter.mul_(size)
    own = {kind: p.detach().double() for kind, p in layer.adapter_parameters().items()}
    v = layer.weight.double() + delta(layer, own)
    magnitude = layer.weight.double().norm(dim=1) + own["magnitude_offset"]
    if not decomposed:
        weighted, layer = layer, random_layer(update(name))
        layer.load_state_dict(weighted.state_dict(), strict=False)
        magnitude = v.norm(dim=1)
    norms = NormRefresher(layer)
    found = moved(norms.record({"it": layer}))["it"]
    assert (found.delta_m, found.delta_d) == pytest.approx(defined(layer.weight, v, magnitude), rel=2e-5)
    assert (found.rows, found.magnitude) == (OUT, pytest.approx(float(magnitude.detach().mean()), rel=1e-6))
    assert norms.refreshes == 1
    assert (layer.norm is not None) == decomposed


def test_magnitudes_alone_turn_nothing() -> None:
    layer = random_layer(WeightDecomposed(NoUpdate()))
    found = moved(NormRefresher(layer).record({"it": layer}))["it"]
    assert found.delta_d == 0
    assert found.delta_m == pytest.approx(
        float(layer.get_parameter("magnitude_offset").detach().abs().mean()), rel=1e-6
    )


@pytest.mark.parametrize("turn", [0.5, 2.0, 3.0])
def test_rows_of_zeros_are_left_out_and_any_angle_is_found(turn: float) -> None:
    w, v = torch.zeros(4, 2), torch.zeros(4, 2)
    w[0], v[0] = torch.tensor([2.0, 0.0]), torch.tensor([torch.cos(torch.tensor(turn)), torch.sin(torch.tensor(turn))])
    w[1] = v[1] = torch.ones(2)
    v[2] = 1.0  # has no direction to have turned from
    d = v - w
    change = RowChange(w.square().sum(1), (w * d).sum(1), d.square().sum(1))
    found = moved({"it": change})["it"]
    assert found.rows == 2
    assert found.delta_d == pytest.approx(float(1 - torch.cos(torch.tensor(turn))) / 2, rel=1e-6)
    assert found.delta_m == pytest.approx(0.5, rel=1e-6)
    assert moved({"it": RowChange(*torch.zeros(3, 4))})["it"] == Moved(None, None, 0)


def test_what_is_recorded_are_the_layers_that_move_and_a_wrong_pattern_is_refused(tmp_path: Path) -> None:
    base = toy.base_model(tmp_path / "base", tie_word_embeddings=True)
    world = World(rank=0, world_size=1, local_rank=0, local_world_size=1, host="here", launcher="none")

    def recorded(
        adapter: dict[str, Any], modules: list[str], *, pruned: bool = False, every: int | None = 1
    ) -> tuple[list[str], list[str]]:
        section, options = AdapterConfig(**adapter), AnalysisConfig(every=every, modules=modules)
        run = build_model(ModelConfig(path=str(base), dtype="fp32"), section)
        callback = AnalysisCallback(run, options, method="", world=world, run_dir=tmp_path, pruned=pruned)
        return list(callback.adapted), list(callback.trained)

    layers = [f"model.layers.{n}" for n in range(2)]
    both = {"target_modules": ["q_proj"], "trained_modules": ["up_proj", "input_layernorm"]}
    queries, trained = ([f"{layer}.{end}" for layer in layers] for end in ("self_attn.q_proj", "mlp.up_proj"))
    assert recorded(both, []) == (queries, trained)
    assert recorded(both, ["0.self_attn.q_proj"]) == (queries[:1], [])
    adapted, trained = recorded({"method": "full"}, [])
    assert (adapted, len(trained)) == ([], 2 * 7)  # not lm_head, whose weight is the embedding's
    with pytest.raises(UserError, match=r"analysis\.modules: 'k_proj' matches none .*: q_proj \(2\), up_proj \(2\)"):
        recorded(both, ["k_proj"])
    assert recorded(both, ["k_proj"], pruned=True) == ([], [])
    with pytest.raises(UserError, match=r"analysis\.every = 1: this run neither adapts nor trains a linear layer"):
        recorded({"method": "full", "target_modules": ["norm"]}, [])
    assert recorded({"method": "full", "target_modules": ["norm"]}, [], every=None) == ([], [])
    assert recorded(both, [], every=None) == (queries, [])  # without being asked no base is read
    with pytest.raises(UserError, match=r"analysis\.modules: 'k_proj' matches none"):
        recorded(both, ["k_proj"], every=None)


def recording(step: int, slope: float, method: str = "DoRA", layers: int = 3) -> Recording:
    """Query matrices on a line of this slope, value matrices on one of the opposite slope."""
    matrices = {}
    for layer in range(layers):
        for name, sign in (("q_proj", 1), ("v_proj", -1), ("down_proj", 0)):
            x = step * (layer + 1) / 1000
            matrices[f"model.layers.{layer}.{name}"] = Moved(1 + sign * slope * x, x, 7)
    return Recording(step, method, matrices)


def run_with(folder: Path, *recordings: Recording) -> Path:
    folder.mkdir()
    (folder / run_folder.ANALYSIS).write_text("".join(r.line() for r in recordings))
    return folder


def test_a_file_of_recordings_is_read_without_the_line_that_a_killed_process_began(tmp_path: Path) -> None:
    written = [recording(2, 1.0), recording(4, 1.0)]
    file = run_with(tmp_path / "run", *written) / run_folder.ANALYSIS
    with file.open("a") as end:
        end.write('{"step": 6, "meth')
    assert read_recordings(file) == written
    run_folder.forget_after(tmp_path / "run", 3)
    assert read_recordings(file) == written[:1]
    file.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"analysis\.jsonl, line 1: not a recording"):
        read_recordings(file)


def test_recordings_are_evenly_spaced_and_the_last_is_among_them() -> None:
    every = [recording(step, 1.0) for step in range(1, 11)]
    assert [r.step for r in evenly(every, 4)] == [3, 5, 8, 10]
    assert evenly(every, 20) == every
    assert [r.step for r in evenly(every, 1)] == [10]


def test_the_command_draws_panels_and_writes_what_they_show(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    up = run_with(tmp_path / "up", *(recording(step, 2.0) for step in (1, 2, 3, 4, 5)))
    down = run_with(tmp_path / "down", *(recording(step, -2.0, "LoRA") for step in (1, 2, 3, 4)))
    figure = tmp_path / "new" / "figure.png"
    assert main(["analyze", str(up), f"mine={down}", "--output", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    panels = json.loads(figure.with_suffix(".json").read_text())["panels"]
    assert [(panel["title"], panel["steps"]) for panel in panels] == [("DoRA", [2, 3, 4, 5]), ("mine", [1, 2, 3, 4])]
    for panel, sign in zip(panels, (1, -1), strict=True):
        assert panel["correlations"]["query"] == pytest.approx(sign)
        assert panel["correlations"]["value"] == pytest.approx(-sign)
        assert abs(panel["correlations"]["all"]) < 0.1
    rows = list(csv.DictReader(figure.with_suffix(".csv").read_text().splitlines()))
    assert len(rows) == 2 * 4 * 3 * 2
    assert rows[0] == {
        "panel": "DoRA",
        "run": str(up),
        "kind": "query",
        "matrix": "model.layers.0.q_proj",
        "step": "2",
        "delta_d": "0.002",
        "delta_m": "1.004",
    }
    table = capfd.readouterr().out.splitlines()
    assert table[1].split() == ["DoRA", "24", "+1.00", "-1.00", "+0.00"]
    drawing = tmp_path / "figure.svg"
    together = [f"both={up}", f"both={down}", "--modules", r".*\.(q|v)_proj", "down_proj", "--steps", "1", "3"]
    assert main(["analyze", *together, "--output", str(drawing)]) == 0
    [panel] = json.loads(drawing.with_suffix(".json").read_text())["panels"]
    assert panel["steps"] == [1, 3] and panel["correlations"]["down_proj"] is None
    assert set(panel["by_run"]) == {str(up), str(down)}
    assert "</svg>" in drawing.read_text()
    again = ["analyze", str(up), "--output", str(figure)]
    assert main(again) == 2
    assert main([*again, "--overwrite"]) == 0
    figure.unlink()
    assert main(again) == 2  # its numbers are there, or somebody else's file of that name
    assert "figure.csv already exists" in " ".join(capfd.readouterr().err.split())


def test_runs_of_one_name_have_panels_of_their_own(tmp_path: Path) -> None:
    runs = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        runs.append(run_with(tmp_path / place / "train", recording(1, 1.0), recording(2, 1.0)))
    figure = tmp_path / "figure.png"
    assert main(["analyze", *map(str, runs), f"DoRA={runs[0]}", "--output", str(figure)]) == 0
    panels = json.loads(figure.with_suffix(".json").read_text())["panels"]
    assert [panel["title"] for panel in panels] == ["DoRA (a/train)", "DoRA (b/train)", "DoRA"]
    assert [panel["runs"] for panel in panels] == [[str(runs[0])], [str(runs[1])], [str(runs[0])]]


def points_at(*steps: int) -> list[Point]:
    return [Point("run", "query", "q", step, place, len(steps), 0.0, 0.0) for place, step in enumerate(steps)]


def test_a_colour_is_a_step_or_else_a_share_of_the_run() -> None:
    def named(*runs: list[Point]) -> list[list[str]]:
        when = what_colours_say([point for run in runs for point in run])
        return [[when(point)[1] for point in run] for run in runs]

    steps = ["step 10", "step 20", "step 30", "step 40"]
    assert named(points_at(10, 20, 30, 40), points_at(10, 20)) == [steps, steps[:2]]
    shares = [f"{percent}% of a run's recordings" for percent in (25, 50, 75, 100)]
    assert named(points_at(10, 20, 30, 40), points_at(5, 15)) == [shares, shares[1::2]]


def test_a_pass_that_refreshes_and_records_decodes_each_block_once() -> None:
    layer = random_layer(WeightDecomposed(update("lora")))
    decoded: list[Any] = []
    norms, to_fp32 = NormRefresher(layer), PlainStorage.to_fp32
    norms.refresh()
    kept = layer.norm

    def counted(*span: Any, **options: Any) -> Tensor:
        decoded.append(span)
        return to_fp32(*span, **options)

    with patch.object(PlainStorage, "to_fp32", counted):
        norms.record({"": layer})
    assert len(decoded) == 1
    assert kept is not None and torch.equal(layer.norm, kept)


REFUSED: list[tuple[list[str], str]] = [
    (["nowhere"], "nowhere/analysis.jsonl: No such file or directory; a run writes it with --analysis.every N"),
    (["run", "--modules", "k_proj"], "'k_proj' matches no matrix in run/analysis.jsonl; it has: q_proj, v_proj, down_"),
    (["run", "--modules", "q_proj", "q_proj"], "--modules: a pattern is given twice"),
    (["run", "--modules", "("], "--modules: '(' is neither a module name nor a regular expression"),
    (["run", "--steps", "3"], "--steps: run/analysis.jsonl has no recording of step 3; it has: 2"),
    (["run", "--output", "figure"], "--output figure: give a name that ends in .png, .svg or .pdf"),
    (["empty"], "empty/analysis.jsonl: holds no recording yet"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: " ".join(value) if value is list else None)
def test_what_cannot_be_drawn_is_refused_by_name(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    run_with(tmp_path / "run", recording(2, 1.0))
    run_with(tmp_path / "empty")
    assert main(["analyze", *words]) == 2
    assert message in " ".join(capfd.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "run"]
