"""The build: its result, its decisions, and its error texts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

import hne_kernels as K
from hne_kernels import extension

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build_backend"))
pytest.importorskip("setuptools")

import hne_backend  # noqa: E402
import native  # noqa: E402

LIBRARY = "_C.abi3.so"


def run_python(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environ})


# --- result ------------------------------------------------------------------------------------------------


def test_build_info() -> None:
    info = K.build_info()
    assert info["version"] == metadata.version("hne-kernels")
    assert re.match(r"(gcc|clang) \d+\.", info["compiler"])
    assert info["torch_target"] == "2.11"
    assert torch.__version__.split(".")[0] == info["torch"].split(".")[0]
    flags = info["flags"].split()
    assert not [flag for flag in flags if flag.startswith("-m")], "a wheel must run on another machine"
    assert "-ffast-math" not in flags, "NaN and infinity must stay what they are"


def undefined_symbols(library: Path) -> list[str]:
    command = ["nm", "--dynamic", "--undefined-only", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in listing.splitlines()]


@pytest.mark.parametrize("name", [LIBRARY, "_C_cuda.so"])
def test_one_library_serves_every_python_and_every_torch(name: str) -> None:
    """It uses the stable ABIs only: C functions of Python (csrc/python.h limits them) and of torch."""
    library = Path(extension.cpu_library().__file__ or "").with_name(name)
    if not library.exists():
        pytest.skip("this build has no CUDA library")
    if not shutil.which("nm"):
        pytest.skip("there is no nm")
    symbols = undefined_symbols(library)
    public = [symbol for symbol in symbols if symbol.startswith("Py")]
    private = {symbol for symbol in symbols if symbol.startswith("_Py")}
    assert bool(public) == (name == LIBRARY)
    assert private <= {"_Py_NoneStruct", "_Py_Dealloc"}, "what macros of the limited API expand to"
    assert "aoti_torch_get_dim" in symbols or "torch_get_const_data_ptr" in symbols
    # A C++ name of torch has the namespace in it: c10, at or torch.
    assert not [symbol for symbol in symbols if re.match(r"_ZNK?\d*(3c10|2at|5torch)", symbol)]


def test_cpu_capability_is_one_the_machine_has() -> None:
    library = extension.cpu_library()
    assert library.cpu_capability() in library.cpu_capabilities_supported().split(", ")


def test_info_module_lists_versions_and_backends() -> None:
    result = run_python("-m", "hne_kernels.info")
    assert result.returncode == 0, result.stderr
    assert torch.__version__ in result.stdout
    for backend in K.available_backends():
        assert re.search(rf"^  {backend} +usable$", result.stdout, re.MULTILINE)
    for backend, reason in K.unavailable_backends().items():
        assert re.search(rf"^  {backend} +no: {re.escape(reason)}$", result.stdout, re.MULTILINE)


@pytest.mark.slow
def test_wheel_works_away_from_the_checkout(tmp_path: Path) -> None:
    pip = ["-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = ["wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    assert run_python(*pip, *wheel).returncode == 0
    (built,) = tmp_path.glob("hne_kernels-*-cp310-abi3-linux_*.whl")
    install = ["install", "--no-deps", "--target", str(tmp_path / "site"), str(built)]
    assert run_python(*pip, *install).returncode == 0
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch, hne, hne_kernels as K\n"
        "with K.use_backend('cpp'): print(K.prefix_mean(torch.ones(2, 3, 5)).sum().item())\n"
        "print(K.__file__, hne.__file__)"
    )
    result = run_python("-I", "-c", program, str(tmp_path / "site"))
    assert result.stdout.split()[0] == "30.0", result.stderr
    assert str(ROOT) not in result.stdout


# --- error texts of an import without a working library ----------------------------------------------------


def test_missing_library(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=rf"no compiled library {tmp_path}/{LIBRARY}\. Rebuild it: `pip install"):
        extension.load_cpu_library(tmp_path)


@pytest.mark.parametrize("version", ["2.10.1+cu128", "1.13.1"])
def test_torch_that_is_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    message = rf"needs torch 2\.11 or newer, found torch {re.escape(version)} in "
    with pytest.raises(ImportError, match=message) as error:
        extension.load_cpu_library(Path(extension.__file__).parent)
    assert str(error.value).endswith("Upgrade it: `pip install 'torch>=2.11'`.")


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0a0+git1234"])
def test_torch_that_is_new_enough(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    extension.check_torch()


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-1], lambda whole: whole[:1000], lambda whole: b"", bytes.swapcase]
)
def test_damaged_library(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    origin = Path(extension.cpu_library().__file__ or "")
    (tmp_path / LIBRARY).write_bytes(damage(origin.read_bytes()))
    with pytest.raises(ImportError, match=f"{re.escape(LIBRARY)}: .*Rebuild it: `pip install -e .`") as error:
        extension.load_cpu_library(tmp_path)
    assert f"torch {torch.__version__}" in str(error.value)
    assert "\n" not in str(error.value)


def test_extension_folder_of_the_environment(tmp_path: Path) -> None:
    result = run_python("-c", "import hne_kernels", HNE_EXTENSION_DIR=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ImportError: hne_kernels has no compiled library")


def test_cuda_library_says_why_it_is_not_there(tmp_path: Path) -> None:
    reason = extension.load_cuda_library(tmp_path) or ""
    assert "this build has no CUDA library" in reason
    assert (K.build_info()["without_cuda"] or str(tmp_path)) in reason
    (tmp_path / "_C_cuda.so").touch()
    reason = "built, but does not load" if torch.cuda.is_available() else "built, but torch"
    assert reason in (extension.load_cuda_library(tmp_path) or "")


# --- decisions of the build --------------------------------------------------------------------------------


def fake_torch(folder: Path, version: str) -> Path:
    info = folder / f"torch-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return folder


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.11.0", []),
        ("2.13.0+cpu", []),
        ("3.0.0a0+git1234", []),
        ("2.10.1", ["torch>=2.11"]),
        (None, ["torch>=2.11"]),
    ],
)
def test_torch_is_asked_for_only_where_there_is_none(
    version: str | None, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version:
        fake_torch(tmp_path, version)
    monkeypatch.setattr(hne_backend, "environment_paths", lambda: [str(tmp_path)])
    assert hne_backend.get_requires_for_build_wheel() == expected
    assert hne_backend.get_requires_for_build_editable() == expected
    assert hne_backend.get_requires_for_build_sdist() == []


def test_the_nearest_torch_that_is_new_enough_is_taken(tmp_path: Path) -> None:
    old = fake_torch(tmp_path / "old", "2.9.1")
    near = fake_torch(tmp_path / "near", "2.12.0")
    far = fake_torch(tmp_path / "far", "2.13.0")
    assert hne_backend.find_torch([str(old), str(near), str(far)]) == str(near)


def test_the_package_and_the_build_ask_for_the_same_torch() -> None:
    assert hne_backend.TORCH_REQUIREMENT in (metadata.requires("hne-kernels") or [])
    assert native.target_define() == "-DTORCH_TARGET_VERSION=0x020b000000000000"
    assert extension.OLDEST_TORCH == native.TORCH_TARGET


def test_the_package_the_wheel_and_the_c_api_ask_for_the_same_python() -> None:
    limit = re.search(r"Py_LIMITED_API 0x(\d\d)(\w\w)0000", (ROOT / "csrc" / "python.h").read_text())
    assert limit is not None
    major, minor = (int(number, 16) for number in limit.groups())
    assert metadata.metadata("hne-kernels")["Requires-Python"] == f">={major}.{minor}"
    assert f"cp{major}{minor}" == native.OLDEST_PYTHON


@pytest.mark.parametrize(("environ", "suffix"), [({}, ""), ({"HNE_LOCAL_VERSION": "cu130"}, "+cu130")])
def test_a_wheel_with_cuda_says_so_in_its_version(environ: dict[str, str], suffix: str) -> None:
    assert native.version(environ) == native.VERSION + suffix


@pytest.mark.parametrize(
    ("environ", "cpus", "gigabytes", "jobs"),
    [
        ({}, 4, 64, 4),
        ({}, 16, 6, 4),
        ({}, 16, 0.5, 1),
        ({"MAX_JOBS": "7"}, 2, 1, 7),
        ({"MAX_JOBS": ""}, 2, 64, 2),
    ],
)
def test_compile_jobs_are_capped_by_memory(environ: dict[str, str], cpus: int, gigabytes: float, jobs: int) -> None:
    assert native.job_count(environ, cpus, int(gigabytes * 2**30)) == jobs


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_bad_max_jobs(value: str) -> None:
    with pytest.raises(SystemExit, match=f"MAX_JOBS must be a positive integer, got '{value}'"):
        native.job_count({"MAX_JOBS": value}, 2, 2**34)


def executable(path: Path, script: str = "") -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_compiler_is_cxx_or_the_first_on_the_path(tmp_path: Path) -> None:
    executable(tmp_path / "g++")
    executable(tmp_path / "mine")
    path = str(tmp_path)
    assert native.cxx_compiler({"PATH": path}) == "g++"
    assert native.cxx_compiler({"PATH": path, "CXX": "mine -m64"}) == "mine -m64"


@pytest.mark.parametrize("environ", [{}, {"CXX": "nosuch++"}])
def test_missing_compiler_is_one_line_that_says_what_to_install(environ: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"no C\+\+ compiler found \(.*\+\+\)\. Install one .*apt install g\+\+"
    ) as error:
        native.cxx_compiler({"PATH": str(tmp_path), **environ})
    assert "\n" not in str(error.value)


@pytest.fixture
def nvcc(tmp_path: Path) -> dict[str, str]:
    """Environment variables with an nvcc that says where its toolkit is."""
    executable(tmp_path / "nvcc", f"echo '#$ TOP={tmp_path}/cuda/bin/..' >&2")
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    return {"PATH": str(tmp_path)}


def test_cuda_toolkit_is_where_nvcc_says(nvcc: dict[str, str]) -> None:
    toolkit = Path(nvcc["PATH"], "cuda")
    assert native.cuda_toolkit(nvcc, "2.13.0", "13.0") == (toolkit, "")
    found, reason = native.cuda_toolkit({**nvcc, "HNE_CUDA": "0"}, "2.13.0", "13.0")
    assert found is None
    assert "built with HNE_CUDA=0" in reason
    nowhere = {"PATH": str(toolkit)}
    found, reason = native.cuda_toolkit(nowhere, "2.13.0", "13.0")
    assert found is None
    assert "no nvcc" in reason
    with pytest.raises(SystemExit, match="HNE_CUDA=1 asks for the CUDA library, but there is no nvcc"):
        native.cuda_toolkit({**nowhere, "HNE_CUDA": "1"}, "2.13.0", "13.0")


@pytest.mark.parametrize("unset", [{}, {"HNE_CUDA": ""}])
def test_a_torch_without_cuda_has_the_cuda_library_compiled_only_on_demand(
    nvcc: dict[str, str], unset: dict[str, str]
) -> None:
    toolkit, reason = native.cuda_toolkit(nvcc | unset, "2.13.0+cpu", None)
    assert toolkit is None
    assert re.search(r"torch 2\.13\.0\+cpu is without CUDA .*HNE_CUDA=1", reason)
    assert native.cuda_toolkit(nvcc | {"HNE_CUDA": "1"}, "2.13.0+cpu", None) == (Path(nvcc["PATH"], "cuda"), "")


@pytest.mark.parametrize("value", ["yes", "2", "off"])
def test_bad_hne_cuda(value: str, nvcc: dict[str, str]) -> None:
    with pytest.raises(SystemExit, match=f"HNE_CUDA must be 0 .* or 1 .*, got '{value}'"):
        native.cuda_toolkit({**nvcc, "HNE_CUDA": value}, "2.13.0", None)


@pytest.mark.parametrize("flags", [native.cpp_flags, native.nvcc_flags])
def test_flags_name_the_standard(flags: Callable[[dict[str, str]], list[str]]) -> None:
    """The build helper of the oldest supported torch adds an older one where none is named."""
    assert [flag for flag in flags({}) if flag.startswith("-std=")] == ["-std=c++20"]


def _targets(asked: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    return native.target_names(native.target_flags(os.environ, _get_cuda_arch_flags))


def test_by_default_every_gpu_from_ampere_on_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs newer than the machine code are served by PTX."""
    targets = _targets("", monkeypatch)
    assert targets == ["sm_80", "sm_90a", "compute_90"]
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)):
        assert any(extension.can_run(target, capability) for target in targets)
    assert not any(extension.can_run(target, (7, 5)) for target in targets)


@pytest.mark.parametrize(
    ("asked", "targets"),
    [
        ("9.0a", ["sm_90a"]),
        ("8.0;9.0+PTX", ["compute_90", "sm_80", "sm_90"]),
        ("8.0 12.0", ["sm_120", "sm_80"]),
        ("Hopper", ["compute_90", "sm_90"]),
    ],
)
def test_torch_cuda_arch_list_is_followed(asked: str, targets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(_targets(asked, monkeypatch)) == targets


@pytest.mark.parametrize("asked", ["7.5", "7.0;9.0", "Turing", "sm_90", "newest"])
def test_bad_torch_cuda_arch_list(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST: expected .* from 8.0 on, .*got '{asked}'"):
        _targets(asked, monkeypatch)


def test_the_library_that_was_built_has_the_targets_of_the_build_info() -> None:
    info = K.build_info()
    library = Path(extension.cpu_library().__file__ or "").with_name("_C_cuda.so")
    if not info["cuda_targets"]:
        assert len(info["without_cuda"]) > 10
        assert not library.exists()
        return
    assert info["without_cuda"] == ""
    triton = pytest.importorskip("triton")
    command = [triton.knobs.nvidia.cuobjdump.path, "--list-elf", "--list-ptx", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    machine_code = set(re.findall(r"ELF file.*\.(sm_\w+)\.cubin", listing))
    ptx = {name.replace("sm_", "compute_") for name in re.findall(r"PTX file.*\.(sm_\w+)\.ptx", listing)}
    assert machine_code | ptx == set(info["cuda_targets"].split())


def test_an_object_older_than_its_header_is_compiled_again(tmp_path: Path) -> None:
    names = ["plain.h", "a header.h", "main.cu"]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000, 1000))
    plain, header, main = (str(tmp_path / name).replace(" ", "\\ ") for name in names)
    compiled, other = tmp_path / "main.o", tmp_path / "other.o"
    for path in (compiled, other):
        path.touch()
        os.utime(path, (2000, 2000))
    (tmp_path / "main.d").write_text(f"{tmp_path}/main.o : {main} \\\n    {plain} \\\n    {header}\n")
    (tmp_path / "other.d").write_text(f"{tmp_path}/other.o : {main}\n")
    native.remove_stale_objects(tmp_path)
    assert compiled.exists()
    os.utime(tmp_path / "a header.h", (3000, 3000))
    native.remove_stale_objects(tmp_path)
    assert not compiled.exists()
    assert other.exists()
    (tmp_path / "main.cu").unlink()
    native.remove_stale_objects(tmp_path)
    assert not other.exists()


def test_build_info_header_is_rewritten_only_when_it_changes(tmp_path: Path) -> None:
    header = tmp_path / "build_info.h"
    native.write_build_info(tmp_path, {"version": "1", "flags": ["-O3", '-DX="y"']})
    assert '#define HNE_FLAGS "-O3 -DX=\\"y\\""' in header.read_text()
    os.utime(header, (0, 0))
    native.write_build_info(tmp_path, {"version": "1", "flags": ["-O3", '-DX="y"']})
    assert header.stat().st_mtime == 0
    native.write_build_info(tmp_path, {"version": "2", "flags": []})
    assert header.stat().st_mtime > 0
