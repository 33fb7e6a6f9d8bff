"""The page of a run: what is read, what is drawn, what is said, and what a hostile text cannot do."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dora_dist.cli import main
from dora_dist.config.outputs import MOST_SAMPLES
from dora_dist.report import charts, facts, layers, page, reading, samples
from dora_dist.report.reading import Run
from dora_dist.runtime.exit_codes import DONE, USERS_MISTAKE
from tests import report_runs

NOW = report_runs.BEGAN + 5000


class Text(HTMLParser):
    """Tags and texts of a page as a browser would see them; scripts and styles are no text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._in: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._in.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._in.pop()

    def handle_data(self, data: str) -> None:
        if not self._in:
            self.text += f" {data}"


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1], parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return reading.read(report_runs.write(tmp_path_factory.mktemp("runs") / "one", report_runs.history()))


@pytest.fixture(scope="module")
def html(run: Run) -> str:
    return page.of_run(run, now=NOW)


def test_the_page_has_all_that_the_folder_tells(html: str) -> None:
    seen = Text(html).text
    titles = ["Loss", "Evaluation: Accuracy", "Learning rate", "Gradient norm", "Throughput", "Peak memory"]
    titles += ["Share of the time", "Component budget", "Rank of each layer", "Change of magnitude, ΔM"]
    titles += ["Change of direction, ΔD", "Generated answers", "What happened", "Settings", "Versions"]
    assert [title for title in titles if f" {title} " not in seen] == []
    assert "4,800,000 parameters trained" in seen
    assert "lost: lost rank 1 (host n1, process 7)" in seen
    assert "went on from checkpoint-60" in seen
    assert "ended without a word" in seen  # the first start was killed
    assert "2.13.0" in seen
    assert len(html) < 300_000


def test_the_settings_have_no_secret(run: Run, tmp_path: Path) -> None:
    folder = report_runs.write(tmp_path / "run", report_runs.history())
    config = json.loads((folder / "config.json").read_text())
    config["engine"]["deepspeed"] = {"comet": {"enabled": True, "api_key": "abcdef"}}
    (folder / "config.json").write_text(json.dumps(config))
    html = page.of_run(reading.read(folder), now=NOW)
    assert "abcdef" not in html + page.of_runs([reading.read(folder), run], now=NOW)
    assert '"api_key": "(not shown)"' in Text(html).text
    assert "(not shown)" not in [setting.value for setting in facts.settings(run)]  # of our own fields none is secret


def test_a_texts_markup_is_text(html: str) -> None:
    found = Text(html)
    assert report_runs.HOSTILE in found.text
    assert [tag for tag, _ in found.tags if tag in ("img", "iframe", "link", "object")] == ["link"]
    assert sum(tag == "script" for tag, _ in found.tags) == 2
    assert "Question <1>?" in found.text


def test_nothing_is_fetched_and_only_the_pages_own_script_may_run(html: str) -> None:
    found = Text(html)
    for tag, attributes in found.tags:
        for name in ("src", "href", "action", "data"):
            assert re.match(r"#|data:,$", attributes.get(name) or "#"), (tag, attributes)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", html)
    policy = next(a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert re.search(r"default-src 'none'; script-src 'sha256-[^ ]+'; style-src 'sha256-[^ ]+';", policy)
    assert "unsafe" not in policy


def test_a_finished_run_is_not_read_again_and_a_running_one_is(run: Run, tmp_path: Path) -> None:
    assert 'data-reload="0"' in page.of_run(run, now=NOW)
    going = reading.read(report_runs.write(tmp_path / "going", report_runs.history(100, ended=False)))
    html = page.of_run(going, now=NOW, reload_s=20)
    assert 'data-reload="20"' in html
    assert '<noscript><meta http-equiv="refresh" content="20"></noscript>' in html
    assert facts.state(going, now=NOW, live=True) == facts.State("Training", "running", "step 100 of 120")
    assert facts.state(going, now=NOW).word == "Ended"
    assert facts.state(going, now=report_runs.BEGAN + 1000).word == "Training"
    assert facts.state(run, now=NOW) == facts.State("Finished", "good", "step 120 of 120")


def test_a_resumed_run_is_where_it_goes_on_and_not_where_it_failed(tmp_path: Path) -> None:
    lines = [
        {"event": "start", "step": 0, "steps": 100},
        {"event": "log", "step": 40, "loss": 1.0},
        {"event": "end", "step": 95, "how": "failed"},
        {"event": "start", "step": 40, "steps": 100},
    ]
    folder = report_runs.write(tmp_path / "run", lines)
    assert reading.read(folder).step == 40
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "end", "step": 99, "how": "stopped"}\n')
    assert reading.read(folder).step == 99


def test_a_run_that_ended_early_is_finished_and_says_why(tmp_path: Path) -> None:
    stop = {"event": "early_stop", "step": 40, "text": "no better loss"}
    ends = [{"event": "start", "step": 0, "steps": 100}, stop, {"event": "end", "step": 40, "how": "finished"}]
    run = reading.read(report_runs.write(tmp_path / "run", ends))
    assert facts.state(run, now=NOW) == facts.State("Finished", "good", "step 40 of 100, ended early: no better loss")
    assert facts.progress(run) == 1.0
    assert ("", "40", "ended early: no better loss") in facts.timeline(run)


def test_curves_are_the_historys_numbers(run: Run) -> None:
    drawn = {chart.name: chart for chart in charts.of_run(run)}
    loss = drawn["loss"]
    assert [curve.name for curve in loss.curves] == ["training", "evaluation"]
    assert (loss.curves[1].xs, loss.curves[1].ys) == ([30, 60, 90, 120], [1.5, 1.0, 0.75, 0.6])
    assert loss.marks == [60, 90]
    assert [curve.name for curve in drawn["learning-rate"].curves] == ["others", "lora_B"]
    budget = drawn["budget"].curves[0]
    assert (list(budget.xs), list(budget.ys)) == ([0, 30, 60, 90, 120], [36, 27, 21, 15, 9])
    assert facts.trained_seconds(run) == 60 + 30 + 30


def test_the_sources_of_a_mixture_share_a_chart(tmp_path: Path) -> None:
    lines = [{"event": "log", "step": n, "loss": 2.0, "loss/a": 1.0, "learnt/a": 5, "loss/b": 3.0} for n in (1, 2)]
    mixed = reading.read(report_runs.write(tmp_path / "run", lines))
    total, parts = charts.of_run(mixed)
    assert (total.title, parts.title) == ("Loss", "Loss by source")
    assert [(curve.name, curve.ys) for curve in parts.curves] == [("a", [1.0, 1.0]), ("b", [3.0, 3.0])]
    assert [chart.title for chart in charts.of_runs([mixed])][1:] == ["Loss by source: a", "Loss by source: b"]


def test_thinning_keeps_the_ends_and_every_spike() -> None:
    xs = list(range(100_000))
    ys: list[float | None] = [1.0] * len(xs)
    ys[41_234], ys[77_777], ys[5] = 9.0, -3.0, None
    some, values = charts.thinned(xs, ys)
    assert len(some) <= charts.MOST_POINTS
    assert (some[0], some[-1]) == (0, 99_999)
    assert {9.0, -3.0} <= set(values)
    assert charts.thinned([1, 2], [0.5, None]) == ([1, 2], [0.5, None])


def test_maps_have_each_layer_at_each_step(run: Run) -> None:
    ranks, direction, magnitude = layers.of_run(run)
    assert ranks.steps == [30, 60, 90, 120]
    assert (ranks.grid.layers, ranks.grid.kinds) == (["0", "1", "2"], ["q_proj", "down_proj"])
    assert ranks.cells[0] == [[5, 4]] * 3
    assert ranks.cells[-1] == [[2, 1]] * 3
    assert [direction.shade(value) for value in (0.04, 0.08, 0.12, None)] == [0, 5, 10, None]
    assert (ranks.shade(0), ranks.shade(5), direction.power) == (0, 10, 0)
    assert [magnitude.written(value) for value in (0.06, None)] == ["6.00", ""]
    assert magnitude.cells[-1][2][1] == pytest.approx(0.06)
    assert [curve.ys[-1] for curve in layers.curves(run)[1].curves] == pytest.approx([0.024, 0.036])


def test_each_prompt_is_there_once_with_its_newest_answer_first(run: Run) -> None:
    first, second = samples.of_run(run)
    assert [first.prompt, second.prompt] == ["Question <1>?", "Question <2>?"]
    assert [step for step, _ in first.answers] == [120, 90, 60, 30]
    assert first.expected == "b"


def test_of_a_long_prompt_the_end_is_there_where_the_question_is(tmp_path: Path) -> None:
    prompt = f"be brief.\n{'1 is odd. ' * 1000}\nis 2?"
    lines = [{"event": "evaluation", "step": 1, "samples": [{"prompt": prompt, "answer": "no" * 4000}]}]
    [sample] = samples.of_run(reading.read(report_runs.write(tmp_path / "run", lines)))
    assert sample.prompt.startswith("… ") and sample.prompt.endswith("1 is odd. \nis 2?")
    assert sample.question.endswith("1 is odd. is 2?") and len(sample.question) < 110
    assert sample.answers[0][1].startswith("nono") and sample.answers[0][1].endswith(" …")


def test_one_question_about_two_pictures_is_two_samples(tmp_path: Path) -> None:
    said = [[{"prompt": "red?", "answer": f"{word} {step}", "expected": word} for word in "ab"] for step in (1, 2)]
    lines = [{"event": "evaluation", "step": step, "samples": each} for step, each in enumerate(said, start=1)]
    found = samples.of_run(reading.read(report_runs.write(tmp_path / "run", lines)))
    assert [sample.answers for sample in found] == [[(2, f"{each} 2"), (1, f"{each} 1")] for each in "ab"]


def test_the_page_has_as_many_samples_as_a_run(tmp_path: Path) -> None:
    said = [{"prompt": f"question {n}", "answer": "yes"} for n in range(MOST_SAMPLES + 1)]
    run = reading.read(report_runs.write(tmp_path / "run", [{"event": "evaluation", "step": 1, "samples": said}]))
    assert [sample.prompt for sample in samples.of_run(run)] == [each["prompt"] for each in said[:MOST_SAMPLES]]


def test_an_answer_without_words_is_said_to_be_one(tmp_path: Path) -> None:
    said = [{"prompt": "red?", "answer": "", "expected": "yes"}, {"prompt": "blue?", "answer": "no", "expected": "no"}]
    run = reading.read(report_runs.write(tmp_path / "run", [{"event": "evaluation", "step": 1, "samples": said}]))
    text = page.of_run(run, now=NOW)
    assert text.count(">no words<") == 1 and "<pre></pre>" not in text


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    lines = [{"step": n, "loss": loss} for n, loss in enumerate([1.0, float("nan"), float("inf"), 0.5])]
    found = data_of(page.of_run(reading.read(report_runs.write(tmp_path / "run", lines)), now=NOW))
    assert found["charts"][0]["curves"][0]["y"] == [1.0, None, None, 0.5]


def test_movements_that_are_not_finite_are_empty_cells(tmp_path: Path) -> None:
    folder = report_runs.write(tmp_path / "run", report_runs.history())
    recorded = (folder / "analysis.jsonl").read_text()
    (folder / "analysis.jsonl").write_text(recorded.replace('"delta_d": 0.12', '"delta_d": NaN'))
    html = page.of_run(reading.read(folder), now=NOW)
    assert "NaN" not in re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert data_of(html)


def test_runs_of_version_0_1_0_have_a_page(tmp_path: Path) -> None:
    lines = [
        {"step": 5, "loss": 2.0, "grad_norm": 0.1, "learning_rate": 1e-3, "epoch": 0.5, "elapsed": 4.0, "left": 4.0},
        {"step": 10, "eval_loss": 1.5, "epoch": 1.0},
        {"step": 10, "saved_step": 10.0, "save_stall_seconds": 0.0, "save_seconds": 0.3},
        {"step": 10, "train_runtime": 9.0, "train_loss": 2.0, "epoch": 1.0},
    ]
    run = reading.read(report_runs.write(tmp_path / "old", lines, max_steps=10))
    assert [chart.name for chart in charts.of_run(run)] == ["loss", "learning-rate", "gradient"]
    assert facts.timeline(run) == [("", "10", "saved checkpoint-10 in 0.3 s")]
    assert "step 10 of 10" in Text(page.of_run(run, now=NOW)).text


@pytest.mark.parametrize("kept", ["config.json", "metrics.jsonl"])
def test_missing_and_damaged_parts_are_left_out_and_named(kept: str, tmp_path: Path) -> None:
    folder = report_runs.write(tmp_path / "run", report_runs.history())
    for file in folder.iterdir():
        if file.name != kept:
            file.write_bytes(b"\xff{\n" + b'[1]\n{"step": {"a": 1}, "matrices": 3}\n{"step"')
    run = reading.read(folder)
    text = Text(page.of_run(run, now=NOW)).text
    assert "cannot be read" in text
    for file in folder.iterdir():
        if file.name != kept:
            file.unlink()
    assert reading.read(folder).notes == []
    assert page.of_run(reading.read(folder), now=NOW)


def test_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = report_runs.write(tmp_path / "a/run", report_runs.history())
    two = report_runs.write(tmp_path / "b/run", report_runs.history(slower=1.2), learning_rate=5e-4)
    older = json.loads((one / "config.json").read_text())
    del older["training"]["seed"]  # as if that version had no such field yet
    (one / "config.json").write_text(json.dumps(older))
    output = tmp_path / "out" / "both.html"
    assert main(["report", str(one), f"slow={two}", str(two), "--output", str(output)]) == DONE
    found = Text(output.read_text()).text
    assert "3 runs compared" in found
    assert re.search(r"Setting +a/run +slow +b/run", " ".join(found.split()))
    assert re.search(r"training\.learning_rate +0\.0002 +0\.0005 +0\.0005", " ".join(found.split()))
    assert "training.seed" not in found
    assert re.search(r"evaluation loss, best +0\.6 +0\.72 +0\.72", " ".join(found.split()))
    drawn = data_of(output.read_text())["charts"]
    assert [curve["name"] for curve in drawn[0]["curves"]] == ["a/run", "slow", "b/run"]


def test_the_command_writes_the_runs_page_and_refuses_what_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = report_runs.write(tmp_path / "run", report_runs.history())
    for _ in range(2):  # its own page is replaced without a word
        assert main(["report", "run"]) == DONE
    assert "<title>Finished · run</title>" in (folder / "report.html").read_text()
    assert main(["report", "run", "run"]) == DONE
    refused = {
        ("run", "run"): "comparison.html: already exists; choose another name, or replace it with --overwrite",
        ("run", "--output", "page.txt"): "give a name that ends in .html",
        ("run", "--output", "run.html"): "is a folder; give the name of a file in it",
        ("nowhere",): "nowhere: is not a folder; give the folder of a run",
        (".",): "holds neither config.json nor metrics.jsonl; give the folder of a run",
    }
    (tmp_path / "run.html").mkdir()
    for words, expected in refused.items():
        assert main(["report", *words]) == USERS_MISTAKE
        assert expected in " ".join(capsys.readouterr().err.split())
