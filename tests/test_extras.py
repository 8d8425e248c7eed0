"""Without the packages of an extra: what works, and what the errors say."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

TRAIN = ("rich", "matplotlib", "sklearn", "PIL")


def run_without(packages: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code where the packages cannot be imported."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({packages}))\n"
    return subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True)


def test_models_train_and_answer_without_extras() -> None:
    ran = run_without(
        TRAIN,
        "import torch, hne\n"
        "model = hne.FusedHNE.from_preset('hne_tiny', num_classes=3, width=0.25)\n"
        "x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])\n"
        "hne.objective('I+HD')(model(x), y).backward()\n"
        "model.eval()\n"
        "print(len(list(model.anytime(x))))\n"
        "import hne.integrations, hne.metrics",
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "8"), ran.stderr


@pytest.mark.parametrize("package", TRAIN)
def test_error_names_the_extra(package: str) -> None:
    ran = run_without((package,), "import hne.training")
    last = ran.stderr.strip().splitlines()[-1]
    assert re.search(rf"{package} is not installed: pip install 'hne-kernels\[train\]'$", last), ran.stderr


def test_lightning_is_named() -> None:
    ran = run_without(("lightning",), "import hne.integrations\nimport hne.integrations.lightning")
    last = ran.stderr.strip().splitlines()[-1]
    assert last.endswith("lightning is not installed: pip install 'hne-kernels[lightning]'"), ran.stderr


def test_command_without_extras_says_in_one_line_what_is_missing() -> None:
    ran = run_without(TRAIN, "from hne.__main__ import main; sys.exit(main())")
    assert ran.returncode == 1
    assert re.fullmatch(r"hne: error: \w+ is not installed: pip install 'hne-kernels\[train\]'\n", ran.stderr)
    assert ran.stdout == ""


def test_detection_without_scikit_learn_names_the_extra() -> None:
    code = "import torch, hne.metrics as m; m.detection(torch.ones(2), torch.zeros(2))"
    assert "sklearn is not installed: pip install 'hne-kernels[train]'" in run_without(("sklearn",), code).stderr
