"""The small data set inside of the package, so that a first run needs no download.

Its texts, questions and sentence pairs were written for this package. With them every step can be
tried, and the training loss falls, but the scores mean nothing. The vocabulary is made from these
texts, for uncased models. It also spells the cased texts without `[UNK]`, in more pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from finetune.errors import InputError


@dataclass(frozen=True)
class DemoFiles:
    """Paths of the demo's files.

    Attributes:
        squad_train: 40 questions about 8 paragraphs, in the format of SQuAD v1.1.
        squad_dev: 13 questions about 3 other paragraphs, each with three reference answers.
        mrpc_dir: folder like MRPC's, with `train.tsv` (40 pairs), `dev.tsv` (12) and `test.tsv`
            (6).
        vocab_file: WordPiece vocabulary of all these texts, for `do_lower_case=True`.
        bert_config_file: configuration of a model of 2 layers, hidden size 64, at most 128 tokens.
    """

    squad_train: Path
    squad_dev: Path
    mrpc_dir: Path
    vocab_file: Path
    bert_config_file: Path


def demo_file(name: str) -> Path:
    """Return the path of one file or folder of the demo.

    Args:
        name: path within the demo's folder, such as `vocab.txt` or `MRPC/dev.tsv`.

    Raises:
        InputError: the file is missing.
    """
    path = Path(str(resources.files("finetune.tasks"))).joinpath("demo", name)
    if not path.exists():
        raise InputError(
            "the demo data is incomplete", path=path, hint="install the package again, unpacked"
        )
    return path


def demo_files() -> DemoFiles:
    """Return the paths of the whole demo.

    Raises:
        InputError: a file is missing.
    """
    return DemoFiles(
        squad_train=demo_file("squad-train.json"),
        squad_dev=demo_file("squad-dev.json"),
        mrpc_dir=demo_file("MRPC"),
        vocab_file=demo_file("vocab.txt"),
        bert_config_file=demo_file("bert_config.json"),
    )
