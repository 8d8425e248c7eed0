"""Training: configs, the loop, steps by CUDA graphs, distillation from a teacher, and the folder that a run leaves."""

from .captured_step import CapturedStep, training_step
from .config import DEFAULTS, PROTOCOLS, SCHEDULES, TrainConfig
from .distillation import DistillationTrainer, StudentConfig, expand_branches, student_configs
from .exits import ExitTrainer
from .history import EpochRecord
from .run_directory import (
    CHECKPOINT,
    RUN_FILES,
    SUMMARY,
    check_no_other_files,
    final_evaluation,
    remove_run,
    run_title,
    train_into,
)
from .sandwich import SandwichStep, calibrate_widths
from .teachers import Teacher, check_outputs, member_outputs, read_outputs
from .tensorboard import FOLDER, check_tensorboard, open_writer, write_scalars
from .trainer import Trainer, check_same_run
