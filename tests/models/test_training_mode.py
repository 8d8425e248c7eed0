"""Both models in training mode: weights, running statistics and initialisation."""

from __future__ import annotations

import copy

import networks
import pytest
import torch
from networks import NUM_CLASSES, build, each_model, each_tree, images
from placements import Placement

from hne import HNE, FusedHNE, Hierarchy, NaiveHNE, objective


@each_tree
def test_fused_and_naive_training_agree(tree: Hierarchy, double: Placement, rng: torch.Generator) -> None:
    """After a few steps, of all models and of some, weights and running statistics are the same."""
    naive = build(NaiveHNE, tree, rng).train()
    fused = naive.to_fused()
    before = copy.deepcopy(naive.state_dict())
    loss = objective("I+HD", alpha=0.4)
    steps = [tree.num_models, 1, max(1, tree.num_models - 1), tree.num_models]
    batches = [(images(rng, 4), torch.randint(NUM_CLASSES, (4,), generator=rng)) for _ in steps]
    for model in (naive, fused):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        for n, (x, target) in zip(steps, batches, strict=True):
            optimizer.zero_grad()
            loss(model(x, n), target).backward()
            optimizer.step()
    for name, value in naive.state_dict().items():
        assert not torch.equal(value, before[name]), name
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-8, atol=1e-9, msg=name)
    x = images(rng)
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), naive.eval()(x), rtol=1e-7, atol=1e-8)


@each_model
def test_training_under_autocast_keeps_statistics_in_float32(kind: type[HNE], rng: torch.Generator) -> None:
    model = build(kind, networks.TREES["doubling"], rng, torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective("I+HD")(model(images(rng, dtype=torch.float32)), torch.tensor([0, 1, 2]))
    loss.backward()
    for tensor in (*model.buffers(), *(p.grad for p in model.parameters())):
        assert tensor.dtype in (torch.float32, torch.int64)
        assert tensor.isfinite().all()


@each_model
def test_only_evaluated_branches_update_their_statistics(kind: type[HNE], rng: torch.Generator) -> None:
    model = build(kind, networks.TREES["odd"], rng).train()
    running = model.blocks[2][0].expand.bn.running_var.view(6, -1)
    before = running.clone()
    model(images(rng), 4)
    assert (running != before).any(1).tolist() == [True] * 4 + [False] * 2


@each_model
@pytest.mark.parametrize("momentum", [None, 0.3])
def test_batch_norm_settings_are_honoured(kind: type[HNE], momentum: float | None, rng: torch.Generator) -> None:
    """Frozen batch norms use their running statistics; a momentum of None is a cumulative average."""
    model = build(kind, Hierarchy((1, 1, 1)), rng).train()
    first = model.blocks[0][0].unit
    first.bn.momentum = momentum
    first.bn.reset_running_stats()
    frozen = model.blocks[1][0].expand.bn.eval()
    before = frozen.running_mean.clone()
    means = []
    for _ in range(3):
        x = images(rng)
        model(x)
        y = torch.conv2d(x, first.conv.weight, stride=2, padding=1)
        means.append(y.mean((0, 2, 3)))
    expected = torch.stack(means).mean(0)
    if momentum is not None:
        expected = sum(momentum * (1 - momentum) ** (2 - i) * mean for i, mean in enumerate(means))
    torch.testing.assert_close(first.bn.running_mean, expected.detach())
    assert first.bn.num_batches_tracked == 3
    assert torch.equal(frozen.running_mean, before)


@each_model
def test_one_value_per_channel_cannot_be_normalised(kind: type[HNE], rng: torch.Generator) -> None:
    model = build(kind, networks.TREES["single"], rng).train()
    with pytest.raises(ValueError, match=r"[Ee]xpected more than 1 value per channel when training"):
        model(images(rng, batch=1, size=(1, 1)))


def test_initialisation_does_not_depend_on_the_number_of_branches() -> None:
    """The standard deviation is sqrt(2 / fan out) of one branch (He et al., 2015)."""
    torch.manual_seed(0)
    model = FusedHNE.from_preset("hne_resnet50_cifar", num_classes=100)
    unit = model.blocks[4][1].expand  # 16 branches, 256 > 64
    assert unit.conv.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.02)
    depthwise = model.blocks[4][1].depthwise
    assert depthwise.conv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert model.head.conv.weight.abs().max().item() == pytest.approx(256**-0.5, rel=0.01)
    assert torch.equal(unit.bn.weight, torch.ones_like(unit.bn.weight))
