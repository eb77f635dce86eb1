"""The console command ``spafit``. Bad input gives a one-line error and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import itertools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn, TextIO

from spafit.cli import bus_errors
from spafit.cli.option_types import (
    as_address,
    as_name,
    as_new_path,
    as_number,
    as_part,
    as_path,
    as_seed,
    as_size,
    as_whole,
    one_line,
)
from spafit.cli.shared_options import (
    MODEL_HELP,
    SETTINGS,
    add_lora_options,
    add_model_and_data_options,
    add_no_mapped,
    add_plan_options,
    add_run_options,
    add_settings,
    data_options,
    default_folder,
    plan_options,
)
from spafit.errors import ConfigError, SpafitError, StoppedError, TrainingError
from spafit.machine.busy import note_if_busy
from spafit.machine.launched import launched
from spafit.machine.terminal import lasting
from spafit.runs.train_config import TrainConfig
from spafit.version import __version__

_DESCRIPTION = "Fine-tune BERT by strata of layers (SPAFIT): frozen, biases, LoRA and biases."

_OF_SEARCH = ("epochs", "batch_size", "learning_rate", "max_length", "metric", "device", "quiet")
"""Those that are options of `spafit search`, too."""

_PROBED = ("sst-2", "cola")
"""The tasks that `spafit inspect --forgetting` probes."""

_EXAMPLES = """\
examples:
  spafit demo
  spafit plan SPAFIT-4-9-II
  spafit download glue rte && spafit download model google-bert/bert-large-cased
  spafit train --task rte --method SPAFIT-4-9-II --out runs/rte
  spafit eval runs/rte
  spafit grid table-2 --dry-run
  spafit predict runs/rte --submission submissions
  spafit report runs
  spafit inspect runs/rte --forgetting

exit codes: 0 success, 1 the run failed, 2 the input is wrong,
            128 + n stopped by signal n
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    The reader of the output may have exited, or the disk be full. Standard error is then dropped,
    and so is standard output if it only reports on work whose result is elsewhere.

    Parameters
    ----------
    arguments : sequence of str, optional
        None means the process's own.

    Returns
    -------
    int
        0; 1 if training failed or the doctor found a fault; 2 if the input is wrong or there is
        none; 128 + n if a run was stopped by signal n.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # its descriptor is closed; print(file=None) would use sys.stdout
            null = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, os.fdopen(null, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):  # for characters that its encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        with contextlib.redirect_stderr(lasting(sys.stderr)), warnings.catch_warnings():
            warnings.showwarning = _print_note
            given = sys.argv[1:] if arguments is None else arguments
            parser = _parser()
            if not given:
                parser.print_help()
                parser.error("a verb is missing")
            _refuse_unknown(parser, given)
            return _run(parser.parse_args(given))
    finally:
        _let_go(sys.stdout)
        _let_go(sys.stderr)


def _print_note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line, without the place in the source that it comes from."""
    print(f"spafit: note: {one_line(str(message))}", file=sys.stderr)


def _run(parsed: argparse.Namespace) -> int:
    prints_only = _prints_only(parsed)
    try:
        with contextlib.redirect_stdout(sys.stdout if prints_only else lasting(sys.stdout)):
            with bus_errors.explained(_mend_of_bus_error(parsed)):
                code = _dispatch(parsed)
            sys.stdout.flush()
            return code
    except StoppedError as stopped:
        if not stopped.is_told_elsewhere:
            print(f"spafit: {one_line(str(stopped))}", file=sys.stderr)
        return 128 + stopped.signal
    except (SpafitError, OSError) as error:
        if isinstance(error, BrokenPipeError) and prints_only:  # `spafit plan ... | head`
            return 0
        if parsed.debug:
            traceback.print_exc()
        if not getattr(error, "is_told_elsewhere", False):
            print(f"spafit: {one_line(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2
    except KeyboardInterrupt:
        print("spafit: interrupted", file=sys.stderr)
        return 130


def _mend_of_bus_error(parsed: argparse.Namespace) -> str:
    mend = "copy to another name and rename it (mv) to replace a file"
    return f"{mend}, or give --no-mapped" if hasattr(parsed, "mapped") else mend


def _prints_only(parsed: argparse.Namespace) -> bool:
    """Return whether the command only prints, so that it may end when its output is closed."""
    options = ("save", "output", "submission", "out")
    writes = any(getattr(parsed, option, None) for option in options)
    if parsed.verb == "grid":
        return bool(parsed.dry_run)
    return (
        parsed.verb not in ("train", "demo", "download", "report", "probe", "search") and not writes
    )


def _let_go(stream: TextIO) -> None:
    """Drop output that cannot be written: Python would retry at exit, and exit with 120."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # it has no descriptor any more
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


class _Parser(argparse.ArgumentParser):
    """A parser with one-line errors, without the usage before them."""

    verbs: Mapping[str, _Parser] = MappingProxyType({})

    def options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]

    def error(self, message: str) -> NoReturn:
        see = "" if message.endswith("?") else f"; see {self.prog} --help"
        self.exit(2, f"{self.prog}: {one_line(message)}{see}\n")


def _dispatch(parsed: argparse.Namespace) -> int:
    if parsed.verb != "train" and launched() is not None:
        raise ConfigError(
            f"spafit {parsed.verb} works in one process, and torchrun has started several; many "
            "processes are for spafit train"
        )
    if parsed.verb == "doctor":
        from spafit.cli import examining

        text, well = examining.report()
        print(text)
        return 0 if well else 1
    if parsed.verb == "demo":
        if parsed.where:
            from spafit.weights.hub import local_folder

            print(local_folder(parsed.model))
            return 0
        from spafit.demo.run import run_demo

        note_if_busy()
        run_demo(
            out=parsed.out,
            model=parsed.model,
            seed=parsed.seed,
            ask=parsed.ask,
            overwrite=parsed.overwrite,
        )
        return 0
    if parsed.verb == "train":
        _train(parsed)
        return 0
    if parsed.verb == "predict":
        _predict(parsed)
        return 0
    if parsed.verb == "grid":
        return _grid(parsed)
    if parsed.verb == "report":
        from spafit.cli.reporting import run_report

        return run_report(
            parsed.folder, parsed.out, parsed.submission, data=parsed.data, model=parsed.model
        )
    if parsed.verb == "probe":
        _probe(parsed)
        return 0
    if parsed.verb == "search":
        _search(parsed)
        return 0
    if parsed.verb == "inspect":
        _inspect(parsed)
        return 0
    if parsed.verb == "eval":
        from spafit.cli.evaluating import evaluate_run
        from spafit.cli.trained import Trained
        from spafit.files.replacing import refuse_place

        if parsed.errors is not None:
            refuse_place(parsed.errors)
        trained = Trained(parsed.run, parsed.model, parsed.mapped, parsed.average, parsed.precision)
        evaluate_run(
            trained,
            parsed.data,
            parsed.split,
            form=trained.table_form(parsed.delimiter, parsed.unquoted, parsed.encoding),
            max_bad_rows=trained.bad_rows_allowed(parsed.max_bad_rows),
            errors=parsed.errors,
        )
        return 0
    from spafit.cli import commands

    if parsed.verb == "plan":
        commands.run_plan(plan_options(parsed), parsed.model, parsed.num_labels, parsed.save)
    else:
        commands.run_download(parsed.what, parsed.names, parsed.folder)
    return 0


def _train(parsed: argparse.Namespace) -> None:
    settings = {name: getattr(parsed, name) for name in SETTINGS if name != "recompute"}
    config = TrainConfig(seed=parsed.seeds[0], recompute=tuple(parsed.recompute), **settings)
    if parsed.together and len(parsed.seeds) < 2:
        raise ConfigError("--together is for several seeds, such as --seeds 0 1 2; leave it out")
    from spafit.cli.own_data import refuse_wrong_place

    refuse_wrong_place(parsed.task, parsed.data)
    from spafit.cli.training import ModelOptions, run_train  # after what is wrong without torch

    note_if_busy()
    run_train(
        data_options(parsed),
        plan_options(parsed),
        ModelOptions(
            parsed.model,
            parsed.revision,
            parsed.split_special_tokens,
            parsed.lowercase,
            parsed.mapped,
            parsed.start_from,
        ),
        parsed.seeds,
        config,
        parsed.init_seed,
        parsed.together,
    )


def _grid(parsed: argparse.Namespace) -> int:
    from spafit.experiments.grid.start import GridOptions, run_grid
    from spafit.tasks.download import glue_cache

    options = GridOptions(
        file=parsed.file,
        out=parsed.out,
        data=glue_cache() if parsed.data is None else parsed.data,
        model=parsed.model,
        workers=parsed.workers,
        threads=parsed.threads,
        ray=parsed.ray,
        part=parsed.cells,
    )
    return run_grid(options, dry=parsed.dry_run)


def _probe(parsed: argparse.Namespace) -> None:
    from spafit.cli.own_data import refuse_wrong_place
    from spafit.experiments.probe import linguistic

    is_generated = parsed.task in linguistic.TASKS and parsed.data is None
    if is_generated:
        for option in ("dev", "text", "text2", "label", "regression"):
            if getattr(parsed, option):
                raise ConfigError(
                    f"--{option} is for a file of your own; the task {parsed.task} is generated"
                )
        train, dev = linguistic.datasets(parsed.task)
        name = parsed.task
    else:
        refuse_wrong_place(parsed.task, parsed.data)
        options = data_options(parsed)
        name = options.task_name
    from spafit.experiments.probe.report import run_probe  # after what is wrong without torch

    note_if_busy()
    if not is_generated:
        train, dev = options.load()
    run_probe(
        parsed.model,
        train,
        dev,
        seeds=parsed.seeds,
        rows=parsed.rows,
        out=default_folder("probes", name) if parsed.out is None else parsed.out,
        revision=parsed.revision,
        mapped=parsed.mapped,
        quiet=parsed.quiet,
    )


def _search(parsed: argparse.Namespace) -> None:
    config = TrainConfig(**{name: getattr(parsed, name) for name in _OF_SEARCH})
    from spafit.cli.own_data import refuse_wrong_place

    refuse_wrong_place(parsed.task, parsed.data)
    data = data_options(parsed)
    from spafit.experiments.search.start import SearchOptions, run_search

    options = SearchOptions(
        model=parsed.model,
        revision=parsed.revision,
        mapped=parsed.mapped,
        r=parsed.r,
        alpha=parsed.alpha,
        parameters=parsed.parameters,
        minutes=parsed.minutes,
        plans=parsed.plans,
        rows=parsed.rows,
        seeds=tuple(parsed.seeds),
        selection_seed=parsed.selection_seed,
        out=default_folder("searches", data.task_name) if parsed.out is None else parsed.out,
        config=config,
    )
    note_if_busy()
    run_search(options, *data.load(), {**data.about(), "max_bad_rows": data.max_bad_rows})


def _inspect(parsed: argparse.Namespace) -> None:
    for option in ("tasks", "rows", "seeds"):
        if getattr(parsed, option) is not None and not parsed.forgetting:
            raise ConfigError(f"--{option} needs --forgetting")
    for option in ("texts", "data", "max_bad_rows"):
        if getattr(parsed, option) is not None and not (parsed.forgetting or parsed.merging):
            name = option.replace("_", "-")
            raise ConfigError(f"--{name} needs --forgetting or --merging")
    from spafit.cli.inspecting import InspectOptions, run_inspect

    run_inspect(
        InspectOptions(
            run=parsed.run,
            model=parsed.model,
            mapped=parsed.mapped,
            merging=parsed.merging,
            forgetting=parsed.forgetting,
            texts=parsed.texts,
            tasks=parsed.tasks or _PROBED,
            data=parsed.data,
            max_bad_rows=parsed.max_bad_rows,
            rows=2000 if parsed.rows is None else parsed.rows,
            seeds=parsed.seeds or (0, 1, 2),
            out=parsed.out,
            quiet=parsed.quiet,
        )
    )


def _predict(parsed: argparse.Namespace) -> None:
    if parsed.output is not None and parsed.input is None:
        raise ConfigError("--output needs --input; --submission names its files itself")
    if parsed.max_bad_rows is not None and parsed.input is None:
        raise ConfigError("--max-bad-rows needs --input; a submission has every row")
    if parsed.encoding is not None and parsed.input is None:
        raise ConfigError("--encoding needs --input; GLUE's files are in UTF-8")
    if parsed.text2 and not parsed.text:
        raise ConfigError("--text2 needs --text")
    if parsed.submission is not None and len(parsed.run) > 1:
        raise ConfigError("--submission is for one run; give one after the other")
    from spafit.cli import predicting
    from spafit.cli.trained import Trained, TrainedTogether
    from spafit.files.replacing import refuse_place

    output = None if parsed.output == Path("-") else parsed.output
    is_stream = parsed.input == Path("-")
    if output is not None:
        refuse_place(output)
        predicting.refuse_to_replace(output, None if is_stream else parsed.input)
    if parsed.submission is not None:
        refuse_place(parsed.submission, is_folder=True)
    options = parsed.model, parsed.mapped, parsed.average, parsed.precision
    trained = (
        Trained(parsed.run[0], *options)
        if len(parsed.run) == 1
        else TrainedTogether(parsed.run, *options)
    )
    if parsed.text:
        predicting.predict_texts(
            trained, parsed.text, parsed.text2, probabilities=parsed.probabilities
        )
    elif parsed.submission is not None:
        data = parsed.data or Path(trained.recorded("data", "--data"))
        predicting.write_submissions(trained, data, parsed.submission)
    else:
        predicting.predict_rows(
            trained,
            sys.stdin.buffer if is_stream else parsed.input,
            output,
            probabilities=parsed.probabilities,
            form=trained.table_form(parsed.delimiter, parsed.unquoted, parsed.encoding),
            max_bad_rows=trained.bad_rows_allowed(parsed.max_bad_rows),
        )


def _refuse_unknown(parser: _Parser, given: Sequence[str]) -> None:
    """Name an unknown verb or option before argparse names what is lacking for want of it."""
    of = parser
    for text in itertools.takewhile(lambda text: text != "--", given):
        option = text.partition("=")[0]
        if re.match("--?[A-Za-z]", text) and " " not in text:  # argparse takes others for values
            if option not in of.options():
                of.error(f"unknown option {option:.60}{_did_you_mean(option, of.options())}")
        elif of is parser and text in parser.verbs:
            of = parser.verbs[text]
        elif of is parser:
            known = ", ".join(parser.verbs)
            nearest = _did_you_mean(text, parser.verbs) or f"; the verbs are {known}"
            of.error(f"unknown verb {text:.60}{nearest}")


def _initials(option: str) -> str:
    return "".join(word[0] for word in option.strip("-").split("-") if word)


def _did_you_mean(text: str, known: Iterable[str]) -> str:
    """Return the end of a message: the known words that a word begins, or else the nearest ones.

    Nearest are those whose initials it has, as ``--lr`` has those of ``--learning-rate``.
    """
    known = list(known)
    bare = text.strip("-").lower()
    near = [each for each in known if bare and each.startswith(text)]
    near = near or [each for each in known if len(bare) > 1 and _initials(each) == bare]
    near = near or difflib.get_close_matches(text, known, n=1)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _parser() -> _Parser:
    parser = _Parser(
        prog="spafit",
        allow_abbrev=False,
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"spafit {__version__}")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    parser.verbs = verbs.choices

    def verb(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return verbs.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}",
            parents=[common],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    for name, summary, example, add_options in _VERBS:
        add_options(verb(name, summary, example))
    return parser


def _add_eval_options(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("run", type=as_path, help="run folder of spafit train")
    add_run_options(evaluate)
    evaluate.add_argument("--split", choices=("dev", "train"), default="dev")
    evaluate.add_argument(
        "--errors", type=as_new_path, metavar="FILE", help="write all wrong predictions, with texts"
    )


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    demo.add_argument(
        "--out",
        type=as_new_path,
        default=Path("runs/demo"),
        help="where the run folders are, one a method (default %(default)s)",
    )
    add_settings(demo, "overwrite")
    demo.add_argument("--model", type=as_name, default="minilm", help=MODEL_HELP)
    demo.add_argument("--seed", type=as_seed, default=0, help="default %(default)s")
    demo.add_argument(
        "--ask",
        action="store_true",
        help="classify sentences from standard input at the end (on a terminal always)",
    )
    demo.add_argument(
        "--where", action="store_true", help="print the folder of the weights, and train nothing"
    )


def _add_drawing_options(plan: argparse.ArgumentParser) -> None:
    plan.add_argument(
        "method",
        help="a method of Table 1, SPAFIT-[N1]-[N2]-[I|II], houlsby, pfeiffer, parallel, ia3, "
        "linear-probe, or a plan file",
    )
    plan.add_argument(
        "--model",
        type=as_name,
        help="folder of weights, minilm, or hub name; default: bert-large-cased's sizes",
    )
    plan.add_argument(
        "--num-labels",
        type=as_size,
        default=3,
        help="outputs of the head (default %(default)s, as in Table 2)",
    )
    plan.add_argument(
        "--save", type=as_new_path, metavar="FILE", help="write the plan as JSON, for editing"
    )
    add_plan_options(plan)


def _add_download_options(download: argparse.ArgumentParser) -> None:
    download.add_argument("what", choices=("model", "glue"))
    download.add_argument(
        "names",
        nargs="*",
        type=as_name,
        help="hub names (owner/name or owner/name@revision), or tasks",
    )
    download.add_argument(
        "--folder", type=as_new_path, help="folder for GLUE's files; default: the cache"
    )


def _add_predict_options(predict: argparse.ArgumentParser) -> None:
    predict.add_argument(
        "run",
        nargs="+",
        type=as_path,
        help="run folder of spafit train; of several, each has a column of its name, and the first "
        "says how the input is read",
    )
    add_run_options(predict)
    target = predict.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--input",
        type=as_path,
        metavar="FILE",
        help="CSV, TSV, JSONL or parquet file, its labels are not read; - is standard input",
    )
    target.add_argument("--text", nargs="+", metavar="TEXT", help="predict texts given here")
    target.add_argument(
        "--submission",
        type=as_new_path,
        metavar="DIR",
        help="write GLUE's submission file for the test split",
    )
    predict.add_argument(
        "--text2", nargs="+", metavar="TEXT", default=[], help="second texts of pairs"
    )
    predict.add_argument(
        "--output",
        type=as_new_path,
        metavar="FILE",
        help="TSV, CSV or JSONL by its extension; default: standard output, as TSV",
    )
    predict.add_argument(
        "--probabilities", action="store_true", help="write the probability of every label, too"
    )


def _add_report_options(report: argparse.ArgumentParser) -> None:
    report.add_argument("folder", type=as_path, help="folder with runs of spafit train or grid")
    report.add_argument(
        "--out",
        type=as_new_path,
        metavar="DIR",
        help="where report.md, .csv, .tex and .html are written (default: in the folder itself)",
    )
    report.add_argument(
        "--submission",
        type=as_new_path,
        metavar="DIR",
        help="write GLUE's submission files, each by the best run of its task on dev, and the zip",
    )
    report.add_argument(
        "--data", type=as_path, help="GLUE's root, for --submission; default: as in training"
    )
    report.add_argument(
        "--model",
        type=as_name,
        help="folder of weights, minilm, or hub name, for --submission; default: as in training",
    )


def _add_train_options(train: argparse.ArgumentParser) -> None:
    train.add_argument("--task", help="a GLUE task, such as rte; or a name for data of your own")
    train.add_argument("--method", required=True, help="as for spafit plan")
    add_model_and_data_options(train)
    add_settings(train, "out", "overwrite")
    train.add_argument(
        "--split-special-tokens",
        action="store_true",
        help="read special tokens such as [SEP] in a text as plain text (default: as tokens, as in "
        "transformers)",
    )
    train.add_argument(
        "--lowercase",
        action=argparse.BooleanOptionalAction,
        help="lower-case the texts, or not (default: as the tokenizer's files say)",
    )
    add_plan_options(train)
    group = train.add_argument_group("training; the defaults are the paper's")
    group.add_argument(
        "--seeds",
        "--seed",
        type=as_seed,
        nargs="+",
        default=[TrainConfig().seed],
        metavar="SEED",
        help=f"one run each; several give mean and spread (default {TrainConfig().seed})",
    )
    group.add_argument(
        "--together",
        action="store_true",
        help="compute group 1 once for all seeds, and keep its output in memory; with "
        "--no-dropout-in-group-1",
    )
    group.add_argument(
        "--start-from",
        type=as_path,
        metavar="RUN",
        help="begin with what a run of the same method has trained, such as on a related task; its "
        "head is taken too if it has the same labels",
    )
    group.add_argument(
        "--init-seed",
        type=as_seed,
        help="seed of the initial values of head, LoRA and the like alone (default: --seed)",
    )
    add_settings(group, *(name for name in SETTINGS if name not in ("out", "overwrite")))


def _add_grid_options(grid: argparse.ArgumentParser) -> None:
    grid.add_argument(
        "file", type=as_name, help="a grid file, or table-1, table-2 or minilm, which come with it"
    )
    grid.add_argument(
        "--out",
        type=as_new_path,
        help="folder of the runs, which are resumed there (default: runs/ and the grid's name)",
    )
    grid.add_argument("--data", type=as_path, help="GLUE's root (default: the download cache)")
    grid.add_argument(
        "--model", type=as_name, help="folder of weights or hub name, in place of the grid's"
    )
    where = grid.add_mutually_exclusive_group()
    where.add_argument(
        "--workers", type=as_size, default=1, help="processes that train (default %(default)s)"
    )
    where.add_argument(
        "--ray",
        type=as_address,
        metavar="ADDRESS",
        help="have a Ray cluster train, each run as a task of its own: HOST:PORT, ray://HOST:PORT, "
        "auto (the cluster of this machine) or local (one made for this command)",
    )
    grid.add_argument(
        "--threads",
        type=as_size,
        help="threads of each (default: the cores divided among them); with --ray the CPUs that "
        "each run asks for (default: 1)",
    )
    grid.add_argument(
        "--cells",
        type=as_part,
        default=(1, 1),
        metavar="I/N",
        help="run only the I-th of N parts, as in an array of jobs; what chooses a learning rate "
        "is in the same part as what it is chosen for",
    )
    grid.add_argument(
        "--dry-run",
        action="store_true",
        help="print the runs with what trains, their steps and the time that they take",
    )


def _add_probe_options(probe: argparse.ArgumentParser) -> None:
    probe.add_argument(
        "--task",
        help="a GLUE task, such as rte; pos, number, depth or order, which are generated; or a "
        "name for data of your own",
    )
    add_model_and_data_options(probe)
    probe.add_argument(
        "--seeds",
        "--seed",
        type=as_seed,
        nargs="+",
        default=[0, 1, 2, 3, 4],
        metavar="SEED",
        help="of the training rows that are drawn (default 0 1 2 3 4)",
    )
    probe.add_argument(
        "--rows",
        type=as_whole,
        default=2000,
        help="the most rows of train, and of dev, that are used (default %(default)s)",
    )
    probe.add_argument(
        "--out", type=as_new_path, metavar="DIR", help="where to write (default probes/TASK)"
    )
    add_settings(probe, "quiet")


def _add_inspect_options(inspect: argparse.ArgumentParser) -> None:
    inspect.add_argument("run", type=as_path, help="run folder of spafit train")
    inspect.add_argument(
        "--merging",
        action="store_true",
        help="the error of the merged model, layer by layer, in fp16, bf16 and float32",
    )
    inspect.add_argument(
        "--forgetting",
        action="store_true",
        help="the model with its adapter off against its base, and with it on what linear probes "
        "of its features find of other tasks, before and after",
    )
    inspect.add_argument(
        "--texts",
        type=as_path,
        metavar="FILE",
        help="texts, one a line: their hidden states (default: of the run's dev, or the probed "
        "task's) and, with --forgetting, the loss of their masked tokens",
    )
    inspect.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help=f"tasks of GLUE that are probed (default {' '.join(_PROBED)})",
    )
    inspect.add_argument(
        "--data", type=as_path, help="GLUE's root; default: as in training, or the download cache"
    )
    inspect.add_argument(
        "--max-bad-rows",
        type=as_whole,
        help="malformed rows that may be left out; default: as in training",
    )
    inspect.add_argument(
        "--rows",
        type=as_whole,
        help="the most rows of train, and of dev, that a probe has (default 2000)",
    )
    inspect.add_argument(
        "--seeds",
        "--seed",
        type=as_seed,
        nargs="+",
        metavar="SEED",
        help="of the probes' rows and of the masks (default 0 1 2)",
    )
    inspect.add_argument(
        "--out",
        type=as_new_path,
        metavar="DIR",
        help="where to write norms.json and norms.png, merging.json, forgetting.json (default: "
        "nowhere)",
    )
    inspect.add_argument(
        "--model",
        type=as_name,
        help="folder of weights, minilm, or hub name; default: as in training",
    )
    add_no_mapped(inspect)
    add_settings(inspect, "quiet")


def _add_search_options(search: argparse.ArgumentParser) -> None:
    search.add_argument("--task", help="a GLUE task, such as rte; or a name for data of your own")
    add_model_and_data_options(search)
    search.add_argument(
        "--out",
        type=as_new_path,
        metavar="DIR",
        help="folder of the search, which is resumed there (default searches/TASK)",
    )
    group = search.add_argument_group("what is searched")
    group.add_argument(
        "--parameters",
        type=as_whole,
        metavar="N",
        help="the most numbers that may train, layers and head together as in Table 2 (default: "
        "those of the paper's SPAFIT-4-9-II, scaled to the model's layers)",
    )
    group.add_argument(
        "--minutes",
        type=as_number,
        help="instead: the most minutes that a full run may take, by a few steps measured now",
    )
    group.add_argument(
        "--plans",
        type=as_whole,
        default=27,
        help="the most plans that successive halving begins with (default %(default)s)",
    )
    group.add_argument("--rows", type=as_whole, help="the most rows of train that are used")
    group.add_argument(
        "--seeds",
        "--seed",
        type=as_seed,
        nargs="+",
        default=[0, 1, 2],
        metavar="SEED",
        help="of the runs that are reported (default 0 1 2)",
    )
    group.add_argument(
        "--selection-seed",
        type=as_seed,
        default=1000,
        metavar="SEED",
        help="of the runs that choose, and of what is drawn (default %(default)s)",
    )
    group = search.add_argument_group("plan and training; the defaults are the paper's")
    add_lora_options(group)
    add_settings(group, *_OF_SEARCH)


_VERBS: tuple[tuple[str, str, str, Callable[[argparse.ArgumentParser], None]], ...] = (
    ("demo", "fine-tune a small real BERT, without a network", "spafit demo", _add_demo_options),
    (
        "plan",
        "show what trains, layer by layer, with counts",
        "spafit plan SPAFIT-4-9-II",
        _add_drawing_options,
    ),
    (
        "download",
        "download a model or GLUE's data once, and check it",
        "spafit download glue rte mrpc",
        _add_download_options,
    ),
    (
        "train",
        "fine-tune on a GLUE task, or on data of your own",
        "spafit train --task rte --method SPAFIT-4-9-II --out runs/rte "
        "--seeds 0 1 2\n"
        "  spafit train --data tickets.csv --method SPAFIT-4-9-II --out runs/tickets",
        _add_train_options,
    ),
    ("eval", "score a run on a labelled split", "spafit eval runs/rte", _add_eval_options),
    (
        "predict",
        "predict with a run, or with several of one base at once",
        "spafit predict runs/rte --input FILE.tsv\n  spafit predict runs/rte --submission DIR\n"
        '  spafit predict runs/tickets --text "my invoice is wrong" --probabilities\n'
        "  spafit predict runs/rte runs/mrpc --input FILE.tsv --output FILE.csv",
        _add_predict_options,
    ),
    (
        "grid",
        "train a grid of methods, tasks and seeds from one file",
        "spafit grid minilm --workers 2\n  spafit grid table-2 --dry-run",
        _add_grid_options,
    ),
    (
        "report",
        "compare the runs below a folder, over seeds",
        "spafit report runs",
        _add_report_options,
    ),
    (
        "probe",
        "probe which layers of the frozen model know a task",
        "spafit probe --task rte --model minilm\n  spafit probe --task order --model minilm",
        _add_probe_options,
    ),
    (
        "search",
        "choose N1, N2 and the type under a budget, beside random choice",
        "spafit search --task rte --model minilm --learning-rate 5e-4\n"
        "  spafit search --task mrpc --parameters 4000000 --epochs 3",
        _add_search_options,
    ),
    (
        "inspect",
        "show what a run added to its base, what merging loses, what was forgotten",
        "spafit inspect runs/rte --out inspected\n"
        "  spafit inspect runs/rte --merging\n"
        "  spafit inspect runs/rte --forgetting --tasks sst-2 cola --data DIR",
        _add_inspect_options,
    ),
    (
        "doctor",
        "show versions, devices, kernels, and what is missing",
        "spafit doctor",
        lambda doctor: None,
    ),
)
"""Each verb: what it does, an example of it, and what adds its options."""
