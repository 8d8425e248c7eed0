"""PyTorch's tools for training loops: averaged weights, accumulated gradients, the profiler."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import TREES, build, each_model, images
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.profiler import ProfilerActivity, profile

from hne import HNE, FusedHNE, objective


def batches(model: HNE, rng: torch.Generator, count: int) -> list[tuple[Tensor, Tensor]]:
    return [(images(rng, 6), torch.randint(model.num_classes, (6,), generator=rng)) for _ in range(count)]


def train(model: HNE, data: list[tuple[Tensor, Tensor]], averaged: AveragedModel) -> list[dict[str, Tensor]]:
    """Train with one step for each batch; return the state after each."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    states = []
    for x, target in data:
        optimizer.zero_grad()
        objective("I+HD")(model(x), target).backward()
        optimizer.step()
        averaged.update_parameters(model)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return states


@each_model
@pytest.mark.parametrize("buffers", [True, False], ids=["with buffers", "parameters only"])
def test_exponential_moving_average(kind: type[HNE], buffers: bool, rng: torch.Generator) -> None:
    model = build(kind, TREES["odd"], rng).train()
    x = images(rng)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.6), use_buffers=buffers).eval()
    with torch.no_grad():
        average(x)  # folds the weights of inference, which must follow the average
    first, *states = train(model, batches(model, rng, 3), average)
    expected = first
    for state in states:
        expected = {
            name: 0.6 * value + 0.4 * state[name] if value.is_floating_point() else state[name]
            for name, value in expected.items()
        }
    parameters = dict(model.named_parameters())
    if not buffers:  # which AveragedModel then copies at each update
        expected = {name: value if name in parameters else states[-1][name] for name, value in expected.items()}
    reference = build(kind, TREES["odd"], rng)
    reference.load_state_dict(expected)
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():  # PyTorch rounds the average of a counter
            torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        torch.testing.assert_close(average(x), reference.eval().to_naive()(x))
        torch.testing.assert_close(average.module.prefix_logits(x), reference.to_naive().prefix_logits(x))


@each_model
def test_stochastic_weight_averaging(kind: type[HNE], rng: torch.Generator) -> None:
    model = build(kind, TREES["odd"], rng).train()
    x, average = images(rng), AveragedModel(model)
    states = train(model, data := batches(model, rng, 4), average)
    with torch.no_grad():
        average.eval()(x)
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter, torch.stack([state[name] for state in states]).mean(0))
    reference = copy.deepcopy(average.module).to_naive()
    update_bn(data, average)
    update_bn(data, reference)
    changed = False
    for (name, buffer), expected in zip(average.module.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=lambda text, name=name: f"{name}: {text}")
        changed |= "running" in name and not torch.equal(buffer, states[-1][name])
    assert changed
    with torch.no_grad():
        torch.testing.assert_close(average.eval()(x), reference.eval()(x))


@each_model
@pytest.mark.parametrize("name", ["I", "H", "I+HD"])
def test_accumulated_gradients_are_those_of_the_large_batch(kind: type[HNE], name: str, rng: torch.Generator) -> None:
    """With batch norms in eval mode, whose statistics do not depend on the batch."""
    model = build(kind, TREES["odd"], rng).double().eval()
    x, target = images(rng, 12).double(), torch.randint(model.num_classes, (12,), generator=rng)
    loss_of = objective(name)
    loss_of(model(x), target).backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    for images_, labels in zip(x.split(4), target.split(4), strict=True):
        (loss_of(model(images_), labels) / 3).backward()
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[parameter_name], rtol=1e-4, atol=1e-6)


def test_accumulation_in_training_mode_has_the_statistics_of_each_part(rng: torch.Generator) -> None:
    """As with nn.BatchNorm2d: the same as in plain PyTorch, running statistics included."""
    fused = build(FusedHNE, TREES["odd"], rng).train()
    naive = fused.to_naive()
    parts = batches(fused, rng, 3)
    for model in (fused, naive):
        for x, target in parts:
            (objective("I+HD")(model(x), target) / 3).backward()
    for (name, parameter), other in zip(fused.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, other.grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    for (name, buffer), other in zip(fused.named_buffers(), naive.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=lambda text, name=name: f"{name}: {text}")


def test_the_profiler_names_the_ops(rng: torch.Generator) -> None:
    model = build(FusedHNE, TREES["odd"], rng).train()
    ((x, target),) = batches(model, rng, 1)

    def names() -> set[str]:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            if model.training:
                objective("I+HD")(model(x), target).backward()
            else:
                with torch.inference_mode():
                    model(x)
        return {event.key for event in profiled.key_averages() if event.key.startswith("hne::")}

    training = names()
    assert {
        "hne::branch_conv2d",
        "hne::branch_conv2d_backward_weight",
        "hne::hierarchical_distillation_loss",
    } <= training
    model.eval()
    assert "hne::fused_layers" in names()
