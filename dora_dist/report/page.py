"""From runs to HTML: a pure function of what was read, and of the time.

The page runs no script but its own: its Content-Security-Policy names the hashes of the script and of the style that it
holds, and allows nothing from anywhere else. Texts of the run (samples, paths, errors) are escaped by the template.
"""

import base64
import hashlib
import time
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from dora_dist.report import charts, facts, layers, samples
from dora_dist.report.charts import Chart
from dora_dist.report.layers import LayerMap
from dora_dist.report.reading import Run
from dora_dist.runtime.agreement import package_version


def of_run(run: Run, *, now: float, reload_s: float | None = None) -> str:
    """The page of one run, written at `now` (seconds since 1970).

    `reload_s`: the run goes on, and its page is to be read again so often; None: it is not.
    """
    maps = layers.of_run(run)
    drawn, means = charts.of_run(run), layers.curves(run)
    state = facts.state(run, now=now, live=reload_s is not None)
    return _page(
        title=f"{state.word} · {run.title}",
        heading=run.title,
        state=state,
        about=facts.about(run),
        progress=facts.progress(run),
        notes=run.notes,
        tiles=facts.tiles(run),
        charts=drawn,
        layer_charts=means,
        maps=maps,
        samples=samples.of_run(run),
        timeline=facts.timeline(run),
        settings=facts.settings(run),
        versions=facts.versions(run),
        data=_data([*drawn, *means], maps),
        now=now,
        reload_s=reload_s if run.ending is None else None,
    )


def of_runs(runs: Sequence[Run], *, now: float) -> str:
    """The page that compares runs, written at `now` (seconds since 1970)."""
    drawn = charts.of_runs(runs)
    compared = {"runs": runs, "numbers": facts.numbers(runs, now=now), "differing": facts.differing(runs)}
    return _page(
        title=f"{len(runs)} runs compared",
        heading=f"{len(runs)} runs compared",
        about=[run.title for run in runs],
        notes=[f"{run.title}: {note}" for run in runs for note in run.notes],
        compared=compared,
        charts=drawn,
        data=_data(drawn, []),
        now=now,
    )


_NOTHING: dict[str, Any] = {
    "state": None,
    "progress": None,
    "tiles": [],
    "compared": None,
    "layer_charts": [],
    "maps": [],
    "samples": [],
    "timeline": [],
    "settings": [],
    "versions": {},
    "reload_s": None,
}


def _page(*, now: float, **parts: Any) -> str:
    style, script = _asset("page.css"), _asset("charts.js") + _asset("page.js")
    return (
        _environment()
        .get_template("page")
        .render(
            {
                **_NOTHING,
                "table": charts.table,
                "style": Markup(style),
                "script": Markup(script),
                "style_hash": _hash(style),
                "script_hash": _hash(script),
                "version": package_version("dora_dist"),
                "written": round(now),
                "written_text": time.strftime("%Y-%m-%d %H:%M", time.gmtime(now)),
                **parts,
            }
        )
    )


def _data(drawn: Sequence[Chart], maps: Sequence[LayerMap]) -> dict[str, Any]:
    return {"charts": [c.as_json() for c in drawn], "maps": [m.as_json() for m in maps]}


@cache
def _environment() -> Environment:
    made = Environment(
        loader=DictLoader({"page": _asset("page.html")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"value": _value}
    return made


@cache
def _asset(name: str) -> str:
    return files("dora_dist.report").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> Markup:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(f"'sha256-{digest}'")


def _value(number: Any) -> str:
    """A cell of a table of numbers."""
    if number is None:
        return ""
    return f"{number:,}" if isinstance(number, int) else f"{number:.5g}"
