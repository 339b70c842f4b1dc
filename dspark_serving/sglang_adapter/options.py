"""Options between config.py and SGLang: command line, environment, server arguments."""

from __future__ import annotations

import argparse
import os
from typing import Any

from dspark_serving.config import ServingConfig, flag, load_config, variable

# Not a field of ServerArgs: survives its sealing and its pickling to the scheduler processes.
ATTRIBUTE = "_dspark_config"


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each option; absent flags stay absent, so that the environment can answer for them."""
    group = parser.add_argument_group("dspark-serving")
    for name, field in ServingConfig.model_fields.items():
        text = f"{field.description}; default {field.default}, or from {variable(name)}"
        if field.annotation is bool:
            group.add_argument(flag(name), action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(flag(name), default=argparse.SUPPRESS, help=text, metavar=name.upper())


def attach(server_args: Any, namespace: argparse.Namespace | None = None) -> ServingConfig:
    """Put the options on `server_args`, from parsed flags (if any) and the environment, and return them.

    Raises:
        OptionError: a value is out of its bounds.
    """
    given = {} if namespace is None else vars(namespace)
    names = {name: flag(name).lstrip("-").replace("-", "_") for name in ServingConfig.model_fields}
    config = load_config({name: given[key] for name, key in names.items() if key in given}, os.environ)
    setattr(server_args, ATTRIBUTE, config)
    return config


def config_of(server_args: Any) -> ServingConfig:
    """The options of these server arguments; from the environment where no command line made them (sglang.Engine)."""
    config = getattr(server_args, ATTRIBUTE, None)
    return config if config is not None else attach(server_args)
