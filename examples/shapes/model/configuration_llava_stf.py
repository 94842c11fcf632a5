# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Configures LLaVA-STF: extends the stock LLaVA configuration by the numbers that the paper adds, and token budgets."""

from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from packaging.specifiers import SpecifierSet
from transformers import AutoConfig, AutoModelForCausalLM, LlavaConfig
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils import logging

logger = logging.get_logger(__name__)

# This is the range of pyproject.toml; a user of `trust_remote_code` does not have that file.
SUPPORTED_TRANSFORMERS = ">=5.16.1,<5.25"
if not SpecifierSet(SUPPORTED_TRANSFORMERS).contains(transformers.__version__, prereleases=True):
    logger.warning_once(
        f"This is transformers {transformers.__version__}, but LLaVA-STF is tested with {SUPPORTED_TRANSFORMERS} only. "
        f"If something fails or answers look wrong: pip install 'transformers{SUPPORTED_TRANSFORMERS}'"
    )

# Every checkpoint contains its own code, so the references never name another repository.
AUTO_MAP = {
    "AutoConfig": "configuration_llava_stf.LlavaSTFConfig",
    "AutoModel": "modeling_llava_stf.LlavaSTFModel",
    "AutoModelForPreTraining": "modeling_llava_stf.LlavaSTFForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_llava_stf.LlavaSTFForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_llava_stf.LlavaSTFForConditionalGeneration",
}
FUSION_FIELDS = (
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "fusion_window",
    "block_fusion_hidden_size",
    "spatial_fusion_hidden_size",
    "token_budgets",
)


def allowed_token_budgets(rows: int, columns: int) -> list[int]:
    """Returns the counts that `rows` x `columns` tokens can be averaged to, in equal square windows, largest first."""
    sides = range(1, min(rows, columns) + 1)
    return [rows * columns // side**2 for side in sides if rows % side == columns % side == 0]


@strict
class LlavaSTFConfig(LlavaConfig):
    r"""
    Configures a LLaVA-STF model (arXiv 2506.07138). The defaults are those of the released 7B model.

    The fields of [`LlavaConfig`] keep their names and meaning. `image_seq_length` is derived, and
    `vision_feature_layer` holds the taps of Multi-Block Token Fusion.

    Args:
        vision_feature_layer (`list[int]`, defaults to `[23, 21, 18, 15, 12, 9, 6, 3]`):
            The taps, in the order in which their channels are concatenated: indices into the tower's hidden states,
            0 being the embeddings. A negative index counts from the end of the tower that this config describes and is
            stored as the absolute index, because a tower may be stored without the layers behind its last tap.
        fusion_window (`int`, defaults to 2):
            Side k of the window of Spatial Token Fusion: k x k patches become one token.
        block_fusion_hidden_size (`int`, *optional*):
            Hidden width of Multi-Block Token Fusion; `None` is the paper's 4C, C being the tower's hidden size.
        spatial_fusion_hidden_size (`int`, *optional*):
            Hidden width of Spatial Token Fusion; `None` is the paper's 16C.
        token_budgets (`list[int]`, *optional*):
            The numbers of tokens for one picture that the checkpoint was trained for; `None` is the full number only,
            as in the paper. Each must be one of `allowed_token_budgets`. Others can be asked for, with a warning.

    Raises:
        ValueError: if the window does not divide the patch grid, if a tap does not exist in the tower, if
            `vision_feature_select_strategy` would keep the class token, or if a token budget is not allowed.
    """

    model_type = "llava_stf"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    vision_feature_layer: int | list[int] | tuple[int, ...] = (23, 21, 18, 15, 12, 9, 6, 3)
    fusion_window: int = 2
    block_fusion_hidden_size: int | None = None
    spatial_fusion_hidden_size: int | None = None
    token_budgets: list[int] | tuple[int, ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)
        self.vision_feature_layer = self.taps
        self.check_fusion()
        if self.token_budgets is not None:
            self.token_budgets = sorted({*self.token_budgets}, reverse=True)
        self.image_seq_length = self.tokens_per_image

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds a config (see [`PreTrainedConfig.from_dict`]); raises a `ValueError` for that of another model."""
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"This is the configuration of a `{found}` model, expected `{cls.model_type}`. The weights of another "
                "model have no fusion modules: convert the checkpoint first (python -m conversion SOURCE DESTINATION)."
            )
        # The constructor gets the overrides and checks them; transformers would set them afterwards, unchecked.
        overrides = {name: kwargs.pop(name) for name in FUSION_FIELDS if name in kwargs}
        loaded = super().from_dict({**config_dict, **overrides}, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.check_fusion()  # again, for overrides of `vision_config`
        config.image_seq_length = config.tokens_per_image
        return loaded

    @property
    def grid_size(self) -> int:
        """Returns the side of the tower's patch grid (24 for CLIP ViT-L/14-336)."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def tokens_per_image(self) -> int:
        """Returns the tokens of one image or video frame in the language model (144 for the released model)."""
        return (self.grid_size // self.fusion_window) ** 2

    @property
    def allowed_token_budgets(self) -> list[int]:
        """Returns the numbers of tokens that a picture can have, largest first (144, 36, 16, 9, 4, 1 at 336 pixels)."""
        side = self.grid_size // self.fusion_window
        return allowed_token_budgets(side, side)

    @property
    def fusion_widths(self) -> tuple[int, int]:
        """Returns the hidden widths of Multi-Block and Spatial Token Fusion; the defaults are 4C and 16C (paper)."""
        width = self.vision_config.hidden_size
        return self.block_fusion_hidden_size or 4 * width, self.spatial_fusion_hidden_size or 16 * width

    @property
    def taps(self) -> list[int]:
        """Returns `vision_feature_layer` as absolute indices into the tower's hidden states, in fusion order."""
        layers = self.vision_feature_layer
        taps = [layers] if isinstance(layers, int) else list(layers)
        depth = self.vision_config.num_hidden_layers
        missing = [tap for tap in taps if not -depth - 1 <= tap <= depth]
        if missing or not taps:
            raise ValueError(
                f"`vision_feature_layer` is {taps}, but a vision tower of {depth} layers has the hidden states 0 to "
                f"{depth}. Choose at least one tap, all of them in that range"
                + (f"; out of range: {missing}." if missing else ".")
            )
        return [tap % (depth + 1) for tap in taps]

    def check_fusion(self) -> None:
        """Raises a `ValueError` if a field does not fit the tower; building a model calls it again."""
        if self.vision_config.patch_size < 1 or self.vision_config.model_type != "clip_vision_model":
            raise ValueError(
                f"`vision_config` is a `{self.vision_config.model_type}` with patches of "
                f"{self.vision_config.patch_size} pixels, expected a `clip_vision_model` with patches of at least one."
            )
        if self.projector_hidden_act not in ACT2FN:
            raise ValueError(f"`projector_hidden_act` is {self.projector_hidden_act!r}, expected one of {[*ACT2FN]}.")
        if self.fusion_window < 1 or self.grid_size % self.fusion_window:
            raise ValueError(
                f"`fusion_window` is {self.fusion_window}, but the vision tower has a grid of {self.grid_size} x "
                f"{self.grid_size} patches ({self.vision_config.image_size} pixels, patches of "
                f"{self.vision_config.patch_size}). Choose a window that divides {self.grid_size}: with another one "
                "the last rows and columns would be lost."
            )
        if self.vision_feature_select_strategy != "default":
            raise ValueError(
                f"`vision_feature_select_strategy` is {self.vision_feature_select_strategy!r}, expected 'default': "
                "the class token has no place in a window of patches."
            )
        budgets, allowed = self.token_budgets, self.allowed_token_budgets
        if budgets is not None and not (budgets and {*budgets} <= {*allowed}):
            raise ValueError(
                f"`token_budgets` is {budgets}, expected some of {allowed}, or None if the checkpoint was trained for "
                f"{allowed[0]} tokens only."
            )


class NotACausalLM:
    """Is registered with `AutoModelForCausalLM`, to name the Auto class to use instead."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> None:
        """Raises a `ValueError` that names the right Auto class; so does `from_config`."""
        raise ValueError(
            "LLaVA-STF answers about pictures and is not a plain causal language model: load it with "
            "`AutoModelForImageTextToText`, its inputs with `AutoProcessor`, and its vision tower and language model "
            "without a head with `AutoModel`."
        )

    _from_config = from_pretrained


# This runs here because `trust_remote_code` imports this file before it looks for a model.
AutoModelForCausalLM.register(LlavaSTFConfig, NotACausalLM, exist_ok=True)
# `transformers serve` (seen in 5.16 to 5.24) finds a multimodal model only by its name in this dictionary, which no
# `register` fills. Remove this when it asks the Auto classes.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[LlavaSTFConfig.model_type] = "LlavaSTFForConditionalGeneration"

__all__ = ["LlavaSTFConfig"]
