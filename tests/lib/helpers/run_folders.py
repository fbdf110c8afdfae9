"""Folders of runs, made up."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CONTEXT = "Paris and Rome."

QUESTIONS = [("a", "Paris"), ("b", "Rome"), ("c", None), ("d", None)]

CANDIDATES = {"a": ["Paris"], "b": ["", "Milan"], "c": ["", "Rome"], "d": ["Oslo", ""]}

ODDS = {"a": -3.0, "b": -1.0, "c": 4.0, "d": -2.0}


def squad_run(tmp_path: Path, **changes: Any) -> Path:
    data = {
        "version": "v2.0",
        "data": [
            {
                "title": "t",
                "paragraphs": [
                    {
                        "context": CONTEXT,
                        "qas": [
                            {
                                "id": name, "question": "Where?", "is_impossible": answer is None,
                                "answers": [] if answer is None else [
                                    {"text": answer, "answer_start": CONTEXT.index(answer)}
                                ],
                            }
                            for name, answer in QUESTIONS
                        ],
                    }
                ],
            }
        ],
    }  # fmt: skip
    dev = tmp_path / "dev.json"
    dev.write_text(json.dumps(data))
    folder = tmp_path / "run"
    folder.mkdir()
    record = {
        "task": "squad",
        "squad": {"version_2_with_negative": True, "predict_file": str(dev),
                  "null_score_diff_threshold": 0.0},
        "predict_file": {"sha256": hashlib.sha256(dev.read_bytes()).hexdigest()},
        "results": {"f1": 50.0, "null_score_diff_threshold": -1.5},
        **changes,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    candidates = {name: [{"text": text} for text in texts] for name, texts in CANDIDATES.items()}
    (folder / "nbest_predictions.json").write_text(json.dumps(candidates))
    (folder / "null_odds.json").write_text(json.dumps(ODDS))
    return folder
