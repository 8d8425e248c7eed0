"""Train on your folder of images.

The folder has a folder for each class, DIR/train/CLASS/ and, if you have test images, DIR/val/CLASS/. Without --data,
scikit-learn's handwritten digits are written as PNG files into such a folder first.

The command `hne train --data folder --data-dir DIR` does the same, with checkpoints and `--resume`.
"""

# %%
import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

import hne
from hne.data import load_dataset
from hne.reporting import show_evaluation
from hne.training import TrainConfig, Trainer, train_into

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", type=Path, metavar="DIR", help="your folder (default: handwritten digits)")
parser.add_argument("--preset", choices=hne.PRESETS, default="hne_tiny", help="network (default: %(default)s)")
parser.add_argument(
    "--image-size", type=int, default=16, metavar="PIXELS", help="64 to 224 for photographs (default: %(default)s)"
)
parser.add_argument("--epochs", type=int, default=8, help="epochs of training (default: %(default)s)")
parser.add_argument("--limit", type=int, metavar="N", help="train on N images, test on as many (default: on all)")
parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of results (default: %(default)s)")
options = parser.parse_args()

# %% [markdown]
# ## The images


# %%
def write_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / "train" / f"digit {label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * (255 / 16)).astype("uint8")).save(path)


folder = options.data or options.out / "digits"
if options.data is None and not folder.exists():
    write_digits(folder)
limits = {"limit_train": options.limit, "limit_test": options.limit}
dataset = load_dataset("folder", folder, image_size=options.image_size, **limits)
print(f"{len(dataset.train)} images to train on, {len(dataset.test)} to test on: {', '.join(dataset.classes)}")

# %% [markdown]
# ## Train
# Random crops and flips help with photographs. Digits are not the same in a mirror.

# %%
config = TrainConfig.of(
    data="folder",
    preset=options.preset,
    image_size=options.image_size,
    epochs=options.epochs,
    batch_size=32,
    augment=options.data is not None,
    **limits,
)
trainer = Trainer.from_config(config, dataset)
run = options.out / "folder_run"
for record in train_into(run, trainer, eval_every=1):
    print(f"epoch {record.epoch}: loss {record.loss:.3f}, accuracy {record.evaluation.ensembles[-1].accuracy:.1%}")
show_evaluation(record.evaluation, "ensembles of the first n networks")

# %% [markdown]
# ## Load, and share
# The run is a checkpoint, a log and a plot of accuracy against cost. `hne.load` reads it; the model's metadata name the
# classes. `save_pretrained` writes a folder to share, with a model card.

# %%
model = hne.load(run)
model.save_pretrained(options.out / "folder_model")
classes = model.metadata["data"]["classes"]

# %% [markdown]
# ## Classify pictures
# Each test image gets as many networks as it needs to be 95 % certain.

# %%
predictor = hne.AnytimePredictor(model, confidence=0.95)
paths = dataset.test.paths[:: max(1, len(dataset.test) // 8)][:8]
pixels = torch.stack([torch.from_numpy(dataset.input.read(path).copy()) for path in paths])
answer = predictor(dataset.input.normalise(pixels))

figure, axes = plt.subplots(2, 4, figsize=(9, 5), dpi=150, layout="constrained")
for axis in axes.flat:
    axis.set_axis_off()
for i, (axis, path) in enumerate(zip(axes.flat, paths, strict=False)):
    probability, label = answer.probabilities[i].max(-1)
    count = int(answer.num_models[i])
    axis.imshow(Image.open(path).convert("RGB"))
    axis.set_title(f"{classes[label]}: {probability:.0%}\n{count} network{'s' if count > 1 else ''}", fontsize=10)
figure.savefig(options.out / "train_on_folder.png")
print(f"wrote {options.out / 'train_on_folder.png'} and {options.out / 'folder_model'}")
