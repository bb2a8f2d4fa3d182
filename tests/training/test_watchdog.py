"""What is noticed of a card that a run has outgrown, and that it is told once."""

from __future__ import annotations

from lora_booth.training.watchdog import BASELINE_STEPS, SLOW_STEPS, Watchdog


def told(seconds: list[float], used: float | None = 0.5) -> list[tuple[int, str]]:
    dog = Watchdog()
    return [(step, text) for step, s in enumerate(seconds) for text in dog.observe(s, used)]


def test_steady_steps_single_pauses_and_slow_starts_are_no_reason() -> None:
    steady = [1.0, 1.2, 0.9] * 30
    pauses = [9.0 if step % SLOW_STEPS == 0 else 1.0 for step in range(100)]
    assert told(steady) == told(pauses) == told([30.0] * 3 + [1.0] * 60) == []


def test_a_lasting_slowdown_is_told_once_with_its_size_and_cause() -> None:
    ((step, text),) = told([0.5] * (BASELINE_STEPS + 5) + [4.0] * 30)
    assert step == BASELINE_STEPS + 5 + SLOW_STEPS - 1
    assert "8 times as long" in text and "off the device" in text
    ((_, text),) = told([0.5] * BASELINE_STEPS + [4.0] * 30, used=None)
    assert text.endswith("other programs keep the processor busy.")


def test_a_nearly_full_card_is_told_once() -> None:
    ((step, text),) = told([1.0] * 10, used=0.98)
    assert (step, text[:33]) == (0, "98% of the device's memory is in ")
    assert told([1.0] * 10, used=0.96) == []
