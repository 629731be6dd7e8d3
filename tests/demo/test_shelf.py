"""What the shelf holds: keys, labels and kinds of networks; engines with their reasons; few kept open."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from tiny_service import write_run, write_runs

from demo.entries import Known, entries, slug
from demo.jobs import Choice
from demo.lane import StoppedError
from demo.shelf import Shelf
from deploy.engines import available
from srkd.errors import MissingError, SrkdError
from srkd.models import shipped_models

SHIPPED = shipped_models()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def shelf(runs):
    return Shelf(runs, kept=1)


def test_shipped_networks_come_first_and_all_have_what_the_page_shows(shelf):
    assert [entry.key for entry in shelf.models[: len(SHIPPED)]] == SHIPPED
    rcan_c = next(entry for entry in shelf.models if entry.key == "rcan_c_x4")
    assert rcan_c.label == "RCAN-C, teacher"
    told = {entry.kind: entry.label for entry in shelf.models[: len(SHIPPED)]}
    assert told["scratch"] == "RCAN-A, trained from scratch"
    assert told["distilled"].startswith("RCAN-A, distilled by ")
    assert told["distilled"].endswith(" from RCAN-C")
    assert (rcan_c.scale, rcan_c.parameters, rcan_c.kind) == (4, 420_515, "teacher")
    assert rcan_c.about == "420,515 parameters, x4, trained for 24,000 steps on BSDS400"
    assert rcan_c.scores["Set5"]["psnr_y"] == pytest.approx(31.605, abs=1e-3)


def test_labels_and_kinds_come_from_the_training(shelf):
    told = {e.key: (e.label, e.kind) for e in shelf.models[len(SHIPPED) :]}
    assert told == {
        "tiny_teacher": ("tiny_teacher, teacher", "teacher"),
        "tiny_scratch": ("EDSR-tiny, trained from scratch", "scratch"),
        "tiny_distilled": ("EDSR-tiny, distilled by fitnet from tiny_teacher", "distilled"),
    }


def test_a_model_given_twice_is_there_once(runs):
    found = [e.key for e in Shelf([runs[0], runs[0], "rcan_c"]).models]
    assert found == [*SHIPPED, "tiny_teacher"]


KNOWN = Known("a", 2, 100, {}, "hash-a")


def trained(method, *teachers):
    return {
        "training": {
            "method": method,
            "teachers": [{"name": t, "weights_sha256": t} for t in teachers],
        }
    }


def test_a_network_from_scratch_is_a_teacher_when_it_taught_or_is_the_largest():
    small = replace(KNOWN, name="small", parameters=10, info=trained("scratch"), weights="small")
    middle = replace(small, name="middle", parameters=20, weights="middle")
    large = replace(small, name="large", parameters=30, weights="large")
    taught = replace(small, name="taught", info=trained("at", "middle"), weights="taught")
    kinds = [e.kind for e in entries([small, middle, large, taught])]
    assert kinds == ["scratch", "teacher", "teacher", "distilled"]
    other_scale = replace(large, scale=4, parameters=5)
    assert [e.kind for e in entries([small, large, other_scale])] == [
        "scratch",
        "teacher",
        "teacher",
    ]


def test_a_network_without_training_facts_is_another_unless_it_taught():
    taught = replace(KNOWN, info=trained("at", "hash-a"), weights="taught")
    assert entries([KNOWN])[0].kind == "other"
    assert [e.kind for e in entries([KNOWN, taught])] == ["teacher", "distilled"]


def test_keys_are_unique_and_never_those_of_the_other_panes():
    names = ["bicubic", "Photo <b>", "photo b", "photo/b", "///", "x" * 90]
    found = entries([replace(KNOWN, name=name) for name in names])
    assert [e.key for e in found] == [
        "bicubic-2",
        "photo-b",
        "photo-b-2",
        "photo-b-3",
        "model",
        "x" * 40,
    ]
    assert len({e.label for e in found}) == len(found)


def test_labels_that_would_be_equal_carry_their_key():
    info = {"network": "rcan_a", "family": "rcan", **trained("scratch")}
    one, other = entries(
        [replace(KNOWN, name=name, info=info) for name in ("r/baseline", "s/baseline")]
    )
    assert one.label == "RCAN-A, trained from scratch"
    assert other.label == "RCAN-A, trained from scratch (s-baseline)"


@pytest.mark.parametrize(("name", "key"), [("Ünï_1", "n-_1"), ("a" * 50, "a" * 40), ("", "model")])
def test_slugs(name, key):
    assert slug(name) == key


def test_a_model_that_cannot_be_loaded_is_refused_at_the_start(tmp_path, runs):
    broken = shutil.copytree(runs[1], tmp_path / "broken")
    (broken / "weights.safetensors").write_bytes(b"no tensors")
    with pytest.raises(SrkdError, match=r"weights\.safetensors is not the file that .* describes"):
        Shelf([str(broken)])


# --- opening ------------------------------------------------------------------------------------


def test_networks_are_loaded_when_they_are_asked_for(runs):
    assert not Shelf(runs)._open


def test_as_many_are_kept_as_allowed_the_last_used_ones(shelf):
    one, other = Choice("tiny_scratch"), Choice("tiny_distilled")
    shelf.kept = 2
    first = shelf.open(one)
    second = shelf.open(other)
    assert shelf.open(one) is first
    shelf.open(Choice("tiny_teacher"))
    assert list(shelf._open) == [one, Choice("tiny_teacher")]
    assert shelf.open(other) is not second
    assert len(shelf._open) == 2


def test_torch_in_fp32_is_the_network_itself(shelf):
    ready = shelf.open(Choice("tiny_scratch"))
    assert ready.parity == "REFERENCE"
    assert ready.timed.network is ready.network
    assert ready.model.scale == 2


def go_on():
    pass


def test_time_inside_the_network_and_whether_it_was_warm(shelf):
    timed = shelf.open(Choice("tiny_distilled")).timed
    timed.seen.clear()
    with timed.watched(go_on):
        timed(torch.zeros(1, 3, 8, 8))
    assert not timed.warm
    assert timed.seconds > 0
    with timed.watched(go_on):
        timed(torch.zeros(1, 3, 9, 9))
    assert timed.warm


def test_engines_that_compile_by_size_are_cold_for_a_new_one(shelf):
    timed = shelf.open(Choice("tiny_distilled")).timed
    timed.by_size = True
    timed(torch.zeros(1, 3, 8, 8))
    with timed.watched(go_on):
        timed(torch.zeros(1, 3, 8, 8))
        assert timed.warm
        timed(torch.zeros(1, 3, 9, 9))
        assert not timed.warm
    for side in range(10, 20):
        timed(torch.zeros(1, 3, side, 4))
    with timed.watched(go_on):
        timed(torch.zeros(1, 3, 8, 8))
        assert not timed.warm, "so many sizes ago, it was compiled again"


def test_a_network_in_torch_stops_between_two_layers_and_is_not_changed_by_being_watched(shelf):
    timed = shelf.open(Choice("tiny_scratch")).timed
    lr = torch.rand(1, 3, 9, 7)
    asked = []

    def stop_at_the_tenth():
        asked.append(1)
        if len(asked) == 10:
            raise StoppedError

    with torch.inference_mode():
        plain = timed.network(lr)
        with timed.watched(go_on):
            assert torch.equal(timed(lr), plain)
        with pytest.raises(StoppedError), timed.watched(stop_at_the_tenth):
            timed(lr)
        assert torch.equal(timed(lr), plain)
    assert len(asked) == 10


def test_a_failed_opening_leaves_nothing_behind(tmp_path, runs):
    gone = shutil.copytree(runs[1], tmp_path / "gone")
    shelf = Shelf([str(gone)])
    shutil.rmtree(gone)
    with pytest.raises(SrkdError):
        shelf.open(Choice("gone"))
    assert not shelf._open
    shelf.open(Choice("rcan_c_x4"))


# --- engines ------------------------------------------------------------------------------------


def test_every_engine_but_the_plain_graph_is_listed_with_a_reason_or_precisions(shelf):
    assert [e.key for e in shelf.engines] == [a.name for a in available() if a.name != "onnx"]
    assert all(bool(e.precisions) != bool(e.reason) for e in shelf.engines)


def test_what_cannot_be_used_is_refused_with_its_reason(shelf):
    gone = next((e for e in shelf.engines if e.reason), None)
    if gone is None:
        pytest.skip("every engine runs on this machine")
    with pytest.raises(MissingError) as refused:
        shelf.check(Choice("tiny_scratch", gone.key, "fp32"))
    assert gone.reason in str(refused.value)


@pytest.mark.parametrize(
    ("choice", "kind", "words"),
    [
        (Choice("tiny_scratch", "torch", "int8"), MissingError, "computes in .*, not in 'int8'"),
        (Choice("tiny_scratch", "tensorflow"), SrkdError, "no engine 'tensorflow'"),
        (Choice("tiny_scrach"), SrkdError, "did you mean 'tiny_scratch'"),
        (Choice("../../etc/passwd"), SrkdError, "no network"),
        (Choice("rcan_c"), SrkdError, "no network 'rcan_c'"),
    ],
)
def test_unknown_keys_and_precisions_are_refused(shelf, choice, kind, words):
    with pytest.raises(kind, match=words):
        shelf.check(choice)
    with pytest.raises(kind, match=words):
        shelf.open(choice)


def test_an_empty_shelf_says_how_to_fill_it(monkeypatch, tmp_path):
    monkeypatch.setattr("srkd.models.WEIGHTS_FOLDER", tmp_path)
    with pytest.raises(SrkdError, match="--model"):
        Shelf()


def test_a_run_without_training_facts_goes_by_the_name_of_its_network(tmp_path):
    shelf = Shelf([str(write_run(tmp_path / "plain", 4, {}))])
    assert shelf.models[-1].label == "EDSR-tiny"
    assert shelf.models[-1].about == "31,043 parameters, x2"
