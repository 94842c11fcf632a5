"""Writes a drawing as photos that lie on their side, and as pictures on nothing."""

from pathlib import Path

from PIL import ExifTags, Image


def save_photos(drawing: Image.Image, folder: Path) -> None:
    """Writes `lying.png`, which EXIF turns to `upright.png`, `as_it_lies.png` without EXIF, and two on nothing."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    drawing.save(folder / "lying.png", exif=exif)
    drawing.save(folder / "as_it_lies.png")
    drawing.rotate(-90).save(folder / "upright.png")
    nothing = drawing.convert("RGBA")
    nothing.putalpha(0)
    nothing.save(folder / "nothing.png")
    Image.new("RGB", drawing.size, "white").save(folder / "white.png")
