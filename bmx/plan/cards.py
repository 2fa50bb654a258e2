"""GPUs by their data sheets, to plan for one that is not in this machine.

Knows names, speeds and the memory that a card offers; knows nothing of models and loads no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from bmx.errors import UsageError
from bmx.plan.machine_speed import Rates

GIB = 2**30
REACHED_FLOPS, REACHED_BANDWIDTH = 0.65, 0.85  # of a data sheet's figures, by large products and copies
LAUNCH_SECONDS = 8e-6  # to launch an operator from Python


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU.

    Attributes:
        name: with its memory, as in A100-80G, where a chip comes with more than one.
        flops: dense bfloat16 (float16 before Ampere) FLOP/s by the data sheet.
        bandwidth: bytes/s by the data sheet.
        gigabytes: memory by the data sheet.
        usable: GiB that CUDA shows on an idle card: the least that is known of recent drivers, with ECC where it is on
            by default. That is 0.2 to 1 GiB less than ``nvidia-smi`` shows, which counts what the driver takes. The
            context of a process is still in it.
    """

    name: str
    flops: float
    bandwidth: float
    gigabytes: int
    usable: float

    @property
    def memory(self) -> int:
        """Bytes that CUDA shows on an idle card."""
        return int(self.usable * GIB)


CARDS = (
    Card("A2", 18e12, 200e9, 16, 14.5),
    Card("T4", 65e12, 320e9, 16, 14.56),
    Card("V100-16G", 125e12, 900e9, 16, 15.77),
    Card("V100-32G", 125e12, 900e9, 32, 31.73),
    Card("A10", 125e12, 600e9, 24, 22.05),
    Card("A10G", 70e12, 600e9, 24, 22.05),
    Card("A30", 165e12, 933e9, 24, 23.49),
    Card("A40", 149.7e12, 696e9, 48, 44.34),
    Card("A100-40G", 312e12, 1555e9, 40, 39.38),
    Card("A100-80G", 312e12, 2039e9, 80, 79.14),
    Card("L4", 121e12, 300e9, 24, 22.03),
    Card("L20", 119.5e12, 864e9, 48, 44.39),
    Card("L40", 181e12, 864e9, 48, 44.39),
    Card("L40S", 362e12, 864e9, 48, 44.39),
    Card("H100", 989e12, 3350e9, 80, 79.1),
    Card("H100-PCIe", 756e12, 2039e9, 80, 79.1),
    Card("H100-NVL", 835e12, 3938e9, 94, 93.0),
    Card("H20", 148e12, 4000e9, 96, 94.4),
    Card("H200", 989e12, 4800e9, 141, 139.72),
    Card("H200-NVL", 835e12, 4800e9, 141, 139.72),
    Card("GH200", 989e12, 4000e9, 96, 94.4),
    Card("B200", 2250e12, 8000e9, 180, 178.35),
    Card("RTX-3060", 25e12, 360e9, 12, 11.62),
    Card("RTX-3090", 71e12, 936e9, 24, 23.56),
    Card("RTX-4060-Ti", 44e12, 288e9, 16, 15.56),
    Card("RTX-4080", 97e12, 717e9, 16, 15.55),
    Card("RTX-4090", 165e12, 1008e9, 24, 23.5),
    Card("RTX-5080", 113e12, 960e9, 16, 15.45),
    Card("RTX-5090", 210e12, 1792e9, 32, 31.33),
    Card("RTX-A5000", 111e12, 768e9, 24, 23.5),
    Card("RTX-A6000", 155e12, 768e9, 48, 47.4),
    Card("RTX-6000-Ada", 364e12, 960e9, 48, 44.39),
    Card("RTX-PRO-6000", 504e12, 1792e9, 96, 94.9),
)
MAKERS_WORDS = re.compile(
    r"nvidia|tesla|geforce|quadro|rtx|sxm\d?|hbm\d?e?|generation|blackwell|(workstation|server) edition|[^a-z0-9]+"
)


def card_named(name: str) -> Card:
    """The card of that name, however people, shops or ``nvidia-smi`` spell it.

    Raises:
        UsageError: no card of the table, or several; the hint names the nearest and lists the table.
    """
    wanted = _spelled(name)
    chip = wanted.replace("pcie", "")
    for spelling in (wanted, chip):
        for card in CARDS:
            if spelling in _spellings(card):
                return card
    several = [card.name for card in CARDS if chip == _spelled(_chip(card))]
    known = "known are " + ", ".join(card.name for card in CARDS) + "; others by --gpu-memory 24G"
    if several:
        raise UsageError(f"several cards are called {name!r}: {', '.join(several)}", hint=known)
    raise UsageError(f"no card of the table is called {name!r}", hint=_nearest(wanted) + known)


def _nearest(wanted: str) -> str:
    """The cards whose names are most like another, as the beginning of a hint; empty if there are none."""
    spellings = {spelling: card.name for card in CARDS for spelling in _spellings(card)}
    names = dict.fromkeys(spellings[spelling] for spelling in get_close_matches(wanted, spellings))
    return f"perhaps {' or '.join(names)}; " if names else ""


def _spelled(name: str) -> str:
    """A name in small letters without gaps and without its maker's words, memory as 80g."""
    return re.sub(r"(?<=[0-9])gi?b", "g", MAKERS_WORDS.sub("", name.lower()))


def _chip(card: Card) -> str:
    """The card's name without its memory."""
    return re.sub("-[0-9]+G$", "", card.name)


def _spellings(card: Card) -> set[str]:
    """A card's name, and the same with its memory behind it or behind its first word."""
    chip, memory = _chip(card), card.gigabytes
    first, _, more = chip.partition("-")
    return set(map(_spelled, (card.name, f"{chip}{memory}", f"{chip}{memory}g", f"{first}{memory}g{more}")))


def card_rates(card: Card) -> Rates:
    """The rates that a card is expected to reach, as shares of its data sheet."""
    return Rates(
        flops=REACHED_FLOPS * card.flops,
        bandwidth=REACHED_BANDWIDTH * card.bandwidth,
        thin_bandwidth=REACHED_BANDWIDTH * card.bandwidth,
        operator_seconds=LAUNCH_SECONDS,
        source=f"{REACHED_FLOPS:.0%} of the matrix rate and {REACHED_BANDWIDTH:.0%} of the bandwidth of {card.name}",
    )
