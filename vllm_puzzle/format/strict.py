"""The base of every schema of ours."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Frozen, without conversions between types and without fields that the schema does not name."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
