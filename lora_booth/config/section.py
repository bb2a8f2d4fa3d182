"""What every section of the config shares: how it behaves, and the types of its values.

What lives here: no setting. What does not: settings (`settings.py`, `machine.py`, `results.py`).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _from_home(path: Path) -> Path:
    """`path` with a leading "~" as the user's home; as it is where nobody's home is known."""
    with suppress(RuntimeError):
        return path.expanduser()
    return path


FilePath = Annotated[Path, Field(strict=False), AfterValidator(_from_home)]
BaseName = Annotated[str, AfterValidator(lambda name: str(_from_home(Path(name))) if name.startswith("~") else name)]
Texts = Annotated[tuple[str, ...], Field(strict=False)]
Share = Annotated[float, BeforeValidator(lambda value: float(value) if isinstance(value, bool) else value)]
"""From 0 to 1; false and true are its ends."""
Level = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Strength = Annotated[float, Field(gt=0, le=2, allow_inf_nan=False)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Sampler = Literal["dpm++", "ddim", "euler", "base"]


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values are not coerced, instances do not change, and no number
    is NaN or infinite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)
