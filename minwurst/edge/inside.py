"""Images have to be inside their data set's folder.

    refuse_outside(rows, [folder])
"""

import os

import pyarrow.compute as pc

from minwurst.base.errors import UserError


def refuse_outside(rows, folders):
    """UserError if a row's image, followed through links, is outside the data set's folders.

    A table from somebody else could otherwise name any file on this machine to be trained on.
    """
    inside = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)
    real_folders = {}
    images = rows.data.column("image")
    paths, content = (pc.struct_field(images, field) for field in ("path", "bytes"))
    sizes = pc.fill_null(pc.binary_length(content), 0)
    for number, (path, size) in enumerate(zip(paths.to_pylist(), sizes.to_pylist(), strict=True)):
        if not path or size:
            continue
        if "\0" in path:
            raise UserError(f"Row {number}: the name of its image, {path!r}, can't be a file's.")
        folder, name = os.path.split(os.path.abspath(path))
        if folder not in real_folders:
            real_folders[folder] = os.path.realpath(folder)
        real = os.path.join(real_folders[folder], name)
        real = os.path.realpath(real) if os.path.islink(real) else real
        if not real.startswith(inside):
            raise UserError(
                f"Row {number}: its image {path} is outside the data set's folder {folders[0]}. "
                "Move the images there, or store them in the table."
            )
