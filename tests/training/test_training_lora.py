"""LoRA on the small model teaches it a new kind of question."""

from commands import ROOT, here

from examples.shapes.evaluate import evaluate
from examples.shapes.generate import generate
from training.merge import merge

SHAPES = ROOT / "examples" / "shapes"
MODEL = SHAPES / "model"


def test_lora_teaches_a_new_kind_of_question(tmp_path):
    data = generate(tmp_path / "data", scenes=900, test_scenes=100, seed=7)
    command = [
        *("--config", SHAPES / "recipes" / "lora.yaml", "--model_name_or_path", MODEL),
        *("--data_path", data / "new-train.json", "--image_folder", data),
        *("--output_dir", tmp_path / "adapter", "--num_train_epochs", 4),  # few rows, often
    ]
    assert here("training", *command).returncode == 0
    taught = merge(tmp_path / "adapter", tmp_path / "merged")
    before, after = (evaluate(folder, data, new=True)["kinds"]["furthest left"] for folder in (MODEL, taught))
    rights = [sum(part["right"] for part in parts.values()) for parts in (before, after)]
    asked = sum(part["questions"] for part in after.values())
    assert rights[0] < 0.05 * asked and rights[1] > 0.5 * asked
