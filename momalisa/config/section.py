"""What every part of the settings is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]

EVALUATION_PROMPTS = (
    "A MOMA artwork of: changing seasons",
    "A MOMA artwork of: a coffee",
    "A MOMA artwork of: an industrial setting",
    "A MOMA artwork of: critique of the USA",
    "A MOMA artwork of: Picasso and Monet",
)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
