"""Packages that only some users have: a message names the extra that brings them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dora_dist.runtime import extras
from dora_dist.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    extras.need("scipy", purpose="this")
    with pytest.raises(UserError, match=r"^this needs the package scikit-learn; pip install 'dora-dist\[metrics\]'$"):
        extras.need("sklearn", "scipy", purpose="this")
    assert extras.missing("PIL", "sklearn") == (
        "needs the package pillow and scikit-learn; pip install 'dora-dist[images,metrics]'"
    )
    assert extras.missing("a_plugins_own") == "needs the package a_plugins_own; pip install a_plugins_own"


def test_each_extra_brings_what_the_messages_say_and_all_brings_every_extra() -> None:
    optional = PROJECT["optional-dependencies"]
    for package, extra in extras.BROUGHT_BY.values():
        assert any(re.split(r"[<>=]", line)[0] == package for line in optional[extra]), package
        assert not any(re.split(r"[<>=]", line)[0] == package for line in PROJECT["dependencies"]), package
        assert extra in re.search(r"\[(.+)\]", optional["all"][0])[1].split(",")


def test_everything_can_be_imported_without_any_extra() -> None:
    """Each module of the package, in an interpreter that has none of the extras' packages."""
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "dora_dist").rglob("*.py")
        if path.name != "__main__.py"
    )
    program = (
        f"import importlib, sys\nfor name in {list(extras.BROUGHT_BY)}: sys.modules[name] = None\n"
        f"for name in {modules}: importlib.import_module(name)\n"
    )
    imported = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert imported.returncode == 0, imported.stderr


@pytest.mark.parametrize(
    ("module", "format", "extra"), [("sklearn", "pope", "metrics"), ("pycocoevalcap", "captions", "captions")]
)
def test_a_format_that_cannot_be_scored_is_refused_before_a_question_is_asked(
    module: str, format: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dora_dist.tasks.evaluations.questions import check_format

    monkeypatch.setitem(sys.modules, module, None)
    check_format("vqa", "generate")
    with pytest.raises(UserError, match=rf"^--format {format} needs .* pip install 'dora-dist\[{extra}\]'$"):
        check_format(format, "generate")


def test_a_run_whose_metrics_cannot_be_computed_is_refused_before_it_starts() -> None:
    """The real command, in an interpreter without scikit-learn."""
    program = (
        "import sys\nsys.modules['sklearn'] = None\nfrom dora_dist.cli import main\n"
        "sys.exit(main(['validate', 'configs/glue_rte.json', '--no-files']))"
    )
    refused = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2, refused.stderr
    said = " ".join(refused.stderr.split())
    assert 'model.task = "sequence_classification": needs the package scikit-learn;' in said
    assert "pip install 'dora-dist[metrics]'" in said


def test_what_the_package_imports_is_declared_and_nothing_else_is() -> None:
    modules_of = {"protobuf": "google", "pyyaml": "yaml"}
    parts = {"pydantic_core": "pydantic", "tokenizers": "transformers"}  # which bring them, and whose they are
    source = "\n".join(path.read_text() for path in (ROOT / "dora_dist").rglob("*.py"))
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.MULTILINE)) - set(sys.stdlib_module_names)
    imported = {parts.get(module, module) for module in imported} - {"dora_dist", *extras.BROUGHT_BY}
    names = {re.split(r"[<>=]", line)[0] for line in PROJECT["dependencies"]}
    assert {modules_of.get(name, name) for name in names} == imported
