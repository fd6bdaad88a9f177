"""Rows of a source of one's own: anything with `len`, `[i]` and a fingerprint.

    rows = Rows(source)                   # dataset.find may return it in place of a table

`source[i]` is {"image": {"bytes", "path"}, "text"}: an encoded image in bytes, or its file, and a
caption or a list of captions. A row is read only when it is needed, so a source may be larger than
a disk. `source.fingerprint` is text that changes with the content of any row. It is trusted:
nothing is read at the start, except with --aspect_buckets, --skip_bad_samples or --recheck_data.
A row that turns out to be bad stops the run with its number, for --skip_rows.
"""

import hashlib

import numpy as np

from minwurst.base.errors import UserError


class Rows:
    """What this project uses of a datasets.Dataset, with a source behind it."""

    def __init__(self, source, numbers=None):
        """numbers: of the rows that are selected; all by default."""
        self.source = source
        self.numbers = np.arange(len(source)) if numbers is None else numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, key):
        """A row by its index, or a column by its name."""
        if key == "number":
            return self.numbers.tolist()
        if isinstance(key, str):
            return [self[index][key] for index in range(len(self))]
        number = int(self.numbers[key])
        try:
            return {**self.source[number], "number": number}
        except Exception as error:  # of the source's, whatever it is
            raise UserError(f"Row {number}: can't be read: {error}") from None

    def select(self, indices):
        return Rows(self.source, self.numbers[np.asarray(indices, dtype=int)])

    def fingerprint(self):
        """16 hex digits of the source's fingerprint and the selected numbers."""
        content = hashlib.sha256(f"{self.source.fingerprint} ".encode())
        content.update(self.numbers.astype("<i8").tobytes())
        return content.hexdigest()[:16]
