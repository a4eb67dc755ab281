"""The typed configuration: one frozen object a concern, each default written here and nowhere else."""

from __future__ import annotations

import os
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from dl2pa import envvars
from dl2pa.specs import MAX_LOGITS, METHODS, MethodDefaults

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Triple = tuple[float, float, float]

METHOD_NAMES = tuple(METHODS)
BACKBONES = (
    "resnet8",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet50",
    "resnet101",
    "resnet152",
    "swin_t",
)


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """YAML reads `yes` as true, which would pass for the number 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise ValueError("is true or false where another value is needed")
        return value


class DataConfig(Section):
    """Which images, how they are read, cropped and augmented."""

    dataset: Literal[
        "imagefolder",
        "tiny_imagenet",
        "cifar10",
        "cifar100",
        "svhn",
        "svhn_lt_legacy",
        "stl10",
        "digits",
        "synthetic",
    ] = "imagefolder"
    """On-disk layout of the data set; `synthetic` needs no files. `svhn_lt_legacy`: the authors' long-tailed SVHN, a
    third of its training labels wrong."""
    root: str | None = None
    """Folder of the data set; defaults to the environment variable DL2PA_DATA."""
    index: str | None = None
    """Index of `root` (`dl2pa data index`); default: `root`/dl2pa.index where there is one, else the folders are
    listed."""
    val_root: str | None = None
    """Validation folder where it is not `root`/val (imagefolder only)."""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Expected number of classes; checked against the data, required for `synthetic`."""
    imbalance: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Makes the training split long-tailed: images of the last class over those of the first. Validation stays whole.
    Which images are kept does not depend on `train.seed`."""
    classes: str | tuple[str, ...] | None = None
    """File with one class a line, or a list: fixes the label order and may name classes without images."""
    loader: Literal["auto", "dali", "torchvision", "resident", "synthetic"] = "auto"
    """`auto`: arrays stay resident on the device, image files go through DALI."""
    image_size: PositiveInt = 224
    """Side of the training and evaluation crop, pixels."""
    eval_resize: PositiveInt = 256
    """Shorter side before the center crop of evaluation, pixels (image files only)."""
    crop: Literal["random_resized", "pad", "none"] = "random_resized"
    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Share of the area that a random resized crop takes."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    pad: NonNegativeInt = 4
    """Border of zeros around a resident image before its random crop, pixels."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    trivial_augment: bool = False
    erasing: Fraction = 0.0
    """Probability of RandomErasing."""
    mean: Triple = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    threads: PositiveInt | None = None
    """Threads a process decodes with; default: its share of the processor's cores."""
    max_bad_fraction: Fraction = 0.01
    """Share of unreadable training images beyond which the run stops."""
    max_bad_val_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of unreadable validation images that may be left out, and told in `num_missing`; 0: the first is an
    error."""
    read_warn_s: Positive = 30.0
    """Seconds after which an image whose reading has not come back is named in the log."""
    read_timeout_s: Positive = 300.0
    """Seconds after which such a reading ends the run."""
    synthetic_samples: tuple[PositiveInt, PositiveInt] = (4096, 512)
    """Training and validation images of the synthetic data set."""

    @field_validator("root")
    @classmethod
    def _empty_is_unset(cls, value: str | None) -> str | None:
        return value or None

    @model_validator(mode="before")
    @classmethod
    def _root_from_environment(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("root") is None and os.environ.get(envvars.DATA):
            needs_files = values.get("dataset", "imagefolder") not in ("synthetic", "digits")
            if needs_files:
                return {**values, "root": os.environ[envvars.DATA]}
        return values  # pyright: ignore[reportUnknownVariableType]


class ModelConfig(Section):
    """The backbone and how its features become the embedding."""

    backbone: Literal[BACKBONES] = "resnet50"  # pyright: ignore[reportInvalidTypeForm]
    embedding_dim: PositiveInt = 512
    """Dimension d of the hypersphere's ambient space."""
    head: Literal["linear", "batchnorm"] = "linear"
    """`linear`: a projection to d; `batchnorm`: BN(d) on the backbone's own d features (long-tail recipe)."""
    shortcut: Literal["conv", "pad"] = "conv"
    """CIFAR ResNets: 3x3 convolution, or option A's subsampling with zero channels."""
    widths: tuple[PositiveInt, PositiveInt, PositiveInt] = (16, 32, 64)
    """CIFAR ResNets: channels of the three stages."""


class MatchConfig(Section):
    """When labels are matched to prototypes anew."""

    every_epochs: NonNegativeInt = 1
    """Match after every N epochs, before validation; 0: never by epoch."""
    every_steps: NonNegativeInt = 0
    """Match after every N steps as well; 0: never by step."""
    early_steps: NonNegativeInt = 0
    """Match after every N steps during the first `early_epochs`; 0: never."""
    early_epochs: NonNegativeInt = 0
    warmup_epochs: NonNegativeInt = 0
    """Epochs with a learned cosine classifier before the first matching."""
    warmup_scale: Positive = 14.0
    """Scale of the learned classifier's cosines in its cross-entropy."""
    last_epoch: PositiveInt | None = None
    """No matching after this many epochs; default: never stops."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Weight of the previous statistic at a matching."""
    refit_cosine: Annotated[float, Field(gt=-1.0, le=1.0)] | None = None
    """Let the prototypes follow their classes at each matching, no two closer than this cosine; default: they stay."""

    @model_validator(mode="before")
    @classmethod
    def _without_former_keys(cls, values: object) -> object:
        """Accept configurations recorded while `lag_steps` existed and was off."""
        if isinstance(values, dict) and values.get("lag_steps") == 0:
            return {key: value for key, value in values.items() if key != "lag_steps"}  # pyright: ignore[reportUnknownVariableType]
        return values  # pyright: ignore[reportUnknownVariableType]


class MethodConfig(Section):
    """The classifier over the embedding."""

    name: Literal[METHOD_NAMES] = "dl2pa"  # pyright: ignore[reportInvalidTypeForm]
    """The method; its own choices for all that is left open here are in `dl2pa/specs.py`."""
    loss: Literal["squared_cosine", "dot_regression", "cross_entropy"] | None = None
    """Default: the method's own."""
    assignment: Literal["static", "dynamic"] | None = None
    """Default: the method's own (dynamic for dl2pa, static otherwise)."""
    prototypes: str = "auto"
    """A construction (simplex, blocks, max_cosine, uniformity, hpn, ...) or a file of prototypes; auto: the method's
    own construction, for dl2pa the best one for C and d."""
    prototype_seed: NonNegativeInt = 0
    class_vectors: str | None = None
    """File of class vectors [C, k]: word2vec's prototypes; for the others they choose the first assignment (default:
    label c gets prototype c)."""
    scale: Positive | None = None
    """Factor of the scores in cross_entropy; default: the method's own."""
    learn_scale: bool = False
    """Learn that factor, starting from `scale`."""
    margin: NonNegative = 0.0
    """Subtracted from the cosine to a sample's own class in the cross_entropy of training."""
    logit_adjustment: NonNegative = 0.0
    """Factor of the logarithm of each class's share of the training images, added to the logits in the cross_entropy of
    training: for long tails; 1 is the balanced softmax."""
    max_logits: PositiveInt = MAX_LOGITS
    """Logits (images of a process times classes) that exist at a time in cross_entropy and in validation; where there
    would be more, classes or images are processed in blocks."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Of cross_entropy; default: the method's own."""
    normalize: bool | None = None
    """cross_entropy over cosines (true) or over dot products with the features as they are (false; with psc the linear
    classifier W f + b); default: the method's own (false for kasarla)."""
    sub_prototypes: PositiveInt | None = None
    """dnc, goto: vectors a class; default: the method's own."""
    centroid_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """dnc: weight of the old sub-centroid at an update; default: the method's own."""
    match: MatchConfig = MatchConfig()


class OptimConfig(Section):
    """The optimizer and its schedule, which is a function of the step alone."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.5
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    nesterov: bool = False
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: NonNegative = 2e-5
    """Not applied to norms, biases and one-dimensional parameters unless `decay_all`."""
    decay_all: bool = False
    """Apply weight decay to every parameter, as the authors' CIFAR code does."""
    clip_norm: NonNegative = 0.0
    """Largest gradient norm; 0: no clipping."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup_epochs: NonNegative = 0.0
    warmup_start: Fraction = 0.01
    """Share of `lr` at the first step of the warm-up."""
    milestones: tuple[PositiveInt, ...] = ()
    """Epochs after which the step schedule multiplies the rate by `gamma`."""
    gamma: Positive = 0.1
    min_lr: NonNegative = 0.0
    """Where the cosine ends."""


class TrainConfig(Section):
    """The run: length, batch, precision, mixing, what is measured when."""

    seed: NonNegativeInt = 0
    epochs: PositiveInt = 100
    max_steps: PositiveInt | None = None
    """Stop after this many steps in all, with a last validation (and a matching where an epoch's end has one).
    The schedule stays that of `epochs`."""
    batch_size: PositiveInt = 1024
    """Global batch: over all processes."""
    virtual_shards: PositiveInt | None = None
    """Equal parts of the global batch; the number of processes must divide it. Default: parts of at least 4."""
    eval_batch_size: PositiveInt | None = None
    """Global batch of validation; default `batch_size`."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool | Literal["graphs"] = False
    """Compile the network and the loss; `graphs`: and replay each pass as one CUDA graph, for small networks."""
    deterministic: bool | None = None
    """Deterministic algorithms; default: on the CPU."""
    channels_last: bool | None = None
    """Memory format of the backbone; default: where it pays (ResNets)."""
    sync_bn: bool = False
    mixup: NonNegative = 0.0
    """Alpha of mixup's Beta distribution; 0: off."""
    cutmix: NonNegative = 0.0
    """Alpha of cutmix's Beta distribution; 0: off. With mixup on too, one of the two is drawn each step."""
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Decay of the weights' moving average, which is then the model evaluated and exported; 0: off."""
    log_every_steps: PositiveInt = 50
    """Steps between two readings of the training metrics."""
    eval_every_epochs: PositiveInt = 1
    """Epochs between validations; the last epoch always validates."""
    profile: Annotated[int, Field(ge=0, le=1000)] = 0
    """Steps of each attempt, from its eleventh on, whose trace and table go to RUN/profile; 0: none."""


class CheckpointConfig(Section):
    """When state is written and how much of it is kept."""

    every_epochs: NonNegativeInt = 1
    every_steps: NonNegativeInt = 0
    """Steps between checkpoints besides those by epoch; 0: none."""
    keep: PositiveInt = 2
    """Latest checkpoints kept."""
    keep_best: bool = True
    """Keep the checkpoint of the best validation as well."""


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = True
    uri: str | None = None
    """Tracking server or store; default: SQLite beside the run directory. `none`: spool only."""
    experiment: str = "dl2pa"
    run_name: str | None = None
    tags: dict[str, str] = {}
    figures: bool = True
    """Draw the figures and write the HTML and CSV pages of a finished run. False saves a few seconds per run."""
    system_every_s: NonNegative = 30.0
    """Seconds between two measurements of each node (processor, memory, disk, network, GPUs); 0: none. Doubles every
    1,000 measurements."""


class LaunchConfig(Section):
    """Processes and devices; never changes the batches."""

    nproc: PositiveInt = 1
    """Processes on this machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt | None = None
    """CPU threads of each process; default: the cores divided by the local processes."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """What gradients travel over; `auto`: nccl between GPUs, gloo between CPUs."""
    interface: str | None = None
    """Network interface of nccl and gloo, such as ib0; default: nccl chooses, gloo takes the one toward node 0."""
    timeout_s: PositiveInt = 1800
    """Longest wait of one process for the others until the first step is done (compilation, cold data), seconds."""
    step_timeout_s: PositiveInt = 600
    """The same from then on: how long a process that is stuck keeps the others."""


class Config(Section):
    """Everything a run is made of."""

    data: DataConfig = Field(default_factory=DataConfig)  # not a constant: it reads the environment
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    launch: LaunchConfig = LaunchConfig()

    @property
    def method_defaults(self) -> MethodDefaults:
        """The method's own choices."""
        return METHODS[self.method.name]

    @property
    def loss(self) -> str:
        """The loss in force: the one given, else the method's own."""
        return self.method.loss or self.method_defaults.loss

    @property
    def assignment(self) -> str:
        """The assignment in force: the one given, else the method's own."""
        return self.method.assignment or self.method_defaults.assignment

    @property
    def normalize(self) -> bool:
        """Whether cross_entropy sees cosines: as given, else as the method has it."""
        given = self.method.normalize
        return self.method_defaults.normalize if given is None else given

    @property
    def loader(self) -> str:
        """The loader in force."""
        if self.data.dataset == "synthetic":
            return "synthetic"
        if self.data.loader != "auto":
            return self.data.loader
        files = self.data.dataset in ("imagefolder", "tiny_imagenet", "digits")
        return "dali" if files else "resident"

    @property
    def virtual_shards(self) -> int:
        """Virtual shards of the global batch: those given, else the most that leave each at least 4 samples."""
        if self.train.virtual_shards:
            return self.train.virtual_shards
        batch = self.train.batch_size
        return max(v for v in range(1, batch + 1) if batch % v == 0 and (batch // v >= 4 or v == 1))
