"""Tables of the page, as frames of text: pure functions of the tidy frame and of the effects computed from margins."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from probekit._types import RESOLVED_RATIO
from probekit.diagnostics import UNCONVERGED, counted, fit_warnings, marked
from probekit.report.effects import Effect, Margin
from probekit.report.select import (
    ALL_LAYERS,
    CHOSEN,
    RANDOM,
    Model,
    Setting,
    all_layers,
    control_kinds,
    control_rows,
    layer_rows,
    narrow,
    of_kind,
    reported_rows,
    settings,
    trained_models,
    trained_rows,
)
from probekit.report.style import in_millions
from probekit.results import CHOICE_KEYS, CONTROLS, SPLITS, knowing_nothing, set_label
from probekit.stats import PROTOCOLS

NONE = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
FEW_GROUPS = 50
LEVELS = {"sigma": "Noise level", "draw": "Draw", "pooling": "Pooling"}
"""Columns of what a head reads its layers at, and their headings."""
_NAMED = 4


def percent(value: float) -> str:
    """Share as a percentage with one decimal, or a dash."""
    return NONE if pd.isna(value) else f"{100 * value:.1f}"


def interval(low: float, high: float, *, signed: bool = False) -> str:
    """Two ends in brackets."""
    ends = [points(value) if signed else percent(value) for value in (low, high)]
    return NONE if pd.isna(low) else f"[{ends[0]}, {ends[1]}]"


def points(value: float) -> str:
    """Difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", MINUS)


def effect_text(effect: Effect | None) -> str:
    """Estimate and paired interval of an effect."""
    if effect is None:
        return NONE
    text = f"{points(effect.estimate)}\n{interval(effect.low, effect.high, signed=True)}"
    return marked(text, effect.converged, before="\n")


def seeds_text(*effects: Effect) -> str:
    """Say in a sentence which seeds the intervals of effects cover and which not; empty where nothing is known."""
    seeds = {name: n for effect in effects for name, n in effect.seeds}
    if not seeds:
        return ""
    several = ["training pairs"] * all(effect.refitted for effect in effects)
    several += [f"{n} seeds of {name}" for name, n in seeds.items() if n > 1]
    lone = [name for name, n in seeds.items() if n == 1]
    intervals = "the interval" if len(effects) == 1 else "these intervals, each for its own sides"
    text = f" In {intervals}: {', '.join(['test pairs', *several])}"
    if lone:
        unknown = "one seed: unknown" if len(lone) == 1 else "one seed each: unknown"
        text += f"; not the variance over seeds of {' and '.join(lone)} ({unknown})"
    return f"{text}."


def headline_table(frame: pd.DataFrame, margins: Sequence[Margin], joins: dict[str, Effect]) -> pd.DataFrame:
    """One row for each model: the validation-chosen layer, its margin over its controls, and all layers together."""
    rows = reported_rows(frame)
    kinds = control_kinds(rows)
    table = []
    for model in trained_models(rows):
        chosen, joined = (trained_rows(layer_rows(rows, layers), model) for layers in (CHOSEN, ALL_LAYERS))
        entry = {
            "Backbone": model.label + "\nimported" * model.imported,
            "Parameters": NONE if model.parameters is None else in_millions(model.parameters),
            "Layer": _layer(chosen, model),
            "Test accuracy": accuracy_text(chosen),
        }
        if rows["sigma_ratio"].notna().any():
            entry["Noise over rounding"] = "\n".join(_ratios(trained_rows(rows, model)))
        if chosen["macro_accuracy"].notna().any():
            entry["Mean over kinds"] = accuracy_text(chosen, "macro_")
        for kind in kinds:
            found = [item for item in margins if (item.model, item.kind, item.layers) == (model.label, kind, CHOSEN)]
            spread = [NONE if pd.isna(item.seed_sd) else f"{100 * item.seed_sd:.1f}" for item in found]
            of_seeds = "" if kind == "empty-prompts" else f"\nSD {spread[0]}" if found else ""
            control = [marked(percent(item.control) + of_seeds, item.converged, before="\n") for item in found]
            entry[_headed(kind)] = control[0] if found else NONE
            entry[f"Margin over {_short_kind(kind)}"] = effect_text(found[0].effect) if found else NONE
        entry["All layers"] = accuracy_text(joined)
        entry["All layers over the chosen one"] = effect_text(joins.get(model.label))
        table.append(entry)
    return pd.DataFrame(table)


def _layer(chosen: pd.DataFrame, model: Model) -> str:
    """Say which layer was chosen, or that there is one only."""
    if chosen.empty:
        return NONE
    if not chosen["chosen"].any():
        return "its only one"
    return ", ".join(str(layer) for layer in chosen["layer"]) + f"\nof {model.n_blocks}"


def scorers_table(frame: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """Scores of other models on the test pairs of a data set; one judged by another protocol than the heads says so."""
    rows = reported_rows(frame)
    table = []
    for row in rows[(rows["dataset"] == setting.dataset) & (rows["head_kind"] == "external")].to_dict("records"):
        given = row["head"] == "agreement"
        other = f"\nby {row['protocol']}, unlike the heads" if row["protocol"] != setting.protocol else ""
        table.append(
            {
                "Scorer": row["backbone"] + "\nas given, not measured here" * given + other,
                "Test accuracy": percent(row["accuracy"]),
                "Interval": interval(row["low"], row["high"]),
                "Mean over pairs": percent(row["micro_accuracy"]),
                "Mean over prompts": percent(row["prompt_accuracy"]),
                "Pairs": NONE if given else f"{row['n_pairs']:,}",
                "Predicted ties": NONE if given else f"{row['predicted_ties']:,}",
                "Left out": NONE if given else f"{row['left_out']:,}",
            }
        )
    return pd.DataFrame(table)


def expected_text(frame: pd.DataFrame) -> str:
    """Say what scorers that know nothing get on the test pairs of a setting, and the floor that makes."""
    text = knowing_nothing(reported_rows(frame))
    return f"on these test pairs a scorer that knows nothing gets: {text}" if text else ""


def effects_table(effects: Iterable[Effect]) -> pd.DataFrame:
    """Differences with their paired intervals and the smallest difference that could have been seen."""
    return pd.DataFrame(
        {
            "Difference (percentage points)": marked(effect.what.replace(" - ", f" {MINUS} "), effect.converged),
            "Estimate": points(effect.estimate),
            "Paired interval": interval(effect.low, effect.high, signed=True),
            "Detectable": f"{100 * effect.detectable:.1f}",
            "Pairs": f"{effect.n_pairs:,}",
            "Seeds": "; ".join(f"{name}: {n}" for name, n in effect.seeds),
        }
        for effect in effects
    )


def backbone_table(frame: pd.DataFrame, backbone: str, setting: Setting) -> pd.DataFrame:
    """Every fitted head of one trained backbone, with what its fit reported; ``mark`` says which rows to highlight.

    Noise level, draw and pooling are columns where there are several; those of the setting come first.
    """
    rows = narrow(frame, setting, any_head=True, any_level=True)
    several = [column for column in LEVELS if rows.loc[~rows["imported"], column].nunique() > 1]
    mine = rows[(rows["backbone"] == backbone) & (rows["control"] == "trained") & (rows["slice_by"] == "all")]
    model = next(model for model in trained_models(rows, every_length=True) if backbone in model.backbones)
    controls = control_rows(reported_rows(rows), model)
    validation = mine[mine["split"] == "validation"].set_index("record_id")["accuracy"]
    everything = set(all_layers(mine)["record_id"])
    drawn = {column: getattr(setting, column) for column in LEVELS}
    places = dict.fromkeys([tuple(drawn.values()), *mine[list(LEVELS)].itertuples(index=False, name=None)])
    order = {place: number for number, place in enumerate(places)}
    tested = reported_rows(mine)
    tested = tested.assign(place=[order[at] for at in tested[list(LEVELS)].itertuples(index=False, name=None)])
    table = []
    for row in tested.sort_values(["place", "n_layers", "layer"], kind="stable").to_dict("records"):
        same = (controls["layer_set"] == row["layer_set"]) & (controls["head"] == row["head"])
        same &= controls["combination"] == row["combination"]
        for column in LEVELS:
            same &= controls[column] == row[column]
        same_head = controls[same & (controls["seed"] == row["seed"])]
        output = row["n_layers"] == 1 and row["layer"] > row["n_blocks"]
        every = row["record_id"] in everything
        name = "all layers" if every else set_label(row["layer_set"], row["combination"]).replace("+", " + ")
        name += " (entering the output projection)" if output else ""
        shown = row["chosen"] and row["head"] == setting.head and not row["place"]
        entry: dict[str, Any] = {
            "mark": "chosen" if shown else "joined" if row["n_layers"] > 1 else "",
            **{LEVELS[column]: str(row[column]).replace("+", " + ") for column in several},
            "Layers": name,
            "Head": row["head"] + (f", seed {row['seed']}" if row["seed"] else ""),
            "Test accuracy": marked(percent(row["accuracy"]), row["converged"], before="\n"),
            "Interval": interval(row["low"], row["high"]),
            "Validation": percent(float(validation.get(row["record_id"], float("nan")))),
            "Training": percent(row["train_accuracy"]),
        }
        for kind in control_kinds(controls):
            title = f"Random ({kind})" if kind in RANDOM else _headed(kind)
            alike = of_kind(same_head, kind)
            entry[title] = marked(percent(alike["accuracy"].mean()), *alike["converged"])
        entry |= {
            "C": NONE if pd.isna(row["strength"]) else f"{row['strength']:g}",
            "Head parameters": f"{row['head_parameters']:,}",
            "Notes": ", ".join(_notes(row)),
        }
        table.append(entry)
    return pd.DataFrame(table)


def controls_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Every control with its seed: its own validation-chosen layer and all layers together."""
    rows = reported_rows(frame)
    table = []
    for model in trained_models(rows):
        controls = control_rows(rows, model)
        several = controls["backbone"].nunique() > 1
        for backbone, control in controls[["backbone", "control"]].drop_duplicates().to_numpy(object):
            mine = controls[(controls["backbone"] == backbone) & (controls["control"] == control)]
            chosen, joined = (layer_rows(mine, layers) for layers in (CHOSEN, ALL_LAYERS))
            entry = {
                # init weights are of a shape, not of a training seed
                "Backbone": backbone if several and not control.startswith("init:") else model.label,
                "Control": control.replace("+", " + "),
                "Layer": ", ".join(map(str, chosen["layer"])) or NONE,
            }
            table.append(entry | {"Test accuracy": accuracy_text(chosen), "All layers": accuracy_text(joined)})
    return pd.DataFrame(table)


def counts_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Pairs and groups of each split and kind, over the records of one setting."""
    table = []
    for (split, source), rows in frame.groupby(["split", "source"], sort=False):
        most = rows.sort_values("n_pairs", kind="stable").to_dict("records")[-1]
        table.append(
            {
                "Split": split,
                "Pairs of kind": source or "(none)",
                "Scored": f"{most['n_pairs']:,}",
                "True ties": f"{most['true_ties']:,}",
                "Left out": f"{most['left_out']:,}",
                "Groups": f"{most['n_groups']:,}",
                "Effective groups": NONE if pd.isna(most["effective_groups"]) else f"{most['effective_groups']:,.0f}",
            }
        )
    return pd.DataFrame(table)


def other_settings_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Validation-chosen layer in every setting that the figures do not show; empty where there is only one."""
    rows = reported_rows(frame)
    rows = rows[rows["chosen"] & (rows["control"] == "trained")]
    shown = pd.concat([narrow(rows, setting) for setting in settings(frame)])
    keys = [key for key in CHOICE_KEYS if key not in ("backbone", "control") and frame[key].nunique() > 1]
    measured = rows["sigma_ratio"].notna().any()
    if not keys:
        return pd.DataFrame()
    rest = rows[~rows["record_id"].isin(shown["record_id"])]
    table = pd.DataFrame({key.capitalize(): rest[key].astype(str) for key in ["backbone", *keys]})
    if measured:
        table["Noise over rounding"] = [_ratio(value) for value in rest["sigma_ratio"]]
    return table.assign(
        Layer=rest["layer"].astype(str),
        **{"Test accuracy": [accuracy_text(rest.loc[[index]]) for index in rest.index]},
    )


def warnings_list(
    frame: pd.DataFrame, effects: Iterable[Effect] = (), strengths: Mapping[str, Sequence[float]] | None = None
) -> list[str]:
    """List what a reader must know before believing a number; of long lists the first few records are named.

    Parameters
    ----------
    frame
        Rows of one data set.
    effects
        Differences on the page, which may have lost pairs.
    strengths
        See `probekit.diagnostics.fit_warnings`.
    """
    records = frame.drop_duplicates("record_id")
    test = reported_rows(frame)
    validated = records["record_id"].isin(frame[frame["split"] == "validation"]["record_id"])
    found = [
        *differing_data(frame),
        *unresolved(frame),
        *_untested(frame),
        *_dropped(effects),
        *fit_warnings(records, strengths),
        counted(
            test[test["effective_groups"] < FEW_GROUPS],
            f"rest on fewer than {FEW_GROUPS} effective groups; intervals are rough",
        ),
        counted(
            records[records["n_layers"].eq(1) & ~validated],
            "have no validation rows, so no layer is chosen there",
        ),
    ]
    ties, skips = int(test["true_ties"].max()), PROTOCOLS[test["protocol"].iloc[0]].skips_ties
    everything = frame[frame["slice_by"] == "all"]
    most = everything.groupby("split")["left_out"].max()
    left_out = {"training": int(records["train_left_out"].max())} | {
        split: int(most[split]) for split in SPLITS if split in most
    }
    if any(left_out.values()):
        told = ", ".join(f"{count:,} {split}" for split, count in left_out.items() if count)
        found.append(
            f"Up to {told} pairs are left out: rows missing from the store, unreadable or non-finite pictures, no"
            " label, or (validation) connected to test pairs of another data set."
        )
    if connected := int(records["train_connected"].max()):
        found.append(
            f"{connected:,} training pairs left out: their group reaches, by a prompt or an image, into the validation"
            " or test pairs of another data set."
        )
    if train_ties := int(records["train_ties"].max()):
        found.append(
            f"True ties among the training pairs: {train_ties:,}; the setting 'ties' says whether heads were fitted on"
            " them."
        )
    if ties:
        told = "have no right answer and are not scored" if skips else "count as the protocol says"
        found.append(f"{ties:,} test pairs are true ties: they {told}.")
    if predicted := int(test["predicted_ties"].where(test["accuracy"].notna(), 0).max()):
        told = "exactly equal scores and count as wrong" if skips else "equal scores, which count as the protocol says"
        found.append(f"Up to {predicted:,} test pairs got {told}.")
    return [text for text in found if text]


def differing_data(frame: pd.DataFrame) -> list[str]:
    """Name the stores whose pairs, groups, splits or labels are not those of most stores of the data set."""
    stores = frame.drop_duplicates(["backbone", "control", "data_digest"])
    usual = stores["data_digest"].value_counts(sort=True).index
    others = stores[stores["data_digest"] != usual[0]]
    if others.empty:
        return []
    first = [f"{row['backbone']} ({row['control']})" for row in others.head(_NAMED).to_dict("records")]
    more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
    verb = "store was" if len(others) == 1 else "stores were"
    return [
        f"Not the same data: {len(others)} of {len(stores)} {verb} fitted or judged on other pairs, groups, splits or"
        f" labels than the rest, so comparisons with them are not of the backbones alone: {'; '.join(first)}{more}."
        " Dump the missing rows or sweep all stores with the same judgements."
    ]


def _untested(frame: pd.DataFrame) -> list[str]:
    """Name the backbones of families that the project's own tests do not run."""
    names = frame.loc[~frame["family_tested"], "backbone"].unique().tolist()
    if not names:
        return []
    return [
        f"Untested: {', '.join(names)} {'is' if len(names) == 1 else 'are'} of a family of models that probekit's own"
        " tests do not run; that its image tokens are the ones pooled was checked on the model itself."
    ]


def unresolved(frame: pd.DataFrame, *, brief: bool = False) -> list[str]:
    """Name the stores whose features a noise level moves too little to be told from rounding."""
    stores = frame.drop_duplicates(["backbone", "control", "sigma"])
    stores = stores[stores["sigma_ratio"] < RESOLVED_RATIO]
    stores = stores.sort_values("control", key=lambda control: control != "trained", kind="stable")
    found = []
    for sigma, rows in stores.groupby("sigma", sort=False):
        first = [
            f"{row['backbone']}{'' if row['control'] == 'trained' else ' (' + row['control'] + ')'}"
            f" ({row['sigma_ratio']:.1f})"
            for row in rows.head(_NAMED).to_dict("records")
        ]
        more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
        meaning = (
            " (see Warnings)."
            if brief
            else ": the change of features from clean latents is so many times (in brackets) that from bfloat16 to"
            f" float32, and below {RESOLVED_RATIO:g} it does not stand out from rounding. Nothing there can be credited"
            " to the noise."
        )
        found.append(f"Noise level {sigma} is not resolved for {', '.join(first)}{more}{meaning}")
    return found


def _ratio(value: float) -> str:
    unresolved = ", not resolved" if value < RESOLVED_RATIO else ""
    return NONE if pd.isna(value) else f"{value:.1f}{unresolved}"


def _ratios(rows: pd.DataFrame) -> list[str]:
    """Return the distinct ratios of some backbones; training seeds have one each."""
    return list(dict.fromkeys(_ratio(value) for value in rows.drop_duplicates("backbone")["sigma_ratio"]))


def _headed(kind: str) -> str:
    return CONTROLS[kind][0].upper() + CONTROLS[kind][1:]


def _short_kind(kind: str) -> str:
    return kind if kind in RANDOM else CONTROLS[kind]


def _dropped(effects: Iterable[Effect]) -> list[str]:
    lost = [effect for effect in effects if effect.dropped]
    if not lost:
        return []
    most = max(lost, key=lambda effect: effect.dropped)
    number = f"{len(lost)} differences rest" if len(lost) > 1 else "1 difference rests"
    return [
        f"{number} on the test pairs that all of its sides judged and drop the others: {most.dropped:,} pairs dropped"
        f" and {most.n_pairs:,} kept in {most.what.replace(' - ', f' {MINUS} ')}{' (the most)' * (len(lost) > 1)}."
    ]


def _notes(row: dict[Hashable, Any]) -> list[str]:
    notes = ["chosen on validation"] if row["chosen"] else []
    notes += ["edge of grid"] if row["edge_of_grid"] else []
    notes += ["nothing to fit"] if row["head_parameters"] == 0 else []
    notes += [] if pd.isna(row["threshold"]) else [f"ties up to a difference in probability of {row['threshold']:g}"]
    notes += ["fewer pairs than channels"] if row["n_less_than_d"] else []
    notes += ["matrix-free"] if row["matrix_free"] else []
    notes += [f"{row['n_dropped']:,} channels dropped"] if row["n_dropped"] else []
    return notes + ([UNCONVERGED] if not row["converged"] else [])


def accuracy_text(rows: pd.DataFrame, prefix: str = "") -> str:
    """Accuracy with interval; of several training seeds the mean and each of them."""
    values = rows[f"{'macro_' if prefix else ''}accuracy"]
    if not values.notna().any():
        return NONE
    if len(rows) == 1:
        text = f"{percent(values.iloc[0])}\n{interval(rows[f'{prefix}low'].iloc[0], rows[f'{prefix}high'].iloc[0])}"
    else:
        text = f"{percent(values.mean())}\nseeds {', '.join(percent(value) for value in values)}"
    return marked(text, *rows["converged"], before="\n")
