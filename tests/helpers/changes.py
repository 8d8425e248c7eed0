"""Changes of the parameters of a network from ``networks.build``, all of which inference has to notice."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from networks import images
from torch import nn

from hne import FusedHNE, Hierarchy
from hne.layers import BranchLinear


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


def fused_step(name: str) -> Callable[[FusedHNE], None]:
    """A step of a fused optimiser, which gives the parameters no new version."""

    def change(model: FusedHNE) -> None:
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, fused=True)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    return change


def sparse_fused_step(model: FusedHNE) -> None:
    """A step that changes few values, which no sample of the memory contains."""
    weight = model.head.conv.weight  # [6 * 5, 17, 1, 1]
    weight.grad = torch.zeros_like(weight)
    weight.grad[1] = 1
    torch.optim.SGD([weight], lr=1.0, fused=True).step()


def write_by_numpy(model: FusedHNE) -> None:
    """A write that PyTorch does not see, as those of collectives and of other processes."""
    model.blocks[0][0].unit.bn.weight.detach().numpy()[:] *= 2


def write_from_another_process(model: FusedHNE) -> None:
    model.share_memory()
    process = torch.multiprocessing.get_context("fork").Process(target=_double, args=(model.head.conv.bias,))
    model(images(torch.Generator().manual_seed(1)))  # the weights are folded again, in shared memory
    process.start()
    process.join()
    assert process.exitcode == 0


def _double(tensor: torch.Tensor) -> None:
    tensor.detach().numpy()[:] *= 2


def replace_head(model: FusedHNE) -> None:
    model.head = BranchLinear(model.head.branches, model.head.in_channels, 7).to(model.head.conv.weight)


def replace_layer(model: FusedHNE) -> None:
    layer = copy.deepcopy(model.blocks[1][1])
    layer.project.conv.weight.mul_(2)
    model.blocks[1][1] = layer


def replace_in_dictionary(model: FusedHNE) -> None:
    """Replaces a module without ``__setattr__``."""
    unit = model.blocks[0][0].unit
    unit._modules["conv"] = copy.deepcopy(unit.conv)
    unit._modules["conv"].weight.mul_(2)


def replace_buffer(model: FusedHNE) -> None:
    bn = model.blocks[1][1].depthwise.bn
    bn.running_mean = bn.running_mean - 3  # a higher mean would change nothing behind ReLUs that pass nothing


def set_eps(model: FusedHNE) -> None:
    model.blocks[0][1].unit.bn.eps = 0.5


def set_stride(model: FusedHNE) -> None:
    unit = model.blocks[0][0].unit
    unit.stride, unit.conv.stride = 1, (1, 1)


def set_spec(model: FusedHNE) -> None:
    layer = model.blocks[0][1]
    layer.spec = dataclasses.replace(layer.spec, activation="none")


def set_tree(model: FusedHNE) -> None:
    """Another network behind each leaf: one leaf of each pair now comes from another branch."""
    model.hierarchy = Hierarchy((1, 3, 3), num_models=6)


def delete_shortcut(model: FusedHNE) -> None:
    del model.blocks[1][0].shortcut
    model.blocks[1][0].shortcut = None


class Doubled(nn.Module):
    """A parametrization with a number."""

    factor = 2.0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.factor * weight


def parametrize(model: FusedHNE) -> None:
    nn.utils.parametrize.register_parametrization(model.blocks[0][0].unit.conv, "weight", Doubled())


def set_in_parametrization(model: FusedHNE) -> None:
    parametrize(model)
    model(images(torch.Generator().manual_seed(1)))
    model.blocks[0][0].unit.conv.parametrizations.weight[0].factor = 3.0


def change_tensor_that_is_no_parameter(model: FusedHNE) -> None:
    conv = model.head.conv
    bias = conv.bias.detach().clone()
    del conv.bias
    conv.bias = bias
    model(images(torch.Generator().manual_seed(1)))
    bias.add_(1)


CHANGES: dict[str, Callable[[FusedHNE], object]] = {
    "one weight": lambda m: m.blocks[0][0].unit.conv.weight[0, 0, 0, 0].add_(1),
    "a bottleneck's shortcut": lambda m: m.blocks[1][0].shortcut.bn.bias.add_(1),
    "running mean": lambda m: m.blocks[1][1].depthwise.bn.running_mean.sub_(3),
    "running variance": lambda m: m.blocks[0][1].unit.bn.running_var.mul_(3),
    "pooled linear": lambda m: m.blocks[2][2].linear.conv.bias.add_(0.5),
    "optimiser": step,
    "load_state_dict": load(assign=False),
    "load_state_dict(assign)": load(assign=True),
    "replaced parameter": replace_parameter,
    "replaced data": replace_data,
    "hidden by .data": write_to_data,
    "training": lambda m: (m.train(), m(images(torch.Generator().manual_seed(1))), m.eval()),
    "fused SGD": fused_step("SGD"),
    "fused Adam": fused_step("Adam"),
    "fused AdamW": fused_step("AdamW"),
    "fused Adagrad": fused_step("Adagrad"),
    "fused step of few values": sparse_fused_step,
    "one tensor's data": lambda m: m.head.conv.bias.data.add_(1),
    "NumPy": write_by_numpy,
    "another process": write_from_another_process,
    "replaced head": replace_head,
    "replaced layer": replace_layer,
    "replaced in a dictionary": replace_in_dictionary,
    "replaced buffer": replace_buffer,
    "eps": set_eps,
    "stride": set_stride,
    "spec": set_spec,
    "tree": set_tree,
    "deleted shortcut": delete_shortcut,
    "parametrization": parametrize,
    "attribute of a parametrization": set_in_parametrization,
    "no parameter": change_tensor_that_is_no_parameter,
    "rounded to bfloat16": lambda m: (m.bfloat16(), m.double()),
}
