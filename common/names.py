"""Names that a recipe may use.

The modules that build these things register the same names (a test compares them); they stand here so that a
recipe is checked without loading any of those modules.
"""

from __future__ import annotations

TEACHERS = ("ward-sam-tiny", "ward-sam-tiny-lesions")
ADAPTER_PRESETS = (
    "base", "lite", "wide", "dp", "fused", "last3", "bottleneck", "norm", "decoder", "full",
)  # fmt: skip
GENERATORS = ("ward-diffusion-tiny", "ward-diffusion-latent")
# The smallest and the largest image that each was seen to paint well, pixels; others want none stated here.
GENERATOR_SIDES = {"ward-diffusion-latent": (128, 512)}
STUDENTS = ("unet-xs", "unet-s", "mobile", "vit-tiny")
SHIPPED_STUDENTS = ("unet-xs", "unet-s", "mobile")  # those with weights to start from
AGGREGATION_RULES = (
    "exact_split", "fedit", "ffa", "fedsvd", "fedex", "lora_fair", "flora", "flexlora", "hetlora",
    "rolora", "dual",
)  # fmt: skip
# What a rule takes, by its name: several ranks; of those, also other layers at each site; only presets that
# train the factor B alone; only presets that train both, which then take turns. A rule that is in neither of
# the first two wants one preset and rank for all sites.
MIXED_RANK_RULES = ("exact_split", "flora", "flexlora", "hetlora", "dual")
MIXED_PRESET_RULES = ("exact_split", "flora", "dual")
FIXED_A_RULES = ("ffa", "fedsvd")
ALTERNATING_RULES = ("rolora",)
# Of those with a fixed A, the rules that never move it between rounds either, as a private run wants it.
PINNED_A_RULES = ("ffa",)
# Rules that hold as many components as `AggregationConfig.max_rank`, the trainable ones among them.
SPLIT_RULES = ("exact_split", "dual")
# Rules under which each site trains an adapter of its own after the last round, which stays at home.
PERSONAL_RULES = ("dual",)
# How the server takes the admitted updates of a round together. Those that vote want a rule on whose layers
# sites can vote: on the whole change of each, or on the one factor that all of them train.
ROBUST_ESTIMATORS = ("none", "norm_bound", "median", "trimmed_mean", "multi_krum", "auto")
VOTING_ESTIMATORS = ("median", "trimmed_mean")
CHANGE_VOTE_RULES = ("exact_split", "flora", "dual")
FACTOR_VOTE_RULES = ("ffa", "fedsvd", "rolora")
PRETRAINED_HEADS = ("vessel", "blob", "region", "bright", "dark")
BASELINES = (
    "local_only",
    "local_only_scratch",
    "local_only_mae",
    "local_only_moco",
    "no_synthetic",
    "no_distillation",
    "no_federation",
    "no_features",
    "task_agnostic",
    "recolour",
    "paint",
    "histogram",
    "amplitude",
    "augment",
    "random_colour",
    "local_teacher",
    "fedavg",
    "fedprox",
    "fedbn",
    "centralised",
    "feddf",
)
# Of those, the ones that need every site's images or models in one place: only a simulation can train them.
POOLED_BASELINES = ("fedavg", "fedprox", "fedbn", "centralised", "feddf")
