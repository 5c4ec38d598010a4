"""Figures: files of both kinds, robust against missing numbers, the same for the same numbers."""

import pytest

from modhifi_cli.pages.plots import Point, frontier, group_errors

LABELS = {"title": "a title", "x_label": "FLOPs removed, %", "y_label": "top-1, %"}


def test_a_frontier_names_its_curves_and_axes_and_the_dense_line():
    curves = {"paper": [Point(40, 88, 0.1, 0.4), Point(20, 92)], "best": [Point(20, 92), Point(40, 88)]}
    found = frontier(curves, dense=93.39, dense_label="dense 93.39", **LABELS)
    assert found["png"].startswith(b"\x89PNG")
    text = found["svg"].decode()
    for word in ("paper", "best", "dense 93.39", "FLOPs removed, %", "top-1, %", "a title"):
        assert word in text, word


def test_the_same_numbers_give_the_same_file():
    draw = lambda: frontier({"paper": [Point(20, 92, 0, 1)]}, dense=None, **LABELS)  # noqa: E731
    assert draw() == draw()


@pytest.mark.parametrize("curves", [{}, {"paper": []}, {"paper": [Point(float("nan"), 1)]}])
def test_a_frontier_without_points_is_no_figure(curves):
    assert frontier(curves, dense=90.0, **LABELS) == {}


def test_more_methods_than_colours_are_drawn():
    curves = {f"method{number}": [Point(20, number), Point(40, number / 2)] for number in range(20)}
    text = frontier(curves, dense=21.0, **LABELS)["svg"].decode()
    assert all(f"method{number}" in text for number in range(20))


def test_group_errors_show_what_there_is():
    both = group_errors(["a", "b"], predicted={"a": 0.1, "b": 0.2}, measured={"a": 0.1}, title="errors")
    text = both["svg"].decode()
    assert "predicted before the cut" in text and "measured after it" in text
    alone = group_errors(["a", "b"], predicted={}, measured={"b": 0.3}, title="errors")["svg"].decode()
    assert "predicted" not in alone and "measured" in alone


def test_group_errors_without_numbers_are_no_figure():
    assert group_errors(["a"], predicted={}, measured={"a": float("nan")}, title="errors") == {}
