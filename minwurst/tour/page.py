"""The tour as one HTML file: images are data URIs, fonts are the system's, there is no script."""

import base64
import html
import inspect
import io

from minwurst.tour import bench, panels, theory, training

STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; padding: 1rem; max-width: 52rem; font: 17px/1.55 system-ui, sans-serif;
  color: #222; background: #fff }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 3rem; border-top: 1px solid #ddd;
  padding-top: 1.5rem }
pre { overflow-x: auto; padding: .7rem .9rem; border-radius: 6px; background: #f4f3ef;
  font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace }
pre.printed { background: #fff; border: 1px solid #ddd } code { font-size: .9em }
.figures { display: grid; grid-template-columns: repeat(var(--narrow), 1fr); gap: .8rem }
@media (min-width: 40rem) { .figures { grid-template-columns: repeat(var(--wide), 1fr) } }
figure { margin: 0 } img { display: block; width: 100%; height: auto; border-radius: 4px }
figcaption { font-size: 14px; line-height: 1.3; color: #555; margin-top: .3rem }
.equation { padding-left: 1.2rem; font-family: Cambria, "Times New Roman", serif; font-size: 1.1em }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 15px }
table { min-width: 34rem }
td, th { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd;
  vertical-align: top } .note { color: #777; font-size: 15px }
"""
INTRODUCTION = """
<p>Every image on this page was made by the code above it, which is this project's own on
<a href="#map">the miniature</a>, a complete Würstchen that runs on a laptop. The lines printed by
that code are in the box below it. In the code, <code>m</code> holds the miniature's parts;
<a href="#m">its source</a> is at the end.</p>
"""


def page(results):
    """results: {panel: its panels.Result}, in order."""
    sections = [section(number, *item) for number, item in enumerate(results.items(), 1)]
    titles = [panels.describe(panel)[0] for panel in results]
    listed = "".join(f'<li><a href="#p{n}">{text(t)}</a></li>' for n, t in enumerate(titles, 1))
    derivations = "".join(
        f"<h3>{text(title)}</h3><p class=note>{where}</p>{body}"
        for title, where, body in theory.DERIVATIONS
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>A tour of Würstchen</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>
<h1>A tour of Würstchen</h1>{INTRODUCTION}
<ol>{listed}</ol>
<p>Then: <a href="#map">from the miniature to the published model</a>,
<a href="#formulas">the formulas</a>, <a href="#exercises">exercises</a>.</p>
{"".join(sections)}
<h2 id="map">From the miniature to the published model</h2>{theory.sizes()}
<h2 id="formulas">The formulas</h2>{derivations}
<h2 id="exercises">Exercises</h2>{theory.exercises_list()}
<h2 id="m">What m is</h2><details><summary>minwurst/tour/bench.py</summary>
<pre>{text(inspect.getsource(bench.Bench))}</pre></details>
</body></html>
"""


def section(number, panel, result):
    title, prose = panels.describe(panel)
    parts = [f'<h2 id="p{number}">{number}. {text(title)}</h2>']
    parts += [f"<p>{text(paragraph)}</p>" for paragraph in prose.split("\n\n")]
    parts.append(f"<pre>{text(result.code)}</pre>")
    if panel in training.PANELS:
        stale = result.weights != bench.fingerprint() or result.code != panels.code_of(panel)
        again = f"python -m minwurst.tour --full --only {panel.__name__}"
        changed = " Code or weights have changed since then." if stale else ""
        parts.append(f"<p class=note>Made by <code>{again}</code>.{changed}</p>")
    if result.printed:
        parts.append(f'<pre class="printed">{text(result.printed)}</pre>')
    drawings = [shown for shown in result.figures if panels.is_drawing(shown[0])]
    images = [shown for shown in result.figures if not panels.is_drawing(shown[0])]
    parts += [figures(shown) for shown in (drawings, images) if shown]
    return "\n".join(parts)


def figures(shown):
    """A grid of several, in rows of equal length where that is possible."""
    image, many = shown[0][0], len(shown)
    if panels.is_drawing(image):
        wide, narrow = 2, 1
    elif image.width > image.height:  # a pair
        wide, narrow = (4, 2) if many % 4 == 0 else (3, 1)
    else:
        wide, narrow = next((n for n in (4, 3, 5) if many % n == 0), 4), 2
    style = f"--wide: {wide}; --narrow: {narrow}"
    return f'<div class="figures" style="{style}">{"".join(map(figure, shown))}</div>'


def figure(shown):
    image, caption = shown
    return (
        f'<figure><img src="{data_uri(image)}" alt="{text(caption)}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def data_uri(image):
    if isinstance(image, str):
        kind, data = "svg+xml", image.encode()
    else:
        written = io.BytesIO()
        image.save(written, "webp", quality=85)
        kind, data = "webp", written.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def text(words):
    return html.escape(words)
