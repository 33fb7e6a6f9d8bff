"""What DeepSpeed and Hugging Face's Trainer get from the configuration, read by their own parsers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dora_dist.config import RunConfig, deepspeed_options
from dora_dist.runtime.errors import UserError
from tests.unit.test_config import RECIPES, refusal, with_fields


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "plan"),
    [
        (48, 4, 1, (4, 12, 0)),
        (48, 4, 3, (4, 4, 0)),
        (48, 4, 12, (4, 1, 0)),
        (16, 4, 8, (2, 1, 0)),  # fewer records at a time than allowed
        (16, 4, 3, (3, 2, 2)),  # the ranks do not divide the batch
        (16, 16, 5, (4, 1, 4)),
        (7, 1, 2, (1, 4, 1)),
        (10, 4, 1, (4, 3, 2)),
    ],
)
def test_every_world_size_takes_the_global_batch(
    batch: int, micro: int, ranks: int, plan: tuple[int, int, int]
) -> None:
    config = RunConfig.from_dict(with_fields(training={"global_batch_size": batch, "micro_batch_size": micro}))
    assert config.training.batch_plan(ranks) == plan
    derived = config.deepspeed_config(ranks)
    assert derived["train_batch_size"] == plan[0] * plan[1] * ranks
    assert (derived["train_micro_batch_size_per_gpu"], derived["gradient_accumulation_steps"]) == plan[:2]


def test_more_ranks_than_records_are_refused() -> None:
    config = RunConfig.from_dict(with_fields(training={"global_batch_size": 16}))
    with pytest.raises(UserError, match="global_batch_size = 16: gives no record for each of 17 ranks; .* at most 16"):
        config.deepspeed_config(17)


def test_deepspeed_json_follows_the_fields() -> None:
    config = RunConfig.from_dict(
        with_fields(
            model={"dtype": "fp32"},
            training={"max_grad_norm": 0.5, "global_batch_size": 24, "micro_batch_size": 3},
            engine={
                "offload_param": "cpu",
                "offload_optimizer": "cpu",
                "hpz_partition_size": 2,
                "param_persistence_threshold": 1,
                "prefetch_bucket_size": 2,
                "reduce_bucket_size": 3,
                "max_live_parameters": 4,
                "max_reuse_distance": 5,
                "allgather_sequential": True,
                "deepspeed": {
                    "zero_optimization": {"sub_group_size": 6, "offload_param": {"pin_memory": False}},
                    "wall_clock_breakdown": True,
                    "comms_logger": {"enabled": True},
                },
            },
        )
    )
    assert config.deepspeed_config(4) == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 1,
            "stage3_prefetch_bucket_size": 2,
            "reduce_bucket_size": 3,
            "stage3_max_live_parameters": 4,
            "stage3_max_reuse_distance": 5,
            "stage3_allgather_sequential": True,
            "zero_hpz_partition_size": 2,
            "offload_param": {"device": "cpu", "pin_memory": False},
            "offload_optimizer": {"device": "cpu"},
            "sub_group_size": 6,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": True,
        "comms_logger": {"enabled": True},
    }
    with pytest.raises(UserError, match=r"engine\.hpz_partition_size = 2: does not divide 1 ranks"):
        config.deepspeed_config(1)


def test_derived_json_is_a_copy() -> None:
    raw = with_fields(engine={"deepspeed": {"comms_logger": {"enabled": True}}})
    config = RunConfig.from_dict(raw)
    config.deepspeed_config(1)["comms_logger"]["enabled"] = False
    assert config.deepspeed_config(1)["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_batch_size": 8}, "train_batch_size is decided elsewhere; use training.global_batch_size"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is decided elsewhere; use model.dtype"),
        ({"bf16": True}, "bf16 = True: must be a JSON object"),
        ({"fp16": {"enabled": True}}, "fp16 is decided elsewhere; use model.dtype"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is decided elsewhere; use training.optimizer"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is decided elsewhere"),
        (
            {"zero_optimization": {"stage3_max_live_parameters": 1}},
            "stage3_max_live_parameters is decided elsewhere; use engine.max_live_parameters",
        ),
        ({"zero_optimization": {"max_live_parameters": 1}}, "use engine.max_live_parameters"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "use engine.offload_param"),
        ({"zero_optimization": {"offload_param": "cpu"}}, "must be a JSON object"),
    ],
)
def test_engine_option_with_a_field_of_its_own_names_that_field(options: dict[str, Any], message: str) -> None:
    assert message in refusal(with_fields(engine={"deepspeed": options}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"zero_optimization": {"zero_quantized_weights": True}},
            "zero_quantized_weights = True: cannot be used: norms",
        ),
        ({"zero_optimization": {"zero_quantized_nontrainable_weights": True}}, "its CUDA kernels read fp16"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "its CUDA kernels read fp16"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "use engine.hpz_partition_size"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, "only DeepSpeed's own CPU optimizer can split"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "masters and Adam's moments are fp32"),
        ({"prescale_gradients": True}, "ZeRO-3 does not support it"),
        ({"amp": {"enabled": True}}, "use model.dtype"),
        ({"curriculum_learning": {"enabled": True}}, "the order of the data is this project's own"),
    ],
)
def test_engine_option_that_cannot_be_right_says_why(options: dict[str, Any], message: str) -> None:
    assert message in refusal(with_fields(engine={"deepspeed": options}))


def test_an_impossible_engine_option_may_be_switched_off() -> None:
    off = {"zero_quantized_weights": False, "mics_shard_size": -1, "offload_optimizer": {"ratio": 1.0}}
    options = {"zero_optimization": off, "amp": {"enabled": False}, "gradient_predivide_factor": 1.0}
    RunConfig.from_dict(with_fields(engine={"deepspeed": options}))


def test_engine_option_that_deepspeed_refuses_is_told_before_it_starts() -> None:
    def config(zero: dict[str, Any]) -> RunConfig:
        return RunConfig.from_dict(with_fields(engine={"deepspeed": {"zero_optimization": zero}}))

    deepspeed_options.check(config({"sub_group_size": 5, "offload_param": {"pin_memory": False}}).engine.deepspeed)
    with pytest.raises(
        UserError, match=r"zero_optimization\.sub_group_sise: unknown key; did you mean sub_group_size\?"
    ):
        deepspeed_options.check(config({"sub_group_sise": 5}).engine.deepspeed)
    with pytest.raises(UserError, match=r"zero_optimization\.sub_group_size = 'big': .*valid integer"):
        deepspeed_options.check(config({"sub_group_size": "big"}).engine.deepspeed)
    sparse = RunConfig.from_dict(with_fields(engine={"deepspeed": {"sparse_gradients": True}}))
    with pytest.raises(
        UserError, match=r"engine\.deepspeed: DeepSpeed refuses it\n  sparse_gradients = True: .*sparse_gradients"
    ):
        deepspeed_options.check(sparse.engine.deepspeed)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_deepspeed_reads_the_derived_json_of_every_recipe(recipe: Path, dtype: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = RunConfig.load(
        recipe, [f"--model.dtype={dtype}", "--engine.offload_param=cpu", "--engine.offload_optimizer=cpu"]
    )
    derived = config.deepspeed_config(1)
    read = DeepSpeedConfig(derived)
    zero = read.zero_config
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (
        config.training.global_batch_size,
        config.training.micro_batch_size,
        config.training.batch_plan(1).accumulation_steps,
    )
    assert read.bfloat16_config.enabled is (dtype == "bf16")
    assert read.gradient_clipping == config.training.max_grad_norm
    assert (zero.stage, zero.offload_param.device, zero.offload_optimizer.device) == (3, "cpu", "cpu")
    assert zero.param_persistence_threshold == config.engine.param_persistence_threshold
    assert zero.prefetch_bucket_size == config.engine.prefetch_bucket_size
    assert zero.max_live_parameters == config.engine.max_live_parameters
    assert zero.max_reuse_distance == config.engine.max_reuse_distance
    assert zero.allgather_sequential is config.engine.allgather_sequential
    assert read.zero_force_ds_cpu_optimizer is False
    deepspeed_options.check(derived)  # DeepSpeed looks at every key of it


def test_hugging_face_finds_no_mismatch_with_the_derived_json(tmp_path: Path) -> None:
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config = RunConfig.from_dict(with_fields(training={"max_grad_norm": 0.7, "learning_rate": 3e-4}))
    training = config.training
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=True,
        per_device_train_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=config.training.batch_plan(1).accumulation_steps,
        max_grad_norm=training.max_grad_norm,
        learning_rate=training.learning_rate,
    )
    engine = HfTrainerDeepSpeedConfig(config.deepspeed_config(1))
    engine.trainer_config_process(arguments)
    assert engine.mismatches == []
    assert engine.is_zero3()
    assert engine.dtype() == torch.bfloat16
