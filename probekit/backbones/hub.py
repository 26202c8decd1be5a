"""Find a base pipeline: in a local folder, on the Hugging Face Hub, or in the Hub's local cache.

Only what diffusers' folder layout names is fetched: configs, tokenizers, and one copy of the weights of each component,
as safetensors. Pickles, dtype variants, single-file checkpoints and code stay where they are.
"""

import json
import logging
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of requests or httpx, by the version of huggingface_hub
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from probekit.backbones.catalogue import unused_parts
from probekit.errors import BackboneError, ConfigError

INDEX = "model_index.json"
_CONFIG_SUFFIXES = (".json", ".txt", ".model", ".jinja")  # configs, vocabularies, sentencepiece, chat templates
_WITHOUT_WEIGHTS = ("Tokenizer", "Scheduler", "Processor", "FeatureExtractor")  # words in the names of such classes
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:-\d{5}-of-(?P<shards>\d{5}))?\.safetensors")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A base pipeline on disk: its folder, what it was asked for as, its commit, and its ``model_index.json``."""

    folder: Path
    model_id: str
    revision: str | None
    index: dict[str, Any]

    @property
    def name(self) -> str:
        """Last part of the folder's name or hub id."""
        return Path(self.model_id).name

    def component(self, name: str) -> tuple[str | None, str | None]:
        """Return library and class of a component, as the index names them; (None, None) for one that is left out."""
        match self.index.get(name):
            case [str(library), str(class_name)]:
                return library, class_name
            case _:
                return None, None


def locate(model_id: str, *, revision: str | None, without_transformer: bool, weights: bool = True) -> Source:
    """Find a base pipeline and fetch what the cache lacks of it.

    Parameters
    ----------
    model_id
        Folder, or hub id (owner/name).
    revision
        Branch, tag or commit of a hub id; None = its main branch. The commit that it stands for is recorded.
    without_transformer
        The pipeline's own transformer is not needed.
    weights
        False: configs and tokenizers only.

    Returns
    -------
    Source
        With every file that loading needs on disk.

    Raises
    ------
    BackboneError
        For a model that is missing, gated, not in diffusers' layout or without safetensors, for a missing revision,
        and for an unreachable Hub where the cache does not hold the model.
    """
    folder = Path(model_id)
    if folder.is_dir():
        if revision is not None:
            msg = f"revision {revision!r} was given for the folder {folder}; only hub ids have revisions"
            raise ConfigError(msg)
        return Source(folder, str(folder.resolve()), None, read_json(folder / INDEX))
    if model_id.count("/") != 1 or model_id.startswith((".", "/", "~")):
        msg = f"{model_id}: no such folder, and not a hub id (owner/name)"
        raise BackboneError(msg)
    try:
        return _from_hub(model_id, revision or constants.DEFAULT_REVISION, without_transformer, weights)
    except (OSError, HTTPError, HFValidationError) as error:
        msg = f"{model_id}: {_reason(error, model_id, revision)}"
        raise BackboneError(msg) from error


def _from_hub(model_id: str, revision: str, without_transformer: bool, weights: bool) -> Source:  # noqa: FBT001
    try:
        siblings = HfApi().model_info(model_id, revision=revision).siblings
        files, unreachable = [sibling.rfilename for sibling in siblings or ()], None
    except HfHubHTTPError:
        raise  # the Hub answered, and said no
    except (OSError, HTTPError) as error:  # offline mode, or no network: the cache may do
        files, unreachable = [], "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else in_short(error)
    if unreachable is None and INDEX not in files:
        msg = f"{model_id}: has no {INDEX}; allowed: repositories in diffusers' folder layout"
        raise BackboneError(msg)
    offline = unreachable is not None
    folder = Path(hf_hub_download(model_id, INDEX, revision=revision, local_files_only=offline)).parent
    if offline:
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        logger.info("%s: commit %s of the cache is used (%s)", model_id, folder.name, unreachable)
    elif revision != folder.name:
        logger.info("%s: %s is commit %s", model_id, revision, folder.name)
    source = Source(folder, model_id, folder.name, read_json(folder / INDEX))
    unused = unused_parts(str(source.index.get("_class_name")))
    names = [
        name
        for name in source.index
        if source.component(name)[1] and name not in unused and not (without_transformer and name == "transformer")
    ]
    try:
        wanted = [file for name in names for file in _files_of(name, source, files, weights)]
    except BackboneError as error:
        place = f"the cache, commit {folder.name} ({unreachable})" if offline else "the repository"
        msg = f"{model_id}: {place} holds {error}"
        raise BackboneError(msg) from None
    if not all((folder / file).is_file() for file in wanted):
        snapshot_download(model_id, revision=folder.name, allow_patterns=wanted)
    return source


def _files_of(name: str, source: Source, files: list[str], weights: bool) -> list[str]:  # noqa: FBT001
    """Choose the files of a component; raise where there are none, or no weights although it needs some."""
    inside = [file for file in files if PurePosixPath(file).parent == PurePosixPath(name)]
    configs = [file for file in inside if file.endswith(_CONFIG_SUFFIXES)]
    if not configs:
        msg = f"nothing of {name}"
        raise BackboneError(msg)
    if not weights or any(word in str(source.component(name)[1]) for word in _WITHOUT_WEIGHTS):
        return configs
    copy = _one_copy(inside)
    if not copy:
        others = ", ".join(sorted(PurePosixPath(file).name for file in set(inside) - set(configs)))
        msg = f"no complete safetensors of {name}, only {others or 'configs'}; pickles and variants are not read"
        raise BackboneError(msg)
    return configs + copy


def _one_copy(files: list[str]) -> list[str]:
    """Choose the weights of a component: all shards or, where there are none, the whole file; [] if incomplete."""
    found = [(file, match["shards"]) for file in files if (match := _WEIGHTS.fullmatch(PurePosixPath(file).name))]
    shards = [file for file, number in found if number]
    if shards:
        return shards if len(shards) == int(next(number for _, number in found if number)) else []
    return [file for file, _ in found[:1]]


def _reason(error: Exception, model_id: str, revision: str | None) -> str:
    """Say in one line what an error of the Hub's client means, and what to do."""
    page = f"{constants.ENDPOINT}/{model_id}"
    match error:
        case GatedRepoError():  # a kind of RepositoryNotFoundError
            return f"is gated; accept its licence at {page} and log in with HF_TOKEN"
        case RepositoryNotFoundError():
            return f"is not at {page}, or private; check the name, or log in with HF_TOKEN"
        case RevisionNotFoundError():
            return f"has no revision {revision!r}; allowed: its branches, tags and commits, see {page}/commits"
        case HFValidationError():
            return "no such folder, and not a hub id (owner/name)"
        case LocalEntryNotFoundError():
            asked = "" if revision is None else f" at revision {revision!r}"
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
            todo = "unset it to download" if constants.HF_HUB_OFFLINE else "check the network"
            return f"is not in the cache {constants.HF_HUB_CACHE}{asked}, and {why}; {todo}, or give a folder"
        case _:
            return f"cannot be had from the Hub ({in_short(error)}); HF_HUB_OFFLINE=1 uses the cache alone"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or say in one line why that cannot be done."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        msg = f"{path.parent}: has no {path.name}"
        raise BackboneError(msg) from error
    except (OSError, ValueError) as error:
        msg = f"{path}: cannot be read ({in_short(error)})"
        raise BackboneError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path}: is not a JSON object"
        raise BackboneError(msg)
    return content


def in_short(error: Exception) -> str:
    """Return an error's message on one line; those of the libraries have pages."""
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
