"""What every result can be turned into: a table of pandas, and HTML for a notebook."""

from __future__ import annotations

import abc
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


class Result(abc.ABC):
    """A result with rows.

    A subclass is a frozen dataclass that says what its rows are, and how the whole is described in
    one line.
    """

    @abc.abstractmethod
    def describe(self) -> str:
        """Describe the result in one line."""

    @abc.abstractmethod
    def rows(self) -> Sequence[dict[str, Any]]:
        """Return the rows of the table, each with the same keys."""

    def to_frame(self) -> pd.DataFrame:
        """Return the rows as a table of pandas; bytes stay integers where some are missing."""
        import pandas as pd

        frame = pd.DataFrame(list(self.rows()))
        sizes = [name for name in frame if str(name).endswith("_bytes")]
        return frame.astype(dict.fromkeys(sizes, "Int64"))

    def _repr_html_(self) -> str:
        """Show the table in a notebook, below the line that describes it."""
        table: str = self.to_frame().to_html(index=False, border=0)
        return f"<p>{html.escape(self.describe())}</p>\n{table}"
