"""The table of the GLUE tasks (Wang et al., 2018, https://gluebenchmark.com).

``TASKS`` has everything in which the tasks differ: files, columns, labels, metrics, the paper's
batch size, the submission file. No reader, metric or submission code names a task.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from spafit.errors import DataError
from spafit.tasks.task import Task

SCORE_RANGE = (0.0, 5.0)
"""The smallest and the largest score of GLUE's one regression task, STS-B."""


@dataclass(frozen=True)
class Split:
    """One split of a task in its original file; columns are counted from 0."""

    file: str
    """Name of the original file inside the task's folder."""
    rows: int
    """Number of rows of the whole file, without its header."""
    columns: tuple[str, ...]
    """Names of all columns, as in the header if there is one."""
    text_a: int
    text_b: int | None = None
    label: int | None = None
    has_header: bool = True
    hub_name: str = ""
    """Name of the split in the hub's copy of GLUE (``nyu-mll/glue``)."""


@dataclass(frozen=True, kw_only=True)
class GlueTask(Task):
    """One GLUE task: also the format of its files and of its submission file."""

    folder: str
    """Folder of the original files below GLUE's root."""
    spelling: tuple[str, ...]
    """How the TSV files and the submission file write each label, in the order of the labels."""
    submission: str
    """Name of the submission file."""
    train: Split | None
    dev: Split | None
    test: Split

    @property
    def hub_folder(self) -> str:
        """Folder of the task in the hub's copy of GLUE."""
        return self.folder.lower().replace("-", "")

    def split(self, name: str) -> Split:
        """Return the split ``name``: "train", "dev" or "test".

        Raises
        ------
        DataError
            If the name is none of these, or the task has no such split.
        """
        have = {"train": self.train, "dev": self.dev, "test": self.test}
        split = have.get(name)
        if split is None:
            known = ", ".join(key for key, value in have.items() if value is not None)
            raise DataError(f"{self.display} has no split {name!r:.80}; it has {known}")
        return split


def _columns(line: str) -> tuple[str, ...]:
    return tuple(line.split("|"))


_PAIR = _columns("index|sentence1|sentence2")
_COLA = _columns("source|label|original_mark|sentence")
_MRPC = _columns("Quality|#1 ID|#2 ID|#1 String|#2 String")
_STSB = _columns("index|genre|filename|year|old_index|source1|source2|sentence1|sentence2")
_QQP = _columns("id|qid1|qid2|question1|question2|is_duplicate")
_MNLI = _columns(
    "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse"
    "|sentence1_parse|sentence2_parse|sentence1|sentence2"
)
_MNLI_TRAIN = (*_MNLI, *_columns("label1|gold_label"))
_MNLI_DEV = (*_MNLI, *_columns("label1|label2|label3|label4|label5|gold_label"))
_NLI = ("entailment", "neutral", "contradiction")

# fmt: off
TASKS: Mapping[str, GlueTask] = MappingProxyType({task.name: task for task in (
    GlueTask("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",),
             display="CoLA", folder="CoLA", spelling=("0", "1"),
             submission="CoLA.tsv",
             train=Split("train.tsv", 8551, _COLA, 3, None, 1, has_header=False, hub_name="train"),
             dev=Split("dev.tsv", 1043, _COLA, 3, None, 1, has_header=False, hub_name="validation"),
             test=Split("test.tsv", 1063, ("index", "sentence"), 1, hub_name="test")),
    GlueTask("sst-2", ("sentence",), ("negative", "positive"), ("accuracy",),
             display="SST-2", folder="SST-2", spelling=("0", "1"),
             submission="SST-2.tsv",
             train=Split("train.tsv", 67349, ("sentence", "label"), 0, None, 1, hub_name="train"),
             dev=Split("dev.tsv", 872, ("sentence", "label"), 0, None, 1, hub_name="validation"),
             test=Split("test.tsv", 1821, ("index", "sentence"), 1, hub_name="test")),
    GlueTask("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"),
             ("f1", "accuracy"),
             display="MRPC", folder="MRPC", spelling=("0", "1"),
             submission="MRPC.tsv",
             train=Split("train.tsv", 3668, _MRPC, 3, 4, 0, hub_name="train"),
             dev=Split("dev.tsv", 408, _MRPC, 3, 4, 0, hub_name="validation"),
             test=Split("test.tsv", 1725, ("index", *_MRPC[1:]), 3, 4, hub_name="test")),
    GlueTask("sts-b", ("sentence1", "sentence2"), (), ("pearson", "spearman"),
             display="STS-B", folder="STS-B", spelling=(),
             submission="STS-B.tsv",
             train=Split("train.tsv", 5749, (*_STSB, "score"), 7, 8, 9, hub_name="train"),
             dev=Split("dev.tsv", 1500, (*_STSB, "score"), 7, 8, 9, hub_name="validation"),
             test=Split("test.tsv", 1379, _STSB, 7, 8, hub_name="test")),
    GlueTask("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"),
             display="QQP", folder="QQP", spelling=("0", "1"),
             submission="QQP.tsv", paper_batch_size=8,
             train=Split("train.tsv", 363846, _QQP, 3, 4, 5, hub_name="train"),
             dev=Split("dev.tsv", 40430, _QQP, 3, 4, 5, hub_name="validation"),
             test=Split("test.tsv", 390965, _columns("id|question1|question2"), 1, 2,
                        hub_name="test")),
    GlueTask("mnli", ("premise", "hypothesis"), _NLI, ("accuracy",),
             display="MNLI-m", folder="MNLI", spelling=_NLI,
             submission="MNLI-m.tsv", paper_batch_size=8,
             train=Split("train.tsv", 392702, _MNLI_TRAIN, 8, 9, 11, hub_name="train"),
             dev=Split("dev_matched.tsv", 9815, _MNLI_DEV, 8, 9, 15, hub_name="validation_matched"),
             test=Split("test_matched.tsv", 9796, _MNLI, 8, 9, hub_name="test_matched")),
    GlueTask("mnli-mm", ("premise", "hypothesis"), _NLI, ("accuracy",),
             display="MNLI-mm", folder="MNLI", spelling=_NLI,
             submission="MNLI-mm.tsv", paper_batch_size=8,
             train=None,  # the model of MNLI-m is evaluated on it
             dev=Split("dev_mismatched.tsv", 9832, _MNLI_DEV, 8, 9, 15,
                       hub_name="validation_mismatched"),
             test=Split("test_mismatched.tsv", 9847, _MNLI, 8, 9,
                        hub_name="test_mismatched")),
    GlueTask("qnli", ("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",),
             display="QNLI", folder="QNLI", spelling=("entailment", "not_entailment"),
             submission="QNLI.tsv", paper_batch_size=8,
             train=Split("train.tsv", 104743, _columns("index|question|sentence|label"), 1, 2, 3,
                        hub_name="train"),
             dev=Split("dev.tsv", 5463, _columns("index|question|sentence|label"), 1, 2, 3,
                        hub_name="validation"),
             test=Split("test.tsv", 5463, _columns("index|question|sentence"), 1, 2,
                        hub_name="test")),
    GlueTask("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment"), ("accuracy",),
             display="RTE", folder="RTE", spelling=("entailment", "not_entailment"),
             submission="RTE.tsv",
             train=Split("train.tsv", 2490, (*_PAIR, "label"), 1, 2, 3, hub_name="train"),
             dev=Split("dev.tsv", 277, (*_PAIR, "label"), 1, 2, 3, hub_name="validation"),
             test=Split("test.tsv", 3000, _PAIR, 1, 2, hub_name="test")),
    GlueTask("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",),
             display="WNLI", folder="WNLI", spelling=("0", "1"),
             submission="WNLI.tsv",
             train=Split("train.tsv", 635, (*_PAIR, "label"), 1, 2, 3, hub_name="train"),
             dev=Split("dev.tsv", 71, (*_PAIR, "label"), 1, 2, 3, hub_name="validation"),
             test=Split("test.tsv", 146, _PAIR, 1, 2, hub_name="test")),
    GlueTask("ax", ("premise", "hypothesis"), _NLI, ("matthews",),
             display="AX", folder="AX", spelling=_NLI,
             submission="AX.tsv",
             train=None, dev=None,  # predicted by the model of MNLI-m; its labels are not public
             test=Split("AX.tsv", 1104, _PAIR, 1, 2, hub_name="test")),
)})
# fmt: on
"""The nine tasks, MNLI's mismatched half and the diagnostic set AX, by name."""

_ALIASES = {"sst2": "sst-2", "stsb": "sts-b", "mnli-m": "mnli", "mnli-matched": "mnli",
            "mnli-mismatched": "mnli-mm"}  # fmt: skip


def get_task(name: str | Task) -> GlueTask:
    """Return the task called ``name``, in any case; "sst2", "stsb" and "mnli-m" are known too.

    Raises
    ------
    DataError
        If there is no such task; the message lists those that there are.
    """
    if isinstance(name, GlueTask):
        return name
    if isinstance(name, Task):
        raise DataError(
            f"{name.display} is a task of your own, which has no files of GLUE's form; read its "
            "files with spafit.dataset"
        )
    key = name.lower().replace("_", "-") if isinstance(name, str) else ""
    task = TASKS.get(_ALIASES.get(key, key))
    if task is None:
        raise DataError(f"unknown GLUE task {name!r:.80}; the tasks are {', '.join(TASKS)}")
    return task
