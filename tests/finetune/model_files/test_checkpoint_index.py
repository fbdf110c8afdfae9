"""Checkpoints with a damaged or forged index: refused before TensorFlow, which would abort."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import DamagedFileError
from finetune.model.weights import open_tf_checkpoint
from finetune.model_files import checkpoint_index
from finetune.model_files.checkpoint_index import check_index

NAMES = [f"bert/encoder/layer_{layer}/output/dense/{kind}" for layer in range(40)
         for kind in ("kernel", "bias")]  # fmt: skip


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("checkpoint") / "model.ckpt-7"
    shapes = [(6, 4) if name.endswith("kernel") else (4,) for name in NAMES]
    tensors = [tf.fill(shape, float(number)) for number, shape in enumerate(shapes)]
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=[*NAMES, "global_step", "words"],
        shape_and_slices=[""] * (len(NAMES) + 2),
        tensors=[*tensors, tf.constant(7, tf.int64), tf.constant(["some", "words"])],
    )
    return prefix


def copy(prefix: Path, folder: Path, index: bytes) -> Path:
    data = ".data-00000-of-00001"
    target = folder / "forged"
    Path(f"{target}{data}").write_bytes(Path(f"{prefix}{data}").read_bytes())
    Path(f"{target}.index").write_bytes(index)
    return target


def checksum(data: bytes) -> bytes:
    return struct.pack("<I", checkpoint_index._masked_checksum(data))


def signed(index: bytes) -> bytes:
    """An index of one data block with its checksum made right, as a forger would."""
    # The first block ends where the empty block begins: kind, checksum, and 8 bytes.
    end = index.index(bytes(4) + b"\x01\0\0\0\0\xc0\xf2\xa1\xb0")
    return index[: end - 4] + checksum(index[: end - 4]) + index[end:]


def test_whole_checkpoints_are_read(prefix: Path) -> None:
    assert check_index(prefix, hint="") == {*NAMES, "global_step"}
    shapes, read = open_tf_checkpoint(prefix)
    assert shapes.keys() == {*NAMES, "global_step"}
    assert shapes[NAMES[0]] == (6, 4)
    np.testing.assert_array_equal(read(NAMES[3]), np.full(4, 3.0))


def test_the_original_checkpoint_is_read(shared_dir: Path) -> None:
    assert len(check_index(shared_dir / "golden" / "tiny_bert" / "bert_model.ckpt", hint="")) > 50


def test_checksums_are_those_of_the_standard() -> None:
    # RFC 3720, appendix B.4: 32 bytes of zeros, of ones, and rising ones.
    for data, wanted in (
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ):
        masked = ((wanted >> 15 | wanted << 17) + 0xA282EAD8) & 0xFFFFFFFF
        assert checksum(data) == struct.pack("<I", masked)


@given(st.data())
@settings(max_examples=200)
def test_any_damaged_byte_is_noticed(prefix: Path, data: st.DataObject) -> None:
    index = bytearray(Path(f"{prefix}.index").read_bytes())
    place = data.draw(st.integers(0, len(index) - 1))
    # What fills the end of the index up to its size has no meaning.
    before = bytes(index)
    index[place] ^= data.draw(st.integers(1, 255))
    folder = prefix.parent
    try:
        names = check_index(copy(prefix, folder, bytes(index)), hint="")
    except DamagedFileError:
        return
    assert not any(before[place : place + 1]), place
    assert names == {*NAMES, "global_step"}


# What each change finds in the index, and puts in its place.
FORGED = {
    "the data are cut short": (b"", b""),
    "another shape": (b"\x12\x08\x12\x02\x08\x06", b"\x12\x08\x12\x02\x08\x07"),
    "a number without an end": (b"\x12\x02\x08\x04", b"\x12\x02\x08\x84"),
    "a text": (b"\x08\x01\x12\x08", b"\x08\x07\x12\x08"),
    "an unknown type": (b"\x08\x01\x12\x08", b"\x08\x63\x12\x08"),
    "another data file": (b"\x12\x02\x08\x04\x20", b"\x12\x02\x08\x04\x18"),
    "more data files": (b"\x08\x01\x1a\x02", b"\x08\x7f\x1a\x02"),
}


@pytest.mark.parametrize("change", FORGED)
def test_a_forged_index_with_right_checksums_is_refused(
    prefix: Path, tmp_path: Path, change: str
) -> None:
    index = Path(f"{prefix}.index").read_bytes()
    assert signed(index) == index
    forged = index.replace(*FORGED[change])
    target = copy(prefix, tmp_path, signed(forged))
    if forged == index:
        with Path(f"{target}.data-00000-of-00001").open("r+b") as file:
            file.truncate(600)
    if change == "a text":  # Its size tells nothing, and it is no weight.
        assert open_tf_checkpoint(target)[0].keys() < {*NAMES, "global_step"}
        return
    with pytest.raises(DamagedFileError, match="cannot read the TensorFlow checkpoint"):
        open_tf_checkpoint(target)


READ_ALL = """
import sys
from pathlib import Path
from finetune.errors import InputError
from finetune.model.weights import open_tf_checkpoint
for number in range(int(sys.argv[2])):
    try:
        shapes, read = open_tf_checkpoint(Path(sys.argv[1]) / str(number) / "forged")
        for name in shapes:
            read(name)
        print("read")
    except InputError as error:
        assert "\\n" not in str(error)
        print("refused")
"""


@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_no_mutation_ends_the_process(prefix: Path, tmp_path: Path, count: int) -> None:
    """In a process of its own: an abort inside TensorFlow would take the test with it."""
    draw = random.Random(count)
    whole = Path(f"{prefix}.index").read_bytes()
    for number in range(count):
        (tmp_path / str(number)).mkdir()
        index, data = bytearray(whole), bytearray(b"")
        for _ in range(draw.randint(1, 4)):
            index[draw.randrange(len(index) - 120)] = draw.randrange(256)
        try:
            # In two of three the forger has made the checksum right.
            forged = signed(bytes(index)) if number % 3 else bytes(index)
        except ValueError:
            forged = bytes(index)
        target = copy(prefix, tmp_path / str(number), forged)
        if number % 5 == 0:
            path = Path(f"{target}.data-00000-of-00001")
            data = bytearray(path.read_bytes())
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.write_bytes(data[: draw.randint(len(data) - 40, len(data))])
            Path(f"{target}.index").write_bytes(whole)
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path), str(count)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    words = done.stdout.split()
    assert len(words) == count
    assert words.count("refused") > count // 2
