"""Image files as 32x32 RGB pixels, decoded on all cores.

Of this project it imports nothing.
"""

import os
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch.utils.data import DataLoader

SIDE = 32  # pixels
CHUNK = 32  # images that a worker gets at a time
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # bytes of text in a PNG


def decode(file):
    """(pixels (3, 32, 32) uint8, whether the file has transparent pixels). The image is rotated as its camera says, cut
    to its centre square, resized and made RGB."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about size and metadata; an image is still an image
        with Image.open(file) as image:
            if image.mode in ("I", "F"):  # Pillow would clip them to white or black
                raise ValueError("32 bits per pixel: save it with 8 bits per channel")
            ImageOps.exif_transpose(image, in_place=True)
            transparent = False
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.has_transparency_data:
                lowest_alpha, _ = image.convert("RGBA").getchannel("A").getextrema()
                transparent = lowest_alpha < 255
            image = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC)
            return np.asarray(image).transpose(2, 0, 1), transparent


def decode_chunk(files):
    """(pixels (N, 3, 32, 32) uint8, how many of the files have transparent pixels); or, because an error would lose its
    words between processes, a ValueError that names the file which cannot be read."""
    pixels = np.empty((len(files), 3, SIDE, SIDE), np.uint8)
    transparent = 0
    for index, file in enumerate(files):
        try:
            pixels[index], has_transparency = decode(file)
        except Exception as error:  # a damaged image makes Pillow's many readers raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return ValueError(f"{file} cannot be read as an image ({reason}): mend or remove it")
        transparent += has_transparency
    return pixels, transparent


def decode_all(files):
    """Yields decode_chunk(chunk) for one chunk of `files` after the other, decoded on all cores. Raises ValueError if a
    file cannot be read."""
    chunks = [files[first : first + CHUNK] for first in range(0, len(files), CHUNK)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores, len(chunks)) if cores > 1 else 0
    own_generator = torch.Generator()  # or the loader would draw from the caller's
    loader = DataLoader(chunks, None, num_workers=workers, collate_fn=decode_chunk, generator=own_generator)
    try:
        for answer in loader:
            if isinstance(answer, ValueError):
                raise answer
            yield answer
    except RuntimeError as error:  # a worker has died
        raise ValueError(f"a file from {files[0]} to {files[-1]} cannot be read ({error})") from None
