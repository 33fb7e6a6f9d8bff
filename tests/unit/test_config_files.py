"""Config files: YAML, and files that extend others."""

import json
from pathlib import Path
from typing import Any

import pytest

from dora_dist.config import RunConfig
from dora_dist.runtime import strict_yaml
from dora_dist.runtime.errors import UserError

BASE = """
model: {path: org/model}
data:
  train: [a.json, b.json]   # lists are replaced
training:
  learning_rate: 1e-4       # a text in YAML 1.1
  learning_rates: {lora_B: 1e-3, head: 2e-3}
  warmup_steps: 100
adapter: {r: 8, target_modules: [q_proj]}
"""


def written(folder: Path, **files: Any) -> Path:
    """The files by their stems, YAML where text, else JSON; returns the last."""
    path = folder
    for name, content in files.items():
        path = folder / (f"{name}.yaml" if isinstance(content, str) else f"{name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        RunConfig.load(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "")


def test_yaml_says_what_the_same_json_says(tmp_path: Path) -> None:
    config = RunConfig.load(written(tmp_path, base=BASE))
    assert (config.training.learning_rate, config.training.learning_rates["lora_B"]) == (1e-4, 1e-3)
    assert config.checkpoint.run_dir == "runs/base"
    again = RunConfig.load(written(tmp_path, again=json.loads(config.to_json())))
    assert again == config


def test_plain_words_are_what_json_has_or_text() -> None:
    text = "[1, -2.5, 1E5, 1e-4, true, null, ~, no, on, 2026-01-31, 1_000, 0x10, 010, '1', .nan]"
    numbers = [1, -2.5, 1e5, 1e-4, True, None, None]
    assert strict_yaml.parse(text) == [*numbers, "no", "on", "2026-01-31", "1_000", "0x10", "010", "1", ".nan"]
    assert strict_yaml.parse("[True, FALSE, Null, NULL, nULL]") == [True, False, None, None, "nULL"]
    assert strict_yaml.parse("a: &x {b: 1}\nc: {<<: *x, d: 2}")["c"] == {"b": 1, "d": 2}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2", 'line 2, column 1: the key "a" is given twice'),
        ("1: 2", "a key that is not text; quote it"),
        ("a: !!python/object/apply:os.system [x]", "line 1, column 4: the tag tag:yaml.org,2002:python"),
        ("a: 1\n---\nb: 2", "line 2, column 1: but found another document"),
        ("a: &x [*x]", "recursive"),
        ("a:\n\tb: 1", r"line 2, column 1: found character '\\t'"),
        ("a: 1e999", "line 1, column 4: 1e999 is too large"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("a: " + "[" * 150 + "]" * 150, "nested more than 100 levels"),
        ("- &a [1,1,1,1,1,1,1,1,1,1]\n- &b [" + "*a," * 100 + "]\n- [" + "*b," * 200 + "]", "more than 100,000 values"),
    ],
)
def test_yaml_that_no_json_could_say_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        strict_yaml.parse(text)


def test_a_file_extends_others_key_by_key(tmp_path: Path) -> None:
    mine = {
        "extends": ["../base.yaml", "short.json"],
        "data": {"train": ["c.json"]},
        "training": {"learning_rates": {"lora_A": 5e-4, "head": None}, "warmup_steps": None},
        "adapter": None,
    }
    short = {"extends": "../base.yaml", "training": {"epochs": 1.0, "seed": 7}, "adapter": {"r": 2}}
    path = written(tmp_path, base=BASE, **{"runs/short": short, "runs/mine": mine})
    config = RunConfig.load(path, ["--training.seed=8"])
    assert config.data.train == ["c.json"]
    assert config.training.learning_rates == {"lora_B": 1e-3, "lora_A": 5e-4}
    assert (config.training.learning_rate, config.training.epochs, config.training.seed) == (1e-4, 1.0, 8)
    assert config.training.warmup_steps is None
    assert (config.adapter.r, config.adapter.target_modules) == (16, None)
    assert config.checkpoint.run_dir == "runs/mine"
    whole = json.loads(config.to_json())
    assert "extends" not in whole
    assert RunConfig.from_dict(whole, name="other") == config


def test_a_wrong_value_is_said_with_the_file_that_it_is_in(tmp_path: Path) -> None:
    base = {"training": {"epochs": -1, "warmup_steps": 3, "learning_rates": {"a": 1e300}}, "adapter": {"rr": 1}}
    mine = {"extends": "base.json", "model": {"path": "a"}, "data": {"train": 3}, "training": {"seed": -1}}
    title, *lines = refusal(written(tmp_path, base=base, mine=mine)).splitlines()
    assert title == "mine.json: 5 problems"
    places = {line.split()[0].rstrip(":,"): line.endswith(" (in base.json)") for line in lines}
    assert places == {
        "adapter.rr": True,
        "data.train": False,
        "training.epochs": True,
        "training.learning_rates": True,
        "training.seed": False,
    }
    given = refusal(tmp_path / "mine.json", "--training.epochs=-2").splitlines()
    assert [line.endswith(")") and "(in " in line for line in given if "epochs = -2" in line] == [False]
    base = {"training": {"warmup_steps": 3}}
    mine = {"extends": "base.json", "model": {"path": "a"}, "data": {"train": "b"}, "training": {"warmup_ratio": 0.1}}
    assert refusal(written(tmp_path, base=base, mine=mine)).endswith("the other null (in base.json)")


def test_what_extends_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    one, two = {"extends": "two.json"}, {"extends": ["./one.json"]}
    circle = refusal(written(tmp_path, two=two, one=one))
    assert circle == "two.json: extends leads in a circle, one.json -> two.json -> one.json; take one of them out"
    itself = refusal(written(tmp_path, alone={"extends": "alone.json"}))
    assert "alone.json -> alone.json" in itself
    assert "did you mean two.json?" in refusal(written(tmp_path, x={"extends": "tow.json"}))
    assert "no such config file" in refusal(written(tmp_path, x={"extends": "tow.json"}))
    for wrong in (3, {"a": 1}, [1], "", None, ["a\0b"]):
        assert "extends = " in refusal(written(tmp_path, x={"extends": wrong}))
    written(tmp_path, broken="a: [")
    assert refusal(written(tmp_path, x={"extends": "broken.yaml"})).startswith("broken.yaml: not valid YAML: line 1")
