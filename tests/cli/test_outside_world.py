"""The command line in a hostile world: closed streams, full disks, foreign files, odd names, wrong numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from hne import FusedHNE
from hne.cli import evaluate, main, training_runs
from hne.files import lock_folder
from hne.losses import gaussians
from hne.metrics import mixture
from hne.models import checkpoint
from hne.training import CHECKPOINT, TrainConfig

SMALL = ("--limit-train", "64", "--limit-test", "40", "--batch-size", "32", "--width", "0.25", "--threads", "1")
SMALL += ("--epochs", "1")
TEST = ("--limit-test", "20")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("run")
    assert main(["train", "--out", str(out), "--quiet", *SMALL]) == 0
    return out


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a command that fails: one line, after which the exit code is 2."""
    capsys.readouterr()
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("hne: error: ")
    assert err.count("\n") == 1
    return err


def usage_error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    return capsys.readouterr().err


def in_shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which ``$HNE`` is the command."""
    command = f"{sys.executable} -m hne"
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env={**os.environ, "HNE": command, **environment}
    )


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "-1", "1e400", "x", ""])
@pytest.mark.parametrize(
    "argv",
    [
        *(("train", f"--{name}") for name in ("lr", "weight-decay", "momentum", "alpha", "temperature", "width")),
        *(("train", f"--{name}") for name in ("clip-grad-norm", "epochs", "batch-size", "num-models", "eval-every")),
        *(("train", f"--{name}") for name in ("limit-train", "image-size", "threads")),
        *(("bench", f"--{name}") for name in ("seconds", "width", "batch-sizes", "num-models")),
        *(("anytime", "run", f"--{name}") for name in ("deadline-ms", "confidence", "agreement")),
        *(("study", "table1", f"--{name}") for name in ("scale", "alphas", "widths", "seeds")),
        *(("distill", "run", f"--{name}") for name in ("own-blocks", "first-phase")),
    ],
    ids=lambda argv: "".join(argv[:1] + argv[-1:]),
)
def test_wrong_numbers(
    argv: tuple[str, ...],
    number: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are refused before anything is computed or written."""
    monkeypatch.chdir(tmp_path)
    try:
        code = main([*argv[:-1], f"{argv[-1]}={number}"])
    except SystemExit as exit:  # from the parser
        code = exit.code  # type: ignore[assignment]
    assert code == 2
    err = capsys.readouterr().err
    assert argv[-1].strip("-").replace("-", "_").rstrip("s") in err.replace("-", "_") or "width" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench", "--seconds", "0"], "expected a number above 0, got '0'"),
        (["bench", "--seconds", "1e9"], "expected at most 3600 seconds"),
        (["train", "--threads", "100000"], "threads on this machine"),
        (["train", "--batch-size", "9" * 5000], "expected a whole number above 0"),
        (["train", "--out", ""], "expected a path, got ''"),
        (["eval", ""], "expected a path, got ''"),
    ],
)
def test_wrong_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in usage_error_of(capsys, *argv)


def test_a_run_that_diverges_in_its_last_step_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "train", "--out", str(tmp_path), *SMALL, "--limit-train", "32", "--lr", "1e38")
    assert "is not finite after epoch 1: try a smaller lr" in message
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_not_finite_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, config = checkpoint.load(run / CHECKPOINT)
    tensors["model/head.conv.bias"][3] = float("nan")
    path = tmp_path / "diverged"
    checkpoint.save(path, tensors, config)
    for command in ("eval", "anytime", "export", "distill"):
        assert f"{path}: head.conv.bias is not finite" in error_of(capsys, command, str(path))


# Files ----------------------------------------------------------------------------------------------------------------


def test_json_into_a_link_and_a_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to("target")
    assert main(["eval", str(run), *TEST, "--json", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "target").read_text())["data"] == "digits"
    assert "is a folder, expected a file" in error_of(capsys, "eval", str(run), *TEST, "--json", str(tmp_path))
    none = str(tmp_path / "none" / "file")
    for argv in (("eval", "--json"), ("export", "--output"), ("anytime", "--plot")):
        message = error_of(capsys, argv[0], str(run), argv[1], none + (".png" if "--plot" in argv else ""))
        assert "no such folder: create" in message
    assert "expected a file name that ends in one of" in error_of(
        capsys, "anytime", str(run), "--plot", str(tmp_path / "x.text")
    )
    assert "is a file, expected a folder" in error_of(capsys, "train", *SMALL, "--out", str(tmp_path / "target"))


def test_export_into_standard_output(run: Path, tmp_path: Path) -> None:
    result = in_shell(f"$HNE export {run} --output /dev/stdout > {tmp_path}/x.pt2")
    assert result.returncode == 0
    assert "wrote /dev/stdout" in result.stderr
    assert torch.export.load(tmp_path / "x.pt2").module()(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_devices(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (("eval", "--json"), ("export", "--output")):
        assert "/dev/full: cannot be written: the disk is full" in error_of(
            capsys, argv[0], str(run), argv[1], "/dev/full"
        )
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode != 0,
    reason="may not mount a small file system",
)
def test_full_disk(run: Path) -> None:
    line = (
        "mount -t tmpfs -o size=100k tmpfs /mnt; echo old > /mnt/x.pt2;"
        f"$HNE train --out /mnt/r {' '.join(SMALL)}; echo code $?; $HNE export {run} --output /mnt/x.pt2; echo code $?;"
        "cat /mnt/x.pt2; ls -A /mnt /mnt/r"
    )
    result = in_shell(f"unshare -rm bash -c '{line}'")
    assert result.stdout.count("code 2\n") == 2
    assert result.stdout.endswith("old\n/mnt:\nr\nx.pt2\n\n/mnt/r:\n")
    assert result.stderr.count("cannot be written: the disk is full") == 2
    assert result.stderr.count("\n") == 2


def test_home_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(run, tmp_path / "r")
    assert main(["eval", "~/r", *TEST, "--json=~/x.json"]) == 0
    assert main(["anytime", "~/r", *TEST, "--plot=~/x.png"]) == 0
    assert main(["export", "~/r", "--output=~/x.pt2"]) == 0
    assert main(["train", "--out=~/s", *SMALL]) == 0
    assert {"x.json", "x.png", "x.pt2", "s"} < set(os.listdir(tmp_path))


def test_files_of_the_user_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (".notes.tmp.txt", ".1.tmp.x", ".lock", "notes"):
        (tmp_path / name).write_text("mine")
    assert main(["train", "--out", str(tmp_path), "--overwrite", *SMALL]) == 0
    assert "notes" not in capsys.readouterr().out
    for name in (".notes.tmp.txt", ".1.tmp.x", ".lock", "notes"):
        assert (tmp_path / name).read_text() == "mine"
    for name in ("summary.json", "log.csv", CHECKPOINT):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text("mine")
        message = error_of(capsys, "train", "--out", str(tmp_path), "--overwrite", *SMALL)
        assert f"{name} was not written by a training run" in message
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).write_bytes(before)


# Foreign checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [{}, {"data": None}, {"data": {}, "recipe": {}}, {"data": {"input": 3}, "recipe": []}, {"data": "digits"}],
)
def test_checkpoints_of_the_python_interface(
    config: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = FusedHNE.from_preset("hne_tiny", num_classes=10, in_channels=1, width=0.25)
    path = tmp_path / CHECKPOINT
    checkpoint.save(path, checkpoint.model_tensors(model), {"model": model.config(), **config})
    for command in ("eval", "anytime", "export", "distill"):
        assert f"{path}: does not describe its data" in error_of(capsys, command, str(path))
    assert str(path) in error_of(capsys, "train", "--out", str(tmp_path), "--resume", *SMALL)
    assert "Error" not in error_of(capsys, "train", "--out", str(tmp_path), *SMALL)


def test_resuming_without_state(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, config = checkpoint.load(run / CHECKPOINT)
    for missing in ("epoch", "history"):
        less = {name: value for name, value in config.items() if name != missing}
        checkpoint.save(tmp_path / CHECKPOINT, tensors, less)
        assert "not the state of a training run" in error_of(capsys, "train", "--out", str(tmp_path), "--resume")


# Streams --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        (">&-", 0, ""),
        ("<&- >&- ", 0, ""),
        ("> /dev/full", 2, "hne: error: the disk is full: free some space\n"),
        ("> >(true)", 1, ""),
    ],
)
def test_streams_that_cannot_be_written(redirection: str, code: int, message: str, run: Path) -> None:
    result = in_shell(f"$HNE eval {run} --limit-test 20 {redirection}; code=$?; sleep 0.2; exit $code")
    assert result.stderr == message
    assert result.returncode == code or (redirection == "> >(true)" and result.returncode == 0)


def test_the_reader_of_a_training_run_ends(tmp_path: Path) -> None:
    """All files are there: the last epoch is printed when they are written."""
    line = f"$HNE train --out {tmp_path}/r {' '.join(SMALL)} | head -c 1 >/dev/null; echo ${{PIPESTATUS[0]}}"
    result = in_shell(line, PYTHONUNBUFFERED="")
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr
    assert result.stdout in ("0\n", "1\n")
    assert (tmp_path / "r" / "summary.json").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_names_in_any_encoding(encoding: str, run: Path, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff\xc3\xbc$x_[red]"))
    shutil.copytree(run, folder)
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": encoding}
    result = subprocess.run(
        [sys.executable, "-m", "hne", "anytime", str(folder), *TEST],
        capture_output=True,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0
    assert result.stderr == b""
    assert b"$x_[red] on digits" in result.stdout
    assert (folder / "anytime.png").exists()


# Signals and locks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_leave_no_temporary_files(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from hne.cli import main, train; from hne.files import replacing\n"
        "def execute(args):\n"
        "    with replacing(args.out / 'file') as half:\n"
        "        half.write_text('half'); print('ready', flush=True); time.sleep(60)\n"
        "train.execute = execute\n"
        "sys.exit(main(['train', '--out', sys.argv[1]]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        # These tests may run in the background, where signals are ignored, and a child inherits that.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(number)
        assert process.wait(30) == (130 if number == signal.SIGINT else -number)
    assert list(tmp_path.iterdir()) == []


def test_two_trainings_into_one_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "r")
    before = (tmp_path / "r" / CHECKPOINT).read_bytes()
    with lock_folder(tmp_path / "r"):
        for option in ("--resume", "--overwrite"):
            message = error_of(capsys, "train", "--out", str(tmp_path / "r"), option, *SMALL)
            assert "another process trains here" in message
        assert main(["eval", str(tmp_path / "r"), *TEST]) == 0
    assert (tmp_path / "r" / CHECKPOINT).read_bytes() == before


def test_a_run_that_appears_meanwhile_is_not_replaced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = training_runs.lock_folder

    def late(folder: Path) -> object:
        shutil.copytree(run, folder)
        return lock(folder)

    monkeypatch.setattr(training_runs, "lock_folder", late)
    assert "has a run already" in error_of(capsys, "train", "--out", str(tmp_path / "r"), *SMALL)
    assert (tmp_path / "r" / CHECKPOINT).read_bytes() == (run / CHECKPOINT).read_bytes()


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "not enough memory: try a smaller --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory: try a smaller"),
        (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory: try a smaller"),
        (PermissionError(13, "Permission denied", "x.npy"), "x.npy: Permission denied"),
        (OSError(28, "No space left on device"), "the disk is full: free some space"),
        (ModuleNotFoundError("No module named 'sklearn'"), "No module named 'sklearn'"),
        (SafetensorError("damaged"), "damaged"),
    ],
)
def test_errors_of_the_outside_world(
    error: Exception, message: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(evaluate, "load_network", fail)
    assert message in error_of(capsys, "eval", str(run))


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError("x"), AttributeError("x"), NotImplementedError("x")])
def test_faults_of_the_program_have_a_traceback(error: Exception, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(evaluate, "load_network", fail)
    with pytest.raises(type(error)):
        main(["eval", str(run)])


# Regression -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pt2", "pt2 --kernels", "onnx"])
def test_export_of_a_regression_has_the_variance_of_the_mixture(kind: str, tmp_path: Path) -> None:
    if kind == "onnx":
        evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
        pytest.importorskip("onnxscript")
    run, output = tmp_path / "run", tmp_path / "program"
    flags = ("--epochs", "1", "--limit-train", "64", "--threads", "1", "--quiet")
    assert main(["train", "--data", "diabetes", "--out", str(run), *flags]) == 0
    export = ["export", str(run), "--num-models", "4", "--output", str(output), "--format", *kind.split()]
    assert main(export) == 0
    model, stored = checkpoint.load_model(run / CHECKPOINT)
    samples = torch.randn(7, model.in_channels, 1, 1)
    with torch.no_grad():
        mean, variance = mixture(*gaussians(model(samples, 4)))
        target = stored["data"]["target"]
        want = torch.stack([mean * target["std"] + target["mean"], variance * target["std"] ** 2], 1)
        if kind == "onnx":
            got = torch.from_numpy(evaluator(output.read_bytes()).run(None, {"images": samples.numpy()})[0])
        else:
            got = torch.export.load(output).module()(samples)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_images_of_another_size_than_the_networks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = error_of(capsys, "train", "--preset", "hne_vit_tiny", "--out", str(tmp_path / "run"))
    assert "the network does not suit the images of digits: " in message
    assert "224x224" in message
    assert "8x8" in message
    assert not (tmp_path / "run" / CHECKPOINT).exists()


def test_configs_in_python_are_checked_alike() -> None:
    for name in ("lr", "weight_decay", "momentum", "alpha", "temperature", "width", "clip_grad_norm"):
        for value in (float("nan"), float("inf"), -1.0, "1"):
            with pytest.raises(ValueError, match=name):
                TrainConfig.of(**{name: value})
    for name in ("epochs", "batch_size", "num_models", "image_size", "limit_train", "limit_test"):
        for value in (0, -1, 2.5, float("nan"), True, 2**31):
            with pytest.raises(ValueError, match=name):
                TrainConfig.of(**{name: value})
    for value in (1.5, 2**64, -(2**63) - 1, True):
        with pytest.raises(ValueError, match="seed"):
            TrainConfig.of(seed=value)
