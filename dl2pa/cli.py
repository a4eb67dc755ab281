"""The command `dl2pa`: parses, hands over to `dl2pa.commands`, turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dl2pa import __version__
from dl2pa.commands import config
from dl2pa.console import safe_output
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USER_ERROR, TrainingFailure, UserError


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors as ours and no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UserError("command line", " ".join(sys.argv[1:]), message, f"See `{self.prog} --help`.")


def build_parser() -> argparse.ArgumentParser:
    """All commands and options; imports nothing heavy."""
    parser = _Parser(prog="dl2pa", description="Train classifiers on fixed hyperspherical prototypes.")
    parser.add_argument("--version", action="version", version=f"dl2pa {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--json", action="store_true", help="last line of standard output: one JSON object"
        )
        return command

    train = add("train", "Train a configuration; the same command on the same directory resumes.")
    _add_config(train)
    train.add_argument("--nproc", type=int, metavar="N", help="processes on this machine (launch.nproc)")
    train.add_argument("--run-dir", type=_path, metavar="DIR", help="default: runs/<config>-<fingerprint>")

    _add_cluster(add)
    _add_comparison(add)
    _add_data(commands)
    evaluate = add("evaluate", "Validate a run's model: exact counts, top-1, top-5, calibration.")
    evaluate.add_argument("run", type=_path, help="run directory")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.val_root=DIR")
    evaluate.add_argument(
        "--checkpoint",
        choices=("final", "latest", "best"),
        default="final",
        help="which weights (default: final)",
    )
    evaluate.add_argument(
        "--embedding",
        action="store_true",
        help="without its class vectors: neighbors, class means; on any data set, data.* as overrides",
    )

    sync = add("sync", "Send a run's spooled tracking events to MLflow, once each.")
    sync.add_argument("run", type=_path, nargs="*", help="run directory")
    sync.add_argument(
        "--all",
        type=_path,
        nargs="?",
        const=Path("runs"),
        metavar="DIR",
        help="every run in this folder, at any depth (runs)",
    )
    sync.add_argument("--uri", help="MLflow server or store; default: the run's own")

    ui = add("ui", "Start MLflow's server on the local store, until Ctrl-C.")
    ui.add_argument(
        "--runs", type=_path, default=Path("runs"), metavar="DIR", help="folder of the runs (runs)"
    )
    ui.add_argument("--uri", help="another store of this machine: sqlite:///FILE, postgresql://…")
    ui.add_argument("--host", type=_text, default="127.0.0.1", help="address to listen at (127.0.0.1)")
    ui.add_argument(
        "--allow-others",
        type=_text,
        metavar="NAMES",
        help="required where --host is not loopback: the host names that other machines use, comma-separated",
    )
    ui.add_argument("--port", type=int, default=5000, help="0: any free one (5000)")

    register = add("register", "Register a finished run's model in MLflow; doing it again changes nothing.")
    register.add_argument("run", type=_path, help="run directory")
    register.add_argument("--name", required=True, help="registered model, made if new")
    register.add_argument(
        "--alias",
        action="append",
        default=[],
        help="point it here, for example candidate or champion; repeatable",
    )
    register.add_argument("--uri", help="MLflow server or store; default: the run's own")

    predict = add("predict", "Classify images with a finished run, an export or a model file.")
    predict.add_argument("model", type=_path, help="run directory, export or model.safetensors")
    predict.add_argument("images", type=_path, nargs="+", metavar="IMAGE")
    predict.add_argument("--top", type=int, default=5, metavar="K", help="classes shown an image (default 5)")

    export = add("export", "Write a run's model so that it stands alone.")
    export.add_argument("run", type=_path, help="run directory")
    export.add_argument("--out", type=_path, metavar="DIR", help="default: RUN/export")
    export.add_argument("--checkpoint", choices=("final", "latest", "best"), default="final")
    export.add_argument("--onnx", action="store_true", help="model.onnx too, checked against the original")
    export.add_argument("--mlflow", action="store_true", help="mlflow/ too, for `mlflow models serve -m`")

    prototypes = add("prototypes", "Place prototypes on the sphere and write them with their certificate.")
    prototypes.add_argument("--num-classes", "--num_centroids", type=int, required=True, metavar="C")
    prototypes.add_argument("--dim", "--space_dim", type=int, required=True, metavar="D")
    prototypes.add_argument("--construction", default="auto", help="default: the best known for C and D")
    prototypes.add_argument("--seed", type=int, default=0)
    prototypes.add_argument(
        "--out", type=_path, metavar="FILE", help=".safetensors or .npy; default: not written"
    )
    prototypes.add_argument(
        "--plot",
        type=_path,
        metavar="FILE",
        help=".png, .pdf or .svg: the cosines, for D <= 3 the sphere too",
    )
    prototypes.add_argument(
        "--beside",
        type=_path,
        metavar="FILE",
        help="score these too: a file of ours, .npy, the authors' .pth",
    )
    prototypes.add_argument("--batch_size", type=int, help=argparse.SUPPRESS)
    prototypes.add_argument("--num_epoch", type=int, help=argparse.SUPPRESS)

    config.add_arguments(add("config", "Print a resolved configuration, or explain the configuration keys."))
    estimate = add("estimate", "Hours, memory and cost of a configuration, from a short probe of it here.")
    _add_config(estimate)
    estimate.add_argument("--devices", type=int, default=1, metavar="N", help="GPUs like this one (1)")
    estimate.add_argument("--steps", type=int, default=20, metavar="N", help="measured (20)")
    estimate.add_argument(
        "--link", type=float, default=50.0, metavar="GB/S", help="between devices, each way (50)"
    )
    estimate.add_argument("--price", type=float, metavar="X", help="of a device for an hour")
    bench = add(
        "bench", "Measure a part of the program; ratios and the fastest of n, with hardware and versions."
    )
    bench.add_argument(
        "name",
        choices=(
            "pipeline",
            "train",
            "scaling",
            "together",
            "checkpoint",
            "matching",
            "classes",
            "index",
            "tracking",
        ),
        help="what to measure",
    )
    bench.add_argument(
        "--classes", default="100,1000", help="comma-separated class counts (default 100,1000)"
    )
    bench.add_argument("--dim", type=int, default=512)
    bench.add_argument("--points", type=int, default=100_000, help="tracking: metric points a run (100000)")
    bench.add_argument("--runs", type=int, default=3, help="tracking: runs at a time (3)")
    bench.add_argument(
        "--entries", default="1281167", help="index: comma-separated numbers of images (default 1281167)"
    )
    bench.add_argument(
        "--models",
        metavar="LIST",
        help="backbones (train: resnet50; scaling, together, checkpoint, classes: resnet32)",
    )
    bench.add_argument(
        "--step-ms",
        type=float,
        metavar="X",
        help="scaling: of one GPU, for the model of many (this machine's)",
    )
    bench.add_argument("--processes", default="1,2,4", metavar="LIST", help="scaling, together (1,2,4)")
    bench.add_argument(
        "--loaders",
        metavar="LIST",
        help="train: synthetic, resident, dali, torchvision (synthetic); pipeline: ours, native-dali, torchvision, "
        "synthetic (these four), packed",
    )
    bench.add_argument(
        "--data", type=_path, metavar="ROOT", help="folder of images (pipeline: JPEGs made up for it)"
    )
    bench.add_argument(
        "--image-size", type=int, metavar="S", help="train: pixels (32 for CIFAR's networks, else 224)"
    )
    bench.add_argument("--precision", metavar="LIST", help="fp32, bf16, fp16 (GPU: bf16, CPU: fp32)")
    bench.add_argument("--channels-last", default="on", metavar="LIST", help="train: on, off (on)")
    bench.add_argument("--compile", default="off", metavar="LIST", help="train: on, off, graphs (off)")
    bench.add_argument(
        "--batch-size", type=int, metavar="N", help="(128; pipeline: 64; ResNet-50 on a CPU: 8)"
    )
    bench.add_argument("--steps", type=int, metavar="N", help="a turn (20; ResNet-50 on a CPU: 1)")
    bench.add_argument("--rounds", type=int, default=5, metavar="N")
    bench.add_argument("--nproc", type=int, default=2, metavar="N", help="matching: processes (2)")
    doctor = add("doctor", "Check versions, devices, DALI, SLURM, MLflow and write access.")
    doctor.add_argument("--cluster", action="store_true", help="look from a node too, by a job of a minute")
    doctor.add_argument("--partition", metavar="P", help="where that job runs")
    return parser


def _add_data(commands: Any) -> None:
    """What is done to a data set before any training."""
    text = "Index a data set, or pack it into shards."
    data = commands.add_parser("data", help=text, description=text)
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument(
            "--json", action="store_true", help="last line of standard output: one JSON object"
        )
        action.add_argument("root", type=_path, metavar="ROOT", help="folder of the data set")
        action.add_argument("--workers", type=int, metavar="N", help="processes (default: the cores)")
        return action

    index = add("index", "List every image with its place, label and size, and find damaged ones.")
    index.add_argument("--out", type=_path, metavar="FILE", help="default: ROOT/dl2pa.index")
    pack = add("pack", "Copy an image folder into tar shards in WebDataset's form, with their index.")
    pack.add_argument("out", type=_path, metavar="OUT", help="folder of the shards")
    pack.add_argument("--short-side", type=int, metavar="PIXELS", help="resample larger images to this")
    pack.add_argument("--quality", type=int, default=90, help="of resampled JPEGs (90)")
    pack.add_argument("--shard-size", type=_text, default="1GiB", metavar="SIZE", help="about (1GiB)")


def _add_cluster(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """The commands of a SLURM cluster."""
    submit = add("submit", "Queue a training on SLURM; it requeues itself until it is finished.")
    _add_config(submit)
    _add_request(submit)
    submit.add_argument("--run-dir", type=_path, metavar="DIR", help="default: runs/<config>-<fingerprint>")
    submit.add_argument(
        "--array",
        action="append",
        metavar="KEY=VALUES",
        help="one run a value: train.seed=0..4, optim.lr=0.1,0.2, config=A.yaml,B.yaml; repeated: all combinations",
    )
    submit.add_argument("--dry-run", action="store_true", help="check everything, print the sbatch script")

    resume = add("resume", "Submit a run again, on the same or other resources.")
    resume.add_argument("run", type=_path, help="run directory, or its last job's number")
    resume.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.epochs=200")
    _add_request(resume)

    jobs = add("jobs", "List this user's runs on the cluster: state, place, progress.")
    jobs.add_argument(
        "job", nargs="*", type=_text, help="job number, array number or run directory; default: all"
    )
    jobs.add_argument("--all", action="store_true", help="ended ones too")

    logs = add("logs", "Show a job's log, what went wrong on top.")
    logs.add_argument("job", type=_text, help="job number or run directory")
    logs.add_argument("--rank", type=int, metavar="R", help="the log of one process")
    logs.add_argument("--follow", action="store_true", help="go on until the job has ended")

    cancel = add("cancel", "Stop jobs: save, then end without requeueing.")
    cancel.add_argument("job", nargs="+", type=_text, help="job number, array number or run directory")
    cancel.add_argument("--now", action="store_true", help="end at once, without saving")


def _add_comparison(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Many runs, and what came of them."""
    sweep = add("sweep", "Train many configurations, here or on SLURM; the same command resumes.")
    sweep.add_argument(
        "overrides",
        nargs="*",
        metavar="CONFIG key=value",
        help="YAML configuration, or a file with `sweep:`; then overrides for every run",
    )
    sweep.add_argument(
        "--array",
        action="append",
        metavar="KEY=VALUES",
        help="one run a value: train.seed=0..4, optim.lr=0.1,0.2, config=A.yaml,B.yaml; repeated: all combinations",
    )
    sweep.add_argument("--seeds", metavar="A..B", help="short for --array train.seed=A..B")
    sweep.add_argument(
        "--cells",
        action="append",
        metavar="TABLE[:ROW[:COLUMN]]",
        help="in place of a configuration: what stands for these cells of the published tables",
    )
    sweep.add_argument(
        "--variant",
        action="append",
        type=_text,
        metavar="NAME",
        help="of a file's variants only this one; repeated: these",
    )
    sweep.add_argument("--parallel", type=int, metavar="K", help="runs at a time on this machine (1)")
    sweep.add_argument("--run-dir", type=_path, metavar="DIR", help="folder of the runs (runs)")
    sweep.add_argument(
        "--tables", type=_path, metavar="FILE", help="other tables than configs/published.yaml"
    )
    sweep.add_argument("--dry-run", action="store_true", help="check everything, print what would be started")
    sweep.add_argument(
        "--slurm", action="store_true", help="queue the runs as an array, as `dl2pa submit` does"
    )
    _add_request(sweep)

    report = add("report", "Show finished runs as tables: mean and spread over seeds, last and best.")
    report.add_argument("run", type=_path, nargs="*", help="run directory")
    report.add_argument("--all", type=_path, metavar="DIR", help="every run in this folder, at any depth")
    report.add_argument(
        "--compare",
        type=_path,
        nargs=2,
        metavar=("RUN_A", "RUN_B"),
        help="what differs between two runs, and whether seeds explain it; --all DIR: where their other seeds are",
    )
    report.add_argument("--published", action="store_true", help="beside the published tables")
    report.add_argument(
        "--tables", type=_path, metavar="FILE", help="other tables than configs/published.yaml"
    )
    report.add_argument(
        "--out", type=_path, metavar="DIR", help="write report.md, report.html and plots there"
    )
    report.add_argument(
        "--mlflow", metavar="EXPERIMENT", help="log them as artifacts of the experiment's run `report`"
    )
    report.add_argument(
        "--uri", help="MLflow server or store; default: MLFLOW_TRACKING_URI, else the runs' own"
    )


def _add_request(parser: argparse.ArgumentParser) -> None:
    """What a job asks of the cluster; no default here, the request has them."""
    parser.add_argument("--nodes", type=int, metavar="N", help="default 1")
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="and processes; 0: launch.nproc processes on CPUs"
    )
    parser.add_argument(
        "--time", type=_text, metavar="T", help="limit of one attempt: minutes, H:MM:SS or D-HH:MM:SS"
    )
    parser.add_argument("--stop-before", type=int, metavar="S", help="save so long before the limit (180 s)")
    for name in ("partition", "account", "qos", "constraint", "exclude", "mem"):
        parser.add_argument(f"--{name}", type=_text, metavar=name[0].upper(), help=f"as sbatch --{name}")
    parser.add_argument("--cpus-per-gpu", type=int, metavar="N", help="cores of each process")
    parser.add_argument("--container", type=_text, metavar="IMAGE", help="run in it, by Pyxis or Apptainer")
    parser.add_argument("--after", type=_text, metavar="JOB", help="start when that job has ended well")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    with safe_output():
        return _run(list(sys.argv[1:] if argv is None else argv))


def _run(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        args = _parse(arguments)
        command = importlib.import_module(f"dl2pa.commands.{args.command}")
        return int(command.run(args))
    except UserError as error:
        return _report(error.as_dict(), str(error), "--json" in arguments, EXIT_USER_ERROR)
    except BrokenPipeError:  # `| head`: whoever read has had enough
        sys.stdout = None
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_DONE
    except (TrainingFailure, OSError) as error:
        fields = {"field": None, "value": None, "message": str(error), "remedy": None}
        return _report(fields, str(error), "--json" in arguments, EXIT_FAILURE)
    except KeyboardInterrupt:
        print("dl2pa: interrupted before anything was begun", file=sys.stderr)
        return 130


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parse; overrides may stand anywhere, which argparse's own lists may not."""
    args, rest = build_parser().parse_known_args(arguments)
    stray = [text for text in rest if text.startswith("-") or not hasattr(args, "overrides")]
    if stray:
        raise UserError("command line", stray[0], "unknown option", f"See `dl2pa {args.command} --help`.")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _text(text: str) -> str:
    """Any text but an empty one (an unset shell variable), which would quietly mean no wish at all."""
    if not text:
        raise argparse.ArgumentTypeError("an empty value (an unset variable?)")
    return text


def _path(text: str) -> Path:
    """A path; an empty one (an unset shell variable) would quietly mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path (an unset variable?)")
    return Path(text)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=_path, help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.epochs=5")


def _report(fields: dict[str, Any], text: str, as_json: bool, code: int) -> int:
    print(f"dl2pa: {text}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": fields}), flush=True)
    return code
