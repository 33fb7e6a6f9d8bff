"""What a model is built for: its class of transformers, its head, and how its adapter says so."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from dora_dist.adapters.inject import trained_in_full
from dora_dist.adapters.peft_format import PeftFolder
from dora_dist.models.folder import own_code_needed
from dora_dist.models.llava import LLAVA_PARTS, PROJECTOR, check_family
from dora_dist.runtime.errors import UserError
from dora_dist.weights.names import locate

CAUSAL_LM = "causal_lm"
CLASSIFICATION = "sequence_classification"
QUESTIONS = "question_answering"
SEQ2SEQ_LM = "seq2seq_lm"
IMAGE_TEXT = "image_text_to_text"
GENERATIVE = (CAUSAL_LM, SEQ2SEQ_LM, IMAGE_TEXT)
"""Tasks whose answer is text, and whose models have no head of their own for it."""
PEFT_TYPES = {
    IMAGE_TEXT: "CAUSAL_LM",
    CAUSAL_LM: "CAUSAL_LM",
    CLASSIFICATION: "SEQ_CLS",
    QUESTIONS: "QUESTION_ANS",
    SEQ2SEQ_LM: "SEQ_2_SEQ_LM",
}
"""PEFT's `task_type` of each task."""
_MAPPINGS = {
    CAUSAL_LM: ("MODEL_FOR_CAUSAL_LM_MAPPING", "AutoModelForCausalLM"),
    IMAGE_TEXT: ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "AutoModelForImageTextToText"),
    QUESTIONS: ("MODEL_FOR_QUESTION_ANSWERING_MAPPING", "AutoModelForQuestionAnswering"),
    CLASSIFICATION: ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", "AutoModelForSequenceClassification"),
    SEQ2SEQ_LM: ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "AutoModelForSeq2SeqLM"),
}
_KEPT_FIELDS = ("architectures", "id2label", "label2id", "problem_type", "pad_token_id")


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

    mapping, auto_name = _MAPPINGS[task.name]
    if task.name == IMAGE_TEXT:
        check_family(config)
    known = getattr(modeling_auto, mapping)
    if type(config) in known:
        return cast(type[nn.Module], known[type(config)])
    if trust_remote_code and auto_name in (getattr(config, "auto_map", None) or {}):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(config.auto_map[auto_name], config._name_or_path)
    if auto_name in (getattr(config, "auto_map", None) or {}):
        raise UserError(f"{config._name_or_path}/config.json: {own_code_needed(config._name_or_path)}")
    kind = task.name.replace("_", " ").replace("causal lm", "causal language")
    raise UserError(f"model.path: {config.model_type!r} is not a {kind} model that {auto_name} knows")


def default_trained(model: Any, task: Task, stored: Mapping[str, str]) -> list[str]:
    """The modules of `model` to train in full unless told otherwise, by name.

    The projector of one that sees pictures, none for another that writes text. Else the head, which is all that lies
    outside the pre-trained encoder, and the encoder's own pooler where the folder (`stored_names`) has none.
    """
    if task.name == IMAGE_TEXT:
        return trained_in_full(model, [PROJECTOR])
    if task.name in GENERATIVE:
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
    if task.name in (CAUSAL_LM, IMAGE_TEXT):
        return {}
    architectures = [type(model).__name__]
    if task.name == SEQ2SEQ_LM:
        return {"architectures": architectures}
    full = {**model.config.to_dict(), "architectures": architectures}
    return {name: full[name] for name in _KEPT_FIELDS if full.get(name) is not None}


def task_of_adapter(adapter: PeftFolder) -> Task:
    """The task that a saved adapter is for: from PEFT's `task_type`, and its `kept_config` if it has one.

    A folder of PEFT's own says nowhere how many labels there are; its head's last layer has as many rows, and they
    are fewer than any other's. PEFT has no type for models with pictures; their parts' names tell.
    """
    if any(part in LLAVA_PARTS for name in (*adapter.modules, *adapter.trained) for part in name.split(".")):
        return Task(IMAGE_TEXT)
    names = {peft: name for name, peft in PEFT_TYPES.items()}
    rows = [adapter.tensors.entries[stored].shape[0] for stored in adapter.trained.values()]
    labels = len(adapter.model_config.get("id2label") or ()) or min(rows, default=2)
    return Task(names.get(adapter.config.get("task_type") or "", CAUSAL_LM), labels)


def task_of_model(config: Mapping[str, Any]) -> Task:
    """The task of a model folder, from its config.json; a language model's where its class says nothing else."""
    from transformers.models.auto import modeling_auto

    for name in (CLASSIFICATION, QUESTIONS, SEQ2SEQ_LM, IMAGE_TEXT):
        known = getattr(modeling_auto, f"{_MAPPINGS[name][0]}_NAMES").get(config.get("model_type"))
        if known is not None and known in (config.get("architectures") or ()):
            return Task(name, len(config.get("id2label") or range(2)))
    return LANGUAGE_MODEL


def auto_class(task: Task) -> Any:
    """The class of transformers that reads a folder of any model for a task."""
    import transformers

    return getattr(transformers, _MAPPINGS[task.name][1])
