"""The variants: one base model on ZeRO-3 shards, each adapted in its own way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_dist import build_model
from dora_dist.config import AdapterConfig
from dora_dist.models.build import checkpoint_activations
from dora_dist.models.families import family_of_model
from dora_dist.models.heads import CAUSAL_LM, IMAGE_TEXT_TO_TEXT, Head
from stepbench.settings import PATCH, TARGETS, Settings

GATED = ("gated", "dynamic", "closed", "compacted")


def write_base(folder: Path, settings: Settings) -> None:
    """A LLaMA or LLaVA of the settings' size with random bf16 weights, as a Hugging Face folder."""
    from dora_dist.models.build import skeleton
    from dora_dist.weights.safetensors_io import TensorWriter

    _config(settings).save_pretrained(folder)
    shapes = {name: tuple(p.shape) for name, p in skeleton(folder, _head(settings)).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    layout = [(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    with TensorWriter(folder / "model.safetensors", layout, {"format": "pt"}) as writer:
        for name, shape in shapes.items():
            if len(shape) == 1:
                values = torch.full(shape, float(not name.endswith("bias")))
            else:
                values = torch.empty(shape).normal_(0.0, 0.02, generator=generator)
            writer.write(name, values.to(torch.bfloat16))


def _config(settings: Settings) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = LlamaConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.hidden,
        intermediate_size=settings.ffn,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=max(2048, settings.picture_tokens + settings.tokens),
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    if not settings.pictures:
        return text
    tower = CLIPVisionConfig(
        hidden_size=settings.tower_hidden,
        intermediate_size=settings.tower_ffn,
        num_hidden_layers=settings.tower_layers,
        num_attention_heads=settings.tower_heads,
        image_size=settings.picture_side,
        patch_size=PATCH,
    )
    return LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=settings.vocab - 1,
        architectures=["LlavaForConditionalGeneration"],
    )


def _head(settings: Settings) -> Head:
    return IMAGE_TEXT_TO_TEXT if settings.pictures else CAUSAL_LM


def build(variant: str, base: Path, settings: Settings) -> tuple[nn.Module, Any]:
    """The variant's model, and our norm refresher where it has one. Collective.

    In every variant the embedding's output requires a gradient, as in the middle of a deep stack: all layers
    compute input gradients, and "no adapter" does all of the backward but the adapters' own.
    """
    if variant in ("dora", "recorded", "lora", *GATED):
        model, norms = _ours(variant, base, settings)
    elif variant == "full":
        run = build_model(str(base), AdapterConfig(method="full"), deepspeed=settings.deepspeed_config())
        model, norms = run.model, run.norms
    else:
        model, norms = _hugging_face(base, settings), None
        if variant == "none":
            model.requires_grad_(False)  # but an engine needs something to train: 4096 numbers
            (model.model.multi_modal_projector if settings.pictures else model.model.norm).requires_grad_(True)
        elif variant != "deepspeed-full":
            model = _peft(model, variant == "peft-dora", settings)
    model.enable_input_require_grads()
    if settings.checkpointing and norms is not None:
        checkpoint_activations(model, "all" if settings.selective else "small")
    elif settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    return model.train(), norms


def _ours(variant: str, base: Path, settings: Settings) -> tuple[nn.Module, Any]:
    from dora_dist.adapters.inject import by_pattern
    from dora_dist.adapters.methods import DynamicRank, LowRank, WeightDecomposed
    from dora_dist.adapters.storage import storage_of
    from dora_dist.models import build
    from dora_dist.zero3.norms import ShardedNormRefresher
    from dora_dist.zero3.placement import ShardedPlacement

    r, alpha = settings.start_rank if variant in GATED else settings.r, settings.alpha
    if variant == "compacted":
        r, alpha = settings.kept_rank, alpha * settings.kept_rank / r  # the update's scaling stays
    update = (DynamicRank if variant in GATED else LowRank)(r, alpha, dropout=settings.dropout)
    method = update if variant == "lora" else WeightDecomposed(update)
    placement = ShardedPlacement(settings.deepspeed_config())
    adapted = build.build_model(
        base,
        by_pattern(method, [TARGETS]),
        placement,
        refresher=ShardedNormRefresher,
        storage=storage_of(settings.storage),
        head=_head(settings),
    )
    if settings.pictures:
        adapted.family.prepare_for_training(adapted.model)
    return adapted.model, adapted.norms


def _hugging_face(base: Path, settings: Settings) -> Any:
    kind = _head(settings).reading_class()
    model = kind.from_pretrained(base, dtype=torch.bfloat16, attn_implementation="sdpa")
    if settings.pictures:  # PEFT at its best: as it comes, its steps go backward through the frozen tower, too
        model.model.vision_tower.requires_grad_(False)
        family_of_model(model).prepare_for_training(model)
    return model


def _peft(model: nn.Module, use_dora: bool, settings: Settings) -> nn.Module:
    """PEFT at its best: adapters in bf16 like the engine, sharded with everything else; or in fp32, as it comes."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)  # adapters are made on every rank alike; deepspeed.initialize shards them
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=TARGETS,
        modules_to_save=["multi_modal_projector"] if settings.pictures else None,
        use_dora=use_dora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=settings.peft_fp32)
    if settings.peft_fp32:
        return model
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def pruner(variant: str, model: nn.Module, engine: Any, settings: Settings) -> Any:
    """What prunes this variant's components: None for most. Collective.

    "dynamic" scores after every step, and prunes after every one too: more than any run does. "closed" is a run whose
    mask is final and that goes on with all its components: those pruned are held at 0.
    """
    if variant not in ("dynamic", "closed"):
        return None
    from dora_dist.adapters.components import Budget
    from dora_dist.zero3.components import ShardedComponentPruner
    from dora_dist.zero3.optimizer_state import inner_optimizer

    last = 1000 if variant == "dynamic" else 2
    budget = Budget(settings.r, settings.start_rank, first=1, last=last, every=1)
    pruner = ShardedComponentPruner(model, inner_optimizer(engine), budget, dem=0.3)
    if variant == "closed":
        closed = torch.arange(settings.start_rank) >= settings.kept_rank
        pruner.load(last, pruner.scores, dict.fromkeys(pruner.layers, closed))
    return pruner


def open_components(model: nn.Module) -> int:
    """How many gates are not 0, of those that this rank holds."""
    from dora_dist.zero3.partition import local_values

    gates = [p for name, p in model.named_parameters() if name.endswith("lora_gates")]
    return sum(int(local_values(p).count_nonzero()) for p in gates)


def unsharded(model: nn.Module, settings: Settings) -> Iterator[str]:
    """Names of parameters that the engine does not shard, or that are neither bf16 nor packed: there should be none."""
    dtypes = (torch.bfloat16, torch.float32) if settings.peft_fp32 else (torch.bfloat16,)
    from dora_dist.zero3.partition import is_sharded

    for name, parameter in model.named_parameters():
        packed = not parameter.is_floating_point()
        if not is_sharded(parameter) or not (packed or parameter.dtype in dtypes):
            yield f"{name} ({parameter.dtype})"
