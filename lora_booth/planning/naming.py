"""What speaks against the word that will name the subject, told before a run. No torch."""

from __future__ import annotations

from lora_booth.config.config import Config
from lora_booth.config.inputs import shown
from lora_booth.models.bases import identifiers, sources, vocabulary
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.run.report import Report


def tell_token(config: Config, facts: BaseFacts, report: Report) -> None:
    """Warn of a token that is cut, common, a rifle, or holds the class noun.

    Nothing is said on the miniature: its 8,192 tokens hold hardly any rare word, and the word of its demo is cut.
    """
    if facts.path == sources.EMBEDDED:
        return
    subject = config.subject
    for fault in identifiers.faults(shown(subject.token), shown(subject.class_noun), vocabulary.of_base(facts)):
        report.warn(fault)
