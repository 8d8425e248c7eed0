"""The threads of the CPU library: any number of callers, forked processes, and teams under the thread sanitizer."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import networks
import pytest
import torch
from networks import build, images
from threads import on_threads

from hne import FusedHNE

ROOT = Path(__file__).parents[2]
COMPILER = shlex.split(os.environ.get("CXX", "g++"))


def _model(rng: torch.Generator) -> tuple[FusedHNE, torch.Tensor, torch.Tensor]:
    """A network with its folded weights, an input, and the right logits."""
    model, x = build(FusedHNE, networks.TREES["odd"], rng, torch.float32), images(rng, 5, (24, 24), torch.float32)
    with on_threads(1), torch.no_grad():
        return model, x, model(x)


def test_concurrent_callers(rng: torch.Generator) -> None:
    model, x, right = _model(rng)

    def calls(threads: int) -> bool:
        torch.set_num_threads(threads)  # of the calling thread
        with torch.no_grad():
            return all(torch.equal(model(x), right) for _ in range(30))

    with on_threads(torch.get_num_threads()), ThreadPoolExecutor(4) as pool:
        assert all(pool.map(calls, (2, 3, 2, 5)))


def _check(model: FusedHNE, x: torch.Tensor, right: torch.Tensor) -> None:
    with torch.no_grad():
        same = all(torch.equal(model(x), right) for _ in range(3))
    os._exit(0 if same else 1)


def test_a_forked_process(rng: torch.Generator) -> None:
    """It has none of the helper threads of its parent, which keeps them."""
    model, x, right = _model(rng)
    with on_threads(3), torch.no_grad():
        assert torch.equal(model(x), right)
        process = torch.multiprocessing.get_context("fork").Process(target=_check, args=(model, x, right))
        process.start()
        process.join(30)
        if hung := process.is_alive():
            process.kill()
        assert not hung
        assert process.exitcode == 0
        assert torch.equal(model(x), right)


@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("sanitizer", ["thread", "none"])
def test_teams_without_pytorch(sanitizer: str, tmp_path: Path) -> None:
    """The thread sanitizer does not know forked processes: these are tested without it."""
    program, runtime, here = tmp_path / "program", ROOT / "csrc" / "cpu" / "runtime", Path(__file__).parent
    sources = [here / "thread_team" / "main.cpp", runtime / "cores.cpp", runtime / "helper_threads.cpp"]
    includes = [f"-I{here / 'thread_team'}", f"-I{ROOT / 'csrc'}"]
    flags = ["-std=c++20", "-O1", "-pthread", *([] if sanitizer == "none" else [f"-fsanitize={sanitizer}"])]
    compiled = subprocess.run(
        [*COMPILER, *flags, *includes, *map(str, sources), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    if sanitizer != "none" and "libtsan" in compiled.stderr:
        pytest.skip("the compiler has no thread sanitizer")
    assert compiled.returncode == 0, compiled.stderr
    arguments = ["300", "fork" if sanitizer == "none" else "no"]
    environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # another sanitizer, perhaps
    result = subprocess.run(
        [str(program), *arguments], env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
