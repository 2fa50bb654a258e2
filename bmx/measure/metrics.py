"""How alike two answers are, and many pairs of them: numbers alone.

Knows token ids, texts and log-probabilities as they come; knows no model and no file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LONGER = 1.5  # times as long: an answer that has got out of hand


@dataclass(slots=True, kw_only=True)
class Agreement:
    """What has been counted of a cache's answers against the full cache's.

    Attributes:
        tokens: next tokens predicted after the full cache's own answer (teacher forcing); ``same`` those that agree.
        divergence: their KL divergences from the full cache's, added up, in nats.
        answers: written freely; ``exact`` of them equal token by token; ``longer`` at least 1.5 times as long.
        likeness: ROUGE-L of each with the full cache's, added up.
        length, full_length: their tokens, and those of the full cache's answers.
        judged: answers with a reference; ``score`` and ``full_score``: ROUGE-L with it, added up, of both.
        failed: rows without an answer.
    """

    tokens: int = 0
    same: int = 0
    divergence: float = 0.0
    answers: int = 0
    exact: int = 0
    longer: int = 0
    likeness: float = 0.0
    length: int = 0
    full_length: int = 0
    judged: int = 0
    score: float = 0.0
    full_score: float = 0.0
    failed: int = 0

    def count_token(self, same: bool, divergence: float) -> None:
        """A next token after a forced beginning."""
        self.tokens += 1
        self.same += same
        self.divergence += divergence

    def count_answer(
        self, ids: Sequence[int], text: str, full_ids: Sequence[int], full_text: str, references: Sequence[str]
    ) -> None:
        """A free answer, the full cache's, and what good answers would have been."""
        self.answers += 1
        self.exact += tuple(ids) == tuple(full_ids)
        self.longer += len(ids) >= LONGER * len(full_ids)
        self.likeness += rouge_l(text, full_text)
        self.length += len(ids)
        self.full_length += len(full_ids)
        if references:
            self.judged += 1
            self.score += max(rouge_l(text, reference) for reference in references)
            self.full_score += max(rouge_l(full_text, reference) for reference in references)

    @property
    def top1(self) -> float:
        """Share of next tokens that are the full cache's."""
        return self.same / self.tokens if self.tokens else 0.0

    @property
    def top1_error(self) -> float:
        """Standard error of that share, as if tokens were independent."""
        return (self.top1 * (1 - self.top1) / self.tokens) ** 0.5 if self.tokens else 0.0

    def record(self) -> dict[str, Any]:
        """As JSON."""
        answers = max(1, self.answers)
        found: dict[str, Any] = {
            "top1_agreement": round(self.top1, 5),
            "top1_standard_error": round(self.top1_error, 5),
            "kl_divergence": round(self.divergence / max(1, self.tokens), 5),
            "tokens": self.tokens,
            "answers": self.answers,
            "exact_match": round(self.exact / answers, 5),
            "rouge_l_full_cache": round(self.likeness / answers, 5),
            "length_ratio": round(self.length / max(1, self.full_length), 5),
            "much_longer": round(self.longer / answers, 5),
            "failed_rows": self.failed,
        }
        if self.judged:
            found |= {
                "rouge_l_reference": round(self.score / self.judged, 5),
                "rouge_l_reference_of_full_cache": round(self.full_score / self.judged, 5),
            }
        return found


def rouge_l(text: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004, section 3): letters and digits, case ignored."""
    one, other = (re.findall(r"\w+", t.lower()) for t in (text, reference))
    if not one or not other:
        return float(one == other)
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for j, against in enumerate(other, 1):
            above = row[j]
            row[j] = before + 1 if word == against else max(above, row[j - 1])
            before = above
    common = row[-1]
    return 2 * common / (len(one) + len(other))
