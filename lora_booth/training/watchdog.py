"""Noticing that a run has outgrown its card.

Memory is nearly full, or steps suddenly take many times longer.

Some drivers, instead of failing, move what does not fit into main memory; then nothing is said and every step crawls.
"""

from __future__ import annotations

import statistics

BASELINE_STEPS = 20
SLOW_STEPS = 5
SLOW_FACTOR = 4.0
FULL_SHARE = 0.97


class Watchdog:
    """Looks at every step, and warns of each of the two things once."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._baseline: float | None = None
        self._has_told_slow = self._has_told_full = False

    def observe(self, seconds: float, used_share: float | None) -> list[str]:
        """What to warn of after a step of `seconds`; `used_share`: of the device's memory, None on a CPU."""
        warnings = []
        if used_share is not None and used_share > FULL_SHARE and not self._has_told_full:
            self._has_told_full = True
            warnings.append(
                f"{used_share:.0%} of the device's memory is in use; close other programs on it, or give "
                "memory.budget_gib a smaller number, before a step fails."
            )
        self._seconds = [*self._seconds, seconds][-max(BASELINE_STEPS, SLOW_STEPS) :]
        if self._baseline is None:
            if len(self._seconds) == BASELINE_STEPS:
                self._baseline = statistics.median(self._seconds)
        elif min(self._seconds[-SLOW_STEPS:]) > SLOW_FACTOR * self._baseline and not self._has_told_slow:
            self._has_told_slow = True
            times = min(self._seconds[-SLOW_STEPS:]) / self._baseline
            told = f"steps take {times:.0f} times as long as at first"
            if used_share is None:
                warnings.append(f"{told}: other programs keep the processor busy.")
            else:
                warnings.append(
                    f"{told}; the driver may have moved memory off the device. Close other programs, or stop, give "
                    "memory.budget_gib a smaller number and continue."
                )
        return warnings
