"""An adapted model from the sections of a configuration: what `train` builds, and any other training loop."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dora_dist.adapters.adapter_folder import SavedAdapter
from dora_dist.adapters.folders import read_adapter
from dora_dist.adapters.inject import AdapterPlan
from dora_dist.adapters.methods import chosen
from dora_dist.adapters.norms import NormRefresher
from dora_dist.adapters.patterns import ParameterPlan
from dora_dist.adapters.storage import storage_of
from dora_dist.config import AdapterConfig, ModelConfig, is_local
from dora_dist.models import build, families
from dora_dist.models.build import AdaptedModel
from dora_dist.runtime import distributed
from dora_dist.runtime.hub import Repository, wanted
from dora_dist.tasks import task_named
from dora_dist.weights.placement import WholePlacement


def build_model(
    model: ModelConfig | str | os.PathLike[str],
    adapter: AdapterConfig | None = None,
    *,
    deepspeed: Mapping[str, Any] | None = None,
    device: str = "cpu",
    seed: int = 42,
) -> AdaptedModel:
    """A model with adapters, ready for a training loop of your own. Its norms refresh by themselves.

    Args:
        model: the `model` section of a configuration, or a Hugging Face folder or hub name with its defaults (bf16,
            causal language model).
        adapter: the `adapter` section; None: DoRA of rank 16 on the modules that the model's family has by default.
            Pruning (`dynamic_rank`) is the work of `train`: here all components stay.
        deepspeed: a complete DeepSpeed JSON with `zero_optimization.stage` 3 (no "auto"): every parameter is made as
            this rank's shard, for `deepspeed.initialize` with the same JSON. Collective: all ranks call this, and meet
            first if they have not, whatever the launcher was. None: whole parameters on `device`, for plain PyTorch.
        seed: of the adapters' initial values.

    Returns: `AdaptedModel`; its `model` is the transformers model, whose parameters with `requires_grad` are the
    adapters' (fp32 where whole; lora_A (in_features, r), lora_B (out_features, r), magnitude_offset (out_features,))
    and those of modules trained in full.

    Raises: UserError for a folder that is not a model, a section that does not fit it, damaged or missing tensors.

    Example::

        run = build_model("base", AdapterConfig(r=8, target_modules=["q_proj", "v_proj"]), deepspeed=settings)
        trained = [p for p in run.model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(model=run.model, optimizer=torch.optim.AdamW(trained), config=settings)
        for batch in batches:
            engine.backward(engine(**batch).loss)
            engine.step()
    """
    section = model if isinstance(model, ModelConfig) else ModelConfig(path=str(model))
    adapter = adapter or AdapterConfig()
    base = Path(section.path)
    if deepspeed is not None:
        distributed.choose_accelerator("auto")
        distributed.start()
    if not is_local(section.path):
        patterns = wanted(section.trust_remote_code)
        base = Repository(section.path, revision=section.revision, patterns=patterns).fetch()
    return adapted_model(
        base,
        section,
        adapter,
        plan=adapter_plan(adapter),
        deepspeed=deepspeed,
        device=device,
        start_from=read_adapter(Path(adapter.init_from)) if adapter.init_from else None,
        seed=seed,
    )


def adapted_model(
    base: Path,
    model: ModelConfig,
    adapter: AdapterConfig,
    *,
    plan: AdapterPlan,
    deepspeed: Mapping[str, Any] | None,
    device: str = "cpu",
    start_from: SavedAdapter | None = None,
    seed: int = 42,
    inspect: Callable[[Any], None] = lambda model: None,
) -> AdaptedModel:
    """As `build_model`, from what is read already: the base's folder, and the adapter to start from."""
    placement: Any = WholePlacement(device)
    refresher = NormRefresher
    if deepspeed is not None:
        # Imported here: DeepSpeed takes seconds, and a model in one process does not need it.
        from dora_dist.zero3.norms import ShardedNormRefresher
        from dora_dist.zero3.placement import ShardedPlacement

        placement, refresher = ShardedPlacement(dict(deepspeed)), ShardedNormRefresher
    return build.build_model(
        base,
        plan,
        placement,
        refresher=refresher,
        dtype=model.dtype,
        head=task_named(model.task).head(model),
        storage=storage_of(model.storage, model.storage_settings),
        trained_modules=adapter.trained_modules,
        trained_parameters=trained_parameters(adapter),
        start_from=start_from,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        seed=seed,
        inspect=inspect,
    )


def adapter_plan(adapter: AdapterConfig) -> AdapterPlan:
    """Which modules of a model the section adapts, and how."""
    return families.adapter_plan(chosen(adapter), adapter.target_modules, adapter.magnitude_only_modules)


def trained_parameters(adapter: AdapterConfig) -> ParameterPlan:
    """Which of a model's own parameters the section trains as they are."""
    return families.trained_parameters(chosen(adapter), adapter.target_modules, adapter.trained_parameters)
