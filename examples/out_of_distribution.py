"""Uncertainty on out-of-distribution images.

An ensemble is trained on handwritten digits and then shown images of something else: clothes (Fashion-MNIST), noise, or
a folder of yours. Five scores say how uncertain it is about an image. A good score is high on these images and low on
digits; AUROC is the probability that it is higher on one of them than on a digit.

The mutual information needs several members: it is the part of the entropy that comes from their disagreement.
"""

# %%
import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from hne.data import MemoryImages, load_dataset, ood_images
from hne.errors import DataError
from hne.evaluation import evaluate_ood, predict
from hne.metrics import energy, max_logit, max_probability, mutual_information, predictive_entropy
from hne.reporting import show_evaluation, show_ood
from hne.training import TrainConfig, Trainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--ood", help="fashion-mnist, noise, or a folder of images (default: fashion-mnist if installed)")
parser.add_argument("--epochs", type=int, default=10, help="epochs of training (default: %(default)s)")
parser.add_argument("--train", type=int, default=900, help="digits to train on, of 903 (default: %(default)s)")
parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the plot (default: %(default)s)")
options = parser.parse_args()

# %% [markdown]
# ## Train
# Eight networks in a tree, for a few epochs. `hne.load("runs/...")` gives a model of `hne train` instead.

# %%
dataset = load_dataset("digits", limit_train=options.train)
trainer = Trainer.from_config(TrainConfig.of(epochs=options.epochs, batch_size=32), dataset)
*_, record = trainer.train(eval_every=options.epochs)
model = trainer.model
show_evaluation(record.evaluation, "digits")

# %% [markdown]
# ## Images of something else
# They are resized and normalised as the digits are. Noise has the digits' mean and deviation in every pixel.


# %%
def noise(count: int) -> MemoryImages:
    pixels = torch.randn(count, *dataset.input.size, 1) * dataset.input.std[0] + dataset.input.mean[0]
    return MemoryImages((255 * pixels.clamp(0, 1)).byte(), torch.zeros(count, dtype=torch.long))


def other_images() -> tuple[str, MemoryImages]:
    if options.ood == "noise":
        return "noise", noise(1000)
    name = options.ood or "fashion-mnist"
    try:
        return name, ood_images(name, dataset.input, limit=1000)
    except DataError as error:
        if options.ood:  # asked for by name
            raise
        print(f"noise instead of Fashion-MNIST: {error}")
        return "noise", noise(1000)


name, others = other_images()
evaluations = evaluate_ood(model, dataset, others)
show_ood(evaluations, f"digits against {name}")

# %% [markdown]
# ## The scores of each image

# %%
SCORES = {
    "entropy": predictive_entropy,  # of all members
    "mutual information": mutual_information,
    "max. probability": lambda members: max_probability(members.mean(0)),  # of the mean logits
    "max. logit": lambda members: max_logit(members.mean(0)),
    "energy": lambda members: energy(members.mean(0)),
}


@torch.inference_mode()
def member_logits(images: MemoryImages) -> torch.Tensor:  # [members, images, classes]
    return torch.cat([members for members, _ in predict(model, images, dataset.input, 256)], dim=1)


inside, outside = member_logits(dataset.test), member_logits(others)

figure, axes = plt.subplots(2, 3, figsize=(11, 6.2), dpi=150, layout="constrained")
for axis, (label, score) in zip(axes.flat, SCORES.items(), strict=False):
    values = score(inside), score(outside)
    low, high = torch.cat(values).aminmax()
    bins = torch.linspace(low, high, 40).tolist()
    for images, scores in zip(("digits", name), values, strict=True):
        axis.hist(scores.tolist(), bins, density=True, alpha=0.6, label=images)
    axis.set(title=f"{label}, {model.num_models} networks", yticks=[], xlabel="uncertainty")
axes[0, 0].legend(frameon=False)
axes[0, 0].set_ylabel("images")
axes[1, 0].set_ylabel("images")

curves = axes[1, 2]
for label in SCORES:
    attribute = "by_" + label.replace("max.", "max").replace(" ", "_")
    known = [e for e in evaluations if e.num_models > 1 or label != "mutual information"]
    curves.plot(
        [e.num_models for e in known], [100 * getattr(e, attribute).auroc for e in known], "o-", ms=4, label=label
    )
curves.set(title="detection by the first n networks", xlabel="n", ylabel="AUROC (%)", xscale="log")
curves.set_xticks([e.num_models for e in evaluations], [str(e.num_models) for e in evaluations], minor=False)
curves.minorticks_off()
curves.legend(frameon=False, fontsize=8)
for axis in axes.flat:
    axis.spines[["top", "right"]].set_visible(False)

options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "out_of_distribution.png")
print(f"wrote {options.out / 'out_of_distribution.png'}")
