"""``hne bench``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from ..distributed import choose_device
from ..errors import ResultError
from ..evaluation import seconds_per_call
from ..losses import objective
from ..models import HNE, PRESETS, FusedHNE
from ..reporting import show_table
from . import options

_DESCRIPTION = """\
Compare the speed of the fused implementation with that of the naive one (plain PyTorch), on random
images and weights. Both must give the same logits. For thorough benchmarks: `pytest --benchmark`.
"""
_EXAMPLES = """\
  hne bench
  hne bench --preset hne_resnet50_cifar --batch-sizes 1,8,64 --num-models 4
  hne bench --preset hne_resnet50_cifar --batch-sizes 32 --train
"""


def add_parser(commands: options.Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = options.new_parser(
        commands, "bench", "measure the speed of the kernels on this machine", _DESCRIPTION, _EXAMPLES
    )
    parser.set_defaults(execute=execute)
    group = parser.add_argument_group("workload")
    group.add_argument("--preset", choices=tuple(PRESETS), default="hne_tiny", help="architecture (default: hne_tiny)")
    group.add_argument(
        "--width", type=options.positive_float, default=1.0, metavar="F", help="factor on every channel count"
    )
    group.add_argument(
        "--num-models", type=options.positive_int, metavar="N", help="evaluate the first N members (default: all)"
    )
    group.add_argument(
        "--batch-sizes",
        type=options.positive_ints,
        default=(1, 8, 64),
        metavar="K,K,...",
        help="images per batch (default: 1,8,64)",
    )
    group.add_argument(
        "--input-size",
        type=options.positive_int,
        metavar="PIXELS",
        help="height and width of the images (default: those that the preset is made for, 32 or 224)",
    )
    group.add_argument(
        "--train", action="store_true", help="time a training step (forward, loss, backward) instead of inference"
    )
    group.add_argument(
        "--seconds",
        type=options.seconds,
        default=1.0,
        metavar="S",
        help="least time to spend on each measurement (default: 1)",
    )
    options.add_computing(parser)


def execute(args: argparse.Namespace) -> int:
    """Time both implementations, and print the table."""
    device = choose_device(args.device)
    size = args.input_size or PRESETS[args.preset].image_size
    rows = []
    with options.computing(args):
        torch.manual_seed(0)
        fused = FusedHNE.from_preset(args.preset, num_classes=100, width=args.width).to(device)
        fused.train(args.train)
        naive = fused.to_naive()
        work = _training_step if args.train else _inference
        for batch in args.batch_sizes:
            images = torch.randn(batch, 3, size, size, device=device)
            images = images.to(memory_format=torch.channels_last)
            steps = [work(model, images, args.num_models) for model in (fused, naive)]
            _check_close(steps[0](), steps[1]())
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


def _check_close(fused: Tensor, naive: Tensor) -> None:
    """Check that both implementations compute the same."""
    try:
        torch.testing.assert_close(fused, naive, rtol=1e-3, atol=1e-3)
    except AssertionError as error:
        raise ResultError(f"the fused and the naive implementation compute different outputs ({error})") from None


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
