"""One self-contained page of a run: sentences, figures and tables in, HTML out. No script, no network request."""

import itertools
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from probekit.errors import ResultsError
from probekit.report import beside, captions, claims_text, combinations, depth, tables, transfer
from probekit.report.claims import Claims, make_claims, shown_settings
from probekit.report.controls import altered_table, control_figures, control_rows_of
from probekit.report.effects import (
    Verdicts,
    control_margins,
    import_effects,
    joining_effects,
    size_effects,
    training_effects,
)
from probekit.report.figures import depth_figure, kinds_figure
from probekit.report.level_figures import levels_figure, levels_points
from probekit.report.points import depth_points, kinds_points, scaling_points, training_points
from probekit.report.select import (
    ALL_LAYERS,
    CHOSEN,
    Setting,
    narrow,
    probed,
    reported_rows,
    trained_models,
    training_series,
    unsliced,
)
from probekit.report.size_figures import scaling_figure, training_figure
from probekit.report.style import save
from probekit.results import PLAN, check_finished, load_config, load_families, load_results, load_trajectories
from probekit.stats import PROTOCOLS

_SVG_ID = re.compile(r'(\bid="|xlink:href="#|url\(#)')
_SHORT = 80


def build_report(run: str | Path, out: str | Path) -> Path:
    """Draw the figures of a run and write its page.

    Parameters
    ----------
    run
        Folder that ``probekit sweep`` wrote.
    out
        The page. Figures go to ``<stem>_figures`` beside it: each as SVG, PNG and the CSV of its points.

    Returns
    -------
    pathlib.Path
        The page.
    """
    run, out = Path(run), Path(out)
    if out.is_dir():
        msg = f"{out}: is a folder; name the page to write, such as {out / 'report.html'}"
        raise ResultsError(msg)
    check_finished(run)
    everything = load_results(run)
    frame = unsliced(probed(everything))
    if frame.empty:
        msg = f"{run}: holds no head on features, only scores of other models; run probekit sweep into it"
        raise ResultsError(msg)
    config = load_config(run)
    folder = out.with_name(f"{out.stem}_figures")
    claims = make_claims(run)
    found = shown_settings(frame, claims.endpoint)
    sweep = config.get("sweep")
    options = sweep if isinstance(sweep, dict) else {}
    level = float(options.get("level", 0.95))
    sections = [
        _section(run, everything, setting, folder, options, "" if len(found) == 1 else f"-{i}", claims)
        | {
            "scorers": tables.scorers_table(everything, setting),
            "expected": tables.expected_text(narrow(frame, setting)),
            "left_out": config.get("left_out", {}).get(setting.dataset, ""),
        }
        for i, setting in enumerate(found, start=1)
    ]
    stores = config.get("stores")
    common, differing = store_tables(stores if isinstance(stores, list) else [])
    environment = Environment(
        loader=PackageLoader("probekit.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        title=_title(run),
        level=level,
        sections=sections,
        others=tables.other_settings_table(frame),
        transfer=transfer.transfer_table(frame, found),
        definitions=claims_text.definitions(level),
        versions=", ".join(sorted(frame["probekit_version"].unique())),
        n_records=frame["record_id"].nunique(),
        fingerprints=_fingerprints(frame),
        store_common=common,
        store_table=differing,
        config=json.dumps(
            {key: value for key, value in config.items() if key not in ("stores", PLAN)}, indent=2, ensure_ascii=False
        )
        if config
        else "",
        style=Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8")),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _section(
    run: Path,
    rows: pd.DataFrame,
    setting: Setting,
    folder: Path,
    options: dict[str, Any],
    suffix: str,
    claims: Claims,
) -> dict[str, Any]:
    """Everything the page says about one data set; `rows` are all of the run, `options` those of the sweep."""
    whole = unsliced(probed(rows))
    frame = narrow(whole, setting)
    level = float(options.get("level", 0.95))
    resamples = int(options.get("resamples", 2000))
    verdicts = Verdicts(run, setting.protocol, dataset=setting.dataset, level=level, resamples=resamples)
    margins, joins = control_margins(frame, verdicts), joining_effects(frame, verdicts)
    sizes, lengths = size_effects(frame, verdicts), training_effects(frame, verdicts)
    others = import_effects(frame, verdicts)
    models = trained_models(reported_rows(frame))
    largest = models[-1].backbones[-1] if models else ""
    imported = set(frame.loc[frame["imported"], "backbone"])
    families, paths = (
        depth.of_setting(load(run), setting, imported=imported) for load in (load_families, load_trajectories)
    )
    judged, primary = claims.of(setting.dataset), setting == claims.endpoint.setting
    figures = []

    def add(
        name: str, title: str, draw: Callable[..., Figure], data: Callable[..., pd.DataFrame], caption: str
    ) -> None:
        stem = folder / f"{name}{suffix}"
        svg = save(draw(frame, setting=setting, level=level), stem, data(frame, setting=setting))
        caption = " ".join([caption, *tables.unresolved(frame, brief=True)])
        links = {kind.upper(): quote(f"{folder.name}/{stem.name}.{kind}") for kind in ("svg", "png", "csv")}
        figures.append({"title": title, "svg": inline_svg(svg, stem.name, title), "caption": caption, "links": links})

    if frame["relative_depth"].notna().any() and models:
        add(
            "depth",
            "Accuracy against depth",
            partial(depth_figure, families=families),
            partial(depth_points, families=families),
            captions.depth_caption(frame, setting, families),
        )
    if models and levels_points(whole, setting=setting)["level"].nunique() > 1:
        add(
            "levels",
            "Accuracy against depth at every noise level and pooling",
            lambda _, **how: levels_figure(whole, **how),
            lambda _, **how: levels_points(whole, **how),
            captions.levels_caption(setting),
        )
    if models:
        if scaling_points(frame, setting=setting)["model"].nunique() > 1:
            add(
                "scaling",
                "Accuracy against size",
                scaling_figure,
                scaling_points,
                captions.scaling_caption(frame, sizes),
            )
        if training_series(reported_rows(frame)):
            add(
                "training",
                "Accuracy against training",
                training_figure,
                training_points,
                captions.training_caption(frame, lengths),
            )
        if len(kinds_points(frame, setting=setting)["source"].unique()) > 1:
            add("kinds", "Kinds of pairs", kinds_figure, kinds_points, captions.kinds_caption(frame, setting))
    altered = control_rows_of(run, setting, reported_rows(frame), datasets=set(whole["dataset"]))
    for name, title, figure, points, caption in control_figures(altered, level=level):
        add(name, title, lambda *_, drawn=figure, **__: drawn, lambda *_, told=points, **__: told, caption)
    refitted = bool((altered["altered"] == "half").any())
    everything = trained_models(frame, every_length=True)
    effects = {
        layers: [
            *(margin.effect for margin in margins if margin.layers == layers),
            *sizes.get(layers, []),
            *lengths.get(layers, []),
            *others.get(layers, []),
        ]
        for layers in (CHOSEN, ALL_LAYERS)
    }
    baselines, gains = beside.baselines_table(run, rows, setting), beside.beyond_rows(run, rows, setting)
    return {
        "setting": setting,
        "trained_on": ", ".join(frame["trained_on"].unique()),
        "found": [
            *[claims_text.primary_sentence(claims)] * primary,
            claims_text.exploratory_sentence(claims.cells[setting.dataset], primary=primary),
            *captions.found(frame, margins, joins, sizes, lengths, others),
            *beside.found_beside(rows, setting, baselines, gains),
        ],
        "claims": claims_text.glance_table(judged, claims.subject(setting.dataset)),
        "claims_table": claims_text.claims_table(judged),
        "layers": depth.layers_table(families, level),
        "paths": depth.paths_table(paths, largest),
        "baselines": baselines,
        "slices": beside.slices_table(rows, setting),
        "beyond": beside.beyond_table(gains),
        "headline": tables.headline_table(frame, margins, joins),
        "effects": [(layers, tables.effects_table(some)) for layers, some in effects.items() if some],
        "figures": figures,
        "backbones": [
            (name, tables.backbone_table(whole, name, setting)) for model in everything for name in model.backbones
        ],
        "controls": tables.controls_table(frame),
        "altered": altered_table(altered),
        "sources": transfer.sources_table(rows, setting, largest),
        "largest": largest,
        "combinations": combinations.combinations_table(whole, setting, verdicts),
        "blocks": combinations.blocks_table(run, setting),
        "warnings": tables.warnings_list(
            narrow(whole, setting, any_head=True, any_level=True),
            [*itertools.chain(*effects.values()), *joins.values()],
            {head["name"]: head.get("strengths", []) for head in options.get("heads", [])},
        ),
        "counts": tables.counts_table(frame),
        "protocol": PROTOCOLS[setting.protocol].rule,
        "limits": captions.limits(frame, whole, banded=len(families) > 0, refitted=refitted),
    }


def inline_svg(svg: str, name: str, title: str) -> Markup:
    """Return the `<svg>` element alone, as wide as the page allows, with ids that no other figure of the page uses."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = _SVG_ID.sub(rf"\g<1>{name}-", svg)
    return Markup('<svg role="img" aria-label="{}"').format(title) + Markup(svg.removeprefix("<svg"))


def store_tables(stores: list[Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Facts that all stores share, and one row for each store with those that differ."""
    flat = pd.DataFrame([_flat(store) for store in stores if isinstance(store, dict)])
    if flat.empty:
        return pd.DataFrame(), pd.DataFrame()
    flat = flat.fillna(tables.NONE)
    same = [name for name in flat.columns if flat[name].nunique() == 1]
    common = pd.DataFrame({"Setting": same, "Value": [flat[name].iloc[0] for name in same]})
    differing = flat.drop(columns=same) if len(flat) > 1 else pd.DataFrame()
    return common, differing


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    facts: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            facts |= _flat(item, f"{prefix}{key}.")
        elif key == "path":
            facts["store"] = Path(str(item)).name  # a page that is passed on names no folders of this machine
        elif item != "":
            number = f"{item:.4g}" if isinstance(item, float) else json.dumps(item, ensure_ascii=False)
            text = item if isinstance(item, str) else number
            text = f"{text[:12]}\N{HORIZONTAL ELLIPSIS}" if re.fullmatch(r"[0-9a-f]{32,}", text) else text
            facts[f"{prefix}{key}"] = text if len(text) <= _SHORT else f"{text[:_SHORT]}\N{HORIZONTAL ELLIPSIS}"
    return facts


def _title(run: Path) -> str:
    """Name the folder of the run alone, since a page is passed on; with its parent where that says nothing."""
    run = run.resolve()
    return f"{run.parent.name}/{run.name}" if run.name == "run" else run.name


def _fingerprints(frame: pd.DataFrame) -> pd.DataFrame:
    stores = frame.drop_duplicates(["backbone", "control", "dataset", "store_fingerprint"])
    columns = {
        "backbone": "Backbone",
        "control": "Condition",
        "dataset": "Data set",
        "width": "Width",
        "n_blocks": "Blocks",
        "backbone_parameters": "Parameters",
        "training_images": "Training images",
        "store_fingerprint": "Store fingerprint",
        "data_digest": "Data digest",
    }
    table = stores[list(columns)].rename(columns=columns).astype(object)
    table["Condition"] = table["Condition"].mask(stores["imported"], "imported")
    for name in ("Parameters", "Training images"):
        table[name] = [tables.NONE if pd.isna(value) else f"{int(value):,}" for value in table[name]]
    for name in ("Store fingerprint", "Data digest"):
        table[name] = table[name].str.slice(0, 16)
    return table
