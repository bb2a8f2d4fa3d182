"""What speaks against the word that will name the subject, told before a run. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from lora_booth.config.config import Config
from lora_booth.config.inputs import shown
from lora_booth.data.images import Picture
from lora_booth.models.bases import identifiers, sources, vocabulary
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.run.report import Report


def tell_token(config: Config, pictures: Sequence[Picture], facts: BaseFacts, report: Report) -> None:
    """Warn of a token, that of each of several subjects, that is cut, common, a rifle, or holds the class noun.

    Nothing is said on the miniature: its 8,192 tokens hold hardly any rare word, and the word of its demo is cut.
    """
    if facts.path == sources.EMBEDDED:
        return
    known, subject = vocabulary.of_base(facts), config.subject
    named = dict.fromkeys((one.token, one.class_noun) for picture in pictures if (one := picture.concept) is not None)
    for token, class_noun in named or [(subject.token, subject.class_noun)]:
        for fault in identifiers.faults(shown(token), shown(class_noun), known):
            report.warn(fault)
