"""The page: what is in it, that it needs nothing but itself, and that it works in a browser."""

from __future__ import annotations

import html
import html.parser
import json
import re
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from bertbench.ledger.records import LedgerRow
from finetune.train.evaluation import EvalRecord, read_eval_log
from helpers.ledger_rows import CPU, failed, fits, oom, rows_of
from reports.page import build_page
from reports.pictures.figures import Picture
from reports.report import Report, name_apart
from reports.runs import Run, read_run

ROWS = [
    *rows_of(fits(31, seconds=9.0), oom(32), seq_len=384, mib=11430),
    *rows_of(fits(4), fits(200), oom(201), seq_len=64, mib=11430, policy="full"),
    *rows_of(failed(3), seq_len=128, mib=11430),
]
OUTSIDE = re.compile(
    r"""\s(?:src|(?:xlink:)?href|action|poster)\s*=\s*(?!["']?(?:#|data:,))|url\((?!#)|@import"""
)


def report_of(rows: list[LedgerRow], runs: list[Run] | None = None) -> Report:
    made = datetime(2026, 11, 26, 9, 30, tzinfo=timezone.utc)
    return Report(Path("/somewhere/ledger.sqlite"), rows, runs or [], 32, made)


class Reader(html.parser.HTMLParser):
    """Reads ids and the text of tables, and sees that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if "id" in values:
            self.ids.append(str(values["id"]))
        if tag in ("meta", "link", "input"):
            return
        self.open.append(tag)
        if tag == "table":
            self._rows = self.tables.setdefault(str(values.get("id")), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self._rows[-1][-1] += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    assert len(set(reader.ids)) == len(reader.ids)
    return reader


def test_the_page_says_what_was_measured() -> None:
    page = build_page(report_of(ROWS))
    reader = read(page)
    assert (
        "6 trials of 3 cells; 2 certified, 1 without an answer because all trials failed." in page
    )
    assert "Made on 26 November 2026, 09:30 UTC by bertbench" in page
    assert "/somewhere" not in page
    cells = reader.tables["cell-table"]
    assert len(cells) == 4
    first = dict(zip(cells[0], cells[3], strict=True))
    assert (first["model"], first["tokens"], first["largest"]) == ("BERT-Base", "384", "31*")
    assert (first["evidence"], first["published"], first["ratio"]) == ("certified", "12", "2.58")
    assert first["next batch"] == "32: ResourceExhaustedError: OOM when allocating <tensor>"
    assert dict(zip(cells[0], cells[2], strict=True))["next batch"] == "killed by SIGSEGV"
    trials = reader.tables["trial-table"]
    assert len(trials) == 7
    assert [line[7] for line in trials[1:]] == ["failed", "oom", "fits", "fits", "oom", "fits"]
    plans = reader.tables["plan-table"]
    assert [line[1] for line in plans[1:]] == ["64", "128", "384"]
    assert "bertbench plan --target-batch 32 --model bert-base --seq-len 384" in page
    # Names from outside are text, not markup.
    assert "Some &amp; CPU" in page
    assert "<tensor>" not in page


def test_the_page_needs_nothing_but_itself() -> None:
    page = build_page(report_of(ROWS))
    without = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    assert not OUTSIDE.search(without)
    assert "http:" not in without
    assert "https:" not in without
    assert OUTSIDE.search('<img  src="x.png">')
    assert OUTSIDE.search("a { background: url(x.png) }")
    assert len(page.encode()) < 3_000_000


@pytest.fixture(scope="module")
def names_of_much() -> list[str]:
    """What a page has where there is much to show."""
    return read(build_page(report_of([*ROWS, *rows_of(fits(8), fits(16), seq_len=320)]))).ids


@pytest.mark.parametrize(
    ("rows", "words", "without"),
    [
        ([], "No trials in ledger.sqlite yet", "plan-table"),
        (rows_of(fits(3)), "1 trial of 1 cell; 0 certified", "throughput"),
        (rows_of(failed(3), failed(4)), "1 without an answer because all trials failed", "limits-"),
        (rows_of(oom(1), model="bert-large", mib=300), "does not fit", "footprint"),
    ],
)
def test_little_makes_a_page_too(
    rows: list[LedgerRow], words: str, without: str, names_of_much: list[str]
) -> None:
    page = build_page(report_of(rows))
    reader = read(page)
    assert words in page
    assert not any(name.startswith(without) for name in reader.ids)
    assert any(name.startswith(without) for name in names_of_much)


def test_what_is_no_limit_has_no_ratio() -> None:
    page = build_page(report_of([*rows_of(fits(8)), *rows_of(fits(6), oom(7), seq_len=512)]))
    head, *lines = read(page).tables["cell-table"]
    assert [line[head.index("ratio")] for line in lines] == ["-", "1"]


def test_workloads_without_a_plan_are_counted() -> None:
    rows = [
        row
        for number, seq_len in enumerate(range(16, 16 * 15, 16))
        for row in rows_of(fits(3), model="bert-tiny", seq_len=seq_len, first=1 + number)
    ]
    assert "plans the other 2 too" in build_page(report_of(rows))
    assert "plans the other" not in build_page(report_of(rows[2:]))


def test_many_trials_make_a_page_that_can_be_opened() -> None:
    rows: list[LedgerRow] = []
    trials = [fits(n + 1) if n < 4 else oom(n + 1) for n in range(5)]
    policies = ("none", "selective", "full", "nested")
    for number in range(1000):
        rows += rows_of(
            *trials, model=("bert-tiny", "bert-base")[number % 2], policy=policies[number // 2 % 4],
            seq_len=(64, 128, 256, 384, 512)[number // 8 % 5], mib=1000 + number // 20,
            device=CPU, first=len(rows) + 1,
        )  # fmt: skip
    page = build_page(report_of(rows))
    assert len(page.encode()) < 3_000_000
    assert "5,000 trials of 1,000 cells" in page
    assert "The newest 1200 of 5000" in page
    assert "and 42 more environments" in page
    tables = read(page).tables
    assert (len(tables["trial-table"]), len(tables["cell-table"])) == (1201, 801)


def write_run(folder: Path) -> Path:
    folder.mkdir()
    record = {
        "task": "squad",
        "identity": {"train_batch_size": 24, "num_train_steps": 40},
        "invocations": [{"micro_batch": 8, "levers": {"checkpointing": "full"}}],
        "steps_down": [{}],
        "results": {"f1": 65.8, "exact_match": 54.4, "micro_batch": 8, "global_step": 40},
    }
    (folder / "run.json").write_text(json.dumps(record))
    lines = [
        {"step": n, "loss": 5 / n, "learning_rate": 1e-4, "gradient_norm": 1.0, "seconds": 3.6}
        for n in range(1, 41)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "train_log.jsonl").write_text(text + '{"step": 41, "lo')
    records = [EvalRecord(20, {"exact": 40.5, "f1": 50.5}), EvalRecord(40, {"f1": 65.8})]
    (folder / "eval_log.jsonl").write_text(
        "".join(json.dumps({"step": r.step, **r.metrics}) + "\n" for r in records)
    )
    assert read_eval_log(folder) == records
    return folder


def test_runs_are_part_of_it(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "squad_out"))
    report = report_of(ROWS, [run])
    page = build_page(report)
    (_, line) = read(page).tables["run-table"]
    assert line == ["squad_out", "squad", "24", "8", "full", "40", "40", "2 min 24 s", "1",
                    "f1 65.8, exact_match 54.4"]  # fmt: skip
    picture = next(picture for picture in report.pictures if picture.name == "training")
    loss, scores = picture.draw().axes
    curve = next(line for line in loss.get_lines() if line.get_label() == "squad_out")
    assert list(curve.get_xdata()) == list(range(1, 41))
    assert curve.get_ydata()[0] == 5.0
    assert list(scores.get_lines()[0].get_ydata()) == [50.5, 65.8]
    assert scores.get_ylabel() == "f1"


def test_runs_of_one_name_have_pictures_of_their_own(tmp_path: Path) -> None:
    names = ("x-2", "x", "a/x", "_x", "m$\\foo$ [b]")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
    runs = [read_run(write_run(tmp_path / name)) for name in names]
    report = report_of(ROWS, runs)
    pictures = [Picture(f"precision-recall-{run.name}", "", "", Figure) for run in runs]
    named = [picture.name for picture in name_apart(pictures)]
    assert named == [
        "precision-recall-x-2", "precision-recall-x", "precision-recall-x-3",
        "precision-recall-_x", "precision-recall-m-foo-b-",
    ]  # fmt: skip
    page = build_page(report)
    read(page)
    assert "m$\\foo$ [b]" in page
    training = next(picture for picture in report.pictures if picture.name == "training")
    (legend,) = training.draw().legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "x-2", "x", "x (2)", " _x", "m$\\foo$ [b]"
    ]  # fmt: skip


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-quic", "--enable-logging=stderr", "--virtual-time-budget=20000",
    # The browser's own requests, to its maker.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip

CLICKS = """
<script>
const results = {errors: []};
addEventListener("error", (event) => results.errors.push(event.message));
const table = document.getElementById("cell-table");
const column = (number) => [...table.tBodies[0].rows].map((row) => row.cells[number].textContent);
const button = table.querySelectorAll("th button")[5];
button.click();
results.rising = column(5);
button.click();
results.falling = column(5);
results.sorted = button.parentElement.getAttribute("aria-sort");
const search = document.querySelector("[data-filter=cell-table]");
search.value = "BASE full";
search.dispatchEvent(new Event("input"));
results.shown = [...table.tBodies[0].rows].filter((row) => !row.hidden).length;
results.count = document.querySelector("[data-count=cell-table]").textContent;
results.resources = performance.getEntriesByType("resource").map((entry) => entry.name);
const drawn = [...document.querySelectorAll("figure svg")].filter((svg) => svg.clientWidth > 0);
results.figures = document.querySelectorAll("figure").length;
results.pictures = drawn.length;
results.narrow = drawn.filter((svg) => svg.parentElement.className === "small").length;
results.cut = drawn.filter((svg) => svg.clientWidth > document.body.clientWidth).length;
const wide = document.documentElement;
results.overflow = wide.scrollWidth - wide.clientWidth;
document.body.replaceChildren(JSON.stringify(results));
</script>
"""


def browse(page: str, tmp_path: Path, width: int) -> tuple[str, str]:
    """Open a page; give its elements as they are in the end, and what the browser had to say."""
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    result = subprocess.run(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},900", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return result.stdout, result.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_in_a_browser(tmp_path: Path, width: int) -> None:
    page = build_page(report_of(ROWS)).replace("</body>", f"{CLICKS}</body>")
    elements, said = browse(page, tmp_path, width)
    found = re.search(r"<body>(\{.*\})\s*</body>", elements, re.DOTALL)
    assert found, elements[-500:]
    results = json.loads(html.unescape(found.group(1)))
    assert results["errors"] == []
    assert "CONSOLE" not in said
    assert results["rising"] == ["-", "31*", "200*"]
    assert results["falling"] == ["200*", "31*", "-"]
    assert results["sorted"] == "descending"
    assert (results["shown"], results["count"]) == (1, "1 of 3")
    assert results["resources"] == []
    # Each once, as it can be read at this width.
    assert results["pictures"] == results["figures"] >= 8
    assert bool(results["narrow"]) == (width < 640)
    assert results["cut"] == 0
    assert results["overflow"] <= 0


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_refuses_to_load_anything(tmp_path: Path) -> None:
    """So that the check for errors above is one."""
    page = build_page(report_of(ROWS))
    page = page.replace("</body>", '<img src="http://127.0.0.1:9/x.png"></body>')
    assert "Content Security Policy" in browse(page, tmp_path, 1280)[1]
