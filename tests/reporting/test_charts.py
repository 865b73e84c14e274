import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from svg import elements

from epmq.reporting import charts

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)
POSITIVE = st.floats(1e-6, 1e6)
LABEL = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30)


@given(st.dictionaries(LABEL, st.dictionaries(LABEL, NUMBERS, min_size=1), min_size=1, max_size=5))
def test_every_value_has_a_mark(rows):
    svg = charts.dots(rows, "accuracy", "{:.1f}".format)
    assert len(elements(svg, "mark")) == sum(map(len, rows.values()))


@given(
    st.dictionaries(LABEL, st.lists(st.tuples(NUMBERS, POSITIVE), min_size=1), min_size=1, max_size=5), st.booleans()
)
def test_every_point_of_a_line_has_a_mark(series, log):
    svg = charts.lines(series, "bits", "gap", "{:.1f}".format, log=log)
    assert len(elements(svg, "mark")) == sum(map(len, series.values()))
    assert len(elements(svg, "line")) == len(series)


def test_a_matrix_has_a_mark_for_every_number():
    rows = {"a.very.long.name.of.some.attention.query": {1: "4 bits", 3: "8 bits"}, "up": {2: "4 bits"}}
    svg = charts.matrix(rows, "block", "bits", ["4 bits", "8 bits"])
    marks = elements(svg, "mark")
    assert [mark.get("class") for mark in marks] == ["mark s0", "mark s1", "mark s0"]
    assert float(marks[0].get("cx")) < float(marks[2].get("cx")) < float(marks[1].get("x"))
    assert "…" in svg and "attention.query</text>" in svg


def test_marks_lie_where_their_values_say():
    svg = charts.lines({"a": [(2, 0), (3, 10), (4, 5)]}, "bits", "gap", "{:g}".format)
    centres = [(float(mark.get("cx")), float(mark.get("cy"))) for mark in elements(svg, "mark")]
    (x2, y2), (x3, y3), (x4, y4) = centres
    assert x3 - x2 == pytest.approx(x4 - x3)
    assert y2 - y3 == pytest.approx(2 * (y2 - y4), abs=0.2) and y3 < y4 < y2  # up is less


def test_a_logarithmic_axis_spaces_equal_factors_equally():
    axis = charts.Axis([1, 1000], 0, 300, log=True, margin=0)
    assert [axis(value) for value in (1, 10, 100, 1000)] == pytest.approx([0, 100, 200, 300])
    assert all(1 <= tick <= 1000 for tick in axis.ticks)


def test_labels_do_not_lie_on_each_other():
    points = [(1.0, 1.0, "4 bits"), (1.0, 1.001, "3 bits"), (2.0, 2.0, "2 bits")]
    svg = charts.scatter({"GPTQ": points}, "MB", "accuracy", "{:g}".format)
    assert [name in re.sub("<title>.*?</title>", "", svg) for name in ("4 bits", "3 bits", "2 bits")] == [
        True,
        False,
        True,
    ]
    assert len(elements(svg, "mark")) == 3


@given(NUMBERS, NUMBERS)
def test_ticks_are_few_and_within(low, high):
    low, high = sorted((low, high))
    if high - low > 1e-6 * max(abs(low), abs(high), 1.0):
        ticks = charts.ticks(low, high)
        slack = 1e-6 * (high - low)
        assert len(ticks) <= 7 and all(low - slack <= tick <= high + slack for tick in ticks)


def test_text_of_users_is_text():
    svg = charts.dots({"<script>": {'"&': 1.0}}, "<b>", "{:g}".format)
    assert "<script" not in svg and "<b>" not in svg
    ET.fromstring(svg)
