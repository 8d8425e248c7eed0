"""Lists the kernels that a call launches on a GPU, without one: the host code runs, the kernels do not.

The CUDA code is compiled for the host (``tests/cuda_emulation``), where a launch only reports its kernel, grid and
parameters. PyTorch's own operations are counted beside them, by their bytes; they are computed on the CPU, since the
host code may look at their results. Tensors have the real shapes, and memory that no kernel has written.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "cost_model"
SHARED_LIMIT = 227 * 1024  # bytes of a block, compute capability 9.0
NETWORKS = {"resnet": ("hne_resnet50_cifar", 32), "mobilenet": ("hne_mobilenetv2_075", 224)}
CLASSES = 100


@dataclass(frozen=True)
class Region:
    """Memory of a tensor."""

    address: int
    bytes: int
    external: bool = False  # an argument or result of the op, and no intermediate tensor


@dataclass
class Recorded:
    """A launch of one of our kernels, or an operation of PyTorch."""

    op: str  # that launched it
    kernel: str  # readable name; empty for an operation of PyTorch
    blocks: int = 0
    threads: int = 0
    shared: int = 0
    parameters: bytes = b""
    reads: list[Region] = field(default_factory=list)  # of PyTorch's operations
    writes: list[Region] = field(default_factory=list)
    call: int = 0  # number of the op's call


@dataclass
class Recording:
    """All launches of a call, in order, and the memory that they may access."""

    launches: list[Recorded]
    regions: list[list[Region]]  # known at each launch, the latest last


@dataclass(frozen=True)
class Call:
    """A call of a network."""

    network: str
    batch: int
    training: bool

    def __str__(self) -> str:
        return f"{self.network}, {'training' if self.training else 'inference'}, batch {self.batch}"


CALLS = tuple(
    Call(network, batch, training)
    for network in NETWORKS
    for batch, training in ((1, False), (128, False), (128, True))
)


def emulation(folder: Path = FOLDER) -> Path:
    """Build the host code with the kernels that are not executed; return the library."""
    sys.path.insert(0, str(ROOT / "tests" / "cuda_emulation"))
    build: Any = importlib.import_module("build")
    library: Path = build.build(folder / "emulation", ("-O1",))
    return library


def record(call: Call, library: Path) -> Recording:
    """The launches of a call, found by a new process.

    Raises:
        RuntimeError: the call failed; the message is its output.
    """
    options = [call.network, str(call.batch), *(["--training"] if call.training else [])]
    recording: Recording = _record(library, *options)
    return recording


def record_ops(library: Path) -> dict[str, tuple[Recording, Recording | None]]:
    """The launches of each row of the smoke table of ops: of its timed call, and of the backward call.

    Raises:
        RuntimeError: a call failed; the message is the output.
    """
    recordings: dict[str, tuple[Recording, Recording | None]] = _record(library, "ops", "128")
    return recordings


def _record(library: Path, *options: str) -> Any:
    helpers = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "helpers")]
    environ = {
        **os.environ,
        "HNE_CUDA_EMULATION": str(library),
        "HNE_EMULATED_SHARED_MEMORY": str(SHARED_LIMIT),
        "PYTHONPATH": os.pathsep.join([*helpers, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_WAIT_POLICY": "passive",
    }
    command = [sys.executable, __file__, *options]
    result = subprocess.run(command, env=environ, capture_output=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(options)}: {result.stderr.decode()[-3000:]}")
    return pickle.loads(result.stdout)  # written by this file


# --- in the process that is recorded ---------------------------------------------------------------------------------


class _Symbols:
    """Names of the functions in a loaded library, also of those that it does not export."""

    def __init__(self, library: Path) -> None:
        import cuda_resources

        maps = Path("/proc/self/maps").read_text().splitlines()
        self._base = min(int(line.split("-")[0], 16) for line in maps if line.endswith(str(library)))
        text = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in text.splitlines() if len(line.split()) == 3]
        places = {int(address, 16): name for address, kind, name in rows if kind in "tT"}
        self._names = dict(zip(places, cuda_resources.readable(list(places.values())), strict=True))

    def name(self, address: int) -> str:
        return self._names[address - self._base]


_CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64
)


def _make_mode(library: Path) -> Any:
    """A dispatch mode that records, made here because only the recorded process needs torch."""
    import torch
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    symbols = _Symbols(library)
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    # Operations that launch nothing on a GPU.
    free = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_to_copy.none", "set_"}

    def region(tensor: Tensor, external: bool = False) -> Region:
        if tensor.numel() == 0:
            return Region(tensor.data_ptr(), 0, external)
        values = 1 + sum((size - 1) * abs(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        return Region(tensor.data_ptr(), values * tensor.element_size(), external)

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.launches: list[Recorded] = []
            self.regions: list[list[Region]] = []
            self._known: list[Region] = []
            self._op, self._call, self._calls = "", 0, 0
            self._callback = _CALLBACK(self._launched)
            self._library = ctypes.CDLL(str(library))

        @contextlib.contextmanager
        def recording(self) -> Iterator[None]:
            self._library.hne_record_launches(self._callback)
            with self:
                yield
            self._library.hne_record_launches(None)

        def _launched(self, kernel: int, blocks: int, threads: int, shared: int, place: int, size: int) -> None:
            self.launches.append(
                Recorded(
                    self._op,
                    symbols.name(kernel),
                    blocks,
                    threads,
                    shared,
                    ctypes.string_at(place, size),
                    call=self._call,
                )
            )
            self.regions.append(list(self._known))

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            name = op._schema.name.partition("::")[2]
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if op.namespace == "hne":
                return self._ours(op, name, inputs, args, kwargs)
            result = op(*args, **kwargs)
            outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            storages = {t.untyped_storage().data_ptr() for t in inputs}
            new = [t for t in outputs if t.untyped_storage().data_ptr() not in storages]
            self._known += [region(t) for t in new]
            if name in free or not (new or op._schema.is_mutable):  # a view, or a tensor that fits already
                return result
            reads = [region(t) for t in inputs]
            writes = [region(t) for t in outputs] or reads[:1]
            launch = Recorded(self._op or name, "", reads=reads, writes=writes, call=self._call)
            launch.op = f"torch {name}"
            self.launches.append(launch)
            self.regions.append([])
            return result

        def _ours(self, op: Any, name: str, inputs: list[Tensor], args: Any, kwargs: Any) -> Any:
            outer = self._op, self._call, self._known
            self._calls += 1
            self._op, self._call = name, self._calls
            self._known = [region(t, True) for t in inputs]
            first = len(self.launches)
            # The op is called below the dispatch modes, so that this mode sees what it calls.
            with self:
                result = op.redispatch(cpu, *args, **kwargs)
            outputs = {region(t) for t in tree_leaves(result) if isinstance(t, Tensor)}
            for regions in self.regions[first:]:
                regions[:] = [replace(known, external=known.external or known in outputs) for known in regions]
            self._op, self._call, self._known = outer
            return result

    return Recorder()


def _record_here(call: Call, library: Path) -> Recording:
    import torch

    import hne
    import hne_kernels
    from hne_kernels.ops import fused_layers

    preset, size = NETWORKS[call.network]
    torch.manual_seed(0)
    model = hne.FusedHNE.from_preset(preset, num_classes=CLASSES)
    images = torch.zeros(call.batch, 3, size, size)
    images = images.contiguous(memory_format=torch.channels_last)
    target = torch.zeros(call.batch, dtype=torch.int64)
    patches: list[Any] = [
        mock.patch.object(module, "is_traced", return_value=False)
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in ("hne", "hne_kernels") and getattr(module, "is_traced", None) is not None
    ]

    # On a GPU a batch is computed as a whole.
    def whole(x: torch.Tensor, batch_dim: int) -> tuple[torch.Tensor, ...]:
        return (x,)

    patches.append(mock.patch.object(fused_layers, "micro_batches", whole))
    with contextlib.ExitStack() as stack:
        stack.enter_context(hne_kernels.use_backend("cuda"))
        for patch in patches:
            stack.enter_context(patch)
        mode = _make_mode(library)
        if call.training:
            model.train()
            objective = hne.objective("I+HD", alpha=0.5, temperature=2.0)

            def run() -> None:
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(images)
                objective(logits, target).backward()
        else:
            model.eval().to(torch.bfloat16)
            images = images.to(torch.bfloat16)

            def run() -> None:
                with torch.no_grad():
                    model(images)

            with mode.recording():  # folds the weights
                run()
            mode.launches.clear()
            mode.regions.clear()
        with mode.recording():
            run()
    return Recording(mode.launches, mode.regions)


def _record_ops_here(library: Path, batch: int) -> dict[str, tuple[Recording, Recording | None]]:
    import smoke_ops
    import torch
    from torch import Tensor

    import hne_kernels

    mode = _make_mode(library)

    def taken() -> Recording:
        recording = Recording(list(mode.launches), list(mode.regions))
        mode.launches.clear()
        mode.regions.clear()
        return recording

    found: dict[str, tuple[Recording, Recording | None]] = {}
    rng = torch.Generator().manual_seed(0)
    with hne_kernels.use_backend("cuda"):
        for dtype in (torch.bfloat16, torch.float32):
            for layer, case in smoke_ops.cases():
                inputs = smoke_ops.repeated(case.inputs(rng, dtype, "cpu"), batch // smoke_ops.BATCH)
                with torch.no_grad(), mode.recording():
                    case(inputs)
                forward, backward = taken(), None
                if case.differentiable:
                    leaves = {name: inputs[name].detach().requires_grad_() for name in case.differentiable}
                    with mode.recording():
                        reached: list[Tensor] = [r for r in case({**inputs, **leaves}) if r.requires_grad]
                    taken()
                    grads = [torch.empty_like(result) for result in reached]
                    with mode.recording():
                        torch.autograd.grad(reached, list(leaves.values()), grads)
                    backward = taken()
                found[smoke_ops.row_name("cuda", dtype, case, layer)] = forward, backward
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=(*NETWORKS, "ops"))
    parser.add_argument("batch", type=int)
    parser.add_argument("--training", action="store_true")
    args = parser.parse_args()
    library = Path(os.environ["HNE_CUDA_EMULATION"])
    recording: object
    if args.network == "ops":
        recording = _record_ops_here(library, args.batch)
    else:
        recording = _record_here(Call(args.network, args.batch, args.training), library)
    sys.stdout.buffer.write(pickle.dumps(recording))


if __name__ == "__main__":
    # The classes must have the same names in the process that reads them.
    import cost_launches

    cost_launches.main()
