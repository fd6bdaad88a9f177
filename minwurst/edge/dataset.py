"""The data set: where captioned images come from, and how every row is checked beforehand.

    table = find(settings)                        # quick; every row is read in the second call
    data = check_and_split(table, run)
    data.rows, data.held_out, data.fingerprint

`datasets` reads the tables; images stay encoded until they are needed (step/images.py). Rows of a
source of one's own (rows.py) are trusted instead of read.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np

from minwurst.base.console import progress, say
from minwurst.base.errors import UserError, command_with
from minwurst.base.ranks import is_main, local_world_size, rank, world_size
from minwurst.edge import files
from minwurst.edge.folder import read_folder
from minwurst.edge.good_rows import GoodRows
from minwurst.edge.inside import refuse_outside
from minwurst.edge.rows import Rows
from minwurst.edge.shapes import shapes_for
from minwurst.step import distributed, randomness
from minwurst.step.buckets import STRIDE, nearest_shapes
from minwurst.step.images import open_image
from minwurst.step.samples import captions_of


@dataclasses.dataclass
class CaptionedImages:
    """Rows {"image": {"bytes", "path"}, "text", "number"}, all of them checked, or trusted as Rows.

    rows: to train on; those of --skip_rows keep their places, but are never read. held_out: to
    validate on. every: both, in their original order. skipped: numbers of the rows of --skip_rows.
    fingerprint: 16 hex digits that change with the content of any row. shapes: (h, w) of the
    latents, several with --aspect_buckets. shape_of: {number of a row: number of its shape}.
    """

    rows: datasets.Dataset | Rows
    held_out: datasets.Dataset | Rows
    every: datasets.Dataset | Rows
    skipped: frozenset
    fingerprint: str
    shapes: list
    shape_of: dict

    def describe_shapes(self):
        """The shapes, and a fingerprint of which row has which."""
        listed = ", ".join(f"{height}×{width}" for height, width in self.shapes)
        rows = json.dumps(sorted(self.shape_of.items())).encode()
        return f"{listed} ({hashlib.sha256(rows).hexdigest()[:16]})"


def check_and_split(table, run):
    """Check every row, hold some out, and give each its shape. All ranks must call it.

    table: what `find` returned. run: a Run, for its settings, seed and layout.
    """
    settings, seed = run.settings, run.seed
    file = cache_folder(settings) / "good_rows.json"
    every = sample_rows(table, settings.max_train_samples, seed)
    skipped = frozenset(settings.skip_rows or ())
    read_all = settings.skip_bad_samples or settings.recheck_data or settings.aspect_buckets
    if isinstance(table, Rows) and not read_all:
        check_skipped(skipped, every["number"])
        sizes = dict.fromkeys(every["number"], (1, 1))  # which the square does not depend on
    else:
        every, fingerprint, sizes = check_rows(
            every, GoodRows(file, table, settings.image_column), skipped=skipped,
            skip_bad=settings.skip_bad_samples, recheck=settings.recheck_data,
        )  # fmt: skip
    if isinstance(table, Rows):
        fingerprint = every.fingerprint()
    rows, held_out = hold_out(every, settings.validation_split, seed)
    every, held_out = without(every, skipped), without(held_out, skipped)
    trained = [sizes[number] for number in rows["number"][:]]
    shapes = shapes_for(trained, settings, run.layout.global_batch)
    shape_of = nearest_shapes(list(sizes.values()), shapes).tolist()
    shape_of = dict(zip(sizes, shape_of, strict=True))
    for number, (height, width) in enumerate(shapes):
        those = {n for n in rows["number"][:] if shape_of[n] == number}
        if those and those <= skipped:
            what = "to train on"
            if len(shapes) > 1:
                what = f"of {width * STRIDE}×{height * STRIDE} pixels; lower --aspect_buckets"
            raise UserError(f"--skip_rows leaves none of the {len(those)} rows {what}.")
    return CaptionedImages(rows, held_out, every, skipped, fingerprint, shapes, shape_of)


def without(rows, skipped):
    """The rows whose numbers are not in `skipped`."""
    if not skipped:
        return rows
    return rows.select(np.flatnonzero(~np.isin(rows["number"][:], list(skipped))))


def cache_folder(settings):
    """Where good rows are listed and --cache_latents writes; created if missing."""
    folder = settings.cache_dir or settings.output_dir
    return distributed.on_main(files.make_folder, folder, "cache_dir")


def find(settings):
    """The split `train` as rows, with nothing decoded. A selected row keeps its number.

    --dataset_name is a name on the Hub, a folder (images, parquet, or written by `save_to_disk`) or
    a .parquet file, and overrides --train_data_dir, a folder of images with captions (folder.py).
    """
    source = Path(settings.dataset_name or settings.train_data_dir)
    flag = f"--train_data_dir {settings.train_data_dir}"
    if settings.dataset_name:
        flag = f"--dataset_name {settings.dataset_name}"
    elif not source.is_dir():
        raise UserError(f"{flag}: no such folder.")
    table = read_table(settings, source, flag)
    columns = settings.image_column, settings.caption_column
    for option, column in zip(("image_column", "caption_column"), columns, strict=True):
        if column not in table.column_names:
            raise UserError(
                f"--{option} {column}: not found in {flag}. Columns: "
                f"{', '.join(table.column_names)}."
            )
    if len(table) == 0:
        raise UserError(f"{flag} is empty: it has no images, or its split `train` has no rows.")
    feature = table.features[settings.image_column]
    stored_as = getattr(feature, "dtype", None)
    if not isinstance(feature, datasets.Image) and stored_as not in ("string", "binary"):
        raise UserError(f"--image_column {settings.image_column} contains {feature}, not images.")
    table = table.select_columns(list(columns))
    table = table.rename_columns(dict(zip(columns, ("image", "text"), strict=True)))
    table = table.add_column("number", range(len(table)))
    table = table.cast_column("image", datasets.Image(decode=False))
    caches = (
        settings.cache_dir or datasets.config.HF_DATASETS_CACHE,
        huggingface_hub.constants.HF_HUB_CACHE,
    )
    refuse_outside(table, [source if source.is_dir() else source.parent, *caches])
    return table


def read_table(settings, source, flag):
    """The table as `datasets` reads it; whatever it raises becomes a UserError."""
    datasets.disable_progress_bars()
    options = {"cache_dir": settings.cache_dir}
    try:
        if not settings.dataset_name:
            columns = settings.image_column, settings.caption_column
            found = read_folder(source, *columns, settings.cache_dir)
        elif (source / "state.json").is_file() or (source / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(source))
        elif source.is_file():
            found = datasets.load_dataset("parquet", data_files=str(source), **options)
        else:
            name, configuration = settings.dataset_name, settings.dataset_config_name
            found = datasets.load_dataset(name, configuration, **options)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    except Exception as error:  # of many types; the library's message says what is wrong
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        listed = source / "metadata.jsonl"
        if not settings.dataset_name and listed.is_file() and not listed.stat().st_size:
            reason = "its metadata.jsonl is empty"
        elif source.is_dir() and re.search(r"\[.*\]|\*\*|::", str(source.resolve())):
            reason += " Rename it: `datasets` can't read a path with [ ], ** or :: in it."
        raise UserError(f"{flag} can't be read, or is empty: {reason}") from None
    if isinstance(found, dict):
        if "train" not in found:
            raise UserError(f"{flag} has no split `train`, only {', '.join(found)}.")
        found = found["train"]
    return found


def sample_rows(rows, limit, seed):
    """At most `limit` rows, chosen by the seed; None keeps all."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(randomness.epoch_order(seed, 0, len(rows))[:limit])


def hold_out(rows, fraction, seed):
    """(rows to train on, rows to validate on), chosen by the seed."""
    count = math.ceil(fraction * len(rows))
    if count == len(rows):
        raise UserError(
            f"--validation_split {fraction} of {len(rows)} rows leaves none to train on."
        )
    if not count:
        return rows, rows.select([])
    order = randomness.epoch_order(randomness.held_out_seed(seed), 0, len(rows))
    return rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))


def threads():
    """The number of this machine's threads that one rank may use."""
    return max(1, (os.cpu_count() or 1) // local_world_size())


def check_rows(rows, good, *, skip_bad=False, recheck=False, skipped=frozenset()):
    """Read every caption and decode every image once.

    Returns (good rows, their fingerprint, {number: (width, height)} of all rows).

    Ranks share the work, and so do the threads of a rank. A bad row is a UserError on all ranks;
    with skip_bad it is reported and skipped. good: a GoodRows, whose rows are not read again unless
    `recheck`. skipped: numbers of rows that may be bad or gone; they count with the digest and the
    size that they had before.
    """

    def known(number):
        """(None, digest, size) of a row that need not be read, else None."""
        facts = good.last_facts(number) if number in skipped else None
        facts = facts or (None if recheck else good.facts(number))
        return facts and (None, *facts)

    def check_row(index):
        """(error or None, digest of the row or "", its image's size) of one row."""
        number, size = numbers[index], (1, 1)
        try:
            row = rows[index]
            captions = captions_of(row)
            with contextlib.suppress(*[UserError] * (number in skipped)):
                size = open_image(row).size
            return None, digest_of(row, captions), size
        except (UserError, OSError) as error:
            line = str(error) if isinstance(error, UserError) else f"Row {number}: {error}"
            return (None if number in skipped else line), "", size

    numbers = rows["number"][:]
    check_skipped(skipped, numbers)
    checked = {index: known(numbers[index]) for index in range(rank(), len(rows), world_size())}
    unknown = [index for index, result in checked.items() if result is None]
    with ThreadPoolExecutor(threads()) as pool:
        results = progress(pool.map(check_row, unknown), "checking the data", total=len(unknown))
        checked |= dict(zip(unknown, results, strict=True))
    everyone = {}
    for part in distributed.gather_objects(checked):
        everyone |= part
    errors = [everyone[index][0] for index in range(len(rows)) if everyone[index][0]]
    if errors and (not skip_bad or len(errors) == len(rows)):
        more = f" ({len(errors) - 1} more rows are bad)" if len(errors) > 1 else ""
        bad = [numbers[index] for index in range(len(rows)) if everyone[index][0]]
        advice = "" if skip_bad else " Skip bad rows with --skip_bad_samples."
        if all(good.last_facts(number) for number in bad):
            words = "--resume_from_checkpoint=latest", *(f"--skip_rows={number}" for number in bad)
            advice = " It was good before. To put other rows in its places: "
            advice += command_with(*words)
        raise UserError(errors[0] + more + advice)
    if is_main():
        found = {numbers[index]: facts for index, (_, *facts) in everyone.items() if facts[0]}
        good.add({n: facts for n, facts in found.items() if n not in skipped})
    if errors:
        for line in errors[:10]:
            say(f"skipped: {line}")
        say(f"skipped in total: {len(errors)} of {len(rows)} rows")
        rows = rows.select([index for index in range(len(rows)) if not everyone[index][0]])
    digests = [everyone[index][1] for index in sorted(everyone) if everyone[index][1]]
    sizes = {numbers[index]: everyone[index][2] for index in sorted(everyone)}
    return rows, hashlib.sha256("".join(digests).encode()).hexdigest()[:16], sizes


def check_skipped(skipped, numbers):
    """UserError for a number of --skip_rows that no row has."""
    for number in sorted(skipped.difference(numbers)):
        raise UserError(f"--skip_rows {number}: there is no such row, of {len(numbers)}.")


def digest_of(row, captions):
    """The SHA-256 of a row's image file and captions."""
    stored = row["image"] or {}
    if not stored.get("bytes") and not os.path.isfile(stored.get("path") or ""):
        raise OSError("its image is gone")
    content = hashlib.sha256(stored.get("bytes") or Path(stored["path"]).read_bytes())
    content.update("\0".join(captions).encode())
    return content.hexdigest()
