"""All sections of a recipe except its norm: frozen, with units, ranges and defaults. No torch here.

A section whose settings depend on its name is a union by that name: optimizer, schedule, and the norm in `norms.py`. So
a setting that would be ignored is an unknown key.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.functional_validators import AfterValidator

from bln_train.system.units import parse_bytes

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
    """Images of a seeded, class-balanced subset of the training images; default all (shapes: 5000)."""
    validation_fraction: Fraction = 0.0
    """Part of each class's training images (of the subset, with num_train) that is not trained on: evaluation during training
    is then on it, and on the test images once, at the end. The same images for every norm, batch size and train.seed."""
    num_test: Positive | None = None
    """Images of such a subset of the test images; default all (shapes: 1000)."""
    image_size: Annotated[int, Field(ge=8)] | None = None
    """Side in pixels to which a folder's images are scaled and centre-cropped; default 32. Folders only."""
    normalize: Literal["standardize", "symmetric"] = "standardize"
    """`standardize`: each colour channel to mean 0, standard deviation 1 over the training images; `symmetric`: to
    [-1, 1]."""
    augment: Augment = Augment()
    """Random changes of training images; `{flip: false, crop_padding: 0}` for none."""

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
    """Scaled weight standardisation of the convolutions; auto is on for `batchless`, `batchless-plain` and `group`,
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


class _Optimizer(Section):
    lr: PositiveFloat
    """Peak learning rate, in weights per gradient; the schedule scales it."""
    weight_decay: NonNegative = 5e-4
    """Factor of the weights in their gradient; on convolution and linear weights only, not on biases, norms and statistics."""
    clip_norm: PositiveFloat | None = 1.0
    """Bound on the global norm of the effective batch's mean gradient; null for none; default 1, and with model.init
    0.1 / lr, whatever the norm: a step is then at most 0.1 long before momentum."""


class SgdSection(_Optimizer):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"]
    """Stochastic gradient descent with momentum."""
    momentum: Fraction = 0.9
    """Share of the last update that goes on in the next."""
    nesterov: bool = False
    """Nesterov's momentum: the gradient enters the update once more."""
    accumulate_into: Literal["gradient", "momentum"] = "gradient"
    """`momentum`: gradients of convolution and linear weights gather in the momentum buffer, which saves a buffer of the
    weights' size; not with `nesterov`, fp16 or a momentum of 0. No gradient is then left to bound: `clip_norm` bounds the global
    norm of the momentum buffers times (1 - momentum), the step's gradient and weight decay in them. With `clip_norm: null` both
    compute the same."""

    @model_validator(mode="after")
    def _check(self) -> SgdSection:
        if self.nesterov and self.momentum == 0 and self.accumulate_into == "gradient":
            raise ValueError("nesterov: needs a momentum above 0")
        return self


class AdamSection(_Optimizer):
    """Adam (L2 penalty in the gradient) or AdamW (decoupled weight decay)."""

    name: Literal["adam", "adamw"]
    """`adam`: weight decay is part of the gradient; `adamw`: it is not, and scales with the rate alone."""
    weight_decay: NonNegative = 0.0
    """Factor of the weights in their gradient (adam) or update (adamw); on convolution and linear weights only."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    """Shares of the running means of the gradient and of its square that are kept at each step."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the mean square, in units of a gradient."""


Optimizer = Annotated[SgdSection | AdamSection, Field(discriminator="name")]


class _Schedule(Section):
    warmup_epochs: NonNegative = 0.0
    """Epochs of linear rise from 0, out of those of the run; fractions allowed."""


class CosineSection(_Schedule):
    """Half a cosine from the peak rate down to `final_fraction` of it."""

    name: Literal["cosine"]
    """Half a cosine over all epochs."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fraction of the peak rate that is left at the end."""


class StepSection(_Schedule):
    """Multiply the rate by `gamma` at each milestone."""

    name: Literal["step"]
    """Lower the rate at milestones."""
    milestones: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False)]
    """Epochs, rising."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor of the rate at each milestone."""

    @model_validator(mode="after")
    def _check(self) -> StepSection:
        if not self.milestones or list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones: name at least one epoch, in rising order")
        return self


class ConstantSection(_Schedule):
    """The peak rate throughout."""

    name: Literal["constant"]
    """The peak rate throughout."""


Schedule = Annotated[CosineSection | StepSection | ConstantSection, Field(discriminator="name")]


class Train(Section):
    """How long, in which slices, at which precision."""

    epochs: Positive
    """Passes over the training images; the schedule spans them."""
    max_steps: Positive | None = None
    """Stop after this many optimizer steps even if epochs are left; the schedule still spans all epochs."""
    effective_batch_size: Positive = 128
    """Images behind one optimizer step."""
    micro_batch_size: Positive | Literal["auto"]
    """Images in memory at once; down to 1, at most the effective batch. `auto`: of those that fit the memory budget the fastest,
    found out before the first step; only with `norm: batch` does it change the result."""
    memory_budget: Annotated[str, AfterValidator(lambda text: _check_bytes(text))] | None = None
    """Memory that training may take of the device, as in `4GiB`, CUDA's context included; more is refused before the first step,
    and on CUDA never allocated. Default with `auto`: what is free, less a tenth and at least 256 MiB."""
    eval_batch_size: Positive | Literal["auto"] = "auto"
    """Images evaluated at once; auto is four times the micro-batch, at most 256: less memory than training takes."""
    eval_every_epochs: Positive = 1
    """Epochs from one evaluation to the next; there is always one at the end."""
    label_smoothing: Fraction = 0.0
    """Share of each label's weight that is spread evenly over all classes."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite is never taken: `stop` ends the run there, `skip` goes on with the next, up to
    ten times in a row. An overflow of fp16, which lowers its loss scale, is neither."""
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16 and fp16 are autocast with fp32 weights; tf32 rounds the factors of products; fp16 and tf32 need CUDA; fp64 is for
    checking exactness."""
    channels_last: bool = True
    """Keep images and filters with their channels innermost, which is faster for most networks."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Number that weights, order, augmentation and dropout are drawn from: the same number, the same run."""

    @model_validator(mode="after")
    def _check(self) -> Train:
        if self.micro_batch_size != "auto" and self.micro_batch_size > self.effective_batch_size:
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
    """Folded norms run kernels that are compiled once: on a CPU by the system's C compiler, on CUDA by Triton, which comes with
    PyTorch for Linux (compute capability 7.0 or more). Where that cannot be, and with false: PyTorch's operators, slower, the
    same up to rounding."""
    graphs: Literal["auto"] | bool = "auto"
    """On CUDA, record a step's work once and replay it, which launches all its kernels at once: for one more micro-batch's
    activations in memory. `auto`: where micro-batches are small, up to 131,072 pixels."""
    deterministic: bool = False
    """Only algorithms that repeat bit for bit on CUDA (slower); the CPU always does."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its algorithms on CUDA: faster, with more workspace memory than it would choose by itself."""
    log_every_steps: Positive = 10
    """Steps from one record of a step in `metrics.jsonl` to the next."""
    checkpoint_every_steps: Positive | None = None
    """Steps from one checkpoint to the next, besides those at the end of each epoch and every 5 minutes; default none."""
    keep_checkpoints: Positive = 2
    """Checkpoints there are at a time, the latest included: if that is damaged, a run resumes from the one before it."""
    process_timeout_seconds: Positive = 600
    """Seconds that under torchrun one process waits for another, a download or a whole evaluation included, before all end."""


class Logging(Section):
    """What is written besides the run folder's own files; nothing here may change the result."""

    tensorboard: bool = False
    """Event files for TensorBoard in the run folder, which needs the package (`pip install 'bln-train[tensorboard]'`):
    `tensorboard --logdir runs`."""


def _check_bytes(text: str) -> str:
    parse_bytes(text)
    return text


def _check_device(device: str) -> str:
    kind, _, index = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isascii() and index.isdigit()):
        raise ValueError("is `auto`, `cpu`, `cuda` or `cuda:<index>`")
    return device
