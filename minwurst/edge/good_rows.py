"""What earlier starts found out about the rows of a data set, so that it is not read again.

    good = GoodRows(cache_folder / "good_rows.json", rows)
    facts = good.facts(number)           # of a row that was good and has not changed, or None

A row is recognised by the path, size and modification time of its image's file, or of the file of
the table that contains it. A file whose content changes while these stay the same goes unnoticed;
--recheck_data reads everything.
"""

import contextlib
import hashlib
import json
import os

import pyarrow.compute as pc

from minwurst.base.console import say
from minwurst.edge.files import read_json, replacing
from minwurst.edge.rows import Rows


class GoodRows:
    """known: {name of a row: [stamp, digest of image and captions, [width, height]]}."""

    def __init__(self, file, rows, image_column="image"):
        """rows: {"image": {"bytes", "path"}, "text", "number"}, with nothing decoded.

        image_column: where a table has the images; another column has other images.
        """
        self.file, self.known = file, {}
        with contextlib.suppress(OSError, ValueError):  # it only saves time
            entries = read_json(file).items()
            self.known = {n: e for n, e in entries if isinstance(e, list) and len(e) == 3}
        if isinstance(rows, Rows):  # they may be anywhere, and are never taken for known
            self.tables, self.rows = None, dict.fromkeys(rows.numbers.tolist(), (None, None))
            return
        images, columns = rows.data.column("image"), ("number", "text")
        paths = pc.struct_field(images, "path").to_pylist()
        stored = pc.fill_null(pc.binary_length(pc.struct_field(images, "bytes")), 0).to_pylist()
        numbers, texts = (rows.data.column(name).to_pylist() for name in columns)
        tables = [table["filename"] for table in rows.cache_files]
        stamps = [stamp_of(table) for table in tables]
        self.tables = f"{tables} {stamps} {image_column}" if tables else None
        self.rows = {
            number: (None if size else path, text)
            for number, path, size, text in zip(numbers, paths, stored, texts, strict=True)
        }

    def name_and_stamp(self, number):
        """What a row is recognised by; (None, None) where it is only in memory."""
        path, text = self.rows[number]
        text = hashlib.sha256(json.dumps(text, default=str).encode()).hexdigest()[:16]
        if path:
            return os.path.abspath(path), f"{stamp_of(path)} {text}"
        if not self.tables:
            return None, None
        return hashlib.sha256(f"{self.tables} {number}".encode()).hexdigest()[:16], text

    def facts(self, number):
        """(digest, size) of a row that was good before and has not changed, else None."""
        name, stamp = self.name_and_stamp(number)
        before, *facts = self.known.get(name, (None,))
        return facts if name and before == stamp else None

    def last_facts(self, number):
        """(digest, size) of a row when it was last good, whatever became of it, or None."""
        return self.known.get(self.name_and_stamp(number)[0], (None,))[1:] or None

    def add(self, facts):
        """Record good rows, {number: (digest, size)}."""
        found = {}
        for number, (digest, size) in facts.items():
            name, stamp = self.name_and_stamp(number)
            if name:
                found[name] = [stamp, digest, list(size)]
        if any(self.known.get(name) != entry for name, entry in found.items()):
            self.known |= found
            try:
                with replacing(self.file, unique=True, flushed=False) as draft:
                    draft.write_text(json.dumps(self.known), encoding="utf-8")
            except OSError as error:
                say(f"{self.file} was not written, and rows will be read again: {error}")


def stamp_of(path):
    """A file's size and time of modification; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return f"{status.st_size} {status.st_mtime_ns}"
