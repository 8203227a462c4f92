"""What is told of an engine that stopped."""

from __future__ import annotations

import pytest
from pydantic import ValidationError, model_validator
from pydantic.dataclasses import dataclass

from ppow_train.engine_log import reason


@dataclass
class Config:
    """As vLLM's are."""

    max_model_len: int

    @model_validator(mode="after")
    def check(self) -> Config:
        raise ValueError("max_model_len (2048) is greater than 1024. Lower it.")


def test_an_error_in_the_configuration_is_what_it_says():
    with pytest.raises(ValidationError) as raised:
        Config(2048)
    log = f"INFO starting\nTraceback (most recent call last):\nValidationError: {raised.value}\n\n"
    assert reason(log) == "max_model_len (2048) is greater than 1024. Lower it."


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ("INFO a\nValueError: first\nRuntimeError: last\n  INFO bye\n", "RuntimeError: last"),
        ("INFO a\nINFO b\n\n", "INFO b"),
        ("1 validation error for X", "1 validation error for X"),
        ("", "no log"),
    ],
)
def test_else_the_last_error_or_the_last_line(log, told):
    assert reason(log) == told
