"""Export of an ensemble to ``torch.export`` and ONNX."""

from __future__ import annotations

import io
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ..averages import mixture
from ..executors import CopyFreeNetwork
from ..losses import gaussians
from ..models import HNE, FusedHNE


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
        logits: Tensor = self.model(images, self.num_models)
        return logits[0] if self.num_models == 1 else logits.mean(0)

    def copy_free(self, images: Tensor, separate: bool = False) -> nn.Module:
        """The same function as a network of ``torch.nn`` modules; see :class:`CopyFreeNetwork`."""
        return CopyFreeNetwork(self.model, slice(0, self.num_models), images, mean=True, separate=separate)


class EnsembleMixture(nn.Module):
    """The ensemble of the first ``num_models`` members of a regression as one network, for export.

    Every member predicts a Gaussian. The mean of their outputs would leave out that the members' means differ, which is
    a part of the variance of their mixture (Lakshminarayanan et al. 2017).

    Args:
        model: The model with two outputs, in eval mode.
        num_models: Number of members of the ensemble.
        target_mean: Mean of the targets that the model was trained on.
        target_std: Their standard deviation.
    """

    def __init__(self, model: HNE, num_models: int, target_mean: float, target_std: float) -> None:
        super().__init__()
        self.model = model
        self.num_models = num_models
        self.target_mean = target_mean
        self.target_std = target_std

    def forward(self, samples: Tensor) -> Tensor:
        """Mean and variance of the mixture in the units of the target: ``[B, C, 1, 1]`` to ``[B, 2]``."""
        return self.of_members(self.model(samples, self.num_models))

    def of_members(self, outputs: Tensor) -> Tensor:
        """Mean and variance of the mixture of the members' outputs ``[num_models, B, 2]``."""
        mean, variance = mixture(*gaussians(outputs))
        return torch.stack([mean * self.target_std + self.target_mean, variance * self.target_std**2], -1)

    def copy_free(self, images: Tensor, separate: bool = False) -> nn.Module:
        """As :meth:`EnsembleMean.copy_free`."""
        return _Mixture(
            self, CopyFreeNetwork(self.model, slice(0, self.num_models), images, mean=False, separate=separate)
        )


class _Mixture(nn.Module):
    def __init__(self, ensemble: EnsembleMixture, network: CopyFreeNetwork) -> None:
        super().__init__()
        self.network = network
        self._mixture = ensemble.of_members

    def forward(self, samples: Tensor) -> Tensor:
        return self._mixture(self.network(samples))


Ensemble = EnsembleMean | EnsembleMixture


def any_batch() -> tuple[dict[int, torch.export.Dim]]:
    """The sizes that a program leaves open. Made here, as the first one imports sympy, which takes half a second."""
    return ({0: torch.export.Dim("batch", min=1)},)


def write_pt2(ensemble: Ensemble, images: Tensor, path: Path, separate: bool = False) -> Tensor:
    """Write a ``torch.export`` program for any batch size.

    A program of a :class:`FusedHNE` calls this package's ops: import ``hne_kernels`` before loading it. That of a
    :class:`NaiveHNE` consists of PyTorch's ops. Its batch norms are folded into weights, features are not copied where
    the tree branches, and the ensemble's mean is part of the last layer; see :class:`CopyFreeNetwork`.

    Args:
        ensemble: The network, in eval mode.
        images: Example images ``[B, C, H, W]``; B is at least 2.
        path: The file.
        separate: In the program of a :class:`NaiveHNE` each branch has convolutions of its own. By default those of a
            layer are one grouped convolution. Which one is faster depends on the engine and on the network.

    Returns:
        The output ``[B, L]`` that the written program computes for ``images``.
    """
    network = ensemble if isinstance(ensemble.model, FusedHNE) else ensemble.copy_free(images, separate).eval()
    save_program(torch.export.export(network, (images,), dynamic_shapes=any_batch()), path)
    output: Tensor = torch.export.load(io.BytesIO(path.read_bytes())).module()(images)
    return output


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a program of ``torch.export``."""
    buffer = io.BytesIO()  # torch's own writer ends the process where the disk is full
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


def write_onnx(ensemble: Ensemble, images: Tensor, path: Path, separate: bool = False) -> Tensor:
    """Write an ONNX graph for any batch size, with input ``images`` and output ``logits`` (``gaussian`` in regression).

    Arguments and result as for :func:`write_pt2`; the graph of a :class:`FusedHNE` is that of a :class:`NaiveHNE`, as
    ONNX has no ops like the kernels. ONNX Runtime computes the logits if it is installed, otherwise the reference
    evaluator of ``onnx``.

    Raises:
        RuntimeError: ``onnx`` or ``onnxscript`` is not installed.
    """
    output = "gaussian" if isinstance(ensemble, EnsembleMixture) else "logits"
    save_onnx(ensemble.copy_free(images, separate).eval(), images, path, ["images"], [output])
    inputs = {"images": images.numpy()}
    if find_spec("onnxruntime"):
        import onnxruntime

        (logits,) = onnxruntime.InferenceSession(path.read_bytes()).run(None, inputs)
    else:
        from onnx.reference import ReferenceEvaluator

        (logits,) = ReferenceEvaluator(path.read_bytes()).run(None, inputs)
    return torch.from_numpy(logits)


def save_onnx(
    network: nn.Module | torch.export.ExportedProgram, x: Tensor, path: Path, inputs: list[str], outputs: list[str]
) -> None:
    """Write the ONNX graph of a network or program for any batch size.

    Args:
        network: The network.
        x: Its example input.
        path: The file.
        inputs, outputs: Names for the graph.

    Raises:
        RuntimeError: ``onnx`` or ``onnxscript`` is not installed.
    """
    if not (find_spec("onnx") and find_spec("onnxscript")):
        raise RuntimeError("the format onnx needs two more packages: pip install onnx onnxscript")
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # misses torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # raised within torch
        program = torch.onnx.export(
            network, (x,), dynamic_shapes=any_batch(), input_names=inputs, output_names=outputs, verbose=False
        )
    assert program is not None
    program.save(path)
