"""Whether a file gives the same answer in vLLM and in `generate`: transparency, EXIF, depths and layouts."""

import io
import math

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


# vLLM 0.32 converts these files before our processor sees them, in another way than we do, and has no option not to:
# it paints transparent pixels on white, as our `alpha_background="white"` does, and leaves 16 bits and floats to PIL,
# which clips and truncates them, where we keep the upper 8 bits and round.
ON_WHITE = {"RGBA, half transparent", "RGBA, half transparent, WebP", "LA", "palette, transparent colour"}
BY_PIL = {"16 bits", "float TIFF"}


@pytest.mark.parametrize("name", FILES)
def test_files_as_vllm_reads_them(eager, name, reference, figures):
    """Most files give the same answer; of the others it is known what vLLM makes of them."""
    file = FILES[name]()
    served = eager.ask(message(QUESTION, file), logprobs=True)
    plain = difference(served, reference()(message(QUESTION, file)))
    figures[f"file: {name}"] = "another answer" if plain == math.inf else f"log-probabilities within {plain:.1e}"
    assert (plain < 1e-4) == (name not in ON_WHITE | BY_PIL)
    if name in ON_WHITE:
        assert difference(served, reference()(message(QUESTION, file), alpha_background="white")) < 1e-4
    if name in BY_PIL:
        by_pil = Image.open(io.BytesIO(file)).convert("RGB")
        assert difference(served, reference()(message(QUESTION, by_pil))) < 1e-4
