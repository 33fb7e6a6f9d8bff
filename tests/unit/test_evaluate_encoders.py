"""`evaluate` of models that label, rate, find answers or summarise: their own metrics, merged or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dora_dist import cli
from dora_dist.adapters.peft_format import read_peft_folder, write_peft_folder
from dora_dist.checkpoint.consolidate import consolidate
from dora_dist.evaluation import as_table, evaluate
from dora_dist.runtime.errors import UserError
from tests import encoders, summaries, toy

PAIR = {"text_fields": ["sentence1", "sentence2"], "cutoff_len": 32}
KINDS: dict[str, dict[str, Any]] = {
    "classification": {
        "auto": "AutoModelForSequenceClassification",
        "num_labels": 3,
        "type": "SEQ_CLS",
        "fields": PAIR,
        "metrics": ["accuracy", "matthews"],
    },
    "rating": {
        "auto": "AutoModelForSequenceClassification",
        "num_labels": 1,
        "type": "SEQ_CLS",
        "fields": PAIR,
        "metrics": ["pearson", "spearman"],
    },
    "questions": {
        "auto": "AutoModelForQuestionAnswering",
        "type": "QUESTION_ANS",
        "fields": {"cutoff_len": 24, "doc_stride": 6},
        "metrics": ["exact_match", "f1"],
    },
    "summaries": {
        "auto": "AutoModelForSeq2SeqLM",
        "type": "SEQ_2_SEQ_LM",
        "fields": {"text_fields": ["document"], "label_field": "summary", "cutoff_len": 40},
        "settings": {"num_beams": 2, "max_new_tokens": 8},
        "metrics": ["rouge1", "rouge2", "rougeL"],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    encoders.plain_encoder(folder / "bert")
    summaries.base_model(folder / "bart")
    encoders.write_labelled(folder / "classification.json", 13)
    encoders.write_labelled(folder / "rating.json", 13, rating=True)
    (folder / "questions.json").write_text(json.dumps(encoders.questions(13)))
    (folder / "summaries.json").write_text(json.dumps(summaries.records(13)))
    for kind in KINDS:
        adapter(folder, kind)
    return folder


def adapter(folder: Path, kind: str) -> None:
    """A PEFT folder with random values over a base, and the same merged."""
    from peft import LoraConfig, get_peft_model

    case = KINDS[kind]
    base = folder / ("bart" if kind == "summaries" else "bert")
    heads = {"num_labels": case["num_labels"]} if "num_labels" in case else {}
    torch.manual_seed(0)
    model: Any = getattr(transformers, case["auto"]).from_pretrained(base, **heads)
    targets = ["q_proj", "fc1"] if kind == "summaries" else ["query", "output.dense"]
    model = get_peft_model(model, LoraConfig(r=4, use_dora=True, target_modules=targets, task_type=case["type"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(str(folder / "theirs" / kind))
    ours = read_peft_folder(folder / "theirs" / kind)
    ours.base_model = str(base)
    if kind != "summaries":
        labels = {"id2label": {str(i): str(i) for i in range(case.get("num_labels", 2))}}
        ours.model_config = {"architectures": [type(model.base_model.model).__name__], **labels}
    write_peft_folder(folder / kind, ours)
    consolidate(folder / kind, base, folder / "merged" / kind, progress=False)


def scores(path: Path, kind: str, file: Path, **options: Any) -> dict[str, Any]:
    case = KINDS[kind]
    settings = {"fields": case["fields"], "progress": False, **case.get("settings", {}), **options}
    return evaluate(path, {kind: file}, **settings)["tasks"][kind]


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_adapter_have_the_same_scores(kind: str, folder: Path) -> None:
    file = folder / f"{kind}.json"
    found, merged = (scores(path, kind, file) for path in (folder / kind, folder / "merged" / kind))
    assert list(found) == ["file", "loss", *KINDS[kind]["metrics"], "total", "seconds"]
    assert found["total"] == 13
    if kind != "questions":  # whose answers from a random model may all be wrong
        assert any(found[metric] != 0 for metric in KINDS[kind]["metrics"])
    for name in ("loss", *KINDS[kind]["metrics"]):
        assert merged[name] == pytest.approx(found[name], abs=1e-4)
    in_pieces = scores(folder / kind, kind, file, batch_size=3)
    assert in_pieces["loss"] == pytest.approx(found["loss"], abs=1e-5)
    few = json.loads(file.read_text())[:5]
    (folder / "few.json").write_text(json.dumps(few))
    limited, alone = scores(folder / kind, kind, file, limit=5), scores(folder / kind, kind, folder / "few.json")
    assert limited["total"] == alone["total"] == 5
    assert limited["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def test_accuracy_is_what_transformers_alone_finds(folder: Path) -> None:
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "merged" / "classification")
    records, tokenizer, right = encoders.labelled(13), encoders.tokenizer(), 0
    for record in records:
        inputs = tokenizer(record["sentence1"], record["sentence2"], return_tensors="pt")
        with torch.no_grad():
            right += int(model.eval()(**inputs).logits.argmax()) == record["label"]
    assert scores(folder / "classification", "classification", folder / "classification.json")[
        "accuracy"
    ] == pytest.approx(right / 13)


def test_the_command_prints_the_tasks_metrics(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(folder / "questions"), "--tasks", f"dev={folder / 'questions.json'}", "--limit", "6"]
    assert cli.main([*command, "--cutoff-len", "24", "--doc-stride", "6", "--output", str(folder / "out.json")]) == 0
    header, row = capsys.readouterr().out.splitlines()
    result = json.loads((folder / "out.json").read_text())
    assert header.split() == ["task", "loss", "exact_match", "f1", "total"]
    assert row.split() == ["dev", *(f"{result['tasks']['dev'][key]:.4f}" for key in header.split()[1:4]), "6"]
    assert as_table(result).splitlines() == [header, row]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "classification",
            {"mode": "likelihood"},
            "--mode likelihood: means nothing to this model, whose task is seq",
        ),
        ("classification", {"num_beams": 3}, "--num-beams 3: means nothing to this model"),
        ("questions", {"fields": {"cutoff_len": 24, "doc_stride": 20}}, "data.doc_stride = 20: must be below half"),
        ("classification", {"fields": {"text_fields": ["premise"], "cutoff_len": 32}}, 'has no "premise"'),
        ("classification", {"fields": {**PAIR, "label_field": "sentence1"}}, "must be a whole number from 0 to 2"),
        ("classification", {"fields": {**PAIR, "cutoff_len": 65}}, "data.cutoff_len = 65: the model takes 64 tokens"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(kind: str, options: dict, message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        scores(folder / kind, kind, folder / f"{kind}.json", **options)


def test_fields_of_labelled_texts_are_refused_for_a_language_model(tmp_path: Path) -> None:
    base = toy.base_model(tmp_path / "base")
    file = toy.write_records(tmp_path / "boolq.json", 2)
    with pytest.raises(UserError, match=r"--text-fields text: means nothing to this model, whose task is causal"):
        evaluate(base, {"boolq": file}, fields={"text_fields": ["text"]}, progress=False)
