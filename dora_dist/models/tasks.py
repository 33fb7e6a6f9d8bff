"""What a model is built for: its class of transformers, its head, and how its adapter says so."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from dora_dist.errors import UserError
from dora_dist.models.names import locate

CAUSAL_LM = "causal_lm"
CLASSIFICATION = "sequence_classification"
QUESTIONS = "question_answering"
PEFT_TYPES = {CAUSAL_LM: "CAUSAL_LM", CLASSIFICATION: "SEQ_CLS", QUESTIONS: "QUESTION_ANS"}
"""PEFT's `task_type` of each task."""
_MAPPINGS = {
    CAUSAL_LM: ("MODEL_FOR_CAUSAL_LM_MAPPING", "AutoModelForCausalLM"),
    QUESTIONS: ("MODEL_FOR_QUESTION_ANSWERING_MAPPING", "AutoModelForQuestionAnswering"),
    CLASSIFICATION: ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", "AutoModelForSequenceClassification"),
}
_KEPT_FIELDS = ("architectures", "id2label", "label2id", "problem_type")


@dataclass(frozen=True)
class Task:
    """`name` is a key of PEFT_TYPES; `num_labels` is the head's number of outputs, 1 for regression."""

    name: str = CAUSAL_LM
    num_labels: int = 2


LANGUAGE_MODEL = Task()


def configure(config: Any, task: Task) -> None:
    """Set what a task needs in a transformers configuration, in place."""
    if task.name == QUESTIONS:
        config.num_labels = 2  # where an answer starts, and where it ends
    if task.name == CLASSIFICATION:
        if config.num_labels != task.num_labels:
            config.num_labels = task.num_labels
        config.problem_type = "regression" if task.num_labels == 1 else "single_label_classification"


def model_class(config: Any, task: Task, trust_remote_code: bool = False) -> type[nn.Module]:
    """The class of transformers for a configuration and a task. Raises UserError where there is none."""
    from transformers.models.auto import modeling_auto

    mapping, auto_class = _MAPPINGS[task.name]
    known = getattr(modeling_auto, mapping)
    if type(config) in known:
        return cast(type[nn.Module], known[type(config)])
    if trust_remote_code and auto_class in getattr(config, "auto_map", {}):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(config.auto_map[auto_class], config._name_or_path)
    kind = task.name.replace("_", " ").replace("causal lm", "causal language")
    raise UserError(f"model.path: {config.model_type!r} is not a {kind} model that {auto_class} knows")


def default_trained(model: Any, task: Task, stored: Mapping[str, str]) -> list[str]:
    """The modules of `model` to train in full unless told otherwise, by name.

    None for a language model. Else the head, which is all that lies outside the pre-trained encoder, and the
    encoder's own pooler where the folder (`stored_names`) has none.
    """
    if task.name == CAUSAL_LM:
        return []
    prefix = model.base_model_prefix
    names = [name for name, child in model.named_children() if name != prefix and _has_parameters(child)]
    pooler = f"{prefix}.pooler"
    new = [locate(n, stored, prefix) is None for n, _ in model.named_parameters() if n.startswith(f"{pooler}.")]
    return [*names, pooler] if new and all(new) else names


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def kept_config(model: Any, task: Task) -> dict[str, Any]:
    """What the configuration of a model with an adapter has that its base's has not; plain JSON."""
    if task.name == CAUSAL_LM:
        return {}
    full = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return {name: full[name] for name in _KEPT_FIELDS if full.get(name) is not None}


def task_of(task_type: str | None, model_config: Mapping[str, Any]) -> Task:
    """The task that a saved adapter is for, from PEFT's `task_type` and its `kept_config`."""
    names = {peft: name for name, peft in PEFT_TYPES.items()}
    return Task(names.get(task_type or "", CAUSAL_LM), len(model_config.get("id2label") or range(2)))
