"""The table of adapter ranks: a line per layer, an encoder's and a decoder's told apart."""

import sys
from pathlib import Path

import pytest

from dora_dist.adapters.components import Budget, PruningEvent
from dora_dist.analysis.rank_map import rank_table, write_rank_map


def table(by_layer: dict[str, int]) -> list[list[str]]:
    kept = sum(by_layer.values())
    event = PruningEvent(step=9, components=40, pruned=40 - kept, kept=kept, by_layer=by_layer)
    return [line.split() for line in rank_table(event).splitlines()]


def test_layers_of_one_stack_are_numbers() -> None:
    names = {"model.layers.0.self_attn.q_proj": 3, "model.layers.0.mlp.up_proj": 0, "model.layers.1.mlp.up_proj": 7}
    assert table(names) == [["layer", "q_proj", "up_proj"], ["0", "3", "0"], ["1", "7"]]


def test_two_stacks_do_not_hide_each_other() -> None:
    names = {
        "model.encoder.layers.0.self_attn.q_proj": 3,
        "model.decoder.layers.0.self_attn.q_proj": 5,
        "model.decoder.layers.0.encoder_attn.q_proj": 6,
    }
    assert table(names) == [
        ["layer", "q_proj", "encoder_attn.q_proj"],
        ["encoder", "0", "3"],
        ["decoder", "0", "5", "6"],
    ]


def test_without_matplotlib_the_run_goes_on_and_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    event = PruningEvent(step=9, components=40, pruned=30, kept=10, by_layer={"layers.0.up_proj": 10})
    budget = Budget(r=4, start_r=6, first=1, last=9, every=1)
    write_rank_map([event], budget, tmp_path / "rank_map.png")
    assert not (tmp_path / "rank_map.png").exists()
    assert "pip install 'dora-dist[plots]'" in " ".join(capfd.readouterr().err.split())
