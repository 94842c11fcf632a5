# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""From the original trainer's files to a Hub folder of `modeling_llava_stf`, and the names back.

python -m conversion --help
"""

from .back import convert_back
from .convert import convert
from .keys import ConversionError, to_hub, to_original
from .quantise import quantise

__all__ = ["ConversionError", "convert", "convert_back", "quantise", "to_hub", "to_original"]
