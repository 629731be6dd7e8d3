"""Sentences for people who must not learn the paths of the server, and need not."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from srkd.errors import SrkdError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


# A "/" that begins a word or something quoted, and the folders that follow. Addresses, "and/or" and "~/x" are no places
# of the server.
FOLDERS = re.compile(r"""(?<=['"])/[^'"\n]*/|(?<![\w.~:/])/(?:[^\s/'"]+/)*(?=[^\s/'"])""")


def without_folders(text: str) -> str:
    """`text` with every absolute path cut down to its last part: "cannot read /srv/cache/a.onnx" -> "cannot read a.onnx"."""
    return FOLDERS.sub("", text)


def reworded(text: str, names: Mapping[Path | str, str]) -> str:
    """`text` with each path replaced by what the user calls it, others cut down; longer paths go first."""
    for path, name in sorted(names.items(), key=lambda pair: len(str(pair[0])), reverse=True):
        text = text.replace(str(path), name)
    return without_folders(text)


@contextmanager
def in_words(names: Mapping[Path | str, str]) -> Iterator[None]:
    """Errors raised inside say the names in the place of the paths, and no other folders."""
    try:
        yield
    except SrkdError as error:
        said = reworded(str(error), names)
        if said == str(error):
            raise
        raise type(error)(said) from error
