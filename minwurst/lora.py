"""Show what a LoRA file contains, or merge one into a prior: a complete model folder.

    python -m minwurst.lora show runs/demo-lora
    python -m minwurst.lora merge runs/demo-lora warp-ai/wuerstchen-prior merged_prior --scale 0.8
"""

import shutil
from pathlib import Path

from safetensors import SafetensorError

from minwurst.base.errors import UserError, blame, one_line
from minwurst.base.model_folder import SAID, own_parts
from minwurst.base.parser import Parser
from minwurst.edge import export, lora_file, models, run_file
from minwurst.edge.files import not_finite, reason, replacing
from minwurst.step import adapter


def show(file):
    """Print a file's layers by kind, with rank, parameters and the mean norm of the update."""
    layers = lora_file.read(file)
    kinds = {}
    for name, factors in layers.items():
        a, b, *_ = factors
        kind = ".".join(name.split(".")[2:]) if name.startswith("blocks.") else name
        count = sum(factor.numel() for factor in factors)
        kinds.setdefault(kind, []).append((len(a), count, (b @ a).norm().item()))
    total = sum(count for rows in kinds.values() for _, count, _ in rows)
    what = "DoRA" if lora_file.is_dora(layers) else "LoRA"
    print(f"{file}: {what}, {len(layers)} layers, {total:,} parameters")
    for kind, rows in kinds.items():
        ranks = ", ".join(str(rank) for rank in sorted({rank for rank, _, _ in rows}))
        mean = sum(norm for *_, norm in rows) / len(rows)
        print(f"  {kind}: {len(rows)} × rank {ranks}, mean ‖B·A‖ {mean:.4g}")


def merge(file, source, output, scale):
    """Write the prior of `source` with a LoRA in its weights to the new folder `output`.

    The folder takes the source's place: it gets the text encoder, and the image encoder, decoder,
    resolution and guidance where the source has them.
    """
    output = Path(output)
    if output.exists():
        raise UserError(f"{output} already exists: choose a new folder.")
    lora_file.read(file)  # before anything large is loaded
    with blame("prior", source):
        folder = models.locate("prior", source)
        text = models.text_folder(folder, where="prior")
        models.check_parts(folder, text)
        own, prior = own_parts(folder), models.load_prior(folder)
    lora_file.load(prior, file)
    adapter.set_scale(prior, scale)
    adapter.merge(prior)
    if name := not_finite(dict(prior.named_parameters())):
        raise UserError(f"--scale {scale} makes {name} infinite or NaN. Nothing was written.")
    try:
        with replacing(output) as draft:
            said = {name: value for name, value in own.items() if name in SAID}
            export.write_parts(draft, prior, text, said)
            for part in own.keys() - said.keys():
                shutil.copytree(own[part], draft / part)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output} was not written: {reason(error)}") from None
    print(f"{output}: the prior of {source} with {scale} × {file}")
    if run := run_file.folder_of(file):
        known, base = run_file.read(run), models.fingerprint(models.prior_folder(folder))
        if known["identity"].get("prior") != base:
            trained = known["settings"].get(models.PRIOR.removeprefix("--"))
            print(f"note: the LoRA was trained on another prior, {trained}")


def main():
    parser = Parser(prog="python -m minwurst.lora")
    verbs = parser.add_subparsers(dest="verb", required=True)
    shown = verbs.add_parser("show", help="show what a LoRA file contains")
    merged = verbs.add_parser("merge", help="merge a LoRA into a prior's weights")
    shown.add_argument("file", help="file or folder of the LoRA")
    merged.add_argument("file", help="file or folder of the LoRA")
    merged.add_argument("prior", help="folder or Hub repository of the base prior")
    merged.add_argument("output", help="folder to write")
    merged.add_argument("--scale", type=float, default=1.0, help="strength of the LoRA (default 1)")
    given = parser.parse_args()
    with one_line("minwurst.lora"):
        if given.verb == "show":
            show(given.file)
        else:
            merge(given.file, given.prior, given.output, given.scale)


if __name__ == "__main__":
    main()
