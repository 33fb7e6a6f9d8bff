"""Hugging Face's Trainer, with our data order, evaluation, checkpoints and stop on a loss that is not finite."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from dora_dist.adapters.components import Budget, ComponentPruner
from dora_dist.adapters.method import AdapterMethod
from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.format import load_checkpoint, load_pruner, pruner_state
from dora_dist.checkpoint.resuming import forgets_best, located
from dora_dist.checkpoint.saving import Origin, Saver
from dora_dist.config import RunConfig
from dora_dist.data import EpochBatches, EpochDataLoader, TokenizedData
from dora_dist.models.build import DTYPES, AdaptedModel
from dora_dist.runtime.console import note, warn
from dora_dist.runtime.distributed import World
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.stopping import EvaluationStopped, StopRequest, StopTogether
from dora_dist.tasks import task_named
from dora_dist.training.finiteness import StepLosses
from dora_dist.training.rates import go_on_at, set_rates
from dora_dist.training.unreadable import Unreadable
from dora_dist.zero3.components import ShardedComponentPruner
from dora_dist.zero3.optimizer_state import inner_optimizer, step_was_skipped
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
        config: RunConfig,
        method: AdapterMethod,
        budget: Budget | None,
        args: TrainingArguments,
        data: TokenizedData,
        tokenizer: Any,
        world: World,
        stop: StopRequest,
        callbacks: list[TrainerCallback],
        trained_with: Mapping[str, Any],
        changed: Mapping[str, str],
    ) -> None:
        """`trained_with` is what checkpoints record of this run, and `changed` what differs from the one that it goes
        on from (`resuming`).
        """
        self._tokenizer, self._trained_with, self._changed = tokenizer, trained_with, changed
        self.run, self.config, self.method, self.data, self.world = run, config, method, data, world
        self.stopping = False
        self._plan = config.training.batch_plan(world.world_size)
        self._budget = budget
        self.run_dir = Path(config.checkpoint.run_dir)
        self.tokens_seen = 0
        self._task = task_named(config.model.task)
        self._objective = self._task.objective(tokenizer, run.model, data=config.data, training=config.training)
        self._unreadable = Unreadable(self._objective.problems, config.data.bad_images, world)
        self._stop = stop
        self._together: StopTogether | None = None
        self._saver: Saver | None = None
        self._losses = StepLosses()
        self.pruner: ComponentPruner | None = None
        self._components: dict[str, Any] | None = None  # what pruning found, once it is over and forgotten
        super().__init__(
            model=run.model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=self._objective.collator,
            compute_loss_func=self._objective.loss,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # our own callback says it, readably
        if self._objective.loss is not None:
            self.model_accepts_loss_kwargs = False  # the number of items is for our loss, not for the model's

    # --- data ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> EpochDataLoader:
        training = self.config.training
        batches = EpochBatches(
            len(self.data.train),
            global_batch_size=training.global_batch_size,
            micro_batch_size=self._plan.micro_batch_size,
            world_size=self.world.world_size,
            rank=self.world.rank,
            seed=training.seed,
            order=self.data.train.epoch_order,
        )
        return self._loader(self.data.train, batches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> EpochDataLoader:
        dataset = eval_dataset if eval_dataset is not None else self.data.validation
        assert dataset is not None  # the configuration is refused before: eval_every needs validation data
        batches = EpochBatches.in_order(
            len(dataset),
            micro_batch_size=self.config.training.micro_batch_size,
            world_size=self.world.world_size,
            rank=self.world.rank,
        )
        return self._loader(dataset, batches)

    def _loader(self, dataset: Any, batches: EpochBatches) -> EpochDataLoader:
        return EpochDataLoader(
            self._objective.with_filler(dataset),
            batch_sampler=batches,
            collate_fn=self._objective.collator,
            num_workers=self.config.data.num_workers,
            pin_memory=self.args.device.type != "cpu",
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        set_rates(optimizer, self.run.model, self.config.training.learning_rates)
        return optimizer

    # --- a step -------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if num_items_in_batch is not None:  # 0 where none of a last, small batch could be read
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        # `inputs` are still in host memory: what is read of them here waits for nothing.
        self.tokens_seen += int(inputs["attention_mask"].sum())
        loss = super().training_step(model, self._objective.prepared(inputs), num_items_in_batch)
        self._losses.add(loss, inputs["input_ids"])
        return loss

    def _prepare_input(self, data: Any) -> Any:
        """To the device as the Trainer does it, but from page-locked memory (`_loader`), so that no copy waits for
        the work that the device still has.
        """
        if isinstance(data, Tensor):
            dtype = DTYPES[self.config.model.dtype] if data.is_floating_point() else data.dtype
            return data.to(self.args.device, dtype, non_blocking=True)
        return super()._prepare_input(data)

    def agree(self) -> None:
        """Learn what any rank knows, and act on it on every rank, in every optimizer step (collective)."""
        assert self._saver is not None
        device = self.args.device
        known = torch.tensor([self._stop.signal is not None, self._saver.failed, self._unreadable.any], device=device)
        anywhere = torch.cat([known.float(), self._losses.not_finite(device)[None]])
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        self.stopping, save_failed, unreadable, not_finite = map(bool, anywhere.tolist())  # the step's one wait
        if unreadable:
            self.log(self._unreadable.settle())
        if not_finite:
            self._end_not_finite()
        if save_failed:
            self._saver.wait()
        self._report_saved(self.config.checkpoint.on_failure == "stop")

    def _end_not_finite(self) -> None:
        """A loss on some rank is infinite or not a number (collective)."""
        suspects: list[Any] = [None] * self.world.world_size
        dist.all_gather_object(suspects, self._losses.first_not_finite())
        rank, suspect = next((rank, found) for rank, found in enumerate(suspects) if found is not None)
        self._refuse_step(self.state.global_step + 1, f"the loss became {suspect['loss']}", {"rank": rank, **suspect})

    def check_step_was_taken(self) -> None:
        """After an optimizer step: raise UserError on every rank if the engine skipped it (collective).

        That is what DeepSpeed does, in every number format, where a gradient is infinite or not a number although the
        loss is; the run would count a step that nothing was learnt in.
        """
        if step_was_skipped(self.model_wrapped):
            samples: list[Any] = [None] * self.world.world_size
            dist.all_gather_object(samples, self._losses.samples())
            what = "the loss is finite, but its gradient is not, so no step could be taken"
            self._refuse_step(self.state.global_step, what, {"first_tokens_by_rank": samples})
        self._losses.clear()

    def _refuse_step(self, step: int, what: str, facts: dict[str, Any]) -> None:
        if self.world.first:
            run_folder.write_json(self.run_dir / "not_finite.json", {"step": step, **facts})
        where = f" on rank {facts['rank']}" if "rank" in facts else ""
        raise UserError(
            f"optimizer step {step}{where}: {what}; no checkpoint was written for this step. Lower "
            "training.learning_rate, lengthen training.warmup_steps, or look at the batch recorded in "
            f"{self.run_dir / 'not_finite.json'}"
        )

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
        dataset = eval_dataset if eval_dataset is not None else self.data.validation
        loader = self.get_eval_dataloader(dataset)
        try:
            found = self._objective.evaluate(model, self._until_stopped(loader), dataset, self.args.device)
        except EvaluationStopped:
            self.stopping = self.control.should_save = self.control.should_training_stop = True
            return {}
        if left_out := self._unreadable.settle():
            self.log(left_out)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _until_stopped(self, loader: EpochDataLoader) -> Iterator[dict[str, Any]]:
        if self._together is None:
            self._together = StopTogether(self._stop, self.config.engine.step_timeout_s)
        for batch in loader:
            self._together.check()
            yield self._prepare_inputs(batch)
        self._together.finish()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if not metrics:  # of an evaluation that was stopped
            return False
        best = bool(super()._determine_best_metric(metrics, trial))
        if best and self.config.checkpoint.keep_best:
            self.control.should_save = True
        return best

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, step = self.run_dir, self.state.global_step
        assert self.lr_scheduler is not None
        folder = run_folder.checkpoint_folder(run_dir, step)
        is_best = self.config.checkpoint.keep_best and self.state.best_global_step == step
        if is_best:
            self.state.best_model_checkpoint = str(folder)
        fields = {
            "step": step,
            "run": run_folder.run_of(run_dir) if self.world.first else None,
            "trained_with": self._trained_with,
            "learning_rates": self.lr_scheduler.get_last_lr(),
        }
        if self.pruner is not None:
            self._components = pruner_state(self.pruner)
        if self._components is not None:
            fields |= {"components": self._components, "compacted": self.pruner is None or self.compacting}
        best = float(self.state.best_metric) if is_best and self.state.best_metric is not None else None

        def once_complete() -> None:
            if best is not None:
                run_folder.set_best(run_dir, folder, best, f"eval_{self.config.training.metric}")
            run_folder.retire(run_dir, self.config.checkpoint.keep_last)

        assert self._saver is not None
        survivors = self.pruner.survivors() if self.pruner is not None and self.compacting else None
        self._saver.save(folder, fields, _plain(asdict(self.state)), survivors, once_complete)

    def _report_saved(self, must_succeed: bool) -> None:
        """Say how the last save went, if it has ended. Raises UserError if it failed and must not."""
        assert self._saver is not None
        saved = self._saver.ended()
        if saved is None:
            return
        if saved.failure is None:
            if self.world.first:
                step = float(run_folder.step_of(saved.folder))
                self.log({"saved_step": step, "save_stall_seconds": saved.stall_s, "save_seconds": saved.write_s})
            return
        text = f"saving {saved.folder} failed: {saved.failure}. Earlier checkpoints are as they were"
        if must_succeed:
            going_on = self.config.checkpoint.on_failure == "stop" and self.state.global_step < self.state.max_steps
            hint = '. checkpoint.on_failure = "continue" would let training go on' if going_on else ""
            raise UserError(f"{text}{hint}")
        if self.world.first:
            self.log({"save_failed": 1.0})
            warn(f"{text}; training goes on (checkpoint.on_failure)")

    def finish_saving(self) -> None:
        """Wait for the last save (collective). Raises UserError if it failed: a run must not end without its result."""
        assert self._saver is not None
        self._saver.close()
        if self._together is not None:
            self._together.close()
        self._report_saved(must_succeed=True)

    def close(self) -> None:
        """Let go of the engine (collective): its memory is free once nothing refers to this trainer any more."""
        self.run.norms.close()
        if self.pruner is not None:
            self.pruner.close()
        release(self.model_wrapped)

    def wait_for_saving(self, timeout_s: float = 30.0) -> None:
        """What can still be saved when the ranks end too early; not collective."""
        if self._saver is not None:
            self._saver.wait(timeout_s)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        model, run = located(self.config).model, self.run
        files = self._task.files(self._tokenizer, run.base) if self.world.first else {}
        origin = Origin(self.method, model.path, model.revision, run.head, run.trained, run.base_digest, files)
        self._saver = Saver(self.model_wrapped, run.model, origin, self.config.engine.start_timeout_s)
        manifest = None if resume_from_checkpoint is None else self._go_on_from(Path(resume_from_checkpoint))
        if manifest is not None and manifest.get("compacted"):
            self._components = manifest["components"]
        elif self._budget is not None:
            self.pruner = self._component_pruner(self._budget)
            if manifest is not None:
                load_pruner(manifest, self.pruner)
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
        if forgets_best(self._changed) or folder.resolve().parent != self.run_dir.resolve():
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        self.run.norms.mark_stale()
        return manifest

    def _component_pruner(self, budget: Budget) -> ComponentPruner:
        adapter = self.config.adapter
        return ShardedComponentPruner(
            self.run.model,
            inner_optimizer(self.model_wrapped),
            budget,
            beta=adapter.importance_beta,
            dem=adapter.dem_weight / (2 if adapter.dem_form == "code" else 1),
            backwards=self._plan.accumulation_steps,
            clear_moments=adapter.pruned_moments == "clear",
        )

    @property
    def compacting(self) -> bool:
        """Whether the mask is final and the run is to go on without the pruned components."""
        return self.pruner is not None and self.pruner.finished and self.config.adapter.compact

    def settle_components(self) -> None:
        """Score and prune after this optimizer step, and log what was pruned (collective)."""
        if self.pruner is None:
            return
        events, should_log = len(self.pruner.events), self.control.should_log
        self.pruner.settle()
        for event in self.pruner.events[events:]:
            self.log(
                {
                    "components_kept": event.kept,
                    "components": event.components,
                    "components_budget": event.components - event.pruned,
                    "dem_penalty": self.pruner.penalty,
                }
            )
        self.control.should_log = should_log  # our line is not the loss's, which is still to come

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: the random state is a function of (seed, step, rank), set at every step's start."""


def _plain(value: Any) -> Any:
    """A JSON-able copy: what is not plain data (functions of a schedule, callbacks' objects) is left out."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if _is_plain(v)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value if _is_plain(v)]
    return value


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return isinstance(value, dict | list | tuple)
    return True
