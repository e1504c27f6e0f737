"""What a recipe may say: the schema, as frozen dataclasses.

`common.config` reads YAML into these and checks them; the rest of the house receives them typed. The
sections that a site must agree to (``TeacherConfig`` to ``EvaluationConfig``) travel inside the
`RunPlan`, so that what a site consents to and what it trains with are one object.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Engine(StrEnum):
    loopback = "loopback"
    ray = "ray"


class Anatomy(StrEnum):
    lesions = "lesions"  # speckled, ultrasound-like, one or two lesions
    vessels = "vessels"  # branching trees in a round field of view
    cells = "cells"  # many small bodies, bright or stained


class GeneratorScope(StrEnum):
    style = "style"  # the shipped generator in every site's style; never trained on a real pixel
    local = "local"  # fine-tuned on the site's own images, sampling the site's own styles
    federated = "federated"  # its adapter fine-tuned at the sites and aggregated; every site's styles
    recolour = "recolour"  # no network: the site's own labelled crops in every site's colours
    paint = "paint"  # no network: procedural shapes in every site's colours and grain
    none = "none"  # no synthetic image


class StyleDetail(StrEnum):
    """How much of its look a site shares, a number each (`common.style`)."""

    colour = "colour"  # 14: colours, their fine deviation, coverage and size
    texture = "texture"  # 12 more: the energy of each frequency band, shading, skewness
    spectrum = "spectrum"  # 135 more: mean amplitudes of the lowest frequencies, as FedDG wants them


class WireDtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"  # up; down it is bfloat16


class DecoderTraining(StrEnum):
    full = "full"  # every weight of the decoder travels
    lora = "lora"  # factors on its convolutions, and the head as it is
    shallow = "shallow"  # all but what takes the encoder's maps in, which hardly learns and takes noise
    head = "head"  # the last layer alone
    frozen = "frozen"


class SyntheticLabels(StrEnum):
    soft = "soft"  # the teacher's probabilities
    mask = "mask"  # the conditioning mask
    both = "both"  # their mean


class StudentScope(StrEnum):
    local = "local"  # no student's weights leave a site
    federated = "federated"  # trained in rounds and averaged first, then distilled at each site


class Federation(StrEnum):  # of a federated student: see `client.federated_student`
    fedavg = "fedavg"
    fedprox = "fedprox"  # with a pull towards what the site was sent
    fedbn = "fedbn"  # each site keeps the scales and shifts of its normalisations


class Distillation(StrEnum):
    task = "task"  # the federated teacher's outputs and features
    agnostic = "agnostic"  # the features of the teacher as it ships, which knows nothing of the task
    ensemble = "ensemble"  # the mean of the outputs of the federated teacher and the site's own
    none = "none"


class TeacherCache(StrEnum):
    float16 = "float16"  # logits and features
    uint8 = "uint8"  # probabilities in 255ths, features in bfloat16


class Start(StrEnum):
    """The weights that a student starts from."""

    shipped = "shipped"  # pre-trained on procedural images
    random = "random"
    mae = "mae"  # pre-trained on the site's own images, without their masks, by telling hidden patches
    moco = "moco"  # the same, by telling views of one image from those of others (MoCo v3)


class Consent(StrEnum):
    ask = "ask"  # a person at the site approves each plan (`wardround site approve`)
    policy = "policy"  # what the site's policy allows is agreed to


class Holdout(StrEnum):
    none = "none"
    coin = "coin"  # each labelled training patient is left out by a fair coin, for audits: costs about half


@dataclass(frozen=True)
class RunConfig:
    seed: int = 0
    rounds: int = 3
    engine: Engine = Engine.loopback
    threads: int = 1  # torch threads of each worker; a result is reproducible for one value of it
    min_sites: int = 2  # a round with fewer replies fails the run
    site_deadline_s: float = 1800.0  # for one site's answer to one message


@dataclass(frozen=True)
class ClassConfig:
    """One foreground class: its pixel value in the masks, and the pre-trained head it starts from."""

    name: str = "foreground"
    label: int = 255
    like: str = "region"  # vessel | blob | region | bright | dark
    also: list[int] = field(default_factory=list)  # further pixel values of it: those of its parts

    @property
    def values(self) -> tuple[int, ...]:
        """Every pixel value in the masks that belongs to the class."""
        return (self.label, *self.also)


@dataclass(frozen=True)
class DataConfig:
    root: str | None = None  # where real sets lie; recipes that need one say so
    image_size: int = 96  # side of a training patch and of a synthetic image, pixels
    longest_side: int | None = None  # images are resized so that their longest side is this, pixels
    classes: list[ClassConfig] = field(default_factory=lambda: [ClassConfig()])
    exclusive: bool = False  # a pixel has one class or none (softmax); false: one sigmoid a class
    field_of_view: bool = False  # a dark surround is no part of the image (fundus cameras)
    min_patients: int = 2  # fewer labelled training patients than this is a fault


@dataclass(frozen=True)
class ScannerConfig:
    """How a simulated site's machine turns tissue into pixels."""

    gain: float = 1.0
    gamma: float = 1.0
    blur: float = 0.6  # standard deviation of the point spread, pixels
    speckle: float = 0.35  # 0 none, 1 fully developed
    noise: float = 0.02  # standard deviation of additive noise, of the full range
    contrast: float = 0.3  # object against its background, of the full range
    bright_objects: bool = False
    tint: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])


@dataclass(frozen=True)
class PhantomConfig:
    anatomy: Anatomy = Anatomy.lesions
    train_patients: int = 12
    val_patients: int = 2
    test_patients: int = 12
    images_per_patient: int = 2
    unlabelled_patients: int = 0
    image_size: int = 96
    object_size: list[float] = field(default_factory=lambda: [0.08, 0.2])  # radius, share of the image side
    scanner: ScannerConfig = field(default_factory=ScannerConfig)


@dataclass(frozen=True)
class CutConfig:
    """A part of a data set below ``data.root`` that has an ``index.csv``."""

    dataset: str = ""
    group: str | None = None  # None: every group
    labelled: int | None = None  # labelled training images; None: all
    image_suffix: str = ""


@dataclass(frozen=True)
class SiteConfig:
    """One hospital: exactly one of ``manifest``, ``cut`` and ``phantom`` says where its data come from."""

    name: str = ""
    manifest: str | None = None
    cut: CutConfig | None = None
    phantom: PhantomConfig | None = None
    student: str | None = None  # None: the recipe's student.name
    adapter: str | None = None  # None: the recipe's teacher.adapter
    rank: int | None = None  # None: the recipe's teacher.rank
    patients: int | None = None  # declared for a private run, and so public; None: a phantom's train_patients
    test_patients: int | None = None  # the same, of those tested, where metrics are noised
    signed_policy: str | None = None  # a policy.json with its signature beside it; None: the site has none
    officer_key: str | None = None  # the public key of who signed it


@dataclass(frozen=True)
class CohortConfig:
    """A data set below ``data.root`` cut into sites by a Dirichlet mixture over its groups."""

    dataset: str = ""
    sites: int = 4
    alpha: float = 0.5
    labelled: int = 30  # labelled training images a site
    unlabelled: int = 90  # at most this many unlabelled training images a site
    test_fraction: float = 0.25  # of every group


@dataclass(frozen=True)
class TeacherConfig:
    name: str = "ward-sam-tiny"
    adapter: str = "base"  # preset (common/tuning/presets.py): what of the encoder is trained
    rank: int | None = None  # None: the preset's own
    decoder: DecoderTraining = DecoderTraining.full
    steps: int = 30  # optimiser steps a site and round
    batch_size: int = 8
    learning_rate: float = 2e-3
    cached_views: int = 0  # 0: fresh crops in every step; else that many fixed ones a site, see prefix_cache


@dataclass(frozen=True)
class AggregationConfig:
    rule: str = "exact_split"
    energy: float = 0.999  # share of the update's squared Frobenius norm that goes down to the sites
    max_rank: int = 64  # cap on the rank that goes down
    personal_steps: int | None = None  # rule dual: of a site's own adapter; None: all rounds' together
    wire_dtype: WireDtype = WireDtype.bfloat16  # of adapters and updates on their way (common/precision.py)
    robust: str = "none"  # how one bad site among the admitted is borne; see server/robust
    byzantine: int = 1  # that many bad sites are to be borne


@dataclass(frozen=True)
class GeneratorConfig:
    name: str = "ward-diffusion-tiny"
    scope: GeneratorScope = GeneratorScope.style
    images: int = 120  # synthetic images a site
    sampler_steps: int = 15  # denoiser calls an image
    style_groups: int = 5  # at most this many appearance groups a site
    style_detail: StyleDetail = StyleDetail.colour  # what of its look a site shares
    keep_dice: float = 0.5  # a painted image whose teacher mask agrees less with its own mask is dropped
    keep_learnable: float = 1.0  # share of those left that have most to teach; the others are passed over
    rounds: int = 1  # federated scope: adapter rounds
    steps: int = 30  # local and federated scope: optimiser steps a site and round
    rank: int = 8
    site_token: bool = False  # federated scope: the network is told whose image it learns and whose it paints
    batch_size: int = 8
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class StudentConfig:
    name: str = "unet-xs"
    start: Start | None = None  # None: shipped where the kind has weights, else mae
    pretraining_steps: int = 200  # of the starts mae and moco, at each site, once a run
    scope: StudentScope = StudentScope.local
    federation: Federation = Federation.fedavg  # of a federated student
    rounds: int = 3  # of a federated student
    federated_share: float = 0.67  # of the steps: made in those rounds; the rest is distillation at home
    proximal: float = 0.01  # fedprox: mu, the weight of the pull towards what was sent
    steps: int = 120  # of every student of the run, those in rounds included
    batch_size: int = 16  # labelled crops a step, for every variant
    transfer_batch_size: int = 8  # crops of the transfer set a step, beside them
    learning_rate: float = 2e-3
    temperature: float = 2.0
    supervised_weight: float = 1.0
    logit_weight: float = 1.0
    feature_weight: float = 0.1
    synthetic_share: float = 0.5  # of the crops of the transfer set
    synthetic_labels: SyntheticLabels = SyntheticLabels.soft
    real_labels: SyntheticLabels = SyntheticLabels.soft  # the same, of the site's own labelled crops
    distillation: Distillation = Distillation.task
    boundary_weight: float = 0.0  # 0 and the term is not computed, as for every weight here
    entropy_weight: float = 0.0  # how far the outputs' term discounts pixels of which the teacher is not sure
    warmup_share: float = 0.0  # first share of the steps, on the transfer set alone
    finetune_share: float = 0.0  # last share of the steps, on the labels alone
    feature_stride: int = (
        2  # decoder features are compared on every so many-th row and column, drawn anew a step
    )
    transfer_views: int = 1  # of each image of the transfer set; those beyond the first are augmented
    teacher_cache: TeacherCache = TeacherCache.float16  # how the site keeps what the teacher said

    @property
    def federated(self) -> bool:
        """Whether students' weights travel."""
        return self.scope is StudentScope.federated


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of the teacher's rounds: in each, every site sends one noised gradient.

    Without ``epsilon`` and ``noise_multiplier``: none, and the report says NO GUARANTEE. With one of them
    ``steps`` stands in place of ``run.rounds``; the teacher's own steps, batches and rate are not used.
    """

    epsilon: float | None = None  # of the whole run; the noise is found for it
    noise_multiplier: float | None = None  # noise over clip
    delta: float = 1e-5
    sample_rate: float = 0.5  # chance of each patient to be drawn in a step
    steps: int = 30  # noised steps of the whole run, one a round
    spare_steps: int = 0  # paid for beyond them: for steps that a crash loses, which stay spent
    max_grad_norm: float = 1.0  # clip of a patient's gradient
    max_images_per_patient: int = 2  # of which a patient's gradient is the mean, drawn anew in each step
    learning_rate: float = 0.7  # at the first step; falls in a line to a tenth of it
    momentum: float = 0.9  # of the server, on the mean step
    release_metrics: bool = True  # false: nothing that is measured on patients leaves
    metric_epsilon: float | None = None  # of each number that does, which is then noised; None: as it is
    style_epsilon: float | None = None  # of a site's style summary alone, then noised; None: as it is

    @property
    def asked(self) -> bool:
        """Whether the recipe wants noise."""
        return self.epsilon is not None or self.noise_multiplier is not None

    @property
    def withheld(self) -> bool:
        """Whether no number that is measured on patients leaves."""
        return self.asked and not self.release_metrics

    @property
    def covered(self) -> bool:
        """Whether all that leaves a site and depends on its patients is noised."""
        return self.withheld or (self.asked and self.metric_epsilon is not None)


@dataclass(frozen=True)
class AuditConfig:
    """What every simulated site keeps back for `wardround privacy audit`; a real one says so itself."""

    holdout: Holdout = Holdout.none


@dataclass(frozen=True)
class PolicyConfig:
    """What a site allows, whatever the server asks."""

    min_group_patients: int = 5  # a style group of fewer patients is not shared
    min_cell_patients: int = 5  # a metric over fewer patients is not shared
    max_weight: int = 1000  # cap on the declared patient count
    max_payload_mb: float = 64.0
    allow_style: bool = True
    allow_generator: bool = True
    allow_student: bool = False  # a student's weights, trained on patients without noise, may leave the site


@dataclass(frozen=True)
class EvaluationConfig:
    nsd_tolerance: float = 2.0  # mm where the manifest gives a spacing, else pixels
    bootstrap: int = 1000  # resamples of the patients
    overlap: float = 0.25  # of neighbouring tiles in sliding-window inference


@dataclass(frozen=True)
class Recipe:
    """A whole run. ``baselines``: `client.variants.VARIANTS`, ``local_teacher``, `POOLED_BASELINES`."""

    name: str = ""
    description: str = ""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sites: list[SiteConfig] = field(default_factory=list)
    cohort: CohortConfig | None = None
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    baselines: list[str] = field(default_factory=lambda: ["local_only", "local_only_scratch"])


@dataclass(frozen=True)
class SiteFile:
    """``site.yaml``: what a hospital says of itself. The guard reads it; the server never writes it.

    ``manifest`` and ``officer_key`` are relative to the file. ``student``, ``adapter`` and ``rank`` None take
    the plan's. ``patients``, the labelled ones that train, is what the site declares in a private run: it is
    public, and the noise is divided by it. ``test_patients``, the labelled ones that test, is the same for
    metrics that leave with noise. ``officer_key`` is the public key of who signs ``policy.json`` beside this
    file; without it there is no such policy. ``consent`` None: a guard in a process of its own asks, one
    that shares the courier's does not.
    """

    name: str = ""
    manifest: str = "data/manifest.csv"
    student: str | None = None
    adapter: str | None = None
    rank: int | None = None
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    patients: int | None = None
    test_patients: int | None = None
    officer_key: str | None = None
    holdout: Holdout = Holdout.none  # with coins, about half of the labelled ones are declared as patients
    consent: Consent | None = None
