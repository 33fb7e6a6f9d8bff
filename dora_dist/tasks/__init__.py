"""What a model is trained for: one object per task in one file, and the rest asks the object."""

from dora_dist.tasks.causal_lm import CausalLM
from dora_dist.tasks.image_text_to_text import ImageTextToText
from dora_dist.tasks.question_answering import QuestionAnswering
from dora_dist.tasks.rules import check, problems
from dora_dist.tasks.seq2seq_lm import Seq2SeqLM
from dora_dist.tasks.sequence_classification import SequenceClassification
from dora_dist.tasks.task import TASKS, Task, register, task_named
from dora_dist.tasks.vision_seq2seq_lm import VisionSeq2SeqLM

for _task in (
    CausalLM(),
    SequenceClassification(),
    QuestionAnswering(),
    Seq2SeqLM(),
    ImageTextToText(),
    VisionSeq2SeqLM(),
):
    register(_task)

__all__ = ["TASKS", "Task", "check", "problems", "register", "task_named"]
