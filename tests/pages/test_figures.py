"""Figures: files of both kinds, robust against missing numbers, the same for the same numbers."""

import pytest

from modhifi_cli.pages.figures import draw
from modhifi_cli.records import Chart, Series


def chart(curves, levels=None):
    series = tuple(Series(name, tuple(y for _, y in points), tuple(x for x, _ in points)) for name, points in curves.items())
    return Chart("frontier", "a title", "FLOPs removed, %", "top-1, %", series, levels=levels or {})


def test_a_frontier_names_its_curves_and_axes_and_the_dense_line():
    curves = {"paper": [(40, 88), (20, 92)], "best": [(20, 92), (40, 88)]}
    found = draw(chart(curves, {"dense 93.39": 93.39}))
    assert found["png"].startswith(b"\x89PNG")
    text = found["svg"].decode()
    for word in ("paper", "best", "dense 93.39", "FLOPs removed, %", "top-1, %", "a title"):
        assert word in text, word


def test_the_same_numbers_give_the_same_file_and_spreads_are_drawn():
    spread = Chart("f", "t", "x", "y", (Series("a", (92.0,), (20.0,), (1.0,), (2.0,)),))
    bare = Chart("f", "t", "x", "y", (Series("a", (92.0,), (20.0,)),))
    assert draw(spread) == draw(spread) != draw(bare)


@pytest.mark.parametrize("curves", [{}, {"paper": []}, {"paper": [(1, float("nan"))]}])
def test_a_frontier_without_points_is_no_figure(curves):
    assert draw(chart(curves, {"dense": 90.0})) == {}


def test_more_methods_than_colours_are_drawn():
    curves = {f"method{number}": [(20, number), (40, number / 2)] for number in range(20)}
    text = draw(chart(curves, {"dense": 21.0}))["svg"].decode()
    assert all(f"method{number}" in text for number in range(20))


def test_bars_show_what_there_is():
    series = (Series("predicted", (0.1, None)), Series("measured", (0.2, 0.3)))
    text = draw(Chart("groups", "errors", "%", "", series, kind="bars", categories=("a", "b")))["svg"].decode()
    assert "predicted" in text and "measured" in text and "errors" in text
    nothing = Chart("groups", "errors", "%", "", (Series("measured", (None,)),), kind="bars", categories=("a",))
    assert draw(nothing) == {}
