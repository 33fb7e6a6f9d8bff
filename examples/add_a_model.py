"""Add a family of models: GPT-NeoX, of which Pythia is.

transformers has the model; a family says what is special about it: here, which layers a run adapts where it names none,
and that folders call one tensor otherwise than today's model does. Put the file where Python finds modules
(`PYTHONPATH=examples`), and name the module in a run's configuration:

    {"plugins": ["add_a_model"], "model": {"path": "EleutherAI/pythia-160m"}, ...}
"""

from dataclasses import dataclass
from typing import Any

from dora_dist.models.families import register
from dora_dist.models.family import Family
from dora_dist.weights.names import Rename, rename_for


@dataclass(frozen=True)
class GPTNeoX(Family):
    model_types: tuple[str, ...] = ("gpt_neox",)
    """As config.json has it."""

    targets: tuple[str, ...] = ("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h")
    """Endings of module names. One layer makes query, key and value."""

    def rename(self, model: Any) -> Rename:
        """Folders say `embed_out`, the model `lm_head`: transformers knows, and a merged folder keeps `embed_out`."""
        return rename_for(model)


register(GPTNeoX())

# A family with nothing to say but its layers' names is one line: register(Family(("phi",), targets=("q_proj", ...))).
# `dora_dist/models/family.py` has what else one may be asked: what trains in full by default, changes to the model
# before it trains, how it sees pictures.
