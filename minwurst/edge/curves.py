"""Line charts as SVG or PNG, without a plotting library.

    svg = curves([("loss weight", {"p2": [(0.0, 0.0), (1.0, 1.0)]})], "t")
    picture([("loss", {"training": [(10, 0.9), (20, 0.5)]})], "step").save("curves.png")

A panel is (title, {name: [(x, y), …]}); panels stand side by side. `marks` lists what there is to
draw, and the two functions draw it.
"""

import math
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw

from minwurst.edge.grids import font_for

COLORS = ("#1f6f8b", "#d1495b", "#3c8d53", "#8a5aa8", "#c77d1e", "#555555")
GRID = "#dddddd"
WIDTH, HEIGHT, LEFT, TOP = 300, 180, 50, 26  # of a panel's plot area, and its margins
STEP = WIDTH + LEFT + 40  # from one panel to the next
SCALE = 2  # pixels of a picture per unit; it is drawn twice as large and scaled, for smooth lines


def curves(panels, label="t"):
    """An SVG. Both axes start at 0."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(panels) * STEP} {HEIGHT + 60}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for kind, color, *what in marks(panels, label, from_zero=True):
        if kind == "line":
            points, width = what
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"/>'
            )
        else:
            (x, y), text, anchor = what
            parts.append(
                f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}">'
                f"{escape(text)}</text>"
            )
    return "\n".join([*parts, "</svg>", ""])


def picture(panels, label):
    """An RGB image. The vertical axes enclose all but first values, which are written if cut."""
    scale = 2 * SCALE
    sheet = Image.new("RGB", (len(panels) * STEP * scale, (HEIGHT + 60) * scale), "white")
    canvas, font = ImageDraw.Draw(sheet), font_for("", 11 * scale)
    for kind, color, *what in marks(panels, label, from_zero=False):
        if kind == "line":
            points, width = what
            scaled = [(x * scale, y * scale) for x, y in points]
            canvas.line(scaled, color, round(width * scale), joint="curve")
        else:
            (x, y), text, anchor = what
            horizontal = {"start": "l", "middle": "m", "end": "r"}[anchor]
            canvas.text((x * scale, y * scale), text, color, font, anchor=f"{horizontal}s")
    return sheet.reduce(2)


def marks(panels, label, from_zero):
    """("line", color, [(x, y), …], width) and ("text", color, (x, y), text, anchor), in order."""
    for number, (title, lines) in enumerate(panels):
        left, bottom = number * STEP + LEFT, TOP + HEIGHT
        xs, ys = zip(*(point for line in lines.values() for point in line), strict=True)
        later = [y for line in lines.values() for _, y in (line[1:] if len(line) > 2 else line)]
        enclosed = (0, round_up(max(ys))) if from_zero else around([min(ys), *later])
        wide, (low, high) = round_up(max(xs)), enclosed
        yield "text", "black", (left, TOP - 10), title, "start"
        for part in (0, 0.25, 0.5, 0.75, 1):
            x, y = left + part * WIDTH, bottom - part * HEIGHT
            yield "line", GRID, [(left, y), (left + WIDTH, y)], 1
            yield "line", GRID, [(x, TOP), (x, bottom)], 1
            yield "text", "black", (x, bottom + 14), f"{part * wide:g}", "middle"
            yield "text", "black", (left - 4, y + 4), f"{low + part * (high - low):.3g}", "end"
        yield "text", "black", (left + WIDTH + 14, bottom + 14), label, "start"
        for index, (name, line) in enumerate(lines.items()):
            color = COLORS[index % len(COLORS)]
            yield "line", color, [
                (left + x / wide * WIDTH, max(TOP, bottom - (y - low) / (high - low) * HEIGHT))
                for x, y in line
            ], 1.8  # fmt: skip
            yield "text", color, (left + index * WIDTH / len(lines), bottom + 28), name, "start"
            if line[0][1] > high:  # cut off
                place = left + WIDTH - 4, TOP + 12 * (index + 1)
                yield "text", color, place, f"{name} starts at {line[0][1]:.3g}", "end"


def round_up(value):
    """The next number with one digit: 4.7 → 5, 0.023 → 0.03."""
    unit = 10 ** math.floor(math.log10(value)) if value > 0 else 1
    return math.ceil(value / unit - 1e-9) * unit or 1


def around(values):
    """(low, high) with few digits that enclose the values."""
    low, high = min(values), max(values)
    if low == high:
        return min(0, 2 * low), max(0, 2 * high) or 1
    unit = 10 ** math.floor(math.log10(high - low)) / 5
    return math.floor(low / unit + 1e-9) * unit, math.ceil(high / unit - 1e-9) * unit
