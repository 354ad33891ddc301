"""comparison.html: AP, fidelity, errors of the layers, settings, classes and training curves of several runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.pipeline.run_dir import FREE_KEYS
from common.reporting import figures
from common.reporting.report import write_page
from common.reporting.run_data import Contents, Row, gather
from common.reporting.tables import FULL, METRICS, PTQ, TITLES, TRAINED, Cell, cell, measured
from common.runtime.errors import UserError

NAME = "comparison.html"


@dataclass(frozen=True)
class Compared:
    """One run of the comparison. `final` is its result: the QAT row, or PTQ without training."""

    name: str
    contents: Contents
    rows: dict[str, Row]  # by name
    final: Row | None
    against_full: list[Cell]  # AP of full precision, PTQ, QAT, with differences to full precision
    masks_against_full: list[Cell]  # the same for mask AP
    against_first: list[Cell]  # all metrics of `final`, with differences to the first run
    fidelity: dict[str, Row]  # by name; without full precision


def write_comparison(runs: Sequence[Path], path: Path) -> Path:
    """Writes the page and returns its path.

    Raises:
        UserError: fewer than two runs, not a run folder, a damaged run, or a file that cannot be written.
    """
    if len({run.resolve() for run in runs}) < 2:
        raise UserError("report: a comparison needs at least two different run folders")
    compared = _compare([gather(run) for run in runs], _names(runs))
    names = [run.name for run in compared]
    histories = [run.contents.history for run in compared]
    titles = {name: [measured(run.rows.get(name, {}).get("AP")) for run in compared] for name in (FULL, PTQ, TRAINED)}
    titles = {TITLES[name]: values for name, values in titles.items() if any(v is not None for v in values)}
    return write_page(
        path,
        "comparison.html.j2",
        runs=compared,
        warnings=warnings(compared),
        settings=different_settings(compared),
        classes=classes(compared),
        errors=layer_errors(compared),
        precision=figures.precision_of_runs(names, titles) if titles else None,
        curves={
            key: figures.histories(names, histories, key)
            for key in ("loss", "fidelity", "held_out")
            if any(key in row for history in histories for row in history)
        },
    )


def different_settings(runs: Sequence[Compared]) -> list[tuple[str, list[Any]]]:
    """Keys whose values differ between the runs, except paths."""
    settings = [run.contents.settings for run in runs]
    keys = list(dict.fromkeys(key for own in settings for key in own if key not in FREE_KEYS))
    rows = [(key, [own.get(key) for own in settings]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def classes(runs: Sequence[Compared]) -> list[tuple[str, list[Cell]]]:
    """AP per class and run, with the difference to the first run; largest spread first."""
    found = [(run.final or {}).get("per_class", {}) for run in runs]
    rows = [(name, [cell(own, found[0], name) for own in found]) for name in dict.fromkeys(n for f in found for n in f)]

    def spread(row: tuple[str, list[Cell]]) -> float:
        values = [entry.value for entry in row[1] if entry.value is not None]
        return min(values, default=0.0) - max(values, default=0.0)

    return sorted(rows, key=spread)


def layer_errors(runs: Sequence[Compared]) -> list[tuple[str, list[float | None]]]:
    """Output error per layer and run, None for a layer in float; the largest one first."""
    found = [{row["name"]: row.get("output_error") for row in run.contents.results["layers"]} for run in runs]
    rows = [(name, [own.get(name) for own in found]) for name in dict.fromkeys(name for own in found for name in own)]
    known = [(name, values) for name, values in rows if any(value is not None for value in values)]
    return sorted(known, key=lambda row: -max(value for value in row[1] if value is not None))


def warnings(runs: Sequence[Compared]) -> list[str]:
    """Reasons why the runs may not be comparable."""
    found = []
    if len({run.contents.environment.get("weights_sha256") for run in runs}) > 1:
        found.append("The runs start from different float checkpoints.")
    measured_on = [run.contents.results.get("measured_on") for run in runs if run.rows]
    if any(settings != measured_on[0] for settings in measured_on):
        found.append("The runs were not evaluated on the same images with the same settings.")
    alike_on = [run.contents.results["fidelity"].get("measured_on") for run in runs if run.fidelity]
    if any(settings != alike_on[0] for settings in alike_on):
        found.append("Fidelity was not measured on the same images with the same settings.")
    empty = [run.name for run in runs if run.final is None and not run.fidelity]
    if empty:
        found.append(f"Neither AP nor fidelity has been measured yet of {', '.join(empty)}.")
    if len({run.contents.results.get("zero_shot") for run in runs}) > 1:
        found.append("Some runs are zero-shot and some are not.")
    return found


def _compare(contents: Sequence[Contents], names: Sequence[str]) -> list[Compared]:
    runs: list[Compared] = []
    for name, own in zip(names, contents, strict=True):
        rows = {row["name"]: row for row in own.results["rows"]}
        full = rows.get(FULL, {})
        final = rows.get(TRAINED) or rows.get(PTQ)
        first = (runs[0].final or {}) if runs else (final or {})
        against_full = [cell(rows.get(row, {}), full, "AP") for row in (FULL, PTQ, TRAINED)]
        segm = {name: row.get("segm", {}) for name, row in rows.items()}
        masks = [cell(segm.get(row, {}), segm.get(FULL, {}), "AP") for row in (FULL, PTQ, TRAINED)]
        against_first = [cell(final or {}, first, metric) for metric in METRICS]
        alike = {row["name"]: row for row in (own.results.get("fidelity") or {}).get("rows", [])}
        runs.append(Compared(name, own, rows, final, against_full, masks, against_first, alike))
    return runs


def _names(runs: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as needed to be distinct."""
    paths = [run.resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return ["/".join(path) for path in paths]
