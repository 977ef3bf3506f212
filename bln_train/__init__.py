"""bln-train: train convolutional networks one image at a time; any split of the effective batch gives the same result.

A program may rely on the names in `__all__`. They are imported at first use, so neither `import bln_train` nor
`bln-train --help` loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bln_train.build.experiment import Experiment, build_experiment
    from bln_train.errors import BlnError
    from bln_train.export.export import ImageClassifier, export_run, load_merged
    from bln_train.norm import (
        BatchlessChannelNorm,
        BatchlessNorm,
        BatchlessNorm1d,
        BatchlessNorm2d,
        BatchlessNorm3d,
        BatchlessStatistics,
        FoldedConvNorm,
        FuseReport,
        InstanceChannelDropout,
        InstanceDropout,
        InstanceStochasticDepth,
        MergeReport,
        StandardizedConv2d,
        convert_batchnorm,
        convert_to_batchnorm,
        fold_once,
        folded_layers,
        fuse,
        initialize_statistics,
        layer_likelihoods,
        merge_norms,
        standardize_once,
        unfuse,
    )
    from bln_train.recipe.load import load_recipe
    from bln_train.recipe.recipe import Recipe
    from bln_train.records import EpochRecord, MemoryRecord, NoticeRecord, StepRecord
    from bln_train.train.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "BatchlessChannelNorm",
    "BatchlessNorm",
    "BatchlessNorm1d",
    "BatchlessNorm2d",
    "BatchlessNorm3d",
    "BatchlessStatistics",
    "BlnError",
    "EpochRecord",
    "Experiment",
    "FoldedConvNorm",
    "FuseReport",
    "ImageClassifier",
    "InstanceChannelDropout",
    "InstanceDropout",
    "InstanceStochasticDepth",
    "MemoryRecord",
    "MergeReport",
    "NoticeRecord",
    "Recipe",
    "StandardizedConv2d",
    "StepRecord",
    "Trainer",
    "__version__",
    "build_experiment",
    "convert_batchnorm",
    "convert_to_batchnorm",
    "export_run",
    "fold_once",
    "folded_layers",
    "fuse",
    "initialize_statistics",
    "layer_likelihoods",
    "load_merged",
    "load_recipe",
    "merge_norms",
    "standardize_once",
    "unfuse",
]

_HOMES = {
    "Experiment": "build.experiment",
    "build_experiment": "build.experiment",
    "BlnError": "errors",
    "ImageClassifier": "export.export",
    "export_run": "export.export",
    "load_merged": "export.export",
    "Recipe": "recipe.recipe",
    "load_recipe": "recipe.load",
    "EpochRecord": "records",
    "MemoryRecord": "records",
    "NoticeRecord": "records",
    "StepRecord": "records",
    "Trainer": "train.trainer",
}
"""Modules of the public names that are not of `bln_train.norm`."""


if not TYPE_CHECKING:  # a type checker knows the names above, and would take any other for one of these

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'norm')}"), name)
        globals()[name] = value  # the next use does not come here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
