"""The plan that every site is asked to agree to, made from a recipe: `build_plan`.

The payload manifest in it is exact: the tensors that a stage sends up, by name, shape and dtype, and each
number by its path. The site's egress releases nothing else, the server's screening admits nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from common.adapter import Adapter
from common.code_digest import code_sha256
from common.errors import ConfigError
from common.guard_api import PlanAnswer, SiteMetrics, StudentNote
from common.names import POOLED_BASELINES, SHIPPED_STUDENTS
from common.painter_rules import NETWORK_SCOPES, SHARING_SCOPES
from common.plan import PayloadSpec, RunPlan, Stage, TensorSpec, Variant, start_of
from common.precision import pack, pack_down
from common.privacy.heads import HEAD, HEAD_BYTES, HEAD_NUMBERS
from common.recipe import AggregationConfig, GeneratorScope, Recipe, TeacherConfig
from common.style import StyleSummary
from common.tuning.halves import turns
from common.tuning.presets import rank_of, site_teacher
from server.aggregation import Share, build_rule

UPDATE_NUMBERS = ["weight", "started_from", "mechanism", "losses"]
FRAMING = 1.02  # an update is its tensors and at most 2 % around them
UPDATE_NUMBERS_BYTES = 1024
LAYOUT_BYTES = 32  # beside a tensor's name: its shape, in the layout
TABLES: dict[Stage, tuple[str, type, int]] = {  # stage: the table's name, its fields, most bytes
    Stage.propose: ("answer", PlanAnswer, 4 << 10),
    Stage.style: ("style", StyleSummary, 64 << 10),
    Stage.student: ("note", StudentNote, 4 << 10),
    Stage.evaluate: ("metrics", SiteMetrics, 1 << 20),
}


@dataclass(frozen=True)
class FirstAdapters:
    """What the first rounds start from.

    Attributes:
        teachers: one a variant (preset and rank) that a site may train, the recipe's own first.
        generator: None unless its adapter is federated.
        student: None unless the student's weights are.
    """

    teachers: list[Adapter]
    generator: Adapter | None
    student: Adapter | None = None

    def whole(self) -> Adapter:
        """Every layer that a variant trains, at the highest rank, under the name of the first variant."""
        tensors: dict[str, Tensor] = {}
        for adapter in sorted(self.teachers, key=lambda one: one.rank):
            tensors |= adapter.tensors  # of two ranks the first rows are the same: the higher one stays
        highest = max(adapter.rank for adapter in self.teachers)
        return replace(self.teachers[0], tensors=dict(sorted(tensors.items())), rank=highest)


@dataclass(frozen=True)
class JobTerms:
    """What a plan says beside the recipe, where a coordinator submits it: see `RunPlan`."""

    bundle_sha256: str = ""
    expires: str = ""
    coordinator_key: str = ""


def first_adapters(recipe: Recipe) -> FirstAdapters:
    """Raises ``ArtefactError`` if the recipe names models that are not there, or public factors."""
    from common import generator, shared_student, teacher

    federated = recipe.generator.scope is GeneratorScope.federated
    first = teacher.private_initial_adapter if recipe.privacy.asked else teacher.initial_adapter
    return FirstAdapters(
        [first(one, recipe.data, recipe.run.seed) for one in variant_settings(recipe)],
        generator.initial_adapter(recipe.generator, recipe.run.seed) if federated else None,
        shared_student.first_student(recipe.student, recipe.data) if recipe.student.federated else None,
    )


def variant_settings(recipe: Recipe) -> list[TeacherConfig]:
    """The settings of every preset and rank that a site of ``recipe`` trains, each once, its own first."""
    wanted = [recipe.teacher, *(site_teacher(recipe.teacher, s.adapter, s.rank) for s in recipe.sites)]
    found: dict[tuple[str, int], TeacherConfig] = {}
    for one in wanted:
        found.setdefault((one.adapter, rank_of(one)), one)
    return list(found.values())


def model_digests(recipe: Recipe) -> dict[str, str]:
    """Base model name -> SHA-256 of its weights, for every model that the recipe uses."""
    from common import checkpoints

    models = {recipe.teacher.name: checkpoints.base_sha256(recipe.teacher.name)}
    for name in {recipe.student.name, *(site.student for site in recipe.sites)}:
        if name in SHIPPED_STUDENTS:
            models[name] = checkpoints.base_sha256(name)
    if recipe.generator.scope in NETWORK_SCOPES:
        models[recipe.generator.name] = checkpoints.base_sha256(recipe.generator.name)
    return models


def build_plan(
    recipe: Recipe, run_id: str, first: FirstAdapters | None = None, terms: JobTerms | None = None
) -> RunPlan:
    """The whole job as one object with one digest.

    Args:
        first: what the rounds start from; None: `first_adapters` of the recipe.
        terms: of a job that is submitted; None: it has none, as in a simulation.

    Raises:
        ArtefactError: a model is not there.
    """
    first, stages, aggregation = first or first_adapters(recipe), run_stages(recipe), recipe.aggregation
    payloads = [spec for s in stages if s is not Stage.adapt for spec in _payloads(s, first, aggregation)]
    variants = [_variant(adapter, recipe) for adapter in first.teachers]
    if recipe.privacy.asked:
        payloads = [spec if spec.stage is Stage.style else _with_head(spec) for spec in payloads]
        variants = [replace(one, payloads=[_with_head(spec) for spec in one.payloads]) for one in variants]
    return RunPlan(
        run_id=run_id,
        seed=recipe.run.seed,
        rounds=recipe.privacy.steps if recipe.privacy.asked else recipe.run.rounds,
        code_sha256=code_sha256(),
        models=model_digests(recipe),
        stages=stages,
        payloads=payloads,
        variants=variants,
        data=replace(recipe.data, root=None),
        teacher=recipe.teacher,
        aggregation=recipe.aggregation,
        generator=recipe.generator,
        student=recipe.student,
        privacy=recipe.privacy,
        evaluation=recipe.evaluation,
        baselines=[name for name in recipe.baselines if name not in POOLED_BASELINES],
        sites=[site.name for site in recipe.sites],
        starts=_starts(recipe.aggregation, first, variants),
        **asdict(terms or JobTerms()),
    )


def _starts(aggregation: AggregationConfig, first: FirstAdapters, variants: list[Variant]) -> dict[str, str]:
    """`RunPlan.starts`: what each rule sends before anything is folded into it."""
    found = {}
    parts = [(start_of(Stage.adapt, v), one) for v, one in zip(variants, first.teachers, strict=True)]
    parts += [
        (str(stage), one)
        for stage, one in ((Stage.generator, first.generator), (Stage.shared_student, first.student))
        if one is not None
    ]
    for name, one in parts:
        rule = build_rule(replace(aggregation, rule="exact_split") if one is first.student else aggregation)
        whole = first.whole() if name not in (Stage.generator, Stage.shared_student) else one
        try:
            rule.start(whole, {name: Share.of(one)})
        except ConfigError:
            continue  # a variant that no site of such a mixture can train: the walk says so
        found[name] = pack_down(rule.adapter_for(name), aggregation.wire_dtype).digest
    return found


def run_stages(recipe: Recipe) -> list[Stage]:
    """The stages in their order. Styles travel only where another site paints with them.

    Where nothing measured on patients may leave, the sites are not asked for metrics.
    """
    scope = recipe.generator.scope
    stages = [Stage.propose, Stage.adapt]
    if scope in SHARING_SCOPES:
        stages.append(Stage.style)
    if scope is GeneratorScope.federated:
        stages.append(Stage.generator)
    if recipe.student.federated:
        stages.append(Stage.shared_student)
    stages.append(Stage.student)
    return stages if recipe.privacy.withheld else [*stages, Stage.evaluate]


def _payloads(stage: Stage, first: FirstAdapters, aggregation: AggregationConfig) -> list[PayloadSpec]:
    if stage in TABLES:
        name, kind, max_bytes = TABLES[stage]
        return [PayloadSpec(stage, [], sorted(set(_paths(kind, name))), max_bytes)]
    if stage is Stage.shared_student:
        assert first.student is not None, "only the federated scope of students has rounds of them"
        return [_update_payload(stage, pack(first.student, aggregation.wire_dtype))]
    assert first.generator is not None, "only the federated scope has a generator stage"
    return _in_turn(stage, first.generator, aggregation)


def _with_head(spec: PayloadSpec) -> PayloadSpec:
    """``spec`` and the head of the site's ledger, which goes with every answer of a private run.

    All but styles, which the server hands on to other sites.
    """
    table = f"{TABLES[spec.stage][0]}." if spec.stage in TABLES else ""
    names = [f"{table}{HEAD}.{name}" for name in HEAD_NUMBERS]
    return replace(spec, numbers=[*spec.numbers, *names], max_bytes=spec.max_bytes + HEAD_BYTES)


def _variant(adapter: Adapter, recipe: Recipe) -> Variant:
    pinned = adapter.a_sha256 if recipe.privacy.asked else ""
    payloads = _in_turn(Stage.adapt, adapter, recipe.aggregation)
    return Variant(adapter.preset, adapter.rank, payloads, pinned)


def _in_turn(stage: Stage, adapter: Adapter, aggregation: AggregationConfig) -> list[PayloadSpec]:
    """What the rounds of training send: one entry, or one for each turn of an alternating rule."""
    return [
        _update_payload(stage, pack(adapter.trained(halves), aggregation.wire_dtype))
        for halves in turns(adapter.preset, aggregation.rule)
    ]


def _update_payload(stage: Stage, packed: Adapter) -> PayloadSpec:
    tensors = packed.tensors
    specs = [
        TensorSpec(name, list(tensors[name].shape), str(tensors[name].dtype).removeprefix("torch."))
        for name in sorted(tensors)
    ]
    size = sum(tensor.nbytes for tensor in tensors.values())
    around = UPDATE_NUMBERS_BYTES + sum(len(name) + LAYOUT_BYTES for name in tensors)
    return PayloadSpec(stage, specs, UPDATE_NUMBERS, math.ceil(size * FRAMING) + around)


def _paths(kind: Any, path: str) -> Iterator[str]:
    """The path of every plain value in ``kind``; lists add nothing to a path. See `_with_head`."""
    if get_origin(kind) in (Union, UnionType, list, tuple):
        for arm in get_args(kind):
            yield from _paths(arm, path)
    elif isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        for item in fields(kind):
            if item.name != HEAD:
                yield from _paths(hints[item.name], f"{path}.{item.name}")
    else:
        yield path
