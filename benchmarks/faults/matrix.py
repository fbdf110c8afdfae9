"""Hurt `probe` and `run` in every way that is listed, again and again, and see what is left.

    python benchmarks/faults/matrix.py [--quick] [--json FILE] [--faults TEXT ...] [--tries N]

Each fault meets a command at a random moment. Afterwards the command is repeated until it is done.
Then nothing may be lost, no verdict may be wrong, nothing may have hung, and no process or
temporary file may be left:

- an ending is the exit code that belongs to it, in 600 s, without a traceback;
- no trial in the ledger contradicts the limits of a probe that nothing hurt, and the limits of the
  repeated probe are those;
- checkpoints and trials never become fewer, and the losses of the repeated run are those of a run
  that nothing hurt;
- no process of the command outlives it, and no hidden or temporary file the repeated command.

Ten tries of 40 faults take about an hour on two cores; `--quick` tries each once. Some faults need
Linux and the rights to mount a file system and to make a control group; elsewhere they are left
out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import math
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fault_site import (
    Site,
    files_left,
    forget,
    judge,
    limits,
    losses,
    make_site,
    saved_step,
    start,
    verdicts,
)
from injections import FAULTS, Fault

from finetune.storage.json_files import json_text

_SAME_LOSS = 2e-3
"""Relative difference of the losses of two runs: kernels on several threads add in any order."""

_CHAIN = 5
"""Faults that one site meets before the command is let alone."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a command does that nothing hurts.

    Attributes:
        seconds: how long it takes.
        limits: largest batch and evidence by length, of a probe.
        losses: by step, of a run.
        files: of a run's output folder.
    """

    seconds: float
    limits: dict[int, tuple[int, str]]
    losses: dict[int, float]
    files: frozenset[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one try of each fault")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("--faults", nargs="+", help="only those whose verb and name contain a text")
    parser.add_argument("--tries", type=int, default=10, help="of each fault")
    parser.add_argument("--parallel", type=int, default=3, help="sites at work at the same time")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    arguments = parser.parse_args()
    chosen = [
        fault
        for fault in FAULTS
        if not arguments.faults
        or any(text in f"{fault.verb}: {fault.name}" for text in arguments.faults)
    ]
    tries = 1 if arguments.quick else arguments.tries
    with tempfile.TemporaryDirectory(prefix="bbf-") as folder:
        references = {
            verb: _reference(Path(folder, verb), verb) for verb in {f.verb for f in chosen}
        }
        with concurrent.futures.ThreadPoolExecutor(arguments.parallel) as pool:
            futures = {
                pool.submit(_try, Path(folder), number, fault, tries, references, arguments.seed): (
                    fault
                )
                for number, fault in enumerate(chosen)
                if fault.possible()
            }
            results = []
            for future in concurrent.futures.as_completed(futures):
                results.append(future.result())
                _show(results[-1])
                if arguments.json:
                    text = json_text(results, indent=1) + "\n"
                    arguments.json.write_text(text, encoding="utf-8")
    left_out = [f"{fault.verb}: {fault.name}" for fault in chosen if not fault.possible()]
    if left_out:
        print(f"not possible here: {', '.join(left_out)}")
    bad = sum(result["bad"] for result in results)
    print(f"{len(results)} faults, {sum(r['tries'] for r in results)} tries, {bad} bad")
    sys.exit(1 if bad else 0)


def _show(result: dict[str, Any]) -> None:
    line = f"{result['verb']:5}  {result['fault']:30}  {result['tries']:3} tries"
    print(f"{line}  {result['bad']:3} bad  {result['seconds']:6.0f} s", flush=True)
    for problem in result["problems"]:
        print(f"       {problem}", flush=True)


def _reference(root: Path, verb: str) -> Reference:
    site = make_site(root, verb)
    began = time.monotonic()
    command = start(site)
    problems = judge(site, command, command.wait(), (0,))
    seconds = time.monotonic() - began
    problems += files_left(site)
    if problems:
        raise SystemExit(f"{verb} without a fault: {'; '.join(problems)}")
    found = Reference(
        seconds,
        limits(site) if verb == "probe" else {},
        losses(site),
        _named(site),
    )
    print(f"{verb}: {seconds:.0f} s unhurt; {found.limits or len(found.losses)}", flush=True)
    forget(site)
    return found


def _named(site: Site) -> frozenset[str]:
    names = (str(path.relative_to(site.output)) for path in site.output.rglob("*"))
    # Which checkpoint is there beside the last one depends on where the run was interrupted.
    last = f"model.ckpt-{saved_step(site)}."
    return frozenset(
        name
        for name in names
        if "events.out" not in name and (not name.startswith("model.ckpt-") or last in name)
    )


def _try(
    folder: Path,
    number: int,
    fault: Fault,
    tries: int,
    references: dict[str, Reference],
    seed: int,
) -> dict[str, Any]:
    reference = references[fault.verb]
    rng = random.Random(f"{seed} {fault.verb} {fault.name}")
    began = time.monotonic()
    found: list[str] = []
    bad = done = chains = 0
    while done < tries:
        site = make_site(folder / f"{number}-{chains}", fault.verb)
        chains += 1
        chain_bad = False
        for _ in range(min(_CHAIN if fault.keeps else 1, tries - done)):
            before = len(verdicts(site)), saved_step(site)
            problems = fault.attempt(site, rng, reference.seconds)
            done += 1
            if fault.keeps:
                problems += _lost(site, before)
            problems += _wrong_verdicts(site, reference)
            found += [f"try {done}: {problem}" for problem in problems]
            bad += bool(problems)
            chain_bad = chain_bad or bool(problems)
            if fault.verb == "run" and saved_step(site) == max(reference.losses):
                break
        problems = _end(site, reference)
        found += [f"after try {done}: {problem}" for problem in problems]
        bad += bool(problems) and not chain_bad
        forget(site)
    return {
        "verb": fault.verb,
        "fault": fault.name,
        "tries": done,
        "bad": bad,
        "problems": found,
        "seconds": time.monotonic() - began,
    }


def _lost(site: Site, before: tuple[int, int]) -> list[str]:
    now = len(verdicts(site)), saved_step(site)
    names = ("trials in the ledger", "steps saved")
    return [
        f"{was} {name} before, {is_now} after"
        for name, was, is_now in zip(names, before, now, strict=True)
        if is_now < was
    ]


def _wrong_verdicts(site: Site, reference: Reference) -> list[str]:
    problems = []
    for seq_len, batch, outcome in verdicts(site) if site.verb == "probe" else ():
        limit = reference.limits[seq_len][0]
        if (outcome == "oom" and batch <= limit) or (outcome == "fits" and batch > limit):
            problems.append(f"length {seq_len}: batch {batch} {outcome}, the limit is {limit}")
    return problems


def _end(site: Site, reference: Reference) -> list[str]:
    """Let the command end its work, and compare with the work that nothing hurt."""
    command = start(site)
    problems = judge(site, command, command.wait(), (0,))
    problems += [f"left behind: {name}" for name in files_left(site)]
    if site.verb == "probe":
        found = limits(site)
        if found != reference.limits:
            problems.append(f"limits {found} instead of {reference.limits}")
        return problems
    now = losses(site)
    wrong = [
        step
        for step, loss in reference.losses.items()
        if not math.isclose(now.get(step, math.nan), loss, rel_tol=_SAME_LOSS)
    ]
    if wrong:
        problems.append(f"{len(wrong)} of {len(reference.losses)} losses differ, from {wrong[0]}")
    missing = reference.files - _named(site)
    if missing:
        problems.append(f"missing in the output folder: {', '.join(sorted(missing))}")
    return problems


if __name__ == "__main__":
    main()
