"""Norms: Batchless Normalization, its statistics, weight standardisation, and the way from and to BatchNorm."""

from bln_train.norm.batchless import BatchlessNorm, BatchlessNorm1d, BatchlessNorm2d, BatchlessNorm3d
from bln_train.norm.batchless_channel import BatchlessChannelNorm
from bln_train.norm.calibrate.initialize import initialize_statistics
from bln_train.norm.calibrate.likelihood import layer_likelihoods
from bln_train.norm.convert.layers import convert_batchnorm, convert_to_batchnorm
from bln_train.norm.convert.merge import MergeReport, merge_norms
from bln_train.norm.dropout import InstanceChannelDropout, InstanceDropout, InstanceStochasticDepth
from bln_train.norm.functional import batchless_norm
from bln_train.norm.fused.layer import FoldedConvNorm, fold_once
from bln_train.norm.fused.network import FuseReport, folded_layers, fuse, unfuse
from bln_train.norm.standardize import StandardizedConv2d, standardize_once, standardize_weight
from bln_train.norm.statistics import BatchlessStatistics

__all__ = [
    "BatchlessChannelNorm",
    "BatchlessNorm",
    "BatchlessNorm1d",
    "BatchlessNorm2d",
    "BatchlessNorm3d",
    "BatchlessStatistics",
    "FoldedConvNorm",
    "FuseReport",
    "InstanceChannelDropout",
    "InstanceDropout",
    "InstanceStochasticDepth",
    "MergeReport",
    "StandardizedConv2d",
    "batchless_norm",
    "convert_batchnorm",
    "convert_to_batchnorm",
    "fold_once",
    "folded_layers",
    "fuse",
    "initialize_statistics",
    "layer_likelihoods",
    "merge_norms",
    "standardize_once",
    "standardize_weight",
    "unfuse",
]
