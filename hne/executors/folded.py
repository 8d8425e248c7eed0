"""Inference: sessions with folded weights, cached with the model until its parameters change."""

from __future__ import annotations

from typing import Any

import torch

from .base import SubtreeRunner
from .kernels import KernelExecutor
from .parameter_versions import ParameterVersions
from .session import InferenceSession


class FoldedExecutor(KernelExecutor):
    """Features as in :class:`KernelExecutor`; no gradients, and batch norm by the running statistics."""

    def runner(self, network: Any) -> SubtreeRunner:
        return self.session(network).run

    def session(self, network: Any) -> InferenceSession:
        """The session of a network (a :class:`FoldedWeightCache`): cached while its parameters stay unchanged.

        A CUDA graph reads the weights of the cached session, which the network then keeps alive. A graph that is
        captured without an earlier call folds the weights itself, anew in every replay; so does a compiled program in
        every call.
        """
        if torch.compiler.is_compiling():
            return InferenceSession(network)
        session: InferenceSession | None = network.current()
        capturing = is_capturing()
        if session is None:
            with torch.no_grad():
                if capturing:  # its results exist when the graph is replayed, not now
                    return InferenceSession(network)
                session = InferenceSession(network, ParameterVersions(network.modules()))
            if (device := network.head.conv.weight.device).type == "cuda":
                # Once, so that every stream may read the new weights, and none still reads those that they replace.
                torch.cuda.synchronize(device)
            network.folded = session
        if capturing:
            network.graph_weights.append(session)
        return session


def is_capturing() -> bool:
    """Whether kernels that are launched now become part of a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
