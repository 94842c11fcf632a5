# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Gathers what a card says, from the files of a folder and from its publisher, and renders the card."""

import json
import math
import re
import shutil
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from packaging.requirements import Requirement
from tqdm import tqdm

from conversion.checkpoints.folders import QUANTISATION_FILE, TOKEN_BUDGETS, name_auto_class
from conversion.checkpoints.weights import Weights, read_file, read_folder
from conversion.fusion import token_grid
from modeling_llava_stf import LlavaSTFConfig, LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from modeling_llava_stf.modeling_llava_stf import NOT_QUANTISED

from .picture import draw_example, draw_method
from .results import HUB_ID, TASK, Evaluation, Speed, model_index, read_evaluation, read_object, read_speed
from .training_table import read_training

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).parent / "template.md.jinja"
CARD_FILE = "README.md"
METHOD_PICTURE, EXAMPLE_PICTURE = "method.png", "example.png"
LICENCES = ("LICENSE", "NOTICE")
ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FIRST_TAG = "v1"
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")  # as the Hub spells them, such as cc-by-nc-4.0
DATASET_ID = re.compile(r"([\w.-]+/)?[\w.-]+")
# What the Hub reads as a language: a code of ISO 639, perhaps with script or region, or one of two words.
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
# What loads weights that were quantised by each of the ways that the card shows.
QUANTISERS = {
    "bitsandbytes": "accelerate bitsandbytes",  # transformers asks for both
    "torchao": "torchao",
    "quanto": "accelerate optimum-quanto",
    "compressed-tensors": "compressed-tensors",
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Holds what only the publisher knows about a model. The card leaves out what is empty."""

    license: str  # the Hub's identifier, such as cc-by-nc-4.0
    base_model: Sequence[str] = ()  # Hub ids
    base_license: str = ""
    datasets: Sequence[str] = ()
    language: Sequence[str] = ()
    note: str = ""  # printed on top


@dataclass(frozen=True, kw_only=True)
class Card:
    """Holds all that a card says. The card leaves out what is empty or None."""

    repo_id: str
    tag: str  # the snippet's `revision`; `publish` tags the commit with it
    facts: Facts
    processor: LlavaSTFProcessor
    tokens_per_image: int
    token_budgets: list[int]  # that the weights were trained for
    parameters: int
    dtypes: str
    size: str  # size of the weights
    training: dict[str, str]
    config: LlavaSTFConfig | None = None  # for a whole model
    base: str = ""  # for an adapter
    base_revision: str = ""
    adapter: str = ""  # its kind, by PEFT's name, such as lora
    quantisation: str = ""
    quantised: dict[str, Any] = field(default_factory=dict)  # how, by `python -m conversion quantise`
    converted: bool = False
    evaluations: tuple[Evaluation, ...] = ()
    speeds: tuple[Speed, ...] = ()
    printed: str = ""  # the snippet's output
    printed_on: str = ""

    @property
    def name(self) -> str:
        return self.repo_id.split("/")[1]

    @property
    def packages(self) -> list[str]:
        """What the snippet needs beside transformers, torch and pillow."""
        return [*(["peft"] if self.base else []), *filter(None, [QUANTISERS.get(self.quantisation)])]

    @property
    def base_model(self) -> list[str]:
        if self.base:
            return [self.base]
        return list(self.facts.base_model) or list(filter(None, [self.quantised.get("base_model")]))

    def is_of_base(self, evaluation: Evaluation) -> bool:
        """Returns whether these results are those of the base, whose weights differ from this model's."""
        changed = self.base or self.quantisation or (self.training and not self.converted)
        return bool(changed) and evaluation.evaluated in {*self.base_model, *self.facts.base_model}

    @property
    def metadata(self) -> ModelCardData:
        """Returns the YAML head."""
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
            tags=["llava_stf", "vision-language", "token-fusion", "custom_code", *filter(None, [self.adapter])],
            model_name=self.name if results else None,
            eval_results=results or None,
        )

    def render(self) -> str:
        """Returns the text of README.md."""
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
    """Reads the facts of a card from a folder.

    Args:
        folder: a checkpoint of `modeling_llava_stf`, or a PEFT adapter of one with its processor.
        repo_id: where it will be published, `USER/NAME`.
        facts: what no file contains.
        tag: the revision that the snippet loads.
        results: evaluation files (see [`read_evaluation`]).
        speeds: speed results (see [`read_speed`]).
        recipe: the settings that the weights were trained with, as YAML; by default `recipe.yaml` in the folder.

    Raises:
        ValueError: if the folder is neither, one of its files or results is damaged or incomplete, or the Hub would not
            read a fact as it is meant.
    """
    _check_facts(repo_id, facts)
    if recipe is not None and not Path(recipe).is_file():
        raise ValueError(f"There is no recipe {recipe}.")
    processor = LlavaSTFProcessor.from_pretrained(folder)
    about = _about_adapter(folder) if is_adapter(folder) else _about_model(folder)
    weights = weights_of(folder)
    return Card(
        repo_id=repo_id,
        tag=tag,
        facts=facts,
        processor=processor,
        tokens_per_image=processor.tokens_per_image,
        token_budgets=about.pop("token_budgets") or processor.allowed_token_budgets[:1],
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


def _check_facts(repo_id: str, facts: Facts) -> None:
    """Raises a `ValueError` for a fact that the Hub reads otherwise than it is meant."""
    for name in ("base_model", "datasets", "language"):
        if isinstance(getattr(facts, name), str):
            raise ValueError(f"`{name}` is the text {getattr(facts, name)!r}: expected a list of texts.")
    if facts.license and not LICENCE.fullmatch(facts.license):
        raise ValueError(f"{facts.license!r} is no licence of the Hub: expected one of its identifiers, such as mit.")
    for name in (repo_id, *facts.base_model):
        if not HUB_ID.fullmatch(name):
            raise ValueError(f"{name!r} is no id of a Hub repository: expected USER/NAME.")
    for name in facts.datasets:
        if not DATASET_ID.fullmatch(name):
            raise ValueError(f"{name!r} is no id of a dataset on the Hub: expected USER/NAME.")
    for code in facts.language:
        if not LANGUAGE.fullmatch(code):
            raise ValueError(f"{code!r} is no language code of the Hub: expected one such as en or zh-TW for each.")


def _about_adapter(folder: Path) -> dict[str, Any]:
    base, base_revision = base_of(folder)
    if not HUB_ID.fullmatch(base):
        raise ValueError(
            f"The adapter's base is {base!r}, which others do not have: give its Hub id (--base USER/NAME)."
        )
    settings = read_object(folder / ADAPTER_CONFIG_FILE)
    trained, kind = settings.get("auto_mapping") or {}, str(settings.get("peft_type") or "").lower()
    return {
        "base": base,
        "base_revision": base_revision,
        "adapter": kind,
        "token_budgets": trained.get(TOKEN_BUDGETS),
    }


def _about_model(folder: Path) -> dict[str, Any]:
    config = LlavaSTFConfig.from_pretrained(folder)
    quantisation = getattr(config, "quantization_config", None) or {}
    made = folder / QUANTISATION_FILE
    return {
        "config": config,
        "token_budgets": config.token_budgets,
        "quantisation": quantisation.get("quant_method", ""),
        "quantised": read_object(made) if made.exists() else {},
    }


def count_parameters(weights: Weights, about: dict[str, Any]) -> int:
    """Counts the parameters of a model or adapter. Quantised weights are packed, so they are counted in the model."""
    if about.get("quantisation"):
        with torch.device("meta"):
            return LlavaSTFForConditionalGeneration(about["config"]).num_parameters()
    return sum(math.prod(weight.shape) for weight in weights.values())


def write_card(folder: Path, card: Card) -> None:
    """Writes the card, its pictures, and the licence files. An example picture and licences that are there stay."""
    text = card.render()  # comes first, because it may fail
    if card.config is not None:
        draw_method(card.config).save(folder / METHOD_PICTURE, optimize=True)
    if not (folder / EXAMPLE_PICTURE).exists():
        draw_example().save(folder / EXAMPLE_PICTURE, optimize=True)
    for name in LICENCES:
        if not (folder / name).exists():
            shutil.copyfile(ROOT / name, folder / name)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def name_base(folder: Path, base: str, revision: str) -> None:
    """Writes Hub id and revision of the base into an adapter, in place of the local path from its training."""
    if not HUB_ID.fullmatch(base):
        raise ValueError(f"{base!r} is no id of a Hub repository: an adapter's base is expected as USER/NAME.")
    settings = read_object(folder / ADAPTER_CONFIG_FILE)
    settings |= {"base_model_name_or_path": base, "revision": revision}
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    name_auto_class(folder)


def base_of(folder: Path) -> tuple[str, str]:
    """Returns the base of an adapter and its revision; both are empty for a whole model."""
    if not is_adapter(folder):
        return "", ""
    settings = read_object(folder / ADAPTER_CONFIG_FILE)
    return settings.get("base_model_name_or_path") or "", settings.get("revision") or "main"


def is_adapter(folder: Path) -> bool:
    """Returns whether the folder holds a PEFT adapter; raises a `ValueError` if it holds no model either."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    if (folder / ADAPTER_CONFIG_FILE).exists():
        return True
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is no checkpoint: it has neither a config.json nor an {ADAPTER_CONFIG_FILE}.")
    return False


def weights_of(folder: Path) -> Weights:
    """Returns the weights of a model or an adapter without loading them."""
    return read_file(folder / ADAPTER_WEIGHTS_FILE) if is_adapter(folder) else read_folder(folder)


def pinned_versions() -> dict[str, str]:
    """Returns the tested versions from `constraints.txt`; `pyproject.toml` gives the oldest transformers."""
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
