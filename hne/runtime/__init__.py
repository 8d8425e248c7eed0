"""Anytime inference by exported programs, without the Python code of the model.

``hne export --anytime`` writes a folder with a program for each step of the tree; :class:`AnytimeSession` runs them.
"""

from __future__ import annotations

from .engines import ENGINES, onnxruntime_session, openvino_model
from .manifest import FORMAT, MANIFEST, VERSION, Manifest, Step
from .session import AnytimeSession
