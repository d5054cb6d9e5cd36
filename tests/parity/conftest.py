"""Fixtures of the parity tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pair import build_pair


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """Our causal LM and Transformers', small, with the same weights; shared by a file's tests, which leave it as is."""
    torch.manual_seed(0)
    return build_pair()
