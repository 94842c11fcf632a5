# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What a card says, gathered from the files of a folder and from its publisher, and the card itself."""

import json
import math
import re
import shutil
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from packaging.requirements import Requirement
from tqdm import tqdm

from conversion.checkpoints.folders import name_auto_class
from conversion.checkpoints.weights import Weights, read_file, read_folder
from conversion.fusion import token_grid
from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from modeling_llava_stf.modeling_llava_stf import NOT_QUANTISED

from .picture import draw_example, draw_method
from .results import HUB_ID, TASK, Evaluation, Speed, is_number, model_index, read_evaluation, read_object, read_speed

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).parent / "template.md.jinja"
CARD_FILE = "README.md"
METHOD_PICTURE, EXAMPLE_PICTURE = "method.png", "example.png"
LICENCES = ("LICENSE", "NOTICE")
ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
RECIPE_FILE = "recipe.yaml"
FIRST_TAG = "v1"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the publisher says of a model, because no file does. Empty: unknown, and left out of the card."""

    license: str  # the Hub's identifier, such as cc-by-nc-4.0
    base_model: Sequence[str] = ()  # Hub ids
    base_license: str = ""
    datasets: Sequence[str] = ()
    language: Sequence[str] = ()
    note: str = ""  # printed on top


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that a card says. What is empty or None is left out of it."""

    repo_id: str
    tag: str  # the snippet's `revision`, which `publish` puts on the commit
    facts: Facts
    processor: LlavaSTFProcessor
    tokens_per_image: int
    parameters: int
    dtypes: str
    size: str  # of the weights
    training: dict[str, str]
    config: LlavaSTFConfig | None = None  # of a whole model
    base: str = ""  # of an adapter
    base_revision: str = ""
    quantisation: str = ""
    converted: bool = False
    evaluations: tuple[Evaluation, ...] = ()
    speeds: tuple[Speed, ...] = ()
    printed: str = ""  # by the snippet
    printed_on: str = ""

    @property
    def name(self) -> str:
        return self.repo_id.split("/")[1]

    @property
    def base_model(self) -> list[str]:
        return [self.base] if self.base else list(self.facts.base_model)

    def is_of_base(self, evaluation: Evaluation) -> bool:
        """Whether somebody evaluated what this model was made from, and its weights are others: not its own results."""
        changed = self.base or self.quantisation or (self.training and not self.converted)
        return bool(changed) and evaluation.evaluated in {*self.base_model, *self.facts.base_model}

    @property
    def metadata(self) -> ModelCardData:
        """The YAML head."""
        relation = "adapter" if self.base else "quantized" if self.quantisation else None
        results = model_index(evaluation for evaluation in self.evaluations if not self.is_of_base(evaluation))
        return ModelCardData(
            license=self.facts.license,
            base_model=self.base_model or None,
            base_model_relation=relation,
            datasets=list(self.facts.datasets) or None,
            language=list(self.facts.language) or None,
            library_name="peft" if self.base else "transformers",
            pipeline_tag=TASK,
            tags=["llava_stf", "vision-language", "token-fusion", "custom_code", *(["lora"] if self.base else [])],
            model_name=self.name if results else None,
            eval_results=results or None,
        )

    def render(self) -> str:
        """The whole README.md."""
        card = ModelCard.from_template(
            self.metadata,
            template_path=str(TEMPLATE),
            card=self,
            versions=pinned_versions(),
            method=METHOD_PICTURE,
            example=EXAMPLE_PICTURE,
            side=token_grid(self.config) if self.config else None,
            not_quantised=json.dumps(NOT_QUANTISED),
        )
        return f"{card}\n"


def gather(
    folder: Path,
    repo_id: str,
    facts: Facts,
    tag: str = FIRST_TAG,
    results: Iterable[str | Path] = (),
    speeds: Iterable[str | Path] = (),
    recipe: str | Path | None = None,
) -> Card:
    """Reads what a folder says about itself.

    Args:
        folder: a checkpoint of `modeling_llava_stf`, or a PEFT adapter of one with its processor.
        repo_id: where it will be published, `USER/NAME`.
        facts: what its files do not say.
        tag: the revision that the snippet asks for.
        results: evaluation files, see [`read_evaluation`].
        speeds: measurements, see [`read_speed`].
        recipe: the settings that the weights were trained with, as YAML; by default `recipe.yaml` in the folder.

    Raises:
        ValueError: if the folder is neither, or a file in it or of the results is damaged or incomplete.
    """
    for name in (repo_id, *facts.base_model):
        if not HUB_ID.fullmatch(name):
            raise ValueError(f"{name!r} is no id of a Hub repository: expected USER/NAME.")
    if recipe is not None and not Path(recipe).is_file():
        raise ValueError(f"There is no recipe {recipe}.")
    processor = LlavaSTFProcessor.from_pretrained(folder)
    crop = processor.image_processor.crop_size
    about: dict[str, Any] = {"tokens_per_image": processor.num_image_tokens(crop["height"], crop["width"])}
    if is_adapter(folder):
        settings = read_object(folder / ADAPTER_CONFIG_FILE)
        base = settings.get("base_model_name_or_path") or ""
        if not HUB_ID.fullmatch(base):
            raise ValueError(
                f"The adapter's base is {base!r}, which others do not have: give its Hub id (--base USER/NAME)."
            )
        weights = read_file(folder / ADAPTER_WEIGHTS_FILE)
        about |= {"base": base, "base_revision": settings.get("revision") or "main"}
    else:
        config = LlavaSTFConfig.from_pretrained(folder)
        weights = read_folder(folder)
        quantisation = getattr(config, "quantization_config", None) or {}
        about |= {"config": config, "quantisation": quantisation.get("quant_method", "")}
    return Card(
        repo_id=repo_id,
        tag=tag,
        facts=facts,
        processor=processor,
        parameters=count_parameters(weights, about),
        dtypes=" and ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})),
        size=tqdm.format_sizeof(sum(weight.nbytes for weight in weights.values()), "B"),
        converted=(folder / "original_config.json").exists(),
        training=read_training(folder, recipe),
        evaluations=tuple(
            read_evaluation(Path(path), {repo_id, str(folder.resolve())}, facts.base_model) for path in results
        ),
        speeds=tuple(read_speed(Path(path)) for path in speeds),
        **about,
    )


def count_parameters(weights: Weights, about: dict[str, Any]) -> int:
    """Of the model or the adapter; quantised weights are packed, so that the model itself is counted."""
    if about.get("quantisation"):
        with torch.device("meta"):
            return LlavaSTFForConditionalGeneration(about["config"]).num_parameters()
    return sum(math.prod(weight.shape) for weight in weights.values())


def write_card(folder: Path, card: Card) -> None:
    """Writes the card and what belongs to it: its pictures, and the licence files where there are none."""
    text = card.render()  # first, because it may fail
    if card.config is not None:
        draw_method(card.config).save(folder / METHOD_PICTURE, optimize=True)
    draw_example().save(folder / EXAMPLE_PICTURE, optimize=True)
    for name in LICENCES:
        if not (folder / name).exists():
            shutil.copyfile(ROOT / name, folder / name)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def name_base(folder: Path, base: str, revision: str) -> None:
    """Writes the Hub id and the revision of its base into an adapter, in place of the path where it was trained."""
    if not HUB_ID.fullmatch(base):
        raise ValueError(f"{base!r} is no id of a Hub repository: an adapter's base is expected as USER/NAME.")
    settings = read_object(folder / ADAPTER_CONFIG_FILE)
    settings |= {"base_model_name_or_path": base, "revision": revision}
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    name_auto_class(folder)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter; raises a `ValueError` if it holds no model either."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    if (folder / ADAPTER_CONFIG_FILE).exists():
        return True
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is no checkpoint: it has neither a config.json nor an {ADAPTER_CONFIG_FILE}.")
    return False


def weights_of(folder: Path) -> Weights:
    """The weights of a model or of an adapter, still on disk."""
    return read_file(folder / ADAPTER_WEIGHTS_FILE) if is_adapter(folder) else read_folder(folder)


def snippet_of(readme: str) -> tuple[str, str]:
    """The first Python block of a card, and the text block right behind it: what it prints, or nothing."""
    found = re.search(r"```python\n(.*?)```(?:\n\n[^\n]+\n\n```text\n(.*?)\n?```)?", readme, re.DOTALL)
    if found is None:
        raise ValueError(f"The card has no snippet: {CARD_FILE} has no Python block.")
    return found[1], found[2] or ""


def named_in(snippet: str) -> tuple[str, str]:
    """The repository and the revision that a card's snippet asks for."""
    found = re.search(r'^repository, revision = "([^"]+)", "([^"]+)"$', snippet, re.MULTILINE)
    if found is None:
        raise ValueError('The snippet of the card has no line `repository, revision = "USER/NAME", "TAG"`.')
    return found[1], found[2]


def read_training(folder: Path, recipe: str | Path | None = None) -> dict[str, str]:
    """The recipe and the state that a run left in its folder, as lines of a table; paths are left out."""
    path = Path(recipe or folder / RECIPE_FILE)
    lines = _settings(path) if path.exists() else {}
    if (folder / "trainer_state.json").exists():
        lines |= _state(read_object(folder / "trainer_state.json"))
    return lines


def _settings(path: Path) -> dict[str, str]:
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds a {type(recipe).__name__}, expected settings with names.")
    return {
        f"`{name}`": f"`{_in_words(value)}`"
        for name, value in recipe.items()
        if value not in (None, "", [], {}) and not isinstance(value, dict) and "/" not in str(value)
    }


def _state(state: dict[str, Any]) -> dict[str, str]:
    history = [entry for entry in state.get("log_history", []) if is_number(entry.get("loss"))]
    rates = [entry["learning_rate"] for entry in history if is_number(entry.get("learning_rate"))]
    steps = state.get("global_step")
    known = {
        "steps": f"{steps} of {state['max_steps']}" if steps and state.get("max_steps") else "",
        "epochs": _in_words(round(state["epoch"], 3)) if is_number(state.get("epoch")) else "",
        "batch size of a device": _in_words(state.get("train_batch_size") or ""),
        "highest learning rate": _in_words(max(rates)) if rates else "",
        "loss": f"{history[0]['loss']:.4g} at step {history[0]['step']}, "
        f"{history[-1]['loss']:.4g} at step {history[-1]['step']}"
        if history
        else "",
    }
    return {name: value for name, value in known.items() if value}


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def pinned_versions() -> dict[str, str]:
    """The versions that the tests run with, read from `constraints.txt` and, for the oldest, `pyproject.toml`."""
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if "==" in line and not line.startswith("#"):
            name, _, version = line.split("#")[0].strip().partition("==")
            pinned[name] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = next(line for line in project["dependencies"] if line.startswith("transformers"))
    oldest = next(bound.version for bound in Requirement(wanted).specifier if bound.operator == ">=")
    versions = {name: pinned[name] for name in ("torch", "huggingface-hub", "peft")}
    return {"transformers": f"{oldest} and {pinned['transformers']}", **versions, "range": wanted}
