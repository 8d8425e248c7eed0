"""Data sets by name, as batches ready for a network.

    dataset = load_dataset("cifar10", data_dir="~/data")
    for images, labels in evaluation_batches(dataset.test, dataset.input, 256): ...

``Dataset.from_torch(train, val)`` takes any two map-style data sets of PyTorch instead.

Images stay uint8 until a batch is made. Augmentation and normalisation work on whole batches. All random numbers come
from one generator, so that a run can be repeated and resumed exactly.
"""

from __future__ import annotations

from ..extras import require

require("train", "PIL", "sklearn")

from .corruptions import CORRUPTIONS, SEVERITIES, CorruptedImages, Corruption, corrupt, corrupted_images
from .dataset import Dataset
from .folder import image_files
from .formats import InputFormat, TargetFormat
from .held_out import hold_out_images
from .images import FileImages, Images, MemoryImages
from .items import ItemImages
from .loader import evaluation_batches, training_batches
from .ood import OOD_SAMPLES, ood_images, ood_samples
from .plan import Split
from .registry import DATASETS, RESIZABLE, load_dataset
