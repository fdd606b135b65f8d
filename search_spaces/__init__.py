"""Search spaces: YAML files, and the one reader that turns them into Optuna distributions."""

from search_spaces.reader import Parameter, Space, SpaceError, load_space, parse_yaml

__all__ = ["Parameter", "Space", "SpaceError", "load_space", "parse_yaml"]
