"""Typed configuration: one frozen model per section. Every default is defined here.

The docstrings of the fields are the reference that `dl2pa config --explain` and docs/configuration.md print.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator

from dl2pa.config.data_section import DataConfig
from dl2pa.config.section import (
    BelowOne,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Section,
)
from dl2pa.redaction import hide_address
from dl2pa.specs import DEFAULT_BACKBONE, MAX_LOGITS, METHODS, MethodSpec, backbone_spec, dataset_spec

METHOD_NAMES = tuple(METHODS)
LR_BATCH = 256
"""Global batch to which `optim.lr` refers under a scaling rule."""
MOMENTUM_OPTIMIZERS = ("sgd", "lars")
"""Optimizers with `optim.momentum`; the others use `optim.betas`."""
TIMM_OPTIMIZERS = ("lars", "lamb")
"""Optimizers of the optional package timm."""


class ModelConfig(Section):
    """Backbone and embedding head."""

    backbone: str = DEFAULT_BACKBONE
    """Network that computes the features: resnet8, resnet14, resnet20, resnet32, resnet44 and resnet56 are CIFAR
    ResNets for images of 32 pixels; any classification model of torchvision by its name (resnet18, convnext_tiny,
    vit_b_16, …); any model of timm as timm:NAME. On `data.dataset=features`: `identity` (only the projection to
    `embedding_dim` is trained) or `mlp`."""
    embedding_dim: PositiveInt = 512
    """Dimension d of the embedding and of the prototypes."""
    head: Literal["linear", "batchnorm"] = "linear"
    """`linear`: linear projection to d. `batchnorm`: batch normalization of the backbone features, whose dimension
    must be d (used for long-tailed data)."""
    shortcut: Literal["conv", "pad"] = "conv"
    """Downsampling shortcut of CIFAR ResNets: `conv` (3x3 convolution) or `pad` (subsampling with zero-padded
    channels, option A of the ResNet paper)."""
    widths: tuple[PositiveInt, PositiveInt, PositiveInt] = (16, 32, 64)
    """Channels of the three stages of CIFAR ResNets."""
    hidden: tuple[PositiveInt, ...] = (512,)
    """Widths of the hidden layers of `mlp`, each followed by ReLU; the projection to `embedding_dim` comes after
    them."""
    hidden_norm: Literal["none", "batchnorm"] = "none"
    """Normalization between each hidden layer of `mlp` and its ReLU."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout after each hidden layer of `mlp`."""

    init: str | None = None
    """Initial weights: a safetensors file or a state dict, a finished run or an export, `torchvision:WEIGHTS` or
    `timm:TAG` (pretrained weights of the backbone, fetched by `dl2pa weights fetch`). A head of another size stays
    random. Default: random weights."""

    freeze_epochs: NonNegativeInt | Literal["all"] = 0
    """Number of first epochs that train only the head: the backbone keeps its weights and runs in evaluation mode
    (BatchNorm statistics and dropout too). `all`: the backbone is never trained."""

    freeze_before: str | None = None
    """Module of the backbone, such as `layer4` or `blocks.6`: the layers before it keep their initial weights in all
    epochs and run in evaluation mode, which saves time and memory. `dl2pa config FILE --groups` lists what is
    trained. Default: all layers are trained."""

    freeze_norm: bool = False
    """Keep normalization layers of the backbone that have running statistics (BatchNorm) in evaluation mode: they use
    the statistics of the initial weights, not those of the batch. Their scales and shifts are trained. Usual for
    fine-tuning with small batches."""

    @field_validator("init", "freeze_before")
    @classmethod
    def _empty_is_unset(cls, value: str | None) -> str | None:
        return value or None

    @field_validator("backbone")
    @classmethod
    def _known_backbone(cls, value: str) -> str:
        backbone_spec(value)
        return value


class MatchConfig(Section):
    """Updates of the label-to-prototype assignment (dynamic assignment only)."""

    every_epochs: NonNegativeInt = 1
    """Update the assignment after every N epochs, before validation. 0: no updates by epoch."""
    every_steps: NonNegativeInt = 0
    """Update the assignment after every N steps as well. 0: no updates by step."""
    early_steps: NonNegativeInt = 0
    """Update the assignment after every N steps during the first `early_epochs`. 0: no early updates."""
    early_epochs: NonNegativeInt = 0
    """Number of epochs after the warm-up in which `early_steps` applies."""
    warmup_epochs: NonNegativeInt = 0
    """Number of epochs trained with a learned cosine classifier before the first assignment update."""
    warmup_scale: Positive = 14.0
    """Scale of the logits of that learned classifier."""
    last_epoch: PositiveInt | None = None
    """Number of epochs after which the assignment is fixed. Default: update until the end."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Weight of the previous class statistics in an assignment update."""
    statistic: Literal["embedding", "pooled", "input"] = "embedding"
    """Class means that decide the assignment: of the embedding; of the features of the backbone, which the prototypes
    have influenced less (`pooled`); or of the vectors of `data.dataset=features`, which no training has changed
    (`input`)."""
    solver: Literal["linear", "quadratic"] = "linear"
    """`linear`: the assignment with the largest sum of cosines between class means and prototypes; `pooled` means are
    reduced to d dimensions by PCA. `quadratic`: similar classes get similar prototypes, whatever their rotation. It
    applies to `class_vectors` as well."""
    rotate: bool = False
    """Rotate the prototypes to the class means of the embedding at each assignment update, which keeps all angles."""
    refit_cosine: Annotated[float, Field(gt=-1.0, le=1.0)] | None = None
    """Move the prototypes toward their class means at each assignment update, keeping the cosine between any two
    prototypes at or below this value. With the statistic `pooled` or `input` these are its class means, reduced to d
    dimensions by PCA. Default: fixed prototypes."""


class NegativesConfig(Section):
    """Classes that cross_entropy compares an image with. By default, all of them."""

    neighbors: NonNegativeInt = 0
    """Number of classes whose prototypes are nearest to that of the label."""
    random: NonNegativeInt = 0
    """Number of classes drawn at random for each image in each step. They represent all classes except the label and
    its neighbors: their part of the denominator is scaled accordingly. Every step then costs the same for any number of
    classes."""


class MethodConfig(Section):
    """Classifier on the embedding: prototypes, loss and assignment.

    Each method has defaults (`dl2pa/specs.py`) for the keys whose default is null.
    """

    name: Literal[METHOD_NAMES] = "dl2pa"  # pyright: ignore[reportInvalidTypeForm]
    """Classification method."""
    loss: Literal["squared_cosine", "dot_regression", "cross_entropy", "ntce"] | None = None
    """Training loss. `ntce` compares the vector of each class with all images of the batch. Default: that of the
    method."""
    assignment: Literal["static", "dynamic"] | None = None
    """Label-to-prototype assignment: fixed (`static`) or learned (`dynamic`). Default: dynamic for dl2pa, static for
    the other methods."""
    prototypes: str = "auto"
    """Prototype construction (simplex, blocks, max_cosine, uniformity, hpn, ...) or a prototype file. `auto`: the
    construction of the method; for dl2pa, the best one for the number of classes C and dimension d."""
    prototype_seed: NonNegativeInt = 0
    """Seed of the prototype construction."""
    class_vectors: str | None = None
    """File of class vectors, shape [C, k]. They are the prototypes of word2vec and set the initial assignment of other
    methods. Default: label c is assigned to prototype c."""
    scale: Positive | None = None
    """Scale of the logits in cross_entropy and ntce. Default: that of the method."""
    learn_scale: bool = False
    """Learn the scale, starting from `scale`."""
    margin: NonNegative = 0.0
    """Margin subtracted from the cosine of the target class in cross_entropy, in training only."""
    logit_adjustment: NonNegative = 0.0
    """Factor of the log class frequency added to the logits in cross_entropy, in training only, for long-tailed data.
    1: balanced softmax."""
    max_logits: PositiveInt = MAX_LOGITS
    """Largest number of logits (images of one process times classes) in memory at a time, in cross_entropy and in
    validation. Larger problems are computed in blocks of classes or images."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Label smoothing of cross_entropy. Default: that of the method."""
    normalize: bool | None = None
    """Compute cross_entropy from cosines (true) or from dot products with unnormalized features (false; for psc, the
    linear classifier W f + b). Default: false for kasarla, true for the other methods."""
    sub_prototypes: PositiveInt | None = None
    """Number of vectors per class (dnc and goto). Default: that of the method."""
    centroid_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Weight of the previous sub-centroid in an update (dnc). Default: that of the method."""
    gce_q: Fraction = 0.0
    """Exponent q of the generalized cross-entropy (Zhang and Sabuncu, 2018), (1 - p^q) / q in place of -log p, for data
    with wrong labels. 0: cross-entropy. 1: mean absolute error."""
    release_epoch: NonNegativeInt | None = None
    """Number of epochs after which the class vectors are trained by gradients, starting at the prototypes, as a control
    for fixed ones. 0: from the start. Default: never."""
    negatives: NegativesConfig = NegativesConfig()
    match: MatchConfig = MatchConfig()


class OptimConfig(Section):
    """Optimizer and learning rate schedule."""

    name: Literal["sgd", "adamw", "lars", "lamb"] = "sgd"
    """Optimizer. `lars` and `lamb`, for very large batches, are those of timm and need that package."""
    lr: Positive = 0.5
    """Peak learning rate, for the global batch; with `lr_scaling`, for a global batch of 256 images."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Rule that scales `lr` with the batch: `linear` multiplies it by `train.batch_size` / 256 (Goyal et al., 2017),
    `sqrt` by the square root of that (Krizhevsky, 2014). `none`: the rate is `lr`. `dl2pa config` and the log of a run
    print the resulting rate. Has no effect on `min_lr`."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum of sgd and lars."""
    nesterov: bool = False
    """Use Nesterov momentum (sgd and lars)."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay rates of the moment estimates of adamw and lamb."""
    weight_decay: NonNegative = 2e-5
    """Weight decay. Not applied to normalization layers, biases and other one-dimensional parameters unless
    `decay_all`."""
    decay_all: bool = False
    """Apply weight decay to every parameter, as in the CIFAR code of the DL2PA authors."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor of the learning rate from each layer of the backbone to the layer before it; the last layer has this
    factor, too. `dl2pa config FILE --groups` prints the layers. 1: one rate for all layers."""
    head_lr_scale: Positive = 1.0
    """Factor of the learning rate of everything after the backbone: projection and learned classifier."""
    clip_norm: NonNegative = 0.0
    """Maximum gradient norm. 0: no clipping."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Learning rate schedule after the warm-up."""
    warmup_epochs: NonNegative = 0.0
    """Length of the linear learning rate warm-up, in epochs (may be fractional). 0: no warm-up."""
    warmup_start: Fraction = 0.01
    """Learning rate at the first step of the warm-up, as a fraction of `lr`."""
    milestones: tuple[PositiveInt, ...] = ()
    """Epochs after which the step schedule multiplies the learning rate by `gamma`."""
    gamma: Positive = 0.1
    """Learning rate factor at each milestone."""
    min_lr: NonNegative = 0.0
    """Final learning rate of the cosine schedule."""


class TrainConfig(Section):
    """Length, batch size, precision, mixing and logging intervals of a run."""

    seed: NonNegativeInt = 0
    """Seed of weights, sample order, augmentation and mixing."""
    epochs: PositiveInt = 100
    """Number of training epochs."""
    max_steps: PositiveInt | None = None
    """Stop after this many steps in total, with a final validation (and a final assignment update if one is made at
    the end of an epoch). The learning rate schedule is still that of `epochs`. Default: no limit."""
    patience: PositiveInt | None = None
    """End the run after this many epochs without a better top-1 accuracy in validation. The epochs of
    `model.freeze_epochs` and `method.match.warmup_epochs` do not count. The schedule of the learning rate is still that
    of `epochs`. Default: train all epochs."""
    batch_size: PositiveInt = 1024
    """Global batch size, over all processes."""
    virtual_shards: PositiveInt | None = None
    """Number of equal parts of the global batch. The number of processes must divide it. Default: the largest number
    with at least 4 samples per part."""
    accumulate: PositiveInt | Literal["auto"] = 1
    """Number of micro-batches into which each process splits its part of the batch, to save memory. Batches and mixing
    stay the same; batch normalization uses the statistics of a micro-batch. `auto`: the fewest that fit in GPU memory;
    1 on a CPU."""
    checkpoint_activations: bool = False
    """Compute the activations of the backbone's blocks again in the backward pass instead of keeping them. The result
    stays the same."""
    eval_batch_size: PositiveInt | None = None
    """Global batch size of validation. Default: `batch_size`."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward and backward pass; `bf16` and `fp16` use automatic mixed precision."""
    compile: bool | Literal["graphs"] = False
    """Compile the network and the loss with torch.compile. `graphs`: also run each pass as one CUDA graph, which
    suits small networks."""
    deterministic: bool | None = None
    """Use deterministic algorithms. Default: true on the CPU, false on GPUs."""
    channels_last: bool | None = None
    """Use the channels_last memory format in the backbone. Default: where it is faster (convolutional networks)."""
    sync_bn: bool = False
    """Synchronize batch normalization statistics over all processes; needs GPUs."""
    mixup: NonNegative = 0.0
    """Alpha of the Beta distribution of mixup. 0: off."""
    cutmix: NonNegative = 0.0
    """Alpha of the Beta distribution of cutmix. 0: off. If mixup is also on, one of the two is chosen at random per
    step."""
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Decay of the exponential moving average of the weights, which is then the model evaluated and exported. 0:
    off."""
    log_every_steps: PositiveInt = 50
    """Number of steps between two logged training metrics."""
    eval_every_epochs: PositiveInt = 1
    """Number of epochs between validations. The last epoch is always validated."""
    profile: Annotated[int, Field(ge=0, le=1000)] = 0
    """Number of steps to profile in each attempt, from its 11th step on. Trace and table are written to RUN/profile.
    0: off."""


class CheckpointConfig(Section):
    """Checkpoint intervals and retention."""

    every_epochs: NonNegativeInt = 1
    """Number of epochs between checkpoints. 0: no checkpoints by epoch."""
    every_steps: NonNegativeInt = 0
    """Number of steps between additional checkpoints. 0: no checkpoints by step."""
    keep: PositiveInt = 2
    """Number of latest checkpoints to keep."""
    keep_best: bool = True
    """Also keep the checkpoint with the best validation accuracy."""


class TrackingConfig(Section):
    """Experiment tracking with MLflow."""

    enabled: bool = True
    """Record the run in MLflow."""
    uri: str | None = None
    """Address of the tracking server or store. `none`: write only the local spool. Default: the environment variable
    MLFLOW_TRACKING_URI; otherwise an SQLite file in the parent folder of the run directory, and in a SLURM job only the
    spool."""
    experiment: str = "dl2pa"
    """Name of the MLflow experiment."""
    run_name: str | None = None
    """Name of the MLflow run. Default: configuration file, method and seed."""
    tags: dict[str, str] = {}
    """Additional tags of the MLflow run."""
    figures: bool = True
    """Write the figures and the HTML and CSV pages of a finished run. False saves a few seconds per run."""
    system_every_s: NonNegative = 30.0
    """Time between two measurements of the system metrics of each node (CPU, memory, disk, network, GPUs), in
    seconds. Doubles after every 1,000 measurements. 0: off."""


class LaunchConfig(Section):
    """Processes and devices. These keys do not change the batches."""

    nproc: Literal["auto"] | PositiveInt = "auto"
    """Number of processes per machine. `auto`: one per visible GPU, one on a CPU; in a job of `dl2pa submit`, one per
    requested GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. `auto`: GPUs if available, otherwise the CPU."""
    threads: PositiveInt | None = None
    """CPU threads per process. Default: the CPU cores divided by the local processes."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Backend of torch.distributed. `auto`: nccl on GPUs, gloo on CPUs."""
    interface: str | None = None
    """Network interface of gloo and of nccl's TCP connections, such as ib0. Default: that of NCCL_SOCKET_IFNAME or
    GLOO_SOCKET_IFNAME; otherwise the interface that routes to node 0."""
    numa_binding: Literal["auto", "off", "node", "socket", "exclusive", "core-complex"] = "auto"
    """Bind each process to the CPU cores near its GPU, as torchrun's option of this name does. `auto`: `node` on
    machines with several NUMA nodes and the program numactl. No effect on results."""
    timeout_s: PositiveInt = 1800
    """Longest time a process waits for the others until the first step is done (compilation, uncached data), in
    seconds."""
    step_timeout_s: PositiveInt = 600
    """Longest time a process waits for the others after the first step, in seconds."""


class NotifyConfig(Section):
    """Messages about runs that have finished, failed, given up or stalled. They do not affect the run."""

    url: str | None = None
    """Webhook (http or https) that gets each message by POST, as JSON with a `text` that Slack shows. Only its host is
    printed and recorded."""
    command: str | tuple[str, ...] | None = None
    """Program that gets each message as JSON on its standard input. A list is run without a shell, a text by sh."""
    stalled_after_s: NonNegative = 1800.0
    """Time without progress in the log after which a message says that the run has stalled, in seconds. It should be
    longer than a validation and than `train.log_every_steps` steps. 0: no such messages."""
    timeout_s: Positive = 10.0
    """Longest time that each delivery may take, in seconds."""

    @field_validator("url")
    @classmethod
    def _hide(cls, value: str | None) -> str | None:
        if value:
            hide_address(value)
        return value or None

    @property
    def is_active(self) -> bool:
        """Whether messages are sent at all."""
        return self.url is not None or bool(self.command)


class Config(Section):
    """Configuration of a run."""

    data: DataConfig = Field(default_factory=DataConfig)  # a factory, because it reads DL2PA_DATA
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    launch: LaunchConfig = LaunchConfig()
    notify: NotifyConfig = NotifyConfig()

    @property
    def method_defaults(self) -> MethodSpec:
        """Defaults of the configured method."""
        return METHODS[self.method.name]

    @property
    def loss(self) -> str:
        """Effective loss."""
        return self.method.loss or self.method_defaults.loss

    @property
    def assignment(self) -> str:
        """Effective assignment."""
        return self.method.assignment or self.method_defaults.assignment

    @property
    def label_smoothing(self) -> float:
        """Effective label smoothing."""
        value = self.method.label_smoothing
        return self.method_defaults.label_smoothing if value is None else value

    @property
    def normalize(self) -> bool:
        """Effective `method.normalize`."""
        value = self.method.normalize
        return self.method_defaults.normalize if value is None else value

    @property
    def loader(self) -> str:
        """Effective loader."""
        spec = dataset_spec(self.data.dataset)
        return spec.loader if self.data.loader == "auto" or spec.layout == "generated" else self.data.loader

    @property
    def scaled_optim(self) -> OptimConfig:
        """Optimizer section with the peak learning rate that `optim.lr_scaling` gives."""
        ratio = self.train.batch_size / LR_BATCH
        factor = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.optim.lr_scaling]
        return self.optim.model_copy(update={"lr": self.optim.lr * factor})

    @property
    def virtual_shards(self) -> int:
        """Effective number of virtual shards of the global batch."""
        if self.train.virtual_shards:
            return self.train.virtual_shards
        batch = self.train.batch_size
        return max(v for v in range(1, batch + 1) if batch % v == 0 and (batch // v >= 4 or v == 1))
