"""What a recipe may say: frozen sections with units, ranges and defaults. No torch here.

A section whose settings depend on its name (norm, optimizer, schedule) is a union by that name, so a setting that would
be ignored is an unknown key. Reading files, `--set` and error places are in `recipe_file.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.functional_validators import AfterValidator

from bln_train.errors import UsageError

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """Frozen, strict (no silent casts), and closed (an unknown key is an error)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Augment(Section):
    """Random changes of a training image; drawn per (seed, epoch, image), so the split cannot change them."""

    flip: bool = True
    """Mirror left-right with probability 1/2."""
    crop_padding: Annotated[int, Field(ge=0)] = 4
    """Reflect-pad by this many pixels and crop back at a random place; 0 turns it off."""
    cutout: Annotated[int, Field(ge=0)] = 0
    """Side of a square, in pixels, replaced by the channel mean; 0 turns it off."""


class Data(Section):
    """Which images."""

    name: Literal["cifar10", "cifar100", "folder", "shapes"]
    """`cifar10` and `cifar100` (downloaded, or an image folder at `root`), `folder` (`root/train/<class>/*`,
    `root/test/<class>/*`), `shapes` (drawn by the program, nothing to download)."""
    root: str | None = None
    """Where the images are; default $BLN_DATA, else ~/.cache/bln-train."""
    download: bool = True
    """Fetch CIFAR when it is not at `root`."""
    num_train: Positive | None = None
    """Size of a seeded, class-balanced subset of the training images; default all (shapes: 5000)."""
    validation_fraction: Fraction = 0.0
    """Part of each class's training images (of the subset, with num_train) that is not trained on: evaluation during training
    is then on it, and on the test images once, at the end. The same images for every norm, batch size and train.seed."""
    num_test: Positive | None = None
    """Size of such a subset of the test images (shapes: 1000)."""
    image_size: Annotated[int, Field(ge=8)] | None = None
    """Side in pixels to which a folder's images are scaled and centre-cropped; default 32. Folders only."""
    normalize: Literal["standardize", "symmetric"] = "standardize"
    """`standardize`: each colour channel to mean 0, standard deviation 1 over the training images; `symmetric`: to
    [-1, 1]."""
    augment: Augment = Augment()

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.image_size is not None and self.name != "folder":
            raise ValueError(f"image_size: {self.name} images have a fixed size; only `folder` can be scaled")
        if self.name == "shapes" and self.root is not None:
            raise ValueError("root: shapes are drawn by the program; leave it out")
        if self.name == "folder" and self.root is None:
            raise ValueError("root: a folder needs one, with train/<class>/* and test/<class>/* inside")
        return self


class Model(Section):
    """Which network."""

    name: str
    """`resnet8|20|32|44|56|110` (He et al. 2015, for CIFAR), `resnet18` (32x32 stem), `wrn<depth>_<width>`,
    `paper_cnn`, or a classification model that has BatchNorm: `torchvision:<name>`, `timm:<name>`."""
    init: str | None = None
    """Trained weights to start from: a state dict file of the model with BatchNorm, or what `bln-train migrate` made of one, or
    `pretrained` for the library's own; for `batchless`, `batch` and `batch-frozen`, whose statistics then come from it and
    not from the images."""
    shortcut: Literal["A", "B"] | None = None
    """CIFAR ResNets: A pads channels with zeros (default), B projects with a 1x1 convolution."""
    weight_standardization: bool | Literal["auto"] = "auto"
    """Scaled weight standardisation of the convolutions; auto is on for `batchless` and `group`,
    off with `init`, whose function it would change."""
    zero_init_residual: bool = False
    """ResNets: start the last scale of each residual block at 0."""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Number of outputs; default that of the data, and it must agree with it."""

    @model_validator(mode="after")
    def _check(self) -> Model:
        from bln_train.models.names import check_model_name, is_foreign  # a table of names, no torch

        problem = check_model_name(self.name)
        if problem:
            raise ValueError(f"name: {problem}")
        if self.shortcut and not (self.name.startswith("resnet") and self.name != "resnet18"):
            raise ValueError(f"shortcut: only the CIFAR ResNets have a choice; {self.name} does not")
        foreign = is_foreign(self.name)
        if self.init == "pretrained" and not foreign:
            raise ValueError(f"init: there are no published weights of {self.name}; give a file")
        if self.init == "":
            raise ValueError("init: is empty; give a file, `pretrained`, or null for none")
        if self.init is not None and self.weight_standardization is True:
            raise ValueError("weight_standardization: would change what the weights of init compute; leave it out")
        if self.zero_init_residual and foreign:
            raise ValueError(
                f"zero_init_residual: {self.name} is built as {self.name.partition(':')[0]} builds it; leave it out"
            )
        if self.zero_init_residual and self.init is not None:
            raise ValueError("zero_init_residual: the weights of init bring their scales; leave it out")
        if self.zero_init_residual and not self.name.startswith("resnet"):
            raise ValueError(f"zero_init_residual: {self.name} has no norm at the end of a residual block")
        return self


DEFAULT_INIT_IMAGES = 128
_PAPER = {"statistics": "gradient", "eps": 1e-5, "correction_rate": 0.0, "probe_images": 0}
NORM_PRESETS: dict[str, dict[str, Any]] = {
    "batchless": {"parametrization": "log", "statistics": "natural"},
    "batchless-paper": {"parametrization": "log", **_PAPER},
    "batchless-paper-abs": {"parametrization": "abs", **_PAPER},
    "batchless-paper-inv": {"parametrization": "inv", **_PAPER},
}


class BatchlessNormSection(Section):
    """Batchless Normalization; the presets differ in the defaults of the settings below."""

    name: Literal["batchless", "batchless-paper", "batchless-paper-abs", "batchless-paper-inv"]
    parametrization: Literal["log", "abs", "inv", "var"]
    """What is stored for the standard deviation: its logarithm, |s|+eps, its inverse, or the variance."""
    share: Literal["channel", "layer"] = "channel"
    """One mean and standard deviation per channel, or one pair for the whole layer."""
    eps: PositiveFloat = 1e-3
    """The smallest standard deviation that data can set; `abs` adds it to |s|, `inv` to |s| before inverting. The paper's
    presets take 1e-5."""
    statistics: Literal["natural", "gradient"]
    """`natural`: scale-free moving averages after each step; `gradient`: parameters of the optimizer, as in the
    paper."""
    statistics_rate: PositiveFloat | None = None
    """natural: rate of the moving averages, at most 1, outside the schedule, default 0.1; gradient: learning rate of the
    statistics (under the schedule), default that of the weights."""
    nll_weight: PositiveFloat = 1.0
    """Weight of the likelihood in the loss; `gradient` only, a natural gradient does not depend on it."""
    nll_reduction: Literal["mean", "sum"] = "mean"
    """Over channels: the paper's mean, or their sum; `gradient` only."""
    gauge: bool = True
    """Report the likelihood shifted to be 0 for inputs that follow the statistics; changes no gradient."""
    correction_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Rate of the running backward correction; 0 turns it off."""
    correction_mode: Literal["auto", "exact", "imputed"] = "auto"
    """Where a folded norm's correction takes the normalised input from: `exact` runs the convolution again, `imputed` reads
    it off the output and takes a constant where a relu cut it off; auto is imputed where there are a fold and a probe."""
    probe_images: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """First images of each batch, on which the statistics follow the weights after the step; at most an effective batch; 0
    turns it off; auto takes as many, from 4 to 8, as need no more memory without gradients than one image with them."""
    probe_gain: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the change on those images that the statistics follow at once."""
    init_images: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Training images from which the statistics are initialised; 0 starts from mean 0, standard deviation 1; auto is 128, or
    none with model.init, which brings them."""
    init_cache: bool = False
    """Initialise in one evaluation of those images instead of one for each layer in depth, with their activations in host
    memory."""
    reestimate_images: Annotated[int, Field(ge=0)] = 0
    """With model.init: training images on which the trained statistics are measured anew before the first step; weight and
    bias take up the change, so that the network computes what it did. 0 keeps the trained ones."""
    fold: bool = True
    """Run convolution, norm and relu as one operation, which keeps no tensor of its own for backward."""

    @property
    def resolved_correction_mode(self) -> Literal["exact", "imputed"]:
        """`correction_mode`, auto resolved."""
        if self.correction_mode != "auto":
            return self.correction_mode
        return "imputed" if self.fold and self.probe_images and self.correction_rate else "exact"

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        filled = {**NORM_PRESETS.get(str(data.get("name")), {}), **data}
        if filled.get("statistics") == "natural":
            filled.setdefault("statistics_rate", 0.1)
        return filled

    @model_validator(mode="after")
    def _check(self) -> BatchlessNormSection:
        if self.init_cache and not self.init_images:
            raise ValueError("init_cache: there is nothing to initialise with init_images 0")
        if self.correction_mode == "imputed":
            for key, missing in (("fold", not self.fold), ("probe_images", not self.probe_images)):
                if missing:
                    raise ValueError(
                        f"correction_mode: imputed works in folded norms and is measured on the probe; set {key}"
                    )
        if self.correction_mode != "auto" and not self.correction_rate:
            raise ValueError("correction_mode: there is no correction with correction_rate 0")
        if self.statistics == "natural":
            if self.statistics_rate is None or self.statistics_rate > 1:
                raise ValueError("statistics_rate: natural statistics need a rate of at most 1")
            for key, neutral in (("nll_weight", 1.0), ("nll_reduction", "mean")):
                if getattr(self, key) != neutral:
                    raise ValueError(
                        f"{key}: natural statistics do not depend on it; set statistics_rate, or statistics: gradient"
                    )
        return self


class GroupNormSection(Section):
    """Group normalisation (Wu & He 2018)."""

    name: Literal["group"]
    num_groups: Positive = 8
    """Groups of each layer; a layer whose channels do not divide uses the greatest common divisor."""


class BatchNormSection(Section):
    """Batch normalisation over each micro-batch, or with statistics frozen after initialisation."""

    name: Literal["batch", "batch-frozen"]
    momentum: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Rate of the running averages that evaluation uses; `batch` only."""
    init_images: Positive | Literal["auto"] = "auto"
    """Training images from which frozen statistics are taken, `batch-frozen` only; auto is 128, or none with model.init, which
    brings them."""

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: Any) -> Any:
        if isinstance(data, dict):
            foreign = {"batch": "init_images", "batch-frozen": "momentum"}.get(str(data.get("name")))
            if foreign and foreign in data and data[foreign] != cls.model_fields[foreign].default:
                raise ValueError(f"{foreign}: {data['name']} does not use it")
        return data


class PlainNormSection(Section):
    """Norms without settings: layer (over channels and space), instance (per channel, over space), none."""

    name: Literal["layer", "instance", "none"]


Norm = Annotated[
    BatchlessNormSection | GroupNormSection | BatchNormSection | PlainNormSection, Field(discriminator="name")
]
NORM_NAMES: tuple[str, ...] = tuple(
    name for section in get_args(get_args(Norm)[0]) for name in get_args(section.model_fields["name"].annotation)
)


class _Optimizer(Section):
    lr: PositiveFloat
    """Peak learning rate."""
    weight_decay: NonNegative = 5e-4
    """On convolution and linear weights only; not on biases, norms and statistics."""
    clip_norm: PositiveFloat | Literal["auto"] | None = "auto"
    """Bound on the global gradient norm; auto is 1.0 for `batchless` and none for every other norm, and where gradients
    gather in the momentum, which `clip_update` bounds."""


class SgdSection(_Optimizer):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"]
    momentum: Fraction = 0.9
    nesterov: bool = False
    accumulate_into: Literal["gradient", "momentum"] = "gradient"
    """`momentum`: gradients of convolution and linear weights gather in the momentum buffer, which saves a buffer of the
    weights' size and computes the same; not with `nesterov`, `clip_norm`, fp16 or a momentum of 0."""
    clip_update: PositiveFloat | Literal["auto"] | None = "auto"
    """With `accumulate_into: momentum`, bound on the global norm of the momentum buffers times (1 - momentum), the step's
    gradient and weight decay in them; auto is 1.0 for `batchless` and none for every other norm."""

    @model_validator(mode="after")
    def _check(self) -> SgdSection:
        problems = []
        if self.nesterov and self.momentum == 0 and self.accumulate_into == "gradient":
            problems.append("nesterov: needs a momentum above 0")
        if self.accumulate_into == "gradient" and isinstance(self.clip_update, float):
            problems.append(
                "clip_update: clips momentum that gradients gather in; set accumulate_into: momentum, or set clip_norm instead"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


class AdamSection(_Optimizer):
    """Adam (L2 penalty in the gradient) or AdamW (decoupled weight decay)."""

    name: Literal["adam", "adamw"]
    weight_decay: NonNegative = 0.0
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


Optimizer = Annotated[SgdSection | AdamSection, Field(discriminator="name")]


class _Schedule(Section):
    warmup_epochs: NonNegative = 0.0
    """Linear rise from 0, in epochs; fractions allowed."""


class CosineSection(_Schedule):
    """Half a cosine from the peak rate down to `final_fraction` of it."""

    name: Literal["cosine"]
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0


class StepSection(_Schedule):
    """Multiply the rate by `gamma` at each milestone."""

    name: Literal["step"]
    milestones: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False)]
    """Epochs, rising."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _check(self) -> StepSection:
        if not self.milestones or list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones: name at least one epoch, in rising order")
        return self


class ConstantSection(_Schedule):
    """The peak rate throughout."""

    name: Literal["constant"]


Schedule = Annotated[CosineSection | StepSection | ConstantSection, Field(discriminator="name")]


class Train(Section):
    """How long, in which slices, at which precision."""

    epochs: Positive
    max_steps: Positive | None = None
    """Stop after this many optimizer steps even if epochs are left; the schedule still spans all epochs."""
    effective_batch_size: Positive = 128
    """Images behind one optimizer step."""
    micro_batch_size: Positive
    """Images in memory at once; down to 1, at most the effective batch."""
    eval_batch_size: Positive | Literal["auto"] = "auto"
    """Images evaluated at once; auto is four times the micro-batch, at most 256: less memory than training takes."""
    eval_every_epochs: Positive = 1
    label_smoothing: Fraction = 0.0
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16 and fp16 are autocast with fp32 weights; tf32 rounds the factors of products; fp16 and tf32 need CUDA; fp64 is for
    checking exactness."""
    channels_last: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="after")
    def _check(self) -> Train:
        if self.micro_batch_size > self.effective_batch_size:
            raise ValueError(
                f"micro_batch_size: {self.micro_batch_size} is above effective_batch_size {self.effective_batch_size}"
            )
        return self


Device = Annotated[str, AfterValidator(lambda d: _check_device(d))]


class Runtime(Section):
    """Where and how it runs; nothing here may change the result beyond rounding."""

    device: Device = "auto"
    """`auto` (CUDA if present), `cpu`, `cuda` or `cuda:<index>`."""
    num_threads: Positive | None = None
    """CPU threads; default PyTorch's."""
    compiled: bool = True
    """On a CPU, folded norms run kernels that the system's C compiler builds once, where there is one; false: PyTorch's
    operators, slower, the same up to rounding."""
    deterministic: bool = False
    """Only algorithms that repeat bit for bit on CUDA (slower); the CPU always does."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its algorithms on CUDA: faster, with more workspace memory than it would choose by itself."""
    log_every_steps: Positive = 10
    checkpoint_every_steps: Positive | None = None
    """Besides the checkpoint at the end of each epoch."""


def _check_device(device: str) -> str:
    kind, _, index = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isascii() and index.isdigit()):
        raise ValueError("is `auto`, `cpu`, `cuda` or `cuda:<index>`")
    return device


class Recipe(Section):
    """A whole experiment."""

    data: Data
    model: Model
    norm: Norm
    train: Train
    optimizer: Optimizer
    schedule: Schedule = Field(default_factory=lambda: ConstantSection(name="constant"))
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        problems = []
        classes = {"cifar10": 10, "cifar100": 100, "shapes": 10}.get(self.data.name)
        if classes and self.model.num_classes not in (None, classes):
            problems.append(f"model.num_classes: {self.model.num_classes}, but {self.data.name} has {classes} classes")
        if self.model.init is not None and not isinstance(self.norm, BatchlessNormSection | BatchNormSection):
            problems.append(
                f"model.init: norm {self.norm.name} would throw the trained statistics away; "
                "use batchless, batch or batch-frozen"
            )
        elif self.model.init is not None and getattr(self.norm, "share", "channel") == "layer":
            problems.append("norm.share: with model.init, statistics are those of each channel; use channel")
        if isinstance(self.norm, BatchlessNormSection):
            if self.model.init is None and self.norm.reestimate_images:
                problems.append(
                    "norm.reestimate_images: measures trained statistics anew; set model.init, or leave it out"
                )
            if self.model.init is not None and self.norm.init_cache:
                problems.append("norm.init_cache: with model.init nothing is initialised from images; leave it out")
        if self.model.init is not None and getattr(self.norm, "init_images", "auto") not in ("auto", 0):
            problems.append("norm.init_images: with model.init the statistics are the trained ones; leave it out")
        if self.train.precision in ("fp16", "tf32") and self.runtime.device == "cpu":
            problems.append(f"train.precision: {self.train.precision} needs CUDA; use bf16 or fp32 on the CPU")
        if self.schedule.warmup_epochs >= self.train.epochs:
            problems.append(
                f"schedule.warmup_epochs: {self.schedule.warmup_epochs} leaves nothing of {self.train.epochs} epochs"
            )
        if self.accumulates_into_momentum:
            problems += self._problems_of_momentum()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems_of_momentum(self) -> list[str]:
        """What needs a gradient apart from the momentum, or has no momentum; here, not in the section: all at once."""
        section, way_out = self.optimizer, "or accumulate_into: gradient"
        assert isinstance(section, SgdSection)
        problems = []
        if section.nesterov:
            problems.append(
                f"optimizer.nesterov: adds the gradient once more to the update, and accumulate_into: momentum keeps none "
                f"apart; set it to false, {way_out}"
            )
        if section.momentum == 0:
            problems.append(f"optimizer.momentum: is 0, so there is no buffer to accumulate into; raise it, {way_out}")
        if isinstance(section.clip_norm, float):
            problems.append(
                f"optimizer.clip_norm: accumulate_into: momentum keeps no gradient to clip; set clip_update instead and "
                f"clip_norm to auto or null, {way_out}"
            )
        if self.train.precision == "fp16":
            problems.append(
                f"train.precision: the loss scale of fp16 would scale the momentum that gradients gather in; use bf16, "
                f"or optimizer.{way_out.removeprefix('or ')}"
            )
        return problems

    @property
    def accumulates_into_momentum(self) -> bool:
        """Whether gradients of weights gather in the momentum buffer."""
        return isinstance(self.optimizer, SgdSection) and self.optimizer.accumulate_into == "momentum"

    @property
    def weight_standardization(self) -> bool:
        """Whether convolutions are standardised, `auto` resolved."""
        setting = self.model.weight_standardization
        if setting == "auto":
            return self.norm.name in ("batchless", "group") and self.model.init is None
        return setting

    @property
    def num_init_images(self) -> int:
        """Training images from which the norms' statistics are taken before the first step, `auto` resolved."""
        if self.norm.name == "batch" or self.model.init is not None:
            return 0
        setting = getattr(self.norm, "init_images", 0)
        return DEFAULT_INIT_IMAGES if setting == "auto" else int(setting)

    @property
    def clip_norm(self) -> float | None:
        """Bound on the gradient norm, `auto` resolved; None where gradients gather in the momentum."""
        setting = self.optimizer.clip_norm
        auto = 1.0 if self.norm.name == "batchless" and not self.accumulates_into_momentum else None
        return auto if setting == "auto" else setting

    @property
    def clip_update(self) -> float | None:
        """Bound on the momentum's norm times (1 - momentum), `auto` resolved; None where gradients have their own place."""
        if not isinstance(self.optimizer, SgdSection) or self.optimizer.accumulate_into == "gradient":
            return None
        setting = self.optimizer.clip_update
        return (1.0 if self.norm.name == "batchless" else None) if setting == "auto" else setting

    def untrained(self) -> Recipe:
        """The same network from drawn weights, for any norm: without model.init, and with standardisation as that has it."""
        if self.model.init is None:
            return self
        change = {"init": None, "weight_standardization": self.weight_standardization}
        norm = self.norm
        if isinstance(norm, BatchlessNormSection):
            norm = norm.model_copy(update={"reestimate_images": 0})
        return self.model_copy(update={"model": self.model.model_copy(update=change), "norm": norm})

    def with_norm(self, name: str) -> Recipe:
        """The same recipe with another norm, or unchanged where that norm is the recipe's own.

        The other norm is at its defaults, except that it is initialised from as many images, if it is from any: that many are
        a property of the experiment, not of the norm.

        Raises UsageError for a norm that is unknown or that the recipe excludes.
        """
        if name not in NORM_NAMES:
            raise UsageError(f"unknown norm '{name}'", f"Norms: {', '.join(NORM_NAMES)}.")
        if name == self.norm.name:
            return self
        try:
            other = Recipe.model_validate({**self.model_dump(), "norm": {"name": name}})
            if self.num_init_images and other.num_init_images:
                section = {"name": name, "init_images": self.num_init_images}
                other = Recipe.model_validate({**self.model_dump(), "norm": section})
            return other
        except ValidationError as error:  # a norm that another setting excludes
            problems = [str(detail.get("ctx", {}).get("error", detail["msg"])) for detail in error.errors()]
            raise UsageError("\n".join(problems)) from error
