"""A loaded base that runs of one process take in turn, each as if it had loaded it itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from lora_booth.adapter import attach
from lora_booth.models.families.family import Family
from lora_booth.training.adapting import Adapted


class SharedBase:
    """Keeps one base, the last that was asked for."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._family: Family | None = None
        self._is_clean = False

    def has(self, key: Hashable) -> bool:
        """Whether the base that `key` names is here, as it was loaded: nobody knows what a run that failed has left in
        one that was not given back."""
        return self._family is not None and key == self._key and self._is_clean

    def take(self, key: Hashable, load: Callable[[], Family], *, is_denoiser_offloaded: bool) -> Family:
        """The base that `key` names: the one that is here, or it is loaded after another was let go."""
        if self._family is None or not self.has(key):
            self._family = None  # before the next is loaded, which may need its memory
            self._family, self._key = load(), key
            self._family.is_shared, self._schedule = True, self._family.schedule
        else:
            self._family.schedule = self._schedule
            self._family.renew_(is_denoiser_offloaded=is_denoiser_offloaded)
        self._is_clean = False
        return self._family

    def give_back_(self, adapted: Adapted) -> None:
        """Take out what a run has put into the base, which is then as it was."""
        if adapted.word is not None:
            adapted.word.forget_()
        for module in adapted.modules.values():
            attach.detach_(module)
        self._is_clean = True
