"""TorchUncertainty's own routines, with the real package: they agree with this package's evaluation and training."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hne import FusedHNE, objective
from hne.data import Dataset
from hne.evaluation import evaluate, evaluate_ood
from hne.integrations import TorchUncertainty

if importlib.util.find_spec("torch_uncertainty") is None:
    pytest.skip("torch_uncertainty is not installed", allow_module_level=True)
try:
    from torch_uncertainty import TUTrainer
    from torch_uncertainty.routines import ClassificationRoutine
    from torch_uncertainty.transforms import RepeatTarget
except Exception as error:  # it needs a torchvision that fits to PyTorch
    pytest.skip(f"torch_uncertainty cannot be imported: {error}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")
CLASSES, MEMBERS = 5, 4


@pytest.fixture
def model() -> FusedHNE:
    """A network whose members differ, and are not so certain that scores are equal in float32."""
    model = FusedHNE.from_preset("hne_tiny", num_classes=CLASSES, width=0.25).eval()
    nn.init.normal_(model.head.conv.weight)
    with torch.no_grad():
        model.head.conv.weight.mul_(1.5 / model(torch.randn(64, 3, 8, 8)).std())
    return model


@pytest.fixture
def data(rng: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(90, 3, 8, 8, generator=rng), torch.randint(CLASSES, (90,), generator=rng)


def routine(model: FusedHNE, members: int = MEMBERS, **options: Any) -> Any:
    adapter = TorchUncertainty(model, members)
    return ClassificationRoutine(
        adapter,
        CLASSES,
        nn.CrossEntropyLoss(),
        is_ensemble=True,
        format_batch_fn=RepeatTarget(adapter.num_estimators),
        **options,
    )


def trainer(folder: Path, **options: Any) -> Any:
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False)
    return TUTrainer(accelerator="cpu", devices=1, default_root_dir=folder, **{**quiet, **options})


def test_metrics_are_those_of_mean_probabilities(model: FusedHNE, data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    tested = routine(model)
    (found,) = trainer(tmp_path).test(tested, DataLoader(TensorDataset(*data), batch_size=16), verbose=False)
    dataset = Dataset.from_torch(TensorDataset(*data), TensorDataset(*data), classes=CLASSES)
    expected = {
        average: evaluate(model, dataset, sizes=(MEMBERS,), average=average).ensembles[0]
        for average in ("logits", "probabilities")
    }
    of = expected["probabilities"]
    for name, value in (
        ("cls/Acc", of.accuracy),
        ("cls/NLL", of.nll),
        ("cls/Brier", of.brier),
        ("cal/ECE", of.ece),
        ("ens_Disagreement", of.disagreement),
        ("ens_Entropy", of.entropy - of.mutual_information),  # the mean entropy of the members
        ("ens_MI", of.mutual_information),
        ("cls/Entropy", of.entropy),
    ):
        assert found[f"test/{name}"] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    differences = (getattr(expected["logits"], name) / getattr(of, name) - 1 for name in ("nll", "brier", "ece"))
    assert max(map(abs, differences)) > 3e-3, "the averages differ for this network"


@pytest.mark.parametrize(
    ("criterion", "score"), [("msp", "by_max_probability"), ("mutual_information", "by_mutual_information")]
)
def test_detection_is_that_of_mean_probabilities(
    criterion: str, score: str, model: FusedHNE, data: tuple[Tensor, Tensor], rng: torch.Generator, tmp_path: Path
) -> None:
    other = 1.5 * torch.randn(70, 3, 8, 8, generator=rng), torch.zeros(70, dtype=torch.long)
    # Of two members, the mutual information is below 1: torchmetrics would take the sigmoid of some batches only.
    tested = routine(model, 2, eval_ood=True, ood_criterion=criterion)
    loaders = [DataLoader(TensorDataset(*pair), batch_size=16) for pair in (data, other)]
    results = trainer(tmp_path).test(tested, loaders, verbose=False)
    found = {name: value for result in results for name, value in result.items()}
    dataset = Dataset.from_torch(TensorDataset(*other), TensorDataset(*data), classes=CLASSES)
    ood = evaluate_ood(model, dataset, dataset.train, sizes=(2,), average="probabilities")[0]
    expected = getattr(ood, score)
    assert found["ood/AUROC"] == pytest.approx(expected.auroc, abs=2e-3)
    assert found["ood/AUPR"] == pytest.approx(expected.aupr, abs=2e-3)


def test_training_is_that_of_independent_members(model: FusedHNE, data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    model.reset_parameters()
    model.train()  # Lightning keeps the mode
    loader = DataLoader(TensorDataset(*data), batch_size=30)
    expected = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(expected.parameters(), 0.05)
    for images, target in loader:
        optimizer.zero_grad()
        (objective("I")(expected(images, MEMBERS), target) / MEMBERS).backward()
        optimizer.step()
    fitted = routine(model, optim_recipe=torch.optim.SGD(model.parameters(), 0.05))
    trainer(tmp_path, max_epochs=1).fit(fitted, loader, loader)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=lambda text, name=name: f"{name}: {text}")
