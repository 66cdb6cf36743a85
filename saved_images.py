"""The file of evaluate.py --save-images: adversarial images in an .npz that is never whole in memory.

Until the end they are in FILE.npz.raw, a place for each network, attack and image: every process writes its batches
where they belong, and a batch that is attacked again after a kill lies where it lay.
Of this project it imports `cli`.
"""

import math
import zipfile

import numpy as np

from cli import UserError, atomic_write


class SavedImages:
    """The images that attacks make of `total` images of `shape`, (3, H, W). `columns` is {name: its column's place},
    such as {"target pgd20": 1}."""

    def __init__(self, path, columns, total, shape):
        self.path, self.columns, self.total, self.shape = path, columns, total, tuple(shape)
        self.raw = path.with_name(f"{path.name}.raw")
        self.image_bytes = 4 * math.prod(shape)
        self.is_ours = False

    def open(self, resumed):
        """Makes the raw file, or finds that of the resumed evaluation. Raises UserError if another is there."""
        size = len(self.columns) * self.total * self.image_bytes
        if resumed:
            if not self.raw.is_file() or self.raw.stat().st_size != size:
                raise UserError(f"{self.raw} is not that of the interrupted evaluation: bring it back, or start anew")
        else:
            try:
                with open(self.raw, "xb") as file:
                    file.truncate(size)
            except FileExistsError:
                raise UserError(f"{self.raw} exists already: choose another --save-images, or delete it") from None
        self.is_ours = True

    def discard(self):
        """Removes the raw file, if `open` made or found it."""
        if self.is_ours:
            self.raw.unlink(missing_ok=True)

    def write(self, batch, x_advs):
        """Keeps the images at the indices `batch`, which follow one another, from each column's x_adv (B, 3, H, W)."""
        with open(self.raw, "r+b") as file:
            for place, column in enumerate(self.columns.values()):
                file.seek((place * self.total + int(batch[0])) * self.image_bytes)
                file.write(x_advs[column].float().cpu().contiguous().numpy())

    def finish(self, attacked, indices, y):
        """Writes the .npz: for each name the images that were `attacked`, {name: (n,) bool}, in float32, and of these
        the `indices` in the test set and the labels y."""
        with atomic_write(self.path) as partial, zipfile.ZipFile(partial, "w") as archive, open(self.raw, "rb") as raw:
            for place, name in enumerate(self.columns):
                numbers = attacked[name].nonzero().squeeze(1)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    header = {"descr": "<f4", "fortran_order": False, "shape": (len(numbers), *self.shape)}
                    np.lib.format.write_array_header_1_0(file, header)
                    for number in numbers.tolist():
                        raw.seek((place * self.total + number) * self.image_bytes)
                        file.write(raw.read(self.image_bytes))
                for key, values in (("indices", indices), ("y", y)):
                    with archive.open(f"{name} {key}.npy", "w") as file:
                        np.lib.format.write_array(file, values[numbers].numpy())
