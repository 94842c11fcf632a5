# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Makes the card's table of a training, from the settings and the state in its folder."""

import re
from pathlib import Path
from typing import Any

import yaml

from .results import is_number, read_object

RECIPE_FILE, TRAINER_STATE_FILE, CHECKPOINT_FILE = "recipe.yaml", "trainer_state.json", "training_run.json"


def read_training(folder: Path, recipe: str | Path | None = None) -> dict[str, str]:
    """Returns the lines of the table, from the recipe and the trainer's state; leaves out paths."""
    path = Path(recipe or folder / RECIPE_FILE)
    settings = _read_settings(path) if path.exists() else {}
    lines = _settings(settings)
    if (folder / TRAINER_STATE_FILE).exists():
        state = read_object(folder / TRAINER_STATE_FILE)
        lines |= _state(state)
        best = re.search(r"checkpoint-(\d+)$", str(state.get("best_model_checkpoint")))
        # A checkpoint within a run has the weights of its own step, and a file that the end of a run does not have.
        if settings.get("load_best_model_at_end") and best and not (folder / CHECKPOINT_FILE).exists():
            metric = settings.get("metric_for_best_model") or "loss"
            lines["weights"] = f"those of step {best[1]}, the best by {metric} in evaluation"
    return lines


def _read_settings(path: Path) -> dict[str, Any]:
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds a {type(recipe).__name__}, expected settings with names.")
    return recipe


def _settings(recipe: dict[str, Any]) -> dict[str, str]:
    return {
        f"`{name}`": f"`{_in_words(value)}`"
        for name, value in recipe.items()
        if value not in (None, "", [], {}) and "/" not in str(value)
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
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_in_words(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
