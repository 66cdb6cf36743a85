"""Image files as 32x32 RGB pixels, decoded on all cores.

Of this project it imports nothing, and no torch: worker processes run this file and should start fast.
"""

import os
import pickle
import subprocess
import sys
import warnings
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

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
    """(pixels (N, 3, 32, 32) uint8, how many of the files have transparent pixels). Raises ValueError, which names the
    file, if one cannot be read."""
    pixels = np.empty((len(files), 3, SIDE, SIDE), np.uint8)
    transparent = 0
    for index, file in enumerate(files):
        try:
            pixels[index], has_transparency = decode(file)
        except Exception as error:  # a damaged image makes Pillow's many readers raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{file} cannot be read as an image ({reason}): mend or remove it") from None
        transparent += has_transparency
    return pixels, transparent


def decode_all(files):
    """Yields decode_chunk(chunk) for one chunk of `files` after the other, decoded on all cores. Raises ValueError if a
    file cannot be read."""
    chunks = [files[first : first + CHUNK] for first in range(0, len(files), CHUNK)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if min(cores, len(chunks)) == 1:
        yield from map(decode_chunk, chunks)
        return
    # Threads would wait for each other: with small images most of the work is Python's. multiprocessing would run the
    # caller's script again or copy a process that has threads. Ctrl-C does not reach a session of its own.
    command, workers = [sys.executable, __file__], []
    try:
        for number in range(min(cores, len(chunks))):
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
            workers.append(worker)
            with suppress(BrokenPipeError):  # it could not start: its answer is missing below
                pickle.dump(chunks[number::cores], worker.stdin)
                worker.stdin.close()
        for number, chunk in enumerate(chunks):
            try:
                answer = pickle.load(workers[number % cores].stdout)
            except (EOFError, pickle.UnpicklingError):
                raise ValueError(f"a file from {chunk[0]} to {chunk[-1]} ends the process that reads it") from None
            if isinstance(answer, ValueError):
                raise answer
            yield answer
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            worker.stdout.close()


if __name__ == "__main__":
    with suppress(BrokenPipeError, EOFError):  # the process that asked has ended
        for chunk in pickle.load(sys.stdin.buffer):
            try:
                answer = decode_chunk(chunk)
            except ValueError as error:
                answer = error
            pickle.dump(answer, sys.stdout.buffer)
            sys.stdout.flush()
