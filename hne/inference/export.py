"""Export of an ensemble to ``torch.export`` and ONNX."""

from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models import HNE

_ANY_BATCH = ({0: torch.export.Dim("batch", min=1)},)


class EnsembleMean(nn.Module):
    """The ensemble of the first ``num_models`` members as one network, for export.

    Args:
        model: The model, in eval mode.
        num_models: Number of members of the ensemble.
    """

    def __init__(self, model: HNE, num_models: int) -> None:
        super().__init__()
        self.model = model
        self.num_models = num_models

    def forward(self, images: Tensor) -> Tensor:
        """Mean logits of the members: images ``[B, C, H, W]`` to logits ``[B, L]``."""
        return self.model(images, self.num_models).mean(0)


def write_pt2(ensemble: EnsembleMean, images: Tensor, path: Path) -> Tensor:
    """Write a ``torch.export`` program for any batch size.

    A program of a :class:`FusedHNE` calls this package's ops: import ``hne_kernels`` before loading it.

    Args:
        ensemble: The network, in eval mode.
        images: Example images ``[B, C, H, W]``; B is at least 2.
        path: The file.

    Returns:
        The logits ``[B, L]`` that the written program computes for ``images``.
    """
    program = torch.export.export(ensemble, (images,), dynamic_shapes=_ANY_BATCH)
    torch.export.save(program, path)
    logits: Tensor = torch.export.load(path).module()(images)
    return logits


def write_onnx(ensemble: EnsembleMean, images: Tensor, path: Path) -> Tensor:
    """Write an ONNX graph for any batch size, with input ``images`` and output ``logits``.

    Arguments and result as for :func:`write_pt2`; the model is a :class:`NaiveHNE`, since ONNX has no ops like the
    kernels. ONNX Runtime computes the logits if it is installed, otherwise the reference evaluator of ``onnx``.

    Raises:
        RuntimeError: ``onnx`` or ``onnxscript`` is not installed.
    """
    if not (find_spec("onnx") and find_spec("onnxscript")):
        raise RuntimeError("the format onnx needs two more packages: pip install onnx onnxscript")
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # misses torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # raised within torch
        program = torch.onnx.export(
            ensemble,
            (images,),
            dynamic_shapes=_ANY_BATCH,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    program.save(path)
    inputs = {"images": images.numpy()}
    if find_spec("onnxruntime"):
        import onnxruntime

        (logits,) = onnxruntime.InferenceSession(path).run(None, inputs)
    else:
        from onnx.reference import ReferenceEvaluator

        (logits,) = ReferenceEvaluator(str(path)).run(None, inputs)
    return torch.from_numpy(logits)
