"""Inference with folded weights, which the model caches until its parameters change."""

from __future__ import annotations

from typing import Any

import torch

import hne_kernels as K

from .base import MemberRunner, SubtreeRunner
from .kernels import KernelExecutor
from .parameter_versions import ParameterVersions
from .session import InferenceSession


class FoldedExecutor(KernelExecutor):
    """Computes without gradients, with batch norms folded into the weights. Features as in :class:`KernelExecutor`."""

    def runner(self, network: Any) -> SubtreeRunner:
        if torch.jit.is_tracing():  # traced once more without gradients, as a check: both graphs must have the same ops
            return super().runner(network)
        return self.session(network).run

    def member_runner(self, network: Any) -> MemberRunner:
        return super().member_runner(network) if torch.jit.is_tracing() else self.session(network).run_member

    def session(self, network: Any) -> InferenceSession:
        """The session of a network (a :class:`FoldedWeightCache`), cached while its parameters stay unchanged.

        During the capture of a CUDA graph the cached session is used, and the network keeps it alive, because the graph
        reads its weights. Without a cached session folding becomes part of the graph and is repeated in every replay.
        It is also part of a call that PyTorch records or transforms (:func:`hne_kernels.is_traced`), which must read
        the parameters themselves.
        """
        if K.is_traced():
            return InferenceSession(network)
        session: InferenceSession | None = network.current()
        capturing = is_capturing()
        if session is None or not session.has_current_hooks():
            with torch.no_grad():
                if capturing:  # the folded weights exist only when the graph is replayed, so they cannot be cached
                    return InferenceSession(network)
                session = InferenceSession(network, ParameterVersions(network.read_modules()))
            if (device := session.device).type == "cuda":
                # Afterwards every stream may read the new weights, and no stream still reads the old ones.
                torch.cuda.synchronize(device)
            network.folded = session
        if capturing:
            network.graph_weights.append(session)
        return session


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured: kernels launched now become part of it."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
