"""What the documents take from the code each time the site is built, so that they cannot differ from it.

mkdocs calls the two `on_...` functions (`hooks` in mkdocs.yml). A page says `{{ name }}` on a line of its own where the
text of one of the functions in GENERATED belongs. Formulas, written in LaTeX between dollar signs, become MathML, which
browsers show without a program from a network.
"""

import ast
import html
import io
import json
import os
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from latex2mathml.converter import convert

from dora_dist.cli import main
from dora_dist.config import RunConfig
from dora_dist.config.fields import REQUIRED, FieldSpec, field_specs

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dora_dist"
_PLACE = re.compile(r"^\{\{ (\w+) \}\}$", re.MULTILINE)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the places of a page that are generated."""
    return _PLACE.sub(lambda place: GENERATED[place[1]](), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Make MathML of a page's formulas, and a plain line of a docstring's `Example::`."""
    return _FORMULA.sub(_mathml, content).replace("<p>Example::</p>", "<p>Example:</p>")


def configuration() -> str:
    """A section for each section of the schema, a row for each of its fields."""
    sections: dict[str, list[FieldSpec]] = {}
    for name, spec in field_specs(RunConfig).items():
        sections.setdefault(name.rpartition(".")[0], []).append(spec)
    return "\n\n".join(f"{_about(section)}\n\n{_table(specs)}" for section, specs in sections.items())


def command_line() -> str:
    """`--help` of every command, without the options that stand for the configuration's fields."""
    names = re.findall(r"^    ([a-z][a-z-]+)\b", _help(), re.MULTILINE)
    pages = [f"## {name}\n\n```text\n{_without_fields(_help(name))}\n```" for name in names]
    return "\n\n".join([f"```text\n{_help()}\n```", *pages])


def exit_codes() -> str:
    """A row for each constant of runtime/exit_codes.py, with the comment behind it."""
    found = re.findall(r"^([A-Z_]+) = (\d+)(?:  # (.+))?$", (PACKAGE / "runtime/exit_codes.py").read_text(), re.M)
    rows = [f"| {code} | `{name}` | {meaning} |" for name, code, meaning in found]
    return "\n".join(["| code | name | meaning |", "|---|---|---|", *rows])


def layers() -> str:
    """The import contract of pyproject.toml as a drawing: a package may import from the rows below its own."""
    [contract] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rows = [re.split(r" [|:] ", row) for row in contract["layers"]]
    width, height, gap = 960, 62, 10
    drawn: list[str] = []
    for place, packages in enumerate(rows):
        each = (width - gap * (len(packages) - 1)) / len(packages)
        for column, package in enumerate(packages):
            drawn += _box(package, column * (each + gap), place * (height + gap), each, height)
    return (
        f'<figure><svg class="drawing" viewBox="0 0 {width} {len(rows) * (height + gap)}" role="img" '
        'aria-label="The layers of dora_dist; imports go down only" fill="currentColor" font-family="sans-serif" '
        f'font-size="13">{"".join(drawn)}</svg></figure>'
    )


def tree() -> str:
    """Every package and module with the first sentence of its docstring."""
    packages = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))
    return "\n\n".join(map(_modules, packages))


GENERATED: dict[str, Callable[[], str]] = {
    function.__name__: function for function in (configuration, command_line, exit_codes, layers, tree)
}


def _about(section: str) -> str:
    field = RunConfig.model_fields.get(section)
    text = field.annotation.__doc__ if field is not None and field.annotation is not None else ""
    return f"## {section}\n\n{text}" if section else "## Top level"


def _table(specs: list[FieldSpec]) -> str:
    rows = [
        f"| `{spec.name}` | {_default(spec)} | {_cell(spec.description)} | {_cell(spec.expected())} |" for spec in specs
    ]
    return "\n".join(["| field | default | meaning | may be |", "|---|---|---|---|", *rows])


def _default(spec: FieldSpec) -> str:
    return "required" if spec.default is REQUIRED else f"`{json.dumps(spec.default)}`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")


def _help(*command: str) -> str:
    shown = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="96"), redirect_stdout(shown), suppress(SystemExit):
        main([*command, "--help"])
    return shown.getvalue().rstrip()


def _without_fields(text: str) -> str:
    """The text up to the first section of fields, and a word about where they are."""
    start = re.search(rf"^({'|'.join(RunConfig.model_fields)}):$", text, re.MULTILINE)
    return text if start is None else f"{text[: start.start()]}SECTION.FIELD is any field of the configuration."


def _mathml(formula: re.Match[str]) -> str:
    block = formula[1] == "div"
    drawn = convert(html.unescape(formula[2]).strip(), display="block" if block else "inline")
    return f'<span class="formula">{drawn}</span>' if block else drawn


def _box(package: str, x: float, y: float, width: float, height: float) -> Iterator[str]:
    yield f'<rect x="{x + 1}" y="{y + 1}" width="{width - 2}" height="{height - 2}" rx="6" fill="none" '
    yield 'stroke="currentColor" stroke-opacity="0.45"/>'
    yield f'<text x="{x + 12}" y="{y + 21}" font-weight="bold">{package.removeprefix("dora_dist.")}</text>'
    lines = textwrap.wrap(_summary(ROOT / package.replace(".", "/") / "__init__.py").replace("`", ""), int(width / 7.2))
    for line, text in enumerate(lines[:2]):
        yield f'<text x="{x + 12}" y="{y + 38 + 15 * line}" fill-opacity="0.75">{html.escape(text)}</text>'


def _modules(package: Path) -> str:
    name = package.relative_to(ROOT).as_posix()
    modules = sorted(path for path in package.glob("*.py") if path.name != "__init__.py")
    rows = [f"| `{path.name}` | {_cell(_summary(path))} |" for path in modules]
    head = f"### {name}/\n\n{_summary(package / '__init__.py')}"
    return "\n".join([head, "", "| module | what it is |", "|---|---|", *rows]) if rows else head


def _summary(module: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(module.read_text())) or ""
    return " ".join(text.partition("\n\n")[0].split())


if __name__ == "__main__":
    for _function in GENERATED.values():
        print(_function(), "\n")
