"""Featurization of SQuAD against the original's Python: seconds, memory, and that both agree.

    pip download --no-deps bert-tensorflow==1.0.4 && unzip bert_tensorflow-*.whl -d original
    python benchmarks/featurization.py --data train-v1.1.json --vocab vocab.txt --original original

Each side runs in a process of its own: reading the JSON, cutting windows, tokenizing, and writing
what training reads (the original: TFRecords, as `run_squad.py` does; here: the feature cache).
Imports are not counted. `--quick` takes the package's demo; without `--original` only our side
runs. With 2 cores and the part-set of 6,672 questions it takes about a minute and a half.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from finetune.storage.json_files import json_text

SETTINGS = {"max_seq_length": 384, "doc_stride": 128, "max_query_length": 64}
FIELDS = ("input_ids", "input_mask", "segment_ids", "start_positions", "end_positions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="SQuAD JSON to train on")
    parser.add_argument("--vocab", type=Path)
    parser.add_argument("--version_2", action="store_true", help="the data is SQuAD 2.0")
    parser.add_argument("--original", type=Path, help="folder that holds the original's `bert`")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=("ours", "cached", "original"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        from finetune.tasks.demo_data import demo_files

        demo = demo_files()
        arguments.data = arguments.data or demo.squad_train
        arguments.vocab = arguments.vocab or demo.vocab_file
    if arguments.data is None or arguments.vocab is None:
        parser.error("--data and --vocab are needed, or --quick")
    if arguments.side:
        run = {"ours": run_ours, "cached": run_ours, "original": run_original}[arguments.side]
        print(json_text(run(arguments)))
        return
    results: dict[str, Any] = {"data": arguments.data.name, **SETTINGS}
    with tempfile.TemporaryDirectory() as work:
        sides = ["ours", "cached", *(["original"] if arguments.original else [])]
        for side in sides:
            results[side] = in_own_process(side, Path(work))
    print_table(results, sides)
    if arguments.original:
        ratio = results["original"]["seconds"] / results["ours"]["seconds"]
        same = results["original"]["features_sha256"] == results["ours"]["features_sha256"]
        results |= {"speedup": round(ratio, 2), "features_equal": same}
        print(f"{ratio:.1f} times as fast, features {'equal' if same else 'DIFFERENT'}")
    if arguments.json:
        arguments.json.write_text(json_text(results, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if results.get("features_equal", True) else 1)


def in_own_process(side: str, work: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--work", str(work)]
    # The repository's own packages, wherever this is called from.
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path[1:]])
    output = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def measured(prepare: Callable[[], int]) -> dict[str, Any]:
    """Seconds and the growth of this process' peak memory."""
    before = peak_bytes()
    began = time.perf_counter()
    features = prepare()
    return {
        "features": features,
        "seconds": round(time.perf_counter() - began, 4),
        "memory_bytes": peak_bytes() - before,
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_ours(arguments: argparse.Namespace) -> dict[str, Any]:
    from finetune.tasks.squad_cache import SquadSource, load_squad_features
    from finetune.text.tokenization import load_tokenizer

    made = None

    def prepare() -> int:
        nonlocal made
        tokenizer = load_tokenizer(arguments.vocab, do_lower_case=True)
        source = SquadSource(
            arguments.data, tokenizer, is_training=True,
            version_2_with_negative=arguments.version_2, **SETTINGS,
        )  # fmt: skip
        made = load_squad_features(source, arguments.work / "cache")
        return len(made.arrays["input_ids"])

    result = measured(prepare)
    assert made is not None
    assert made.was_there == (arguments.side == "cached")
    arrays = {name: np.asarray(made.arrays[name]) for name in FIELDS}
    return {**result, "features_sha256": hash_features(arrays)}


def run_original(arguments: argparse.Namespace) -> dict[str, Any]:
    sys.path.insert(0, str(arguments.original))
    # Only its model needs this, which TensorFlow 2 no longer has.
    contrib = types.ModuleType("tensorflow.contrib")
    contrib.layers = None  # type: ignore[attr-defined]
    sys.modules["tensorflow.contrib"] = contrib
    import tensorflow.compat.v1 as tf
    from bert import run_squad, tokenization

    tf.logging.set_verbosity(tf.logging.ERROR)
    run_squad.FLAGS([sys.argv[0], "--bert_config_file=", "--vocab_file=", "--output_dir="])
    run_squad.FLAGS.version_2_with_negative = arguments.version_2
    records = str(arguments.work / "train.tf_record")

    def prepare() -> int:
        tokenizer = tokenization.FullTokenizer(str(arguments.vocab), do_lower_case=True)
        examples = run_squad.read_squad_examples(str(arguments.data), is_training=True)
        writer = run_squad.FeatureWriter(records, is_training=True)
        run_squad.convert_examples_to_features(
            examples, tokenizer, is_training=True, output_fn=writer.process_feature, **SETTINGS
        )
        writer.close()
        return int(writer.num_features)

    result = measured(prepare)
    return {**result, "features_sha256": hash_features(read_records(records))}


def read_records(path: str) -> dict[str, np.ndarray]:
    import tensorflow as tf

    rows: dict[str, list[Any]] = {name: [] for name in FIELDS}
    for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
        values = tf.train.Example.FromString(record).features.feature
        for name in FIELDS:
            value = list(values[name].int64_list.value)
            rows[name].append(value[0] if name.endswith("positions") else value)
    return {name: np.array(value, np.int32) for name, value in rows.items()}


def hash_features(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in FIELDS:
        digest.update(np.ascontiguousarray(arrays[name], np.int32).tobytes())
    return digest.hexdigest()


def print_table(results: dict[str, Any], sides: list[str]) -> None:
    print(f"{'':>9} {'features':>9} {'seconds':>9} {'features/s':>11} {'memory':>9}")
    for side in sides:
        row = results[side]
        rate = row["features"] / row["seconds"]
        print(
            f"{side:>9} {row['features']:>9,} {row['seconds']:>9.2f} {rate:>11,.0f} "
            f"{row['memory_bytes'] / 2**20:>5,.0f} MiB"
        )


if __name__ == "__main__":
    main()
