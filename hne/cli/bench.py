"""``hne bench``."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ..distributed import choose_device
from ..errors import ResultError
from ..evaluation import EAGER, FUSED, SIDES, InferenceSides, TrainingSides, alternating_seconds
from ..models import PRESETS, FusedHNE
from ..reporting import ProgressBar, show_table
from . import options

_DESCRIPTION = """\
Compare the speed of this package on this machine with that of others: the same network with the same
random weights and images. With the defaults it takes about a minute or two, mostly for torch.compile.

  fused        this package
  eager        plain PyTorch, layer by layer
  compile      torch.compile of the network that `hne export` writes, with its weights as constants
  onnxruntime  ONNX Runtime with that network, if installed: pip install onnx onnxscript onnxruntime
  openvino     OpenVINO with that network, if installed:     pip install onnx onnxscript openvino

All must compute the same. They take turns after short rests, so that the machine's other load slows down
all alike, and no side's threads are in the way of another. Times are medians in milliseconds; ratio is the
time of the fastest other side over that of this package: above 1 this package is faster. Close other
programs; repeat the command to see how far the figures vary.

The engines load an exported graph in float32, compiled for the batch size, and take the faster one of
both forms (`hne export --branches`). For thorough benchmarks: `pytest --benchmark`, docs/benchmarks.md.
"""
_EXAMPLES = """\
  hne bench
  hne bench --preset hne_mobilenetv2_075 --batch-sizes 1,8 --num-models 4
  hne bench --against onnxruntime,openvino --seconds 10
  hne bench --batch-sizes 32 --train --against eager
"""
_ROUNDS = 15
_REST = 0.02  # seconds; longer than idle threads spin
_OTHERS = tuple(name for name in SIDES if name != FUSED)


def add_parser(commands: options.Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = options.new_parser(
        commands, "bench", "measure the speed on this machine, beside other engines", _DESCRIPTION, _EXAMPLES
    )
    parser.set_defaults(execute=execute)
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="hne_resnet50_cifar",
        help="architecture (default: hne_resnet50_cifar)",
    )
    group.add_argument(
        "--width", type=options.positive_float, default=1.0, metavar="F", help="factor on every channel count"
    )
    group.add_argument(
        "--num-models", type=options.positive_int, metavar="N", help="evaluate the first N members (default: all)"
    )
    group.add_argument(
        "--batch-sizes",
        type=options.positive_ints,
        default=(1, 8),
        metavar="K,K,...",
        help="images per batch (default: 1,8)",
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
        "--against",
        type=_names,
        default=_OTHERS,
        metavar="NAME,NAME,...",
        help=f"others to measure (default: {','.join(_OTHERS)}, as far as installed)",
    )
    group.add_argument(
        "--seconds",
        type=options.seconds,
        default=1.0,
        metavar="S",
        help="least time to spend on each measurement (default: 1)",
    )
    options.add_quiet(group)
    options.add_computing(parser)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in _OTHERS]:
        raise argparse.ArgumentTypeError(f"expected names of {', '.join(_OTHERS)}, got {unknown[0]!r}")
    return names


def execute(args: argparse.Namespace) -> int:
    """Time all sides, and print the table."""
    device = choose_device(args.device)
    size = args.input_size or PRESETS[args.preset].image_size
    names = [FUSED, *(name for name in _OTHERS if name in args.against)]
    remarks: dict[str, str] = {}
    rows = []
    with options.computing(args), ExitStack() as stack:
        torch.manual_seed(0)
        model = FusedHNE.from_preset(args.preset, num_classes=100, width=args.width).to(device).train(args.train)
        num_models = args.num_models or model.num_models
        model.hierarchy.check_num_models(num_models)
        if not args.train:
            stack.enter_context(model.frozen_parameters())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        turns = len(args.batch_sizes) * len(names) * (1 + _ROUNDS)
        bar = stack.enter_context(ProgressBar(turns, unit="turn", hidden=args.quiet))
        for batch in args.batch_sizes:
            images = torch.randn(batch, 3, size, size, device=device)
            images = images.to(memory_format=torch.channels_last)
            sides = (
                TrainingSides(model, images, num_models)
                if args.train
                else InferenceSides(model, images, num_models, folder)
            )
            calls, expected = {}, None
            for name in names:
                bar.describe(f"batch {batch}: preparing {SIDES[name]}")
                if (why := sides.unavailable(name)) is None:
                    try:
                        call = sides.make(name)
                        got = call().clone()
                    except Exception as error:  # a compiler may be missing, for example
                        if name in (FUSED, EAGER):
                            raise
                        why = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    else:
                        expected = got if expected is None else expected
                        _check_close(SIDES[name], got, expected)
                        calls[name] = call
                if why is not None:
                    remarks[name] = why
                bar.update()
            bar.describe(f"batch {batch}: measuring")
            per_round = args.seconds / _ROUNDS
            times = alternating_seconds([*calls.values()], _ROUNDS, per_round, rest=_REST, progress=bar.update)
            rows.append((batch, dict(zip(calls, times, strict=True))))
    measured = [name for name in names if any(name in seconds for _, seconds in rows)]
    show_table(
        ["batch", *(f"{SIDES[name]} (ms)" for name in measured), "images/s", "ratio"],
        [
            (
                batch,
                *(f"{seconds[name] * 1e3:.2f}" if name in seconds else "" for name in measured),
                f"{batch / seconds[FUSED]:.1f}",
                _ratio(seconds),
            )
            for batch, seconds in rows
        ],
        title=(
            f"{args.preset}, {num_models} of {model.num_models} models, {size}x{size}: "
            f"{'training step' if args.train else 'inference'} on {device}, "
            f"{args.threads or torch.get_num_threads()} thread(s)"
        ),
        caption="\n".join(f"{SIDES[name]}: {why}" for name, why in remarks.items()) or None,
    )
    return 0


def _ratio(seconds: dict[str, float]) -> str:
    """Time of the fastest other side over that of this package."""
    others = [value for name, value in seconds.items() if name != FUSED]
    return f"{min(others) / seconds[FUSED]:.2f}x" if others else ""


def _check_close(title: str, got: Tensor, expected: Tensor) -> None:
    """Check that a side computes what this package computes."""
    try:
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    except AssertionError as error:
        raise ResultError(f"{title} and {SIDES[FUSED]} compute different outputs ({error})") from None
