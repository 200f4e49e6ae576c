"""Batch normalization for people who have arrays and no framework."""

from numbabn.backward import Saved, batch_norm_backward
from numbabn.config import show_config
from numbabn.functional import batch_norm, batch_norm_forward
from numbabn.inference import fold_scale_shift, fuse_bn_conv, fuse_conv_bn, fuse_linear_bn
from numbabn.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from numbabn.pool import clear_pool, set_pool_limit
from numbabn.runtime import get_num_threads, set_num_threads, warmup
from numbabn.stages import (
    batch_norm_backward_elemt,
    batch_norm_backward_reduce,
    batch_norm_stats,
    normalize,
)
from numbabn.stats import Stats, merge_stats

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Saved",
    "Stats",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_elemt",
    "batch_norm_backward_reduce",
    "batch_norm_forward",
    "batch_norm_stats",
    "clear_pool",
    "fold_scale_shift",
    "fuse_bn_conv",
    "fuse_conv_bn",
    "fuse_linear_bn",
    "get_num_threads",
    "merge_stats",
    "normalize",
    "set_num_threads",
    "set_pool_limit",
    "show_config",
    "warmup",
]
