"""The claims of a run in words: a table for the page, Markdown for people, plain facts for machines."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from probekit.diagnostics import marked
from probekit.report.claims import Claims
from probekit.report.contrasts import CLAIMS, HALF, LARGER, Claim
from probekit.report.primary import Cells
from probekit.report.select import CHOSEN
from probekit.report.tables import NONE, interval, percent, points

_SHOWN = 10**7  # more pairs than any file of preferences holds


def primary_sentence(claims: Claims) -> str:
    """Say what the primary endpoint is, how it was named, and what came out."""
    of, setting = claims.endpoint, claims.endpoint.setting
    how = "as the configuration names it" if of.named else "by default, as the configuration names none"
    where = f"on {setting.dataset}, head {setting.head}, noise level {setting.sigma}, pooling {setting.pooling}"
    if of.model is None or claims.primary is None:
        return f"The primary endpoint ({how}): {of.layers} of a trained backbone {where}. The run holds no such head."
    found = claims.primary
    many = f", mean of {len(of.model.backbones)} training seeds" * (len(of.model.backbones) > 1)
    which = "the layer chosen on validation" if of.layers == CHOSEN else of.layers
    share = marked(f"{percent(found.estimate)} % {interval(found.low, found.high)}", found.converged)
    return (
        f"Primary endpoint ({how}): {of.model.label}, {which}, {where}{many}: {share} of {found.n_pairs:,} test pairs"
        " are ordered as their labels are."
    )


def exploratory_sentence(cells: Cells, *, primary: bool) -> str:
    """Say how many test accuracies there are, and what the highest of them is worth."""
    rest = "All other numbers on this data set are" if primary else "All numbers on this data set are"
    text = f"{rest} exploratory: {cells.tried:,} test accuracies were computed on it."
    if cells.best is None:
        return text
    best = cells.best
    return (
        f"{text} The highest of {best.tried:,} of trained backbones reads {percent(best.naive)} % ({cells.where});"
        f" choosing the highest is worth {percent(best.corrected)} % {interval(best.low, best.high)} on pairs that did"
        " not choose it."
    )


def summary(rows: Sequence[Claim]) -> list[str]:
    """One sentence for each claim: how its rows came out."""
    found = []
    for claim in CLAIMS:
        mine = [row for row in rows if row.claim == claim]
        if claim == LARGER:
            told = [f"{row.quantity}{f', {row.about}' if row.about else ''}: {row.verdict}" for row in mine]
        else:
            told = [f"{name}{_counts(some)}" for name, some in _by_question(mine)]
        found.append(f"{claim}: {'; '.join(told)}." if told else f"{claim}: undetermined, as there is no backbone.")
    return found


def _by_question(rows: Sequence[Claim]) -> Iterable[tuple[str, list[Claim]]]:
    """Rows of each quantity, the first without a name."""
    quantities = list(dict.fromkeys(row.quantity for row in rows))
    for quantity in quantities:
        _, _, beyond = quantity.partition(", ")
        yield f"{beyond}: " if beyond else "", [row for row in rows if row.quantity == quantity]


def _counts(rows: Sequence[Claim]) -> str:
    told = []
    for verdict in ("supported", "contradicted", "undetermined"):
        names = [row.subject for row in rows if row.verdict == verdict]
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            told.append(f"{verdict} for {len(names)} of {len(rows)} ({shown})")
    return ", ".join(told)


def claims_table(rows: Iterable[Claim]) -> pd.DataFrame:
    """Rows of the table in words; ``mark`` tells verdicts apart."""
    return pd.DataFrame(
        {
            "mark": row.verdict,
            "Claim": row.claim,
            "Of": row.subject,
            "Verdict": marked(row.verdict, row.converged, before="\n"),
            "What is estimated": row.quantity,
            "Estimate": NONE if math.isnan(row.estimate) else points(row.estimate),
            "Interval": interval(row.low, row.high, signed=True),
            "Adjusted p": NONE if math.isnan(row.p_adjusted) else f"{row.p_adjusted:.2g}",
            "Against": row.against,
            "About": row.about or NONE,
            "Pairs": f"{row.n_pairs:,}" if row.n_pairs else NONE,
            "Pairs needed": _needed(row),
            "Because": row.reason or NONE,
        }
        for row in rows
    )


def _needed(row: Claim) -> str:
    if math.isnan(row.pairs_needed):
        return NONE
    if math.isinf(row.pairs_needed):
        return NONE if row.verdict != "undetermined" else "more networks"
    return f"{row.pairs_needed:,.0f}" if row.pairs_needed < _SHOWN else f"over {_SHOWN:,}"


def definitions(level: float) -> str:
    """Say how to read the table."""
    return (
        f"Percentage points; {100 * level:g} % intervals over groups of test pairs, and over networks where a side has"
        " several. Supported: the interval lies above zero, also after Holm's correction for the backbones that the"
        " question is asked of; contradicted: below. Of a part of the depth, and of sets of layers, the one that is"
        " best on validation is compared; a claim about layers also needs every layer that may be the best (plateau"
        f" set) on its side. Second half: relative depth from {HALF:g} on. About: what is a sample beside the pairs; a"
        " finding about these checkpoints says nothing about other trainings, and a slope for new backbones rests on"
        " as few values as there are sizes. Pairs needed: test pairs that would decide in 80 % of samples if the truth"
        " were the estimate; more networks: no number of pairs would, as the networks differ too much. How heads would"
        " differ with other training pairs is in no interval."
    )


def markdown(claims: Claims) -> str:
    """Everything as one Markdown document."""
    lines = [f"# Claims: {claims.run.resolve().name}", "", primary_sentence(claims), ""]
    for dataset, cells in claims.cells.items():
        rows = claims.of(dataset)
        lines += [f"## {dataset}", ""]
        lines += [exploratory_sentence(cells, primary=dataset == claims.endpoint.setting.dataset), ""]
        lines += [*(f"- {sentence}" for sentence in summary(rows)), ""]
        table = claims_table(rows).drop(columns="mark")
        lines += [_row(table.columns), _row("---" for _ in table.columns)]
        lines += [_row(row) for row in table.to_numpy(object)]
        lines += [""]
    return "\n".join([*lines, definitions(claims.level)])


def _row(cells: Iterable[Any]) -> str:
    escaped = (str(cell).replace("|", "\\|").replace("\n", ", ") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def facts(claims: Claims) -> dict[str, Any]:
    """Everything as plain values; what is not known is null, and so is a number of pairs that does not exist."""
    endpoint, found = claims.endpoint, claims.primary
    return {
        "run": str(claims.run),
        "level": claims.level,
        "primary": {
            "named": endpoint.named,
            **asdict(endpoint.setting),
            "backbones": list(endpoint.model.backbones) if endpoint.model else [],
            "layers": endpoint.layers,
            "accuracy": found.estimate if found else None,
            "low": found.low if found else None,
            "high": found.high if found else None,
            "n_pairs": found.n_pairs if found else 0,
        },
        "exploratory": {
            dataset: {"tried": cells.tried, "highest": cells.where or None}
            | {
                name: getattr(cells.best, name) if cells.best else None
                for name in ("naive", "corrected", "low", "high")
            }
            for dataset, cells in claims.cells.items()
        },
        "claims": [{key: _plain(value) for key, value in asdict(row).items()} for row in claims.rows],
    }


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
