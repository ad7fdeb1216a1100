"""The page of matrices: shading by value, names escaped, nothing fetched."""

import re

from palimpsest.report.heat_map import HeatMap, Table, render_heat_maps

PAGE = render_heat_maps(
    "Forgetting <here>",
    "two tasks",
    [HeatMap("Random", "in percent", ["a", "b"], ["b", "a"], [[0.25, 1.3], [-0.2, 0.0]])],
    [Table("Tasks", "", ["task", "learned"], [["a<b", "0.9"]])],
)


def test_ink_follows_the_value_and_stops_at_its_ends() -> None:
    cells = re.findall(r'<td class="([^"]*)" style="--share: (\d+)" title="([^"]*)">(-?\d+)</td>', PAGE)
    assert [(share, number) for _, share, _, number in cells] == [
        ("25", "25"),
        ("100", "130"),
        ("0", "-20"),
        ("0", "0"),
    ]
    assert [title for _, _, title, _ in cells][:2] == ["a forgotten, b evaluated", "a forgotten, a evaluated"]
    assert [("own" in look, "dark" in look) for look, *_ in cells] == [
        (False, False),
        (True, True),
        (True, False),
        (False, False),
    ]


def test_what_comes_from_outside_is_escaped_and_nothing_is_fetched() -> None:
    assert "Forgetting &lt;here&gt;" in PAGE and "a&lt;b" in PAGE and "<here>" not in PAGE
    assert "default-src 'none'" in PAGE and "<script" not in PAGE and "http" not in PAGE.split("</style>")[1]
