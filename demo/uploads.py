"""From what an event carries to a picture that was really uploaded, and back to what the page can show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.guard import lies_in
from srkd.errors import SrkdError

MOST_NAME = 120
# By this mark Gradio knows a file, puts it into its folder and adds the address.
FILE_META = {"_type": "gradio.FileData"}


@dataclass(frozen=True)
class Upload:
    """A file in the server's upload folder and what the user called it."""

    path: Path
    name: str


def upload_of(value: Any, folder: Path, what: str = "picture") -> Upload:
    """`value` as Gradio's file record; anything but a file that this server stored is refused."""
    if not value:
        raise SrkdError(f"There is no {what}; upload one first.")
    record = value if isinstance(value, dict) else {}
    path, name = record.get("path"), record.get("orig_name")
    if not isinstance(path, str) or not lies_in(path, folder) or not Path(path).is_file():
        raise SrkdError(f"This server no longer has the {what}; upload it again.")
    return Upload(Path(path), name[:MOST_NAME] if isinstance(name, str) else Path(path).name)


def file_record(path: Path) -> Any:
    """A file for the page or an API reply. Its bytes go out as they are."""
    return {
        "path": str(path),
        "orig_name": path.name,
        "size": path.stat().st_size,
        "meta": FILE_META,
    }
