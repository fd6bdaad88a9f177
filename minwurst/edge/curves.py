"""Line charts as SVG, without a plotting library.

    svg = curves([("loss weight", {"p2": [(0.0, 0.0), (1.0, 1.0)]})])
"""

import math
from xml.sax.saxutils import escape

COLORS = ("#1f6f8b", "#d1495b", "#3c8d53", "#8a5aa8", "#c77d1e", "#555555")
WIDTH, HEIGHT, LEFT, TOP = 300, 180, 40, 26  # of a panel's plot area, and its margins


def curves(panels, label="t"):
    """One panel per (title, {name: [(x, y), …]}), side by side; both axes start at 0."""
    total = len(panels) * (WIDTH + LEFT + 30)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {HEIGHT + 60}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (title, lines) in enumerate(panels):
        left = number * (WIDTH + LEFT + 30) + LEFT
        parts += panel(title, lines, left, label)
    return "\n".join([*parts, "</svg>", ""])


def panel(title, lines, left, label):
    points = [point for line in lines.values() for point in line]
    wide, high = (round_up(max(values)) for values in zip(*points, strict=True))

    def place(x, y):
        return f"{left + x / wide * WIDTH:.1f},{TOP + (1 - y / high) * HEIGHT:.1f}"

    yield f'<text x="{left}" y="{TOP - 10}" font-weight="bold">{escape(title)}</text>'
    for part in (0, 0.25, 0.5, 0.75, 1):
        x, y = left + part * WIDTH, TOP + (1 - part) * HEIGHT
        yield f'<path d="M{left} {y}h{WIDTH}M{x} {TOP}v{HEIGHT}" stroke="#ddd" fill="none"/>'
        yield f'<text x="{x}" y="{TOP + HEIGHT + 14}" text-anchor="middle">{part * wide:g}</text>'
        yield f'<text x="{left - 4}" y="{y + 4}" text-anchor="end">{part * high:.2g}</text>'
    yield f'<text x="{left + WIDTH + 14}" y="{TOP + HEIGHT + 14}">{escape(label)}</text>'
    for number, (name, line) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        path = " ".join(place(x, y) for x, y in line)
        yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>'
        x = left + number * WIDTH / len(lines)
        yield f'<text x="{x}" y="{TOP + HEIGHT + 28}" fill="{color}">{escape(name)}</text>'


def round_up(value):
    """The next number with one digit: 4.7 → 5, 0.023 → 0.03."""
    unit = 10 ** math.floor(math.log10(value)) if value > 0 else 1
    return math.ceil(value / unit - 1e-9) * unit or 1
