"""Text classification and token tagging as next-token prediction: the label is the token predicted next."""

from moe_backbone.tasks.entities import entity_f1, require_seqeval, to_iob2
from moe_backbone.tasks.load import TaskCorpus, load_task
from moe_backbone.tasks.readers import Example, read_conll, read_csv
from moe_backbone.tasks.split import LabelBytes, TaskSplit

__all__ = [
    "Example",
    "LabelBytes",
    "TaskCorpus",
    "TaskSplit",
    "entity_f1",
    "load_task",
    "read_conll",
    "read_csv",
    "require_seqeval",
    "to_iob2",
]
