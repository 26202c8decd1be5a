"""The words of a lint report."""

from collections.abc import Iterator
from typing import Any


def fact_lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Headings and texts of plain facts (see `probekit.preferences.lint.LintReport`)."""
    yield "file", found["file"]
    left = sum(found["left_out"].values())
    yield "pairs", f"{found['pairs']:,}" + (f", {left:,} more left out" if left else "")
    ties = found["true_ties"]
    yield "true ties", f"{ties:,} ({percent(ties / found['pairs'])}); counted: {found['ties']}"
    yield (
        "rows",
        f"{found['rows']:,} of a prompt and an image; {found['prompts']:,} prompts, {found['images']:,} images",
    )
    yield "votes", f"{found['n_votes']:,} pairs say how many votes they had, {found['strength']:,} their strength"
    made = "of a split file" if found["split_file"] else "of the file" if found["own_splits"] else "by hash"
    for name, at in found["splits"].items():
        counts = ", ".join(f"{at[what]:,} {what}" for what in ("pairs", "prompts", "images", "groups"))
        yield name, f"{counts} ({made})"
    if found["split_file"]:
        yield "split file", f"sha256 {found['split_file']}"
    groups = found["groups"]
    yield (
        "groups",
        f"{groups['count']:,}; pairs in one: median {groups['median']:,}, 90 % have at most {groups['90 %']:,}, "
        f"99 % {groups['99 %']:,}, largest {groups['largest']:,} ({percent(groups['largest'] / found['pairs'])})",
    )
    sides = found["sides"]
    yield (
        "first side wins",
        f"{_share(sides['listed'])} as listed in the file, {_share(sides['hashed'])} after the hash",
    )
    yield from _generators(found["generators"])
    if "files" in found:
        counts = ", ".join(f"{at['files']:,} {problem.replace('_', ' ')}" for problem, at in found["files"].items())
        yield "image files", counts


def _generators(at: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if not at["count"]:
        yield "generators", "none are named"
        return
    yield "generators", f"{at['count']:,} in {at['pairs']:,} pairs, {at['same']:,} of these of one generator"
    common = (f"{name} {percent(one['wins'])} of {one['pairs']:,}" for name, one in at["most_common"].items())
    yield "most common", "wins of " + "; ".join(common)
    alone = "cannot be judged (train and test pairs of two generators are needed)"
    if at["accuracy"] is not None:
        alone = f"predict {percent(at['accuracy'])} of {at['test_pairs']:,} test pairs of two generators"
        alone += f"; {at['unseen']:,} of these show one unseen in training and count half" if at["unseen"] else ""
    yield "generators alone", alone


def percent(share: float | None) -> str:
    """Write a share as a percentage."""
    return "none" if share is None else f"{100 * share:.1f} %"


def counted(pairs: dict[str, int]) -> str:
    """Write numbers of pairs by split."""
    return " and ".join(f"{count:,} {split}" for split, count in pairs.items()) + " pairs"


def listed(at: dict[str, Any]) -> str:
    """Write the first names, each one or two that belong together, and that there are more."""
    shown = [name if isinstance(name, str) else " = ".join(name) for name in at["names"]]
    more = at["files"] if "files" in at else at["images"]
    return ", ".join(shown) + (", ..." if more > len(shown) else "")


def _share(at: dict[str, Any]) -> str:
    error = at["standard_error"]
    return percent(at["share"]) + ("" if error is None else f" (standard error {100 * error:.1f})")
