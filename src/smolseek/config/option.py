"""What stands at an option of a configuration: its bounds, and whether a run may change it. Imports no torch."""

import math
from dataclasses import field, fields
from typing import Any, Literal

from smolseek.errors import SmolseekError

Change = Literal["never", "always", "resume", "path"]
"""Whether a run that is there may get another value.

`always`: the option changes no weight; the data go on at the next token. `resume`: a resumed run may change it for the
steps to come, and says so. `path`: the name of something that may have moved; its content must be the same, and the
checkpoint holds a digest of that.
"""


def option(
    default: Any,
    *,
    change: Change = "never",
    least: float | None = None,
    above: float | None = None,
    may_be_infinite: bool = False,
) -> Any:
    """Return a dataclass field with these bounds, both for each number of a tuple."""
    metadata = {"change": change, "least": least, "above": above, "may_be_infinite": may_be_infinite}
    return field(default=default, metadata=metadata)


def check_numbers(config: Any, prefix: str = "", way_out: str = "") -> None:
    """Refuse numbers that are out of their bounds, not finite, or whole ones beyond 64 bits.

    Raises:
        SmolseekError: for the first such number, with `prefix` before its name, and `way_out` for one out of bounds.
    """
    for f in fields(config):
        value, name = getattr(config, f.name), f"{prefix}{f.name}"
        for number in value if isinstance(value, tuple | list) else (value,):
            if not isinstance(number, int | float):
                continue
            if isinstance(number, float) and not math.isfinite(number):
                if number == math.inf and f.metadata.get("may_be_infinite"):
                    continue
                raise SmolseekError(f"{name} {number} is no finite number: use one")
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise SmolseekError(f"{name} does not fit 64 bits: use a smaller number")
            least, above = f.metadata.get("least"), f.metadata.get("above")
            if least is not None and number < least:
                raise SmolseekError(f"{name} {number} must be {least:g} or more{way_out}")
            if above is not None and number <= above:
                raise SmolseekError(f"{name} {number} must be above {above:g}{way_out}")
