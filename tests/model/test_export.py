"""Vision tower and fusion as graphs for any number of pictures. ONNX runs in `make test-export`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import ConversionError
from examples.export import PACKAGES, Vision, compare, export, pictures, to_program

SHAPES = Path(__file__).parents[2] / "examples" / "shapes" / "model"


@torch.no_grad()
def test_a_program_of_torch_export_runs_with_any_number_of_pictures(model, capsys):
    vision = Vision(model).eval()
    program = to_program(vision, pictures(model, 2))
    compare(model, program.module(), "the program")
    assert "the program: largest difference" in capsys.readouterr().out
    with pytest.raises(ConversionError, match=r"gives \(1, 3, .* expected \(1, "):
        compare(model, lambda pixels: program.module()(pixels)[:, :3], "a part")
    vision.taps = vision.taps[::-1]  # a wrong order of the taps
    with pytest.raises(ConversionError, match="differs from the model by"):
        compare(model, vision, "another order")


@torch.no_grad()
def test_get_image_features_exports_for_a_fixed_number_of_pictures(model):
    """The docs say so; the lists that it returns and its passes fix the number."""

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model.model

        def forward(self, pixel_values):
            return torch.stack(self.model.get_image_features(pixel_values, return_dict=True).pooler_output)

    example = pictures(model, 2)
    fixed = torch.export.export(Features(), (example,)).module()
    assert torch.equal(fixed(example), Features()(example))
    with pytest.raises(Exception, match="pictures"):
        to_program(Features(), example)


def test_both_files(tmp_path):
    for package in PACKAGES:
        pytest.importorskip(package)
    out = export(SHAPES, tmp_path / "out")
    assert sorted(file.name for file in out.iterdir()) == ["vision.onnx", "vision.pt2"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_the_packages_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConversionError, match="pip install onnx onnxscript onnxruntime"):
        export(SHAPES, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path, monkeypatch):
    """transformers goes on with random numbers, which the files would have, too."""
    folder = shutil.copytree(SHAPES, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.multi_modal_projector.spatial_fusion.linear_2.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("examples.export.PACKAGES", ())
    with pytest.raises(ValueError, match="lacks 1 weights, among them 'model.multi_modal_projector.spatial_fusion.lin"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_user_s_mistake_is_one_line(tmp_path):
    script = Path(__file__).parents[2] / "examples" / "export.py"
    (tmp_path / "mine").touch()
    done = subprocess.run(
        [sys.executable, script, SHAPES, tmp_path],
        env={"PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "is not empty" in done.stderr
