"""Engines that open a file: what lies beside the model is taken, else it is exported and verified once, or refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_service import last, picture, request, write_run

from demo.exported import Wanted, exported_file
from demo.jobs import Choice, Progress
from demo.lane import StoppedError
from demo.service import Service
from demo.shelf import Shelf
from deploy.engines import check_file
from deploy.export import export
from deploy.sidecar import read_parity, read_sidecar, record_hash, write_parity, write_sidecar
from srkd.errors import CheckFailedError, MissingError, SrkdError
from srkd.files import sha256
from srkd.images import read_rgb8
from srkd.models import load_model

ORT = Choice("tiny", "ort", "fp32")


FIND_OUT = 'while [ "$1" != --out ]; do shift; done'


def ignore(text):
    pass


def wanted(run):
    return Wanted(load_model(run), "ort", "fp32", "cpu", "ONNX Runtime")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", 1, {"method": "scratch"})


@pytest.fixture(scope="module")
def shelf(run):
    pytest.importorskip("onnxruntime")
    return Shelf([str(run)])


def stand_in(monkeypatch, path, text):
    """Another program in the place of Python, so that an export does what a test wants."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(path))


def test_an_export_that_is_stopped_ends_at_once_and_leaves_nothing(monkeypatch, tmp_path, run):
    stand_in(monkeypatch, tmp_path / "slow", 'echo "[2/4] onnx  done" >&2; exec sleep 60')
    told, begin = [], time.monotonic()

    def say(text):
        told.append(text)
        if "[2/4]" in text:
            raise StoppedError

    with pytest.raises(StoppedError):
        exported_file(wanted(run), tmp_path / "cache", say)
    assert time.monotonic() - begin < 5
    assert told[-1] == "ONNX Runtime fp32: exporting and verifying, once · [2/4] onnx"
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('echo "error: no room for it" >&2; exit 3', "could not be prepared: no room for it"),
        ("kill -SEGV $$", "its export ended with status -11"),
        (f'{FIND_OUT}; touch "$2/tiny_fp32.ort.onnx"; kill -KILL $$', "ended with status -9"),
    ],
)
def test_an_export_that_fails_says_why_and_leaves_nothing(monkeypatch, tmp_path, run, text, words):
    stand_in(monkeypatch, tmp_path / "broken", text)
    with pytest.raises(MissingError, match=words):
        exported_file(wanted(run), tmp_path / "cache", ignore)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            f'{FIND_OUT}; echo "error: cannot write $2/a.onnx: no room" >&2; exit 3',
            "write a.onnx: no",
        ),
        ("echo \"error: '/srv/my own/lib.so' is missing\" >&2; exit 3", "'lib.so' is missing"),
        (
            'echo "error: see /opt, or https://x.org/a/b" >&2; exit 3',
            "see opt, or https://x.org/a/b",
        ),
    ],
)
def test_an_export_that_fails_tells_no_place_of_the_server(
    monkeypatch, tmp_path, run, shelf, text, words
):
    monkeypatch.setenv("SRKD_CACHE", str(tmp_path / "cache"))
    stand_in(monkeypatch, tmp_path / "broken", text)
    with pytest.raises(MissingError, match=words) as refused:
        shelf.open(ORT)
    assert str(tmp_path) not in str(refused.value)
    assert str(run) not in str(refused.value)


@pytest.fixture
def unchecked(monkeypatch):
    """Any file but one of the text "damaged" passes for an exported one."""

    def check(file):
        if file.read_text() == "damaged\n":
            raise SrkdError(f"{file} is damaged")
        return SimpleNamespace(verdict="PASS")

    monkeypatch.setattr("demo.exported.check_file", check)
    monkeypatch.setattr("demo.exported.check_build", lambda file, sidecar: None)


NAME = "tiny_fp32.ort.onnx"
WRITE = f'{FIND_OUT}; echo own > "$2/{NAME}"'


def place(run, cache):
    """The folder that the run's file goes to."""
    return cache / f"{sha256(run / 'weights.safetensors')[:16]}-ort-fp32-cpu"


def test_an_export_that_another_server_made_meanwhile_is_used(
    monkeypatch, tmp_path, run, unchecked
):
    final = place(run, tmp_path / "cache")
    faster = f'mkdir "{final}"; echo other > "{final}/{NAME}"'
    stand_in(monkeypatch, tmp_path / "slow", f"{WRITE}; {faster}")
    found = exported_file(wanted(run), tmp_path / "cache", ignore)
    assert found.file == final / NAME
    assert found.file.read_text() == "other\n"
    assert list((tmp_path / "cache").iterdir()) == [final]


def test_a_damaged_export_is_never_found_half_removed(monkeypatch, tmp_path, run, unchecked):
    final = place(run, tmp_path / "cache")
    final.mkdir(parents=True)
    (final / NAME).write_text("damaged\n")
    stand_in(monkeypatch, tmp_path / "slow", WRITE)
    removed, remove = [], shutil.rmtree

    def seen(path, **how):
        if Path(path).parent == final.parent:
            removed.append((path, path.exists()))
        remove(path, **how)

    monkeypatch.setattr("demo.exported.shutil.rmtree", seen)
    found = exported_file(wanted(run), tmp_path / "cache", ignore)
    assert found.file.read_text() == "own\n"
    assert [there for _, there in removed] == [True, False]
    assert final not in [path for path, _ in removed]
    assert list((tmp_path / "cache").iterdir()) == [final]


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """A verified file of the run, in a folder of its own."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("exported")
    assert export(run, "ort", out=folder, quiet=True).verdict == "PASS"
    return folder


@pytest.fixture
def beside(run, exported, tmp_path):
    """The run again, with that file beside it."""
    own = shutil.copytree(run, tmp_path / "tiny")
    shutil.copytree(exported, own / "deploy")
    return own


def judged(file, verdict):
    """Change the verdict of a file in its sidecar and its record alike, as an export writes them."""
    record = {**read_parity(file.parent)[file.name], "verdict": verdict}
    write_parity(file.parent, file.name, record)
    sidecar = read_sidecar(file)
    proved = {"verdict": verdict, "blame": "E1", "record_sha256": record_hash(record)}
    write_sidecar(file, replace(sidecar, parity={**sidecar.parity, **proved}))


@pytest.mark.slow
def test_a_file_beside_the_model_is_taken_with_its_verdict(monkeypatch, beside, tmp_path):
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing is exported
    shelf = Shelf([str(beside)])
    ready = shelf.open(ORT)
    assert ready.parity == "PASS"
    assert any("the file that was exported beside the model" in note for note in ready.notes)
    judged(beside / "deploy" / "tiny_fp32.ort.onnx", "FAIL")
    with pytest.raises(CheckFailedError, match=r"parity FAIL at E1\), so it is not shown"):
        Shelf([str(beside)]).open(ORT)


@pytest.mark.slow
def test_a_file_of_other_weights_is_left_alone(monkeypatch, beside, tmp_path):
    write_run(beside, 2, {"method": "scratch"})
    stand_in(monkeypatch, tmp_path / "broken", 'echo "error: asked to export" >&2; exit 2')
    with pytest.raises(MissingError, match="asked to export"):
        exported_file(wanted(beside), tmp_path / "cache", ignore)
    assert check_file(beside / "deploy" / "tiny_fp32.ort.onnx").verdict == "PASS"


@pytest.mark.slow
def test_an_exported_file_on_the_shelf_runs_on_its_own_engine_alone(exported, tmp_path):
    file = exported / "tiny_fp32.ort.onnx"
    service = Service([str(file)])
    entry = service.models()[-1]
    assert entry.label == "tiny_fp32.ort, exported for ONNX Runtime"
    assert (entry.parameters, entry.engine, entry.precision) == (31_043, "ort", "fp32")
    photo = picture(tmp_path / "a.png")
    with pytest.raises(SrkdError, match="choose ort in fp32 for it"):
        service.check(request(photo, Choice(entry.key)))
    result = last(service.compare(request(photo, Choice(entry.key, "ort", "fp32"))))
    assert result.panes[2].numbers.parity == "PASS"
    assert str(exported) not in str(result.panes[2].notes)
    service.close()


@pytest.mark.slow
def test_an_engine_without_a_file_exports_verifies_and_keeps_one(monkeypatch, run, tmp_path):
    monkeypatch.setenv("SRKD_CACHE", str(tmp_path / "cache"))
    photo = picture(tmp_path / "a.png")
    service = Service([str(run)])
    events = list(service.compare(request(photo, Choice("tiny"), ORT, name="a.png")))
    texts = [event.text for event in events if isinstance(event, Progress)]
    assert any("exporting and verifying, once · [3/4] engine" in text for text in texts)
    exact, ort = events[-1].panes[2:]
    assert (ort.numbers.parity, ort.numbers.engine) == ("PASS", "ort")
    assert ort.numbers.agreement_db > 60
    assert np.abs(read_rgb8(ort.file).astype(int) - read_rgb8(exact.file)).max() <= 1
    assert ort.numbers.macs_g == exact.numbers.macs_g
    assert not (run / "deploy").exists()
    service.close()
    monkeypatch.setattr(subprocess, "Popen", None)
    again = Service([str(run)])
    assert last(again.upscale(photo, "a.png", ORT)).panes[0].numbers.parity == "PASS"
    (kept,) = (tmp_path / "cache" / "demo" / "exports").iterdir()
    file = kept / "tiny_fp32.ort.onnx"
    judged(file, "FAIL")
    again.shelf._open.clear()
    with pytest.raises(CheckFailedError, match="parity FAIL"):
        last(again.upscale(photo, "a.png", ORT))
    again.close()
    monkeypatch.undo()
    file.write_bytes(b"cut short")
    stand_in(monkeypatch, tmp_path / "broken", 'echo "error: asked to export" >&2; exit 2')
    with pytest.raises(MissingError, match="asked to export"):
        exported_file(wanted(run), kept.parent, ignore)
