"""The catalogue of `bertbench fetch`: addresses, sizes and checksums of data sets and models.

The checksums were published by others: SQuAD, GLUE and XNLI from the `dataset_infos.json` files
of huggingface/datasets 1.x, TriviaQA from `url_checksums` of tensorflow/datasets, and those of the
files inside Google's archives of 2018 from `GooglePretrainedWeightDownloader.py` of
NVIDIA/DeepLearningExamples. The addresses of the models are those of google-research/bert's
`README.md` and `multilingual.md`. Nobody published checksums of the models of 2019 and 2020.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from finetune.errors import InputError

Preparation = Literal["none", "unpack", "mrpc"]

_SQUAD_URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
_META_URL = "https://dl.fbaipublicfiles.com"
_BERT_URL = "https://storage.googleapis.com/bert_models"


@dataclass(frozen=True)
class Source:
    """One file on a server.

    Attributes:
        url: its address.
        path: where it is kept, relative to the folder of `--to`.
        size_bytes: its published size; None if there is none.
        sha256: its published checksum in lower-case hexadecimal; None if there is none.
    """

    url: str
    path: str
    size_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Entry:
    """A data set or a model that can be fetched.

    Attributes:
        name: its name on the command line.
        what: a description in a few words.
        licence: its licence, or where to find it.
        folder: where its files are put, relative to the folder of `--to`.
        sources: the files it is made from.
        preparation: `none` leaves the files as they are; `unpack` unpacks archives into `folder`,
            one after the other; `mrpc` splits the files of MRPC as GLUE does.
        aliases: other names.
        members: published SHA-256 of files in `folder`, by path.
        expected: paths in `folder` that must exist after unpacking.
        approximate_bytes: about the size of the download, where no size was published.
        verb: the command that uses it, as in `run squad`.
        path_flags: flags of that command whose value is a path relative to the folder of `--to`.
        flags: other flags of that command.
    """

    name: str
    what: str
    licence: str
    folder: str
    sources: tuple[Source, ...]
    preparation: Preparation = "unpack"
    aliases: tuple[str, ...] = ()
    members: Mapping[str, str] = field(default_factory=dict)
    expected: tuple[str, ...] = ()
    approximate_bytes: int = 0
    verb: str = ""
    path_flags: tuple[tuple[str, str], ...] = ()
    flags: str = ""

    @property
    def size_bytes(self) -> int | None:
        """Size of the download; None if it is not known exactly."""
        sizes = [source.size_bytes for source in self.sources]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def has_published_checksums(self) -> bool:
        """Whether the files can be compared with published checksums."""
        return bool(self.members) or all(source.sha256 for source in self.sources)


def _squad(version: str, files: Mapping[str, tuple[int, str]]) -> Entry:
    sources = tuple(
        Source(f"{_SQUAD_URL}/{split}-v{version}.json", f"squad/{split}-v{version}.json", *known)
        for split, known in files.items()
    )
    return Entry(
        name=f"squad-v{version}",
        what=f"SQuAD {version}, train and dev",
        licence="CC BY-SA 4.0",
        folder="squad",
        sources=sources,
        preparation="none",
        verb="run squad",
        path_flags=(("--train_file", sources[0].path), ("--predict_file", sources[1].path)),
        flags="--version_2_with_negative" if version == "2.0" else "",
    )


def _meta(place: str, size_bytes: int, sha256: str, path: str = "") -> Source:
    return Source(f"{_META_URL}/{place}", path or place.rpartition("/")[2], size_bytes, sha256)


def _glue(task: str, file: str, size_bytes: int, sha256: str, *expected: str) -> Entry:
    return Entry(
        name=task.lower(),
        what=f"GLUE: {task}",
        licence="see its sources",
        folder=f"glue/{task}",
        sources=(_meta(f"glue/data/{file}", size_bytes, sha256),),
        aliases=(f"glue-{task}", task.replace("-", "")),
        expected=expected or ("train.tsv", "dev.tsv", "test.tsv"),
        verb="run classifier",
        path_flags=(("--data_dir", f"glue/{task}"),),
        flags=f"--task_name {task}",
    )


# fmt: off
_DATA = (
    _squad("1.1", {
        "train": (30288272, "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955"),
        "dev": (4854279, "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9"),
    }),
    _squad("2.0", {
        "train": (42123633, "68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002"),
        "dev": (4370528, "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8"),
    }),
    Entry(
        name="mrpc",
        what="GLUE: MRPC",
        licence="see its sources",
        folder="glue/MRPC",
        sources=(
            _meta("senteval/senteval_data/msr_paraphrase_train.txt", 1047044,
                  "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
            _meta("senteval/senteval_data/msr_paraphrase_test.txt", 441275,
                  "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"),
            _meta("glue/data/mrpc_dev_ids.tsv", 6222,
                  "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"),
        ),
        preparation="mrpc",
        aliases=("glue-mrpc",),
        verb="run classifier",
        path_flags=(("--data_dir", "glue/MRPC"),),
        flags="--task_name MRPC",
    ),
    _glue("CoLA", "CoLA.zip", 376971,
          "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    _glue("SST-2", "SST-2.zip", 7439277,
          "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    _glue("STS-B", "STS-B.zip", 802872,
          "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    _glue("QQP", "QQP-clean.zip", 41696084,
          "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    _glue("MNLI", "MNLI.zip", 312783507,
          "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633",
          "train.tsv", "dev_matched.tsv", "test_matched.tsv"),
    _glue("QNLI", "QNLIv2.zip", 10627589,
          "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    _glue("RTE", "RTE.zip", 697150,
          "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    _glue("WNLI", "WNLI.zip", 28999,
          "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
    Entry(
        name="ax",
        what="GLUE: diagnostic set",
        licence="see its sources",
        folder="glue/AX",
        sources=(
            _meta("glue/data/AX.tsv", 222257,
                  "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd",
                  "glue/AX/diagnostic.tsv"),
        ),
        preparation="none",
        aliases=("glue-ax", "diagnostic"),
    ),
    Entry(
        name="xnli",
        what="XNLI, 15 languages",
        licence="CC BY-NC 4.0",
        folder="xnli",
        sources=(
            _meta("XNLI/XNLI-1.0.zip", 17865352,
                  "4ba1d5e1afdb7161f0f23c66dc787802ccfa8a25a3ddd3b165a35e50df346ab1"),
            _meta("XNLI/XNLI-MT-1.0.zip", 466098360,
                  "f732517ba2fb1d550e9f3c2aabaef6017c91ee2dcec90e878f138764d224db05"),
        ),
        expected=("xnli.dev.tsv", "multinli/multinli.train.zh.tsv"),
        verb="run classifier",
        path_flags=(("--data_dir", "xnli"),),
        flags="--task_name XNLI",
    ),
    Entry(
        name="triviaqa",
        what="TriviaQA, with documents",
        licence="see its sources",
        folder="triviaqa",
        sources=(
            Source("https://nlp.cs.washington.edu/triviaqa/data/triviaqa-rc.tar.gz",
                   "triviaqa-rc.tar.gz", 2665779500,
                   "ef94fac6db0541e5bb5b27020d067a8b13b1c1ffc52717e836832e02aaed87b9"),
        ),
        aliases=("triviaqa-rc",),
        expected=("qa/wikipedia-train.json", "evidence"),
        verb="convert triviaqa",
        path_flags=(("--triviaqa_file", "triviaqa/qa/wikipedia-train.json"),
                    ("--data_dir", "triviaqa/evidence")),
    ),
)
# fmt: on

_WEIGHTS = "bert_model.ckpt.data-00000-of-00001"
# fmt: off
_MEMBER_CHECKSUMS: Mapping[str, Mapping[str, str]] = {
    "uncased_L-12_H-768_A-12": {
        "bert_config.json": "7b4e5f53efbd058c67cda0aacfafb340113ea1b5797d9ce6ee411704ba21fcbc",
        _WEIGHTS: "58580dc5e0bf0ae0d2efd51d0e8272b2f808857f0a43a88aaf7549da6d7a8a84",
        "bert_model.ckpt.index": "04c1323086e2f1c5b7c0759d8d3e484afbb0ab45f51793daab9f647113a0117b",
        "bert_model.ckpt.meta": "dd5682170a10c3ea0280c2e9b9a45fee894eb62da649bbdea37b38b0ded5f60e",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    "uncased_L-24_H-1024_A-16": {
        "bert_config.json": "bfa42236d269e2aeb3a6d30412a33d15dbe8ea597e2b01dc9518c63cc6efafcb",
        _WEIGHTS: "bc6b3363e3be458c99ecf64b7f472d2b7c67534fd8f564c0556a678f90f4eea1",
        "bert_model.ckpt.index": "68b52f2205ffc64dc627d1120cf399c1ef1cbc35ea5021d1afc889ffe2ce2093",
        "bert_model.ckpt.meta": "6fcce8ff7628f229a885a593625e3d5ff9687542d5ef128d9beb1b0c05edc4a1",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    "cased_L-12_H-768_A-12": {
        "bert_config.json": "f11dfb757bea16339a33e1bf327b0aade6e57fd9c29dc6b84f7ddb20682f48bc",
        _WEIGHTS: "734d5a1b68bf98d4e9cb6b6692725d00842a1937af73902e51776905d8f760ea",
        "bert_model.ckpt.index": "517d6ef5c41fc2ca1f595276d6fccf5521810d57f5a74e32616151557790f7b1",
        "bert_model.ckpt.meta": "5f8a9771ff25dadd61582abb4e3a748215a10a6b55947cbb66d0f0ba1694be98",
        "vocab.txt": "eeaa9875b23b04b4c54ef759d03db9d1ba1554838f8fb26c5d96fa551df93d02",
    },
    "cased_L-24_H-1024_A-16": {
        "bert_config.json": "7adb2125c8225da495656c982fd1c5f64ba8f20ad020838571a3f8a954c2df57",
        _WEIGHTS: "6ff33640f40d472f7a16af0c17b1179ca9dcc0373155fb05335b6a4dd1657ef0",
        "bert_model.ckpt.index": "ef42a53f577fbe07381f4161b13c7cab4f4fc3b167cec6a9ae382c53d18049cf",
        "bert_model.ckpt.meta": "d2ddff3ed33b80091eac95171e94149736ea74eb645e575d942ec4a5e01a40a1",
        "vocab.txt": "eeaa9875b23b04b4c54ef759d03db9d1ba1554838f8fb26c5d96fa551df93d02",
    },
    "multi_cased_L-12_H-768_A-12": {
        "bert_config.json": "e76c3964bc14a8bb37a5530cdc802699d2f4a6fddfab0611e153aa2528f234f0",
        _WEIGHTS: "55b8a2df41f69c60c5180e50a7c31b7cdf6238909390c4ddf05fbc0d37aa1ac5",
        "bert_model.ckpt.index": "7d8509c2a62b4e300feb55f8e5f1eef41638f4998dd4d887736f42d4f6a34b37",
        "bert_model.ckpt.meta": "95e5f1997e8831f1c31e5cf530f1a2e99f121e9cd20887f2dce6fe9e3343e3fa",
        "vocab.txt": "fe0fda7c425b48c516fc8f160d594c8022a0808447475c1a7c6d6479763f310c",
    },
    "multilingual_L-12_H-768_A-12": {
        "bert_config.json": "49063bb061390211d2fdd108cada1ed86faa5f90b80c8f6fdddf406afa4c4624",
        _WEIGHTS: "3cd83912ebeb0efe2abf35c9f1d5a515d8e80295e61c49b75c8853f756658429",
        "bert_model.ckpt.index": "87c372c1a3b1dc7effaaa9103c80a81b3cbab04c7933ced224eec3b8ad2cc8e7",
        "bert_model.ckpt.meta": "27f504f34f02acaa6b0f60d65195ec3e3f9505ac14601c6a32b421d0c8413a29",
        "vocab.txt": "87b44292b452f6c05afa49b2e488e7eedf79ea4f4c39db6f2f4b37764228ef3f",
    },
    "chinese_L-12_H-768_A-12": {
        "bert_config.json": "7aaad0335058e2640bcb2c2e9a932b1cd9da200c46ea7b8957d54431f201c015",
        _WEIGHTS: "756699356b78ad0ef1ca9ba6528297bcb3dd1aef5feadd31f4775d7c7fc989ba",
        "bert_model.ckpt.index": "46315546e05ce62327b3e2cd1bed22836adcb2ff29735ec87721396edb21b82e",
        "bert_model.ckpt.meta": "c0f8d51e1ab986604bc2b25d6ec0af7fd21ff94cf67081996ec3f3bf5d823047",
        "vocab.txt": "45bbac6b341c319adc98a532532882e91a9cefc0329aa57bac9ae761c27b291c",
    },
}
# fmt: on


def _archive_bytes(layers: int, hidden: int, vocab_size: int) -> int:
    """Estimate the size of a model's archive: four bytes a parameter, compressed by 7 %."""
    encoder = layers * (12 * hidden + 13) * hidden
    others = (vocab_size + 514 + 2 * hidden + 6) * hidden + vocab_size
    return int(0.93 * 4 * (encoder + others))


def _model(
    date: str,
    archive: str,
    name: str,
    *aliases: str,
    vocab_size: int = 30522,
    folder: str = "",
) -> Entry:
    folder = folder or archive
    layers, hidden = (int(part[2:]) for part in archive.split("_")[-3:-1])
    return Entry(
        name=name,
        what=f"BERT, {layers} layers, hidden {hidden}, {date.replace('_', '-')}",
        licence="Apache-2.0",
        folder=folder,
        sources=(Source(f"{_BERT_URL}/{date}/{archive}.zip", f"{folder}.zip"),),
        aliases=(folder, *aliases),
        members=_MEMBER_CHECKSUMS.get(folder, {}),
        expected=("bert_config.json", "vocab.txt", "bert_model.ckpt.index"),
        approximate_bytes=_archive_bytes(layers, hidden, vocab_size),
        verb="run squad",
        path_flags=(("--model", folder),),
    )


_NAMED_MINIATURES = {
    (2, 128): "bert-tiny",
    (4, 256): "bert-mini",
    (4, 512): "bert-small",
    (8, 512): "bert-medium",
}


def _miniature(layers: int, hidden: int) -> Entry:
    archive = f"uncased_L-{layers}_H-{hidden}_A-{hidden // 64}"
    # A better model of this size was released in 2018; that one has the plain name.
    folder = f"{archive}-2020" if (layers, hidden) == (12, 768) else archive
    name = _NAMED_MINIATURES.get((layers, hidden))
    aliases = (f"{name}-uncased",) if name else ()
    return _model("2020_02_20", archive, name or folder, *aliases, folder=folder)


_MINIATURES = tuple(_miniature(n, h) for n in (2, 4, 6, 8, 10, 12) for h in (128, 256, 512, 768))

# fmt: off
_MODELS = (
    _model("2018_10_18", "uncased_L-12_H-768_A-12", "bert-base-uncased", "bert-base"),
    _model("2018_10_18", "uncased_L-24_H-1024_A-16", "bert-large-uncased", "bert-large"),
    _model("2018_10_18", "cased_L-12_H-768_A-12", "bert-base-cased",
           vocab_size=28996),
    _model("2018_10_18", "cased_L-24_H-1024_A-16", "bert-large-cased",
           vocab_size=28996),
    _model("2019_05_30", "wwm_uncased_L-24_H-1024_A-16", "bert-large-uncased-wwm",
           "bert-large-uncased-whole-word-masking", "bert-large-wwm"),
    _model("2019_05_30", "wwm_cased_L-24_H-1024_A-16", "bert-large-cased-wwm",
           "bert-large-cased-whole-word-masking", vocab_size=28996),
    _model("2018_11_23", "multi_cased_L-12_H-768_A-12", "bert-base-multilingual-cased",
           vocab_size=119547),
    _model("2018_11_03", "multilingual_L-12_H-768_A-12", "bert-base-multilingual-uncased",
           "bert-base-multilingual", vocab_size=105879),
    _model("2018_11_03", "chinese_L-12_H-768_A-12", "bert-base-chinese", vocab_size=21128),
)
# fmt: on

ENTRIES: tuple[Entry, ...] = (*_DATA, *_MODELS, *_MINIATURES)
"""All entries, in the order in which they are listed."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "squad": ("squad-v1.1", "squad-v2.0"),
    "glue": tuple(entry.name for entry in _DATA if entry.folder.startswith("glue/")),
    # Google also has one archive of all; single ones lose less when a download is interrupted.
    "all_bert_models": tuple(entry.name for entry in _MINIATURES),
}
"""Names that stand for several entries."""


def _key(name: str) -> str:
    return name.lower().replace("_", "-")


_BY_KEY = {_key(name): entry for entry in ENTRIES for name in (entry.name, *entry.aliases)}
_GROUPS_BY_KEY = {_key(name): members for name, members in GROUPS.items()}


def find_entries(names: Sequence[str]) -> tuple[Entry, ...]:
    """Look up names, aliases and groups, in any case, with dashes or underscores.

    Args:
        names: names as the user writes them.

    Returns:
        Each entry once, in the order of the names.

    Raises:
        InputError: a name is unknown.
    """
    found: dict[str, Entry] = {}
    for name in names:
        for member in _GROUPS_BY_KEY.get(_key(name), (name,)):
            entry = _BY_KEY.get(_key(member))
            if entry is None:
                close = difflib.get_close_matches(_key(name), (*_BY_KEY, *_GROUPS_BY_KEY), n=1)
                likely = f"did you mean {close[0]}? " if close else ""
                raise InputError(
                    f"no data set or model is called {name!r}",
                    hint=f"{likely}`bertbench fetch` lists names",
                )
            found[entry.name] = entry
    return tuple(found.values())
