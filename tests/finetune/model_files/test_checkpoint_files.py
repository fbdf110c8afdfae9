"""Tests of finetune.model_files.checkpoint_files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.model_files.checkpoint_files import (
    STATE_FILE,
    list_checkpoints,
    other_checkpoints,
    preferred_checkpoints,
)


def make(folder: Path, *names: str, parts: int = 1) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.index").write_bytes(b"index")
        for part in range(parts):
            (folder / f"{name}.data-{part:05}-of-{parts:05}").write_bytes(b"data")
    return [folder / name for name in names]


def state(name: str) -> str:
    return f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n'


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    old, new = make(tmp_path, "model.ckpt-9", "model.ckpt-20")
    (cut,) = make(tmp_path, "model.ckpt-25", parts=3)
    for name in (
        "model.ckpt-30.data-00000-of-00001",  # no index yet
        "model.ckpt-40.index",  # the data are gone
        ".tmp-model.ckpt-50.index",
        ".tmp-model.ckpt-50.data-00000-of-00001",
        "model.ckpt-60.data-00000-of-00001",
    ):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "model.ckpt-60.index").mkdir()
    assert list_checkpoints(tmp_path) == [old, new, cut]
    Path(f"{cut}.data-00001-of-00003").unlink()
    assert list_checkpoints(tmp_path) == [old, new]
    assert preferred_checkpoints(tmp_path) == [new, old]
    assert list_checkpoints(tmp_path / "nowhere") == []
    assert preferred_checkpoints(tmp_path / "model.ckpt-9.index") == []


@pytest.mark.parametrize("content", [None, state("model.ckpt-10"), state("model.ckpt-30")])
def test_a_state_file_that_was_left_behind_needs_no_word(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a kill between the rename of the index and that of the state file."""
    make(tmp_path, "model.ckpt-20", "model.ckpt-30")
    if content is not None:
        (tmp_path / STATE_FILE).write_text(content)
    assert [path.name for path in preferred_checkpoints(tmp_path)] == [
        "model.ckpt-30",
        "model.ckpt-20",
    ]
    assert not caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "cannot be read"),
        ("not what TensorFlow writes", "cannot be read"),
        ('model_checkpoint_path: "', "cannot be read"),
        ("model_checkpoint_path: \"\"\n", "cannot be read"),
        (bytes(range(256)), "cannot be read"),
        (b'model_checkpoint_path: "\xff\xfe/model.ckpt-20"', "names"),
        (state("model.ckpt-40"), "names 'model.ckpt-40'"),
        (state("/home/of/another/machine/model.ckpt-20"), "names '/home/of/another"),
        (state("../elsewhere/model.ckpt-20"), "names '../elsewhere"),
        (state(".."), "names '..'"),
        (state("model.ckpt-" + "9" * 5000), "names 'model.ckpt-999"),
        (state("C:\\\\runs\\\\ckpt-3"), "names 'C:"),
        (state("\x1b[31mred"), r"names '\x1b[31mred'"),
    ],
)  # fmt: skip
def test_what_a_state_file_says_else_is_warned_about(
    tmp_path: Path, content: str | bytes, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    make(tmp_path / "elsewhere", "model.ckpt-20")
    make(run, "model.ckpt-20", "model.ckpt-30")
    data = content.encode() if isinstance(content, str) else content
    (run / STATE_FILE).write_bytes(data)
    assert preferred_checkpoints(run) == [run / "model.ckpt-30", run / "model.ckpt-20"]
    (record,) = caplog.records
    assert said in record.getMessage()
    assert record.getMessage().endswith("using model.ckpt-30")
    assert "\n" not in record.getMessage()


def test_a_state_file_that_is_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefixes = make(tmp_path, "model.ckpt-20")
    (tmp_path / STATE_FILE).symlink_to(tmp_path / "gone")
    assert preferred_checkpoints(tmp_path) == prefixes
    (tmp_path / STATE_FILE).unlink()
    (tmp_path / STATE_FILE).mkdir()
    assert preferred_checkpoints(tmp_path) == prefixes
    assert caplog.text.count("cannot be read") == 2


def test_the_folders_own_path_in_a_state_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prefixes = make(tmp_path / "run", "model.ckpt-20")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "run" / STATE_FILE).write_text(state(str(prefixes[0])))
    assert preferred_checkpoints(tmp_path / "run") == prefixes
    assert preferred_checkpoints(tmp_path / "link") == [tmp_path / "link" / "model.ckpt-20"]
    assert not caplog.text


def test_names_of_other_programs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second, _ = make(tmp_path, "ckpt-9", "ckpt-10", "best.ckpt")
    (tmp_path / STATE_FILE).write_text(state("ckpt-9"))
    assert preferred_checkpoints(tmp_path) == [first]
    assert not caplog.text
    # A folder from another machine: what is named lies here.
    (tmp_path / STATE_FILE).write_text(state("/somewhere/ckpt-9"))
    assert preferred_checkpoints(tmp_path) == [first]
    assert "using ckpt-9" in caplog.text
    (tmp_path / STATE_FILE).write_text(state("gone"))
    assert preferred_checkpoints(tmp_path) == []
    with pytest.raises(InputError, match=r"several checkpoints .*best\.ckpt, ckpt-10.*name one"):
        other_checkpoints(tmp_path)
    for path in tmp_path.glob("best.ckpt*"):
        path.unlink()
    assert other_checkpoints(tmp_path) == [second, first]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80), st.booleans())
def test_no_state_file_hides_the_newest_checkpoint(
    tmp_path: Path, content: bytes, framed: bool
) -> None:
    prefixes = make(tmp_path, "model.ckpt-3", "model.ckpt-20")
    data = b'model_checkpoint_path: "' + content + b'"\n' if framed else content
    (tmp_path / STATE_FILE).write_bytes(data)
    assert preferred_checkpoints(tmp_path) == prefixes[::-1]
