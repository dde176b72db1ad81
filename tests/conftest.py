"""What every test shares: an offline, quiet, single-threaded environment and tiny real models."""

import os

# Read by the libraries when they are first imported, so set before anything else is.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # the loopback Hub keeps large files as plain LFS
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable

import pytest
import tiny_models
import torch
from transformers import PreTrainedConfig, PreTrainedModel

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., PreTrainedConfig]:
    """``tiny_config(family, **overrides)``: see :func:`tiny_models.tiny_config`."""
    return tiny_models.tiny_config


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model(config, dtype, seed)``: see :func:`tiny_models.tiny_model`."""
    return tiny_models.tiny_model
