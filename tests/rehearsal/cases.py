"""What is rehearsed: a small model of every family with data of its tasks, as configurations of runs."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dora_dist.config import AdapterConfig
from tests import encoders, llava, subtasks, summaries, toy
from tests.distributed.training_runs import config

Sections = dict[str, dict[str, Any]]

# Three steps: components are pruned after each of the first two, then compaction and one more step; then evaluation.
EVERYTHING: Sections = {
    "adapter": {
        "r": 2,
        "target_modules": None,
        "dropout": 0.1,
        "norm_gradient": "full",
        "dynamic_rank": True,
        "prune_start": 0.2,
        "prune_stop": 0.7,
        "prune_every": 1,
        "dem_weight": 0.1,
        "pruned_moments": "clear",
    },
    "training": {"max_steps": 3, "warmup_steps": 0, "global_batch_size": 4, "eval_every": 3},
    "checkpoint": {"save_every": None},
    "analysis": {"every": 2},
    "logging": {"samples": 2, "sample_tokens": 2},
}
STATIC: Sections = {"adapter": {"dynamic_rank": False}, "training": {"max_steps": 1, "eval_every": 1}}


@dataclass
class Case:
    """A model and its data in `folder`: `runs` train it on so many ranks, `scored` are arguments of `evaluate`.

    Both come after `plugins`, files of examples/, are imported.
    """

    folder: Path
    ranks: int = 2
    plugins: list[str] = field(default_factory=list)
    runs: list[Sections] = field(default_factory=list)
    scored: list[dict[str, Any]] = field(default_factory=list)

    def run(self, name: str, *changes: Sections, data: str = "data.json") -> str:
        """Add a run; returns where its last checkpoint will be."""
        sections: Sections = {}
        for change in (EVERYTHING, *changes):
            for section, fields in change.items():
                sections[section] = {**sections.get(section, {}), **fields}
        run = config(self.folder / "base", self.folder / data, self.folder / name, **sections)
        self.runs.append(run | {"plugins": self.plugins})
        return str(self.folder / name / f"checkpoint-{sections['training']['max_steps']}")

    def score(self, model: str, data: str = "data.json", **options: Any) -> None:
        task = {options.pop("task", "data"): self.folder / data}
        self.scored.append({"model_path": model, "tasks": task, "progress": False, **options})


# --- language models ----------------------------------------------------------------------------------------------

DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": {"head_dim": 6},
    "gemma": {"head_dim": 6},
    "gemma2": {"head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 16},
    "granite": {},
    "smollm3": {"no_rope_layer_interval": 2},
}
ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    },
}
LONG: Sections = {"data": {"cutoff_len": 480}}
"""Room for a whole prompt, which is then answered after evaluations, too."""
CHUNKS: Sections = {"training": {"loss_chunk": 16}}
ROWS: Sections = {"data": {"packing": True, "packing_length": 512}, **CHUNKS}
IN_ROWS = ("mistral", "qwen3", "gemma2")
"""Families that are rehearsed with packed rows and losses in chunks."""
BF16: Sections = {"model": {"dtype": "bf16"}, "training": {"activation_checkpointing": True}}
SELECTIVE: Sections = {
    "training": {"activation_checkpointing": "selective"},
    "engine": {"param_persistence_threshold": 0},  # or small weights stay gathered, whatever is recomputed
}


def _decoder(folder: Path, family: str, **changes: Any) -> Case:
    from transformers import AutoConfig, AutoModelForCausalLM

    text = toy.tokenizer()
    sizes = {**toy.SIZES, "vocab_size": len(text), **DECODERS[family], **changes}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    model.save_pretrained(folder / "base")
    text.save_pretrained(folder / "base")
    toy.write_records(folder / "data.json", 9)
    return Case(folder)


def decoder(family: str) -> Callable[[Path], Case]:
    """Training as by default, with recomputation and one projection's magnitude alone; both modes of evaluation."""

    def case(folder: Path) -> Case:
        case = _decoder(folder, family)
        rows = ROWS if family in IN_ROWS else {}
        last = case.run("run", BF16, LONG, rows, {"adapter": {"magnitude_only_modules": ["o_proj"]}})
        for mode in ("generate", "likelihood"):
            case.score(last, task="boolq", mode=mode, limit=3, dtype="bf16", **_few_tokens(mode))
        return case

    return case


def _few_tokens(mode: str) -> dict[str, Any]:
    return {"num_beams": 2, "max_new_tokens": 3} if mode == "generate" else {}


def rope(kind: str) -> Callable[[Path], Case]:
    """Rotary frequencies that are scaled, or change with texts longer than the model was made for; on one rank."""

    def case(folder: Path) -> Case:
        case = _decoder(folder, "llama", rope_parameters=ROPES[kind], max_position_embeddings=32)
        case.ranks = 1
        case.run("run", BF16, STATIC)
        return case

    return case


def offloaded(parameters: str, optimizer: str) -> Callable[[Path], Case]:
    """Dynamic rank, and an adapter to start from, with what the engine keeps on the host."""

    def case(folder: Path) -> Case:
        case = _decoder(folder, "llama")
        engine: Sections = {"engine": {"offload_param": parameters, "offload_optimizer": optimizer}}
        case.run("run", engine)
        last = case.run("static", engine, SELECTIVE, STATIC)
        case.run("from-static", engine, STATIC, {"adapter": {"init_from": f"{last}/adapter"}})
        return case

    return case


def from_outside(folder: Path) -> Case:
    """Weights that are packed, with dynamic rank and its compaction; a method with and without a magnitude over it."""
    case = _decoder(folder, "llama")
    case.plugins += ["add_a_storage", "add_a_method"]
    packed: Sections = {"model": {"storage": "eight_bits"}}
    case.score(case.run("packed", BF16, packed), task="boolq", mode="likelihood", limit=3, dtype="bf16")
    _with_method(case, "loha", BF16, packed)
    return case


def _with_method(case: Case, name: str, *changes: Sections) -> None:
    """A method, with and without a magnitude over it."""
    for decomposed in (True, False):
        section: dict[str, Any] = {"method": name, "weight_decomposed": decomposed}
        section["norm_gradient"] = "full" if decomposed else "detached"
        last = case.run(f"{name}-{decomposed}", *changes, STATIC, {"adapter": section})
        case.score(last, task="boolq", mode="likelihood", limit=3, dtype="bf16")


def with_method(name: str) -> Callable[[Path], Case]:
    def case(folder: Path) -> Case:
        case = _decoder(folder, "llama")
        _with_method(case, name, BF16)
        return case

    return case


def in_full(folder: Path) -> Case:
    """The whole model, embeddings tied; then single parameters besides adapters."""
    case = _decoder(folder, "llama", tie_word_embeddings=True, attention_bias=True)
    last = case.run("run", BF16, STATIC, {"adapter": AdapterConfig(method="full").model_dump()})
    case.score(last, task="boolq", mode="likelihood", limit=3, dtype="bf16")
    last = case.run("besides", BF16, STATIC, {"adapter": {"trained_parameters": ["bias", "norm.weight"]}})
    case.score(last, task="boolq", mode="likelihood", limit=3, dtype="bf16")
    return case


def mora(folder: Path) -> Case:
    """Each type, on weights that are packed; norms whose gradient reads the weight itself."""
    case = _decoder(folder, "llama")
    case.plugins += ["add_a_storage"]
    for kind, decomposed in ((1, False), (1, True), (6, True)):
        section: dict[str, Any] = {"method": "mora", "settings": {"type": kind}, "weight_decomposed": decomposed}
        section["norm_gradient"] = "full" if decomposed else "detached"
        changes: Sections = {"model": {"storage": "eight_bits"}, "adapter": section}
        last = case.run(f"mora-{kind}-{decomposed}", BF16, STATIC, changes)
        case.score(last, task="boolq", mode="likelihood", limit=3, dtype="bf16")
    return case


def quantised(folder: Path) -> Case:
    """The package's own storages: with dynamic rank and its compaction; with scales in 8 bits, shards on the host."""
    case = _decoder(folder, "llama")
    host: Sections = {"engine": {"offload_param": "cpu"}}
    for name, settings, changes in (("int8", {}, ()), ("nf4", {"double_quant": True}, (SELECTIVE, STATIC, host))):
        packed: Sections = {"model": {"storage": name, "storage_settings": settings}}
        case.score(case.run(name, BF16, packed, *changes), task="boolq", mode="likelihood", limit=3, dtype="bf16")
    return case


# --- encoders -----------------------------------------------------------------------------------------------------

PAIRS: Sections = {"data": {"format": "classification", "text_fields": ["sentence1", "sentence2"], "cutoff_len": 32}}


def encoder(family: str) -> Callable[[Path], Case]:
    """Labels with dynamic rank; ratings and questions, which differ in loss and evaluation, without."""

    def case(folder: Path) -> Case:
        encoders.plain_encoder(folder / "base", family)
        encoders.write_labelled(folder / "labels.json", 13)
        encoders.write_labelled(folder / "ratings.json", 13, rating=True)
        (folder / "questions.json").write_text(json.dumps(encoders.questions(13)))
        case = Case(folder)
        labels: Sections = {"model": {"task": "sequence_classification", "num_labels": 2}}
        rating: Sections = {"model": {"task": "sequence_classification", "num_labels": 1}}
        asking: Sections = {
            "model": {"task": "question_answering"},
            "data": {"format": "squad", "cutoff_len": 24, "doc_stride": 6},
        }
        for data, *changes in (
            ("labels.json", PAIRS, labels),
            ("ratings.json", PAIRS, rating, STATIC),
            ("questions.json", asking, STATIC),
        ):
            case.score(case.run(Path(data).stem, *changes, data=data), data, limit=5)
        return case

    return case


# --- the others ---------------------------------------------------------------------------------------------------


def bart(folder: Path) -> Case:
    """Summaries, written by the model wherever it is evaluated."""
    summaries.base_model(folder / "base", end_bias=4.0)
    (folder / "data.json").write_text(json.dumps(summaries.records(9)))
    case = Case(folder)
    data = {"format": "summarisation", "text_fields": ["document"], "label_field": "summary"}
    summarising: Sections = {
        "model": {"task": "seq2seq_lm"},
        "data": {**data, "cutoff_len": 40, "target_len": 6},
        "training": {"num_beams": 2, "metric": "rougeL"},
    }
    case.score(case.run("run", summarising, CHUNKS), limit=3)
    return case


def vl_bart(folder: Path) -> Case:
    """Texts with pictures in pairs or videos; answers and captions that the model writes; biases are trained, too."""
    summaries.base_model(folder / "base", subtasks.texts(), end_bias=4.0)
    train = subtasks.write(folder, 6, ("nlvr2", "tvc"))
    (folder / "data.json").write_text(json.dumps(train))
    case = Case(folder)
    seeing: Sections = {
        "model": {"task": "vision_seq2seq_lm", "feature_dim": subtasks.WIDTH},
        "adapter": {"trained_parameters": ["bias"]},
        "data": subtasks.section(subtasks.features(folder, 9), train, cutoff_len=40, target_len=6),
        "training": {"num_beams": 2},
    }
    last = case.run("run", seeing)
    case.score(last, "tvc-0.json", task="tvc", limit=3)
    case.run("bf16", seeing, BF16, STATIC, CHUNKS)
    return case


def llava_with(tower: str) -> Callable[[Path], Case]:
    """Pictures and plain texts in one batch, adapters in the tower too; answers to questions about pictures."""

    def case(folder: Path) -> Case:
        llava.model(folder / "base", tower)
        llava.write(folder, 6, 3)
        names = sorted(f"a/{path.name}" for path in (folder / "pictures" / "a").iterdir())
        asked = [{"image": name, "text": "is it red?", "label": "yes" if "red" in name else "no"} for name in names]
        (folder / "asked.json").write_text(json.dumps(asked))
        case = Case(folder)
        pictures: Sections = {
            "model": {"task": "image_text_to_text"},
            "data": {"format": "llava", "image_folder": str(folder / "pictures"), "loss_on": "answer"},
        }
        everywhere: Sections = {"adapter": {"target_modules": [r".*(vision_tower|language_model)\..*\.(q|v)_proj"]}}
        case.run("tower", pictures, everywhere, STATIC, {"data": {"cutoff_len": 256}})
        last = case.run("run", pictures, BF16, {"data": {"cutoff_len": 256}}, ROWS)
        for mode in ("generate", "likelihood"):
            case.score(last, "asked.json", format="pope", mode=mode, limit=3, **_few_tokens(mode))
        return case

    return case


CASES: dict[str, Callable[[Path], Case]] = {
    **{family: decoder(family) for family in DECODERS},
    **{f"llama, {kind} rope": rope(kind) for kind in ROPES},
    **{family: encoder(family) for family in encoders.FAMILIES},
    "from outside": from_outside,
    "quantised": quantised,
    "vera": with_method("vera"),
    "in full": in_full,
    "mora": mora,
    "bart": bart,
    "vl-bart": vl_bart,
    **{f"llava with {tower}": llava_with(tower) for tower in llava.TOWERS},
}
