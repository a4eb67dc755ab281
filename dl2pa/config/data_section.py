"""Section `data` of a configuration. Every default is defined here.

The docstrings of the fields are the reference that `dl2pa config --explain` and docs/configuration.md print.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dl2pa import envvars
from dl2pa.config.section import Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt, Section, Triple
from dl2pa.errors import UserError
from dl2pa.specs import DATASETS, IMAGE_FOLDER, OWN_PATTERN, is_own

HueShift = Annotated[float, Field(ge=0.0, le=0.5)]


class DataConfig(Section):
    """Data set, image loading, cropping and augmentation."""

    dataset: (
        Literal[tuple(DATASETS)]  # pyright: ignore[reportInvalidTypeForm]
        | Annotated[str, Field(pattern=OWN_PATTERN)]
    ) = IMAGE_FOLDER
    """Data set, or layout of its files, or `package.module:function`, your own table of images (docs/data.md).
    `features`: written by `dl2pa features`. `synthetic` needs no files. `svhn_lt_legacy` is the long-tailed SVHN of the
    DL2PA authors' code, in which a third of the training labels are wrong."""
    root: str | None = None
    """Folder of the data set, or `s3://BUCKET/PREFIX` for tar shards in object storage (docs/data.md). Default: the
    environment variable DL2PA_DATA."""
    index: str | None = None
    """Index file of `root`, written by `dl2pa data index`. Default: `root`/dl2pa.index if it exists; otherwise the
    folders are listed."""
    val_root: str | None = None
    """Validation folder (imagefolder only). Default: `root`/val."""
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Fraction of the training images of each class that are the validation split, for class folders without one, and
    for array data sets and features, for example to choose settings without their test images. The same images in
    every run: the selection depends on their paths or positions, not on `train.seed`. Default: the validation split of
    the data set is used."""
    calibration_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Fraction of the training images of each class that are not trained on, but used after training to fit the
    temperature of the probabilities. They are drawn from the images that `val_fraction` and `imbalance` leave, the same
    ones in every run. 0: the temperature is fitted on the validation images."""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Expected number of classes, checked against the data. Required for `synthetic`. Default: not checked."""
    imbalance: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Make the training split long-tailed: number of images of the last class divided by that of the first. The
    validation split is not changed, and the selection does not depend on `train.seed`. Default: use all images."""
    label_noise: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability that the label of a training image is replaced by one of the other classes, to measure the effect of
    wrong labels. The validation split is not changed, and the labels do not depend on `train.seed`."""
    label_noise_seed: NonNegativeInt = 0
    """Seed of the wrong labels."""
    classes: str | tuple[str, ...] | None = None
    """Class names in label order: a list, or a file with one name per line. May include classes without images.
    Default: the classes of the training split."""
    loader: Literal["auto", "dali", "torchvision", "resident", "synthetic"] = "auto"
    """Data loader. `auto`: `resident` (all images in device memory) for array data sets, `dali` for image files,
    `synthetic` for synthetic data."""
    image_size: PositiveInt = 224
    """Side length of the training and validation crops, in pixels."""
    eval_resize: PositiveInt = 256
    """Length of the shorter side before the center crop in validation, in pixels (image files only)."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter that resizes images, in training and validation; antialiased. Like `image_size`, `eval_resize`, `mean` and
    `std`, it follows the weights of `model.init` unless it is set."""
    crop: Literal["random_resized", "pad", "none"] = "random_resized"
    """Random crop in training: `random_resized` for image files, `pad` (zero padding, then a crop) for resident
    arrays, or `none`."""
    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Smallest and largest fraction of the image area in a random resized crop."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of a random resized crop."""
    pad: NonNegativeInt = 4
    """Zero padding on each side of a resident image before its random crop, in pixels."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip in training."""
    trivial_augment: bool = False
    """Apply TrivialAugment Wide to training images."""
    rand_augment: Annotated[int, Field(ge=0, le=14)] = 0
    """Number of RandAugment operations per training image; instead of `trivial_augment`. 0: off."""
    rand_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Magnitude of the RandAugment operations."""
    color_jitter: tuple[NonNegative, NonNegative, NonNegative, HueShift] = (0.0, 0.0, 0.0, 0.0)
    """Largest random changes of brightness, contrast, saturation and hue of training images, for example [0.4, 0.4,
    0.4, 0.1]. The first three change by a factor between 1 - s and 1 + s, the hue by at most s of the color circle.
    Follows TrivialAugment or RandAugment. 0: unchanged."""
    erasing: Fraction = 0.0
    """Probability of RandomErasing in training."""
    mean: Triple = (0.485, 0.456, 0.406)
    """Mean per RGB channel, subtracted from pixel values in [0, 1]. Default: ImageNet."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation per RGB channel, by which pixel values are divided. Default: ImageNet."""
    threads: PositiveInt | None = None
    """Decoding threads per process. Default: the CPU cores divided by the local processes."""
    hw_decoder_load: Fraction = 0.65
    """Fraction of the JPEG images that DALI gives to the hardware decoder of a GPU that has one; the GPU's cores decode
    the others. 0: none."""
    hw_decoder_size: tuple[NonNegativeInt, NonNegativeInt] = (0, 0)
    """Width and height of the images for which DALI allocates the buffers of the hardware decoder at the start, in
    pixels. [0, 0]: allocate as needed."""
    max_bad_fraction: Fraction = 0.01
    """Largest fraction of unreadable training images; the run fails above it."""
    max_bad_val_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Largest fraction of unreadable validation images. They are skipped and counted in `num_missing`. 0: the first
    unreadable image is an error."""
    read_warn_s: Positive = 30.0
    """Time after which a pending image read is logged, in seconds."""
    read_timeout_s: Positive = 300.0
    """Time after which a pending image read fails the run, in seconds."""
    s3_cache_dir: str | None = None
    """Folder on a disk of the node in which blocks of shards from object storage are kept. Default: `dl2pa-UID/s3` in
    the folder of temporary files (TMPDIR), or `dl2pa-UID-1` and so on if another user has created a
    folder of that name."""
    s3_cache_gib: NonNegative = 50.0
    """Size limit of that folder, in GiB. At least 5 % of the file system stays free. 0: keep no blocks."""
    s3_timeout_s: Positive = 30.0
    """Time after which a request to object storage is repeated, in seconds."""
    s3_retry_s: Positive = 120.0
    """Time for which a failing request is repeated before the run fails, in seconds. The same command continues."""
    synthetic_samples: tuple[PositiveInt, PositiveInt] = (4096, 512)
    """Number of training and validation images of the synthetic data set."""

    @field_validator("root")
    @classmethod
    def _empty_is_unset(cls, value: str | None) -> str | None:
        return value or None

    @field_validator("dataset", mode="before")
    @classmethod
    def _named_function(cls, value: object) -> object:
        if isinstance(value, str) and ":" in value and not is_own(value):
            message = "is not the name of a function"
            raise UserError("data.dataset", value, message, "Write package.module:function.")
        if isinstance(value, str) and "." in value and is_own(function := ":".join(value.rsplit(".", 1))):
            raise UserError("data.dataset", value, "is not a data set", f"For a function, write {function}.")
        return value

    @model_validator(mode="before")
    @classmethod
    def _root_from_environment(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("root") is None and os.environ.get(envvars.DATA):
            spec = DATASETS.get(str(values.get("dataset", IMAGE_FOLDER)))
            if spec is None or spec.needs_root:
                return {**values, "root": os.environ[envvars.DATA]}
        return values  # pyright: ignore[reportUnknownVariableType]
