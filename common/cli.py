"""The command `zsqdet`: reads the arguments, calls the pipeline, and turns mistakes into one line."""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.config.fields import fraction, sides, whole
from common.config.load import load_config
from common.config.reference import reference
from common.config.schema import ExperimentConfig
from common.runtime.environment import count, is_first, version
from common.runtime.errors import Parser, UserError
from common.runtime.files import check_output, disk_problem, write_json
from common.runtime.signals import MESSAGE, Terminated, die_with_launcher

# torch takes seconds to import, so the pipeline is imported where it is needed, and --help is quick.

PATIENCE = 60.0  # seconds in which the launcher must have noticed that a process is gone
Action = Callable[[argparse.Namespace], int | None]
KEYS = "keys (KEY=VALUE, VALUE as in YAML; relative paths are relative to the current directory):\n"
CONFIG, ALSO = "checkpoint, or a YAML file as in configs/", {"evaluate": "; also a run or an exported graph"}
SETTINGS = "`zsqdet keys` lists the settings, `zsqdet keys training` those with that word."
ABOUT = "Zero-shot quantization-aware training for object detectors: a low-bit detector without any data."
EPILOG = """\
example:
  zsqdet run best.pt bits=w4a8 export=onnxruntime          from a checkpoint, without any image
  zsqdet run configs/yolo11/yolo11n.yaml bits=w4a8 data.images=DIR data.annotations=FILE

`zsqdet COMMAND --help` says more about a command, `zsqdet keys` lists the settings.
exit codes: 0 done, 2 a mistake in the input, 130 Ctrl-C, 143 SIGTERM, 141 closed pipe"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns 0, 2 after a mistake of the user, 130 after Ctrl-C or 143 after SIGTERM."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(words)
    if getattr(arguments, "gpus", None) is not None and count() == 1:
        arguments.action = lambda arguments: _launch(arguments, words)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("zsqdet").setLevel(logging.INFO)
    if count() > 1:
        die_with_launcher()
    try:
        return arguments.action(arguments) or 0
    except UserError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, Exception) as error:
        interrupt = _interrupt_in(error)
        if interrupt is not None:
            _complain(MESSAGE)
            return 143 if isinstance(interrupt, Terminated) else 130
        message = _mistake(error)
        if message is None:
            raise
        return _fail(message)


def _interrupt_in(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interrupt that an error comes from: an import that is cut off can turn it into another one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _mistake(error: BaseException) -> str | None:
    """The line for an error that a user can mend; None for a bug."""
    if isinstance(error, OSError):
        return disk_problem(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name because torch may not be imported
        return "out of GPU memory; lower synthesis.batch_size, training.batch_size or evaluation.batch_size"
    if count() > 1 and isinstance(error, RuntimeError):
        from common.runtime.distributed import is_lost_peer

        if is_lost_peer(error):
            time.sleep(PATIENCE)  # the launcher ends this process
            return "another process is gone"
    return None


def _launch(arguments: argparse.Namespace, words: list[str]) -> int | None:
    """Starts this command again in a process for each GPU; one needs no launcher."""
    config = _config(arguments)
    from common.runtime.launch import check_gpus, launch

    check_gpus(arguments.gpus, config.device)
    if arguments.gpus == 1:
        return parse(words).action(arguments)
    return launch(arguments.gpus, "zsqdet", words)


def _fail(message: str) -> int:
    _complain(*(f"error: {line}" for line in message.split("\n")))
    return 2


def _complain(*lines: str) -> None:
    """Once, by the first process that has to; the others meet the same mistake, or are ended by the launcher."""
    if count() > 1:
        from common.runtime.distributed import is_first_to_fail

        if not is_first_to_fail():
            return
    print(*lines, sep="\n", file=sys.stderr)


def _print(value: object) -> None:
    """Once, however many processes there are."""
    if is_first():
        print(value)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings may stand before and after options, which argparse alone does not allow."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    options = [text for text in rest if text.startswith("-")]
    if options or (rest and "overrides" not in arguments):
        parser.error(f"unknown argument {(options or rest)[0]!r}; see zsqdet {arguments.command} --help")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zsqdet",
        usage="zsqdet COMMAND ...",
        formatter_class=_form,
        allow_abbrev=False,
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"zsqdet {version('zsqdet') or '(not installed)'}")
    commands = parser.add_subparsers(
        dest="command", prog="zsqdet", metavar="COMMAND", required=True, help=argparse.SUPPRESS
    )

    def command(name: str, action: Action, summary: str, epilog: str = SETTINGS) -> argparse.ArgumentParser:
        sub = _command(commands, name, action, summary, epilog)
        sub.add_argument("config", metavar="CONFIG", type=Path, help=CONFIG + ALSO.get(name, ""))
        sub.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="settings, e.g. bits=w4a8")
        return sub

    run = command("run", _run, "all stages and a report; resumes an interrupted run", KEYS + reference())
    synthesize = command("synthesize", _synthesize, "make the synthetic images from the detector alone")
    train = command("train", _train, "quantize, calibrate and train on the synthetic images")
    evaluate = command("evaluate", _evaluate, "COCO's AP of `weights`: a checkpoint, a run or an export")
    for sub in (run, synthesize, train, evaluate):
        sub.add_argument("--gpus", metavar="N", type=int, help="a process on each of N GPUs (default: one process)")
    synthesize.add_argument(
        "--for", metavar="TOOL", dest="tool", help="also as ultralytics, onnxruntime, openvino, tensorrt or npy read it"
    )
    synthesize.add_argument("--out", metavar="DIR", type=Path, help="folder for --for (calibration_TOOL)")
    layers = command("sensitivity", _sensitivity, "how much each layer's rounding alone changes the predictions")
    layers.add_argument("--figure", metavar="FILE", type=Path, help="also draw them into FILE (SVG)")
    for sub in (evaluate, layers):
        sub.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers to FILE")
    _add_predict(commands)
    _add_export(commands)
    _add_report(commands)
    about = _command(
        commands, "info", _info, "what a checkpoint, graph, run, quantized or exported folder or image set is"
    )
    about.add_argument("file", metavar="FILE", type=Path, help="file or folder; nothing in it is run")
    about.add_argument("--json", metavar="FILE", type=Path, help="also write it to FILE")
    keys = _command(commands, "keys", _keys, "list the settings, their values, defaults and meanings")
    keys.add_argument("word", metavar="WORD", nargs="?", default="", help="only those with it in name or description")
    lines = (f"  {name:<13}{sub.description}" for name, sub in commands.choices.items())
    parser.description = "\n".join([ABOUT, "", "commands:", *lines])
    return parser


def _command(commands: Any, name: str, action: Action, summary: str, epilog: str = "") -> argparse.ArgumentParser:
    options = {"description": summary, "epilog": epilog, "formatter_class": _form}
    sub: argparse.ArgumentParser = commands.add_parser(name, allow_abbrev=False, **options)
    sub.set_defaults(action=action)
    return sub


def _form(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=16, width=110)


def _add_predict(commands: Any) -> None:
    drawn = _command(commands, "predict", _predict, "draw what a run or a checkpoint detects into copies of images")
    drawn.add_argument("weights", metavar="RUN", type=Path, help="run folder (its quantized detector) or checkpoint")
    drawn.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="image file or folder of images")
    drawn.add_argument("--out", metavar="DIR", type=Path, default=Path("predictions"), help="where to (predictions)")
    drawn.add_argument("--confidence", metavar="P", type=fraction, default=0.25, help="lowest score to draw (0.25)")
    drawn.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    drawn.add_argument("--family", metavar="NAME", help="of a float checkpoint whose family is not recognised")


def _add_export(commands: Any) -> None:
    export = _command(commands, "export", _export, "write a run's detector for a runtime, into a folder of its own")
    export.add_argument("run", metavar="RUN", type=Path, help="run folder")
    export.add_argument("--to", metavar="RUNTIME", required=True, help="onnxruntime, openvino, opencv, tensorrt or fp8")
    export.add_argument("--out", metavar="DIR", type=Path, help="the new folder (RUN/export/RUNTIME)")
    export.add_argument("--size", metavar="HxW", type=sides, default=(0, 0), help="pixels, 640 or 480x640 (the run's)")
    export.add_argument("--batch", metavar="N", type=whole(1, 1024), default=1, help="images of one inference (1)")
    export.add_argument("--dynamic", action="store_true", help="batch, height and width may differ from call to call")
    export.add_argument(
        "--opset",
        metavar="N",
        type=whole(17, 20),
        default=17,
        help="of ONNX, 17 to 20 (17); 4-bit weights take 21",
    )
    export.add_argument("--container", choices=("packed", "int8"), default="packed", help="how 4-bit weights are kept")
    export.add_argument("--activations", metavar="8", type=int, choices=(8,), help="minifloat activations in INT8")
    export.add_argument("--any-profile", action="store_true", help="also a quantization.profile that is slow there")
    timed = _command(commands, "benchmark", _benchmark, "time an exported folder beside the float detector")
    timed.add_argument("folder", metavar="FOLDER", type=Path, help="that `zsqdet export` made")
    timed.add_argument(
        "--threads", metavar="N", type=whole(0, 1024), nargs="+", default=[1, 0], help="threads; 0: all (1 0)"
    )
    timed.add_argument(
        "--trace", metavar="DIR", type=Path, help="keep the runtime's own timings and optimised graph in DIR"
    )
    timed.add_argument(
        "--rounds", metavar="N", type=whole(1, 100_000), default=30, help="inferences of each, in turns (30)"
    )


def _add_report(commands: Any) -> None:
    report = _command(commands, "report", _report, "write the report of each run, and a page that compares several")
    report.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder")
    report.add_argument("--out", metavar="FILE", type=Path, help="where the comparison goes (beside the first run)")
    report.add_argument(
        "--labels", metavar="FILE", type=Path, help="COCO file to compare the labels of the images with"
    )


def _config(arguments: argparse.Namespace) -> ExperimentConfig:
    given: Path = arguments.config
    if arguments.command == "evaluate" and (given.is_dir() or given.suffix in (".onnx", ".xml")):
        from common.pipeline.run_dir import config_of_run

        return config_of_run(given, arguments.overrides)
    if given.name == "config.yaml" and (given.parent / "environment.json").is_file():  # of a run: it is repeated
        from common.pipeline.run_dir import stored_config

        return stored_config(given.parent, arguments.overrides)
    return load_config(arguments.config, arguments.overrides)


def _check_outputs(arguments: argparse.Namespace, config: ExperimentConfig) -> None:
    """Before the work whose numbers they are to hold."""
    data, own = config.data, config.synthesis.annotations
    inputs = (arguments.config, config.weights, data.dataset, data.annotations, own)
    check_output(arguments.json, inputs, ".json")
    check_output(getattr(arguments, "figure", None), inputs)


def _keys(arguments: argparse.Namespace) -> None:
    found = reference(arguments.word)
    if not found:
        raise UserError(f"keys: found {arguments.word!r}, in no name and no description of a key; see zsqdet keys")
    print(found)


def _synthesize(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    from common.deployment.calibration_set import calibration_folder, write_calibration_set
    from common.pipeline import stages

    out = calibration_folder(arguments.tool, arguments.out)  # before the work
    imageset = stages.synthesize(config)
    if out and is_first():
        write_calibration_set(imageset, out, arguments.tool)
    _print(out or imageset)


def _train(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    from common.pipeline import stages

    _print(stages.train(config))


def _evaluate(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    _check_outputs(arguments, config)
    from common.pipeline import stages
    from common.reporting.tables import fidelity_lines, metric_lines

    metrics = stages.evaluate(config)
    if metrics.get("fidelity") and is_first():
        from common.reporting.report import write_report

        print(*fidelity_lines(metrics), write_report(config.weights), sep="\n")
    _print("\n".join([*metric_lines(metrics), metrics["protocol"]]))
    if arguments.json and is_first():
        write_json(arguments.json, metrics)


def _run(arguments: argparse.Namespace) -> None:
    run, *made = complete(_config(arguments))
    if not is_first():
        return
    from common.pipeline.run_dir import results
    from common.reporting.tables import result_lines

    print(*result_lines(results(run)), *made, sep="\n")


def complete(config: ExperimentConfig) -> list[Path]:
    """All stages, the report and the export: the run folder and, from the first process, the other two.

    Raises:
        UserError: a mistake in the configuration, the checkpoint or the data.
    """
    from common.pipeline import stages
    from common.pipeline.export import check_packages, export_once
    from common.reporting.report import write_report

    if config.export:
        check_packages()
    run = stages.run(config)
    if not is_first():
        return [run]
    return [run, write_report(run), *([export_once(run, config.export)] if config.export else [])]


def _info(arguments: argparse.Namespace) -> None:
    check_output(arguments.json, [arguments.file], ".json")
    from common.reporting.info import describe, lines

    found = describe(arguments.file)
    print(*lines(found), sep="\n")
    if arguments.json:
        write_json(arguments.json, found)


def _sensitivity(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    _check_outputs(arguments, config)
    from dataclasses import asdict

    from common.pipeline import stages
    from common.reporting.figures import draw_sensitivity
    from common.reporting.tables import sensitivity_lines

    found = stages.sensitivity(config)
    print(*sensitivity_lines(found), sep="\n")
    if arguments.json:
        write_json(arguments.json, [asdict(entry) for entry in found])
    if arguments.figure:
        draw_sensitivity(found, arguments.figure)


def _predict(arguments: argparse.Namespace) -> None:
    from common.reporting.predict import predict

    options = {"confidence": arguments.confidence, "family": arguments.family, "device": arguments.device}
    for path in predict(arguments.weights, arguments.images, arguments.out, **options):
        print(path)


def _export(arguments: argparse.Namespace) -> None:
    from common.deployment.targets import Options
    from common.pipeline.export import export

    given = {name: value for name, value in vars(arguments).items() if name in Options.__dataclass_fields__}
    out, parity = export(arguments.run, Options(target=arguments.to, **given), arguments.out)
    nodes = ", ".join(f"{count} {kind}" for kind, count in parity.nodes.most_common())
    print(f"checked against float64: {nodes}; {parity.differing} of {parity.codes} codes differ, by {parity.largest}")
    print(out)


def _benchmark(arguments: argparse.Namespace) -> None:
    from common.deployment.benchmark import timing_lines
    from common.deployment.runtime import graph_file
    from common.deployment.targets import read_options
    from common.pipeline.export import benchmark

    found = benchmark(arguments.folder, arguments.threads, arguments.rounds, arguments.trace)
    print(*timing_lines(read_options(arguments.folder).target, graph_file(arguments.folder), *found), sep="\n")


def _report(arguments: argparse.Namespace) -> None:
    from common.reporting.report import write_report

    # runs/* has the last comparison in it.
    runs = [run for run in arguments.runs if run.suffix != ".html"] or arguments.runs
    check_output(arguments.out, [run / "report.html" for run in runs], ".html")
    for run in runs:
        print(write_report(run, arguments.labels))
    if len(runs) > 1:
        from common.reporting.comparison import NAME, write_comparison

        print(write_comparison(runs, arguments.out or runs[0].resolve().parent / NAME))


if __name__ == "__main__":
    sys.exit(main())
