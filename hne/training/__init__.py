"""Training: configs, the loop, distillation from a teacher, and the folder that a run leaves."""

from .config import DEFAULTS, PROTOCOLS, SCHEDULES, TrainConfig
from .distillation import DistillationTrainer, StudentConfig, expand_branches, student_configs
from .history import EpochRecord
from .run_directory import CHECKPOINT, SUMMARY, final_evaluation, remove_run, run_title, train_into
from .teachers import Teacher, check_outputs, member_outputs, online_teacher, read_outputs, tabulated_teacher
from .trainer import Trainer, check_same_run

__all__ = [
    "CHECKPOINT",
    "DEFAULTS",
    "PROTOCOLS",
    "SCHEDULES",
    "SUMMARY",
    "DistillationTrainer",
    "EpochRecord",
    "StudentConfig",
    "Teacher",
    "TrainConfig",
    "Trainer",
    "check_outputs",
    "check_same_run",
    "expand_branches",
    "final_evaluation",
    "member_outputs",
    "online_teacher",
    "read_outputs",
    "remove_run",
    "run_title",
    "student_configs",
    "tabulated_teacher",
    "train_into",
]
