"""What was asked of the optimizer, fully resolved: every lossy choice, its TOML form, and how many tokens are left."""

from vitfold.recipe.document import (
    Recipe,
    check_keys,
    check_merge,
    check_prune,
    check_quant,
    check_registers,
    parse_recipe,
    recipe_from_dict,
)
from vitfold.recipe.merging import RULES, MergeRecipe, MergeRule, Order, check_mergeable, largest_r, tokens_per_block
from vitfold.recipe.pruning import HEAD_STEP, WIDTH_STEP, PruneRecipe
from vitfold.recipe.quantization import FLOAT, WIDE, Format, QuantRecipe, bits_from_scheme, quant_from_scheme
from vitfold.recipe.registers import RegistersRecipe, Remedy

__all__ = [
    "FLOAT",
    "HEAD_STEP",
    "RULES",
    "WIDE",
    "WIDTH_STEP",
    "Format",
    "MergeRecipe",
    "MergeRule",
    "Order",
    "PruneRecipe",
    "QuantRecipe",
    "Recipe",
    "RegistersRecipe",
    "Remedy",
    "bits_from_scheme",
    "check_keys",
    "check_merge",
    "check_mergeable",
    "check_prune",
    "check_quant",
    "check_registers",
    "largest_r",
    "parse_recipe",
    "quant_from_scheme",
    "recipe_from_dict",
    "tokens_per_block",
]
