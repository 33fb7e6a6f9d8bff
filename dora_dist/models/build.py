"""A model from a Hugging Face folder or hub name, adapted and placed: the order of construction in one place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dora_dist.adapters.inject import AdapterPlan, held_weights, initial_fills, inject, trained_in_full, weight_count
from dora_dist.adapters.norms import NormRefresher
from dora_dist.adapters.peft_format import PeftAdapter
from dora_dist.adapters.recompute import keeping_outputs
from dora_dist.adapters.storage import PLAIN, WeightStorage
from dora_dist.models import start
from dora_dist.models.families import family_of_model
from dora_dist.models.family import Family
from dora_dist.models.folder import (
    DTYPES,
    GENERATION_CONFIG,
    ModelFolder,
    generation_config,
    reason,
    transformers_config,
)
from dora_dist.models.heads import CAUSAL_LM, Head
from dora_dist.models.tying import untie, untie_different
from dora_dist.models.unused import report_unused
from dora_dist.runtime.errors import UserError
from dora_dist.weights.digest import sampled_digest, warn_of_another_base
from dora_dist.weights.loading import Source, fresh_values, load_base
from dora_dist.weights.names import stored_names
from dora_dist.weights.placement import Placement


@dataclass(kw_only=True)
class AdaptedModel:
    """A model ready to train: `norms` is attached to it, `base` is the folder that its weights came from.

    `trained` are the modules trained in full, `fresh` those of their parameters that the folder did not have, and
    `resized` those among these that it had in another shape, as {name: (shape there, shape here)}. `untied` are weights
    that other modules of the base share, and that have copies of their own here because they are trained or adapted.
    `base_digest` is the `sampled_digest` of the base, on the first process alone, `weights` the number of parameters,
    frozen and trained.
    """

    model: nn.Module
    norms: NormRefresher
    adapted: list[str]
    base: Path
    base_bytes_read: int
    base_digest: str
    family: Family
    head: Head
    trained: list[str]
    fresh: list[str]
    resized: dict[str, tuple[list[int], list[int]]]
    untied: list[str]
    weights: int


def build_model(
    base: Path,
    plan: AdapterPlan,
    placement: Placement,
    refresher: Callable[[nn.Module], NormRefresher] = NormRefresher,
    *,
    dtype: str = "bf16",
    head: Head = CAUSAL_LM,
    storage: WeightStorage = PLAIN,
    trained_modules: Sequence[str] | None = None,
    start_from: PeftAdapter | None = None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    seed: int = 0,
    inspect: Callable[[Any], None] = lambda model: None,
) -> AdaptedModel:
    """Build, adapt and load the model with `head` from a local folder; norms are refreshed before it returns.

    The skeleton is made without memory, the adapters are injected into it, and only then does each parameter get
    its place (whole, or this rank's shard). Adapters start as the paper says (paper section 4.1, by `seed`), or as
    `start_from` has them. `trained_modules` are patterns of modules to train in full; None: the task's head. What is
    trained or adapted of a tied weight is untied from the rest, as PEFT has it. `storage` is how adapted layers hold
    their frozen weights; `refresher` is the one for the way in which `placement` holds parameters
    (`ShardedNormRefresher` for shards). `inspect` is called with the adapted model before its weights are read, and may
    refuse it. On ZeRO-3 this is collective. Raises UserError for a
    folder that is no model, a plan that does not fit it, and missing, misshapen or truncated tensors.
    """
    opened = ModelFolder.open(base)
    folder = opened.tensors
    model = skeleton(base, head, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code)
    family = family_of_model(model)
    named = stored_names(folder.entries, family.rename(model))
    stored = untie_different(model, folder, named)
    report_unused(opened, model, stored)
    if trained_modules is None:
        trained = head.default_trained(model, stored)
    else:
        trained = trained_in_full(model, trained_modules, apart=family.apart)
    untied, stored = untie(model, [*trained, *plan(model)], stored)
    adapted = inject(model, plan, trained, storage=storage)
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}  # shards have none
    if start_from is not None:
        start.check(model, shapes, start_from, base, head)
    inspect(model)
    base_digest = sampled_digest(folder) if placement.first else ""
    if start_from is not None and start_from.source is not None and placement.first:
        warn_of_another_base(start_from.source.path, start_from.base_model, start_from.base_digest, base, base_digest)
    weights, source = weight_count(model), Source(folder, stored, model.base_model_prefix)
    fresh = _load(model, source, placement, dtype=dtype, seed=seed)
    there = {n: source.locate(n) for n in fresh}
    resized = {n: (list(folder.entries[found].shape), list(shapes[n])) for n, found in there.items() if found}
    norms = refresher(model)
    norms.refresh()
    if start_from is not None:
        start.assign(model, start_from, placement)
        norms.refresh()
    return AdaptedModel(
        model=model,
        norms=norms,
        adapted=adapted,
        base=base,
        base_bytes_read=folder.bytes_read,
        base_digest=base_digest,
        family=family,
        head=head,
        trained=trained,
        fresh=fresh,
        resized=resized,
        untied=untied,
        weights=weights,
    )


def _load(model: Any, source: Source, placement: Placement, *, dtype: str, seed: int) -> list[str]:
    """Give every parameter its place and values; returns the names of those that the folder does not have."""
    std = model.config.to_dict().get("initializer_range") or 0.02
    held, initial = held_weights(model), initial_fills(model, seed)
    fresh = partial(fresh_values, seed=seed, std=std)
    return load_base(model, source, placement, dtype=DTYPES[dtype], held=held, initial=initial, fresh=fresh)


def checkpoint_activations(model: Any) -> None:
    """Have a model of transformers keep one activation per decoder layer and recompute the rest in backward.

    DoRA layers whose output is small relative to its FLOPs keep it (`adapters/recompute.py`). Raises UserError for a
    model that has no activation checkpointing.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"training.activation_checkpointing = true: {type(model).__name__} has none; set it to false")
    how = {"use_reentrant": False, "context_fn": keeping_outputs}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)


def skeleton(
    base: Path, head: Head = CAUSAL_LM, *, attn_implementation: str = "sdpa", trust_remote_code: bool = False
) -> Any:
    """The model's modules with parameters on the meta device and real buffers (rotary frequencies and the like)."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights
    from transformers.modeling_utils import set_zero3_state

    config = transformers_config(base, trust_remote_code)
    head.configure(config)
    kind: Any = head.model_class(config, trust_remote_code)
    sdpa = attn_implementation != "sdpa" or getattr(kind, "_supports_sdpa", True)
    config._attn_implementation = attn_implementation if sdpa else "eager"
    config.use_cache = False
    # set_zero3_state: parts of a composite model would be sharded as they are made, once a Trainer has said ZeRO-3.
    try:
        with init_empty_weights(include_buffers=False), no_init_weights(), set_zero3_state():
            model: Any = kind(config)
    except Exception as error:  # what a family does with values that it does not check
        raise UserError(
            f"{base / 'config.json'}: {kind.__name__} cannot be built as it says: {reason(error)}; take the "
            "config.json of the model's own repository"
        ) from error
    model.tie_weights()
    if (base / GENERATION_CONFIG).exists():
        model.generation_config = generation_config(base)
    return model
