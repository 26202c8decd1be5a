"""Sentences of the page: each says what was found, with its interval, and no more than the numbers allow."""

from collections.abc import Mapping, Sequence

import pandas as pd

from probekit.diagnostics import marked
from probekit.report.effects import Effect, Margin
from probekit.report.points import undecided_kinds
from probekit.report.select import (
    ALL_LAYERS,
    CHOSEN,
    PROMPTS,
    RANDOM,
    Model,
    Setting,
    all_layers,
    control_kinds,
    layer_rows,
    output_rows,
    reported_rows,
    trained_models,
    trained_rows,
    training_series,
)
from probekit.report.tables import differing_data, interval, percent, points, seeds_text
from probekit.results import CONTROLS

_KINDS = {
    "init": "drawn from the constructor's distribution",
    "shuffled": "the trained entries permuted within each tensor",
    "empty-prompts": "pointing down, every prompt empty",
    "shuffled-prompts": "pointing up, every row the prompt of another",
}
_LAYERS = {CHOSEN: "At the layer chosen on validation", ALL_LAYERS: "With all layers together"}


def found(
    frame: pd.DataFrame,
    margins: Sequence[Margin],
    joins: Mapping[str, Effect],
    sizes: Mapping[str, list[Effect]],
    lengths: Mapping[str, list[Effect]],
    others: Mapping[str, list[Effect]],
) -> list[str]:
    """Headline sentences: the largest backbone against random weights, joining, size, training, imports."""
    rows = reported_rows(frame)
    models = trained_models(rows)
    sentences = differing_data(frame)
    if not models:
        return [
            *sentences,
            "The run holds no trained backbone, so there is nothing to set against the random weights.",
        ]
    large = models[-1]
    sentences += _largest(trained_rows(layer_rows(rows, CHOSEN), large), large)
    for margin in margins:
        if margin.model == large.label and margin.layers == CHOSEN:
            spread = "" if pd.isna(margin.seed_sd) else f"; SD over {margin.n_seeds} seeds {100 * margin.seed_sd:.1f}"
            share = marked(f"mean {percent(margin.control)} %{spread}", margin.converged)
            if margin.kind in RANDOM:
                network = f"the same network with random weights ({margin.kind}: {share})"
            else:
                network = f"the same trained network with {CONTROLS[margin.kind]} ({share.removeprefix('mean ')})"
            verb = _verdict(margin.effect, "is {} above", "is {} below", "cannot be told ({}) from")
            if margin.effect.few_seeds:
                text = f"That differs by {_points(margin.effect)} from {network}: {_few(margin.effect)}"
            else:
                text = f"That {verb} {network}"
            sentences.append(f"{text}.{seeds_text(margin.effect)}")
    if join := joins.get(large.label):
        verb = _verdict(join, "is {} above", "is {} below", "cannot be told ({}) from")
        sentences.append(f"A head on all its layers together {verb} the one on the chosen layer.{seeds_text(join)}")
    dumped = [model for model in models if not model.imported]
    sentences += [size_sentence(layers, effects, dumped[0].label, large.label) for layers, effects in sizes.items()]
    for layers, effects in lengths.items():
        for effect in effects:
            verb = _verdict(effect, "adds {}", "costs {}", "makes no difference that can be told from zero ({})")
            what = effect.what.replace(" - ", " against ")
            sentences.append(f"{_LAYERS[layers]}, longer training of one shape {verb} ({what}).{seeds_text(effect)}")
    for layers, effects in others.items():
        for effect in effects:
            verb = _verdict(effect, "is {} above", "is {} below", "cannot be told ({}) from")
            what = effect.what.removeprefix(f"{large.label} - ").removesuffix(" (imported)")
            sentences.append(
                f"{_LAYERS[layers]}, {large.label} {verb} the imported features {what}.{seeds_text(effect)}"
            )
    return sentences


def size_sentence(layers: str, effects: Sequence[Effect], small: str, large: str) -> str:
    """Say what size brings, what random weights of the same shapes bring, and what the one leaves of the other."""
    verb = _verdict(effects[0], "is {} above", "is {} below", "cannot be told ({}) from")
    text = f"{_LAYERS[layers]}, {large} {verb} {small}"
    for random, left in zip(effects[1::2], effects[2::2], strict=True):
        kind = random.what.rpartition("(")[2].rstrip(")")
        if left.few_seeds:
            rest = f": {_few(left)}"
        elif _apart(left):
            rest = ", and that is separated from zero"
        else:
            rest = ", and that is not separated from zero: width, shape or the draw of the seeds may explain it"
        text += (
            f"; random weights ({kind}) of the same two shapes differ by {_points(random)},"
            f" which leaves {_points(left)}{rest}"
        )
    return f"{text}.{seeds_text(*effects)}"


def depth_caption(frame: pd.DataFrame, setting: Setting, families: pd.DataFrame) -> str:
    """Caption of the depth figure; `families` may be empty."""
    rows = reported_rows(frame)
    drawn = [name for model in trained_models(rows) for name in model.backbones]
    bands = plateau_sentences(families[families["backbone"].isin(drawn)])
    elsewhere = [name for name in rows["trained_on"].unique() if name != setting.dataset]
    trained_on = f", fitted on {', '.join(elsewhere)}" if elsewhere else ""
    parts = [
        f"Test accuracy on {setting.dataset}{trained_on} ({setting.protocol} protocol, {setting.head} head, noise level"
        f" {setting.sigma}, noise draw {setting.draw}, pooling {setting.pooling}) of single layers.",
        "Bands: limits that hold for all layers of a backbone together (group bootstrap, largest |t|); they cover the"
        " fitted heads and the pairs drawn, not retraining."
        if bands
        else "Bands: group-bootstrap intervals, each layer on its own; they cover the fitted head and the pairs drawn,"
        " not retraining.",
        *bands,
        "Ring: the layer that was best on validation; the highest test point may be another one and is no result."
        if rows["chosen"].any()
        else "No layer is chosen, for want of validation rows or of several layers.",
        "Dashed line and diamond: the head on all layers together."
        if len(all_layers(rows))
        else "The run has no head on all layers together.",
    ]
    if len(output_rows(rows)):
        parts.append(
            "Cross right of the last layer (hollow for random weights): the tokens entering the output projection, a"
            " function of the last layer; never chosen, and not in the head on all layers."
        )
    if kinds := control_kinds(rows, RANDOM):
        names = "; ".join(f"{kind}: {_KINDS.get(kind, kind)}" for kind in kinds)
        parts.append(
            f"Dotted: the transformer with random weights ({names}), mean over seeds, single seeds thin, hollow diamond"
            " for all layers (bar: range over seeds); VAE and text encoders stay trained."
        )
    else:
        parts.append("The run has no random-weights controls, so nothing here says what training brought.")
    if kinds := control_kinds(rows, PROMPTS):
        names = "; ".join(f"{CONTROLS[kind]}: {_KINDS[kind]}" for kind in kinds)
        parts.append(
            f"Grey triangles: the trained transformer told something else ({names}), images and labels unchanged."
        )
    if len(trained_models(rows)) > 1:
        parts.append("Thin grey: the other backbones.")
    return " ".join(parts + _imported(rows))


def levels_caption(setting: Setting) -> str:
    """Caption of the figure over noise levels, draws and poolings."""
    return (
        f"The {setting.head} head on single layers at every noise level, draw and pooling of the run, each a fit of its"
        " own; several joined by + are read side by side. Rings: the layer chosen on validation there; diamonds: all"
        " layers together. Intervals, not drawn, stand under Every backbone; that one level beats another needs the"
        " paired comparison of the two."
    )


def plateau_sentences(families: pd.DataFrame) -> list[str]:
    """Say which layers of the trained backbones may be the best, and which are proven to be as good for practice."""
    trained = families[families["control"] == "trained"]
    if trained.empty:
        return []
    inside = _by_backbone(trained[trained["in_plateau"]])
    told = (
        "Training pairs are a sample here too, by refits on halves of their groups."
        if (trained["n_refits"] > 0).all()
        else "This is about the fitted heads: other training pairs might tell layers apart otherwise."
    )
    close = _by_backbone(trained[trained["within_point"]])
    return [
        f"Squares: layers that may be the best, as no other is shown to be better ({inside}); that is not to say that"
        f" they are equal. {told}",
        f"Proven to lie within one point of the best layer: {close}."
        if close
        else "Of no layer it is proven that it lies within one point of the best.",
    ]


def _by_backbone(rows: pd.DataFrame) -> str:
    layers = rows.groupby("backbone", sort=False)["layer"].agg(lambda some: ", ".join(map(str, some)))
    return "; ".join(f"{backbone}: {some}" for backbone, some in layers.items())


def _imported(rows: pd.DataFrame) -> list[str]:
    """Say of imported features what their depth means, and what of the caption is not about them."""
    models = [model for model in trained_models(rows) if model.imported]
    if not models:
        return []
    parts = [
        f"Orange, imported ({', '.join(model.label for model in models)}): features computed elsewhere, without the"
        " noise and pooling named above; depth is the layer's number over the number of blocks stated, or over the last"
        " number of the file."
    ]
    if any(model.n_blocks == 0 for model in models):
        parts.append("A dashed level across the panel is a layer that is the only one and has no depth.")
    return parts


def scaling_caption(frame: pd.DataFrame, sizes: Mapping[str, list[Effect]]) -> str:
    """Caption of the scaling figure, with what random weights leave of the effect of size."""
    every = trained_models(reported_rows(frame))
    models = [model for model in every if not model.imported]
    imported = [model for model in every if model.imported]
    note = []
    if imported:
        note = ["Crosses, off the line: imported features, of networks that differ in more than size."]
    if unknown := [model.label for model in imported if model.parameters is None]:
        note.append(f"Not drawn, since the size of their network is not stated: {', '.join(unknown)}.")
    if not sizes:
        alike = "All backbones have the same size" if len(models) > 1 else "There are no two backbones to compare"
        return " ".join([f"{alike}, so this says nothing about scaling.", *note])
    parts = [size_sentence(layers, effects, models[0].label, models[-1].label) for layers, effects in sizes.items()]
    if not control_kinds(frame, RANDOM):
        parts.append("Without random-weights controls the effect of width alone is unknown.")
    else:
        parts.append("Bars of random weights: range over seeds.")
    parts.append("Bars of trained backbones: intervals over test pairs, not seeds.")
    parts.append(
        "A contrast between these checkpoints on the same pairs, not a law for others: blocks, width and parameters"
        " change together."
    )
    if any(len(model.backbones) > 1 for model in models):
        parts.append("Small dots side by side: training seeds of one size.")
    return " ".join(parts + note)


def training_caption(frame: pd.DataFrame, lengths: Mapping[str, list[Effect]]) -> str:
    """Caption of the training figure."""
    series = training_series(reported_rows(frame))
    names = ", ".join(models[-1].label for models in series)
    effects = [effect for some in lengths.values() for effect in some]
    found = [f"{_LAYERS[layers].lower()}, {_points(effect)}" for layers, some in lengths.items() for effect in some]
    parts = [
        f"Backbones of one shape ({names}) after more and more training, so that width and blocks cannot explain the"
        " difference."
    ]
    if effects:
        parts.append(f"Longest minus shortest: {'; '.join(found)}.")
        parts.append(seeds_text(*effects).strip())
    if "init" in control_kinds(frame):
        parts.append("At 0: untrained weights (init) of that shape, mean and range over seeds.")
    parts.append("Bars of trained backbones: intervals over test pairs, not seeds.")
    return " ".join(parts)


def kinds_caption(frame: pd.DataFrame, setting: Setting) -> str:
    """Caption of the figure over kinds of pairs."""
    parts = [
        "The same heads, trained on all kinds together, scored on each kind of pair on its own; easiest kind of the"
        " largest backbone first. Diamonds: all layers together. Each kind has few pairs, so its intervals (over"
        " test pairs, not seeds) are wide; a kind at 50 % is one that this head does not read, not one that the"
        " backbone cannot know."
    ]
    if ties := undecided_kinds(frame, setting=setting):
        parts.append(f"Not drawn, since all their pairs are true ties: {', '.join(ties)}.")
    return " ".join(parts)


def limits(frame: pd.DataFrame, whole: pd.DataFrame, *, banded: bool, refitted: bool) -> list[str]:
    """List what the page does not show.

    Parameters
    ----------
    frame
        Rows of the setting that is drawn.
    whole
        Rows of all settings.
    banded
        Whether bands hold for all layers together.
    refitted
        Whether heads were refitted on halves of the training groups.
    """
    rows = reported_rows(frame)
    whole = whole[whole["dataset"].isin(frame["dataset"])]
    models = trained_models(rows)
    n_models = sum(not model.imported for model in models)
    imported = [model.label for model in models if model.imported]
    dumped = whole[~whole["imported"]]
    items = [
        "The interval of an accuracy covers one fitted head on pairs like these. That of a difference covers, beside"
        " the pairs, the seeds of every side that has several; of one seed the variance is unknown. "
        + (
            "That of a difference also covers other training pairs, where all of its heads were refitted on halves of"
            " their groups."
            if refitted
            else "None contains refitting on other training pairs."
        ),
        "A probe finds what a head of this kind can read. A low accuracy does not show that the information is absent,"
        " and a high one not that the backbone uses it.",
        ("Bands hold for all layers of one backbone together. " if banded else "Bands are drawn layer by layer. ")
        + "That one layer beats another needs the paired comparison of the two; overlapping bands decide nothing.",
        "Corrected for their number are the claims (over backbones), what is said of layers (over the layers of a"
        " backbone) and the highest accuracy (over all that were tried). Every other interval holds on its own at its"
        " level; those of everything but the primary endpoint are exploratory.",
        "The chosen layer is the best on validation. Layers close to it may be as good, and with few validation pairs"
        " the choice is noisy.",
    ]
    if rows["relative_depth"].isna().all():
        items.append("The run has no heads on single layers with a depth, so it says nothing about depth.")
    if (rows["layer"].eq(0) & ~rows["imported"]).any():
        items.append(
            "Layer 0 is the tokens that enter the first block. In most architectures they have not met the prompt,"
            " so what only the prompt decides is at 50 % there, up to the noise, which may differ between prompts."
        )
    if control_kinds(rows, RANDOM):
        items.append(
            "Random weights replace the transformer only. VAE and text encoders stay trained, so random weights above"
            " 50 % are expected."
        )
    else:
        items.append("There are no random-weights controls in this run: no accuracy here can be credited to training.")
    if n_models > 1:
        items.append(
            f"Differences between the {n_models} models are about these checkpoints; what may be said of others, by a"
            " slope with its few degrees of freedom, stands among the claims."
        )
    if imported:
        items.append(
            f"Imported features ({', '.join(imported)}) are taken as they were given: nothing here checks how they were"
            " computed, and random weights or other prompts of a backbone are no controls of them."
        )
    if rows["training_images"].isna().all():
        items.append("How long the backbones were trained is not recorded.")
    if control_kinds(rows, PROMPTS):
        items.append(
            "What a head reads with empty or shuffled prompts needs no prompt, such as a picture's quality. A margin"
            " over them is what the prompt brings to heads of this kind, not all that the backbone makes of it."
        )
    if dumped["sigma"].nunique() == 1:
        items.append(f"One noise level only ({dumped['sigma'].iloc[0]}); other levels may rank layers differently.")
    if (draws := dumped["draw"].nunique()) > 1:
        shown = rows[~rows["imported"]]["draw"].iloc[0]
        items.append(
            f"Figures and differences are of noise draw {shown}, one of {draws}; the others stand under"
            " Other settings. Draws are never averaged, and how far they differ is in no interval."
        )
    return items


def _largest(chosen: pd.DataFrame, model: Model) -> list[str]:
    if len(chosen) == 1:
        row = chosen.iloc[0]
        share = marked(f"{percent(row['accuracy'])} % {interval(row['low'], row['high'])}", row["converged"])
        pairs = f"{row['n_pairs']:,} test pairs"
        layer = (
            f"layer {row['layer']} of {model.n_blocks}, chosen on validation," if row["chosen"] else "its only layer"
        )
        return [
            f"{model.label}: {layer} orders {share} of {pairs} as their labels do"
            " (interval over test pairs; how much training seeds differ is not in it)."
        ]
    if len(chosen):
        share = marked(f"{percent(chosen['accuracy'].mean())} % of the test pairs", *chosen["converged"])
        layers = f"the layers chosen on validation order {share} as their labels do"
        return [f"{model.label}: {layers} (mean of {len(chosen)} training seeds)."]
    return [f"{model.label}: no layer is chosen, for want of single-layer heads or of validation rows."]


def _points(effect: Effect) -> str:
    text = f"{points(effect.estimate)} points {interval(effect.low, effect.high, signed=True)}"
    return marked(text, effect.converged)


def _few(effect: Effect) -> str:
    return f"no conclusion from {effect.random_seeds} seed{'s' * (effect.random_seeds != 1)} of random weights"


def _apart(effect: Effect) -> bool:
    return effect.low > 0 or effect.high < 0


def _verdict(effect: Effect, above: str, below: str, neither: str) -> str:
    """Fill in the effect: without sign where the words carry it, with its sign where zero lies inside."""
    if not _apart(effect):
        return neither.replace("{}", _points(effect))
    ends = (effect.low, effect.high) if effect.estimate > 0 else (-effect.high, -effect.low)
    size = marked(f"{abs(100 * effect.estimate):.1f} points {interval(*ends)}", effect.converged)
    return (above if effect.estimate > 0 else below).replace("{}", size)
