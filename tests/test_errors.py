"""What a setting may be, and what is said of a name that nobody knows."""

import math

import pytest

from modhifi_cli.errors import is_number, is_whole, nearest


@pytest.mark.parametrize(
    ("value", "whole", "number"),
    [(3, True, True), (0.5, False, True), (math.nan, False, True), (True, False, False), ("3", False, False)],
)
def test_true_is_no_number_and_only_integers_are_whole(value, whole, number):
    assert (is_whole(value), is_number(value)) == (whole, number)


def test_a_near_name_is_offered_and_otherwise_the_known_ones():
    assert nearest("sparsty", ["sparsity", "model"]) == "did you mean 'sparsity'?"
    assert nearest("x", ["sparsity", "model"]) == "known: model, sparsity."
