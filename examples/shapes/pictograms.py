# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Fetches colour emoji as pictures of objects: several artists have drawn each of about 300 objects.

The families are npm packages of Iconify with the artists' SVG; `objects.csv` says which of their pictures shows which
object. NOTICE has their artists and licences. This step needs npm and resvg-py (`pip install resvg-py`).
"""

import colorsys
import csv
import io
import json
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from conversion.checkpoints.folders import complete_or_absent, require_empty

FAMILIES = {
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "twemoji": "1.2.5",
    "fluent-emoji-flat": "1.2.6",
    "emojione": "1.2.3",
    "fxemoji": "1.2.2",
}
HELD_OUT_FAMILY = "fluent-emoji-flat"  # only the test has pictures of this family
TABLE = Path(__file__).parent / "objects.csv"
SAMPLE = Path(__file__).parent / "sample"  # a few objects of every family, for the tests
RENDERED = 64  # side of a picture in the folder, in pixels

# Lowest and highest hue in degrees, and least saturation and value. Between two colours is room, so that people would
# agree on the name. A darker or paler orange is brown or pink, a paler red is pink.
HUES = {
    "red": (348, 9, 0.7, 0.55),
    "orange": (20, 34, 0.78, 0.9),
    "yellow": (44, 58, 0.6, 0.85),
    "green": (80, 160, 0.45, 0.4),
    "blue": (198, 235, 0.45, 0.45),
}
CERTAIN = 0.75  # share of the pixels that must have the colour


@dataclass(frozen=True)
class Object:
    """Describes an object by its name and its category, which is empty for what has none.

    `also` are other names and categories that some people would give it: a hen is a bird, a tomato is a fruit. Nothing
    is asked for such a word about a picture with this object.
    """

    name: str
    category: str
    also: tuple[str, ...]


def _rows() -> list[dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


OBJECTS = tuple(Object(row["name"], row["category"], tuple(filter(None, row["also"].split("; ")))) for row in _rows())


@dataclass(frozen=True)
class Pictogram:
    """An object as one family draws it."""

    object: Object
    family: str
    picture: Image.Image  # RGBA, (RENDERED, RENDERED), cut to what is drawn

    @cached_property
    def colour(self) -> str | None:
        """Returns the one colour of the picture, if it is certain."""
        return certain_colour(self.picture)


def fetch(out: str | Path) -> Path:
    """Downloads all families, and writes a picture per object and family into `out`/FAMILY/NAME.png.

    `out` must not exist or be empty; it appears complete or not at all.

    Raises:
        ValueError: if npm fails, resvg-py is missing, the table of objects is wrong, or a family lacks a picture that
            it names.
    """
    out = require_empty(out)
    check_objects(OBJECTS)
    with complete_or_absent(out) as folder:
        for family, version in tqdm(FAMILIES.items(), desc="families"):
            icons = _download(family, version)
            (folder / family).mkdir()
            for row in _rows():
                if row[family]:
                    _draw(icons, family, row[family]).save(folder / family / f"{row['name']}.png")
    return out


def check_objects(objects: Sequence[Object]) -> None:
    """Raises a `ValueError` if a name of the table is there twice, or if `also` has a word that nothing else has."""
    names = Counter(one.name for one in objects)
    known = names.keys() | {one.category for one in objects}
    for one in objects:
        if names[one.name] > 1:
            raise ValueError(f"{TABLE} has {names[one.name]} rows of {one.name!r}, expected one: remove or rename it.")
        for word in one.also:
            if word not in known:
                raise ValueError(
                    f"{TABLE} has {word!r} in `also` of {one.name!r}, expected names and categories of the table, "
                    "with '; ' between them."
                )


def _download(family: str, version: str) -> dict:
    """Returns Iconify's JSON of a family."""
    package = f"@iconify-json/{family}@{version}"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            subprocess.run(
                ["npm", "pack", "--silent", package], cwd=scratch, check=True, capture_output=True, text=True
            )
        except FileNotFoundError:
            raise ValueError("npm was not found. Install it: it downloads the pictograms.") from None
        except subprocess.CalledProcessError as error:
            raise ValueError(f"npm could not download {package}: {error.stderr.strip()}") from error
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as files:
            return json.load(files.extractfile("package/icons.json"))  # type: ignore[arg-type]


def _draw(icons: dict, family: str, name: str) -> Image.Image:
    if name not in icons["icons"]:
        raise ValueError(f"{family} has no picture {name!r}: correct its name in {TABLE}, or leave it empty.")
    try:
        return render(_svg(icons, name))
    except ValueError as error:
        raise ValueError(f"The picture {name!r} of {family} could not be drawn: {error}") from error


def _svg(icons: dict, name: str) -> str:
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'


def render(svg: str) -> Image.Image:
    """Returns a picture of RENDERED pixels a side, with what is drawn in its middle and up to two of its edges.

    Raises:
        ValueError: if resvg-py is missing, or the SVG is damaged or shows nothing.
    """
    try:
        import resvg_py  # here because only this command needs it
    except ImportError:
        raise ValueError("resvg-py is missing: pip install resvg-py") from None
    data = resvg_py.svg_to_bytes(svg_string=svg, width=2 * RENDERED, height=2 * RENDERED)
    drawn = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    if drawn.getbbox() is None:
        raise ValueError("it shows nothing.")
    drawn = drawn.crop(drawn.getbbox())
    side = max(drawn.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square.resize((RENDERED, RENDERED), Image.Resampling.BOX)


def read_pictograms(folder: str | Path) -> dict[str, list[Pictogram]]:
    """Returns the pictograms of each family in a folder that `fetch` wrote.

    Raises:
        ValueError: if a family is missing, a picture is damaged, empty, of another size or of an unknown object, or the
            table of objects is wrong.
    """
    check_objects(OBJECTS)
    known = {f"{family}/{one.name}.png" for family in FAMILIES for one in OBJECTS}
    for file in sorted(Path(folder).glob("*/*.png")):
        if file.relative_to(folder).as_posix() not in known:
            raise ValueError(
                f"{file} is of no known object or family: add its row to {TABLE}, or its family to FAMILIES in "
                f"{Path(__file__).name}, or remove it."
            )
    pictograms = {family: list(_read_family(Path(folder) / family)) for family in FAMILIES}
    for family, of_family in pictograms.items():
        if not of_family:
            raise ValueError(
                f"{Path(folder) / family} has no picture of an object: fetch them first (python -m examples.shapes "
                "pictograms OUT)."
            )
    return pictograms


def _read_family(folder: Path) -> Iterator[Pictogram]:
    for one in OBJECTS:
        file = folder / f"{one.name}.png"
        if file.exists():
            yield Pictogram(one, folder.name, _read_picture(file))


def _read_picture(file: Path) -> Image.Image:
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow has all three for damaged PNG
        raise ValueError(f"{file} could not be read as a picture ({error}): fetch or draw it again.") from error
    if picture.size != (RENDERED, RENDERED):
        width, height = picture.size
        raise ValueError(f"{file} has {width} x {height} pixels, expected {RENDERED} x {RENDERED}: resize it.")
    if picture.getbbox() is None:
        raise ValueError(f"{file} is transparent everywhere, expected a drawn object: draw it again, or remove it.")
    return picture


def certain_colour(picture: Image.Image) -> str | None:
    """Returns the colour that at least CERTAIN of a picture's opaque pixels have, or None."""
    pixels = np.asarray(picture.resize((16, 16), Image.Resampling.BOX)).reshape(-1, 4)
    names = [_colour_of(pixel[:3]) for pixel in pixels / 255 if pixel[3] > 0.8]
    return next((name for name in HUES if names and names.count(name) >= CERTAIN * len(names)), None)


def _colour_of(pixel: np.ndarray) -> str | None:
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    for name, (low, high, least_saturation, least_value) in HUES.items():
        if (hue * 360 - low) % 360 <= (high - low) % 360 and saturation >= least_saturation and value >= least_value:
            return name
    return None
