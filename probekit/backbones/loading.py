"""From a folder to a pipeline: check that its parts fit, load them quietly, one stage at a time.

The pipeline is built with models without weights (on torch's meta device); those that a stage needs are exchanged for
loaded ones and back. Components are loaded one by one, so that a missing weight is an error here and not a random
number: no remote code, no pickle (safetensors only), no class outside diffusers, transformers and the row's library.
"""

import hashlib
import importlib.util
import inspect
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from probekit.backbones.catalogue import family_of
from probekit.backbones.families import Component, Family
from probekit.backbones.hub import Source, in_short, read_json
from probekit.backbones.weights import RandomWeights, convert, initialised, shuffle
from probekit.errors import BackboneError

_LIBRARIES = ("diffusers", "transformers")

logger = logging.getLogger(__name__)


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


def transformer_family(source: Source, folder: Path) -> Family:
    """Return the row of the transformer in `folder`, by the class that its config names and the pipeline's."""
    class_name = read_json(folder / "config.json").get("_class_name")
    try:
        return family_of(str(class_name), str(source.index.get("_class_name")))
    except BackboneError as error:
        msg = f"{folder / 'config.json'}: {error}"
        raise BackboneError(msg) from error


def source_hash(family: Family) -> str:
    """Return the SHA-256 of the code of a pipeline, which holds its prompt template."""
    module = sys.modules[_class_of(family.library, family.pipeline).__module__]
    return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()


def model_names(family: Family, source: Source) -> list[str]:
    """List the models of a pipeline besides its transformer: the VAE and the text encoders."""
    return [name for name, (kind, _) in _parts(family, source).items() if kind == "model" and name != "transformer"]


def build_pipeline(family: Family, source: Source, transformer: Path, dtype: torch.dtype) -> Component:
    """Build the pipeline with its tokenizers and scheduler, and with models that have no weights yet.

    Raises
    ------
    BackboneError
        If a component is missing or of a class that is not allowed, or if transformer and base do not fit together.
    """
    parts = {
        name: _without_weights(value, _folder(source, transformer, name), dtype)
        if kind == "model"
        else _load_part(value, source.folder / name)
        if kind == "part"
        else value
        for name, (kind, value) in _parts(family, source).items()
    }
    with quiet(), warnings.catch_warnings(action="ignore", category=FutureWarning):  # of diffusers about its own parts
        pipe = _class_of(family.library, family.pipeline)(**parts)
    for width in family.widths(pipe):
        if not width.agrees:
            relation = "needs at least" if width.at_least else "has"
            msg = (
                f"{transformer}: {width.name} of the transformer is {width.transformer}, "
                f"the base {relation} {width.base}"
            )
            raise BackboneError(msg)
    return pipe


def load_model(source: Source, name: str, like: Component, dtype: torch.dtype) -> Component:
    """Load the VAE or a text encoder of a base pipeline on the CPU; `like` is the same model without weights."""
    folder = source.folder / name
    return _load_model(type(like), folder, _vae_dtype(folder, dtype) if name == "vae" else dtype)


def load_transformer(folder: Path, like: Component, dtype: torch.dtype, random: RandomWeights | None) -> Component:
    """Load a transformer, or make the random one that `random` describes of it; on the CPU, ready to run."""
    cls = type(like)
    if random is not None and random.kind == "init":
        config = {key: value for key, value in read_json(folder / "config.json").items() if not key.startswith("_")}
        with quiet():
            model = convert(initialised(lambda: cls.from_config(config), random.seed), dtype)
        return model.eval().requires_grad_(False)  # noqa: FBT003 - torch's own signature
    model = _load_model(cls, folder, dtype)
    if random is not None:
        shuffle(model, random.seed)
    return model


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of the transformer.

    Attributes
    ----------
    path
        Its safetensors file.
    sha256
        Hex digest of that file.
    """

    path: Path
    sha256: str

    @classmethod
    def at(cls, path: Path) -> "Adapter":
        """Find the adapter in a file, or in a folder that holds one.

        Raises
        ------
        BackboneError
            If there is none, or several, or if peft is not installed.
        """
        if importlib.util.find_spec("peft") is None:
            msg = f"{path}: LoRA adapters need peft, which is not installed; pip install 'dit-probekit[lora]'"
            raise BackboneError(msg)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if len(files) != 1 or not files[0].is_file():
            msg = f"{path}: {len(files) if path.is_dir() else 'no'} LoRA adapters here; allowed: one *.safetensors file"
            raise BackboneError(msg)
        return cls(files[0], hashlib.sha256(files[0].read_bytes()).hexdigest())

    def check(self, pipe: Component) -> None:
        """Refuse an adapter of another model or of more than the transformer; `pipe` needs no weights.

        Raises
        ------
        BackboneError
            It says which weights do not belong to the transformer.
        """
        if not hasattr(pipe, "load_lora_into_transformer"):
            msg = f"{self.path}: {type(pipe).__name__} takes no LoRA adapters"
            raise BackboneError(msg)
        with self._explained():
            state = pipe.lora_state_dict(self.path.parent, weight_name=self.path.name, use_safetensors=True)
        if not state or not all("lora" in key or "lokr" in key for key in state):
            msg = f"{self.path}: is not a LoRA adapter in a format that diffusers reads for {type(pipe).__name__}"
            raise BackboneError(msg)
        others = sorted({key.split(".")[0] for key in state} - {"transformer"})
        if others:
            msg = f"{self.path}: the adapter changes {', '.join(others)}; allowed: transformer only"
            raise BackboneError(msg)
        changed = {re.split(r"\.(?:lora|lokr)", key.removeprefix("transformer."))[0] for key in state}
        if strange := sorted(changed - {name for name, _ in pipe.transformer.named_modules()}):
            msg = f"{self.path}: the transformer lacks {len(strange)} layers that it changes, such as {strange[0]}"
            raise BackboneError(msg)

    def fuse(self, pipe: Component) -> None:
        """Add the adapter to the weights of the pipeline's transformer.

        Raises
        ------
        BackboneError
            If the transformer cannot take it.
        """
        with self._explained():
            pipe.load_lora_weights(self.path.parent, weight_name=self.path.name, use_safetensors=True)
            pipe.transformer.fuse_lora()
            pipe.transformer.unload_lora()
        pipe.transformer.eval().requires_grad_(False)  # noqa: FBT003 - torch's own signature

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with quiet():
                yield
        except Exception as error:  # whatever diffusers and peft choose
            msg = f"{self.path}: cannot load the LoRA adapter ({in_short(error)})"
            raise BackboneError(msg) from error


def files_hash(folder: Path) -> str:
    """Return the SHA-256 over names and bytes of the files of a small component, such as a tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        content = path.read_bytes()
        digest.update(json.dumps([path.name, len(content)]).encode() + content)
    return digest.hexdigest()


def config_hash(folder: Path) -> str:
    """Return the SHA-256 of a component's ``config.json``, without names and versions of what wrote it."""
    config = read_json(folder / "config.json")
    kept = {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and key not in ("transformers_version", "torch_dtype", "dtype")
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _parts(family: Family, source: Source) -> dict[str, tuple[str, Any]]:
    """Return for every parameter of the pipeline's constructor ("model" or "part", its class) or ("value", a value)."""
    parts: dict[str, tuple[str, Any]] = {}
    pipeline = _class_of(family.library, family.pipeline)
    for name, parameter in inspect.signature(pipeline).parameters.items():
        entry = source.index.get(name)
        library, class_name = source.component(name)
        if name == "transformer":
            parts[name] = ("model", _class_of(family.library, family.transformer))
        elif class_name is not None and name not in family.unused:
            cls = _class_of(library, class_name) if library in (*_LIBRARIES, family.library) else None
            # classes that transformers does not export are known to the pipeline's own module
            cls = cls or (
                getattr(sys.modules[pipeline.__module__], class_name, None) if library in _LIBRARIES else None
            )
            if cls is None:
                raise _wrong_part(source, name, f"{library}.{class_name}")
            parts[name] = ("model" if issubclass(cls, torch.nn.Module) else "part", cls)
        elif entry is not None and not _names_a_part(entry):
            parts[name] = ("value", entry)
        elif parameter.default is not inspect.Parameter.empty:
            parts[name] = ("value", parameter.default)
        elif name in family.optional | family.unused:
            parts[name] = ("value", None)
        else:
            raise _wrong_part(source, name, "missing")
    return parts


def _names_a_part(entry: object) -> bool:
    """Whether an entry of the index is [library, class], or [null, null] for a part that is left out."""
    return isinstance(entry, list) and len(entry) == 2 and all(part is None or isinstance(part, str) for part in entry)


def _wrong_part(source: Source, name: str, found: str) -> BackboneError:
    allowed = f"a class of {' or '.join(_LIBRARIES)}"
    return BackboneError(f"{source.folder / 'model_index.json'}: {name} is {found}; allowed: {allowed}")


def _class_of(library: str | None, name: str) -> Component:
    """Import a class of a library, which takes seconds for a pipeline, and only when a backbone is loaded."""
    with quiet():
        return getattr(importlib.import_module(str(library)), name, None)


def _folder(source: Source, transformer: Path, name: str) -> Path:
    return transformer if name == "transformer" else source.folder / name


def _without_weights(cls: Component, folder: Path, dtype: torch.dtype) -> Component:
    """Build a model from its config alone, on the meta device."""
    read_json(folder / "config.json")
    try:
        with quiet(), init_empty_weights(include_buffers=True):
            if hasattr(cls, "from_config"):
                model = cls.from_config(cls.load_config(folder, local_files_only=True))
            else:
                config = cls.config_class.from_pretrained(folder, local_files_only=True)
                # T5Gemma's encoder alone: its class, diffusers', takes this part of the config when it loads weights
                model = cls(config.encoder if cls.__name__ == "T5GemmaEncoder" else config)
    except Exception as error:  # a config that does not fit raises whatever the class chooses
        msg = f"{folder}: cannot build the {cls.__name__} ({in_short(error)})"
        raise BackboneError(msg) from error
    with quiet():  # loading keeps the modules in float32 that should be so
        return model.to("meta", dtype).eval().requires_grad_(False)  # noqa: FBT003 - torch's own signature


def _load_part(cls: Component, folder: Path) -> Component:
    if not folder.is_dir():
        msg = f"{folder.parent}: has no folder {folder.name}, which its model_index.json names"
        raise BackboneError(msg)
    try:
        with quiet():
            return cls.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, ImportError) as error:
        msg = f"{folder}: cannot load the {cls.__name__} ({in_short(error)})"
        raise BackboneError(msg) from error


def _vae_dtype(folder: Path, dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`, unless the VAE's config says (as it does by default) that float16 overflows in it."""
    upcast = dtype == torch.float16 and read_json(folder / "config.json").get("force_upcast", True)
    return torch.float32 if upcast else dtype


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
        msg = f"{folder}: cannot load the {cls.__name__} ({in_short(error)})"
        raise BackboneError(msg) from error
    absent = sorted(str(key) for key in report["missing_keys"])
    if absent:
        msg = f"{folder}: the weights lack {len(absent)} tensors that {cls.__name__} has, such as {absent[0]}"
        raise BackboneError(msg)
    return model.eval().requires_grad_(False)  # noqa: FBT003 - torch's own signature


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and notices of diffusers and transformers from our users' terminals."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = diffusers_logging, transformers_logging
    # inside another `quiet` there is nothing to change, and a change of level costs as much as a small forward pass
    before = [(library, library.get_verbosity()) for library in libraries if library.get_verbosity() != logging.ERROR]
    barred = [library for library in libraries if library.is_progress_bar_enabled()]
    for library, _ in before:
        library.set_verbosity_error()
    for library in barred:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of their own imports
            warnings.filterwarnings("ignore", "Mismatch dtype", UserWarning)  # modules that are kept in float32
            yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)
        for library in barred:
            library.enable_progress_bar()
