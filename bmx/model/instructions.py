"""The job's own words around the documents: the system prompt and the text of the prompt template.

Knows settings and texts; knows nothing of rows' ids, models or caches.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

from bmx.config import PromptConfig
from bmx.errors import UsageError

INSTRUCTIONS = "instructions"  # the word that stands for them in settings


@dataclass(frozen=True, slots=True)
class Instructions:
    """What a job says in each of its prompts.

    Attributes:
        system: the system prompt, or nothing.
        before, after: the template's text before its first field and after its last one.
    """

    system: str
    before: str
    after: str

    @classmethod
    def from_config(cls, config: PromptConfig) -> Instructions:
        """Those of a configuration."""
        parts = list(string.Formatter().parse(config.prompt_template or ""))
        before = parts[0][0] if parts else ""
        after = parts[-1][0] if parts and parts[-1][1] is None and len(parts) > 1 else ""
        return cls(system=(config.system_prompt or "").strip(), before=before.strip(), after=after.strip())

    @property
    def question(self) -> str:
        """What is asked of each document: the template's words, else those of the system prompt.

        Raises:
            UsageError: there is neither.
        """
        words = " ".join(filter(None, (self.before, self.after))) or self.system
        if not words:
            hint = "write the probe itself, as in --kv-probe 'Summarize the text above.'"
            raise UsageError("kv_probe 'instructions' needs a prompt template or a system prompt", hint=hint)
        return words

    def spans(self, text: str, system: str) -> tuple[int, int]:
        """Where the instructions of a rendered prompt end and begin again, in characters.

        Args:
            text: the whole prompt, with what a chat template puts around it.
            system: this prompt's own system message, or nothing.

        Returns:
            The end of what stands before the document, from the prompt's first character on; and the beginning of
            what stands behind it, up to the prompt's last.
        """
        ends = [text.find(words) + len(words) for words in (system.strip(), self.before) if words and words in text]
        after = text.rfind(self.after) if self.after else -1
        return max(ends, default=0), after if after >= 0 else len(text)
