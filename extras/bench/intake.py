"""
How fast scans become stored JPEGs, on one core, beside pydicom and NumPy.

    python extras/bench/intake.py

draws --images CT slices of 12 bits in 16, writes them as DICOM without compression, with RLE and with JPEG 2000, and
as 16-bit PNGs, and takes each from its file to a stored JPEG as prepare/all.py does: it is found and hashed, decoded,
windowed, resized, encoded, and looked at again. Beside it stand the least that shows such a file at all, pydicom (or
Pillow) and NumPy up to 256 greys, and the chain that one would write oneself, from there to the same JPEG. The ways
take turns, a round each; ratios are of the medians.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import io
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from PIL import Image

from extras.bench.progress import Progress
from formats.frames import ScanSettings, find_scans
from plumbing.flags import Count, Range, UserError, Whole, parse_command_line, run
from prepare.shards import ImageSettings, encode_image

SETTINGS = ImageSettings(224, "squash", "jpeg", 97)  # prepare/all.py's defaults
KINDS = {"DICOM": None, "DICOM, RLE": "RLELossless", "DICOM, JPEG 2000": "JPEG2000Lossless", "16-bit PNG": "png"}
CENTRE, WIDTH = 40, 400


@dataclass(frozen=True)
class Config:
    images: Count = 40  # of each kind, no two the same
    size: Annotated[int, Range(16, 4096)] = 512  # pixels along each side
    rounds: Count = 5  # over all images
    seed: Whole = 0  # of what is drawn


def draw(size, random):
    """A slice of a body, (size, size) uint16: air, soft tissue with organs, noise, of 12 bits, 1024 at 0 HU."""
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    pixels = np.full((size, size), 24.0)
    pixels[x ** 2 / 0.7 + y ** 2 / 0.4 < 1] = 1064
    for _ in range(12):
        left, top, wide, high = random.uniform((-0.5, -0.4, 0.05, 0.05), (0.5, 0.4, 0.3, 0.2))
        pixels[((x - left) / wide) ** 2 + ((y - top) / high) ** 2 < 1] = random.uniform(900, 1400)
    return (pixels + random.normal(0, 12, pixels.shape)).clip(0, 4095).round().astype(np.uint16)


def write(path, pixels, packed):
    """Write a slice as a PNG, or as a DICOM file with what a scanner writes of it."""
    if packed == "png":
        Image.fromarray(pixels).save(path)
        return
    import pydicom
    dataset = pydicom.Dataset()
    for name, value in {
            "SOPClassUID": pydicom.uid.CTImageStorage, "SOPInstanceUID": pydicom.uid.generate_uid(), "Modality": "CT",
            "PatientID": "drawn", "StudyInstanceUID": "1.2", "SeriesInstanceUID": pydicom.uid.generate_uid(),
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [0, 0, 0], "Rows": len(pixels),
            "Columns": len(pixels), "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
            "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0, "RescaleSlope": 1,
            "RescaleIntercept": -1024, "WindowCenter": CENTRE, "WindowWidth": WIDTH}.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixels.astype("<u2").tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    if packed:
        dataset.compress(getattr(pydicom.uid, packed), generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)


# ----------------------------------------------------------------------------- ways

def alone(path):
    """A file's 256 greys, and nothing else: read, rescale, window; of a PNG the percentiles are the window."""
    if path.suffix == ".png":
        values = np.asarray(Image.open(path, formats=("PNG",)))
        low, high = np.percentile(values, (0.5, 99.5))
    else:
        import pydicom
        dataset = pydicom.dcmread(path)
        values = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        low, high = CENTRE - WIDTH / 2, CENTRE + WIDTH / 2
    return ((values - low) * 255 / (high - low)).clip(0, 255).astype(np.uint8)


def chain(path):
    """The same, and from there to a JPEG as large as prepare's."""
    image = Image.fromarray(alone(path)).convert("RGB").resize((SETTINGS.size, SETTINGS.size), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=SETTINGS.quality, subsampling="4:4:4")
    return stream.getvalue()


def find(path):
    """A file's one picture, as prepare finds it."""
    scans, refused = find_scans([path], ScanSettings(), path.parent)
    if refused:
        raise UserError(f"{path}: {refused[path]}")
    return scans[0].sources[0]


def prepared(path):
    """A file's stored JPEG, as prepare/all.py makes it."""
    source = find(path)
    encoded = encode_image(source.read_bytes() if isinstance(source, Path) else source, SETTINGS)
    if isinstance(encoded, str):
        raise UserError(f"{path}: {encoded}")
    return encoded[0]


WAYS = {"prepare, file to stored JPEG": prepared, "  of which it is found and hashed": find,
        "decoded and windowed alone": alone, "the same, to a JPEG": chain}


def time_ways(paths, rounds):
    """{way: [seconds an image, of each round]}"""
    seconds, progress = defaultdict(list), Progress(rounds, "rounds")
    for _ in range(rounds):
        for way, do in WAYS.items():
            start = time.perf_counter()
            for path in paths:
                do(path)
            seconds[way].append((time.perf_counter() - start) / len(paths))
        progress.row(f"{len(paths)} images, {sum(some[-1] for some in seconds.values()) * len(paths):.1f} s")
    return seconds


def difference(paths):
    """Mean difference in grey levels between prepare's JPEGs and the chain's."""
    def pixels(content):
        return np.asarray(Image.open(io.BytesIO(content), formats=("JPEG",)), np.int16)

    return float(np.mean([np.abs(pixels(prepared(path)) - pixels(chain(path))).mean() for path in paths]))


def main(config):
    random = np.random.default_rng(config.seed)
    slices = [draw(config.size, random) for _ in range(config.images)]
    with tempfile.TemporaryDirectory() as folder:
        for kind, packed in KINDS.items():
            end = "png" if packed == "png" else "dcm"
            paths = [Path(folder) / f"{packed}_{number}.{end}" for number in range(config.images)]
            for path, pixels in zip(paths, slices):
                write(path, pixels, packed)
            megabytes = sum(path.stat().st_size for path in paths) / len(paths) / 1e6
            seconds = time_ways(paths, config.rounds)
            medians = {way: statistics.median(some) for way, some in seconds.items()}
            print(f"{kind}: {config.size} x {config.size}, {megabytes:.2f} MB a file; images/s on one core")
            for way, each in medians.items():
                print(f"  {way:36} {1 / each:8,.0f}   {medians['decoded and windowed alone'] / each:5.2f} of alone")
            print(f"  prepare's JPEG and the chain's differ by {difference(paths[:10]):.2f} grey levels")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
