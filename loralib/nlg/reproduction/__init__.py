"""The LoRA paper's pipeline in one call: data, training, decoding, scores, and a report.

    from loralib.nlg.reproduction import find_files, load_recipe, reproduce

    recipe = load_recipe("smollm2-135m", model="smollm2-135m")
    print(reproduce("e2e", recipe, find_files("e2e"), "reproduced"))

Each stage records what its result was made from (``stages/``). When the pipeline is called again, a stage whose
settings and inputs are unchanged is skipped, an interrupted one continues, and one that depends on a change is run
again.
"""

from __future__ import annotations

from .pipeline import reproduce
from .recipe import DATASETS, Recipe, choose_recipe, load_recipe, recipe_names, recipe_text
from .sources import SplitFiles, find_files

__all__ = [
    "DATASETS",
    "Recipe",
    "SplitFiles",
    "choose_recipe",
    "find_files",
    "load_recipe",
    "recipe_names",
    "recipe_text",
    "reproduce",
]
