"""README.md and the guide are true: their commands and snippets run, and print what they show.

The snippets and commands of README.md stand by themselves; those of the guide are run from its
first page to its last. CONTRIBUTING.md is true as well: its examples run, and take as many lines as
it says.

Oracle: their own text. ``FOLDER``, ``DATA``, ``FILE.tsv``, ``tickets.csv`` and ``new.csv``
stand in it for a folder of weights, GLUE's root and files of the reader's; here they are a tiny
checkpoint and a few rows, and so is ``minilm``.
"""

import importlib.util
import random
import re
import shlex
from pathlib import Path

import pytest
import torch
from support import REPOSITORY
from support.code_lines import code_lines
from support.pages import EVERY_PAGE, GUIDE, INDEX, PAGES, blocks, page

import spafit
from spafit import adapters
from spafit.cli import main
from spafit.cli import parser as cli_parser
from weights_tools.__main__ import build_parser
from weights_tools.exporting import FORMATS
from weights_tools.tiny import make_tiny

CONTRIBUTING = page("CONTRIBUTING.md")
ENGINES = PAGES[GUIDE + "engines.md"]
BLOCKS = blocks(EVERY_PAGE)
TOURS = {
    "README": blocks(PAGES["README.md"]),
    "guide": [each for name, text in PAGES.items() if name != "README.md" for each in blocks(text)],
}
INLINE = re.findall(r"`(spafit [^`]+)`", EVERY_PAGE)
INLINE_TOOLS = re.findall(r"`python -m weights_tools (export [^`]+)`", EVERY_PAGE)
NEEDS_NETWORK = ("spafit download",)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """Make what the stand-ins stand for."""
    root = tmp_path_factory.mktemp("readme")
    folder = make_tiny(root / "weights", num_hidden_layers=6)
    rte = root / "glue" / "RTE"
    rte.mkdir(parents=True)
    texts = [("the cat sat", "a cat sat"), ("no dog ran", "a dog ran"), ("it is so", "is it so")]
    for split, repeats in (("train", 18), ("dev", 4), ("test", 1000)):
        labelled = split != "test"
        lines = ["index\tsentence1\tsentence2" + ("\tlabel" if labelled else "")]
        for index in range(repeats * len(texts)):
            first, second = texts[index % len(texts)]
            label = ("\tnot_entailment", "\tentailment")[index % 2] if labelled else ""
            lines.append(f"{index}\t{first}\t{second}{label}")
        (rte / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = "".join(f'"{a}, {b}",{"ab"[k % 2]}\n' for k, (a, b) in enumerate(texts * 6))
    for name in ("tickets.csv", "new.csv"):
        (root / name).write_text("text,label\n" + rows, encoding="utf-8")
    return {
        "tickets.csv": str(root / "tickets.csv"),
        "new.csv": str(root / "new.csv"),
        "FOLDER": str(folder),
        "minilm": str(folder),
        "DATA": str(root / "glue"),
        "FILE.tsv": str(rte / "dev.tsv"),
        "ROOT": str(root),
    }


def fill_in(text: str, places: dict[str, str]) -> str:
    for name in ("FOLDER", "minilm", "DATA", "FILE.tsv", "tickets.csv", "new.csv"):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", places[name].replace("\\", "/"), text)
    return text


def snippets_of(tour: str) -> list[str]:
    return [text for language, text in TOURS[tour] if language == "python"]


def commands_of(tour: str) -> list[str]:
    text = "".join(text for language, text in TOURS[tour] if language == "")
    return re.findall("^spafit .*$", text.replace("\\\n", ""), flags=re.MULTILINE)


@pytest.mark.parametrize(("tour", "snippets", "commands"), [("README", 1, 4), ("guide", 8, 15)])
def test_there_are_snippets_and_commands(tour, snippets, commands):
    assert len(snippets_of(tour)) >= snippets
    assert len(commands_of(tour)) >= commands


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) < 200


def test_the_guide_is_its_index():
    """Every page of the folder is linked there, once, in the order of the built documentation."""
    files = {path.name for path in (REPOSITORY / GUIDE).iterdir()}
    linked = [name.removeprefix(GUIDE) for name in PAGES if name not in ("README.md", INDEX)]
    assert sorted(files - {"index.md"}) == sorted(linked)
    [toctree] = re.findall(r"^```{toctree}\n(.*?)^```$", PAGES[INDEX], flags=re.M | re.S)
    assert [f"{name}.md" for name in re.findall(r"^\w+$", toctree, flags=re.M)] == linked


@pytest.mark.parametrize("tour", TOURS)
def test_the_snippets_run_from_top_to_bottom(places, monkeypatch, tour):
    monkeypatch.chdir(places["ROOT"])
    names = {"FOLDER": places["FOLDER"], "DATA": places["DATA"]}
    quick = spafit.TrainConfig

    def short(**settings):
        return quick(**settings, epochs=1, max_length=32, quiet=True)

    monkeypatch.setattr(spafit, "TrainConfig", short)
    for snippet in snippets_of(tour):
        exec(compile(snippet.replace('"minilm"', "FOLDER"), tour, "exec"), names)
    if tour == "README":
        assert (Path(places["ROOT"]) / "tickets.safetensors").is_file()
        return
    assert names["result"].best_epoch == 1
    assert set(names["state"]) == set(
        spafit.load_pretrained(places["FOLDER"], num_labels=2).state_dict()
    )


@pytest.mark.parametrize("tour", TOURS)
def test_the_commands_run_in_order(places, monkeypatch, capsys, tmp_path, tour):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
    for command in commands_of(tour):
        arguments = shlex.split(fill_in(command, places))[1:]
        if command.startswith(NEEDS_NETWORK) or "--ray" in arguments:  # or a cluster
            cli_parser.build_parser().parse_args(arguments)
            continue
        if arguments[0] == "train":
            arguments += ["--epochs", "1", "--max-length", "32", "--quiet"]
        if arguments[0] == "probe":
            arguments += ["--seeds", "0", "--rows", "20", "--quiet"]
        if "--forgetting" in arguments:
            arguments += ["--seeds", "0", "--rows", "20", "--quiet"]
        if arguments[0] == "search":
            arguments += ["--epochs", "1", "--max-length", "32", "--quiet", "--seeds", "0"]
            arguments += ["--rows", "50", "--plans", "2"]
        assert main(arguments) == 0, (command, capsys.readouterr().err)
    if tour == "guide":
        assert (tmp_path / "submissions" / "RTE.tsv").read_text().count("\n") == 3001


def test_the_commands_of_the_tools_parse():
    lines = [line for _, text in BLOCKS for line in text.splitlines() if " weights_tools " in line]
    assert len(lines) >= 4
    for line in lines:
        build_parser().parse_args(shlex.split(line)[3:])


@pytest.mark.parametrize("command", INLINE)
def test_commands_within_sentences_parse(command):
    cli_parser.build_parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("command", INLINE_TOOLS)
def test_commands_of_the_tools_within_sentences_parse(command):
    build_parser().parse_args(shlex.split(command))


def test_the_engines_take_forms_that_there_are():
    """And what is said to be tested names its test."""
    named = re.findall(r"--format (\w+)", ENGINES)
    assert named == ["peft", "adapters", "hf", "onnx"] and set(named) == set(FORMATS)
    rows = [row.split(" | ") for row in ENGINES.splitlines() if row.endswith(" |")]
    engines = [row for row in rows if len(row) == 4 and row[0] != "| engine"]
    assert len(engines) >= 12
    for engine, form, _, tried in engines:
        assert form.strip("`") in {*FORMATS, "none"} or form.startswith("the run folder"), engine
        assert tried.startswith(("tested", "by hand", "not tried")), engine
        assert tried.startswith("tested") == ("](../../tests/" in tried), engine
    numbers = set(re.findall(r" \[(\d+)\]", ENGINES))
    assert numbers == set(re.findall(r"^(\d+)\. <https:", ENGINES, flags=re.MULTILINE))


def test_the_plan_that_is_printed_is_the_plan(capsys):
    assert main(["plan", "SPAFIT-4-9-II"]) == 0
    printed = capsys.readouterr().out
    assert any(text == printed for _, text in BLOCKS), "another plan is shown"


def test_the_modules_that_python_runs_are_there():
    named = re.findall(r"python -m ([\w.]+)", EVERY_PAGE)
    assert {"benchmarks", "weights_tools", "benchmarks.train_step"} <= set(named)
    for module in named:
        assert importlib.util.find_spec(module) is not None, module


def headings(text: str) -> set[str]:
    """Return the names by which a page's headings are linked to."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_somewhere(name):
    text, folder = page(name), (REPOSITORY / name).parent
    for shown, target in re.findall(r"\[([^\[\]]*)\]\(([^)]+)\)", text):
        file, _, heading = target.partition("#")
        if re.fullmatch(r"[\w./-]+\.(py|md|json|toml)", shown):
            assert file.endswith(shown), f"{shown} is called {Path(file).name}"
        if not target.startswith("http"):
            assert (folder / file).exists(), target
            other = (folder / file).read_text(encoding="utf-8") if file and heading else text
            assert not heading or heading in headings(other), target


@pytest.mark.parametrize("text", [EVERY_PAGE, CONTRIBUTING], ids=["pages", "CONTRIBUTING"])
def test_make_has_the_targets_it_names(text):
    makefile = page("Makefile")
    for line in re.findall(r"^make ([a-z ]+?)(?= *$|  | ARGS)", text, flags=re.MULTILINE):
        for target in line.split():
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


PLAN_FILES = PAGES[GUIDE + "plan_files.md"]

# Of the table of techniques: name, example, where it stands, what it computes, numbers, methods.
TECHNIQUES = re.findall(
    r"^\| \[(.+)\]\(../../(examples/plans/.+\.json)\) \| (.+) \| (.+) \| ([\d,]+) \| ?(.*?) ?\|$",
    PLAN_FILES,
    flags=re.MULTILINE,
)


def adapted(path):
    """Adapt a BERT-large without values, with three labels, by a plan file."""
    with torch.device("meta"):
        model = spafit.BertForSequenceClassification(spafit.BertConfig(), num_labels=3)
    return spafit.adapt(model, path)


def test_the_table_of_techniques_has_them_all():
    built_in = {
        each.name
        for each in vars(adapters).values()
        if isinstance(each, type) and issubclass(each, spafit.Technique) and hasattr(each, "name")
    }
    assert {name for name, *_ in TECHNIQUES} == built_in
    assert len(TECHNIQUES) == len(built_in)


@pytest.mark.parametrize(
    ("name", "file", "on", "computes", "numbers", "methods"),
    TECHNIQUES,
    ids=[row[0] for row in TECHNIQUES],
)
def test_the_table_of_techniques(name, file, on, computes, numbers, methods):
    """The example trains this technique alone, in as many numbers, as the method by name does."""
    summary = adapted(REPOSITORY / file)
    trained = {each for table in summary.plan.strata for each in table.train.values()}
    assert {technique.name for each in trained for technique in each} == {name}
    assert f"{summary.trainable - 3075:,}" == numbers
    kinds = {"Linear": "Linear", "LayerNorm": "LayerNorm", "SublayerEnd": "sub-layer"}
    [technique] = {type(technique) for each in trained for technique in each}
    called = f":class:`{technique().__repr__().partition('(')[0]}`"
    its = " ".join(line for line in adapters.__doc__.splitlines() if line.startswith(called))
    assert all(part in its for part in computes.partition(", whose")[0].split(", ")), its
    assert on == ", ".join(kinds[kind.__name__] for kind in technique.attaches_to)
    for method in re.findall("`([a-z0-9-]+)`", methods)[:1]:
        bias = "direct" if "direct" in methods else None
        by_name = spafit.plan(method, 24, bias=bias)
        assert [each.train for each in by_name.strata] == [
            each.train for each in summary.plan.strata
        ]
        assert (by_name.embeddings, by_name.pooler) == (
            summary.plan.embeddings,
            summary.plan.pooler,
        )


def test_the_plan_file_that_is_shown():
    shown = [text for language, text in BLOCKS if language == "json" and '"strata"' in text]
    files = [REPOSITORY / f"examples/plans/{name}.json" for name in ("mixed", "gradual")]
    assert shown == [file.read_text(encoding="utf-8") for file in files]
    plan = adapted(REPOSITORY / "examples/plans/mixed.json").plan
    assert [(each.name, each.layers) for each in plan.strata] == [
        ("group 1", "0-4"),
        ("group 2", "5-9"),
        ("group 3", "10-23"),
    ]
    assert len(plan.strata[1].train) == 8


def test_every_example_of_a_plan_is_named():
    files = {f"examples/plans/{path.name}" for path in (REPOSITORY / "examples/plans").iterdir()}
    shown = {"examples/plans/mixed.json", "examples/plans/gradual.json"}
    assert files == {file for _, file, *_ in TECHNIQUES} | shown


def test_what_stands_under_a_drawing():
    drawn = str(adapted(REPOSITORY / "examples/plans/gradual.json"))
    [shown] = re.findall(
        r"writes under the drawing\n\n```text\n(.*?)\n```", PLAN_FILES, flags=re.DOTALL
    )
    assert drawn.endswith(f"┘\n{shown}")


def test_the_settings_that_plan_files_are_said_to_have():
    said = set(re.findall("`([a-z_]+)`", PLAN_FILES.partition("All else has a default:")[2][:400]))
    fields = {each for kind in (spafit.Plan, spafit.Stratum) for each in kind.__dataclass_fields__}
    assert said >= fields - {"strata", "first", "last", "train"}


class TestAddATechniqueAndATask:
    """Oracle: CONTRIBUTING.md, whose technique, task and tests are run and counted."""

    SNIPPETS = re.findall(r"^```python\n(.*?)^```$", CONTRIBUTING, flags=re.MULTILINE | re.DOTALL)

    @pytest.fixture
    def names(self):
        before = dict(spafit.techniques.TECHNIQUES)
        names = {"__name__": "contributing"}
        for snippet in self.SNIPPETS:
            exec(compile(snippet, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
        yield names
        spafit.techniques.TECHNIQUES.clear()
        spafit.techniques.TECHNIQUES.update(before)

    def test_its_test_passes(self, names):
        names["test_gain"]()

    @pytest.mark.parametrize("broken", ["forward", "merged"])
    def test_its_test_can_fail(self, names, monkeypatch, broken):
        monkeypatch.setattr(names["GainedLayerNorm"], broken, getattr(spafit.LayerNorm, broken))
        with pytest.raises((AssertionError, spafit.PlanError)):
            names["test_gain"]()

    def test_the_test_of_the_task_passes(self, names):
        names["test_older"]()

    @pytest.mark.parametrize("fixed", [0, 100])
    def test_the_test_of_the_task_can_fail(self, names, monkeypatch, fixed):
        """With one answer alone; with the same rows in train and dev."""

        class Always(random.Random):
            def __init__(self, seed):
                super().__init__(0)

            def sample(self, numbers, count):
                return [fixed, 50] if fixed else super().sample(numbers, count)

        monkeypatch.setattr(random, "Random", Always)
        with pytest.raises(AssertionError):
            names["test_older"]()

    def test_it_takes_as_many_lines_as_it_says(self, tmp_path):
        said = re.findall(r"(\d+) lines", CONTRIBUTING)
        counted = []
        for number, snippet in enumerate(self.SNIPPETS):
            path = tmp_path / f"{number}.py"
            path.write_text(snippet, encoding="utf-8")
            counted.append(str(code_lines(path)))
        assert said == counted
