"""Every setting, in and out.

``settings.py`` has the settings, their defaults and meanings. ``reading.py`` makes them of YAML and a command line,
``writing.py`` makes YAML, a JSON schema and Markdown of them.
"""

from fedbiscuit.config.reading import load_config, load_settings, load_translated, parse_config
from fedbiscuit.config.settings import (
    COLUMNS,
    AlignmentSettings,
    Config,
    DataSettings,
    DemoSettings,
    EvaluationSettings,
    FederatedSettings,
    GenerationSettings,
    JudgeSettings,
    LabelSettings,
    LoraSettings,
    ModelSettings,
    PartitionSettings,
    Section,
    TrainingSettings,
    least_replies,
)
from fedbiscuit.config.writing import dump_config, json_schema, settings_table

__all__ = [
    "COLUMNS",
    "AlignmentSettings",
    "Config",
    "DataSettings",
    "DemoSettings",
    "EvaluationSettings",
    "FederatedSettings",
    "GenerationSettings",
    "JudgeSettings",
    "LabelSettings",
    "LoraSettings",
    "ModelSettings",
    "PartitionSettings",
    "Section",
    "TrainingSettings",
    "dump_config",
    "json_schema",
    "least_replies",
    "load_config",
    "load_settings",
    "load_translated",
    "parse_config",
    "settings_table",
]
