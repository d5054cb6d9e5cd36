"""Interactive charts for report.html, drawn in the browser by Bokeh, whose code the file contains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

Curve = Sequence[tuple[int, float]]
"""(step, value) pairs."""

# Two hues that differ for every kind of colour vision, and show on white and on black.
_COLOURS = ("#3b82f6", "#e69f00")
_GREY = "#808a99"  # text of the axes, readable on both
_MOST_POINTS = 2000  # of a curve: more than a screen has pixels, less than slows a phone down
_FEW_POINTS = 50  # of a curve that is drawn with a dot for each point
_HEIGHT, _SMALL_HEIGHT = 260, 170  # pixels


@dataclass(frozen=True)
class Chart:
    """A chart of up to two curves over the steps.

    Attributes:
        from_zero: the y axis includes 0.
        log: the y axis is logarithmic, if all values are above 0.
        small: one of many.
        covers: further values that the y axis must have room for.
    """

    title: str
    curves: Mapping[str, Curve]
    from_zero: bool = False
    log: bool = False
    small: bool = False
    covers: Sequence[float] = ()

    @property
    def has_points(self) -> bool:
        return any(self.curves.values())


def embedded(charts: Sequence[Chart]) -> tuple[str, list[str]]:
    """Return the code for the page's head, and a piece of HTML for each chart."""
    if not charts:
        return "", []
    # The import takes a second, and only rank 0 writes reports.
    from bokeh.embed import components
    from bokeh.resources import Resources

    script, places = components([_figure(chart) for chart in charts])
    pieces = []
    for chart, place in zip(charts, places, strict=True):
        pieces.append(f"<div><h2>{escape(chart.title)}</h2>{place}</div>")
    # Only the core, 1.2 MB: widgets and tables are not used.
    library = Resources(mode="inline", components=["bokeh"]).render_js()
    return f"{library}{script}", pieces


def _figure(chart: Chart) -> Any:
    from bokeh.models import ColumnDataSource, HoverTool, Range1d
    from bokeh.plotting import figure

    shown = {name: thinned(curve) for name, curve in chart.curves.items() if curve}
    values = [value for curve in shown.values() for _, value in curve]
    made = figure(
        height=_SMALL_HEIGHT if chart.small else _HEIGHT,
        sizing_mode="stretch_width",
        y_axis_type="log" if chart.log and min(values) > 0 else "linear",
        # Not the wheel and no drag by default: a reader scrolls the page.
        tools="box_zoom,reset",
        active_drag=None,
    )
    if chart.covers:
        low, high = min(chart.covers), max(chart.covers)
        margin = 0.05 * (high - low) or 1
        made.y_range = Range1d(start=low - margin, end=high + margin)
    if chart.from_zero:
        made.y_range = Range1d(start=0, end=1.05 * max(values) or 1)
    for colour, (name, curve) in zip(_COLOURS, shown.items(), strict=False):
        steps, heights = [step for step, _ in curve], [value for _, value in curve]
        source = ColumnDataSource({"step": steps, "value": heights})
        label: dict[str, Any] = {"legend_label": name} if len(shown) > 1 else {}
        line = made.line("step", "value", source=source, color=colour, line_width=2, **label)
        if len(curve) <= _FEW_POINTS:
            made.scatter("step", "value", source=source, color=colour, size=6, **label)
        largest = max(abs(value) for value in heights)
        number = "@value{0,0.[0000]}" if 0.01 <= largest < 1e6 else "@value{0.000e+0}"
        tips = [("step", "@step{0,0}"), (name, number)]
        made.add_tools(HoverTool(renderers=[line], mode="vline", tooltips=tips, visible=False))
    _style(made)
    return made


def _style(made: Any) -> None:
    """Leave the background to the page, and draw in greys that suit light and dark."""
    made.toolbar.logo = None
    made.toolbar.autohide = True
    made.background_fill_alpha = made.border_fill_alpha = 0
    made.outline_line_color = None
    made.grid.grid_line_color = _GREY
    made.grid.grid_line_alpha = 0.25
    made.axis.major_label_text_color = made.axis.axis_line_color = _GREY
    made.axis.major_tick_line_color = made.axis.minor_tick_line_color = _GREY
    made.axis.major_label_text_font_size = "12px"
    made.xaxis.ticker.min_interval = 1  # steps are whole numbers
    if made.legend:
        made.legend.background_fill_alpha = 0
        made.legend.border_line_color = None
        made.legend.label_text_color = _GREY


def thinned(curve: Curve) -> Curve:
    """Keep the first, smallest, largest and last point of each stretch, so that no spike is lost."""
    if len(curve) <= _MOST_POINTS:
        return curve
    stretches = _MOST_POINTS // 4
    bounds = [round(part * len(curve) / stretches) for part in range(stretches + 1)]
    kept: list[tuple[int, float]] = []
    for begin, end in pairwise(bounds):
        stretch = curve[begin:end]
        low = min(stretch, key=lambda point: point[1])
        high = max(stretch, key=lambda point: point[1])
        kept += sorted({stretch[0], low, high, stretch[-1]})
    return kept
