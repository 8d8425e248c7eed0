"""``hne bench``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from ..distributed import choose_device
from ..evaluation import seconds_per_call
from ..losses import objective
from ..models.hne import HNE, FusedHNE
from ..models.presets import PRESETS
from ..reporting import show_table
from .options import Subparsers, add_computing, computing, new_parser, positive, positives

_DESCRIPTION = """\
A quick comparison of the fused implementation with the naive one (plain PyTorch) on random images
and weights. That both give the same logits is checked first. The thorough comparison is
`pytest --benchmark`.
"""
_EXAMPLES = """\
  hne bench
  hne bench --preset hne_resnet50_cifar --batch-sizes 1,8,64 --num-models 4
  hne bench --preset hne_resnet50_cifar --batch-sizes 32 --train
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = new_parser(commands, "bench", "how fast the fused kernels are here", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(run=run)
    group = parser.add_argument_group("workload")
    group.add_argument("--preset", choices=tuple(PRESETS), default="hne_tiny", help="(default: hne_tiny)")
    group.add_argument("--width", type=float, default=1.0, metavar="F", help="factor on every channel count")
    group.add_argument("--num-models", type=positive, metavar="N", help="evaluate the first N models (default: all)")
    group.add_argument(
        "--batch-sizes",
        type=positives,
        default=(1, 8, 64),
        metavar="K,K,...",
        help="(default: 1,8,64)",
    )
    group.add_argument(
        "--input-size",
        type=positive,
        metavar="PIXELS",
        help="height and width of the images (default: 32; 224 for hne_mobilenetv2_075)",
    )
    group.add_argument("--train", action="store_true", help="time a training step: forward, loss, backward")
    group.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="time to spend on each figure at least (default: 1)",
    )
    add_computing(parser)


def run(args: argparse.Namespace) -> int:
    """Time both implementations and show the table."""
    device = choose_device(args.device)
    size = args.input_size or (224 if args.preset == "hne_mobilenetv2_075" else 32)
    rows = []
    with computing(args):
        torch.manual_seed(0)
        fused = FusedHNE.from_preset(args.preset, num_classes=100, width=args.width).to(device)
        fused.train(args.train)
        naive = fused.to_naive()
        work = _training_step if args.train else _inference
        for batch in args.batch_sizes:
            images = torch.randn(batch, 3, size, size, device=device)
            images = images.to(memory_format=torch.channels_last)
            steps = [work(model, images, args.num_models) for model in (fused, naive)]
            torch.testing.assert_close(steps[0](), steps[1](), rtol=1e-3, atol=1e-3)
            speeds = [batch / seconds_per_call(step, args.seconds) for step in steps]
            rows.append(
                (
                    batch,
                    f"{batch / speeds[0] * 1e3:.2f}",
                    f"{batch / speeds[1] * 1e3:.2f}",
                    f"{speeds[0]:.1f}",
                    f"{speeds[1]:.1f}",
                    f"{speeds[0] / speeds[1]:.2f}x",
                )
            )
    models = args.num_models or fused.num_models
    show_table(
        ["batch", "fused (ms)", "naive (ms)", "fused (img/s)", "naive (img/s)", "speedup"],
        rows,
        title=(
            f"{args.preset}, {models} of {fused.num_models} models, {size}x{size}: "
            f"{'training step' if args.train else 'inference'} on {device}, "
            f"{torch.get_num_threads()} thread(s)"
        ),
    )
    return 0


def _inference(model: HNE, images: Tensor, num_models: int | None) -> Callable[[], Tensor]:
    @torch.inference_mode()
    def step() -> Tensor:
        return model(images, num_models)

    return step


def _training_step(model: HNE, images: Tensor, num_models: int | None) -> Callable[[], Tensor]:
    loss_of = objective("I+HD")
    target = torch.arange(len(images), device=images.device) % model.num_classes

    def step() -> Tensor:
        model.zero_grad()
        loss = loss_of(model(images, num_models), target)
        loss.backward()
        return loss.detach()

    return step
