"""Every option of a model, a training run and a generation, as frozen dataclasses.

This package does not import torch.
"""

from smolseek.config.generation import (
    ALIASES,
    PYTHON_ALIASES,
    GenerationOptions,
    Options,
    SamplingOptions,
    generation_options,
    token_ids,
)
from smolseek.config.option import option
from smolseek.config.plain import differences, flatten, from_dict, parse_json, to_dict
from smolseek.config.shape import ModelConfig, ModelType, RopeConfig, RopeType
from smolseek.config.training import (
    BalanceConfig,
    DataConfig,
    DistillConfig,
    GuardConfig,
    MeshConfig,
    OptimConfig,
    ScheduleConfig,
    StepConfig,
    TrainConfig,
    with_earlier_defaults,
)
