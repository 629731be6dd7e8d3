"""The quick start in miniature: the same path with a few steps, so that no stage can rot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from deploy.quickstart import quickstart, verdict
from srkd.errors import SrkdError
from srkd.models import load_model
from srkd.recipe import load_recipe

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.toml"


def test_every_stage_runs_and_leaves_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["train.iterations=4", "train.batch=2", "validate.every=0", "train.precision=fp32"]
    changes += ["train.learning_rate=1e-4"]
    recipe = load_recipe(RECIPE, changes)
    out = tmp_path / "quick"
    assert quickstart(recipe, out, as_json=True, quiet=True) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["parity"] == "PASS"
    names = [row["name"] for row in summary["table"]]
    assert names == ["bicubic", "student, from scratch", "student, logits", "teacher rcan_c_x4"]
    scores = [row["scores"]["builtin"]["psnr_y"] for row in summary["table"]]
    # The shipped teacher is a real one: well above bicubic, which four steps of training are not.
    assert scores[3] > scores[0] + 0.8 > scores[2]
    assert Path(summary["onnx"]).is_file()
    with Image.open(summary["picture"]) as picture:
        assert picture.width > 1000
    assert load_model(out).info["training"]["method"] == "logits"
    with pytest.raises(SrkdError, match="already holds a run"):
        quickstart(recipe, out, quiet=True)


def test_the_verdict_is_honest_both_ways() -> None:
    def rows(*psnr: float) -> list[dict[str, object]]:
        names = ("bicubic", "scratch", "distilled", "teacher")
        return [
            {"name": n, "scores": {"s": {"psnr_y": p}}} for n, p in zip(names, psnr, strict=True)
        ]

    assert "beats the same student from scratch by +0.10 dB" in verdict(rows(28, 29, 29.1, 30))
    assert "DOES NOT BEAT the same student from scratch by -0.10" in verdict(rows(28, 29, 28.9, 30))
