"""Accuracy: answers found as the paper finds them, likelihoods against a loop of one candidate at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dora_dist.adapters.peft_format import PeftAdapter, write_peft_folder
from dora_dist.adapters.peft_layer import AdapterLayer
from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.manifest import write_manifest
from dora_dist.data.formats import Rendered, candidate, generation_prompt, training_prompt
from dora_dist.evaluation import PAPER_TASKS, as_table, evaluate, score_task
from dora_dist.evaluation.inference import base_folder
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import write_json
from dora_dist.tasks.evaluations.commonsense import candidates
from dora_dist.tasks.evaluations.likelihood import candidate_log_probs
from tests import toy

# Candidates of one, two and many tokens; some begin with a piece that takes in the prompt's last space
# (" true"), others do not ("Yes"): the prompt then splits differently for each.
CHOICES = [["true", "false"], ["Yes", "true story", "x"], ["it is true, it is", "question", "#", "1, 2"]]
QUESTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"instruction": "is it? " * (5 - i), "output": choices[i % len(choices)]}, choices)
    for i, choices in enumerate(CHOICES * 2)
]
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return toy.tokenizer()


def llama(**options: Any) -> Any:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **options)).eval()


# ---------------------------------------------------------------------------------------------- likelihood


def rendered(questions: Any) -> list[list[Rendered]]:
    return [[candidate(record, "instruction", choice, None) for choice in choices] for record, choices in questions]


def one_by_one(model: Any, tokenizer: Any, questions: Any) -> list[list[float]]:
    """Each candidate's log p(whole text), less that of the tokens that all the texts begin with."""
    scores = []
    for record, choices in questions:
        texts = [tokenizer(training_prompt(record) + choice)["input_ids"] for choice in choices]
        prompt = tokenizer(training_prompt(record))["input_ids"]
        shared = next(i for i in range(len(prompt) + 1) if i == len(prompt) or any(t[i] != prompt[i] for t in texts))
        row = []
        for text in texts:
            with torch.no_grad():
                log_probs = model(torch.tensor([text])).logits[0].double().log_softmax(-1)
            row.append(sum(float(log_probs[i - 1, text[i]]) for i in range(shared, len(text))))
        scores.append(row)
    return scores


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        (LlamaForCausalLM, LlamaConfig, {}),
        (LlamaForCausalLM, LlamaConfig, {"attn_implementation": "eager"}),
        (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
        (MistralForCausalLM, MistralConfig, {"sliding_window": 64}),  # shorter than the prompts
        (Qwen2ForCausalLM, Qwen2Config, {}),
        (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihoods_equal_one_candidate_at_a_time(
    kind: Any, config: Any, options: dict[str, Any], batch_size: int, tokenizer: Any
) -> None:
    torch.manual_seed(0)
    model = kind(config(**SIZES, **options)).eval()
    expected = one_by_one(model, tokenizer, QUESTIONS)
    assert len({round(score, 3) for row in expected for score in row}) > 6
    scores = candidate_log_probs(model, tokenizer, rendered(QUESTIONS), batch_size=batch_size)
    for row, wanted in zip(scores, expected, strict=True):
        torch.testing.assert_close(torch.tensor(row), torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def test_families_without_a_shared_prompt_are_scored_alike(tokenizer: Any) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    config = OPTConfig(**sizes, num_attention_heads=4, word_embed_proj_dim=32, init_std=0.3)
    model = OPTForCausalLM(config).eval()
    finished: list[int] = []
    scores = candidate_log_probs(model, tokenizer, rendered(QUESTIONS), batch_size=4, advance=finished.append)
    for row, wanted in zip(scores, one_by_one(model, tokenizer, QUESTIONS), strict=True):
        torch.testing.assert_close(torch.tensor(row), torch.tensor(wanted), rtol=1e-4, atol=1e-4)
    assert sum(finished) == len(QUESTIONS)


def test_the_mean_divides_by_the_number_of_scored_tokens(tokenizer: Any) -> None:
    record, choices = {"instruction": "is it?", "output": "true"}, ["true", "true, true"]
    model = llama()
    [sums] = candidate_log_probs(model, tokenizer, rendered([(record, choices)]), batch_size=1)
    [means] = candidate_log_probs(model, tokenizer, rendered([(record, choices)]), batch_size=1, mean=True)
    assert means == pytest.approx([sums[0], sums[1] / 3])  # " true" | " true" "," " true"


def test_logits_are_asked_for_where_candidates_are_and_nowhere_else(tokenizer: Any) -> None:
    model, sizes = llama(), []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[:2]))
    questions = rendered([({"instruction": "x " * 300}, ["true", "false"])])
    candidate_log_probs(model, tokenizer, questions, batch_size=1)
    assert sizes == [(1, 3)]  # the prompt's last token and two candidates of one token each


def test_the_likeliest_candidate_is_the_prediction(tokenizer: Any) -> None:
    model = llama()
    records = [{**record, "choices": choices} for record, choices in QUESTIONS]
    scores = one_by_one(model, tokenizer, QUESTIONS)
    best = [choices[row.index(max(row))] for row, (_, choices) in zip(scores, QUESTIONS, strict=True)]
    expected = sum(record["output"] == choice for record, choice in zip(records, best, strict=True))
    score = score_task(model, tokenizer, records, "mine", mode="likelihood", batch_size=4, progress=False)
    assert (score.predictions, score.correct, score.total) == (best, expected, 6)
    assert 0 < expected < 6
    assert score.accuracy == expected / 6


def test_prompt_and_completion_are_scored_as_they_are(tokenizer: Any) -> None:
    model = llama()
    records = [{"prompt": "is 3 even?", "completion": " false", "choices": [" true", " false"]}]
    [texts] = [[tokenizer("is 3 even?" + choice)["input_ids"] for choice in records[0]["choices"]]]
    with torch.no_grad():
        log_probs = model(torch.tensor([texts[0]])).logits[0, -2].log_softmax(-1)
    best = max(texts, key=lambda ids: float(log_probs[ids[-1]]))
    options = {"mode": "likelihood", "format": "completion", "progress": False}
    score = score_task(model, tokenizer, records, "mine", **options)
    assert score.predictions == [records[0]["choices"][texts.index(best)]]
    with pytest.raises(UserError, match="--mode generate with --format completion: there are no labels to read"):
        score_task(model, tokenizer, records, "mine", format="completion", progress=False)
    with pytest.raises(UserError, match="--format squad: is not for a language model; give one of instruction"):
        score_task(model, tokenizer, records, "mine", mode="likelihood", format="squad", progress=False)


@pytest.mark.parametrize("mode", ["likelihood", "generate"])
def test_scoring_is_without_dropout_and_leaves_the_model_in_training(mode: str, tokenizer: Any) -> None:
    model, modes = llama().train(), set()
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: modes.add(module.training))
    score_task(model, tokenizer, toy.records(2), "boolq", mode=mode, max_new_tokens=2, progress=False)
    assert modes == {False}
    assert model.training
    with pytest.raises(UserError, match="has no records"):
        score_task(model, tokenizer, [], "boolq", progress=False)


# ---------------------------------------------------------------------------------------------- generation


def label_tokenizer() -> Any:
    """As the toy one, with every label as one piece: so that a random model says labels."""
    tokenizer = toy.tokenizer()
    tokenizer.add_tokens(sorted({label for task in PAPER_TASKS.values() for label in task.labels}))
    return tokenizer


def test_generation_in_batches_equals_one_prompt_at_a_time() -> None:
    tokenizer = label_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"vocab_size": len(tokenizer), "initializer_range": 0.6})
    model: Any = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data[300:] *= 1.6  # the labels: a random model favours long rows
    model.generation_config.repetition_penalty = 5.0  # must not leak into the evaluation
    records = [{"instruction": "which? " * (1 + i % 4) + str(i), "answer": f"answer{1 + i % 5}"} for i in range(10)]
    predictions: list[str | None] = []
    for record in records:
        prompt = tokenizer(generation_prompt(record), return_tensors="pt")
        output = model.generate(
            **prompt, num_beams=4, max_new_tokens=6, do_sample=False, repetition_penalty=1.0, pad_token_id=0
        )
        new = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
        found = sorted((new.find(label), label) for label in PAPER_TASKS["openbookqa"].labels if label in new)
        predictions.append(found[0][1] if found else None)
    assert None in predictions
    assert len(set(predictions)) > 2
    score = score_task(model, tokenizer, records, "openbookqa", batch_size=4, max_new_tokens=6, progress=False)
    assert score.predictions == predictions
    assert score.correct == sum(p == r["answer"] for p, r in zip(predictions, records, strict=True))


@pytest.mark.parametrize(
    ("task", "response", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "True or false", "false"),  # case matters
        ("boolq", "untrue", "true"),  # and word borders do not: it is the paper's rule
        ("piqa", "solution2, not solution1", "solution2"),
        ("social_i_qa", "the correct answer is answer3", "answer3"),
        ("social_i_qa", "answer6 Answer1", None),
        ("ARC-Easy", "answer15", "answer1"),
        ("hellaswag", "ending4</s>", "ending4"),
        ("winogrande", "I pick option2.", "option2"),
        ("openbookqa", "", None),
    ],
)
def test_the_first_label_after_the_last_response_mark_is_the_answer(
    task: str, response: str, answer: str | None
) -> None:
    asked = "Answer format: answer5/solution1/ending1/option1/true\n\n### Response:\n"
    assert PAPER_TASKS[task].find(asked + response) == answer
    assert PAPER_TASKS[task].find(asked + "answer2 true ### Response:" + response) == answer


# ---------------------------------------------------------------------------------------------- candidates


def test_labels_are_those_that_the_instruction_offers() -> None:
    record = {"instruction": "Which?\n\nAnswer format: answer1/answer2/answer3", "answer": "answer3"}
    start = "the correct answer is "
    assert candidates("ARC-Easy", record) == ([f"{start}answer{i}" for i in (1, 2, 3)], 2)
    assert candidates("ARC-Easy", {**record, "instruction": "Which?"})[0] == [
        f"{start}answer{i}" for i in (1, 2, 3, 4, 5)
    ]
    assert candidates("boolq", toy.records(2)[1]) == ([f"{start}true", f"{start}false"], 1)
    with pytest.raises(UserError, match="\"answer\" is 'answer4', but the instruction offers answer1/"):
        candidates("ARC-Easy", {**record, "answer": "answer4"})


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({}, 'task "mine" is none of the paper\'s .* needs records with "choices"'),
        ({"choices": "ab"}, "must be a list of two or more non-empty strings, found 'ab'"),
        ({"choices": ["a"]}, "must be a list of two or more"),
        ({"choices": ["a", ""]}, "non-empty strings"),
        ({"choices": ["a", "a"], "output": "a"}, "the same text twice"),
        ({"choices": ["a", "b"], "output": "c"}, 'none of the "choices" .* is the record\'s'),
    ],
)
def test_custom_tasks_need_choices_with_one_right(record: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        candidates("mine", {"instruction": "x", **record})


def test_the_answer_may_stand_in_output_or_in_answer() -> None:
    choices = ["a", "b"]
    assert candidates("mine", {"choices": choices, "output": "b", "answer": "answer2"}) == (choices, 1)
    assert candidates("mine", {"choices": choices, "output": "it is b", "answer": "b"}) == (choices, 1)


# ------------------------------------------------------------------------------------------------ evaluate


def test_evaluate_reads_a_folder_and_writes_its_result(tmp_path: Path) -> None:
    model = toy.base_model(tmp_path / "model")
    boolq = toy.write_records(tmp_path / "boolq.json", 6)
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({**r, "choices": c}) + "\n" for r, c in QUESTIONS))
    output = tmp_path / "results" / "own.json"
    result = evaluate(
        model,
        {"boolq": boolq, "own": own},
        mode="likelihood",
        limit=4,
        dtype="fp32",
        output=output,
        progress=False,
    )
    assert json.loads(output.read_text()) == result
    rows = result["tasks"]
    assert [rows[name]["total"] for name in ("boolq", "own")] == [4, 4]
    assert all(row["accuracy"] == row["correct"] / 4 for row in rows.values())
    assert result["average"] == (rows["boolq"]["accuracy"] + rows["own"]["accuracy"]) / 2
    assert result["settings"] == {
        "batch_size": 8,
        "format": "instruction",
        "normalise": "sum",
        "dtype": "fp32",
        "limit": 4,
    }
    lines = as_table(result).splitlines()
    assert [line.split()[0] for line in lines] == ["task", "boolq", "own", "average"]
    assert lines[1].split()[1:] == [f"{rows['boolq']['accuracy']:.4f}", str(rows["boolq"]["correct"]), "4"]


def test_a_base_from_the_hub_has_the_revision_that_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = {"main": "0" * 40, "v1": "1" * 40, "v2": "2" * 40}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, commit in commits.items():
        reference, snapshot = (
            tmp_path / "hub/models--lab--model" / part for part in (f"refs/{name}", f"snapshots/{commit}")
        )
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
        snapshot.mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (snapshot / file).write_text("{}")
    checkpoint = tmp_path / "run" / "checkpoint-1"
    layer = AdapterLayer(torch.ones(2, 4), torch.ones(3, 2), torch.ones(3), 1.0)
    adapter = PeftAdapter("lab/model", 2.0, 2, 0.0, True, {"a.b": layer}, revision="v1")
    write_peft_folder(checkpoint / run_folder.ADAPTER, adapter)
    write_manifest(checkpoint, {"step": 1})
    for run in (tmp_path / "run", checkpoint, checkpoint / run_folder.ADAPTER):  # as the adapter says
        assert base_folder(str(run)).name == commits["v1"]
    for revision in ("v2", None):  # as the run says
        write_json(tmp_path / "run/config.json", {"model": {"path": "lab/model", "revision": revision}})
        assert base_folder(str(tmp_path / "run")).name == commits[revision or "main"]


@pytest.mark.parametrize(
    ("task", "record", "options", "complaint"),
    [
        ("boolq", {"answer": "answer1"}, {}, 'a.jsonl, line 1: .*no label of task "boolq" .*another task\'s'),
        ("arc_easy", {}, {}, 'line 1: task "arc_easy" is none of the paper\'s .*; did you mean "ARC-Easy"?'),
        ("own", {"choices": ["a", "b"], "output": "a"}, {}, 'task "own" is none of the paper\'s'),
        ("boolq", {"answer": "true", "input": "more"}, {}, 'no place for a non-empty "input"'),
        ("boolq", {"answer": "true"}, {"mode": "guess"}, "--mode guess: is unknown"),
        ("boolq", {"answer": "true"}, {"normalise": "max"}, "--normalise max: is unknown"),
        ("boolq", {"answer": "true"}, {"batch_size": 0}, "--batch-size 0"),
    ],
)
def test_bad_tasks_are_refused_before_a_model_is_loaded(
    task: str, record: dict[str, Any], options: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    file, model = tmp_path / "a.jsonl", tmp_path / "model"
    file.write_text(json.dumps({"instruction": "x", **record}) + "\n")
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").touch()  # which cannot be loaded
    with pytest.raises(UserError, match=complaint):
        evaluate(model, {task: file}, **options)
    with pytest.raises(UserError, match="no task to evaluate"):
        evaluate(model, {})
