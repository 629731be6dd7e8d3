"""Positions: the pairs of taps that papers and public code use, the rule for others, refusals."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from srkd.errors import SrkdError
from srkd.methods.positions import choose_pairs, default_pairs, middle, network_of
from srkd.networks import build, build_family

if TYPE_CHECKING:
    from srkd.networks.base import Network


@cache
def network(name: str) -> Network:
    """A network of the zoo without memory for its weights."""
    with torch.device("meta"):
        return build(name, 4)


def edsr(blocks: int) -> Network:
    return build_family("edsr", {"channels": 2, "blocks": blocks, "scale": 2})


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        # Pairs of the papers.
        ("edsr_c64b32", "edsr", "block10:block10 block21:block21 body:body"),
        ("edsr", "edsr_c64b32", "block10:block10 block21:block21 body:body"),
        ("edsr_baseline", "edsr", "block5:block10 block10:block21 body:body"),
        ("rcan_lightweight", "rcan", "group3:group3 group7:group7 body:body"),
        ("rcan_c32b5g5", "rcan_c32b6g10", "group2:group4 group4:group8 body:body"),
        ("swinir_c60", "swinir", "rstb1:rstb2 rstb3:rstb4 body:body"),
        ("swinir_lightweight", "swinir", "rstb1:rstb2 rstb3:rstb4 body:body"),
        # The rule: 4/3 and 8/3 rounded are 1 and 3.
        ("rcan_a", "rcan_c", "group1:group1 group3:group3 body:body"),
        ("edsr_tiny", "edsr_baseline", "block1:block5 block3:block10 body:body"),
        # 6/3 and 12/3; 5/3 and 10/3 rounded are 2 and 3 beside a teacher that is no pair of a paper.
        ("swinir", "swinir", "rstb2:rstb2 rstb4:rstb4 body:body"),
        ("rcan_c32b5g5", "rcan_c", "group2:group1 group3:group3 body:body"),
        # Across families each network has its own.
        ("rcan_lightweight", "edsr", "group3:block10 group7:block21 body:body"),
        ("swinir_c60", "rcan", "rstb1:group3 rstb3:group7 body:body"),
        ("rcan_c32b5g5", "edsr_baseline", "group2:block5 group3:block10 body:body"),
    ],
)
def test_pairs(student: str, teacher: str, expected: str) -> None:
    pairs = choose_pairs(network(student), network(teacher), ())
    assert [f"{s}:{t}" for s, t in pairs] == expected.split()


def test_short_bodies_compare_every_feature_once() -> None:
    # 1/3 and 2/3 rounded are 0 and 1: both positions are after the only block.
    assert default_pairs(edsr(1), edsr(1)) == (("block1", "block1"), ("body", "body"))
    # 2/3 and 4/3 rounded are both 1; the teacher's 10 give 3 and 7.
    expected = (("block1", "block3"), ("block1", "block7"), ("body", "body"))
    assert default_pairs(edsr(2), edsr(10)) == expected


def test_a_paired_depth_counts_within_one_family_alone() -> None:
    # 5 groups beside 10 units as in the papers, but of another family: 5/3 and 10/3, 10/3 and 20/3.
    expected = (("group2", "block3"), ("group3", "block7"), ("body", "body"))
    assert default_pairs(network("rcan_c32b5g5"), edsr(10)) == expected


def test_given_positions_replace_the_usual_ones() -> None:
    pairs = choose_pairs(edsr(2), edsr(4), ("block2:block3", "body:block4"))
    assert pairs == (("block2", "block3"), ("body", "block4"))


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ("block1", r"'block1' names one tap; write student:teacher, for example 'block1:block1'"),
        ("blok2:block1", "no tap 'blok2'; did you mean 'block2'"),
        ("block1:boddy", "no tap 'boddy'; did you mean 'body'"),
        ("block3:block3", "no tap 'block3'"),  # the teacher has it, the student does not
        ("block1:", "no tap ''"),
    ],
)
def test_positions_that_do_not_exist_are_refused(position: str, message: str) -> None:
    with pytest.raises(SrkdError, match=message):
        choose_pairs(edsr(2), edsr(4), ("body:body", position))


@pytest.mark.parametrize(
    ("name", "tap"),
    [
        ("edsr", "block16"),
        ("edsr_tiny", "block2"),
        ("rcan", "group5"),
        ("rcan_c32b5g5", "group2"),
        ("swinir", "rstb3"),
        ("swinir_c60", "rstb2"),
    ],
)
def test_middle_cuts_the_body_in_two(name: str, tap: str) -> None:
    assert middle(network(name)) == tap


def test_a_foreign_network_is_refused() -> None:
    with pytest.raises(SrkdError, match=r"Conv2d has outputs only.*--list-networks"):
        network_of(nn.Conv2d(3, 3, 1))
