"""Designs of the paper's experiments: the configs that each study compares."""

from __future__ import annotations

from dataclasses import replace

from hne import OBJECTIVES
from hne.experiments import STUDIES, RivalConfig, StudySettings, study_panels, training_configs
from hne.training import TrainConfig

PAPER = StudySettings(TrainConfig.of(data="cifar100"))


def curves(name: str, settings: StudySettings = PAPER, scale: float = 1.0) -> dict[str, tuple[TrainConfig, ...]]:
    (panel,) = study_panels(STUDIES[name], settings, [scale])
    return {curve.label: curve.configs for curve in panel.curves}


def test_objectives_of_table1() -> None:
    found = curves("table1")
    assert tuple(found) == OBJECTIVES
    for objective, (config,) in found.items():
        usual = replace(PAPER.base, objective=objective, branches=(1, 2, 4, 8, 16), num_models=16)
        assert config == usual


def test_distillations_of_figure4() -> None:
    found = curves("figure4", replace(PAPER, alphas=(0.1, 0.5)))
    assert [(r.objective, r.alpha) for (r,) in found.values()] == [
        ("I", 0.5),
        ("I+D", 0.1),
        ("I+D", 0.5),
        ("I+HD", 0.5),
    ]
    assert "I+D, alpha 0.1" in found


def test_systems_of_figure5() -> None:
    found = curves("figure5", scale=0.5)
    assert {label: some[0].branches for label, some in found.items()} == {
        "HNE": (1, 2, 4, 8, 16),
        "independent networks": (16,) * 5,
        "multi-branch": (1, 1, 1, 16, 16),
        "one network": (1,) * 5,
    }
    assert [config.width for config in found["one network"]] == [0.25, 0.5, 1.0]
    assert {config.objective for config in found["one network"]} == {"I"}
    assert {config.objective for config in found["HNE"]} == {"I+HD"}


def test_rivals_of_figure6() -> None:
    found = curves("figure6", scale=0.5)
    assert found["HNE, I+HD"] == curves("figure5", scale=0.5)["HNE"]
    assert found["one network"] == curves("figure5", scale=0.5)["one network"]
    for label, rival in (("early exits", "exits"), ("MSDNet", "msdnet")):
        (config,) = found[label]
        assert isinstance(config, RivalConfig)
        assert (config.rival, config.width, config.objective, config.epochs) == (rival, 0.5, "I", PAPER.base.epochs)
    (slimmable,) = found["slimmable"]
    assert (slimmable.branches, slimmable.width, slimmable.widths) == ((1,) * 5, 0.5, (0.25, 0.5, 0.75, 1.0))


def test_studies_share_runs() -> None:
    hne = curves("figure5")["HNE"]
    assert curves("table1")["I+HD"] == curves("figure4")["I+HD"] == curves("figure9")["I+HD"] == hne
    assert curves("table1")["I+D"] == curves("figure4")["I+D, alpha 0.5"]
    everything = [panel for study in STUDIES.values() for panel in study_panels(study, PAPER, [1.0, 0.5])]
    needed = training_configs(everything, 3)
    assert len(needed) == len(set(needed)) == 3 * (2 * (5 + 2 + 2 + 3) + 4), "one network: widths 0.25, 0.5, 1, 2"
    assert [config.seed for config in needed] == sorted(config.seed for config in needed)


def test_another_number_of_models() -> None:
    small = StudySettings(TrainConfig.of(data="digits", num_models=4))
    assert curves("table1", small)["I"][0].branches == (1, 1, 2, 4)
    assert curves("figure5", small)["multi-branch"][0].branches == (1, 1, 4, 4)
