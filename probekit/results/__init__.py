"""The results table of a run: one atomically renamed part per record, loaded as one tidy frame.

A run folder holds::

    config.json                    the resolved configuration
    parts/<record_id>.parquet      rows of one record: one for each test set, split and slice of the pairs
    margins/<record_id>.parquet    margin s(A) - s(B) of every validation and test pair of that record
    results.parquet                the parts of the current plan, joined, with ``chosen`` filled in
    beyond_generator.parquet       what chosen layers add to the generators' names, where the data name them
    controls.parquet               what refits and altered features say, where a head asked for them
    blocks.parquet                 blocks of similar layers where a head asked for them, and pairs within and across
    families.parquet               single layers judged together: band, plateau, comparisons, best of many, null
    trajectories.parquet           at which layers each test pair is right

A record is one fitted head in one setting, or a baseline that sees no features (`UNPROBED`). Its part is written
after its margins, both through a temporary file that is renamed, so a record is done exactly when its part exists;
whatever was under way when a run was killed is simply missing. Equal rows give equal bytes: the files carry no time and
no machine.
"""

from probekit.results.columns import (
    ALL_SOURCES,
    ALTERED,
    CHOICE_KEYS,
    CONTROL_COLUMNS,
    CONTROLS,
    FAMILY_COLUMNS,
    FIT_KEYS,
    JOINED,
    MARGIN_COLUMNS,
    NO_FEATURES,
    NO_FIT,
    RESULT_COLUMNS,
    SLICES,
    SPLITS,
    TRAJECTORY_COLUMNS,
    UNPROBED,
    as_they_are,
    set_label,
)
from probekit.results.facts import (
    describe_run,
    knowing_nothing,
    knowing_nothing_lines,
)
from probekit.results.run import (
    EXTERNAL,
    JUDGED,
    PLAN,
    add_external,
    check_finished,
    done_records,
    load_beyond,
    load_blocks,
    load_config,
    load_controls,
    load_families,
    load_margins,
    load_results,
    load_trajectories,
    mark_chosen,
    rebuild,
    write_beyond,
    write_blocks,
    write_config,
    write_controls,
    write_families,
    write_part,
)

__all__ = [
    "ALL_SOURCES",
    "ALTERED",
    "CHOICE_KEYS",
    "CONTROLS",
    "CONTROL_COLUMNS",
    "EXTERNAL",
    "FAMILY_COLUMNS",
    "FIT_KEYS",
    "JOINED",
    "JUDGED",
    "MARGIN_COLUMNS",
    "NO_FEATURES",
    "NO_FIT",
    "PLAN",
    "RESULT_COLUMNS",
    "SLICES",
    "SPLITS",
    "TRAJECTORY_COLUMNS",
    "UNPROBED",
    "add_external",
    "as_they_are",
    "check_finished",
    "describe_run",
    "done_records",
    "knowing_nothing",
    "knowing_nothing_lines",
    "load_beyond",
    "load_blocks",
    "load_config",
    "load_controls",
    "load_families",
    "load_margins",
    "load_results",
    "load_trajectories",
    "mark_chosen",
    "rebuild",
    "set_label",
    "write_beyond",
    "write_blocks",
    "write_config",
    "write_controls",
    "write_families",
    "write_part",
]
