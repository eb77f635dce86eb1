"""The table of test_absurd_options.py: the absurd values for every option of every verb."""

from __future__ import annotations

from dataclasses import dataclass, field

LONG = "x" * 5_000
# What int() and float() of Python take, and what slips of the hand and of a script look like.
NO_NUMBER = (
    *("", " ", "nan", "inf", "-inf", "1_000", "\u0663", "\uff11", "\u00bd", "0x10", "9" * 5_000),
    *("1,5", "one", "\0", "1\n2", " 1", "1 ", "+", "-", "--1", "1e999", "true", "None", LONG),
)
NO_WHOLE = (*NO_NUMBER, "1e308", "1.5", "1.0", "1e3", str(2**63), str(10**29))
NO_CHOICE = ("", " ", "no-such", "1", "\0", "\n", LONG)
NO_NAME = ("", " ", "\t", "\0", "a\0b", "a\nb", LONG)
NO_PATH = ("", " ", "\n", "\0", "a\0b", LONG, "y/" * 3_000)
NO_FILE_HERE = (*NO_PATH, "nowhere", "folder", "pipe", "circle", "dangling", "file/below")
NO_NEW_NAME = ("new\r", "a\nb", "a\x1b[31mb", "a\u2028b", "a\u202eb", "new\t/x", "\ud800")
NO_FILE_TO_BE = (
    *(*NO_PATH, *NO_NEW_NAME),
    *("nowhere/new", ".", "/", "folder", "folder/", "file/below", "pipe", "to-pipe", "circle"),
    *("/proc/nope", "z" * 250),
)
NO_FOLDER_TO_BE = (
    *(*NO_PATH, *NO_NEW_NAME, "file", "file/below", "pipe", "circle", "dangling"),
    *("/proc/nope/x", "d/" * 1_900),
)
NO_MODEL = (
    *(*NO_NAME, "nowhere", ".", "/", "folder", "file", "pipe", "circle", "/proc/nope", "a/b/c"),
    *("a/b@", "../x", "a/" + LONG, "owner/na me", "~no-such-user-here/x", "owner/../x", "@main"),
)
NO_FLAG = ("", "1", "no", LONG)


@dataclass(frozen=True)
class Option:
    """The absurd values of an option, and those that look so and are legal, with the reason."""

    absurd: tuple[str, ...]
    legal: dict[str, str] = field(default_factory=dict)


FLAG = Option(NO_FLAG)
HELP = {"-h": FLAG}
COMMON = {**HELP, "--debug": FLAG}
MODEL = Option(NO_MODEL)
METHOD = Option(
    (
        *NO_NAME,
        *("foo", "SPAFIT-1-0-I", "SPAFIT-0-99-II", "SPAFIT-1-1-I", "SPAFIT-\u0660-\u0661-I"),
        *("SPAFIT-1_0-2-I", "SPAFIT--1-2-I", "SPAFIT-0-1-III", "SPAFIT-nan-1-I", "SPAFIT-0%-1%-I"),
        *("nothing.json", "file.json", "pipe.json", "folder.json", "circle.json", "a\0.json"),
        *(LONG + ".json", "/proc/nope.json", "SPAFIT-" + "9" * 5_000 + "-1-I"),
    )
)
PLAN = {
    "--r": Option((*NO_WHOLE, "0", "-1", "100001")),
    "--alpha": Option((*NO_NUMBER, "0", "-1", "1e308", "1000001"), {"1e-30": "a scale like any"}),
    "--lora-dropout": Option((*NO_NUMBER, "-1", "1", "1e308"), {"0": "no dropout, the default"}),
    "--bias": Option((*NO_CHOICE, "Delta")),
    "--numbering": Option(NO_CHOICE),
}
SEED = Option((*NO_WHOLE, "-1"), {"0": "a seed like any", str(2**63 - 1): "the largest"})
BAD_ROWS = Option((*NO_WHOLE[:-2], "-1"), {"0": "none, the default"})
TABLES = {
    "--delimiter": Option(("", " ", "\0", "ab", "\n", '"', LONG, "tab", ";")),  # GLUE's have TABs
    "--unquoted": FLAG,
    "--encoding": Option(
        ("", " ", "\0", "no-such", "hex", "rot13", "idna", "\u0663", LONG),
        {"utf8": "the default by another name"},
    ),
}
RUN = Option((*NO_PATH, "nowhere", ".", "/", "file", "pipe", "circle", "dangling", "damaged"))
DATA = Option((*NO_PATH, "nowhere", "folder", "file", "pipe", "circle", "dangling", "/proc"))

OWN_DATA = {  # not for a folder of GLUE's
    "--dev": Option((*NO_PATH, "rows.tsv")),
    "--text": Option((*NO_NAME, "sentence1")),
    "--text2": Option((*NO_NAME, "sentence2")),
    "--label": Option((*NO_NAME, "label")),
    "--regression": FLAG,
    "--dev-share": Option((*NO_NUMBER, "0.2")),
    "--split-seed": Option((*NO_WHOLE, "-1", "0")),
    **TABLES,
}

TABLE: dict[str, dict[str, Option]] = {
    "": {**HELP, "--version": FLAG, "verb": Option((*NO_CHOICE, "Train"))},
    "doctor": COMMON,
    "demo": {
        **COMMON,
        "--out": Option(NO_FOLDER_TO_BE),
        "--overwrite": FLAG,
        "--model": MODEL,
        "--seed": SEED,
        "--ask": FLAG,
        "--where": FLAG,
    },
    "plan": {
        **COMMON,
        **PLAN,
        "method": METHOD,
        "--model": MODEL,
        "--num-labels": Option((*NO_WHOLE, "0", "-1", "100001")),
        "--save": Option(NO_FILE_TO_BE),
    },
    "download": {
        **COMMON,
        "what": Option((*NO_CHOICE, "GLUE")),
        "names": Option((*NO_NAME, "foo", "-", "rte/", "..", "rte@main")),
        "--folder": Option(NO_FOLDER_TO_BE),
    },
    "eval": {
        **COMMON,
        "run": RUN,
        "--data": DATA,
        "--model": MODEL,
        "--no-mapped": FLAG,
        "--max-bad-rows": BAD_ROWS,
        "--split": Option((*NO_CHOICE, "test")),
        "--average": FLAG,
        "--precision": Option((*NO_CHOICE, "fp16", "FP32")),
        "--errors": Option(NO_FILE_TO_BE),
        **TABLES,
    },
    "predict": {
        **COMMON,
        "run": RUN,
        "--data": DATA,
        "--model": MODEL,
        "--no-mapped": FLAG,
        "--max-bad-rows": BAD_ROWS,
        "--input": Option((*NO_FILE_HERE, "file", "bad.tsv", "empty.tsv", "/proc/nope.tsv")),
        "--submission": Option(NO_FOLDER_TO_BE),
        "--output": Option((*NO_FILE_TO_BE, "rows.tsv")),  # the last is what --input names
        "--text": Option(("", " ", "\0", LONG)),  # there is an --input already
        "--text2": Option(("", " ", "\0", LONG)),  # without --text
        "--probabilities": FLAG,
        "--average": FLAG,
        "--precision": Option((*NO_CHOICE, "fp16", "FP32")),
        **TABLES,
    },
    "report": {
        **COMMON,
        "folder": Option((*NO_PATH, "nowhere", "file", "pipe", "circle", "dangling", "folder")),
        "--out": Option(NO_FOLDER_TO_BE),
        "--against": Option((*NO_NAME, "no such method")),
        "--submission": Option(NO_FOLDER_TO_BE),
        "--data": DATA,
        "--model": MODEL,
    },
    "grid": {
        **COMMON,
        "file": Option((*NO_NAME, "nowhere", "folder", "file", "pipe", "circle", "table2")),
        "--out": Option(NO_FOLDER_TO_BE),
        "--data": DATA,
        "--model": MODEL,
        "--workers": Option((*NO_WHOLE, "0", "-1")),
        "--ray": Option((*NO_NAME, "Auto", "head", ":6379", "head:port", "http://head:1", "auto ")),
        "--threads": Option((*NO_WHOLE, "0", "-1")),
        "--cells": Option((*NO_CHOICE, "0/2", "3/2", "1/0", "-1/2", "1/2/3", "\u0661/2", "1 / 2")),
        "--dry-run": FLAG,
    },
    "probe": {
        **COMMON,
        "--task": Option(
            (*NO_NAME, "foo", "mnli-mm", "ax", "cola", "Order", "rte ", "\uff32\uff34\uff25")
        ),
        "--model": MODEL,
        "--revision": Option((*NO_NAME, "main", "-")),  # the model is a folder
        "--no-mapped": FLAG,
        "--data": DATA,
        "--max-bad-rows": BAD_ROWS,
        **OWN_DATA,
        "--seeds": SEED,
        "--rows": Option((*NO_WHOLE[:-2], "0", "-1", "9"), {"10": "the least", str(2**63): "all"}),
        "--out": Option(NO_FOLDER_TO_BE),
        "--quiet": FLAG,
    },
    "inspect": {
        **COMMON,
        "run": RUN,
        "--merging": FLAG,
        "--forgetting": FLAG,
        "--texts": Option((*NO_FILE_HERE, "empty.tsv", "rows.tsv")),  # the model has no such head
        "--tasks": Option((*NO_NAME, "foo", "ax", "mnli", "cola", "rte ", "\uff32\uff34\uff25")),
        "--data": DATA,
        "--max-bad-rows": BAD_ROWS,
        "--rows": Option((*NO_WHOLE[:-2], "0", "-1", "9"), {"10": "the least", str(2**63): "all"}),
        "--seeds": SEED,
        "--out": Option(NO_FOLDER_TO_BE),
        "--model": MODEL,
        "--no-mapped": FLAG,
        "--quiet": FLAG,
    },
    "search": {
        **COMMON,
        "--task": Option((*NO_NAME, "foo", "mnli-mm", "ax", "cola", "rte ", "\uff32\uff34\uff25")),
        "--model": MODEL,
        "--revision": Option((*NO_NAME, "main", "-")),  # the model is a folder
        "--no-mapped": FLAG,
        "--data": DATA,
        "--max-bad-rows": BAD_ROWS,
        **OWN_DATA,
        "--out": Option(NO_FOLDER_TO_BE),
        "--parameters": Option((*NO_WHOLE[:-2], "0", "-1", "800"), {str(2**63): "all plans"}),
        "--minutes": Option((*NO_NUMBER, "0", "-1"), {"1e308": "all plans"}),
        "--plans": Option((*NO_WHOLE[:-2], "0", "-1", "1"), {"2": "the least", str(2**63): "all"}),
        "--rows": Option((*NO_WHOLE[:-2], "0", "-1", "49"), {"50": "the least", str(2**63): "all"}),
        "--seeds": SEED,
        "--selection-seed": Option((*NO_WHOLE, "-1", "0", "2"), {"3": "not one of --seeds"}),
        "--r": PLAN["--r"],
        "--alpha": PLAN["--alpha"],
        "--epochs": Option((*NO_WHOLE, "0", "-1")),
        "--batch-size": Option((*NO_WHOLE, "0", "-1"), {"1": "small, but a batch"}),
        "--learning-rate": Option((*NO_NUMBER, "0", "-1", "1e308", "1.1"), {"1": "bold"}),
        "--max-length": Option((*NO_WHOLE, "0", "-1", "7", "54"), {"8": "the least"}),
        "--metric": Option((*NO_NAME, "pearson", "F1")),
        "--device": Option((*NO_CHOICE, "cuda:77", "meta", "cpu:" + "9" * 5_000, "xla", "cuda:-1")),
        "--quiet": FLAG,
    },
    "train": {
        **COMMON,
        **PLAN,
        "--task": Option((*NO_NAME, "foo", "mnli-mm", "ax", "cola", "rte ", "\uff32\uff34\uff25")),
        "--method": Option(
            (*METHOD.absurd, "SPAFIT-0-3-II"), {"bitfit": "a row of the paper's Table 1"}
        ),
        "--model": MODEL,
        "--revision": Option((*NO_NAME, "main", "-")),  # the model is a folder
        "--no-mapped": FLAG,
        "--data": DATA,
        "--out": Option(NO_FOLDER_TO_BE),
        "--overwrite": FLAG,
        "--max-bad-rows": BAD_ROWS,
        "--split-special-tokens": FLAG,
        "--lowercase": FLAG,
        "--seeds": SEED,
        "--order-seed": SEED,
        "--dropout-seed": SEED,
        "--init-seed": SEED,
        "--start-from": RUN,
        "--together": FLAG,
        "--epochs": Option((*NO_WHOLE, "0", "-1")),
        "--batch-size": Option((*NO_WHOLE, "0", "-1"), {"1": "small, but a batch"}),
        "--accumulation": Option((*NO_WHOLE, "0", "-1", "17")),
        "--learning-rate": Option(
            (*NO_NUMBER, "0", "-1", "1e308", "1.1"), {"5e-324": "above 0", "1": "bold"}
        ),
        "--weight-decay": Option((*NO_NUMBER, "-1", "1e308", "1.1"), {"0": "no decay", "1": "all"}),
        "--decay-biases": FLAG,
        "--warmup": Option((*NO_NUMBER, "-0.1", "1e308", "1.1"), {"0": "none", "1": "all steps"}),
        **OWN_DATA,
        "--metric": Option((*NO_NAME, "pearson", "F1")),
        "--class-weights": Option((*NO_FILE_HERE, "even", "file")),
        "--label-smoothing": Option((*NO_NUMBER, "-1", "1.1"), {"0": "none, the default"}),
        "--early-stopping": Option((*NO_WHOLE, "0", "-1"), {"1": "at the first"}),
        "--max-grad-norm": Option((*NO_NUMBER, "-1"), {"0": "no clipping", "1e308": "the same"}),
        "--max-length": Option((*NO_WHOLE, "0", "-1", "7", "54"), {"8": "the least"}),
        "--eval-every": Option((*NO_WHOLE, "0", "-1"), {"1": "after each step"}),
        "--save-every": Option((*NO_WHOLE, "0", "-1"), {"1": "after each step"}),
        "--keep-checkpoints": Option((*NO_WHOLE, "0", "-1", "1"), {"2": "the least"}),
        "--precision": Option((*NO_CHOICE, "fp16", "FP32")),
        "--device": Option((*NO_CHOICE, "cuda:77", "meta", "cpu:" + "9" * 5_000, "xla", "cuda:-1")),
        "--dropout-in-group-1": FLAG,
        "--no-dropout-in-group-1": FLAG,
        "--no-frozen-dropout": FLAG,
        "--cache-prefix": Option((*NO_CHOICE, "memory", "disk")),  # dropout is on in group 1
        "--cache-dtype": Option((*NO_CHOICE, "bf16")),
        "--cache-limit-gib": Option(
            (*NO_NUMBER, "-1", "1e308"), {"0": "nothing is kept here, so nothing is too much"}
        ),
        "--recompute": Option((*NO_WHOLE, "0", "-1", "4"), {"1": "a group of the plan"}),
        "--frozen-weights": Option((*NO_CHOICE, "half")),  # this run is in float32
        "--step": Option((*NO_CHOICE, "captured")),  # this run is on a CPU
        "--quiet": FLAG,
    },
}

# What goes wrong only together.
PAIRS = """
    predict run
    predict run --input rows.tsv --submission new
    predict run --submission new --output new.tsv
    predict run run --input rows.tsv
    predict run run --submission new
    predict run nowhere --input rows.tsv
    predict run --submission new --max-bad-rows 1
    predict run --submission new --max-bad-rows 0
    predict run --submission new --unquoted
    predict run --submission new --probabilities
    predict run --input rows.tsv --data glue
    predict run --input rows.tsv --unquoted
    predict run --input nowhere.tsv --model nowhere
    predict run --text one --delimiter tab
    eval run --unquoted
    eval run --data rows.tsv --unquoted
    predict run --input bad.tsv --max-bad-rows 1
    predict run --input rows.tsv --output ./rows.tsv
    predict run --input rows.tsv --output link.tsv
    eval run --split dev --data nowhere
    plan plan.json --r 5
    plan plan.json --alpha 5
    plan plan.json --lora-dropout 0
    plan plan.json --bias direct
    plan plan.json --numbering text
    plan plan.json --model {model}
    plan SPAFIT-4-9-II --model {model}
    plan SPAFIT-4-9-II extra
    download model --folder new
    download model .
    download model folder
    download glue rte foo
    demo --model {model} --out file
    {probe} --seeds 1 0 1
    {probe} --seeds
    {probe} --task order
    probe --data rows.tsv --text sentence1 --label label --task ../x --model {model}
    search --data rows.tsv --text sentence1 --label label --task ../x --model {model}
    {search} --seeds 1 0 1
    {search} --seeds 1 1000
    {search} --parameters 5000 --minutes 3
    {search} --data glue
    inspect run --tasks rte
    inspect run --texts rows.tsv
    inspect run --merging --seeds 1
    inspect run --forgetting --tasks rte --data glue --seeds 1 0 1
    {train} --unquoted
    train --method bitfit --data rows.tsv --dev rows.tsv --dev-share 0.2 --model {model}
    train --method bitfit --data rows.tsv --dev rows.tsv --split-seed 0 --model {model}
    {train} --seeds 1 0 1
    {train} --seeds 1 -1
    {train} --seeds 1 2 --out file
    {train} --seeds
    {train} --out run-of-another-seed
    {train} --together
    {train} --together --no-dropout-in-group-1
    {train} --together --seeds 1 2
    {train} --together --seeds 1 2 --method bitfit
    {train} --together --seeds 1 2 --no-dropout-in-group-1 --cache-prefix off
    {train} --together --seeds 1 2 --no-dropout-in-group-1 --cache-limit-gib 0
    {train} --cache-prefix memory
    {train} --no-dropout-in-group-1 --cache-prefix memory --cache-limit-gib 0
    {train} --no-dropout-in-group-1 --cache-prefix memory --method bitfit
    {train} --batch-size 4 --accumulation 5
    {train} --method bitfit --recompute 2
    {train} --recompute
    {train} --recompute 1 --step compiled
    {train} --step captured --device cpu
    {train} --precision fp16 --device cpu
    {train} --frozen-weights half --precision float32
    {train} --model owner/name@one --revision two
    {train} --method plan.json --r 5
    {train} --method plan.json
    {train} more
    {train} --no-such-option
    {train} --epochs 1 --epochs 0
"""
