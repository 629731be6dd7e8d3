"""Shipped networks: what `weights/` holds, and the pages that say so. Nothing here loads torch.

    weights/NAME/model.json    its key `published` adds licence, terms and stored precision to what a run says
    weights/NAME/README.md     the model card
    weights/README.md          one row per network

NAME is NETWORK_xSCALE or NETWORK_xSCALE_HOW (rcan_a_x4, rcan_a_x4_scratch); what a bare NETWORK means stands
in `srkd.models.find_model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import srkd.models as models
from srkd.errors import SrkdError
from srkd.files import read_json
from srkd.methods import METHODS
from srkd.networks import zoo_entry

if TYPE_CHECKING:
    from pathlib import Path

BENCHMARKS = ("Set5", "Set14", "BSD100")  # what every shipped network is scored on
HEADING = "# Networks trained by this project\n"


@dataclass(frozen=True)
class Card:
    """One shipped network.

    network   name in the zoo, e.g. rcan_a
    teachers  names of the networks that taught it
    scores    set -> {"psnr_y": dB, "ssim_y": .} of this very file
    dtype     how the weights are stored; they are computed with in float32
    size      of the weights file, in bytes
    """

    name: str
    network: str
    scale: int
    parameters: int
    method: str
    teachers: tuple[str, ...]
    data: str
    scores: dict[str, dict[str, float]]
    protocol: str
    licence: str  # empty: not published
    dtype: str
    size: int
    weights_sha256: str
    folder: Path


def list_models(folder: Path | None = None) -> list[Card]:
    """The networks in `weights/` (or another folder laid out so) by name."""
    place = models.WEIGHTS_FOLDER if folder is None else folder
    return [read_card(place / name) for name in models.shipped_models(place)]


def read_card(folder: Path) -> Card:
    """What model.json says; a run folder that nobody published has no licence."""
    info, weights = read_json(folder / "model.json"), folder / "weights.safetensors"
    try:
        published, training = info.get("published", {}), info["training"]
        return Card(
            name=folder.name,
            network=info["network"],
            scale=info["scale"],
            parameters=info["parameters"],
            method=training["method"],
            teachers=tuple(teacher["name"] for teacher in training["teachers"]),
            data=f"{training['data']['name']} ({training['data']['images']} images)",
            scores=info["scores"],
            protocol=info["protocol"],
            licence=published.get("licence", ""),
            dtype=published.get("dtype", "float32"),
            size=weights.stat().st_size,
            weights_sha256=info["weights_sha256"],
            folder=folder,
        )
    except (LookupError, TypeError, AttributeError, OSError) as error:
        raise SrkdError(
            f"{folder} does not say what it is ({error.__class__.__name__}: {error}); publish its run again with "
            "scripts/publish.py, or take the folder out of there."
        ) from error


def check_name(name: str, network: str, scale: int) -> None:
    """Refuse a name that does not tell network and scale, because bare names are looked up by them."""
    stem = f"{network}_x{scale}"
    how = name.removeprefix(f"{stem}_")
    if name == stem or (how != name and how and how.replace("_", "").isalnum()):
        return
    raise SrkdError(
        f"'{name}' is no name for a {network} at x{scale}; call it {stem}, the one that the bare name "
        f"'{network}' means, or {stem}_HOW, e.g. {stem}_scratch."
    )


# -- pages --------------------------------------------------------------------------------------


def _score(card: Card, name: str) -> str:
    own = card.scores.get(name)
    return "-" if own is None else f"{own['psnr_y']:.2f} / {own['ssim_y']:.4f}"


def _taught(card: Card) -> str:
    return f"`{card.method}`" + (f" of {', '.join(card.teachers)}" if card.teachers else "")


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def index_page(cards: list[Card]) -> str:
    """README.md of the folder that holds the networks."""
    rows = [
        f"| [`{c.name}`]({c.name}/README.md) | {c.parameters:,} | {_taught(c)} | {c.data} | "
        + " | ".join(_score(c, name) for name in BENCHMARKS)
        + f" | {_size(c.size)} {c.dtype} | {c.licence or '-'} |"
        for c in cards
    ]
    return "\n".join(
        [
            HEADING,
            "Written by `python scripts/publish.py RUN weights/NAME`. Every folder is laid out as a run folder: `model.json`",
            "(architecture, scores, training facts), `weights.safetensors`, `recipe.toml` (everything resolved, enough to repeat",
            "the training), and its card, `README.md`. From Python: `srkd.list_models()`, `srkd.load_model(NAME)`.",
            "",
            "Names: `NETWORK_xSCALE` and `NETWORK_xSCALE_HOW`. A whole name means that folder. A bare `NETWORK` (`--teacher",
            "rcan_c`) means `NETWORK_xSCALE` at the scale that is asked for, or at the only one there is, and never one of the",
            "`_HOW`: how a network was trained is not guessed.",
            "",
            f"| name | parameters | method | trained on | {' | '.join(BENCHMARKS)} | file | licence |",
            f"|{'---|' * (6 + len(BENCHMARKS))}",
            *rows,
            "",
            "PSNR-Y in dB / SSIM-Y, protocol `paper-y` (Y of BT.601, 8-bit output, border of `scale` pixels left out). To measure again:",
            "`python scripts/evaluate.py NAME --data Set5 Set14 BSD100`, with `SRKD_DATA` naming a folder that holds `benchmarks/`.",
            "",
        ]
    )


def card_page(card: Card, info: dict[str, Any]) -> str:
    """The model card: README.md beside the weights. `info` is model.json with its key `published`."""
    training, published = info["training"], info["published"]
    taught = [
        f"- taught by {t['name']}, sha256 `{t['weights_sha256']}`" for t in training["teachers"]
    ]
    terms = [f"- terms of the teacher `{t['model']}`: {t['terms']}" for t in published["teachers"]]
    papers = [f"- `{part}`: {METHODS[part].paper}" for part in card.method.split("+")]
    cast = (
        f" Trained as float32 (sha256 `{published['trained_sha256']}`) and cast; the scores are those of the cast weights."
        if published["dtype"] != "float32"
        else ""
    )
    v = info["versions"]
    return "\n".join(
        [
            f"# {card.name}\n",
            f"`{card.network}` at x{card.scale}: {zoo_entry(card.network).about}. {card.parameters:,} parameters, trained with {_taught(card)}.\n",
            "## Use\n",
            "```python",
            "import srkd\n",
            f'model = srkd.load_model("{card.name}")',
            'picture = srkd.upscale("photo.png", model)  # (H, W, 3) uint8',
            "```\n",
            f"For photographs and drawings that were made smaller {card.scale} times by bicubic resampling, for comparing methods,",
            "and as a teacher or a start of other training. Not for pictures with noise, blur or strong compression, which it has",
            "never seen and will sharpen; not for finding out what a picture does not show (faces, plates, medical or forensic",
            "detail): the detail it adds is plausible, not measured.\n",
            "## Scores\n",
            f"| | {' | '.join(BENCHMARKS)} |",
            f"|{'---|' * (1 + len(BENCHMARKS))}",
            f"| PSNR-Y in dB / SSIM-Y | {' | '.join(_score(card, name) for name in BENCHMARKS)} |\n",
            f"Protocol `{card.protocol}`: Y of BT.601, 8-bit output, border of {card.scale} pixels left out, LR by MATLAB-compatible bicubic.",
            f"`python scripts/evaluate.py {card.name} --data {' '.join(BENCHMARKS)}` measures them again.\n",
            "## Training\n",
            f"- {card.data}, digest `{training['data']['digest']}`. {published['data_terms']}",
            f"- {training['iterations']:,} iterations, batch {training['batch']}, LR patch {training['patch']}, seed {training['seed']}, "
            f"{training['precision']} on {training['device']}, {training['seconds']:,.0f} s",
            *papers,
            *taught,
            *terms,
            f"- srkd {v['srkd']}, torch {v['torch']}, Python {v['python']}\n",
            "```",
            f"python scripts/distill.py weights/{card.name}/recipe.toml --out runs/{card.name}",
            "```\n",
            "## File\n",
            f"`weights.safetensors`, {card.dtype}, {card.size:,} bytes, sha256 `{card.weights_sha256}`.{cast}\n",
            "## Licence\n",
            f"{card.licence} (the weights). The terms of the training images and of the teachers stand above.\n",
        ]
    )
