"""A model from a Hugging Face folder or hub name, adapted and placed: the order of construction in one place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dora_dist.adapters.adapter_folder import SavedAdapter
from dora_dist.adapters.held import held_layers, packed_modules
from dora_dist.adapters.inject import (
    AdapterPlan,
    Packed,
    held_weights,
    hold_frozen,
    initial_fills,
    inject,
    packable,
    weight_count,
)
from dora_dist.adapters.norms import NormRefresher
from dora_dist.adapters.patterns import ParameterPlan, trained_in_full
from dora_dist.adapters.recompute import keeping_products
from dora_dist.adapters.storage import PLAIN, WeightStorage
from dora_dist.adapters.trained_parameters import TrainedParameters
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
class InjectedModel:
    """A skeleton with its adapters.

    `source` is where each parameter is read, `trained` are the modules trained in full, `trained_parameters` those
    outside of these. `untied` are weights that other modules of the base share, and that have copies of their own here
    because they are trained or adapted. `shapes` are the whole ones of what is trained (shards have none), `weights` is
    the number of parameters, frozen and trained.
    """

    family: Family
    source: Source
    adapted: list[str]
    trained: list[str]
    trained_parameters: TrainedParameters
    untied: list[str]
    shapes: dict[str, torch.Size]
    weights: int


@dataclass(kw_only=True)
class AdaptedModel(InjectedModel):
    """A model ready to train: `norms` is attached to it, `base` is the folder that its weights came from.

    `placement` is where its parameters live. `fresh` are parameters of `trained` that the folder did not have.
    `base_digest` is the `sampled_digest` of the base, on the first process alone.
    """

    model: nn.Module
    norms: NormRefresher
    placement: Placement
    base: Path
    base_bytes_read: int
    base_digest: str
    head: Head
    fresh: list[str]

    @property
    def resized(self) -> dict[str, tuple[list[int], list[int]]]:
        """Those of `fresh` that the folder has in another shape: (shape there, shape here)."""
        there = {n: self.source.folder.entries[own].shape for n in self.fresh if (own := self.source.locate(n))}
        return {name: (list(shape), list(self.shapes[name])) for name, shape in there.items()}


def build_model(
    base: Path,
    plan: AdapterPlan,
    placement: Placement,
    *,
    refresher: Callable[[nn.Module], NormRefresher] = NormRefresher,
    dtype: str = "bf16",
    head: Head = CAUSAL_LM,
    storage: WeightStorage = PLAIN,
    packed: Packed | None = None,
    trained_modules: Sequence[str] | None = None,
    trained_parameters: ParameterPlan = lambda model: [],
    start_from: SavedAdapter | None = None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    seed: int = 0,
    inspect: Callable[[Any], None] = lambda model: None,
) -> AdaptedModel:
    """Build, adapt and load the model with `head` from a local folder; norms are refreshed before it returns.

    The skeleton is made without memory, the adapters are injected into it, and only then does each parameter get its
    place (whole, or this rank's shard). Adapters start as the DoRA paper says (section 4.1, by `seed`), or as
    `start_from` has them. `trained_modules` are patterns of modules to train in full; None: the head's default;
    `trained_parameters` names what is trained as it is besides these, which the folder must have.
    `storage` is how layers hold their frozen weights, those that are `packed` (None: `packable`); `refresher` reads
    norms as `placement` holds parameters (`ShardedNormRefresher` for shards). `inspect` may refuse the adapted model
    before its weights are read. On ZeRO-3 this is collective. Raises UserError for a folder that is not a model, a plan
    that does not fit it, and missing, misshapen or truncated tensors.
    """
    folder = ModelFolder.open(base)
    model = skeleton(base, head, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code)
    made = _inject(
        model,
        folder,
        plan,
        head=head,
        storage=storage,
        packed=packed,
        trained_modules=trained_modules,
        trained_parameters=trained_parameters,
    )
    if start_from is not None:
        start.check(model, made.shapes, start_from, base=base, head=head)
    inspect(model)
    digest = _digest(folder, start_from) if placement.first else ""
    fresh = _load(model, made.source, placement, new_in=made.trained, dtype=dtype, seed=seed)
    norms = refresher(model)
    norms.refresh()
    if start_from is not None:
        start.assign(model, start_from, placement)
        norms.refresh()
    return AdaptedModel(
        **vars(made),
        model=model,
        norms=norms,
        placement=placement,
        base=base,
        base_bytes_read=folder.tensors.bytes_read,
        base_digest=digest,
        head=head,
        fresh=fresh,
    )


def _inject(
    model: Any,
    folder: ModelFolder,
    plan: AdapterPlan,
    *,
    head: Head,
    storage: WeightStorage,
    packed: Packed | None,
    trained_modules: Sequence[str] | None,
    trained_parameters: ParameterPlan,
) -> InjectedModel:
    """Adapt a skeleton in place: find its tensors, untie what is trained or adapted from the rest, freeze all else."""
    tensors, family = folder.tensors, family_of_model(model)
    _, stored = untie_different(model, tensors, stored_names(tensors.entries, family.rename(model)))
    report_unused(folder, model, stored)
    if trained_modules is None:
        trained = head.default_trained(model, stored)
    else:
        trained = trained_in_full(model, trained_modules, apart=family.apart)
    untied, stored = untie(model, [*trained, *plan(model)], stored)
    own = TrainedParameters.of(model, trained_parameters(model), trained)
    packed = packed or partial(packable, apart=family.apart)
    adapted = inject(model, plan, trained, trained_parameters=own.names, storage=storage, packed=packed)
    if not adapted and storage is not PLAIN:
        raise UserError(
            f'model.storage = "{storage.name}": frozen weights under adapters are held so, and no layer is adapted; '
            f'set it to "{PLAIN.name}"'
        )
    if storage is not PLAIN and packed_modules(model) is None:
        raise UserError(
            f'model.storage = "{storage.name}": holds linear layers of the numbered layers, and this model has none '
            f'that is frozen; set it to "{PLAIN.name}"'
        )
    return InjectedModel(
        family=family,
        adapted=adapted,
        trained=trained,
        trained_parameters=own,
        untied=untied,
        source=Source(tensors, stored, model.base_model_prefix),
        shapes={name: p.shape for name, p in model.named_parameters() if p.requires_grad},
        weights=weight_count(model),
    )


def _digest(base: ModelFolder, start_from: SavedAdapter | None) -> str:
    """The `sampled_digest` of the base; warns of an adapter that starts from another one."""
    digest = sampled_digest(base.tensors)
    if start_from is not None and start_from.source is not None:
        warn_of_another_base(start_from.source.path, start_from.base_model, start_from.base_digest, base.path, digest)
    return digest


def _load(
    model: Any, source: Source, placement: Placement, *, new_in: Sequence[str], dtype: str, seed: int
) -> list[str]:
    """Give every parameter its place and values; returns the names of those that the folder does not have: new ones
    of the modules `new_in`.
    """
    std = (model.config.initializer_range if hasattr(model.config, "initializer_range") else None) or 0.02
    held, initial = held_weights(model), initial_fills(model, seed)
    fresh = partial(fresh_values, seed=seed, std=std)
    return load_base(
        model, source, placement, dtype=DTYPES[dtype], held=held, initial=initial, fresh=fresh, new_in=new_in
    )


def checkpoint_activations(model: Any, keep: Literal["none", "small", "all"] = "small") -> None:
    """Have a model of transformers keep one activation per decoder layer and recompute the rest in backward.

    keep: which layers keep their outputs besides (`adapters/recompute.py`); "small": adapted ones whose output is
    small relative to its FLOPs, "all": all with a frozen weight, adapted or not. Call it before an engine is made.
    Raises UserError for a model that does not support activation checkpointing.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"training.activation_checkpointing: {type(model).__name__} has none; set it to false")
    how = {"use_reentrant": False, "context_fn": keeping_products}
    if keep == "all":
        hold_frozen(model)
    if keep != "small":
        for layer in held_layers(model).values():
            layer.keeps_products = keep == "all"
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)


def skeleton(
    base: Path, head: Head = CAUSAL_LM, *, attn_implementation: str = "sdpa", trust_remote_code: bool = False
) -> Any:
    """The model's modules with parameters on the meta device and real buffers (rotary frequencies and the like)."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights
    from transformers.modeling_utils import set_zero3_state

    config = head.configure(transformers_config(base, trust_remote_code))
    kind: Any = head.model_class(config, trust_remote_code)
    unsupported = attn_implementation == "sdpa" and not kind._supports_sdpa
    config._attn_implementation = "eager" if unsupported else attn_implementation
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
