# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Draws the two pictures of a card: the method, with the numbers of a configuration, and an example to ask about."""

from PIL import Image, ImageDraw, ImageFont

from conversion.fusion import token_grid
from modeling_llava_stf import LlavaSTFConfig

SIZE = (1200, 430)
SMOOTHING = 3  # drawn this many times larger and then reduced, which smooths the edges
INK, PALE, LINES, PATCH, TOKEN = "#1f2937", "#6b7280", "#9ca3af", "#bfdbfe", "#fdba74"
TOP, SIDE = 92, 210  # position and size of the three grids


def draw_method(config: LlavaSTFConfig) -> Image.Image:
    """Draws patch grid, blocks, fused grid and tokens of `config` from left to right, 1200 x 430 pixels."""
    grid, window, taps = config.grid_size, config.fusion_window, config.taps
    tokens = token_grid(config)
    pen = _Pen(SIZE)
    pen.text((600, 30), f"One picture: {grid**2} patches in, {config.tokens_per_image} vision tokens out", 24)

    pen.grid((40, TOP), grid, PATCH)
    pen.caption(145, "vision tower", f"{grid} x {grid} patches", f"of {config.vision_config.patch_size} pixels")

    pen.arrow(262, 298)
    step = 112 / max(len(taps) - 1, 1)
    for index, tap in reversed(list(enumerate(taps))):  # the first lies on top
        pen.sheet((312 + index * step, TOP + SIDE - 118 - index * step * 0.8), str(tap))
    pen.caption(430, f"{len(taps)} blocks", "features of blocks", ", ".join(map(str, taps)))

    pen.arrow(566, 602)
    pen.grid((612, TOP), grid, PATCH)
    pen.mark((612, TOP), SIDE * window / grid)
    pen.caption(717, "Multi-Block Token Fusion", f"{len(taps)} blocks become one", f"{grid} x {grid} map")

    pen.arrow(836, 872)
    pen.grid((882, TOP), tokens, TOKEN)
    pen.mark((882, TOP), SIDE / tokens)
    pen.caption(
        987,
        "Spatial Token Fusion",
        f"{window} x {window} patches become one token",
        f"{tokens} x {tokens} = {config.tokens_per_image} tokens",
    )
    pen.arrow(1106, 1136)
    pen.text((1165, TOP + SIDE // 2), "LLM", 20)
    return pen.finish()


def draw_example() -> Image.Image:
    """Draws a red square, a blue circle and a green triangle on white, 336 pixels wide and high."""
    pen = _Pen((336, 336))
    pen.rectangle((30, 40, 140, 150), "#dc2626")
    pen.ellipse((186, 40, 306, 160), "#2563eb")
    pen.polygon([(168, 186), (88, 306), (248, 306)], "#16a34a")
    return pen.finish()


class _Pen:
    """Draws in pixels of the finished picture."""

    def __init__(self, size: tuple[int, int]):
        self.image = Image.new("RGB", (size[0] * SMOOTHING, size[1] * SMOOTHING), "white")
        self.draw = ImageDraw.Draw(self.image)

    def finish(self) -> Image.Image:
        return self.image.reduce(SMOOTHING)

    def text(self, place: tuple[int, int], text: str, size: int, colour: str = INK) -> None:
        x, y = place
        font = ImageFont.load_default(size * SMOOTHING)
        self.draw.text((x * SMOOTHING, y * SMOOTHING), text, colour, font, anchor="mm")

    def caption(self, x: int, title: str, *lines: str) -> None:
        self.text((x, TOP + SIDE + 32), title, 18)
        for index, line in enumerate(lines):
            self.text((x, TOP + SIDE + 60 + 24 * index), line, 15, PALE)

    def rectangle(self, box: tuple[float, float, float, float], fill: str | None, outline: str | None = None) -> None:
        self.draw.rectangle([side * SMOOTHING for side in box], fill, outline, SMOOTHING)

    def ellipse(self, box: tuple[int, int, int, int], fill: str) -> None:
        self.draw.ellipse([side * SMOOTHING for side in box], fill)

    def polygon(self, points: list[tuple[float, float]], fill: str, outline: str | None = None) -> None:
        self.draw.polygon([(x * SMOOTHING, y * SMOOTHING) for x, y in points], fill, outline, SMOOTHING)

    def grid(self, corner: tuple[int, int], cells: int, fill: str) -> None:
        """Draws a square of `cells` x `cells` cells."""
        x, y = corner
        self.rectangle((x, y, x + SIDE, y + SIDE), fill)
        for index in range(cells + 1):
            offset = SIDE * index / cells
            self.rectangle((x + offset, y, x + offset + 0.34, y + SIDE), None, LINES)
            self.rectangle((x, y + offset, x + SIDE, y + offset + 0.34), None, LINES)

    def mark(self, corner: tuple[int, int], side: float) -> None:
        """Frames the top left corner of a grid: the window that becomes the first token, and that token."""
        x, y = corner
        self.rectangle((x, y, x + side, y + side), TOKEN, INK)

    def sheet(self, corner: tuple[float, float], name: str) -> None:
        """Draws a feature map with the number of its block in the lower right corner."""
        x, y = corner
        self.rectangle((x, y, x + 118, y + 118), PATCH, PALE)
        self.text((round(x + 110), round(y + 108)), name, 11)

    def arrow(self, start: int, end: int) -> None:
        y = TOP + SIDE // 2
        self.rectangle((start, y - 1, end - 8, y + 1), INK)
        self.polygon([(end, y), (end - 12, y - 7), (end - 12, y + 7)], INK)
