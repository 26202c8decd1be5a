"""Settings held against settings: where they differ, and how that is said."""

from collections.abc import Iterator
from itertools import islice

from probekit.store import format as fmt

_SHOWN = 5  # differences that are named with both values


def differing(stored: object, asked: object, path: str = "") -> Iterator[tuple[str, object, object]]:
    """Yield (dotted path, stored value, asked value) wherever two JSON values differ, in key order."""
    if isinstance(stored, list) and isinstance(asked, list):
        stored, asked = ({f"{i:03d}": v for i, v in enumerate(values)} for values in (stored, asked))
    if isinstance(stored, dict) and isinstance(asked, dict):
        for key in sorted(stored.keys() | asked.keys()):
            yield from differing(stored.get(key), asked.get(key), f"{path}.{key}" if path else key)
    elif stored != asked or type(stored) is not type(asked):
        yield path, stored, asked


def refusal(stored: object, asked: object, *, of: str) -> str | None:
    """Name all settings that differ, the first ones with both values; None if none do.

    Parameters
    ----------
    stored, asked
        JSON values.
    of
        What the stored ones are of, such as ``store``.
    """
    found = differing(stored, asked)
    said = [
        f"{key} is {short(old)} in this {of}, {short(new)} was asked for" for key, old, new in islice(found, _SHOWN)
    ]
    rest = list(dict.fromkeys(key.partition(".")[0] for key, _, _ in found))
    if rest:
        said.append(f"more differs in {', '.join(rest)}")
    return "; ".join(said) or None


def short(value: object) -> str:
    """Write a value in at most 80 characters."""
    text = "absent" if value is None else fmt.canonical_json(value)
    return text if len(text) <= 80 else text[:77] + "..."
