"""Networks as folders in the layout of the Hugging Face hub: config.json, model.safetensors, README.md."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import Self

from ..errors import CheckpointError, FileError
from ..extras import require
from ..files import replacing, to_json
from .backbone import templates_from_config
from .model_card import model_card

FORMAT, VERSION = "hne", 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def save_folder(
    folder: str | Path, tensors: Mapping[str, Tensor], network: Mapping[str, Any], metadata: Mapping[str, Any]
) -> None:
    """Write the three files, each of them completely; config.json comes last, so that a folder with one is complete.

    Args:
        folder: Made if it does not exist.
        tensors: The weights.
        network: The network's description.
        metadata: What is known besides, as JSON-able values.

    Raises:
        FileError: A file cannot be written.
        ResultError: The metadata have a number that is NaN or infinite.
    """
    folder = Path(folder)
    config = {"format": FORMAT, "version": VERSION, "model": dict(network), **metadata}
    text = to_json(config, folder / CONFIG, indent=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder}: cannot be made: {error.strerror}") from error
    with replacing(folder / WEIGHTS) as temporary:
        try:
            save_file(dict(tensors), temporary, {"format": "pt"})
        except SafetensorError as error:
            raise FileError(f"{folder / WEIGHTS}: cannot be written: {error}") from error
    for name, content in ((CARD, model_card(network, metadata)), (CONFIG, text)):
        with replacing(folder / name) as temporary:
            temporary.write_text(content, "utf-8")


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights (on the CPU) and the content of config.json.

    Raises:
        CheckpointError: A file is missing or damaged, or the folder is of something else.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no JSON file that can be read ({error})") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else config
        raise CheckpointError(f"{path}: not of a network that save_pretrained wrote: format {FORMAT!r}, got {found!r}")
    if config.get("version") != VERSION:
        raise CheckpointError(f"{path}: expected version {VERSION}, got {config.get('version')!r}: update hne-kernels")
    weights = folder / WEIGHTS
    try:
        return load_file(weights), config
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights}: not a safetensors file, or truncated or damaged ({error})") from error


def download(name: str, **options: Any) -> Path:
    """The folder of a repository of the Hugging Face hub, in its cache.

    Args:
        name: OWNER/NAME.
        options: Of ``huggingface_hub.snapshot_download``: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
    """
    require("hub", "huggingface_hub")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, CARD], **options))


class SharesPretrained(nn.Module):
    """Base class of :class:`HNE`: a model that is saved as, and loaded from, a folder or the Hugging Face hub.

    Attributes:
        metadata: What config.json says besides the network, as JSON-able values. ``data`` describes the data set, with
            the normalisation of its images and the names of its classes; ``recipe`` are the options of the training;
            ``evaluation`` is the quality on test data. The model card is written from it. Empty for a new model.
    """

    metadata: Mapping[str, Any] = {}

    if TYPE_CHECKING:

        def config(self) -> dict[str, Any]: ...

        @classmethod
        def from_config(cls, config: dict[str, Any], templates: Sequence[nn.Module] = ()) -> Self: ...

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        templates: Sequence[nn.Module] = (),
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """The model of a folder that :meth:`save_pretrained` wrote, or of the Hugging Face hub, in eval mode.

        No code of the folder runs.

        Args:
            name: A folder, or OWNER/NAME of a repository of the hub.
            templates: As for :func:`hne.load`.
            revision, token, cache_dir, local_files_only: Of the hub's download: a branch, tag or commit; the user's
                token; the folder of the cache; use the cache alone.

        Raises:
            CheckpointError: No such folder; it is damaged or of something else; or the network cannot be built.
            ModuleNotFoundError: ``name`` is of the hub, and huggingface_hub is not installed.
        """
        folder = Path(name).expanduser()
        if not folder.is_dir():
            if _REPOSITORY.fullmatch(str(name)) is None:
                raise CheckpointError(f"{name}: no such folder, and no OWNER/NAME of the Hugging Face hub")
            options = {"revision": revision, "token": token, "cache_dir": cache_dir}
            folder = download(str(name), local_files_only=local_files_only, **options)
        tensors, config = read_folder(folder)
        network = config.pop("model", None)
        try:
            model = cls.from_config(network, templates or templates_from_config(network))
            model.load_state_dict(tensors)
        except (LookupError, AttributeError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{folder}: cannot build its network: {reason}") from error
        del config["format"], config["version"]
        model.metadata = config
        return model.eval()

    def save_pretrained(self, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write config.json, model.safetensors, and a model card README.md, for :meth:`from_pretrained`.

        Each file is replaced by a complete one. Parameters that are tied are written once for each name.

        Args:
            folder: Made if it does not exist.
            metadata: Instead of ``self.metadata``.

        Raises:
            FileError: A file cannot be written.
            ResultError: The metadata have a number that is NaN or infinite.
        """
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in self.state_dict().items()}
        save_folder(folder, tensors, self.config(), self.metadata if metadata is None else metadata)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        metadata: Mapping[str, Any] | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a hierarchical neural ensemble",
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to a repository of the Hugging Face hub; it is made if needed.

        Args:
            repo_id: OWNER/NAME, or NAME.
            metadata: As for :meth:`save_pretrained`.
            private: Visibility of a new repository; by default that of the owner's settings.
            token: Of the user; by default the one that ``hf auth login`` has stored.
            commit_message: Of the upload.

        Returns:
            The address of the commit.

        Raises:
            ModuleNotFoundError: huggingface_hub is not installed.
        """
        require("hub", "huggingface_hub")
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory(prefix="hne-") as folder:
            self.save_pretrained(folder, metadata)
            repository = api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository.repo_id, folder_path=folder, commit_message=commit_message, repo_type="model"
            )
        return str(commit)


def is_pretrained(folder: Path) -> bool:
    """Whether a folder has a config.json."""
    return (folder / CONFIG).is_file()
