"""An ensemble from a trained network.

A trained network is cut into the blocks of a tree, whose branches start as copies of them. The first network of the
ensemble is the trained one; a short training makes the others differ. The first block is frozen, as it is shared by
all. Here the backbone is a small network that is first trained on handwritten digits in plain PyTorch.
"""

# %%
import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from hne import FusedHNE
from hne.data import evaluation_batches, load_dataset, training_batches
from hne.evaluation import evaluate
from hne.reporting import show_evaluation
from hne.training import TrainConfig, Trainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=20, help="epochs of each training (default: %(default)s)")
parser.add_argument("--train", type=int, default=300, help="digits to train on, of 903 (default: %(default)s)")
parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the plot (default: %(default)s)")
options = parser.parse_args()

# %% [markdown]
# ## A trained network
# Any network will do. Those of torchvision and timm are cut without help:
#
# ```
# net = torchvision.models.resnet18(weights="DEFAULT")          # or timm.create_model("resnet18", pretrained=True)
# model = FusedHNE.from_backbone(net, branches=(1, 1, 2, 4, 8), num_classes=10, freeze_trunk=True)
# ```


# %%
def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage1, self.stage2 = conv(1, 16), conv(16, 32, stride=2), conv(32, 64, stride=2)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stage2(self.stage1(self.stem(x))).mean((2, 3)))


torch.manual_seed(0)
dataset = load_dataset("digits", limit_train=options.train)
net, generator = Backbone(), torch.Generator().manual_seed(0)
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
for _ in range(options.epochs):
    for images, labels in training_batches(dataset.train, dataset.input, 32, generator):
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def accuracy(network: nn.Module) -> float:
    network.eval()
    batches = evaluation_batches(dataset.test, dataset.input, 256)
    return sum(int((network(images).argmax(-1) == labels).sum()) for images, labels in batches) / len(dataset.test)


print(f"the backbone: accuracy {accuracy(net):.2%}")

# %% [markdown]
# ## The ensemble
# A count of branches for each block of the tree: all networks share the stem, pairs share the second stage, each has a
# last stage of its own. `perturb` is the noise that tells copies apart. The printed table says which parts of the
# backbone have kernels.

# %%
model = FusedHNE.from_backbone(net, branches=(1, 4, 8), perturb=0.5, freeze_trunk=True)
print(model.conversion)
with torch.inference_mode():
    images, _ = next(evaluation_batches(dataset.test, dataset.input, 256))
    difference = (model.eval()(images, num_models=1)[0] - net(images)).abs().max()
print(f"largest difference of its first network's logits from the backbone's: {difference:.1e}")
before = evaluate(model, dataset)
show_evaluation(before, "before its training: the heads of the other networks are new")

# %% [markdown]
# ## Train it for a while
# The first network improves, too, as it is trained for twice as long as the backbone was.

# %%
config = TrainConfig.of(epochs=options.epochs, batch_size=32, lr=0.05)
*_, record = Trainer(model, dataset, config).train(eval_every=options.epochs)
after = record.evaluation
show_evaluation(after, "after it")

# %%
figure, axes = plt.subplots(figsize=(6, 4), dpi=150, layout="constrained")
sizes = [e.num_models for e in after.ensembles]
costs = [e.macs / after.ensembles[0].macs for e in after.ensembles]
axes.plot(costs, [100 * e.accuracy for e in after.ensembles], "o-", lw=2, label="ensemble of the first n networks")
axes.axhline(100 * accuracy(net), color="0.5", ls="--", label="the backbone before")
for size, cost, e in zip(sizes, costs, after.ensembles, strict=True):
    axes.annotate(f"n = {size}", (cost, 100 * e.accuracy), xytext=(6, -12), textcoords="offset points")
axes.set(xlabel="cost per image, as a multiple of the backbone's", ylabel="test accuracy (%)")
axes.margins(0.15, 0.25)
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, loc="lower right")
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "ensemble_from_backbone.png")
print(f"wrote {options.out / 'ensemble_from_backbone.png'}")
