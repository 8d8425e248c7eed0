"""Where backbones are cut, by families and by ``stages``, and what is refused."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch
from backbones import backbone, trained
from timm_like import VisionTransformer
from torch import Tensor, nn
from torchvision_like import MobileNetV2, ResNet

from hne import FusedHNE
from hne.errors import BackboneError


def blocks(net: nn.Module, branches: tuple[int, ...], **options: Any) -> list[list[str]]:
    """The paths of the modules in each block."""
    conversion = FusedHNE.from_backbone(net, branches, **options).conversion
    assert conversion is not None
    return [[row.path for row in conversion if row.block == block] for block in range(len(branches))]


def test_stages_are_grouped_evenly_the_first_ones_first() -> None:
    net = ResNet()
    stem = ["conv1", "bn1", "relu", "maxpool"]
    layers = ["layer1.0"], ["layer2.0"], ["layer3.0", "layer3.1"], ["layer4.0", "avgpool"]
    one, two, three, four = layers
    assert blocks(net, (1, 1, 1, 1, 2)) == [stem, one, two, three, four]
    assert blocks(net, (1, 1, 1, 2)) == [stem + one, two, three, four]
    assert blocks(net, (1, 1, 2)) == [stem + one, two + three, four]
    assert blocks(net, (1, 2)) == [stem + one + two, three + four]
    assert blocks(net, (1,)) == [stem + one + two + three + four]


def test_stages_of_mobilenet_begin_where_the_resolution_falls() -> None:
    names = [sorted({int(path.split(".")[1]) for path in block if path.startswith("features")})
             for block in blocks(MobileNetV2(), (1, 1, 1, 1, 2))]  # fmt: skip
    assert names == [[0, 1], [2, 3], [4, 5], [6, 7, 8], [9, 10, 11]]


def test_stages_of_vgg_end_with_the_pooling() -> None:
    last = [block[-1] for block in blocks(backbone("torchvision-vgg"), (1, 1, 1, 1, 2))]
    assert last == ["features.3", "features.7", "features.14", "features.18", "classifier.5"]


def test_stages_by_name() -> None:
    net = trained(ResNet()).double()
    stages = [["conv1", "bn1", "relu"], ["maxpool", "layer1", "layer2"], ["layer3", "layer4"]]
    assert blocks(net, (1, 2, 4), stages=stages) == [
        ["conv1", "bn1", "relu"],
        ["maxpool", "layer1.0", "layer2.0"],
        ["layer3.0", "layer3.1", "layer4.0"],
    ]
    model = FusedHNE.from_backbone(net, (1, 2, 4), stages=stages, head="fc")
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x, num_models=1)[0], net(x))


class Custom(nn.Module):
    """A network of no known family, with functions between its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.exit = nn.Linear(6 * 25, 9)
        self.classify = nn.Linear(9, 4)
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.entry(x)), 2)
        x = nn.functional.adaptive_avg_pool2d(torch.tanh(self.body(x)), 5)
        return self.classify(torch.relu(self.exit(torch.flatten(x, 1))))


STAGES: list[list[Any]] = [
    ["entry", nn.ReLU(), nn.MaxPool2d(2)],
    ["body", nn.Tanh(), nn.AdaptiveAvgPool2d(5), nn.Flatten(), "exit", nn.ReLU()],
]


def test_functions_are_given_as_modules() -> None:
    net = Custom().eval().double()
    model = FusedHNE.from_backbone(net, (1, 3), stages=STAGES)
    assert model.in_channels == 1
    x = torch.randn(2, 1, 20, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x, num_models=1)[0], net(x))


def changed(change: Any) -> list[list[Any]]:
    stages = [list(stage) for stage in STAGES]
    change(stages)
    return stages


WRONG_STAGES = {
    "a stage that is not there": (
        lambda s: s[0].__setitem__(0, "entri"),
        "stages: Custom has no module 'entri'; did you mean 'entry'?",
    ),
    "twice": (lambda s: s[1].append("entry"), "stages: 'entry' is used twice"),
    "twice, as a part": (
        lambda s: s[1].insert(0, "body.1"),
        "stages: 'body.1' is used twice, by itself and as a part of 'body'",
    ),
    "left out": (lambda s: s[1].remove("body"), "the parameter body.0.weight of body.0 (Conv2d) is left out"),
    "head in a stage": (lambda s: s[1].append("classify"), "stages: 'classify' is used twice"),
    "relu left out": (lambda s: s[0].pop(1), "do not compute what Custom computes: expected features before the head"),
    "flatten left out": (
        lambda s: s[1].pop(3),
        "exit (Linear) does not take the input [2, 6, 5, 5] after (AdaptiveAvgPool2d): ",
    ),
    "order": (lambda s: s[1].append(s[1].pop(1)), "do not compute what Custom computes"),
    "empty": (lambda s: s.__setitem__(0, []), "stages[0] has no module"),
}


@pytest.mark.parametrize("name", WRONG_STAGES)
def test_wrong_stages(name: str) -> None:
    change, message = WRONG_STAGES[name]
    with pytest.raises(BackboneError, match=re.escape(message)):
        FusedHNE.from_backbone(Custom(), (1, 3), stages=changed(change))


def test_wrong_counts_of_branches() -> None:
    with pytest.raises(BackboneError, match="branches: expected one count per stage, got 3 for 2 stages"):
        FusedHNE.from_backbone(Custom(), (1, 1, 3), stages=STAGES)
    with pytest.raises(BackboneError, match="branches: ResNet has 5 stages, got counts for 6 blocks: give at most 5"):
        FusedHNE.from_backbone(ResNet(), (1, 1, 1, 1, 1, 2))
    with pytest.raises(ValueError, match="must divide the next"):
        FusedHNE.from_backbone(ResNet(), (1, 2, 3))


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="stages must be a list of lists of paths"):
        FusedHNE.from_backbone(Custom(), (1, 3), stages=["entry", "body"])
    with pytest.raises(TypeError, match=r"stages\[1\] must list paths .* got 3"):
        FusedHNE.from_backbone(Custom(), (1, 3), stages=[["entry"], [3]])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"stages\[0\] must list paths .* without parameters, got Conv2d"):
        FusedHNE.from_backbone(Custom(), (1, 3), stages=[[nn.Conv2d(1, 4, 3)], ["body"]])
    with pytest.raises(TypeError, match=r"backbone must be an nn\.Module, got int"):
        FusedHNE.from_backbone(3, (1, 3))  # type: ignore[arg-type]


def test_unknown_family() -> None:
    with pytest.raises(
        BackboneError, match=r"Custom is of no known family \(ResNet.*\(entry, body, exit, classify\) in"
    ):
        FusedHNE.from_backbone(Custom(), (1, 3))


def test_modules_in_the_order_of_computation_need_no_stages() -> None:
    """A network of no known family, whose forward is its modules one after the other, pooling and the head."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.norm = nn.BatchNorm2d(8)
            self.flatten = nn.Flatten()
            self.fc = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.flatten(self.norm(self.pool(x))))

    class InOrder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Hardswish())
            self.trunk = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 8, 1))
            self.head = Head()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.trunk(self.stem(x)))

    net = trained(InOrder()).double()
    model = FusedHNE.from_backbone(net, (1, 2))
    x = torch.randn(2, 3, 20, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x, num_models=1)[0], net(x))
    first = ["stem.0", "stem.1", "stem.2", "trunk.0"]
    assert blocks(net, (1, 2)) == [first, ["trunk.1", "trunk.2", "head.pool", "head.norm", "head.flatten"]]
    with pytest.raises(BackboneError, match=r"InOrder is of no known.*InOrder has 2 stages, got counts for 3 blocks"):
        FusedHNE.from_backbone(net, (1, 1, 2))


@pytest.mark.parametrize("computed", ["parametrization", "hook"])
def test_weights_that_a_parametrization_or_a_hook_computes(computed: str) -> None:
    """Such a block is a Module; it computes its weights in every call."""
    net = trained(ResNet()).double()
    if computed == "hook":
        nn.utils.prune.random_unstructured(net.layer2[0].conv1, "weight", 0.5)
        net.layer2[0].conv1(torch.randn(1, 8, 4, 4, dtype=torch.float64))
    else:
        nn.utils.parametrizations.weight_norm(net.layer2[0].conv1)
    model = FusedHNE.from_backbone(net, (1, 2, 2))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x, num_models=1)[0], net(x))
    assert len(model.templates()) == 1
    model(x).sum().backward()
    assert all(p.grad is not None for copy in model.blocks[1][0].copies for p in copy.conv1.parameters())


def test_a_module_that_cannot_be_copied() -> None:
    net = ResNet()
    net.layer2[0].lock = threading.Lock()
    with pytest.raises(BackboneError, match=r"BasicBlock cannot be copied: .*pickle"):
        FusedHNE.from_backbone(net, (1, 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 2.5}, TypeError, "num_classes must be an int, got 2.5"),
        ({"perturb": -0.1}, ValueError, "perturb must be a number of at least 0, got -0.1"),
        ({"perturb": float("nan")}, ValueError, "perturb must be a number of at least 0, got nan"),
        ({"input_size": (3, 8)}, BackboneError, "does not take the input"),
        ({"input_size": (1, 2, 3, 4)}, ValueError, "input_size must be a size or (channels, height, width)"),
        ({"head": "fx"}, BackboneError, "ResNet has no module 'fx'; did you mean 'fc'?"),
        ({"head": "layer1"}, BackboneError, "head: expected an nn.Linear at 'layer1', got Sequential"),
        ({"architecture": "timm:resnet18"}, ValueError, "architecture: expected none for a network"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        FusedHNE.from_backbone(backbone("torchvision-vgg") if "input_size" in options else ResNet(), (1, 2), **options)


def test_weights_that_cannot_be_copied() -> None:
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(BackboneError, match=r"0\.weight of a lazy module has no shape yet: give the network one batch"):
        FusedHNE.from_backbone(lazy, (1,))

    tied = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Flatten(), nn.Linear(192, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(BackboneError, match=r"0.weight and 1.weight are one tensor \(tied weights\)"):
        FusedHNE.from_backbone(tied, (1, 2))

    shared = nn.Conv2d(3, 3, 3, padding=1)
    with pytest.raises(BackboneError, match=r"0\.weight and 2\.weight are one tensor"):
        FusedHNE.from_backbone(nn.Sequential(shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(192, 2)), (1, 2))

    with pytest.raises(BackboneError, match=r"expected parameters in float32 or float64, got torch\.bfloat16"):
        FusedHNE.from_backbone(ResNet().bfloat16(), (1, 2))

    mixed = ResNet()
    mixed.layer2.double()
    with pytest.raises(
        BackboneError, match=r"one dtype on one device, got torch\.float32 on cpu, torch\.float64 on cpu"
    ):
        FusedHNE.from_backbone(mixed, (1, 2))

    with pytest.raises(BackboneError, match="of one dtype on one device, got none"):
        FusedHNE.from_backbone(nn.Sequential(nn.ReLU()), (1,))


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    with pytest.raises(BackboneError, match=r"1 \(Linear\) is quantised: convert the network before quantisation"):
        FusedHNE.from_backbone(quantised, (1,), input_size=(3, 2, 2))


def test_networks_whose_ends_do_not_fit() -> None:
    conv, head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    with pytest.raises(BackboneError, match=r"head: 4 \(Softmax\) follows the last linear layer 3"):
        FusedHNE.from_backbone(nn.Sequential(conv, *pool, head, nn.Softmax(1)), (1,))
    with pytest.raises(BackboneError, match=r"an nn.Sequential that ends in an nn.Linear, the head; it has none"):
        FusedHNE.from_backbone(nn.Sequential(conv, *pool), (1,))
    with pytest.raises(BackboneError, match=r"head: 3 expects 5 features, but the stages end in 4 channels"):
        FusedHNE.from_backbone(nn.Sequential(conv, *pool, nn.Linear(5, 2)), (1,), input_size=8)
    with pytest.raises(BackboneError, match="computes no images of 64x64, 224x224"):
        FusedHNE.from_backbone(nn.Sequential(conv, *pool, nn.Linear(5, 2)), (1,))

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, x

    with pytest.raises(BackboneError, match=r"or \[batch, channels\] from 1 \(Pair\), got tuple"):
        FusedHNE.from_backbone(nn.Sequential(conv, Pair(), *pool, head), (1,), input_size=8)

    class Merge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(0, 1)[:, None]

    with pytest.raises(BackboneError, match=r"from 1 \(Merge\), got the shape \[8, 1, 6, 6\] for a batch of 2"):
        FusedHNE.from_backbone(nn.Sequential(conv, Merge(), *pool, head), (1,), input_size=8)


def test_a_forward_that_does_more_than_its_modules() -> None:
    class Normalising(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x - 0.5) / 0.2)

    with pytest.raises(BackboneError, match=r"do not compute what Normalising computes.*F.relu, torch.flatten"):
        FusedHNE.from_backbone(Normalising(), (1, 2))

    class Scaled(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return 1.01 * super().forward(x)

    with pytest.raises(BackboneError, match="expected logits"):
        FusedHNE.from_backbone(Scaled(), (1, 2))

    class Tuple(ResNet):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    with pytest.raises(BackboneError, match=r"expected logits \[batch, classes\] from Tuple, got tuple"):
        FusedHNE.from_backbone(Tuple(), (1, 2))


def test_infinite_weights() -> None:
    net = ResNet()
    with torch.no_grad():
        net.fc.bias[2] = float("nan")
    with pytest.raises(BackboneError, match="expected logits"):
        FusedHNE.from_backbone(net, (1, 2))


def test_vision_transformers_that_are_not_served() -> None:
    net = VisionTransformer()
    net.dynamic_img_size = True
    with pytest.raises(BackboneError, match="positions of a fixed image size"):
        FusedHNE.from_backbone(net, (1, 2))
    net = VisionTransformer()
    net.global_pool = "map"
    with pytest.raises(BackboneError, match="global_pool 'token' or 'avg', got 'map'"):
        FusedHNE.from_backbone(net, (1, 2))


def test_linear_networks_and_batch_norm_of_vectors() -> None:
    """An MLP: the number of channels comes from ``input_size``."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 2))
    net = net.double().eval()
    with pytest.raises(BackboneError, match=r"give \(channels, height, width\), as the network has no convolution"):
        FusedHNE.from_backbone(net, (1, 2))
    model = FusedHNE.from_backbone(net, (1, 2), input_size=(10, 1, 1))
    x = torch.randn(3, 10, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x, num_models=1)[0], net(x))


def test_the_table() -> None:
    net = trained(ResNet())
    net.layer2[0].bn1.eps = 1e-3
    conversion = FusedHNE.from_backbone(net, (1, 1, 2)).conversion
    assert conversion is not None
    title, header, *lines = str(conversion).splitlines()
    assert title == (
        f"ResNet: {sum(p.numel() for p in net.parameters()):,} parameters, checked with images of 64x64; "
        "1 of 11 modules in plain PyTorch (Module)"
    )
    assert len(conversion) == len(lines) == 11
    assert header.split() == ["block", "module", "class", "became", "parameters", "note"]
    end = header.index("parameters") + len("parameters")
    for line, row in zip(lines, conversion, strict=True):
        assert line[:end].endswith(f" {row.parameters:,}")
        assert line == line.rstrip()
    assert [(row.path, row.kind, row.became) for row in conversion][:3] == [
        ("conv1", "Conv2d", "Conv: conv 7x7 8/2"),
        ("bn1", "BatchNorm2d", "joined with conv1"),
        ("relu", "ReLU", "joined with conv1"),
    ]
    (module,) = (row for row in conversion if row.became == "Module")
    assert (module.path, module.block, module.note) == ("layer2.0", 1, "eps 0.001")
    assert sum(row.parameters for row in conversion) == sum(p.numel() for p in net.parameters())
