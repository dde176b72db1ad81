"""The base of everything that a recipe sets: strict about keys, and about what people take for numbers.

YAML reads ``yes`` as a truth value and ``.inf`` as a number, and pydantic would take the one for 1 and the other for a
learning rate. numpy's numbers are read as Python's.
"""

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["Settings"]


class Settings(BaseModel):
    """Refuses unknown keys, truth values where a number or text is wanted, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in data.items()}
        for name, value in plain.items():
            field = cls.model_fields.get(str(name))
            if field is not None and _holds_truth(value) and not _takes_truth(field.annotation):
                raise ValueError(f"{name} holds {value!r}, a truth value; write a number or text (in YAML, quote it)")
        return plain


def _holds_truth(value: Any) -> bool:
    """Whether a value is a truth value, or a list with one in it; mappings are checked by their own model."""
    return isinstance(value, bool | np.bool_) or (isinstance(value, list) and any(map(_holds_truth, value)))


def _takes_truth(annotation: Any) -> bool:
    """Whether a type has room for a truth value."""
    return annotation in (bool, Any) or any(map(_takes_truth, get_args(annotation)))
