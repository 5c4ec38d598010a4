"""YAML files and `key=value` words become plain, checked values; the only room that knows Hydra and OmegaConf."""
