"""Every row of the tables is answered as it says: no traceback, nothing accepted without a word, on 1 and 2 ranks."""

import io
import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest

from dora_dist import cli
from dora_dist.runtime.exit_codes import DONE
from tests import toy
from tests.bad_inputs import (
    adapters,
    bases,
    data,
    data_of_pictures,
    data_of_tasks,
    data_of_texts,
    evaluating,
    making,
    runs,
    settings,
    using,
    weights,
)
from tests.bad_inputs.case import Case, Folder, Words
from tests.ranks import run_ranks

TABLES = {
    "adapters": adapters.CASES,
    "bases": bases.CASES,
    "data": data.CASES,
    "evaluating": evaluating.CASES,
    "making": making.CASES,
    "pictures": data_of_pictures.CASES,
    "runs": runs.CASES,
    "settings": settings.CASES,
    "tasks": data_of_tasks.CASES,
    "texts": data_of_texts.CASES,
    "using": using.CASES,
    "weights": weights.CASES,
}
ROWS = {f"{area}-{case.name}": case for area, table in TABLES.items() for case in table}
RUNS = [pytest.param(name, world, id=f"{name}-{world}") for name, case in ROWS.items() for world in case.ranks]
IDS = {f"test_answer[{name}-{world}]" for name, case in ROWS.items() for world in case.ranks}
Answer = tuple[int | str | None, str]


def test_the_tables_are_large_and_their_names_are_unique() -> None:
    assert len(ROWS) == sum(map(len, TABLES.values()))
    assert len({(case.says, case.make) for case in ROWS.values()}) == len(ROWS)


def answers(cases: list[tuple[str, str, list[Words]]]) -> dict[str, Answer]:
    """On a rank: run each case's commands inside its folder. Exit status and text of its last, by name."""
    from accelerate.state import AcceleratorState

    found: dict[str, Answer] = {}
    for name, folder, commands in cases:
        os.chdir(folder)
        for position, words in enumerate(commands):
            AcceleratorState._reset_state(reset_partial_state=True)
            code, text = answer(words)
            found[name] = code, text
            if position < len(commands) - 1 and code != DONE:
                found[name] = f"{words} ended with {code}", text
                break
    return found


def answer(words: Words) -> Answer:
    """Exit status and everything printed by one command; an exception that no command handles is a status, too."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            code: Any = cli.main(words)
        except SystemExit as left:
            code = left.code
        except Exception as error:
            import traceback

            code = repr(error)
            traceback.print_exc()
    return code, said.getvalue()


@pytest.fixture(scope="module")
def answered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Any]:
    """What every rank answered to a case on a number of ranks: all selected cases of a world size share its ranks."""
    calls = [item.callspec for item in request.session.items if isinstance(item, pytest.Function) and item.name in IDS]
    selected = [(call.params["name"], call.params["world"]) for call in calls]
    toys = tmp_path_factory.mktemp("toys")
    toy.base_model(toys / "base")
    results: dict[int, list[dict[str, Answer]]] = {}

    def of(name: str, world: int) -> list[Answer]:
        if world not in results:
            cases = []
            for each in [each for each, its_world in selected if its_world == world]:
                folder = tmp_path_factory.mktemp(f"{each}-{world}")
                cases.append((each, str(folder), ROWS[each].commands(Folder(folder, toys))))
            results[world] = run_ranks(answers, world, cases, timeout=600)
        return [found[name] for found in results[world]]

    return of


@pytest.mark.parametrize(("name", "world"), RUNS)
def test_answer(name: str, world: int, answered: Callable[[str, int], list[Answer]]) -> None:
    case: Case = ROWS[name]
    for rank, (code, text) in enumerate(answered(name, world)):
        assert code == case.code, f"rank {rank}:\n{text}"
        assert "Traceback" not in text, text
        if rank == 0 or case.code != DONE:
            for words in case.says:
                assert words in text, f"rank {rank} does not say {words!r}:\n{text}"
