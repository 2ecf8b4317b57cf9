"""Training: one process or many (torchrun), one step at a time, resumable to the bit.

Everything a step depends on is the configuration, the step number and the state in `last.pth`: the batch of a step is
computed from (seed, step) alone, and model, optimiser, moving average and random generators are saved. So a run that is
killed and resumed gives the same weights as one that was not.
"""

from .batches import Batches, PairBatches, TextBatches
from .devices import Processes, StepGraph, pick_device, processes
from .directory import LAST, owned
from .interrupt import Interrupt, Stopped
from .log import plot_loss, read_log
from .optimizers import Optimizers, lr_factor
from .tasks import PairsTask, Task, TextTask, pairs_perplexity
from .trainer import Result, Trainer

__all__ = [
    "LAST",
    "Batches",
    "Interrupt",
    "Optimizers",
    "PairBatches",
    "PairsTask",
    "Processes",
    "Result",
    "StepGraph",
    "Stopped",
    "Task",
    "TextBatches",
    "TextTask",
    "Trainer",
    "lr_factor",
    "owned",
    "pairs_perplexity",
    "pick_device",
    "plot_loss",
    "processes",
    "read_log",
]
