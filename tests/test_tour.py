"""The tour: the page is complete and works in a browser, and the exercises check themselves."""

import base64
import html
import html.parser
import inspect
import io
import re
import shutil
import subprocess

import pytest
import torch
from PIL import Image, ImageStat

from minwurst.step import diffusion
from minwurst.tour import checks, exercises, panels, sampling, solutions, training
from minwurst.tour.__main__ import make

BROWSERS = (
    "chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser",
    "google-chrome",
)  # fmt: skip
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
# What a browser knows about the page, written into its title for --dump-dom.
PROBE = """<script>
const errors = []; onerror = message => errors.push(message);
onload = () => { document.title = JSON.stringify({
  images: document.images.length,
  missing: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt),
  requests: performance.getEntriesByType("resource").map(e => e.name)
    .filter(name => !name.startsWith("data:")),
  wide: document.documentElement.scrollWidth > innerWidth, errors }) }
</script>"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The page, with three steps of Stage B instead of twelve."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "stage_b_times", lambda: torch.linspace(1, 0, 4))
        return make(tmp_path_factory.mktemp("tour"))


class Elements(html.parser.HTMLParser):
    """Sources of images, texts of <pre>, and links and their targets."""

    def __init__(self, text):
        super().__init__()
        self.images, self.boxes, self.links, self.ids, self.open = [], [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.open += [tag] if tag == "pre" else []
        self.boxes += [""] if tag == "pre" else []
        self.images += [attributes["src"]] if tag == "img" else []
        self.links += [attributes["href"]] if tag == "a" else []
        self.ids |= {attributes["id"]} if "id" in attributes else set()

    def handle_endtag(self, tag):
        if tag == "pre":
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.boxes[-1] += data


@pytest.mark.slow
def test_the_page_holds_all_it_shows(file):
    """Images are decodable data URIs, links stay on the page, and all panels are there."""
    found = Elements(file.read_text(encoding="utf-8"))
    assert len(found.images) > 60
    for source in found.images:
        kind, data = re.fullmatch(r"data:image/(webp|svg\+xml);base64,(.*)", source).groups()
        data = base64.b64decode(data, validate=True)
        if kind == "webp":
            Image.open(io.BytesIO(data)).load()
        else:
            assert data.startswith(b"<svg") and data.rstrip().endswith(b"</svg>")
    assert {link.removeprefix("#") for link in found.links} <= found.ids
    for panel in (*sampling.PANELS, *training.PANELS):
        assert panels.code_of(panel) in found.boxes, panel.__name__
    assert file.stat().st_size < 2e6


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.skipif(not BROWSER, reason=f"no browser found: none of {', '.join(BROWSERS)}")
def test_the_page_in_a_browser(file, tmp_path, width):
    """No missing image, script error or request, and nothing wider than the window."""
    probed = tmp_path / "probed.html"
    text = file.read_text(encoding="utf-8")
    probed.write_text(text.replace("<head>", f"<head>{PROBE}"), encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom",
         probed.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    expected = '{"images":%d,"missing":[],"requests":[],"wide":false,"errors":[]}'
    assert html.unescape(title[1]) == expected % len(Elements(text).images)


@pytest.mark.parametrize("panel", training.PANELS, ids=lambda panel: panel.__name__)
def test_kept_results_were_made_by_the_code_that_is_shown(panel):
    kept = panels.load(panel.__name__)
    assert kept.code == panels.code_of(panel)
    assert "$ python " in kept.printed or "step " in kept.printed


def test_numbers_in_the_prose_are_no_measurements():
    """What was measured stands in the boxes: the prose has no number with a decimal point."""
    for panel in (*sampling.PANELS, *training.PANELS):
        title, prose = panels.describe(panel)
        assert title and prose and not re.search(r"\d\.\d|\d ?%", prose), panel.__name__


def test_results_are_kept_as_they_are(tmp_path):
    image = Image.linear_gradient("L").convert("RGB")
    given = panels.Result("code", "lines", [(image, "one"), ("<svg></svg>", "two")], "0")
    panels.save(given, "name", tmp_path)
    kept = panels.load("name", tmp_path)
    assert (kept.code, kept.printed, kept.figures[1]) == ("code", "lines", given.figures[1])
    difference = ImageStat.Stat(kept.figures[0][0]).mean[0] - 127.5
    assert kept.figures[0][1] == "one" and abs(difference) < 2


QUICK = [n for n, e in enumerate(exercises.EXERCISES, 1) if e is not exercises.flags_that_survive]
SLOW = [n for n in range(1, len(exercises.EXERCISES) + 1) if n not in QUICK]
numbers = pytest.mark.parametrize(
    "number", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
)


@numbers
def test_an_exercise_rejects_its_stub(number):
    is_right, line = exercises.run(number, exercises)
    assert not is_right and line


@numbers
def test_an_exercise_accepts_its_solution(number):
    is_right, line = exercises.run(number, solutions)
    assert is_right, line


def test_there_are_eight_exercises_each_with_a_check_and_a_solution():
    names = [exercise.__name__ for exercise in exercises.EXERCISES]
    assert len(set(names)) == 8
    for name in names:
        assert "Predict: " in getattr(exercises, name).__doc__
        stub, answer = (inspect.signature(getattr(m, name)) for m in (exercises, solutions))
        assert stub == answer and getattr(checks, name).__doc__


def test_the_reverse_step_is_what_the_page_derives():
    """Two independent normal densities of x′, multiplied."""
    t, t_next = torch.tensor([0.8]), torch.tensor([0.3])
    x, noise = torch.randn(2, 1, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    now, after = diffusion.alpha_bar(t).double(), diffusion.alpha_bar(t_next).double()
    alpha = now / after
    precision = alpha / (1 - alpha) + 1 / (1 - after)
    clean = (x - (1 - now).sqrt() * noise) / now.sqrt()
    mean = (alpha.sqrt() / (1 - alpha) * x + after.sqrt() / (1 - after) * clean) / precision
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = diffusion.reverse_step(x, noise, t, t_next, z)
    assert (found - (mean + precision.rsqrt() * z)).abs().max() < 1e-4
