"""Hugging Face's Trainer, with our data order, evaluation, checkpoints and agreement of the ranks at every step."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from dora_dist.checkpoint.early_stopping import counts_after, told, without_gain
from dora_dist.checkpoint.format import load_checkpoint
from dora_dist.config import EngineConfig, TrainingConfig
from dora_dist.data import EpochDataLoader
from dora_dist.models.build import AdaptedModel
from dora_dist.runtime.console import note
from dora_dist.runtime.stopping import EvaluationStopped, StopTogether
from dora_dist.training.checkpoints import Checkpoints
from dora_dist.training.finiteness import StepLosses, refuse_gradient, refuse_loss
from dora_dist.training.loaders import Loaders, on_device
from dora_dist.training.optimizers import OPTIMIZERS
from dora_dist.training.pruning import Pruning
from dora_dist.training.ranks import Ranks
from dora_dist.training.rates import go_on_at, set_rates
from dora_dist.training.reporting import ReportCallback
from dora_dist.training.samples import Samples
from dora_dist.training.source_losses import KEY, SourceLosses
from dora_dist.training.unreadable import KEY as PROBLEMS
from dora_dist.training.unreadable import Unreadable
from dora_dist.zero3.optimizer_state import step_was_skipped
from dora_dist.zero3.teardown import release


class DoraTrainer(Trainer):
    """Trains an AdaptedModel on the engine. What differs from the plain Trainer:

    - batches come in an order that does not know the world size, every sample once per epoch;
    - checkpoints are ours (safetensors and JSON, free of the world size) and resume from ours;
    - evaluation is over the whole set at once, exact at every world size;
    - what one rank knows all act on at the same step: a loss that is not finite, a signal to stop, a failed save.
    """

    def __init__(
        self,
        run: AdaptedModel,
        args: TrainingArguments,
        loaders: Loaders,
        *,
        ranks: Ranks,
        run_dir: Path,
        training: TrainingConfig,
        engine: EngineConfig,
        pruning: Pruning,
        unreadable: Unreadable,
        report: ReportCallback,
        samples: Samples | None,
        callbacks: Sequence[TrainerCallback],
        open_checkpoints: Callable[[Any], Checkpoints],
        forget_best: bool,
    ) -> None:
        """`open_checkpoints` makes what writes the checkpoints of an engine, and `forget_best` says that a resumed
        run's earlier metrics do not count.
        """
        self.run, self.stopping, self.pruning = run, False, pruning
        self._loaders, self._ranks, self._run_dir = loaders, ranks, run_dir
        self._training, self._step_timeout_s = training, engine.step_timeout_s
        self.ended_early: str | None = None
        """Why the run is over before its last step (training.early_stopping)."""
        self._counts_after = pruning.budget.last if pruning.budget is not None else 0
        self._unreadable, self._report, self._samples = unreadable, report, samples
        self._open_checkpoints, self._forget_best = open_checkpoints, forget_best
        self._objective, self._losses = loaders.objective, StepLosses()
        mixture = loaders.data.train.mixture
        self._source_losses = None if mixture is None else SourceLosses(mixture.names)
        self._checkpoints: Checkpoints
        """Made with the engine (`_prepare_for_training`)."""
        self._together: StopTogether | None = None
        super().__init__(
            model=run.model,
            args=args,
            train_dataset=loaders.data.train,
            eval_dataset=loaders.data.validation,
            data_collator=self._objective.collator,
            compute_loss_func=self._objective.loss,
            optimizer_cls_and_kwargs=OPTIMIZERS[training.optimizer].made(training, engine, args.device),
            callbacks=[_EveryStep(self, ranks), *callbacks],
        )
        self.remove_callback(PrinterCallback)  # our own callback says it, readably
        if self._objective.loss is not None:
            self.model_accepts_loss_kwargs = False  # the number of items is for our loss, not for the model's

    # --- data and optimizer -------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> EpochDataLoader:
        return self._loaders.training()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        set_rates(optimizer, self.run.model, self._training.learning_rates)
        return optimizer

    # --- a step -------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The items of a step's batches over all ranks, as the objective counts them (collective)."""
        return super()._get_num_items_in_batch([self._objective.counted(batch) for batch in batch_samples], device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if num_items_in_batch is not None:  # 0 where none of a last, small batch could be read
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        self._unreadable.problems += inputs.pop(PROBLEMS, [])
        # `inputs` are still in host memory: what is read of them here waits for nothing.
        self._report.saw(self._objective.tokens(inputs), places=inputs["input_ids"].numel())
        loss = super().training_step(model, self._objective.prepared(inputs), num_items_in_batch)
        self._losses.add(loss, inputs["input_ids"])
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As Trainer's; of a mixture the losses of its sources are kept, too."""
        if self._source_losses is None or KEY not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        sources, inputs = inputs[KEY], {name: each for name, each in inputs.items() if name != KEY}
        loss, outputs = super().compute_loss(model, {**inputs}, True, num_items_in_batch)
        of = self._objective.sources(sources, inputs)
        self._source_losses.add(self._objective.row_losses(outputs, inputs), of)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Collective: every rank logs the same kinds of lines."""
        if self._source_losses is not None and "loss" in logs:
            logs = {**logs, **self._source_losses.settle(self.args.device)}
        super().log(logs, start_time)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self._objective.placed(on_device(inputs, self.args.device, self._half, exact=self._objective.exact))

    @property
    def _half(self) -> torch.dtype:
        """Of the numbers that a batch has, besides token ids."""
        return torch.bfloat16 if self.args.bf16 else torch.float32

    def agree(self) -> None:
        """Learn what any rank knows, and act on it on every rank, in every optimizer step (collective)."""
        device, checkpoints = self.args.device, self._checkpoints
        known = [self._ranks.stop.signal is not None, checkpoints.any_ended, self._unreadable.any]
        anywhere = torch.cat([torch.tensor(known, device=device).float(), self._losses.not_finite(device)[None]])
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        self._unreadable.read(self._training.global_batch_size)
        self.stopping, save_ended, unreadable, not_finite = map(bool, anywhere.tolist())  # the step's one wait
        if unreadable:
            self.log(self._unreadable.settle())
        if not_finite:
            refuse_loss(self._losses, self.state.global_step + 1, self._ranks.world, self._run_dir)
        if save_ended:
            self._log_if_any(checkpoints.ended())

    def settle(self) -> None:
        """After an optimizer step, which is refused if the engine skipped it: prune, if that is due (collective)."""
        if step_was_skipped(self.model_wrapped):
            refuse_gradient(self._losses, self.state.global_step, self._ranks.world, self._run_dir)
        self._losses.clear()
        should_log = self.control.should_log
        for line in self.pruning.settle():
            self.log(line)
        self.control.should_log = should_log  # our line is not the loss's, which is still to come

    # --- evaluation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The objective's metrics over the whole validation set (collective): {"eval_loss": ..., ...}.

        {} if a rank was asked to stop: the run then saves, and ends.
        """
        model = self.model_wrapped
        model.eval()
        dataset = eval_dataset if eval_dataset is not None else self._loaders.data.validation
        assert dataset is not None  # the configuration is refused before: eval_every needs validation data
        loader = self._loaders.evaluation(dataset)
        try:
            found = self._objective.evaluate(model, self._until_stopped(loader), dataset, self.args.device)
        except EvaluationStopped:
            self.stopping = self.control.should_save = self.control.should_training_stop = True
            return {}
        self._log_if_any(self._unreadable.settle())
        if self._samples is not None:
            said = self._samples.answered(model, self.args.device, self._half, stopping=self._asked_to_stop)
            self._report.answered(said)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _asked_to_stop(self) -> bool:
        """Whether a rank was, after the validation set was through (collective); the next step then ends the run."""
        assert self._together is not None
        try:
            self._together.check()
            self._together.finish()
        except EvaluationStopped:
            return True
        return False

    def _until_stopped(self, loader: EpochDataLoader) -> Iterator[dict[str, Any]]:
        if self._together is None:
            self._together = StopTogether(self._ranks.stop, self._step_timeout_s)
        for batch in loader:
            self._together.check()
            yield self._prepare_inputs(batch)
        self._together.finish()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if not metrics:  # of an evaluation that was stopped
            return False
        best = bool(super()._determine_best_metric(metrics, trial))
        if best and self._checkpoints.keeps_best:
            self.control.should_save = True
        self._stop_early()
        return best

    def _stop_early(self) -> None:
        """After an evaluation: end the run if training.early_stopping says so, with a checkpoint (collective)."""
        patience = self._training.early_stopping
        if patience is None or not self.pruning.over:
            return
        waited, value, at = without_gain(self.state.log_history, self._training, after=self._counts_after)
        enough = torch.tensor(int(waited >= patience), device=self.args.device)
        dist.broadcast(enough, 0)  # metrics are the same everywhere, or nearly: all ranks do as rank 0
        if enough.item():
            self.ended_early = told(self._training, waited, value, at)
            self.control.should_save = self.control.should_training_stop = True

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Make the engine and what needs it: checkpoints, and pruning; restore what a checkpoint holds (collective)."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._checkpoints = self._open_checkpoints(self.model_wrapped)
        manifest = None if resume_from_checkpoint is None else self._go_on_from(Path(resume_from_checkpoint))
        backwards = self.args.gradient_accumulation_steps
        self.pruning.begin(self.run.model, self.model_wrapped, backwards, manifest=manifest)
        return prepared

    def _go_on_from(self, folder: Path) -> dict[str, Any]:
        """Restore what trains and the schedule (collective); returns the checkpoint's manifest."""
        manifest = load_checkpoint(folder, self.model_wrapped, self.run.model)
        assert self.lr_scheduler is not None
        before, now = manifest["learning_rates"][0], go_on_at(self.lr_scheduler, manifest["step"])[0]
        if before != now:
            note(
                f"the next step's learning rate is {now:.3g}, as a run of {self.state.max_steps} steps with these "
                f"settings has it there; {folder.name} would have gone on at {before:.3g}"
            )
        self.state.compute_steps(self.args, self.state.max_steps)  # else logging, saving, evaluating as they were then
        self.state.train_batch_size = self._train_batch_size
        self._unreadable.go_on(manifest)
        self._counts_after = max(self._counts_after, counts_after(manifest))
        if self._forget_best:
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
            self._counts_after = max(self._counts_after, manifest["step"])
        self.run.norms.mark_stale()
        return manifest

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.lr_scheduler is not None
        rates = self.lr_scheduler.get_last_lr()
        self._checkpoints.save(
            self.state, rates, self.pruning, left_out=self._unreadable.counts, counts_after=self._counts_after
        )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load nothing: the random state is a function of (seed, step, rank), set at every step's start."""
        return

    def wait_for_saving(self, timeout_s: float = 30.0) -> None:
        """What can still be saved when the ranks end too early; not collective."""
        self._checkpoints.wait(timeout_s)

    def finish_saving(self) -> None:
        """Wait for the last save (collective). Raises UserError if it failed: a run must not end without its result."""
        self._checkpoints.close()
        if self._together is not None:
            self._together.close()
        steps_left = self.state.global_step < self.state.max_steps
        while line := self._checkpoints.ended(finishing=True, steps_left=steps_left):
            self.log(line)

    def close(self) -> None:
        """Let go of the engine (collective): its memory is free once nothing refers to this trainer any more."""
        self.run.norms.close()
        self.pruning.close()
        release(self.model_wrapped)

    def _log_if_any(self, line: dict[str, float]) -> None:
        """Every rank has a line, or none has: logging is collective."""
        if line:
            self.log(line)


class _EveryStep(TrainerCallback):
    """Calls the trainer around each optimizer step, of which only callbacks are told; ends training in time."""

    def __init__(self, trainer: DoraTrainer, ranks: Ranks) -> None:
        self._trainer, self._ranks = trainer, ranks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ranks.watch.before_exit = self._trainer.wait_for_saving
        self._ranks.stop.can_save = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.agree()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.settle()
        if self._trainer.stopping or self._trainer.pruning.compacting:  # then a smaller model goes on from this
            control.should_save = control.should_training_stop = True
        if self._trainer.stopping:
            control.should_evaluate = False  # there may be little time left
