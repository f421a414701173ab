"""Every setting of a model, of a training run and of sampling, as frozen dataclasses. Imports no torch."""

from smolseek.config.plain import flatten, from_dict, parse_json, to_dict
from smolseek.config.sampling import SamplingOptions
from smolseek.config.shape import ModelConfig, ModelType, RopeConfig, RopeType
from smolseek.config.training import (
    BalanceConfig,
    DataConfig,
    DistillConfig,
    GuardConfig,
    MeshConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "BalanceConfig",
    "DataConfig",
    "DistillConfig",
    "GuardConfig",
    "MeshConfig",
    "ModelConfig",
    "ModelType",
    "OptimConfig",
    "RopeConfig",
    "RopeType",
    "SamplingOptions",
    "ScheduleConfig",
    "TrainConfig",
    "flatten",
    "from_dict",
    "parse_json",
    "to_dict",
]
