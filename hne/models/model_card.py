"""The text that presents a network to others: README.md of a repository of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = {"accuracy": "accuracy", "rmse": "RMSE", "nll": "NLL", "ece": "ECE"}
_USE = """\
## Use

```sh
pip install hne-kernels
```

```python
from hne import FusedHNE

model = FusedHNE.from_pretrained("OWNER/NAME")  # or the folder of these files
logits = model.prefix_logits(images)            # mean logits of the first 1, 2, 4, ... networks
for n, logits in model.anytime(images):         # mean logits of the first n networks
    ...
```
"""


def model_card(network: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """Write the model card, in Markdown with the metadata of the hub.

    Args:
        network: The network's description, see :meth:`HNE.config`.
        metadata: What is known besides, see :attr:`HNE.metadata`; entries may be missing.
    """
    data, recipe = metadata.get("data", {}), metadata.get("recipe", {})
    branches = network["hierarchy"]["branches"]
    members = network["hierarchy"]["num_models"]
    task = "tabular-regression" if data.get("target") else "image-classification"
    outputs = network["num_classes"]
    title = f"{recipe['preset']} on {data['name']}" if recipe.get("preset") and "name" in data else "An ensemble"
    parts = [
        _front_matter(task),
        f"# {title}: {members} networks in one tree\n",
        "A hierarchical neural ensemble (Ruiz & Verbeek, AAAI 2021): the networks share their early blocks. They are "
        "evaluated one after the other, and each adds to the answer.\n",
        f"- Branches of each block: {', '.join(map(str, branches))}\n"
        f"- Input: {_count(network['in_channels'], 'channel')}{_size(data)}; output: {_count(outputs, 'logit')}\n",
        _evaluation(metadata.get("evaluation", {})),
        _USE,
        _data(data),
        _recipe(recipe),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(task: str) -> str:
    tags = "".join(f"- {tag}\n" for tag in ("ensemble", "anytime-inference", "uncertainty"))
    return f"---\nlibrary_name: hne-kernels\npipeline_tag: {task}\ntags:\n{tags}---\n"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(data: Mapping[str, Any]) -> str:
    size = data.get("input", {}).get("size")
    return f" of {size[0]} x {size[1]} pixels" if size else ""


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    """A table with a row for each ensemble."""
    ensembles: Sequence[Mapping[str, Any]] = evaluation.get("ensembles", ())
    if not ensembles:
        return ""
    columns = [name for name in _COLUMNS if name in ensembles[0]]
    lines = [
        f"| networks | multiply-adds | {' | '.join(_COLUMNS[name] for name in columns)} |",
        f"|---:|---:|{'---:|' * len(columns)}",
        *(
            f"| {row['num_models']} | {row['macs'] / 1e6:.2f} M | "
            + " | ".join(f"{row[name]:.2%}" if name == "accuracy" else f"{row[name]:.4f}" for name in columns)
            + " |"
            for row in ensembles
        ),
    ]
    samples = evaluation.get("images", evaluation.get("samples"))
    on = f", on {samples} test samples" if samples else ""
    return f"## Quality by the number of networks{on}\n\n" + "\n".join(lines) + "\n"


def _data(data: Mapping[str, Any]) -> str:
    form = data.get("input")
    if not form:
        return ""
    classes = data.get("classes") or ()
    named = f"Classes: {', '.join(map(str, classes))}.\n" if 0 < len(classes) <= 20 else ""
    samples, name = data.get("train", "an unknown number of"), data.get("name", "a data set")
    return (
        f"## Data\n\nTrained on {samples} samples of {name}. "
        f"Pixels in [0, 1] are normalised by mean {form['mean']} and standard deviation {form['std']} of each "
        f"channel. {named}"
    )


def _recipe(recipe: Mapping[str, Any]) -> str:
    if not recipe:
        return ""
    return f"## Training\n\n```json\n{json.dumps({k: v for k, v in recipe.items() if v is not None}, indent=2)}\n```\n"
