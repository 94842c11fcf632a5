"""Whether a file gives the same answer in vLLM and in `generate`: transparency, EXIF, depths and layouts."""

import numpy as np
import pytest
from PIL import Image
from prompts import difference, drawing, encoded, message

pytestmark = pytest.mark.serving

QUESTION = "Describe the picture."


def see_through():
    """A drawing whose alpha falls from left to right."""
    picture = drawing(11)[0].convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").rotate(90).resize(picture.size))
    return picture


def palette_with_a_hole():
    picture = drawing(11)[0].quantize(16)
    return encoded(picture, transparency=picture.getpixel((0, 0)))


def sixteen_bits():
    return encoded(Image.fromarray(np.asarray(drawing(11)[0].convert("L")).astype(np.uint16) * 257))


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(drawing(11, (96, 60))[0], "JPEG", exif=exif, quality=95)


FILES = {
    "RGBA, half transparent": lambda: encoded(see_through()),
    "RGBA, half transparent, WebP": lambda: encoded(see_through(), "WEBP", lossless=True),
    "LA": lambda: encoded(see_through().convert("LA")),
    "palette, transparent colour": palette_with_a_hole,
    "RGB, transparent colour": lambda: encoded(drawing(11)[0], transparency=drawing(11)[0].getpixel((0, 0))),
    "16 bits": sixteen_bits,
    "float TIFF": lambda: encoded(drawing(11)[0].convert("F"), "TIFF"),
    "grey": lambda: encoded(drawing(11)[0].convert("L")),
    "1 bit": lambda: encoded(drawing(11)[0].convert("1")),
    "CMYK": lambda: encoded(drawing(11)[0].convert("CMYK"), "JPEG"),
    **{f"EXIF orientation {number}": lambda number=number: turned(number) for number in range(1, 9)},
}


# What vLLM 0.32 makes of a file before our processor sees it, if it is other than in `generate`: it paints transparent
# pixels on white, as our `alpha_background="white"` does; it clips 16 bits to 255, which nothing of ours repeats; it
# drops the fractions of floats, where we round.
ON_WHITE = {"RGBA, half transparent", "RGBA, half transparent, WebP", "LA", "palette, transparent colour"}
CLIPPED = {"16 bits", "float TIFF"}


@pytest.mark.parametrize("name", FILES)
def test_files_as_vllm_reads_them(eager, name, reference, figures):
    """Most files give the same answer without an option of vLLM."""
    messages = message(QUESTION, FILES[name]())
    served = eager.ask(messages, logprobs=True)
    plain = difference(served, reference()(messages))
    figures[f"file, default: {name}"] = f"{plain:.1e}"
    assert (plain < 1e-4) == (name not in ON_WHITE | CLIPPED)
    if name in ON_WHITE:
        assert difference(served, reference()(messages, alpha_background="white")) < 1e-4
