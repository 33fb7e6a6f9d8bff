"""EleutherAI's lm-evaluation-harness on a run, a checkpoint, an adapter, a merged folder or any model folder.

    python examples/lm_harness.py runs/mine arc_easy,piqa
    python examples/lm_harness.py runs/mine my_task my_tasks/       # a folder with my_task.yaml

An adapter of any method stays unmerged on its base. Needs the extra `lm-eval`.
"""

import sys
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from dora_dist.evaluation.inference import load_for_inference


def main(
    model: str, tasks: str, folder: str | None = None, *, base: str | None = None, dtype: str = "bf16"
) -> dict[str, Any]:
    """Evaluate `model` on `tasks`, names between commas: the harness's own, or those of the files in `folder`.

    Returns the harness's result: `["results"][TASK]["acc,none"]` and so on. `base`: where an adapter's base is now.
    """
    loaded, tokenizer = load_for_inference(model, dtype, base)
    harness = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=8)
    found: dict[str, Any] = simple_evaluate(
        model=harness,
        tasks=tasks.split(","),
        task_manager=TaskManager(include_path=folder, include_defaults=folder is None),
    )
    for task, metrics in found["results"].items():
        print(task, {name: value for name, value in metrics.items() if isinstance(value, float)})
    return found


if __name__ == "__main__":
    main(*sys.argv[1:4])
