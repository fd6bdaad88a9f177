"""Draw the loss weights and timestep densities of step/diffusion.py as a chart.

    python -m minwurst.objectives minwurst/objectives.svg
"""

from pathlib import Path

import torch

from minwurst.base.errors import one_line
from minwurst.base.parser import Parser
from minwurst.edge.curves import curves
from minwurst.step.diffusion import Objective


def weights():
    """{weighting: [(t, weight), …]}."""
    t = torch.linspace(0, 1, 101)
    names = "none", "p2", "min_snr", "soft_min_snr"
    return {
        name: list(zip(t.tolist(), Objective(name).loss_weight(t).tolist(), strict=True))
        for name in names
    }


def densities(bins=50):
    """{sampling: [(t, density), …]}, from a million evenly spaced uniform numbers."""
    uniform = (torch.arange(1_000_000) + 0.5) / 1_000_000
    found = {}
    for name in ("uniform", "wuerstchen", "logit_normal"):
        t = Objective(timestep_sampling=name).timesteps(uniform)
        density = (torch.histc(t, bins, 0, 1) / len(t) * bins).tolist()
        found[name] = [(n / bins, high) for i, high in enumerate(density) for n in (i, i + 1)]
    return found


def main():
    parser = Parser(prog="python -m minwurst.objectives")
    parser.add_argument("file", type=Path, help="the .svg file to write")
    file = parser.parse_args().file
    panels = [("weight of an error (γ = 5)", weights()), ("density of t", densities())]
    with one_line("minwurst.objectives"):
        file.write_text(curves(panels, "t"), encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
