"""Dynamic rank while a run trains: pruning after its optimizer steps, and what checkpoints say of it."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from dora_dist.adapters.components import Budget, ComponentPruner, PruningEvent
from dora_dist.checkpoint.format import Survivors, load_pruner, pruner_state
from dora_dist.config import AdapterConfig
from dora_dist.zero3.components import ShardedComponentPruner
from dora_dist.zero3.optimizer_state import inner_optimizer


class Pruning:
    """The pruning of one phase of a run. Without a budget, or once a checkpoint says that pruning is over, no
    component is pruned and `settle` finds nothing to do.
    """

    def __init__(self, budget: Budget | None, adapter: AdapterConfig) -> None:
        self.budget, self._adapter = budget, adapter
        self._pruner: ComponentPruner | None = None
        self._of_checkpoint: dict[str, Any] | None = None
        """What an earlier phase found; written into this one's checkpoints as it is."""

    def begin(self, model: nn.Module, engine: Any, backwards: int, *, manifest: dict[str, Any] | None = None) -> None:
        """Start to score the components of an engine's model, or go on as the checkpoint with this `manifest` did.

        `backwards`: backward passes of one optimizer step.
        """
        if manifest is not None and manifest.get("compacted"):
            self._of_checkpoint = manifest["components"]
        elif self.budget is not None:
            adapter = self._adapter
            self._pruner = ShardedComponentPruner(
                model,
                inner_optimizer(engine),
                self.budget,
                beta=adapter.importance_beta,
                dem=adapter.dem_weight / (2 if adapter.dem_form == "code" else 1),
                backwards=backwards,
                clear_moments=adapter.pruned_moments == "clear",
            )
            if manifest is not None:
                load_pruner(manifest, self._pruner)

    @property
    def events(self) -> Sequence[PruningEvent]:
        """The prunings so far, those before a resume included."""
        return self._pruner.events if self._pruner is not None else ()

    @property
    def seconds(self) -> float:
        """Time spent on scoring and pruning."""
        return self._pruner.stopwatch.seconds if self._pruner is not None else 0.0

    @property
    def over(self) -> bool:
        """Whether no component will be pruned any more."""
        return self._pruner is None or self._pruner.finished

    @property
    def compacting(self) -> bool:
        """Whether the mask is final and the run is to go on without the pruned components."""
        return self._pruner is not None and self._pruner.finished and self._adapter.compact

    def settle(self) -> list[dict[str, float]]:
        """Score and prune after an optimizer step (collective); what to log of each pruning."""
        if self._pruner is None:
            return []
        before = len(self._pruner.events)
        self._pruner.settle()
        return [
            {
                "components_kept": event.kept,
                "components": event.components,
                "components_budget": event.components - event.pruned,
                "dem_penalty": self._pruner.penalty,
            }
            for event in self._pruner.events[before:]
        ]

    def manifest_fields(self) -> dict[str, Any]:
        """What the manifest of a checkpoint says of pruning; {} without dynamic rank."""
        if self._pruner is not None:
            return {"components": pruner_state(self._pruner), "compacted": self.compacting}
        return {} if self._of_checkpoint is None else {"components": self._of_checkpoint, "compacted": True}

    def survivors(self) -> Survivors | None:
        """The components to write, where a checkpoint is to hold no others; None: all."""
        return self._pruner.survivors() if self._pruner is not None and self.compacting else None

    def close(self) -> None:
        """Detach from model and optimizer."""
        if self._pruner is not None:
            self._pruner.close()
