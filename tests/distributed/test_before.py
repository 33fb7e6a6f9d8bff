"""What the code before the rebuild wrote: configurations load, checkpoints go on, adapters merge and start runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dora_dist.config import RunConfig
from tests.before import cases
from tests.ranks import run_ranks

EXPECTED: dict[str, Any] = json.loads(cases.EXPECTED.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files: runs that go on write into their folders."""
    return shutil.copytree(cases.KEPT, tmp_path_factory.mktemp("before") / "files")


@pytest.fixture(scope="module")
def gone_on(folder: Path) -> dict[str, dict[int, float]]:
    """Every run resumed in a copy of its folder, and a new one that starts from an adapter; losses by step."""
    for name in cases.CASES:
        shutil.copytree(folder / name, folder / "resumed" / name)
    runs = {name: cases.resumed(name, folder, folder / "resumed" / name) for name in cases.CASES}
    for raw in runs.values():  # which had no other form; a run that goes on has to say so
        raw["adapter"] |= {"component_scale": "paper"}
    runs["started"] = cases.started(folder, folder / "started")
    return dict(zip(runs, run_ranks(cases.train, 2, *runs.values())[0], strict=True))


@pytest.fixture(scope="module")
def exact(folder: Path) -> bool:
    """Whether this machine computes as the one that made the files: the last bit depends on processor and libraries."""
    return bool(run_ranks(cases.arithmetic, 2, folder)[0] == EXPECTED["arithmetic"])


@pytest.mark.parametrize("name", [*cases.CASES, "started"])
def test_losses_go_on_as_before(gone_on: dict[str, dict[int, float]], exact: bool, name: str) -> None:
    expected = {int(step): loss for step, loss in EXPECTED["losses"][name].items()}
    assert gone_on[name] == (expected if exact else pytest.approx(expected, rel=1e-5))


@pytest.mark.parametrize("name", cases.CASES)
def test_a_checkpoint_merges_as_before(folder: Path, tmp_path: Path, name: str) -> None:
    found = cases.merged(name, folder, tmp_path / "merged")
    assert found == pytest.approx(EXPECTED["merged"][name], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", cases.CASES)
def test_a_checkpoint_is_evaluated_as_before(folder: Path, tmp_path: Path, name: str) -> None:
    found = cases.evaluated(name, folder, tmp_path / "result.json")
    expected = EXPECTED["evaluated"][name]
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", cases.CASES)
def test_the_configuration_that_a_run_wrote_says_the_same(name: str) -> None:
    written = json.loads((cases.KEPT / name / "config.json").read_text())
    assert same_where_written(json.loads(RunConfig.load(cases.KEPT / name / "config.json").to_json()), written)


@pytest.mark.parametrize("file", sorted((cases.KEPT / "configs").iterdir()), ids=lambda file: file.stem)
def test_a_recipe_means_what_it_meant(file: Path) -> None:
    meant = cases.with_defaults(file, json.loads((cases.KEPT / "defaults.json").read_text()))
    assert same_where_written(json.loads(RunConfig.load(file).to_json()), meant)


def same_where_written(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether every field that was known then has its value; there may be new ones."""
    return {section: {name: now[section][name] for name in fields} for section, fields in before.items()} == before
