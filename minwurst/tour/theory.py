"""The tour's part without images: the published model's sizes, the formulas, the exercises' list.

Each derivation names the function it explains. Its formulas are those of the code, letter by
letter; tests/test_tour.py checks them with numbers.
"""

import html
import inspect

import torch

from minwurst import miniature
from minwurst.base.model_folder import own_parts
from minwurst.edge import networks
from minwurst.step.image_encoder import EfficientNetEncoder
from minwurst.step.prior import PUBLISHED, WuerstchenPrior
from minwurst.step.stage_a import PaellaVQModel
from minwurst.step.stage_b import WuerstchenDiffNeXt

PARTS = {
    "Stage C, the prior": (WuerstchenPrior, "prior", PUBLISHED),
    "Stage B": (WuerstchenDiffNeXt, "decoder/decoder", {}),
    "Stage A": (PaellaVQModel, "decoder/vqgan", {}),
    "image encoder": (EfficientNetEncoder, "image_encoder", {}),
}
SHOWN = ("c", "c_hidden", "depth", "blocks", "nhead", "c_cond", "level_config", "embed_dim",
         "bottleneck_blocks", "stages", "effnet")  # fmt: skip


def sizes():
    """An HTML table of both models, from the classes and their configs."""
    rows = []
    for name, (kind, folder, published) in PARTS.items():
        ours = networks.config_of(kind, miniature.WEIGHTS / folder)
        defaults = {n: p.default for n, p in inspect.signature(kind.__init__).parameters.items()}
        theirs = {n: v for n, v in {**defaults, **published}.items() if n != "self"}
        cells = [f"{html.escape(name)}<br><code>{kind.__name__}</code>"]
        for config in (ours, theirs):
            listed = [f"{n} {short(config[n])}" for n in SHOWN if config.get(n) is not None]
            cells.append(f"{count(kind, config):,} parameters<br>{html.escape(', '.join(listed))}")
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    side = own_parts(miniature.WEIGHTS)["resolution"] // 32
    return f"""
<p>The same classes with other numbers, so whatever holds for the code here holds for the published
model; what the miniature has learned does not carry over. Its latents have 16×{side}×{side} numbers
and the published model's 16×24×24 (<code>--resolution 768</code>).</p>
<div class="scroll"><table><tr><th>part</th><th>miniature</th><th>published</th></tr>
{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>"""


def short(value):
    if isinstance(value, list | tuple):
        many = [short(item) for item in value]
        return f"{len(many)} rows" if any("/" in item for item in many) else "/".join(many)
    return str(value)


def count(kind, config):
    """Parameters of a network, which is not allocated."""
    accepted = inspect.signature(kind.__init__).parameters
    with torch.device("meta"):
        model = kind(**{name: value for name, value in config.items() if name in accepted})
    return sum(weight.numel() for weight in model.parameters())


def exercises_list():
    from minwurst.tour.exercises import EXERCISES

    items = "".join(f"<li>{html.escape(title(exercise))}</li>" for exercise in EXERCISES)
    return f"""<p>Predict first, then run, then compare. Each is a stub of a few lines in
<code>minwurst/tour/exercises.py</code>: fill it in and run <code>python -m minwurst.tour.exercises
3</code>, here for the third. The answers are in <code>solutions.py</code> beside it.</p>
<ol>{items}</ol>"""


def title(function):
    """The first line of a docstring."""
    return inspect.cleandoc(function.__doc__).splitlines()[0].rstrip(".")


def equations(*lines):
    return "".join(f'<p class="equation">{line}</p>' for line in lines)


DERIVATIONS = [
    (
        "The reverse step between any two times",
        "<code>reverse_step</code> in step/diffusion.py",
        f"""<p>Noise is added in closed form. Let ᾱ belong to t and ᾱ′ to an earlier time t′. To go
forward from t′ to t, one keeps the fraction α = ᾱ/ᾱ′ of the variance and fills up with noise; both
ways of reaching t then agree:</p>
{equations("x = √ᾱ·x₀ + √(1−ᾱ)·ε", "x = √α·x′ + √(1−α)·ε′")}
<p>Going back asks for x′, given x and x₀. Bayes multiplies two normal densities of x′: the step
forward, q(x | x′), and what x₀ says about t′, q(x′ | x₀). Precisions add up:</p>
{equations("1/σ² = α/(1−α) + 1/(1−ᾱ′) = (1−ᾱ) / ((1−α)(1−ᾱ′))")}
<p>because α·(1−ᾱ′) + (1−α) = 1 − αᾱ′ = 1−ᾱ. The code's <code>spread</code> is this σ. The
mean weighs both sources by their precision:</p>
{equations("μ = σ²·( √α/(1−α)·x + √ᾱ′/(1−ᾱ′)·x₀ )")}
<p>The network gives ε instead of x₀. With x₀ = (x − √(1−ᾱ)·ε)/√ᾱ and √ᾱ′/√ᾱ = 1/√α, the factors
of x sum to 1/√α, and what remains is the code's <code>mean</code>:</p>
{equations("μ = ( x − (1−α)/√(1−ᾱ)·ε ) / √α")}
<p>Nothing here needs t′ to be near t. Small steps are needed for another reason: ε is the network's
average over all images that x could be, and this average changes on the way.</p>""",
    ),
    (
        "Why predict the noise",
        "<code>Objective.target</code> and <code>predicted_noise</code> in step/diffusion.py",
        f"""<p>Given x, knowing the noise means knowing the clean latents. So the choice of what to
predict is a choice of how errors count:</p>
{equations("x̂₀ − x₀ = −√((1−ᾱ)/ᾱ)·(ε̂ − ε)", "|ε̂ − ε|² = SNR·|x̂₀ − x₀|², with SNR = ᾱ/(1−ᾱ)")}
<p>The plain error of ε is the error of x₀, weighted by the SNR. The target has variance 1 at every
t, so one loss fits all times, a network that says zero has a loss of exactly 1, and losses can be
read without knowing the data.</p>
<p>The weak end is t = 1. There x is the noise, and copying it is nearly perfect; what is left over,
which decides about layout, is divided by √ᾱ when it is turned into x₀, so that small errors become
large. This is what the first belief in the way back looks like. Predicting v = √ᾱ·ε − √(1−ᾱ)·x₀
avoids this end (at t = 1, v is −x₀), and a flow's ε − x₀ does so as well. Exercise 4 derives ε from
v.</p>""",
    ),
    (
        "The head (x − a)/|1 − b|",
        "<code>WuerstchenPrior.forward</code> in step/prior.py",
        f"""<p>Solve the forward equation for the noise:</p>
{equations("ε = (x − √ᾱ·x₀) / √(1−ᾱ)")}
<p>The last layer gives 32 channels, a and b, where the latents have 16, and the head has the shape
of this solution:</p>
{equations("ε̂ = (x − a) / ( |1 − b| + 0.00001 )", "a ≈ √ᾱ·x₀,  |1 − b| ≈ √(1−ᾱ)")}
<p>So the layers before it describe the image rather than the noise. The noise need not pass
through a network that is narrower than it: x enters the head directly. With a = b = 0, ε̂ is
x itself, which is the right answer at t = 1. Near t = 0 the divisor is about 0.01, which
multiplies whatever is wrong in a; hence large errors there, a head in fp32, and a small
constant against division by zero. The network is free to use a and b in other ways, as only
their quotient is trained.</p>""",
    ),
    (
        "p2 and min-SNR",
        "<code>Objective.loss_weight</code> in step/diffusion.py",
        f"""<p>All these weights are functions of the SNR. Choi et al. weigh the error of ε by
1/(k + SNR)<sup>γ</sup>. With k = γ = 1, since 1 + SNR = 1/(1−ᾱ),</p>
{equations("p2 = 1/(1 + SNR) = 1 − ᾱ")}
<p>which is the code's line and what Würstchen was trained with. Hang et al. think of the
error of x₀, whose weight under plain ε is the SNR. Close to t = 0 that is thousands, so they
cap it at γ, and divide by the SNR to return to ε:</p>
{equations("min-SNR = min(SNR, γ)/SNR = min(1, γ/SNR)", "soft min-SNR = 1/(1 + SNR/γ)")}
<p>The soft one has half the weight where SNR = γ and no corner. For γ = 1 it is p2. All of
them agree that the error of a nearly clean latent says little about the image, and differ in
where “nearly” begins. In terms of x₀, p2 weighs by ᾱ, so that pure noise counts least; a
density of t that prefers noise, as the authors' does, gives some of it back.</p>""",
    ),
    (
        "Guidance",
        "<code>guided</code> in step/diffusion.py",
        f"""<p>The best prediction of the noise points away from likely images: it is a multiple of
the score, the gradient of the log-density.</p>
{equations("ε(x) = −√(1−ᾱ)·∇ log p(x)")}
<p>Suppose one wants images for which the caption c is more certain: weigh p(c | x) by a power w.
Bayes' rule expresses it by densities that the network knows, with and without the caption:</p>
{equations("p(x)·p(c | x)<sup>w</sup> ∝ p(x)·( p(x | c)/p(x) )<sup>w</sup>",
           "ε̂ = ε(∅) + w·( ε(c) − ε(∅) )")}
<p>w = 1 is the plain prediction with caption, and w = 0 ignores it. Both come from one
network, which therefore has to see empty captions while training
(<code>--caption_dropout</code>), and from one batch of twice the size. It is a heuristic: the
guided ε is not the score of any noised distribution, and for large w the latents leave the
range that the decoder was trained on.</p>""",
    ),
]
