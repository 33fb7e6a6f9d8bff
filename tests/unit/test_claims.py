"""The parts of benchmarks/claims.py: what is compared and how, texts, and differences beside their definitions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_dist.adapters.methods import FullFineTuning, Vera, WeightDecomposed, chosen
from dora_dist.config import RunConfig
from dora_dist.runtime.errors import UserError
from tests import toy

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def found_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_every_method_is_a_configuration_at_both_sizes(tmp_path: Path) -> None:
    import claims
    from claimbench.methods import METHODS
    from claimbench.runs import Run, Settings, options_of
    from claimbench.tasks import TASKS

    settings = Settings(tmp_path, 120, 16, 2)
    kinds: dict[str, Any] = {}
    for name, method in METHODS.items():
        for r in claims.sizes(method, 16, half=True):
            run = Run(TASKS["sarcasm"], name, method, r, 1e-3, 1, "test")
            options = options_of(run, settings, tmp_path / "run")
            config = RunConfig.load(ROOT / method.recipe, options)
            kinds[name, r] = chosen(config.adapter)
            if method.sized:
                assert config.adapter.r == r
                assert config.adapter.lora_alpha == (2 * r if method.scaled else 32)
            assert config.training.max_steps == 120
            RunConfig.load(
                ROOT / method.recipe, options_of(replace(run, task=TASKS["news"]), settings, tmp_path / "run")
            )
    assert len(kinds) == 2 * 5 + 2
    assert isinstance(kinds["full", 16], FullFineTuning)
    dvora = kinds["dvora", 16]
    assert isinstance(dvora, WeightDecomposed) and isinstance(dvora.update, Vera)
    square = (576, 576)
    counts = {
        key: sum(torch.Size(i.shape).numel() for i in kinds[key].parameters(square).values())
        for key in kinds
        if key != ("full", 16)
    }
    assert counts["lora", 16] == 2 * counts["lora", 8]
    assert 0.97 * counts["lora", 16] < counts["mora", 16] <= counts["lora", 16]  # a square of whole rows
    assert counts["dora", 16] == counts["lora", 16] + 576
    assert counts["dynamic", 16] == 24 * (2 * 576 + 1)  # before it is pruned


def test_variants_are_methods_with_options_of_their_own(tmp_path: Path) -> None:
    from claimbench.methods import METHODS, with_variants
    from claimbench.runs import Run, Settings, options_of
    from claimbench.tasks import TASKS

    rates = "'--training.learning_rates={\"lora_gates\": 2e-2}'"
    methods = with_variants([f"gates dynamic --adapter.component_init=paper {rates}"])
    assert list(methods) == [*METHODS, "gates"]
    run = Run(TASKS["sarcasm"], "gates", methods["gates"], 8, 1e-3, 1, "test")
    config = RunConfig.load(ROOT / run.method.recipe, options_of(run, Settings(tmp_path, 120, 16, 2), tmp_path))
    assert config.adapter.component_init == "paper" and config.adapter.dynamic_rank
    assert config.training.learning_rates == {"lora_gates": 2e-2}
    for wrong, says in {
        "lora dynamic --adapter.r=3": "give a name of its own",
        "new dynamic": "give a name of its own",
        "new loha --adapter.r=3": "give a name of its own",
        "new dynamic --adapter.rr=3": "'--adapter.rr=3' is not --section.field=VALUE",
    }.items():
        with pytest.raises(UserError, match=says):
            with_variants([wrong])


def sweep(**runs: list[float]) -> Any:
    from claimbench.rates import Sweep

    return Sweep(0.5, {float(rate): found for rate, found in runs.items()})


def test_rates_are_tried_until_the_best_is_inside() -> None:
    assert sweep(**{"1e-3": [0.6], "2e-3": [0.7, 0.8], "4e-3": [0.75]}).best() == 2e-3
    assert sweep(**{"1e-3": [0.6], "2e-3": [0.7], "4e-3": [0.6]}).beyond() == []
    assert sweep(**{"1e-3": [0.6], "2e-3": [0.7]}).beyond() == [4e-3]
    assert sweep(**{"1e-3": [0.9], "2e-3": [0.7]}).beyond() == [5e-4]


def test_no_rate_is_chosen_next_to_one_at_which_a_run_learnt_nothing() -> None:
    found = sweep(**{"5e-4": [0.7, 0.7], "1e-3": [0.8, 0.8], "2e-3": [0.9, 0.5]})
    assert found.best() == 5e-4
    assert found.beyond() == [2.5e-4]
    assert sweep(**{"1e-3": [0.4], "2e-3": [0.5]}).best() == 2e-3  # there is no other


def test_names_that_nothing_has_are_refused(tmp_path: Path) -> None:
    import claims

    for words, says in {
        "--methods lora loha": "--methods loha: is none of lora, dora, ",
        "--methods dora": "--methods: lora is missing",
        "--methods lora --half dora": "--half dora: is none of lora",
        "--tasks boolq": "--tasks boolq: is none of socialiqa, sarcasm, quartz",
    }.items():
        with pytest.raises(UserError, match=says):
            claims.parse(words.split())
    toy.write_records(tmp_path / "even.train.json", 4)
    assert claims.parse(["--tasks", "even", "sarcasm", "--data", str(tmp_path)]).tasks == ["even", "sarcasm"]


LISTED = (
    "Please choose the correct answer to the question: Who?\n\nAnswer1: he Answer2: she: her\n\n"
    "Answer format: answer1/answer2"
)


def test_records_of_the_papers_tasks_become_questions_with_choices() -> None:
    from claimbench.tasks import of_instructions

    listed, even = of_instructions("t", [{"instruction": LISTED, "answer": "answer2"}, toy.records(2)[1]])
    assert listed["prompt"] == "Question: Who?\n\nAnswer1: he Answer2: she: her\nAnswer:"
    assert (listed["choices"], listed["completion"]) == ([" he", " she: her"], " she: her")
    assert even["prompt"] == "Question: is 1 even?\nAnswer:"
    assert (even["choices"], even["completion"]) == ([" true", " false"], " false")
    assert len(list(of_instructions("t", [toy.records(2)[1]] * 3))) == 1
    with pytest.raises(UserError, match="a record of t does not say its answers: 'Who"):
        list(of_instructions("t", [{"instruction": "Who?", "answer": "he"}]))


def test_splits_share_no_question_and_are_the_same_every_time(tmp_path: Path) -> None:
    from claimbench.tasks import SPLITS, available, prepare, split_file

    toy.write_records(tmp_path / "even.json", 100)
    (tmp_path / "out" / "models" / "smollm2").mkdir(parents=True)  # else one is fetched
    even = available(tmp_path)["even"]
    texts = []
    for _ in range(2):
        prepare(tmp_path / "out", tmp_path / "cache", [even], test=1000, validation=4)
        texts.append([split_file(tmp_path / "out", even, split).read_text().splitlines() for split in SPLITS])
    assert texts[0] == texts[1]
    assert [len(lines) for lines in texts[0]] == [25, 4, 71]  # at most a quarter to test
    assert len({json.loads(line)["prompt"] for lines in texts[0] for line in lines}) == 100


@pytest.fixture
def found(tmp_path: Path) -> Any:
    """Two seeds of LoRA at two sizes and of DoRA on one task of four questions."""
    from claimbench.methods import METHODS
    from claimbench.report import Found, Row
    from claimbench.runs import Settings

    methods = {name: METHODS[name] for name in ("lora", "dora")}
    found = Found(Settings(tmp_path, 10, 4, 2), methods, 16, [1, 2], {("t", "lora"): {1e-3: 0.5}, ("t", "dora"): {}})
    found.baselines, found.steps = {"t": ("before training", 0.25)}, {"t": 10}
    rights = {("lora", 16): ("1000", "1100"), ("lora", 8): ("0000", "1000"), ("dora", 16): ("1110", "1101")}
    for (name, r), right in rights.items():
        row = found.rows.setdefault(("t", name, r), Row(2e-3))
        for each in right:
            row.add({"accuracy": each.count("1") / 4, "right": each, "trained_numbers": 10 * r})
    return found


def test_differences_are_paired_by_seed_and_by_text(found: Any) -> None:
    from claimbench.report import Difference

    difference = Difference.of(found.rows["t", "dora", 16], found.rows["t", "lora", 16])
    by_seed = torch.tensor([0.75 - 0.25, 0.75 - 0.5])
    by_text = torch.tensor([[0.0, 1, 1, 0], [0, 0, 0, 1]]).mean(0)
    assert difference.mean == pytest.approx(float(by_seed.mean())) == pytest.approx(float(by_text.mean()))
    assert difference.spread == pytest.approx(float(by_seed.std()))
    assert difference.of_texts == pytest.approx(float(by_text.std() / 2))


def test_the_table_has_every_method_at_its_sizes(found: Any, tmp_path: Path) -> None:
    from claimbench.report import plot, tables

    lines = [line for line in tables(found).splitlines() if line.startswith(("| LoRA", "| DoRA"))]
    one, two = "+0.3750 ± 0.1768 (0.1250)", "-0.2500 ± 0.0000 (0.1443)"
    assert lines[:3] == [
        "| LoRA, r = 16 | 160 | 0.002 | 0.3750 ± 0.1768 |  |  |",
        f"| DoRA, r = 16 | 160 | 0.002 | 0.7500 ± 0.0000 | {one} | {one} |",
        f"| LoRA, r = 8 | 80 | 0.002 | 0.1250 ± 0.1768 |  | {two} |",
    ]
    assert "| DoRA, r = 16 | +0.3750 ± 0.1768 | +0.3750 ± 0.1768 |" in lines
    json.dumps(found.as_json())
    plot(found, tmp_path / "claims.png")
    assert (tmp_path / "claims.png").read_bytes().startswith(b"\x89PNG")
