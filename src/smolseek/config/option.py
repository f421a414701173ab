"""The options of a configuration: their bounds, old names, and whether a run may change them.

This module does not import torch.
"""

import math
from dataclasses import field, fields
from typing import Any, Literal

from smolseek.errors import SmolseekError

Change = Literal["never", "always", "resume", "path"]
"""Whether an existing run may get another value of an option.

`always`: the option may always change; existing weights stay valid, and the data continue at the next token. `resume`:
a resumed run may change the option for the remaining steps, and logs the change. `path`: the option names a file or
folder that may have moved. The content of this file must be the same, which a digest in the checkpoint verifies.
`never`: the value must stay the same.
"""


def option(
    default: Any,
    *,
    change: Change = "never",
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    may_be_infinite: bool = False,
    old_name: str | None = None,
) -> Any:
    """Return a dataclass field with the given bounds.

    If the value is a tuple, the bounds hold for each of its numbers.
    """
    metadata = {"change": change, "least": least, "above": above, "most": most, "may_be_infinite": may_be_infinite}
    return field(default=default, metadata=metadata | {"old_name": old_name})


def check_numbers(config: Any, prefix: str = "", remedy: str = "") -> None:
    """Refuse numbers that are out of their bounds or not finite, and integers beyond 64 bits.

    Raises:
        SmolseekError: for the first such number. The message puts `prefix` in front of the number's name, such as `--`
            for an option, and `remedy` after a violated bound.
    """
    for f in fields(config):
        value, name = getattr(config, f.name), f"{prefix}{f.name}"
        name = name.replace("_", "-") if prefix == "--" else name
        for number in value if isinstance(value, tuple | list) else (value,):
            if not isinstance(number, int | float):
                continue
            if isinstance(number, float) and not math.isfinite(number):
                if number == math.inf and f.metadata.get("may_be_infinite"):
                    continue
                raise SmolseekError(f"{name} {number} is not finite: use a finite number")
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise SmolseekError(f"{name} {str(number)[:40]} does not fit into 64 bits: use a smaller number")
            least, above, most = (f.metadata.get(bound) for bound in ("least", "above", "most"))
            if least is not None and number < least:
                raise SmolseekError(f"{name} {number} must be {least:g} or more{remedy}")
            if above is not None and number <= above:
                raise SmolseekError(f"{name} {number} must be above {above:g}{remedy}")
            if most is not None and number > most:
                raise SmolseekError(f"{name} {number} must be at most {most:g}{remedy}")
