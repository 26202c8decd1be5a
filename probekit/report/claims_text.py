"""The claims of a run in words: a table for the page, Markdown for people, plain facts for machines."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from probekit.diagnostics import marked
from probekit.report.claim import CLAIMS, LARGER, TRAINED, Claim
from probekit.report.claims import Claims
from probekit.report.contrasts import HALF
from probekit.report.effects import SEEDS
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
    more = f", and {cells.beside:,} of refits, altered features and baselines" * bool(cells.beside)
    text = f"{rest} exploratory: {cells.tried:,} test accuracies were computed on it{more}."
    if cells.best is None:
        return text
    best = cells.best
    return (
        f"{text} The highest of {best.tried:,} of trained backbones reads {percent(best.naive)} % ({cells.where});"
        f" choosing the highest is worth {percent(best.corrected)} % {interval(best.low, best.high)} on pairs that did"
        " not choose it."
    )


def _counts(rows: Sequence[Claim], n: int) -> str:
    """Say for how many of n backbones one quantity, each backbone with one row, is supported and so on."""
    told = []
    for verdict in ("supported", "contradicted", "undetermined"):
        names = [row.subject for row in rows if row.verdict == verdict]
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            told.append(f"{verdict} for {len(names)} of {n} ({shown})")
    return _of_kind(rows[0]) + ", ".join(told)


def _of_kind(row: Claim) -> str:
    """Name the kind of random weights that the quantity of a row has in brackets, as the start of a text."""
    kind = row.quantity.rpartition("(")[2].partition(")")[0]
    return f"{kind}: " if "(" in row.quantity else ""


def glance_table(rows: Sequence[Claim], subject: str) -> pd.DataFrame:
    """One row for each claim: the verdict for one backbone, what is left beyond random weights, and for how many it is.

    Parameters
    ----------
    rows
        Of one data set.
    subject
        Label of the backbone; claims about size have subjects of their own.
    """
    table = []
    for claim in CLAIMS:
        asked = [row for row in rows if row.claim == claim]
        mine = [row for row in asked if claim == LARGER or row.subject == subject]
        plain = [row for row in mine if claim == TRAINED or "random weights" not in row.quantity]
        beyond = [row for row in mine if row not in plain]
        if claim == LARGER:  # of a quantity the last row has most of the networks as a sample
            slopes = [row for row in asked if "slope" in row.quantity]
            plain, beyond = (
                list({row.quantity: row for row in some if row not in slopes}.values()) for some in (plain, beyond)
            )
            told = "; ".join(f"{row.quantity.removesuffix(' of the parameters')}: {row.verdict}" for row in slopes)
        else:
            quantities = list(dict.fromkeys(row.quantity for row in asked))[: None if claim == TRAINED else 1]
            n = len({row.subject for row in asked})
            told = "; ".join(_counts([row for row in asked if row.quantity == one], n) for one in quantities)
        found = {row.verdict for row in plain}
        table.append(
            {
                "mark": found.pop() if len(found) == 1 else "undetermined",
                "Claim": claim,
                "Of": plain[0].subject if plain else subject or NONE,
                "Verdict": _told(plain),
                "Beyond random weights": _told(beyond),
                "All backbones": told or NONE,
            }
        )
    return pd.DataFrame(table)


def _told(rows: Sequence[Claim]) -> str:
    lines = []
    for row in rows:
        lines.append(_of_kind(row) + marked(row.verdict, row.converged))
        if not math.isnan(row.estimate):
            lines.append(f"{points(row.estimate)} {interval(row.low, row.high, signed=True)}")
            lines.append(f"about {row.about}")
    return "\n".join(lines) or NONE


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
            "SE": _errors(row),
            "Adjusted p": NONE if math.isnan(row.p_adjusted) else f"{row.p_adjusted:.2g}",
            "Against": row.against,
            "About": row.about or NONE,
            "Pairs": f"{row.n_pairs:,}" if row.n_pairs else NONE,
            "Pairs needed": _needed(row),
            "Because": row.reason or NONE,
        }
        for row in rows
    )


def _errors(row: Claim) -> str:
    """Say the standard errors in points, by what is a sample."""
    parts = {"pairs": row.se_pairs, "training": row.se_train, "networks": row.se_networks or float("nan")}
    return ", ".join(f"{100 * se:.1f} {name}" for name, se in parts.items() if not math.isnan(se)) or NONE


def _needed(row: Claim) -> str:
    if math.isnan(row.pairs_needed):
        return NONE
    if math.isinf(row.pairs_needed):
        if row.random_seeds is not None and row.random_seeds < SEEDS:
            return "more seeds"
        few = ["networks"] * bool(row.se_networks > 0) + ["training pairs"] * bool(row.se_train > 0)
        return f"more {' and '.join(few)}" if few and row.verdict == "undetermined" else NONE
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
        " were the estimate and the question asked of this backbone alone, without correction; more networks, more"
        " training pairs: no number of test pairs would, as networks, or heads"
        " with their training pairs, or both together differ too much; more seeds: of random weights. SE: standard"
        " errors in points over test pairs, training pairs and networks, as far as they are a sample. About the fitted"
        " heads: how these would differ with other training pairs is not in the interval; about other training pairs:"
        " it is, by refits on halves of the training groups. Against random weights nothing is concluded from"
        f" fewer than {SEEDS} seeds."
    )


def markdown(claims: Claims) -> str:
    """Everything as one Markdown document."""
    lines = [f"# Claims: {claims.run.resolve().name}", "", primary_sentence(claims), ""]
    for dataset, cells in claims.cells.items():
        rows = claims.of(dataset)
        lines += [f"## {dataset}", ""]
        lines += [exploratory_sentence(cells, primary=dataset == claims.endpoint.setting.dataset), ""]
        for table in (glance_table(rows, claims.subject(dataset)), claims_table(rows)):
            shown = table.drop(columns="mark")
            lines += [_row(shown.columns), _row("---" for _ in shown.columns)]
            lines += [*(_row(row) for row in shown.to_numpy(object)), ""]
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
            dataset: {"tried": cells.tried, "beside": cells.beside, "highest": cells.where or None}
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
