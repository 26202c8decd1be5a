"""What is wrong with a preference file, said before any model runs.

Errors are what a dump would stop at; everything else that a reader of the numbers should know is a warning.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from probekit._types import Progress
from probekit.config import Ties
from probekit.preferences import lint_checks as checks
from probekit.preferences.groups import PLACEHOLDER_PROMPTS, SPLITS
from probekit.preferences.lint_text import counted, fact_lines, listed, percent
from probekit.preferences.near_duplicates import NEAR_BITS
from probekit.preferences.picture_checks import PROBLEMS, across_splits, bad_files, shared_pictures
from probekit.preferences.pictures import look_at
from probekit.preferences.preference_set import PreferenceSet

LARGE_GROUP = 0.1  # a group with a larger share of the pairs makes the shares of the splits a matter of luck
UNBALANCED = 4.0  # standard errors from one half: once in 16,000 files if sides are drawn
_NEAR = f"at most {NEAR_BITS} of 64 bits differ"


@dataclass(frozen=True)
class LintReport:
    """What was found in a preference file.

    Attributes
    ----------
    found
        Plain facts, by what was looked at.
    errors, warnings
        One line each.
    """

    found: dict[str, Any]
    errors: tuple[str, ...]
    warnings: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Everything as plain values."""
        return self.found | {"errors": list(self.errors), "warnings": list(self.warnings)}

    def lines(self) -> list[tuple[str, str]]:
        """Headings and texts for a person; errors and warnings last."""
        told = [*fact_lines(self.found)]
        told += [("error", text) for text in self.errors] + [("warning", text) for text in self.warnings]
        return [*told, ("result", f"{len(self.errors)} errors, {len(self.warnings)} warnings")]


def lint(
    prefs: PreferenceSet,
    *,
    images: bool = False,
    against: PreferenceSet | None = None,
    ties: Ties = "soft",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> LintReport:
    """Look for what is wrong with a preference set.

    Parameters
    ----------
    prefs
        The set.
    images
        Open every image file as well: which are missing, empty or unreadable, which are in two splits under two names
        (equal bytes, or near duplicates by a perceptual hash). Without it no image file is touched.
    against
        Another set, such as the test set of a benchmark, whose prompts and images this one should not share.
    ties
        How labels count in the shares of sides and in the prediction by generators: see `checks.targets`.
    jobs
        Processes that open images.
    progress
        Called as ``progress(done, total, "images")``.
    """
    found: dict[str, Any] = {"file": str(prefs.path), "ties": ties}
    found |= checks.sizes(prefs) | {
        "repeats": checks.repeats(prefs),
        "sides": checks.sides(prefs, ties),
        "generators": checks.generators(prefs, ties),
    }
    if against is not None:
        found["against"] = checks.against(prefs, against)
    if images:
        found |= _pictures(prefs, against, found, jobs=jobs, progress=progress)
    return LintReport(found, tuple(_errors(found)), tuple(_warnings(found)))


def _pictures(
    prefs: PreferenceSet,
    against: PreferenceSet | None,
    found: dict[str, Any],
    *,
    jobs: int | None,
    progress: Progress | None,
) -> dict[str, Any]:
    ours = prefs.items["path"].unique().tolist()
    theirs = [] if against is None else against.items["path"].unique().tolist()
    looks = look_at(list(dict.fromkeys(ours + theirs)), jobs=jobs, progress=progress)
    here = looks.loc[ours]
    told: dict[str, Any] = {"files": bad_files(prefs, here), "across_splits": across_splits(prefs, here)}
    if against is not None:
        told["against"] = found["against"] | shared_pictures(prefs, here, against, looks.loc[theirs])
    return told


def _errors(found: dict[str, Any]) -> Iterator[str]:
    for problem, text in PROBLEMS.items():
        at = found.get("files", {}).get(problem, {"files": 0})
        if at["files"]:
            yield f"{at['files']:,} image files {text}, which costs {at['pairs']:,} pairs: {listed(at)}"


def _warnings(found: dict[str, Any]) -> Iterator[str]:
    for what, count in found["notes"].items():
        yield f"{count:,} {what}"
    for reason, count in found["left_out"].items():
        yield f"{count:,} pairs are left out: {reason.replace('_', ' ')}"
    for both, shared in found["overlap"].items():
        yield (
            f"{both} share {shared['prompts']:,} prompts and {shared['images']:,} images in the file, in "
            f"{shared['groups']:,} groups"
        )
    absent = [name for name in SPLITS if not found["splits"][name]["pairs"]]
    if absent:
        yield f"no {' and no '.join(absent)} pairs: a sweep needs train, validation and test"
    groups = found["groups"]
    if groups["largest"] > LARGE_GROUP * found["pairs"]:
        yield f"the largest group has {percent(groups['largest'] / found['pairs'])} of the pairs and stays in one split"
    if found["placeholders"]["images"]:
        at = found["placeholders"]
        yield (
            f"{at['images']:,} images stand under more than {PLACEHOLDER_PROMPTS} prompts, in {at['pairs']:,} pairs, "
            f"and do not join groups: {listed(at)}"
        )
    repeats = found["repeats"]
    if repeats["duplicates"]:
        yield f"{repeats['duplicates']:,} judgements repeat another one of the same prompt and images"
    if repeats["contradicting_pairs"]:
        yield (
            f"{repeats['contradicting_pairs']:,} pairs were judged both ways "
            f"({repeats['contradicting_judgements']:,} judgements)"
        )
    for kind, where in (("listed", "listed first in the file"), ("hashed", "that a hash puts first")):
        at = found["sides"][kind]
        share, error = at["share"], at["standard_error"]
        if share is not None and error is not None and abs(share - 0.5) > UNBALANCED * error:
            yield f"the image {where} wins {percent(share)} of the pairs: its place says something about the winner"
    if "files" in found and found["files"]["one_colour"]["files"]:
        at = found["files"]["one_colour"]
        yield f"{at['files']:,} images are one colour, in {at['pairs']:,} pairs: {listed(at)}"
    kinds = {"equal_bytes": "the same bytes under another name", "near_duplicates": f"a near duplicate ({_NEAR})"}
    for both, shared in found.get("across_splits", {}).items():
        for kind, at in shared.items():
            first = both.partition(" ")[0]
            yield (
                f"{both}: {at['images']:,} {first} images have {kinds[kind]} on the other side, "
                f"{counted(at['pairs'])}: {listed(at)}"
            )
    if "against" in found:
        yield from _shared_with(found["against"])


def _shared_with(at: dict[str, Any]) -> Iterator[str]:
    for what in ("prompt", "image"):
        if at[f"{what}s"]:
            many = f"{at[f'{what}s']:,} {what}s{' by name' * (what == 'image')}"
            yield f"{at['file']}: shares {many}, {counted(at[f'pairs_by_{what}'])} here"
    for kind, words in (("equal_bytes", "the bytes"), ("near_duplicates", f"near duplicates ({_NEAR})")):
        if kind in at:
            found = at[kind]
            many = f"{words} of {found['images']:,} images here, {counted(found['pairs'])}"
            yield f"{at['file']}: has {many}: {listed(found)}"
