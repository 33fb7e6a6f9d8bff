"""What a model ends in: its class of transformers, the modules that are new in it, and how its adapter says so.

`Head` is what models, checkpoints and adapters' folders know of a task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from dora_dist.adapters.adapter_folder import AdapterFolder
from dora_dist.adapters.patterns import trained_in_full
from dora_dist.models.families import check_sees_pictures, family_of, family_of_model, family_of_parts
from dora_dist.models.folder import own_code_needed
from dora_dist.models.vocabulary import agree_on_padding
from dora_dist.runtime.errors import UserError
from dora_dist.weights.names import locate

_KEPT_FIELDS = ("architectures", "id2label", "label2id", "problem_type", "pad_token_id")
_KEPT_OF_FEATURES = ("model_type", "feature_dim", "images")


@dataclass(frozen=True)
class Head:
    """A head that the pre-trained model does not have: it is trained in full besides the adapters.

    task: the name of the task, as in model.task. auto_class: the class of transformers that reads any model with such
    a head, and mapping: its table in transformers.models.auto.modeling_auto. peft_type: PEFT's `task_type`.
    num_labels: the head's outputs. words: the task in messages.
    """

    task: str
    auto_class: str
    mapping: str
    peft_type: str
    num_labels: int = 2
    words: str = ""

    @property
    def generative(self) -> bool:
        """Whether the model writes text, whose end its tokenizer must know."""
        return False

    @property
    def sized_by(self) -> str | None:
        """The field of the configuration that the shapes of what is new in the model follow from."""
        return "model.num_labels"

    def with_labels(self, count: int) -> Head:
        """The head with so many outputs, where it is the run that chooses how many there are."""
        return replace(self, num_labels=count)

    def of_adapter(self, adapter: AdapterFolder) -> Head:
        """The head of a saved adapter that it `recognises`.

        A folder of PEFT's own says nowhere how many labels there are; its head's last layer has as many rows, and they
        are fewer than any other's.
        """
        shapes = [adapter.tensors.entries[stored].shape for stored in adapter.trained.values()]
        rows = min((shape[0] for shape in shapes if shape), default=2)
        return self.with_labels(len(adapter.model_config.get("id2label") or ()) or rows)

    def of_model(self, config: Mapping[str, Any]) -> Head:
        """The head of a model's folder, from its config.json."""
        return self.with_labels(len(config.get("id2label") or range(2)))

    def configure(self, config: Any) -> Any:
        """The transformers configuration of the model with this head: its base's, changed in place, or made of it.

        Raises UserError for a base that has no such model.
        """
        if config.num_labels != self.num_labels:  # setting it makes new names for all labels
            config.num_labels = self.num_labels
        return config

    def model_class(self, config: Any, trust_remote_code: bool = False) -> type[nn.Module]:
        """The class of transformers for a configuration. Raises UserError where there is none."""
        from transformers.models.auto import modeling_auto

        known, auto = getattr(modeling_auto, self.mapping), self.auto_class
        if type(config) in known:
            return cast(type[nn.Module], known[type(config)])
        own_code = (config.auto_map if hasattr(config, "auto_map") else None) or {}
        if trust_remote_code and auto in own_code:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            return get_class_from_dynamic_module(own_code[auto], config._name_or_path)
        if auto in own_code:
            raise UserError(f"{config._name_or_path}/config.json: {own_code_needed(config._name_or_path)}")
        kind = self.words or self.task.replace("_", " ")
        raise UserError(f"model.path: {config.model_type!r} is not a {kind} model that {auto} knows")

    def reading_class(self) -> Any:
        """The class of transformers that reads a folder of any such model."""
        import transformers

        return getattr(transformers, self.auto_class)

    def is_named_by(self, config: Mapping[str, Any]) -> bool:
        """Whether a folder's config.json describes such a model, by transformers' own lists of classes.

        They do not hold classes that were registered with an AutoModel: a head for such a class overrides this.
        """
        from transformers.models.auto import modeling_auto

        known = getattr(modeling_auto, f"{self.mapping}_NAMES").get(config.get("model_type"))
        return known is not None and known in (config.get("architectures") or ())

    def fit(self, model: Any, tokenizer: Any) -> None:
        """Set what a built model must know of its tokenizer, in place."""
        return

    def default_trained(self, model: Any, stored: Mapping[str, str]) -> list[str]:
        """The modules of `model` to train in full unless told otherwise, by name.

        The head, which is all that lies outside the pre-trained encoder, and the encoder's own pooler where the folder
        (`stored_names`) has none.
        """
        prefix = model.base_model_prefix
        names = [name for name, child in model.named_children() if name != prefix and _has_parameters(child)]
        pooler = f"{prefix}.pooler"
        new = [locate(n, stored, prefix) is None for n, _ in model.named_parameters() if n.startswith(f"{pooler}.")]
        return [*names, pooler] if new and all(new) else names

    def kept_config(self, model: Any) -> dict[str, Any]:
        """What the configuration of a model with an adapter has that its base's has not; plain JSON."""
        full = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        return {name: full[name] for name in _KEPT_FIELDS if full.get(name) is not None}

    def recognises(self, adapter: AdapterFolder) -> bool:
        """Whether a saved adapter is for such a model."""
        return adapter.task_type == self.peft_type


class _Labels(Head):
    """One of `num_labels` labels for a text, or where that is 1 a rating."""

    def configure(self, config: Any) -> Any:
        config = super().configure(config)
        config.problem_type = "regression" if self.num_labels == 1 else "single_label_classification"
        return config

    def fit(self, model: Any, tokenizer: Any) -> None:
        agree_on_padding(model, tokenizer)


class _Span(Head):
    """Two outputs: where an answer starts, and where it ends."""

    def with_labels(self, count: int) -> Head:
        return self


class _Language(Head):
    """A model that writes text with the head that it was pre-trained with."""

    @property
    def generative(self) -> bool:
        return True

    @property
    def sized_by(self) -> str | None:
        return None

    def with_labels(self, count: int) -> Head:
        return self

    def configure(self, config: Any) -> Any:
        return config

    def default_trained(self, model: Any, stored: Mapping[str, str]) -> list[str]:
        family = family_of_model(model)
        return trained_in_full(model, family.trained, apart=family.apart)

    def kept_config(self, model: Any) -> dict[str, Any]:
        return {}


class _EncoderDecoder(_Language):
    """A language model that reads a text and writes another."""

    def configure(self, config: Any) -> Any:
        if family_of(config.model_type).reads_features:
            raise UserError(
                f'model.task = "{self.task}": {config._name_or_path} reads visual features, too; set it to '
                f'"{VISION_SEQ2SEQ_LM.task}"'
            )
        return config

    def kept_config(self, model: Any) -> dict[str, Any]:
        return {"architectures": [type(model).__name__]}


@dataclass(frozen=True)
class VisualFeatures(_EncoderDecoder):
    """An encoder-decoder model whose text is followed by visual features.

    feature_dim: their width; None: as the base's folder has it.
    """

    feature_dim: int | None = None

    @property
    def sized_by(self) -> str | None:
        return "model.feature_dim"

    def with_features(self, feature_dim: int | None) -> VisualFeatures:
        """The head for features of such a width."""
        return replace(self, feature_dim=feature_dim)

    def of_adapter(self, adapter: AdapterFolder) -> Head:
        """A folder of PEFT's own says nowhere how wide the features are; its visual embedding reads as many."""
        shapes = {name: adapter.tensors.entries[stored].shape for name, stored in adapter.trained.items()}
        family = family_of_parts(shapes)
        stored = family.feature_dim_of(shapes) if family else None
        return self.with_features(adapter.model_config.get("feature_dim") or stored)

    def configure(self, config: Any) -> Any:
        return family_of(config.model_type).with_features(config, self.feature_dim)

    def is_named_by(self, config: Mapping[str, Any]) -> bool:
        return family_of(config.get("model_type", "")).reads_features

    def kept_config(self, model: Any) -> dict[str, Any]:
        full = model.config.to_dict()
        return super().kept_config(model) | {name: full[name] for name in _KEPT_OF_FEATURES}

    def recognises(self, adapter: AdapterFolder) -> bool:
        """PEFT has no type of its own for such models: by the configuration that was saved, or its parts' names."""
        family = family_of_parts((*adapter.modules, *adapter.trained))
        return self.is_named_by(adapter.model_config) or (family is not None and family.reads_features)


class _Pictures(_Language):
    """A language model that is shown pictures, too."""

    def model_class(self, config: Any, trust_remote_code: bool = False) -> type[nn.Module]:
        check_sees_pictures(config)
        return super().model_class(config, trust_remote_code)

    def recognises(self, adapter: AdapterFolder) -> bool:
        """By its parts' names: PEFT has no type of its own for models with pictures."""
        family = family_of_parts((*adapter.modules, *adapter.trained))
        return family is not None and family.sees_pictures


CAUSAL_LM = _Language(
    "causal_lm", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING", "CAUSAL_LM", words="causal language"
)
SEQUENCE_CLASSIFICATION = _Labels(
    "sequence_classification",
    "AutoModelForSequenceClassification",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "SEQ_CLS",
)
QUESTION_ANSWERING = _Span(
    "question_answering", "AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING", "QUESTION_ANS"
)
SEQ2SEQ_LM = _EncoderDecoder(
    "seq2seq_lm", "AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "SEQ_2_SEQ_LM"
)
VISION_SEQ2SEQ_LM = VisualFeatures(
    "vision_seq2seq_lm", SEQ2SEQ_LM.auto_class, SEQ2SEQ_LM.mapping, SEQ2SEQ_LM.peft_type, words="vision-and-text"
)
IMAGE_TEXT_TO_TEXT = _Pictures(
    "image_text_to_text", "AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "CAUSAL_LM"
)

_HEADS = [IMAGE_TEXT_TO_TEXT, SEQUENCE_CLASSIFICATION, QUESTION_ANSWERING, VISION_SEQ2SEQ_LM, SEQ2SEQ_LM]
"""Heads that folders are compared with; a folder that none of them recognises is a language model's."""


def register(head: Head) -> None:
    """Have folders of models and adapters with such a head recognised."""
    if head not in (CAUSAL_LM, *_HEADS):
        _HEADS.insert(0, head)  # the latest first: it may share another's PEFT type, and know its own better


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def head_of_adapter(adapter: AdapterFolder) -> Head:
    """The head that a saved adapter is for, from PEFT's `task_type`, and its `kept_config` if it has one."""
    return next((head for head in _HEADS if head.recognises(adapter)), CAUSAL_LM).of_adapter(adapter)


def head_of_model(config: Mapping[str, Any]) -> Head:
    """The head of a model's folder, from its config.json; a language model's where its class says nothing else."""
    pictures_last = sorted(_HEADS, key=lambda head: head is IMAGE_TEXT_TO_TEXT)  # some classes are in another list, too
    return next((head for head in pictures_last if head.is_named_by(config)), CAUSAL_LM).of_model(config)
