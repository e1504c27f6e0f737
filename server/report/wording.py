"""Names and scores as the run report writes them; numbers of every page: `common.pages.wording`."""

from __future__ import annotations

from markupsafe import Markup

MINUS = "\u2212"

MODELS = {  # in the order of the columns: what a site can do alone, then what the federation gives
    "local_only_scratch": "Local only, from scratch",
    "local_only_mae": "Local only, MAE start",
    "local_only_moco": "Local only, MoCo start",
    "local_only": "Local only",
    "local_teacher": "Local teacher",
    "teacher": "Shared teacher",
    "personal_teacher": "Personal teacher",
    "no_federation": "Student, no federation",
    "no_synthetic": "Student, no synthetic",
    "no_distillation": "Student, no teacher",
    "no_features": "Student, no features",
    "task_agnostic": "Student, untuned teacher",
    "random_colour": "Student, random colours",
    "augment": "Student, strong augmentation",
    "amplitude": "Student, amplitude transfer",
    "histogram": "Student, histogram matching",
    "recolour": "Student, recoloured crops",
    "paint": "Student, procedural paint",
    "student": "Student",
    # what only a simulation can train, with all sites' images or models in one place
    "fedavg": "FedAvg student (simulated)",
    "fedprox": "FedProx student (simulated)",
    "fedbn": "FedBN student (simulated)",
    "feddf": "Ensemble of local teachers (simulated)",
    "centralised": "Centralised student (simulated)",
}
METRICS = {"dice": "Dice", "nsd": "NSD", "hd95": "HD95"}
LOWER_IS_BETTER = frozenset({"hd95"})
STAGES = {
    "propose": "proposal",
    "adapt": "adapter",
    "style": "style summary",
    "generator": "generator",
    "shared_student": "shared student",
    "student": "student",
    "evaluate": "evaluation",
}
STARTS = {
    "shipped": "shipped weights",
    "random": "random weights",
    "mae": "MAE on its own images",
    "moco": "MoCo v3 on its own images",
}


def model_name(model: str) -> str:
    return MODELS.get(model, model.replace("_", " "))


def metric_name(metric: str) -> str:
    return METRICS.get(metric, metric)


def stage_name(stage: str) -> str:
    return STAGES.get(stage, stage)


def start_name(start: str) -> str:
    return STARTS.get(start, start)


def score(value: float, metric: str = "dice") -> str:
    """Dice and NSD with three decimals; distances with one."""
    return f"{value:.{1 if metric in LOWER_IS_BETTER else 3}f}"


def interval(ci95: list[float], metric: str = "dice") -> str:
    return f"{score(ci95[0], metric)} to {score(ci95[1], metric)}"


def tenth(value: float) -> str:
    """One decimal: seconds and milliseconds."""
    return f"{value:.1f}"


def signed(value: float) -> str:
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", MINUS)


def derived(text: str, how: str) -> Markup:
    """A number that does not stand in report.json itself: ``how`` says what it is a mean or difference of."""
    return Markup("<span class='derived' title='{}'>{}</span>").format(how, text)
