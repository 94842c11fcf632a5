"""Scenes of the small model's test set, with the committed sample of objects."""

from random import Random

from PIL import Image

from examples.shapes.pictograms import SAMPLE, read_pictograms
from examples.shapes.scenes import Scene, draw_picture, draw_scene

SAMPLES = read_pictograms(SAMPLE)


def drawn(rng: Random) -> tuple[Scene, Image.Image]:
    scene = draw_scene(SAMPLES, "test", rng)
    return scene, draw_picture(scene, SAMPLES, rng)
