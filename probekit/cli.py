"""The ``probekit`` command: parse the options, make one library call, print one line when something is wrong.

Heavy libraries are imported inside the commands, so that ``probekit --help`` answers at once.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from pydantic import BaseModel
from rich.logging import RichHandler

from probekit._terminal import Stopped, err_console, out_console, print_lines, progress_bars, show, stop_on_signals
from probekit._types import scaled
from probekit.config import (
    SHARD_MIB,
    DumpConfig,
    ImportConfig,
    PreferenceOptions,
    ScoreTableConfig,
    SweepConfig,
    Ties,
    load_yaml,
)
from probekit.errors import ConfigError, ProbekitError

app = typer.Typer(
    name="probekit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Layer probing of diffusion transformers: dump features, sweep Bradley-Terry heads, report accuracy by depth.",
)
playground = typer.Typer(
    no_args_is_help=True, help="The shipped family of small trained DiTs and its preference pairs."
)
app.add_typer(playground, name="playground")
bench = typer.Typer(no_args_is_help=True, help="How long things take here.")
app.add_typer(bench, name="bench")

_UsageError: Any = typer.BadParameter.__mro__[1]
"""What typer raises where options are wrong; it has no name of its own."""

ExportFormat = Literal["parquet", "safetensors"]


def _existing(given: Path | list[Path] | None) -> Path | list[Path] | None:
    """Refuse a path that is not there: a mistake of usage, whichever command it is given to."""
    for path in given if isinstance(given, list) else [given]:
        if path is not None and not path.exists():
            message = f"{path}: no such file or folder"
            raise ConfigError(message)
    return given


def _preferences(given: Path | None) -> Path | None:
    """Refuse preferences that are neither there nor named like a data set on the Hub."""
    from probekit.preferences.hub import seems_hub_id

    return given if given is not None and seems_hub_id(given) else cast("Path | None", _existing(given))


def _help(field: str, of: type[BaseModel] = DumpConfig) -> str:
    return of.model_fields[field].description or ""


FormatOption = Annotated[str, typer.Option(help=_help("format"))]
ColumnsOption = Annotated[str | None, typer.Option(metavar="OURS=THEIRS,...", help=_help("columns"))]
ConfidenceOption = Annotated[float | None, typer.Option(metavar="X", help=_help("min_confidence"))]
SplitFileOption = Annotated[Path | None, typer.Option(help=_help("split_file"), callback=_existing)]


@app.command()
def dump(
    *,
    backbone: Annotated[str | None, typer.Option(help=_help("backbone"))] = None,
    prefs: Annotated[Path | None, typer.Option(help=_help("prefs"), callback=_preferences)] = None,
    split_file: SplitFileOption = None,
    format: Annotated[str | None, typer.Option(help=_help("format"))] = None,
    columns: ColumnsOption = None,
    min_confidence: ConfidenceOption = None,
    out: Annotated[Path | None, typer.Option(help=_help("out"))] = None,
    transformer: Annotated[Path | None, typer.Option(help=_help("transformer"))] = None,
    revision: Annotated[str | None, typer.Option(help=_help("revision"))] = None,
    name: Annotated[str | None, typer.Option(help=_help("name"))] = None,
    sigma: Annotated[list[str] | None, typer.Option(help=_help("sigma"))] = None,
    noise: Annotated[str | None, typer.Option(help=_help("noise") + ": shared, independent, none")] = None,
    pooling: Annotated[list[str] | None, typer.Option(help=_help("pooling"))] = None,
    layers: Annotated[str | None, typer.Option(help=_help("layers"))] = None,
    output_tokens: Annotated[bool | None, typer.Option("--output-tokens", help=_help("output_tokens"))] = None,
    prompts: Annotated[str | None, typer.Option(metavar="KIND", help=_help("prompts"))] = None,
    draws: Annotated[int | None, typer.Option(metavar="K", help=_help("draws"))] = None,
    resolution: Annotated[int | None, typer.Option(metavar="PX", help=_help("resolution"))] = None,
    resize: Annotated[str | None, typer.Option(help=_help("resize") + ": crop, pad, bucket")] = None,
    decode_workers: Annotated[int | None, typer.Option(metavar="N", help=_help("decode_workers"))] = None,
    dtype: Annotated[str | None, typer.Option(help=_help("dtype"))] = None,
    device: Annotated[str | None, typer.Option(help=_help("device"))] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="IMAGES", help=_help("batch_size"))] = None,
    seed: Annotated[int | None, typer.Option(help=_help("seed"))] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help=_help("limit"))] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help=_help("max_tokens"))] = None,
    random_weights: Annotated[str | None, typer.Option(metavar="KIND:SEED", help=_help("random_weights"))] = None,
    lora: Annotated[Path | None, typer.Option(help=_help("lora"))] = None,
    offload: Annotated[str | None, typer.Option(metavar="KIND", help=_help("offload"))] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help=_help("compile"))] = None,
    cache: Annotated[Path | None, typer.Option(help=_help("cache"))] = None,
    training_images: Annotated[int | None, typer.Option(metavar="N", help=_help("training_images"))] = None,
    shard_size: Annotated[int | None, typer.Option(metavar="MIB", help=_help("shard_size"))] = None,
    max_bad: Annotated[float | None, typer.Option(metavar="SHARE", help=_help("max_bad"))] = None,
    worker: Annotated[str | None, typer.Option(metavar="RANK/WORLD", help=_help("worker"))] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done and what it costs")] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with any of these options; options given here win", callback=_existing),
    ] = None,
) -> None:
    """Run a frozen DiT on near-clean latents and store pooled features of every layer.

    Stopped at any moment, the same command continues. Pairs, labels and splits are kept beside the features: changing
    them costs no forward pass, and a longer preference file or a further sigma adds what is missing.
    """
    given = {key: value for key, value in locals().items() if value is not None and key not in ("config", "dry_run")}
    if layers is not None and layers != "all":
        given["layers"] = layers.split(",")
    from_file = {} if config is None else load_yaml(config)
    source = "options" if config is None else f"{config} and options"
    settings = DumpConfig.checked(from_file | given, source=source)
    _preferences(settings.prefs)  # those of a YAML file too

    import probekit.dump

    if dry_run:
        print_lines(probekit.dump.dry_run(settings))
        return
    with progress_bars() as progress:
        done = probekit.dump.run_dump(settings, progress=progress)
    out_console.print(f"{settings.out}: {done}")


@app.command()
def import_features(
    *,
    file: Annotated[Path, typer.Argument(help=_help("file", ImportConfig), show_default=False, callback=_existing)],
    prefs: Annotated[Path, typer.Option(help=_help("prefs", ImportConfig), callback=_preferences)],
    out: Annotated[Path, typer.Option(help=_help("out", ImportConfig))],
    definition: Annotated[str, typer.Option(help=_help("definition", ImportConfig))],
    split_file: SplitFileOption = None,
    format: FormatOption = "auto",
    columns: ColumnsOption = None,
    min_confidence: ConfidenceOption = None,
    name: Annotated[str | None, typer.Option(help=_help("name", ImportConfig))] = None,
    blocks: Annotated[int | None, typer.Option(metavar="N", help=_help("blocks", ImportConfig))] = None,
    parameters: Annotated[int | None, typer.Option(metavar="N", help=_help("parameters", ImportConfig))] = None,
    max_bad: Annotated[float, typer.Option(metavar="SHARE", help=_help("max_bad", ImportConfig))] = 0.0,
    shard_size: Annotated[int, typer.Option(metavar="MIB", help=_help("shard_size", ImportConfig))] = SHARD_MIB,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="read and check FILE, say what there is, write nothing")
    ] = False,
) -> None:
    """Turn features computed elsewhere (CLIP, DINOv2, a UNet, ...) into a feature store.

    FILE holds vectors by image (as PREFS writes it), by prompt where they depend on it, and by layer. Parquet: columns
    image, vector, perhaps prompt and layer. npz: an array for each layer, and texts image, perhaps prompt. safetensors:
    the same, the texts as JSON lists in the metadata. Another FILE is another store; other PREFS add rows.
    """
    given = {key: value for key, value in locals().items() if key != "dry_run"}
    settings = ImportConfig.checked(given, source="options")

    from probekit.imports import plan_import, run_import

    with progress_bars() as progress:
        if dry_run:
            planned = plan_import(settings, progress=progress)
        else:
            store = run_import(settings, progress=progress)
    if dry_run:
        print_lines(planned.lines())
    else:
        out_console.print(f"{out}: {len(store.rows):,} rows, {len(store.layers)} layers")


@app.command()
def sweep(
    *,
    config: Annotated[
        Path, typer.Argument(help="YAML file: heads and layer sets", show_default=False, callback=_existing)
    ],
    store: Annotated[list[Path] | None, typer.Option(help="feature store; repeatable", callback=_existing)] = None,
    out: Annotated[Path, typer.Option(help="the run: a folder, made or continued")],
    prefs: Annotated[
        Path | None,
        typer.Option(help="preference file in place of the judgements in the stores", callback=_preferences),
    ] = None,
    ties: Annotated[str | None, typer.Option(help=_help("ties", SweepConfig) + "; this option wins")] = None,
    split_file: SplitFileOption = None,
    format: FormatOption = "auto",
    columns: ColumnsOption = None,
    min_confidence: ConfidenceOption = None,
    jobs: Annotated[int, typer.Option(help="processes of one thread each; fewer where --memory is short")] = 1,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="of all processes together, such as 4G (default: three quarters of the machine's)"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done and what it costs")] = False,
) -> None:
    """Fit Bradley-Terry heads on layers and layer sets of the stores; the same command resumes.

    CONFIG may name what to fit on (train) and to test on (test) in place of --store: a mixture and several test sets.
    """
    given: dict[str, Any] = {"stores": store or (), "out": out, "prefs": prefs, "reading": _reading(locals())}
    given |= {"ties": ties, "jobs": jobs, "memory": memory}

    import probekit.sweep
    from probekit.results import knowing_nothing_lines

    if dry_run:
        print_lines(probekit.sweep.dry_run(config, **given))
        return
    with progress_bars("fits") as progress:
        probekit.sweep.run_sweep(config, **given, progress=progress)
    print_lines(knowing_nothing_lines(out))
    out_console.print(f"{out / 'results.parquet'}")


@app.command()
def score_table(
    *,
    scores: Annotated[
        Path | None, typer.Argument(help=_help("scores", ScoreTableConfig), show_default=False, callback=_existing)
    ] = None,
    prefs: Annotated[Path, typer.Option(help=_help("prefs", ScoreTableConfig), callback=_preferences)],
    out: Annotated[Path, typer.Option(help=_help("out", ScoreTableConfig))],
    format: FormatOption = "auto",
    columns: ColumnsOption = None,
    min_confidence: ConfidenceOption = None,
    split_file: SplitFileOption = None,
    name: Annotated[str | None, typer.Option(help=_help("name", ScoreTableConfig))] = None,
    protocol: Annotated[str | None, typer.Option(help=_help("protocol", ScoreTableConfig))] = None,
    split: Annotated[list[str] | None, typer.Option(help=_help("split", ScoreTableConfig))] = None,
    threshold: Annotated[float | None, typer.Option(help=_help("threshold", ScoreTableConfig))] = None,
    agreement: Annotated[float | None, typer.Option(metavar="SHARE", help=_help("agreement", ScoreTableConfig))] = None,
) -> None:
    """Judge scores of another model (a row for each image, or prompt and image) on the pairs of PREFS, beside heads.

    Protocol, split and intervals are those of the run; without a column prompt a score holds for every prompt of its
    image. Pairs without a score are left out and counted.
    """
    settings = ScoreTableConfig.checked(dict(locals()), source="options")

    from probekit.sweep import score_table

    print_lines(score_table(settings).lines())
    out_console.print(f"{out / 'results.parquet'}")


@app.command()
def report(
    *,
    run: Annotated[Path, typer.Argument(help="folder of a sweep", show_default=False, callback=_existing)],
    out: Annotated[Path, typer.Option(help="the page; figures and their data go beside it")],
) -> None:
    """Draw accuracy against depth and backbone size, and write one self-contained page."""
    from probekit.report import build_report

    out_console.print(str(build_report(run, out)))


@app.command()
def claims(
    *,
    run: Annotated[Path, typer.Argument(help="folder of a sweep", show_default=False, callback=_existing)],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Take each claim about layers, size and training to supported, contradicted or undetermined; prints Markdown."""
    from probekit.report.claims import make_claims
    from probekit.report.claims_text import facts, markdown

    found = make_claims(run)
    typer.echo(json.dumps(facts(found), indent=2) if as_json else markdown(found))


@app.command()
def demo(
    *,
    out: Annotated[Path, typer.Option(help="folder for pairs, stores, run and report")] = Path("probekit-demo"),
) -> None:
    """Dump, sweep and report on the shipped playground, offline, in about three minutes on two cores."""
    from probekit.demo import run_demo

    with progress_bars() as progress:
        page = run_demo(out, progress=progress)
    out_console.print(f"report: {page}")


@app.command()
def backbones(
    *,
    model: Annotated[str | None, typer.Argument(help="folder or Hub id of a pipeline", show_default=False)] = None,
    transformer: Annotated[Path | None, typer.Option(help=_help("transformer"))] = None,
    revision: Annotated[str | None, typer.Option(help=_help("revision"))] = None,
    resolution: Annotated[int | None, typer.Option(metavar="PX", help=_help("resolution"))] = None,
    dtype: Annotated[str, typer.Option(help="compute type of the plan")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List the families of DiTs or, for one model, its layers and what it costs; no weights are loaded or fetched."""
    from probekit.backbones.plan import families, plan

    if model is None:
        if as_json:
            typer.echo(json.dumps(families(), indent=2))
            return
        for row in families():
            mark = "" if row["tested"] else " (untested)"
            typer.echo(f"{row['transformer']} in {row['pipeline']}{mark}")
            typer.echo(f"    {', '.join(row['blocks'])}; latents {row['latents']}; timestep {row['timestep']}")
        return
    planned = plan(model, transformer=transformer, revision=revision, resolution=resolution, dtype=dtype)
    show(planned.facts(), planned.lines(), as_json=as_json)


@app.command()
def lint(
    *,
    prefs: Annotated[Path, typer.Argument(help="preference file", show_default=False, callback=_preferences)],
    images: Annotated[bool, typer.Option("--images", help="open every image file as well")] = False,
    against: Annotated[
        Path | None, typer.Option(help="another preference file that should share nothing", callback=_preferences)
    ] = None,
    ties: Annotated[
        Ties, typer.Option(help="labels: soft (as are), half (winners, ties 0.5), drop (no ties)")
    ] = "soft",
    format: FormatOption = "auto",
    columns: ColumnsOption = None,
    min_confidence: ConfidenceOption = None,
    split_file: SplitFileOption = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="processes that open images; default one a core")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what is wrong with a preference file before any model runs; exit code 1 on errors, 0 on warnings."""
    reading = _reading(locals())

    from probekit.preferences import load_preferences
    from probekit.preferences.lint import lint as look_for_faults

    loaded = load_preferences(prefs, **reading.loading())
    told = reading.loading() | {"split_file": None}
    other = None if against is None else load_preferences(against, **told)
    with progress_bars() as progress:
        for preferences in (loaded, other) if images else ():
            if preferences is not None:
                preferences.unpack_images(progress)
        found = look_for_faults(loaded, images=images, against=other, ties=ties, jobs=jobs, progress=progress)
    show(found.facts(), found.lines(), as_json=as_json)
    if found.errors:
        raise typer.Exit(1)


@app.command()
def split(
    *,
    prefs: Annotated[Path, typer.Argument(help="preference file", show_default=False, callback=_preferences)],
    out: Annotated[Path, typer.Option(help="the split file: JSON")],
    format: FormatOption = "auto",
    columns: ColumnsOption = None,
    min_confidence: ConfidenceOption = None,
    test: Annotated[
        float | None, typer.Option(metavar="SHARE", min=0, max=1, help="share of the groups; default 0.15")
    ] = None,
    validation: Annotated[
        float | None, typer.Option(metavar="SHARE", min=0, max=1, help="share of the groups; default 0.15")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="another seed gives other groups to each split")] = 0,
    leave_out_generator: Annotated[
        str | None, typer.Option(metavar="NAME", help="test on all pairs that show this generator, train on none")
    ] = None,
) -> None:
    """Split a preference file once, for every backbone: no group of connected pairs is cut, official tests are kept."""
    reading = _reading(locals())

    from probekit.preferences import load_preferences
    from probekit.preferences.split_files import make_split

    loaded = load_preferences(prefs, **reading.loading())
    made = make_split(
        loaded.pairs,
        prefs=loaded.path,
        own=loaded.own_splits,
        test=test,
        validation=validation,
        seed=seed,
        leave_out_generator=leave_out_generator,
    )
    made.write(out)
    parts = [f"{len(pairs):,} {name}" for name, pairs in made.splits.items()]
    left = [f"{len(pairs):,} left out ({reason.replace('_', ' ')})" for reason, pairs in made.dropped.items()]
    out_console.print(f"{out}: pairs: {', '.join(parts + left)}; sha256 {made.sha256}")


@app.command()
def verify(
    *,
    store: Annotated[Path, typer.Argument(help="feature store", show_default=False, callback=_existing)],
    deep: Annotated[bool, typer.Option("--deep", help="read and recompute every byte")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="forget bad shards; the dump command redoes them")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List what is missing or damaged in a feature store and what mends it; exit code 1 if anything is."""
    from probekit.store import verify_store

    with progress_bars() as progress:
        found = verify_store(store, deep=deep, repair=repair, progress=progress)
    if as_json:
        typer.echo(json.dumps(found.facts(), indent=2))
    else:
        for problem in found.problems:
            typer.echo(f"{problem.path}: {problem.problem}\n    {problem.mend}")
        problems = "1 problem" if len(found.problems) == 1 else f"{len(found.problems)} problems"
        typer.echo(
            f"{store}: {problems}; {found.shards:,} good shards, {found.rows:,} rows, "
            f"{scaled(found.bytes, 'B')} {'read' if deep else 'looked at; --deep reads them'}"
        )
    if found.problems:
        raise typer.Exit(1)


@app.command()
def export(
    *,
    store: Annotated[Path, typer.Argument(help="feature store", show_default=False, callback=_existing)],
    to: Annotated[ExportFormat, typer.Option(help="a column for each layer, or a file for each")],
    out: Annotated[Path, typer.Option(help="the export: a new folder, or one that it was written to before")],
    layer: Annotated[list[int] | None, typer.Option(help="layer number; repeatable; default all")] = None,
    sigma: Annotated[list[str] | None, typer.Option(help="noise level; repeatable; default all")] = None,
    pooling: Annotated[list[str] | None, typer.Option(help="pooling; repeatable; default all")] = None,
    draw: Annotated[list[int] | None, typer.Option(help="draw; repeatable; default all")] = None,
) -> None:
    """Write features, rows and pairs of a store for other tools; the same command continues or updates."""
    from probekit.store import FeatureStore, export_store

    with progress_bars() as progress:
        made = export_store(
            FeatureStore(store),
            out,
            to=to,
            layers=layer,
            sigmas=sigma,
            poolings=pooling,
            draws=draw,
            progress=progress,
        )
    for judgements, reasons in made.left_out.items():
        left = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        if left:
            typer.echo(f"{judgements}: pairs left out: {left}")
    kept = f", {len(made.kept)} were there" if made.kept else ""
    typer.echo(f"{out}: {len(made.written)} files written{kept}, {scaled(made.nbytes, 'B')} in all")


@app.command()
def inspect(
    *,
    path: Annotated[Path, typer.Argument(help="feature store or run", show_default=False, callback=_existing)],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what a feature store or a run holds."""
    from probekit.report import summary

    facts, is_store = _facts(path)
    show(facts, (summary.store_lines if is_store else summary.run_lines)(facts), as_json=as_json)


@bench.command("dump")
def bench_dump(
    *,
    backbone: Annotated[str, typer.Option(help=_help("backbone"))],
    transformer: Annotated[Path | None, typer.Option(help=_help("transformer"))] = None,
    random_weights: Annotated[str | None, typer.Option(metavar="KIND:SEED", help=_help("random_weights"))] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help=_help("max_tokens"))] = None,
    resolution: Annotated[int | None, typer.Option(metavar="PX", help=_help("resolution"))] = None,
    dtype: Annotated[str | None, typer.Option(help=_help("dtype"))] = None,
    device: Annotated[str | None, typer.Option(help=_help("device"))] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help=_help("compile"))] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="IMAGES", help=_help("batch_size"))] = None,
    decode_workers: Annotated[int | None, typer.Option(metavar="N", help=_help("decode_workers"))] = None,
    images: Annotated[int, typer.Option(metavar="N", help="synthetic images, two to a prompt")] = 1024,
    rounds: Annotated[int, typer.Option(metavar="K", help="how often everything is run, in alternating order")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Time a dump against the bare transformer on the same inputs, and say where the time goes; no file is left."""
    given = {key: value for key, value in locals().items() if value is not None}
    options = {key: value for key, value in given.items() if key in DumpConfig.model_fields}

    from probekit.bench.dump import bench_dump

    with progress_bars("rounds") as progress:
        measured = bench_dump(options, images=images, rounds=rounds, progress=progress)
    show(measured.facts(), measured.lines(), as_json=as_json)


@bench.command("store")
def bench_store(
    *,
    rows: Annotated[int, typer.Option(metavar="N", help="synthetic rows, two to a prompt")] = 8192,
    layers: Annotated[int, typer.Option(metavar="N", help="layers of a row")] = 25,
    width: Annotated[int, typer.Option(metavar="D", help="channels of a layer")] = 1536,
    shard_size: Annotated[int, typer.Option(metavar="MIB", help=_help("shard_size"))] = SHARD_MIB,
    rounds: Annotated[int, typer.Option(metavar="K", help="how often everything is run, in alternating order")] = 5,
    folder: Annotated[Path | None, typer.Option(help="disk to measure; default: the temporary folder")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Time the feature store against plain writes and reads, beside the figures of its design; no file is left."""
    from probekit.bench.store import bench_store

    with progress_bars("steps") as progress:
        measured = bench_store(
            rows=rows,
            layers=layers,
            width=width,
            shard_size=shard_size,
            rounds=rounds,
            folder=folder,
            progress=progress,
        )
    show(measured.facts(), measured.lines(), as_json=as_json)


@bench.command("sweep")
def bench_sweep(
    *,
    case: Annotated[list[str] | None, typer.Option(metavar="NAME", help="one case; repeatable (default: all)")] = None,
    scale: Annotated[float, typer.Option(metavar="X", help="factor of all numbers of pairs and channels")] = 1.0,
    layers: Annotated[int, typer.Option(metavar="K", help="factor of the rounds of each case")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Time fits of heads against scikit-learn and a plain loop, beside the figures of the design, by CPU time."""
    from probekit.bench.sweep import bench_sweep

    with progress_bars("rounds") as progress:
        measured = bench_sweep(names=case or [], scale=scale, layers=layers, progress=progress)
    show(measured.facts(), measured.lines(), as_json=as_json)


@playground.command("path")
def path() -> None:
    """Print the folder of the shipped weights: base/ and transformers/."""
    from probekit.playground import base_folder

    typer.echo(str(base_folder().parent))


@playground.command("pairs")
def pairs(
    *,
    out: Annotated[Path, typer.Argument(help="folder for pictures and preferences.jsonl", show_default=False)],
    train: Annotated[int, typer.Option(min=1, help="training and validation pairs")] = 8000,
    test: Annotated[int, typer.Option(min=1, help="test pairs")] = 4000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Draw preference pairs: PNG files and a preference file in the general form."""
    from probekit.playground.pairs import write_pairs

    out_console.print(str(write_pairs(out, n_train=train, n_test=test, seed=seed)))


def _reading(given: dict[str, Any]) -> PreferenceOptions:
    """Take what the options of a command say about reading a preference file."""
    named = {name: value for name, value in given.items() if name in PreferenceOptions.model_fields}
    return PreferenceOptions.checked(named, source="options")


def _facts(path: Path) -> tuple[dict[str, Any], bool]:
    """Plain facts of a store or a run, and whether it is a store."""
    if (path / "store.json").is_file() or (path / "shards").is_dir():
        from probekit.store import FeatureStore

        return FeatureStore(path).summary(), True
    if (path / "config.json").is_file():
        from probekit.results import describe_run

        return describe_run(path), False
    message = f"{path}: is neither a feature store (no store.json) nor a run (no config.json)"
    raise ConfigError(message)


def main() -> None:
    """Entry point: library errors become one line on stderr and an exit code (2 usage, 1 failure)."""
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=err_console, show_path=False)])
    logging.getLogger("probekit").setLevel(logging.INFO)
    stop_on_signals()
    try:
        sys.exit(app(standalone_mode=False))
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a command of commands alone: its message is the help
            error.show()
        else:
            err_console.print(f"error: {' '.join(error.format_message().split())}", markup=False, highlight=False)
        sys.exit(2)
    except ProbekitError as error:
        err_console.print(f"error: {error}", markup=False, highlight=False)
        sys.exit(error.exit_code)
    except OSError as error:  # a folder that cannot be written, a full disk
        where = f"{error.filename}: " if error.filename else ""
        err_console.print(f"error: {where}{error.strerror or error}", markup=False, highlight=False)
        sys.exit(1)
    except Stopped as stop:
        err_console.print("stopped; what is done is kept, and the same command resumes")
        sys.exit(128 + stop.args[0])
