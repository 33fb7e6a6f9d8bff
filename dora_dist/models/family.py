"""What is specific to a family of models, as one object: the rest of the code asks it and knows no family's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dist.models.logits import Logits
from dora_dist.runtime.errors import UserError
from dora_dist.weights.names import Rename

if TYPE_CHECKING:
    from dora_dist.config import DataConfig
    from dora_dist.data.pictures import PictureProcessor


@dataclass(frozen=True)
class Family:
    """Models whose config.json has one of `model_types`; a field that is left out says that nothing is special.

    A family with more to say than these fields is a subclass in a file of its own.
    """

    model_types: tuple[str, ...]

    targets: tuple[str, ...] = ()
    """Default `adapter.target_modules`; without any, a run has to name them."""

    parts: tuple[str, ...] = ()
    """Names of modules by which an adapter of this family is recognised, where the family is made of several models."""

    apart: tuple[str, ...] = ()
    """Those of its modules that the ending of a name does not reach: "q_proj" means the other modules' layers, and
    a pattern for layers inside has to name the part."""

    trained: tuple[str, ...] = ()
    """Default `adapter.trained_modules`."""

    sees_pictures: bool = False

    reads_features: bool = False
    """Whether its models read visual features that were extracted beforehand."""

    masks_are_free: bool = False
    """Whether attention is a plain softmax over rotary positions, so that a 4-D mask and position ids can put several
    answers behind one prompt."""

    logits: Logits | None = None
    """What its models make of the output of their last layer before it is a prediction; None: not known, and then a
    loss is taken from all logits at once."""

    packs: bool = False
    """Whether its language models keep samples of one row apart by masks and position ids alone (data.packing)."""

    def rename(self, model: Any) -> Rename | None:
        """What gives the tensors of any of `model`'s folders today's names; None where all versions have one name.

        With it, a merged model keeps the names that its base's folder has.
        """
        return None

    def prepare_for_training(self, model: Any) -> None:
        """Change an adapted model so that it trains right and fast, in place; most need nothing."""

    def with_features(self, config: Any, feature_dim: int | None) -> Any:
        """The configuration of a model that reads visual features, made of a base's `config` of transformers.

        feature_dim: their width; None: as the base says, or as is usual. Raises UserError for another width than the
        base's, and where there is no such model.
        """
        raise UserError(f"model.path: {config.model_type!r} does not read visual features; give a BART or a VL-BART")

    def feature_dim_of(self, trained: Mapping[str, Sequence[int]]) -> int | None:
        """The width of the features that a model read, by the shapes of what was `trained` in full; None: unknown."""
        return None

    def processor(self, base: Path, config: Any, data: DataConfig, *, tokenizer: str | None) -> PictureProcessor:
        """What turns conversations into the model's input, for a family that `sees_pictures`.

        `config` is the configuration of the folder `base`; `tokenizer` names another than the folder's.
        """
        raise UserError(f"model.path: {base}: {config.model_type!r} does not read pictures")
