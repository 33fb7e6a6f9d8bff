"""The weight-decomposition analysis while a run trains: what moved how far, every so many steps, into a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from dora_dist.adapters.layer import adapted_layers
from dora_dist.adapters.patterns import kinds_of, matching
from dora_dist.analysis.decomposition import Moved, Recording, moved
from dora_dist.checkpoint.run_folder import ANALYSIS
from dora_dist.config import AnalysisConfig
from dora_dist.models.build import AdaptedModel
from dora_dist.runtime.distributed import World, together
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import disk_errors
from dora_dist.zero3.row_changes import TrainedWeight, row_changes


class AnalysisCallback(TrainerCallback):
    """Records ΔM and ΔD of adapted layers and of linear layers trained in full, after every N-th step and the last.

    Without N (analysis.every null) it records adapted layers alone, whose numbers come out of a refresh of the norms:
    with each evaluation and each checkpoint, for the run's page. For weights trained in full it would read the base.

    It refreshes the norms that the next forward would have refreshed. Collective; rank 0 writes.
    """

    def __init__(
        self, run: AdaptedModel, options: AnalysisConfig, *, method: str, world: World, run_dir: Path, pruned: bool
    ) -> None:
        """What is recorded is in `adapted` and `trained`, by the layers' names.

        Raises UserError where there is nothing to record, or where a pattern of analysis.modules names nothing, unless
        layers that were there before are `pruned` away.
        """
        self._norms, self._base, self._every = run.norms, run.source.folder, options.every
        self._method, self._world, self._file = method, world, run_dir / ANALYSIS
        asked = options.every is not None
        adapted, trained = adapted_layers(run.model), _trained_weights(run)
        if asked and not adapted and not trained and not pruned:
            raise UserError(
                f"analysis.every = {options.every}: this run neither adapts nor trains a linear layer that the base "
                "has; set it to 0"
            )
        layers = [*adapted, *trained]
        none = f"matches none of the layers that can be recorded: {kinds_of(layers)}"
        otherwise = None if pruned or not layers else lambda pattern: none
        chosen = matching(options.modules or [".*"], layers, "analysis.modules", otherwise=otherwise)
        self.adapted = {name: layer for name, layer in adapted.items() if name in chosen}
        self.trained = {name: weight for name, weight in trained.items() if name in chosen and asked}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._due(state, control) or not (self.adapted or self.trained):
            return
        changes = self._norms.record(self.adapted) if self.adapted else {}
        matrices = moved(changes | row_changes(self.trained, self._base))
        with together("writing the analysis"):  # or the other ranks would go on, and wait for rank 0
            self._write(state.global_step, matrices)

    def _due(self, state: Any, control: Any) -> bool:
        """The same on every rank: what they evaluate and save together."""
        if state.global_step >= state.max_steps:
            return True
        if self._every is None:
            return bool(control.should_evaluate or control.should_save)
        return state.global_step % self._every == 0

    def _write(self, step: int, matrices: Mapping[str, Moved]) -> None:
        if self._world.first:
            with disk_errors(self._file), self._file.open("a", encoding="utf-8") as file:
                file.write(Recording(step, self._method, matrices).line())


def _trained_weights(run: AdaptedModel) -> dict[str, TrainedWeight]:
    """Linear layers' weights that are trained in full and started as the base's, by the layers' names."""
    found = {}
    for name, module in run.model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = module.get_parameter("weight")
        tensor = run.source.locate(f"{name}.weight")
        if weight.requires_grad and tensor is not None and f"{name}.weight" not in run.fresh:
            found[name] = TrainedWeight(weight, tensor)
    return found
