"""Sentences for people who must not learn the paths of the server, and need not."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from srkd.errors import SrkdError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


def reworded(text: str, names: Mapping[Path | str, str]) -> str:
    """`text` with each path replaced by what the user calls it; longer paths go first."""
    for path, name in sorted(names.items(), key=lambda pair: len(str(pair[0])), reverse=True):
        text = text.replace(str(path), name)
    return text


@contextmanager
def in_words(names: Mapping[Path | str, str]) -> Iterator[None]:
    """Errors raised inside say the names in the place of the paths."""
    try:
        yield
    except SrkdError as error:
        said = reworded(str(error), names)
        if said == str(error):
            raise
        raise type(error)(said) from error
