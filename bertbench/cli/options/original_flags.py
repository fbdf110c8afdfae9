"""The original's command lines: negated switches, and addresses of cloud storage for paths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from bertbench.running.output.cloud_storage import (
    fetch_beside,
    fetch_file,
    fetch_folder,
    fetch_weights,
    is_url,
    open_remote_folder,
    push_or_keep,
    staging_folder,
)
from finetune.model_files.model_folder import SETTINGS_FILES

_REMOTE_FILES = ("bert_config_file", "vocab_file", "train_file", "predict_file", "dev_file",
                 "test_file", "plan_file")  # fmt: skip
_REMOTE_FOLDERS = ("model_dir", "data_dir")


class OriginalCommand(click.Command):
    """A command that takes `--nodo_lower_case` for `--do_lower_case=false`, as absl's flags do."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Spell out negated switches, then parse as usual."""
        switches = {
            option.lstrip("-").replace("_", "-")
            for parameter in self.params
            if isinstance(parameter.type, click.types.BoolParamType)
            for option in parameter.opts
        }

        def spelled_out(argument: str) -> str:
            name = argument.removeprefix("--no").replace("_", "-")
            return (
                f"--{name}=false" if argument.startswith("--no") and name in switches else argument
            )

        return super().parse_args(ctx, [spelled_out(argument) for argument in args])


class PathOrUrl(click.ParamType):
    """A local path as `Path`, or an address of cloud storage as text."""

    name = "path"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | str:
        """Tell addresses from paths; neither needs to exist yet."""
        text = str(value)
        if not text:
            self.fail("an empty name is no file and no folder.", param, ctx)
        return text if is_url(text) else Path(text)


@contextlib.contextmanager
def local_files(flags: dict[str, Any]) -> Iterator[None]:
    """Replace addresses of cloud storage by local copies, and copy results back after the block.

    They are copied back after an error or an interruption too.

    Args:
        flags: by name; changed. `remote` becomes the output folder in cloud storage, or None.
    """
    flags["remote"] = None
    urls = [name for name, value in flags.items() if isinstance(value, str) and is_url(value)]
    urls = [name for name in urls if name not in ("tpu_name", "master")]
    if not urls:
        yield
        return
    with staging_folder() as staging:
        for name in urls:
            if name in ("vocab_file", "init_checkpoint"):
                # They tell how the model was trained.
                fetch_beside(flags[name], SETTINGS_FILES, staging)
            if name in _REMOTE_FILES:
                flags[name] = fetch_file(flags[name], staging)
            elif name in _REMOTE_FOLDERS:
                flags[name] = fetch_folder(flags[name], staging)
            elif name == "init_checkpoint":
                flags[name] = fetch_weights(flags[name], staging)
            elif name == "output_dir":
                flags["remote"] = open_remote_folder(flags[name], staging / "output")
                flags[name] = flags["remote"].path
        try:
            yield
        finally:
            if flags["remote"] is not None:
                push_or_keep(flags["remote"])
