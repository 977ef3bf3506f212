"""What a whole recipe may say, and what its settings mean together. No torch here.

Reading files, `--set` and error places are in `load.py`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from bln_train.errors import UsageError
from bln_train.recipe.norms import (
    DEFAULT_CHANNEL_GROUPS,
    DEFAULT_INIT_IMAGES,
    NORM_NAMES,
    BatchlessNormSection,
    BatchNormSection,
    Norm,
)
from bln_train.recipe.paper_norm import PaperNormSection
from bln_train.recipe.sections import (
    ConstantSection,
    Data,
    Logging,
    Model,
    Optimizer,
    Runtime,
    Schedule,
    Section,
    SgdSection,
    Train,
)

_OURS = ("batchless", "batchless-plain")  # the presets that are not the paper's
TRAINED_STATISTICS_RATE = 1e-2
"""norm.statistics_rate with model.init: statistics that came with the weights follow these by the probe, and hardly the images."""
TRAINED_CLIP_STEP = 0.1
"""optimizer.clip_norm * optimizer.lr with model.init, for every norm: gradients of weights that are not standardised are long, and
what harms is a long step."""


class Recipe(Section):
    """A whole experiment."""

    data: Data
    """The images: which, how many, how they are changed."""
    model: Model
    """The network, and what it starts from."""
    norm: Norm
    """What normalises between the layers, by its name."""
    train: Train
    """Epochs, batch sizes, precision."""
    optimizer: Optimizer
    """What moves the weights, by its name."""
    schedule: Schedule = Field(default_factory=lambda: ConstantSection(name="constant"))
    """The course of the learning rate, by its name; default `constant`."""
    runtime: Runtime = Runtime()
    """Device, threads, checkpoints: nothing that changes the result."""
    logging: Logging = Logging()
    """Where figures go besides `metrics.jsonl`."""
    _of_trained_weights: bool = PrivateAttr(default=False)  # see `untrained`

    @model_validator(mode="before")
    @classmethod
    def _fill_in_for_trained_weights(cls, data: Any) -> Any:
        """Other defaults with model.init: `TRAINED_STATISTICS_RATE`, `TRAINED_CLIP_STEP`."""
        if not isinstance(data, dict) or not isinstance(data.get("model"), dict) or data["model"].get("init") is None:
            return data
        norm, optimizer = data.get("norm"), data.get("optimizer")
        if isinstance(norm, dict) and norm.get("name") in _OURS:
            data = {**data, "norm": {"statistics_rate": TRAINED_STATISTICS_RATE, **norm}}
        if isinstance(optimizer, dict) and isinstance(optimizer.get("lr"), int | float) and optimizer["lr"] > 0:
            data = {**data, "optimizer": {"clip_norm": TRAINED_CLIP_STEP / optimizer["lr"], **optimizer}}
        return data

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        problems = []
        classes = {"cifar10": 10, "cifar100": 100, "shapes": 10}.get(self.data.name)
        if classes and self.model.num_classes not in (None, classes):
            problems.append(f"model.num_classes: {self.model.num_classes}, but {self.data.name} has {classes} classes")
        if self.model.init is not None and not isinstance(
            self.norm, BatchlessNormSection | PaperNormSection | BatchNormSection
        ):
            problems.append(
                f"model.init: norm {self.norm.name} would throw the trained statistics away; "
                "use batchless, batch or batch-frozen"
            )
        elif self.model.init is not None and isinstance(self.norm, PaperNormSection) and self.norm.share == "layer":
            problems.append("norm.share: with model.init, statistics are those of each channel; use channel")
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
        if self.train.on_nonfinite == "skip":
            problems.append(
                "train.on_nonfinite: accumulate_into: momentum cannot leave a step out, whose gradient is in the momentum; "
                f"set it to stop, {way_out}"
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
            return self.norm.name in (*_OURS, "group") and self.model.init is None
        return setting

    @property
    def channel_groups(self) -> int:
        """Groups of channels behind a batchless norm's statistics, `auto` resolved; 0 for none."""
        norm = self.norm
        if not isinstance(norm, BatchlessNormSection):
            return 0
        if norm.channel_groups != "auto":
            return norm.channel_groups
        without = norm.name != "batchless" or self.model.init is not None
        return 0 if without else DEFAULT_CHANNEL_GROUPS

    @property
    def num_init_images(self) -> int:
        """Training images from which the norms' statistics are taken before the first step, `auto` resolved."""
        if self.norm.name == "batch" or self.model.init is not None:
            return 0
        setting = getattr(self.norm, "init_images", 0)
        return DEFAULT_INIT_IMAGES if setting == "auto" else int(setting)

    @property
    def first_micro_batch_size(self) -> int:
        """The micro-batch to build with: that which is stated, 1 for `auto`, which is resolved before the first step."""
        stated = self.train.micro_batch_size
        return 1 if stated == "auto" else stated

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.data.image_size or 32

    @property
    def num_classes(self) -> int:
        """Outputs of the network, as far as the recipe tells: a folder has as many classes as folders, here 10."""
        return self.model.num_classes or (100 if self.data.name == "cifar100" else 10)

    def with_images(self, image_size: int, num_classes: int) -> Recipe:
        """The recipe as a plan needs it, for images of `image_size` pixels a side and `num_classes`; it is not one to run."""
        model = self.model.model_copy(update={"num_classes": num_classes})
        data = self.data.model_copy(update={"name": "folder", "root": "unused", "image_size": image_size})
        return self.model_copy(update={"model": model, "data": data})

    def untrained(self) -> Recipe:
        """The same network from drawn weights, for any norm: without model.init, and with standardisation as that has it."""
        if self.model.init is None:
            return self
        change = {"init": None, "weight_standardization": self.weight_standardization}
        norm = self.norm
        if isinstance(norm, BatchlessNormSection):
            norm = norm.model_copy(update={"channel_groups": self.channel_groups})
        recipe = self.model_copy(update={"model": self.model.model_copy(update=change), "norm": norm})
        recipe._of_trained_weights = True
        return recipe

    def with_norm(self, name: str) -> Recipe:
        """The same recipe with the norm of that `name`, or unchanged where it is the recipe's own.

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
            if self._of_trained_weights and isinstance(other.norm, BatchlessNormSection):
                other = other.model_copy(update={"norm": other.norm.model_copy(update={"channel_groups": 0})})
            return other
        except ValidationError as error:  # a norm that another setting excludes
            problems = [str(detail.get("ctx", {}).get("error", detail["msg"])) for detail in error.errors()]
            raise UsageError("\n".join(problems)) from error
