"""A small tokenizer for the tests of data; hypothesis without deadlines and with fixed examples."""

from __future__ import annotations

import pytest
from hypothesis import settings

from gptj_train.data.tokenizer import Tokenizer

settings.register_profile("unit", deadline=None, derandomize=True, database=None)
settings.load_profile("unit")

TEXTS = [
    "def hello(name):\n    return f'Hello, {name}!'\n",
    "The quick brown fox jumps over the lazy dog. It's 2024; don't panic.",
    "Grüße aus Köln, 東京 and Ελλάδα 🙂👩‍👩‍👧\n\n\tnaïve café",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE of 340 entries; id 0 is the EOS token."""
    return Tokenizer.train(TEXTS * 5, 340)
