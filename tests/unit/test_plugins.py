"""Modules named in a configuration that register further methods, storages, tasks and families."""

import sys
from pathlib import Path

import pytest

from dora_dist import cli
from dora_dist.runtime import plugins
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.exit_codes import USERS_MISTAKE

RECIPE = str(Path(__file__).parents[2] / "configs/quickstart.json")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that modules are imported from; what is imported in the test is forgotten after it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_a_plugin_is_imported_once_in_a_process(folder: Path) -> None:
    note = folder / "note"
    (folder / "counted.py").write_text(f"with open({str(note)!r}, 'a') as note: note.write('x')")
    plugins.load(["counted"])
    plugins.load(["counted", "counted"])
    assert note.read_text() == "x"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("absent", None, 'plugins = "absent": there is no such Python module; install it, or name the folder'),
        ("absent.inner", None, 'plugins = "absent.inner": there is no such Python module'),
        ("needy", "import absent_too", 'plugins = "needy": needs the module absent_too, which is missing; install it'),
        ("broken", "1 / 0", 'plugins = "broken": cannot be imported (ZeroDivisionError: division by zero)'),
        ("unread", "def :", 'plugins = "unread": cannot be imported (SyntaxError: invalid syntax'),
        (".near", None, 'plugins = ".near": cannot be imported (TypeError'),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named_with_the_remedy(
    folder: Path, name: str, content: str | None, says: str
) -> None:
    if content is not None:
        (folder / f"{name}.py").write_text(content)
    with pytest.raises(UserError) as caught:
        plugins.load([name])
    assert says in str(caught.value)


def test_a_command_names_its_own_option() -> None:
    with pytest.raises(UserError, match='^--plugins = "absent": '):
        plugins.load(["absent"], "--plugins")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["validate", RECIPE, "--no-files", "--plugins=absent"], 'plugins = "absent": there is no such Python module'),
        (["train", "--config", RECIPE, "--plugins=absent"], 'plugins = "absent": there is no such Python module'),
        (["consolidate", "run", "--output=merged", "--plugins", "absent"], '--plugins = "absent": there is no such'),
        (["evaluate", "run", "--tasks", "a=b.json", "--plugins", "absent"], '--plugins = "absent": there is no such'),
    ],
)
def test_commands_import_plugins_before_they_do_anything(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == USERS_MISTAKE
    assert says in capsys.readouterr().err
