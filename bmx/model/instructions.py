"""The job's instructions: the system prompt, and the text of the prompt template around a document.

Knows settings and texts; knows nothing of row ids, models or caches.
"""

from __future__ import annotations

from dataclasses import dataclass

from bmx.errors import UsageError
from bmx.jinja_template import parse_template
from bmx.prompt_config import PromptConfig

INSTRUCTIONS = "instructions"  # the value of kv_probe that stands for the job's own instructions


@dataclass(frozen=True, slots=True)
class Instructions:
    """Text that a job repeats in each of its prompts.

    Attributes:
        system: the system prompt; empty if the job has none.
        before: the template's text before its first field, or block of Jinja.
        after: the template's text after its last one.
    """

    system: str
    before: str
    after: str

    @classmethod
    def from_config(cls, config: PromptConfig) -> Instructions:
        """The instructions of a configuration."""
        template = parse_template(config.prompt_template or "", jinja=config.jinja)
        system = (config.system_prompt or "").strip()
        return cls(system=system, before=template.before.strip(), after=template.after.strip())

    @property
    def question(self) -> str:
        """The question about each document: the template's text, else the system prompt.

        Raises:
            UsageError: the job has neither.
        """
        words = " ".join(filter(None, (self.before, self.after))) or self.system
        if not words:
            hint = "write the probe itself, as in --kv-probe 'Summarize the text above.'"
            raise UsageError("kv_probe 'instructions' needs a prompt template or a system prompt", hint=hint)
        return words

    def spans(self, text: str, system: str) -> tuple[int, int]:
        """The instructions of a rendered prompt, in characters: where the first end, and where the last begin.

        Args:
            text: the whole prompt, as the chat template renders it.
            system: this prompt's own system message; empty for none.

        Returns:
            The end of the instructions before the document, which begin with the prompt; and the beginning of those
            after it, which end with the prompt.
        """
        ends = [text.find(words) + len(words) for words in (system.strip(), self.before) if words and words in text]
        after = text.rfind(self.after) if self.after else -1
        return max(ends, default=0), after if after >= 0 else len(text)
