"""The numbers that a recipe's values may be, section by section."""

from __future__ import annotations

import math
from dataclasses import dataclass

from common import recipe as schema


@dataclass(frozen=True)
class Range:
    """``low`` to ``high``; an end that is ``open`` does not belong to it."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if math.isinf(self.high):
            return low
        return f"{low} and {'below' if self.open_high else 'at most'} {self.high:g}"


COUNT = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, open_low=True)
SHARE = Range(0, 1)
OPEN_SHARE = Range(0, 1, open_low=True, open_high=True)
UP_TO_1000 = Range(0, 1000, open_low=True)

RANGES: dict[type, dict[str, Range]] = {
    schema.RunConfig: {
        "seed": NOT_NEGATIVE,
        "rounds": COUNT,
        "threads": COUNT,
        "min_sites": COUNT,
        "site_deadline_s": POSITIVE,
    },
    schema.ClassConfig: {"label": Range(1, 255)},
    schema.DataConfig: {
        "image_size": Range(32, 1024),
        "longest_side": Range(32, 8192),
        "min_patients": COUNT,
    },
    schema.ScannerConfig: {
        "gain": POSITIVE,
        "gamma": POSITIVE,
        "blur": NOT_NEGATIVE,
        "speckle": SHARE,
        "noise": SHARE,
        "contrast": Range(0, 1, open_low=True),
    },
    schema.PhantomConfig: {
        "train_patients": COUNT,
        "val_patients": NOT_NEGATIVE,
        "test_patients": COUNT,
        "images_per_patient": COUNT,
        "unlabelled_patients": NOT_NEGATIVE,
        "image_size": Range(32, 1024),
    },
    schema.CutConfig: {"labelled": COUNT},
    schema.CohortConfig: {
        "sites": COUNT,
        "alpha": POSITIVE,
        "labelled": COUNT,
        "unlabelled": NOT_NEGATIVE,
        "test_fraction": OPEN_SHARE,
    },
    schema.TeacherConfig: {
        "rank": COUNT,
        "steps": COUNT,
        "batch_size": COUNT,
        "learning_rate": POSITIVE,
        "cached_views": NOT_NEGATIVE,
    },
    schema.AggregationConfig: {
        "energy": Range(0, 1, open_low=True),
        "max_rank": COUNT,
        "personal_steps": COUNT,
        "byzantine": COUNT,
    },
    schema.GeneratorConfig: {
        "images": COUNT,
        "sampler_steps": Range(1, 20),
        "style_groups": COUNT,
        "keep_dice": SHARE,
        "keep_learnable": Range(0, 1, open_low=True),
        "rounds": COUNT,
        "steps": COUNT,
        "rank": COUNT,
        "batch_size": COUNT,
        "learning_rate": POSITIVE,
    },
    schema.StudentConfig: {
        "pretraining_steps": COUNT,
        "rounds": COUNT,
        "federated_share": Range(0, 1, open_low=True),
        "proximal": NOT_NEGATIVE,
        "steps": COUNT,
        "batch_size": COUNT,
        "transfer_batch_size": COUNT,
        "learning_rate": POSITIVE,
        "temperature": POSITIVE,
        "supervised_weight": NOT_NEGATIVE,
        "logit_weight": NOT_NEGATIVE,
        "feature_weight": NOT_NEGATIVE,
        "synthetic_share": SHARE,
        "boundary_weight": NOT_NEGATIVE,
        **dict.fromkeys(("entropy_weight", "warmup_share", "finetune_share"), SHARE),
        **dict.fromkeys(("transfer_views", "feature_stride"), Range(1, 16)),
    },
    schema.SiteConfig: {"rank": COUNT, "patients": COUNT, "test_patients": COUNT},
    schema.SiteFile: {"rank": COUNT, "patients": COUNT, "test_patients": COUNT},
    schema.PolicyConfig: {
        "min_group_patients": COUNT,
        "min_cell_patients": COUNT,
        "max_weight": COUNT,
        "max_payload_mb": POSITIVE,
    },
    schema.PrivacyConfig: {
        "epsilon": UP_TO_1000,
        "noise_multiplier": UP_TO_1000,
        "delta": OPEN_SHARE,
        "sample_rate": Range(0, 1, open_low=True),
        "steps": COUNT,
        "spare_steps": NOT_NEGATIVE,
        "max_grad_norm": Range(0, 1e6, open_low=True),
        "max_images_per_patient": Range(1, 64),
        "learning_rate": Range(0, 1e6, open_low=True),
        "momentum": Range(0, 1, open_high=True),
        "metric_epsilon": UP_TO_1000,
        "style_epsilon": UP_TO_1000,
    },
    schema.EvaluationConfig: {
        "nsd_tolerance": POSITIVE,
        "bootstrap": COUNT,
        "overlap": Range(0, 1, open_high=True),
    },
}
