"""Models that refuse unknown keys, the one line that says what is wrong, and strict YAML."""

from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from probekit._types import canonical_sigma
from probekit.errors import ConfigError

Sigma = Annotated[str, BeforeValidator(lambda value: canonical_sigma(str(value)))]


class Strict(BaseModel):
    """A model that refuses unknown keys and names the allowed ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: object) -> object:
        if isinstance(data, dict):
            unknown = sorted(str(key) for key in data if key not in cls.model_fields)
            if unknown:
                message = f"unknown key {unknown[0]!r}; allowed: {', '.join(cls.model_fields)}"
                raise ValueError(message)
        return data

    @classmethod
    def checked(cls, data: dict[str, Any], *, source: str) -> Self:
        """Validate plain data; the error is one line that names the source, the key, the value and what is allowed.

        Raises
        ------
        ConfigError
            If a key is unknown or a value has the wrong type or range.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_one_line(error, source=source)) from None


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping strictly.

    Raises
    ------
    ConfigError
        If the file is missing, is no YAML mapping, has aliases or duplicate keys, or is nested too deeply.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        message = f"{path}: {error.strerror or error}"
        raise ConfigError(message) from None
    except RecursionError:
        message = f"{path}: nested too deeply"
        raise ConfigError(message) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a number or date that cannot be
        message = f"{path}: {' '.join(str(error).split())}"
        raise ConfigError(message) from None
    if not isinstance(data, dict):
        message = f"{path}: must hold 'key: value' lines, not {type(data).__name__}"
        raise ConfigError(message)
    return data


class _StrictLoader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", mark)
        return super().compose_node(parent, index)

    # the signature is PyYAML's
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, times in keys.items():
            if times > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_NEEDED = {
    "too_short": "at least {min_length} entry",
    "string_too_short": "text",
    "string_pattern_mismatch": "letters, digits and . _ -",
    "literal_error": "{expected}",
    "union_tag_invalid": "{expected_tags}",
    "greater_than_equal": "{ge:g} or more",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "{le:g} or less",
    "less_than": "less than {lt:g}",
    "finite_number": "a finite number",
    "path_type": "a path",
    "list_type": "a list",
    "string_type": "text",
    "model_type": "settings such as {{key: value}}",
    "model_attributes_type": "settings such as {{key: value}}",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}
"""What is allowed where a value is not, by pydantic's name of the mistake."""


def _one_line(error: ValidationError, *, source: str) -> str:
    errors = error.errors(include_url=False)
    # The alternatives of one union each report the same value: they are one mistake, and all that is allowed is said;
    # one that was wrong further inside is what was meant.
    about = [one for one in errors if _keys(one)[: len(_keys(errors[0]))] == _keys(errors[0])]
    first = max(about, key=lambda one: len(_keys(one)))
    same = [one for one in about if one["input"] is first["input"]]
    keys, kind = _keys(first), first["type"]
    if kind == "value_error":
        text = str(first["ctx"]["error"])
    elif kind in ("missing", "union_tag_not_found"):
        keys, text = keys + ["kind"] * (kind == "union_tag_not_found"), "is required"
    else:
        tagged = kind == "union_tag_invalid"
        keys, value = keys + ["kind"] * tagged, first["ctx"]["tag"] if tagged else first["input"]
        allowed = " or ".join(
            dict.fromkeys(_NEEDED.get(one["type"], one["msg"]).format(**one.get("ctx", {})) for one in same)
        )
        text = f"is {value!r}; allowed: {allowed}"
    more = len(errors) - len(about)
    return f"{source}: {'.'.join(keys) + ': ' if keys else ''}{text}" + (f" (and {more} more)" if more else "")


def _keys(error: ErrorDetails) -> list[str]:
    """Where a mistake is in the YAML file, without the names of types that a value might have had."""
    return [str(part) for part in error["loc"] if "[" not in str(part) and part not in ("linear", "mlp")]
