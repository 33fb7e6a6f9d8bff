"""The adapter section of a run's file; the other sections are in schema.py."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dora_dist.config.section import PathText, Patterns, Section, Steps, at_most

USUAL_R = 16
"""Of LoRA, DoRA and dynamic rank."""


class AdapterConfig(Section):
    """What is trained: the low-rank update, its components' gates, and the magnitudes."""

    method: str | None = Field(
        default=None,
        min_length=1,
        description="Adapter method by name: vera (with weight_decomposed DVoRA), mora, full (no adapter: the model "
        "itself is trained), or a plugin's; null: LoRA, DoRA or dynamic rank, by weight_decomposed and dynamic_rank",
    )
    settings: dict[str, Any] = Field(
        default={},
        description="Settings of the method that it has besides these fields (mora: type; vera: projection_prng_key, "
        "d_initial; or a plugin's)",
    )
    weight_decomposed: bool = Field(
        default=True, description="true: DoRA; false: plain LoRA, the same layer with no magnitude"
    )
    r: Annotated[int, Field(ge=1), at_most(2**16)] | None = Field(
        default=None,
        description="Adapter rank: components of the update of one layer; null: 16, or what the method named in "
        "adapter.method usually has (vera 256, mora 8)",
    )
    lora_alpha: Annotated[float, Field(gt=0), at_most(10**6)] = Field(
        default=32.0, description="The update is scaled by lora_alpha / r"
    )
    use_rslora: bool = Field(
        default=False,
        description="Scale the update by lora_alpha / sqrt(r) (rsLoRA): a larger r then learns as fast as a small one; "
        "with dynamic rank the square root is of what component_scale says",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Probability of dropping an input of the adapter")
    dropout_mode: Literal["exact", "adapter"] = Field(
        default="exact",
        description="exact: as in the paper; adapter: in the low-rank branch only (one base product fewer)",
    )
    norm_gradient: Literal["detached", "full"] = Field(
        default="detached",
        description="detached: the norm is a constant in backward (paper, section 4.3); full: it is not",
    )
    target_modules: Patterns | None = Field(
        default=None,
        description="Linear layers to adapt: endings of module names, or expressions for whole names; "
        "null: the model family's default. With full: any modules to train, null: the whole model",
    )
    magnitude_only_modules: Patterns = Field(
        default=[],
        description="Linear layers that train a magnitude and no low-rank update; patterns as above",
    )
    trained_modules: Patterns | None = Field(
        default=None,
        description="Modules trained in full, besides the adapters (PEFT's modules_to_save); patterns as above; "
        "null: the task's head, a LLaVA's projector or a VL-BART's visual embedding. One of two tied weights gets a "
        "copy of its own, as in PEFT",
    )
    trained_parameters: Patterns = Field(
        default=[],
        description="Single parameters trained as they are, besides the adapters: whole names, endings at a dot "
        '("bias", "layer_norm.weight"), or expressions for whole names. An adapted layer\'s bias may be one, its '
        "weight may not; a tied parameter stays tied",
    )
    init_from: PathText | None = Field(
        default=None,
        description="Adapter folder to start from (PEFT's LoRA, DoRA or VeRA, or our own); null: a new adapter",
    )
    dynamic_rank: bool = Field(
        default=False,
        description="Start with more components than r in each layer, and prune the least important ones over all "
        "layers while training (Mao et al.); r is then the average rank at the end",
    )
    start_rank_factor: Annotated[float, Field(ge=1), at_most(1000)] = Field(
        default=1.5, description="Dynamic rank: layers start with this times r components, rounded up"
    )
    component_init: Literal["lora", "paper"] = Field(
        default="lora",
        description="Dynamic rank: how components start. lora: gates 1 and B 0, as LoRA starts; paper: gates 0 between "
        "two random factors",
    )
    component_scale: Literal["budget", "paper"] = Field(
        default="budget",
        description="Dynamic rank: what lora_alpha is divided by. budget: r, which are left on average; paper: the "
        "components of a layer when training starts. Pruning does not change it",
    )
    prune_start: float = Field(
        default=0.15, ge=0, lt=1, description="Dynamic rank: pruning begins at this share of all optimizer steps"
    )
    prune_stop: float = Field(
        default=0.5, gt=0, le=1, description="Dynamic rank: the mask is final from this share of all steps on"
    )
    prune_every: Steps = Field(default=10, description="Dynamic rank: optimizer steps between prunings")
    prune_schedule: Literal["dora", "adalora"] = Field(
        default="dora", description="Dynamic rank: dora prunes slowly first and fast last, adalora the other way round"
    )
    importance_beta: float = Field(
        default=0.9, ge=0, lt=1, description="Dynamic rank: share of the old score in the smoothed importance"
    )
    dem_weight: Annotated[float, Field(ge=0), at_most(1e60)] = Field(
        default=0.3, description="Dynamic rank: weight of the penalty on the variance of components; 0: none"
    )
    dem_form: Literal["paper", "code"] = Field(
        default="paper", description="Dynamic rank: the penalty as the paper has it, or half of it, as its code does"
    )
    pruned_moments: Literal["keep", "clear"] = Field(
        default="keep", description="Dynamic rank: what pruning does to Adam's moments of the gates"
    )

    compact: bool = Field(
        default=True, description="Dynamic rank: once the mask is final, train on without the pruned components"
    )

    @model_validator(mode="before")
    @classmethod
    def _usual_rank(cls, given: Any) -> Any:
        """r where no method is named; one that is named knows its own."""
        unsaid = isinstance(given, dict) and given.get("r") is None and given.get("method") is None
        return {**given, "r": USUAL_R} if unsaid else given

    @property
    def start_rank(self) -> int | None:
        """Components of a layer when training starts: r, or ceil(start_rank_factor · r) with dynamic rank."""
        return self.r and (math.ceil(self.start_rank_factor * self.r) if self.dynamic_rank else self.r)
