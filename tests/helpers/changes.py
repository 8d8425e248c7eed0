"""Changes of the parameters of a network from ``networks.build``, all of which inference has to notice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from networks import images
from torch import nn

from hne import FusedHNE


def step(model: FusedHNE) -> None:
    """A step of an optimiser."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def replace_parameter(model: FusedHNE) -> None:
    conv = model.blocks[1][0].expand.conv
    conv.weight = nn.Parameter(conv.weight * 2)


def replace_data(model: FusedHNE) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def write_to_data(model: FusedHNE) -> None:
    """PyTorch's version counter does not see this change; it takes effect with eval()."""
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    model.eval()


def load(assign: bool) -> Callable[[FusedHNE], None]:
    return lambda model: model.load_state_dict(
        {name: value * 2 for name, value in model.state_dict().items()}, assign=assign
    )


CHANGES: dict[str, Callable[[FusedHNE], object]] = {
    "one weight": lambda m: m.blocks[0][0].unit.conv.weight[0, 0, 0, 0].add_(1),
    "a bottleneck's shortcut": lambda m: m.blocks[1][0].shortcut.bn.bias.add_(1),
    "running mean": lambda m: m.blocks[1][1].depthwise.bn.running_mean.add_(0.5),
    "running variance": lambda m: m.blocks[0][1].unit.bn.running_var.mul_(3),
    "pooled linear": lambda m: m.blocks[2][2].linear.conv.bias.add_(0.5),
    "optimiser": step,
    "load_state_dict": load(assign=False),
    "load_state_dict(assign)": load(assign=True),
    "replaced parameter": replace_parameter,
    "replaced data": replace_data,
    "hidden by .data": write_to_data,
    "training": lambda m: (m.train(), m(images(torch.Generator().manual_seed(1))), m.eval()),
    "rounded to bfloat16": lambda m: (m.bfloat16(), m.double()),
}
