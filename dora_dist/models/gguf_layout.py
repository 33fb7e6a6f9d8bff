"""A model of LLaMA's architecture in GGUF's terms: its fields, the names of its tensors and the order of their rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dora_dist.runtime.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """GGUF's name of an architecture, and whether its query and key rows are in another order there.

    Rotary embeddings turn pairs of rows of a head. transformers has the first of all pairs, then the second; llama.cpp
    has the two of a pair side by side for `llama`, and transformers' order for `qwen2`.
    """

    name: str
    pairs_together: bool


_ARCHITECTURES = {
    "llama": Architecture("llama", pairs_together=True),
    "mistral": Architecture("llama", pairs_together=True),
    "qwen2": Architecture("qwen2", pairs_together=False),
}
"""model_type -> what it is in GGUF. Their classes are those of causal language models."""
_LEFT_OUT = re.compile(r".*\.rotary_emb\.inv_freq")
"""Computed from the configuration; old folders hold it."""
_TURNED = re.compile(r"attn_([qk])\.")


class Layout:
    """How the model that `config` (a config.json of transformers) describes is written.

    Raises UserError, `source` being where that is from, for one that llama.cpp would compute in another way.
    """

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        from transformers import CONFIG_MAPPING

        self.source = source
        kind = str(config.get("model_type"))
        if kind not in _ARCHITECTURES:
            raise UserError(
                f"{source}: model_type = {kind!r} is not written as GGUF here, only {', '.join(_ARCHITECTURES)}; merge "
                "it (dora-dist consolidate), and convert the folder with llama.cpp's own program"
            )
        self.architecture = _ARCHITECTURES[kind]
        self.config: Any = CONFIG_MAPPING[kind].from_dict(dict(config))
        self._check()

    @cached_property
    def head_dim(self) -> int:
        own = getattr(self.config, "head_dim", None)
        return int(own or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def rope(self) -> Mapping[str, Any]:
        """Of rotary embeddings: rope_type, rope_theta, and what their type needs."""
        return self.config.rope_parameters or {}

    def _check(self) -> None:
        if self.config.hidden_act != "silu":
            raise self._refusal("hidden_act", self.config.hidden_act, "llama.cpp computes silu")
        if (rope := self.rope.get("rope_type", "default")) not in ("default", "linear", "llama3"):
            raise self._refusal("rope_type", rope, "only default, linear and llama3 are written")
        if self.head_dim % 2:
            raise self._refusal("head_dim", self.head_dim, "rotary embeddings need an even one")
        full = {kind == "full_attention" for kind in getattr(self.config, "layer_types", None) or ["full_attention"]}
        if full != {True} and (len(full) > 1 or not self.config.sliding_window):
            raise self._refusal("layer_types", self.config.layer_types, "llama.cpp has one kind of attention in it")

    def _refusal(self, field: str, value: Any, why: str) -> UserError:
        return UserError(f"{self.source}: {field} = {value!r} cannot be written as GGUF: {why}")

    @property
    def context_length(self) -> int:
        """The longest text. llama.cpp lets every token see all before it: the same up to the sliding window."""
        window = getattr(self.config, "sliding_window", None)
        used = getattr(self.config, "use_sliding_window", True)
        return min(filter(None, (self.config.max_position_embeddings, window if used else None)))

    def write(self, writer: Any) -> None:
        """Add the model's sizes and constants to a `gguf.GGUFWriter`."""
        from gguf import RopeScalingType

        config = self.config
        writer.add_type("model")
        writer.add_context_length(self.context_length)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(float(self.rope.get("rope_theta", 10000.0)))
        if self.rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(self.rope["factor"]))
        writer.add_vocab_size(config.vocab_size)

    def names(self, tensors: Iterable[str]) -> dict[str, str]:
        """The names in GGUF of a model's `tensors` that are written.

        Raises UserError for one that such a model does not have, and for one that is missing.
        """
        from gguf import MODEL_ARCH, get_tensor_name_map

        known = get_tensor_name_map(MODEL_ARCH[self.architecture.name.upper()], self.config.num_hidden_layers)
        needed, found = self._needed(), {}
        for name in tensors:
            if _LEFT_OUT.fullmatch(name) or (name == "lm_head.weight" and self.config.tie_word_embeddings):
                continue
            own = known.get_name(name, try_suffixes=(".weight", ".bias")) if name in needed else None
            if own is None:
                kind = type(self.config).__name__.removesuffix("Config") + "ForCausalLM"
                raise UserError(f"{self.source}: tensor {name!r} has no place in the GGUF file of a {kind}")
            found[name] = own
        if missing := sorted(needed - found.keys()):
            raise UserError(f"{self.source}: there is no tensor {missing[0]!r}, which a GGUF file needs")
        return found

    def _needed(self) -> set[str]:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        with init_empty_weights():
            names = set(AutoModelForCausalLM.from_config(self.config).state_dict())
        return names - {"lm_head.weight"} if self.config.tie_word_embeddings else names

    def turned(self, name: str, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        """Blocks of rows (rows, width) of the tensor that GGUF calls `name`, in the order that they have there."""
        if not self.architecture.pairs_together or not _TURNED.search(name):
            yield from blocks
            return
        rest = torch.empty(0)
        for block in blocks:
            held = torch.cat([rest, block]) if rest.numel() else block
            whole = len(held) // self.head_dim * self.head_dim
            yield self._pairs(held[:whole])
            rest = held[whole:]

    def _pairs(self, rows: Tensor) -> Tensor:
        width = rows.shape[1]
        return rows.view(-1, 2, self.head_dim // 2, width).transpose(1, 2).reshape(-1, width)

    def frequency_factors(self) -> Tensor | None:
        """What rotary frequencies are divided by, (head_dim / 2,) fp32, where each has a factor of its own (llama3)."""
        if self.rope.get("rope_type") != "llama3":
            return None
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        return (1.0 / self.rope["rope_theta"] ** steps) / scaled
