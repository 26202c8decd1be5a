"""From a folder or hub id to a pipeline: find the parts, check that they fit, load them quietly.

Components are loaded one by one, so that a missing weight is an error here and not a random number: no remote code, no
pickle (safetensors only), no class outside diffusers and transformers.
"""

import hashlib
import importlib
import inspect
import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from probekit.backbones.families import Component, Family, family_of
from probekit.backbones.weights import RandomWeights, initialised, shuffle
from probekit.errors import BackboneError

_LIBRARIES = ("diffusers", "transformers")


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


def locate(model_id: str, *, revision: str | None, without_transformer: bool) -> Source:
    """Find a base pipeline in a local folder, or in the hub and its local cache."""
    folder = Path(model_id)
    if folder.is_dir():
        if revision is not None:
            msg = f"revision {revision!r} was given for the folder {folder}; only hub ids have revisions"
            raise BackboneError(msg)
        return Source(folder, str(folder.resolve()), None, _read_json(folder / "model_index.json"))
    if model_id.count("/") != 1 or model_id.startswith((".", "/", "~")):
        msg = f"{model_id}: no such folder, and not a hub id (owner/name)"
        raise BackboneError(msg)
    skipped = {"transformer": None} if without_transformer else {}
    try:
        pipeline = _diffusers_class("DiffusionPipeline")
        with quiet():
            found = pipeline.download(model_id, revision=revision, use_safetensors=True, **skipped)
    except (OSError, ValueError) as error:
        msg = f"{model_id}: cannot be had from the hub or its cache ({_in_short(error)})"
        raise BackboneError(msg) from error
    folder = Path(found)
    return Source(folder, model_id, folder.name, _read_json(folder / "model_index.json"))


def transformer_folder(source: Source, transformer: Path | None) -> Path:
    """Return the folder of the transformer to probe: the given one, or the base pipeline's own."""
    if transformer is None:
        if not (source.folder / "transformer" / "config.json").is_file():
            msg = f"{source.folder}: the backbone has no transformer/config.json; give a folder with --transformer"
            raise BackboneError(msg)
        return source.folder / "transformer"
    if not transformer.is_dir():
        msg = f"{transformer}: no such transformer folder"
        raise BackboneError(msg)
    return transformer


def transformer_family(folder: Path) -> Family:
    """Return the row of the transformer in `folder`, by the class that its config names."""
    class_name = _read_json(folder / "config.json").get("_class_name")
    try:
        return family_of(str(class_name))
    except BackboneError as error:
        msg = f"{folder / 'config.json'}: {error}"
        raise BackboneError(msg) from error


def load_transformer(folder: Path, family: Family, dtype: torch.dtype, random: RandomWeights | None) -> Component:
    """Load a transformer, or make the random one that `random` describes of it; on the CPU, ready to run."""
    cls = _diffusers_class(family.transformer)
    if random is not None and random.kind == "init":
        config = {key: value for key, value in _read_json(folder / "config.json").items() if not key.startswith("_")}
        with quiet():
            model = initialised(lambda: cls.from_config(config), random.seed).to(dtype)
        return model.eval().requires_grad_(False)  # noqa: FBT003 - torch's own signature
    model = _load_model(cls, folder, dtype)
    if random is not None:
        shuffle(model, random.seed)
    return model


def load_base(source: Source, family: Family, dtype: torch.dtype) -> dict[str, Component]:
    """Load every component of the pipeline except its transformer, on the CPU; those left out of the index are None."""
    wanted = set(inspect.signature(_diffusers_class(family.pipeline)).parameters) - {"transformer"}
    components: dict[str, Component] = {}
    for name in sorted(wanted):
        library, class_name = source.component(name)
        if class_name is None and name in family.optional:
            components[name] = None
            continue
        cls = getattr(importlib.import_module(library), str(class_name), None) if library in _LIBRARIES else None
        if cls is None:
            found = "missing" if class_name is None else f"{library}.{class_name}"
            allowed = f"a class of {' or '.join(_LIBRARIES)}"
            msg = f"{source.folder / 'model_index.json'}: {name} is {found}; allowed: {allowed}"
            raise BackboneError(msg)
        folder = source.folder / name
        components[name] = _load_component(cls, folder, _vae_dtype(folder, dtype) if name == "vae" else dtype)
    return components


def build_pipeline(family: Family, components: dict[str, Component], where: str) -> Component:
    """Join components to a pipeline after checking that transformer and base fit together."""
    cls = _diffusers_class(family.pipeline)
    with quiet():
        pipe = cls(**components)
    for width in family.widths(pipe):
        if not width.agrees:
            relation = "needs at least" if width.at_least else "has"
            msg = f"{where}: {width.name} of the transformer is {width.transformer}, the base {relation} {width.base}"
            raise BackboneError(msg)
    return pipe


def files_hash(folder: Path) -> str:
    """Return the SHA-256 over names and bytes of the files of a small component, such as a tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        content = path.read_bytes()
        digest.update(json.dumps([path.name, len(content)]).encode() + content)
    return digest.hexdigest()


def config_hash(folder: Path) -> str:
    """Return the SHA-256 of a component's ``config.json``, without names and versions of what wrote it."""
    config = _read_json(folder / "config.json")
    kept = {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and key not in ("transformers_version", "torch_dtype", "dtype")
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _diffusers_class(name: str) -> Component:
    """Import a class of diffusers, which takes seconds for a pipeline, and only when a backbone is loaded."""
    with quiet():
        return getattr(importlib.import_module("diffusers"), name)


def _vae_dtype(folder: Path, dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`, unless the VAE's config says (as it does by default) that float16 overflows in it."""
    upcast = dtype == torch.float16 and _read_json(folder / "config.json").get("force_upcast", True)
    return torch.float32 if upcast else dtype


def _load_component(cls: Component, folder: Path, dtype: torch.dtype) -> Component:
    if issubclass(cls, torch.nn.Module):
        return _load_model(cls, folder, dtype)
    try:
        with quiet():
            return cls.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        msg = f"{folder}: cannot load the {cls.__name__} ({_in_short(error)})"
        raise BackboneError(msg) from error


def _load_model(cls: Component, folder: Path, dtype: torch.dtype) -> Component:
    if not (folder / "config.json").is_file():
        msg = f"{folder}: has no config.json"
        raise BackboneError(msg)
    if not any(folder.glob("*.safetensors")):
        msg = f"{folder}: has no weights (*.safetensors)"
        raise BackboneError(msg)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    options["torch_dtype" if cls.__module__.startswith("diffusers.") else "dtype"] = dtype
    try:
        # Constructors draw weights before the stored ones replace them; the global generator stays as it was.
        with quiet(), torch.random.fork_rng(devices=[]):
            model, report = cls.from_pretrained(folder, **options)
    except Exception as error:  # damaged files raise whatever the two libraries and safetensors choose
        msg = f"{folder}: cannot load the {cls.__name__} ({_in_short(error)})"
        raise BackboneError(msg) from error
    absent = sorted(str(key) for key in report["missing_keys"])
    if absent:
        msg = f"{folder}: the weights lack {len(absent)} tensors that {cls.__name__} has, such as {absent[0]}"
        raise BackboneError(msg)
    return model.eval().requires_grad_(False)  # noqa: FBT003 - torch's own signature


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        msg = f"{path.parent}: has no {path.name}"
        raise BackboneError(msg) from error
    except (OSError, ValueError) as error:
        msg = f"{path}: cannot be read ({_in_short(error)})"
        raise BackboneError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path}: is not a JSON object"
        raise BackboneError(msg)
    return content


def _in_short(error: Exception) -> str:
    """Return an error's message on one line; those of the libraries have pages."""
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and notices of diffusers and transformers from our users' terminals."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    barred = [library for library, _ in before if library.is_progress_bar_enabled()]
    for library, _ in before:
        library.set_verbosity_error()
    for library in barred:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)
        for library in barred:
            library.enable_progress_bar()
