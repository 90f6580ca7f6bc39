"""Configuration: the one place where YAML and command line become objects.

Typed, bounded, read-only, free of heavy imports: a wrong configuration is refused before torch is loaded. Every section
is a frozen pydantic model; unknown keys are errors that name the nearest known one. `docs/configuration.md` explains
the keys.
"""

from agrpo.config.base import Section
from agrpo.config.common import (
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    TokenizerConfig,
    TrainingConfig,
)
from agrpo.config.controllers import LambdaController
from agrpo.config.conversation import EnvironmentConfig
from agrpo.config.environment import count_from_environment, world_size
from agrpo.config.files import read_config, stage_of
from agrpo.config.loading import load_config, parse_command_line, resolve
from agrpo.config.methods import METHODS, PREFERENCE_METHODS
from agrpo.config.objective import AdvantageConfig, GroupLossConfig, PairLossConfig, PreferenceLossConfig, PruningConfig
from agrpo.config.rewards import RewardSpec
from agrpo.config.rollout import RolloutConfig, SamplingConfig, ServersConfig
from agrpo.config.stages import STAGES, PolicyConfig, PreferencesConfig, RewardConfig, SFTConfig, StageConfig

__all__ = [
    "METHODS",
    "PREFERENCE_METHODS",
    "STAGES",
    "AdvantageConfig",
    "DataConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "GroupLossConfig",
    "LambdaController",
    "LoraConfig",
    "ModelConfig",
    "PairLossConfig",
    "PolicyConfig",
    "PreferenceLossConfig",
    "PreferencesConfig",
    "PruningConfig",
    "RewardConfig",
    "RewardSpec",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SamplingConfig",
    "Section",
    "ServersConfig",
    "StageConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "count_from_environment",
    "load_config",
    "parse_command_line",
    "read_config",
    "resolve",
    "stage_of",
    "world_size",
]
