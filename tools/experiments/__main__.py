"""The command: python -m tools.experiments run|show|results|collect."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.pipeline.run_dir import FREE_KEYS
from common.runtime.errors import Parser, UserError
from tools import report
from tools.experiments import data, estimate, show, store
from tools.experiments.run import FailedError, Options, command_of, run_lines, stop_on_sigterm
from tools.experiments.store import row_of
from tools.experiments.table import SMOKE_RUNS, Line, load_table, matching, shell_word, table_lines

FEWEST_DRAWS = 40  # of a bootstrap: one of forty lies below 95 % of them


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where lines failed or rows are wrong; 2 after a mistake in the input; 130 after Ctrl-C."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = next((word for word in rest if word.startswith("-") or "=" not in word), None)
    if unknown or (rest and arguments.command != "run"):
        parser.error(f"unknown argument {(unknown or rest[0])!r}; see --help")
    if arguments.command == "run":
        arguments.settings += rest
    try:
        return report(arguments.action(arguments))
    except FailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m tools.experiments", description="Tables of experiments.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="run the lines of a table that are not finished, and record their results")
    run.add_argument("table", type=Path, help="file of configs/tables/")
    run.add_argument("settings", metavar="KEY=VALUE", nargs="*", help="passed on to every line")
    run.add_argument("--only", metavar="PATTERN", default="*", help="lines MODEL/BITS/ROW that match, e.g. '*/w4a8/*'")
    run.add_argument("--list", action="store_true", help="print the lines and what each isolates, and run nothing")
    run.add_argument("--dry-run", action="store_true", help="print the exact commands and about what each costs")
    run.add_argument("--machine", choices=estimate.MACHINES, default="h200", help="of the estimate (h200); rates.json")
    run.add_argument("--smoke", action="store_true", help="every line at toy size on the CPU, on drawn shapes")
    run.add_argument("--gpus", type=int, metavar="N", default=1, help="processes of each run, one for each GPU (1)")
    run.add_argument("--launcher", metavar="WORDS", help="start each run by these words, e.g. srun and torchrun's own")
    run.add_argument(
        "--data", metavar="SET", choices=data.SETS, help=f"evaluate on another set: {', '.join(data.SETS)}"
    )
    run.add_argument("--runs", type=Path, metavar="DIR", help="where run folders go (runs/tables)")
    run.add_argument("--results", type=Path, metavar="FILE", help=f"where results go ({store.RESULTS})")
    for name, meaning in data.VARIABLES.items():
        option = f"--{name.removeprefix('ZSQDET_').lower()}"
        run.add_argument(option, dest=name, metavar="DIR", help=f"{meaning}; or {name}=DIR before the command")
    run.set_defaults(action=_run)
    shown = commands.add_parser("show", help="the results of a table as Markdown, beside the paper's where it has some")
    shown.add_argument("table", type=Path, help="file of configs/tables/")
    shown.add_argument("--only", metavar="PATTERN", default="*", help="some of the lines")
    shown.add_argument(
        "--differences", type=int, metavar="DRAWS", help="also the differences between rows, with a paired bootstrap"
    )
    shown.add_argument("--results", type=Path, metavar="FILE", default=store.RESULTS, help=f"({store.RESULTS})")
    shown.set_defaults(action=_show)
    checked = commands.add_parser("results", help="check results.csv against the tables, run folders and predictions")
    checked.add_argument("--check", action="store_true", required=True, help="exit code 1 where a row is wrong")
    checked.add_argument("--results", type=Path, metavar="FILE", default=store.RESULTS, help=f"({store.RESULTS})")
    checked.set_defaults(action=_check)
    collected = commands.add_parser("collect", help="the results of any run folders as Markdown")
    collected.add_argument("runs", nargs="+", type=Path, help="folders that `zsqdet run` made")
    collected.set_defaults(action=_collect)
    return parser


def _run(arguments: argparse.Namespace) -> Iterator[str]:
    options = {"smoke": arguments.smoke, "runs": arguments.runs, "on": arguments.data}
    lines = table_lines(arguments.table, arguments.settings, **options)
    lines = matching(lines, arguments.only)
    if arguments.gpus < 1 or (arguments.gpus > 1 and arguments.launcher):
        raise UserError(f"--gpus: found {arguments.gpus}; allowed is 1 or more, and 1 with --launcher, which says it")
    variables = data.variables({name: getattr(arguments, name) for name in data.VARIABLES})
    start = tuple(shlex.split(arguments.launcher)) if arguments.launcher else (sys.executable,)
    results, note = _where_results_go(arguments)
    chosen = Options(variables, results, start, arguments.gpus, arguments.smoke)
    if arguments.list:
        yield from (f"{line.full_name}  {line.isolates}" for line in lines)
        return
    if arguments.dry_run:
        about = list(estimate.described(lines, arguments.machine, arguments.gpus))
        for line, cost in zip(lines, about, strict=False):
            yield f"{_command_text(line, chosen)}  # {cost}"
        yield f"# {about[-1]}"
        return
    stop_on_sigterm()
    if note:
        yield note
    failure = None
    try:
        yield from run_lines(lines, chosen)
    except FailedError as error:
        failure = error
    yield from _table_of(arguments.table, lines, results)
    if failure:
        raise failure


def _where_results_go(arguments: argparse.Namespace) -> tuple[Path | None, str | None]:
    """Rows of results/results.csv are what the tables say; other settings are kept only where a file is named."""
    if arguments.results:
        return arguments.results, None
    if arguments.smoke:
        return (arguments.runs or SMOKE_RUNS) / "results.csv", None
    changed = [word for word in arguments.settings if word.partition("=")[0] not in FREE_KEYS]
    if changed:
        return None, f"not recorded: {changed[0]} changes what the table says; --results FILE keeps the results"
    return store.RESULTS, None


def _command_text(line: Line, options: Options) -> str:
    """A command that a shell understands; a variable that is not set is left to it."""
    words = command_of(line, options)
    if options.launcher == (sys.executable,):
        words = ["zsqdet", *words[3:]]
    return " ".join(map(shell_word, words))


def _table_of(path: Path, lines: Sequence[Line], results: Path | None) -> Iterator[str]:
    if results is None:
        return
    table = load_table(path)
    names = {(line.name, line.seed) for line in lines}
    rows = [row for row in store.read(results) if row.table == path.stem and (row.name, row.seed) in names]
    yield ""
    yield f"{table.title}"
    yield ""
    if table.paper:
        yield from show.beside(rows, lines, table.paper)
        return
    yield from show.table(rows, lines)
    yield ""
    evaluators = ", ".join(dict.fromkeys(row.evaluator for row in rows if row.evaluator)) or "pycocotools"
    yield f"AP and fidelity from 0 to 1, by {evaluators}. PTQ: calibrated only. Seconds: of a run. Missing: not run."


def _show(arguments: argparse.Namespace) -> Iterator[str]:
    all_lines = table_lines(arguments.table)
    lines = matching(all_lines, arguments.only)
    if arguments.differences is not None and arguments.differences < FEWEST_DRAWS:
        raise UserError(f"--differences: an interval of 95 % needs at least {FEWEST_DRAWS} draws, e.g. 400")
    yield from _table_of(arguments.table, lines, arguments.results)
    if arguments.differences:
        yield ""
        yield from show.differences(lines, all_lines, arguments.differences)


def _check(arguments: argparse.Namespace) -> Iterator[str]:
    problems = list(store.check(arguments.results, rescore=True))
    yield from problems
    if problems:
        raise FailedError(f"{arguments.results}: {len(problems)} mistakes")
    yield f"{arguments.results}: {len(store.read(arguments.results))} rows, all as the tables say"


def _collect(arguments: argparse.Namespace) -> Iterator[str]:
    yield from show.table([row_of(run) for run in arguments.runs])


if __name__ == "__main__":
    sys.exit(main())
