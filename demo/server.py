"""How the page is served: what is off, how long files live, how many may wait."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from gradio import themes
from starlette.middleware import Middleware

from demo.guard import LOOPBACK, Guard, Rules, Takes
from demo.limits import MOST_UPLOAD_BYTES

if TYPE_CHECKING:
    from pathlib import Path

    from gradio import Blocks

    from demo.limits import Limits

# Every job that computes shares this one lane, so that two never share a processor.
DEVICE = {"concurrency_id": "device", "concurrency_limit": 1}
DELETE_CACHE_S = (3600, 7200)  # every hour, files older than two
MOST_SESSIONS = 1000
# Fonts of the reader's own system: nothing is fetched from elsewhere.
FONT = ["system-ui", "sans-serif"]
FONT_MONO = ["ui-monospace", "monospace"]


def theme() -> themes.Base:
    """Grey all through: a tinted surround changes how the pictures' colours look."""
    grey = themes.colors.neutral
    base = themes.Base(
        primary_hue=grey, secondary_hue=grey, neutral_hue=grey, font=FONT, font_mono=FONT_MONO
    )
    # The theme's own lesser text is too pale to read (2.5:1 on white).
    lesser = {
        name + end: f"*neutral_{shade}"
        for name in ("body_text_color_subdued", "block_info_text_color", "block_label_text_color")
        for end, shade in (("", 600), ("_dark", 300))
    }
    light_button = {
        "button_primary_background_fill_dark": "*neutral_200",
        "button_primary_background_fill_hover_dark": "*neutral_50",
        "button_primary_text_color_dark": "*neutral_900",
    }
    return base.set(**lesser, **light_button)


def serve(
    page: Blocks, *, limits: Limits, folder: Path, head: str, host: str, port: int, waiting: int
) -> str:
    """Start `page` in the background; returns its address. `waiting` jobs at most, more are refused.

    `folder` is the upload folder, which the environment variable GRADIO_TEMP_DIR names to Gradio.
    """
    most = (limits.max_files + 1) * limits.max_bytes
    hosts = LOOPBACK if host in LOOPBACK else None
    rules = Rules(folder, most, MOST_UPLOAD_BYTES, hosts, takes_of(page))
    # Without it the variable would open folders although none is allowed below.
    os.environ.pop("GRADIO_ALLOWED_PATHS", None)
    # The queue is the only way in: a direct call would pass the lane by.
    page.queue(max_size=waiting, api_open=False, default_concurrency_limit=4)
    options: dict[str, Any] = {
        "server_name": host,
        "server_port": port,
        "app_kwargs": {"middleware": [Middleware(Guard, rules=rules)]},
        "max_file_size": limits.max_bytes,
        "allowed_paths": [],
        "share": False,
        "strict_cors": True,
        "show_error": False,
        "ssr_mode": False,
        "mcp_server": False,
        "pwa": False,
        "enable_monitoring": False,
        "run_history": False,
        "state_session_capacity": MOST_SESSIONS,
        "footer_links": ["api"],
        "theme": theme(),
        "head": head,
        "quiet": True,
        "inbrowser": False,
        "prevent_thread_lock": True,
    }
    _, address, _ = page.launch(**options)
    return address


def takes_of(page: Blocks) -> dict[str, Takes]:
    """What each event of the page takes, for `Rules`: its own ones by number and name, those for programs with names."""
    found: dict[str, Takes] = {}
    for number, event in page.fns.items():
        found[str(number)] = Takes(len(event.inputs))
        if isinstance(event.api_name, str):
            # A call by name may leave out what is kept on the server.
            found[event.api_name] = Takes(sum(not block.skip_api for block in event.inputs))
    for name, endpoint in page.get_api_info()["named_endpoints"].items():
        given = endpoint["parameters"]
        names = {p["parameter_name"]: p.get("parameter_has_default", False) for p in given}
        needed = tuple(key for key, has_default in names.items() if not has_default)
        found[name.strip("/")] = Takes(len(names), tuple(names), needed)
    return found
