"""Which learning rate a method gets on a task: the best on validation texts that leaves room before training fails."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Sweep:
    """Accuracies of validation runs, one a seed, by learning rate; `least` is what a model gets that learnt nothing."""

    least: float
    runs: dict[float, list[float]] = field(default_factory=dict)

    def add(self, rate: float, accuracy: float) -> None:
        self.runs.setdefault(rate, []).append(accuracy)

    @property
    def means(self) -> Mapping[float, float]:
        """By rate, over seeds."""
        return {rate: statistics.mean(found) for rate, found in self.runs.items()}

    def best(self) -> float:
        """The rate of the highest mean, of several the lowest, at which no run failed, nor at up to twice the rate, as
        far as that was tried.

        Nearer to where training fails, runs with other seeds fail now and then: few validation runs cannot tell.
        """
        failed = [rate for rate, found in self.runs.items() if min(found) <= self.least]
        rates, means = sorted(self.runs), self.means
        sound = [rate for rate in rates if not any(rate <= other <= 2 * rate for other in failed)]
        return max(sound or rates, key=means.__getitem__)

    def beyond(self) -> list[float]:
        """The rate past the best one, by a factor of 2, where that is the lowest or highest of several."""
        top = self.best()
        if min(self.runs) < top < max(self.runs):
            return []
        return [top * 2 if top == max(self.runs) else top / 2]
