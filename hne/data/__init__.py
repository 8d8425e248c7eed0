"""Data sets by name, as batches ready for a network.

    dataset = load_dataset("cifar10", data_dir="~/data")
    for images, labels in evaluation_batches(dataset.test, dataset.input, 256): ...

Images stay uint8 until a batch is made; augmentation and normalisation work on whole batches, and
every random number comes from one generator, so that a run can be repeated and resumed exactly.
"""

from __future__ import annotations

from .dataset import Dataset, FileImages, Images, InputFormat, MemoryImages, TargetFormat
from .loader import evaluation_batches, training_batches
from .ood import foreign_images
from .registry import DATASETS, load_dataset

__all__ = [
    "DATASETS",
    "Dataset",
    "FileImages",
    "Images",
    "InputFormat",
    "MemoryImages",
    "TargetFormat",
    "evaluation_batches",
    "foreign_images",
    "load_dataset",
    "training_batches",
]
