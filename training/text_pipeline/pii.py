"""Masks e-mail addresses and public IP addresses, as FineWeb does (arXiv 2406.17557).

datatrove's formatter takes its replacements in turn from a counter that goes on from document to document: what a
document becomes depends on which others its worker saw. Here an address becomes one and the same, of those that are
reserved for documentation (RFC 2606, 5737, 3849), so masking twice is masking once. Particular also: IPv6; numbers with
more than four parts or with a letter before (`v1.2.3.4`) are not addresses; and what is searched is bounded, where
datatrove's expression takes time quadratic in the length of a line of base64. A version or the number of a section,
such as 8.1.2.3, looks like a public address and is masked.
"""

import ipaddress
import re
from dataclasses import dataclass, field

from datatrove.data import Document
from datatrove.pipeline.formatters import PIIFormatter

from .stage import DocumentStage

EMAIL = PIIFormatter().emails_replacer.regex
EMAIL_LOCAL_PART = re.compile(r"[^\s@]{1,64}@")  # 64 octets: RFC 5321, section 4.5.3.1.1
DOMAIN_LENGTH = 255  # octets: the same, 4.5.3.1.2
IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)")
IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{1,4}:[0-9A-Fa-f:]{2,35}(?![\w:])")
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all IPv6 addresses that are given out: RFC 4291, section 2.4

MASKED_EMAIL = "email@example.com"
MASKED_IPV4 = "192.0.2.1"
MASKED_IPV6 = "2001:db8::1"


@dataclass
class PiiArguments:
    mask_emails: bool = field(default=True, metadata={"help": f"Whether e-mail addresses become {MASKED_EMAIL}."})
    mask_ips: bool = field(
        default=True,
        metadata={"help": f"Whether public IP addresses become {MASKED_IPV4}, or {MASKED_IPV6} for version 6."},
    )


class MaskPii(DocumentStage):
    """Drops nothing; counts what it masks."""

    name = "pii"

    def __init__(self, arguments: PiiArguments):
        super().__init__()
        self.arguments = arguments

    def process(self, document: Document) -> None:
        text = document.text
        if self.arguments.mask_emails:
            text = self._count("masked e-mail addresses", *mask_emails(text))
        if self.arguments.mask_ips:
            text = self._count("masked IP addresses", *mask_ip_addresses(text))
        document.text = text

    def _count(self, what: str, text: str, masked: int) -> str:
        if masked:
            self.tally.counts[what] += masked
        return text


def mask_emails(text: str) -> tuple[str, int]:
    """The text with its addresses replaced, and how many they were."""
    if "@" not in text:
        return text, 0
    parts, end = [], 0
    for local_part in EMAIL_LOCAL_PART.finditer(text):
        email = EMAIL.search(text, max(local_part.start(), end), local_part.end() + DOMAIN_LENGTH)
        # An address that begins behind this @ is found at its own.
        if email and email.start() < local_part.end():
            parts += text[end : email.start()], MASKED_EMAIL
            end = email.end()
    return "".join([*parts, text[end:]]) if parts else text, len(parts) // 2


def mask_ip_addresses(text: str) -> tuple[str, int]:
    """The text with its public addresses replaced, and how many they were."""
    masked = 0

    def mask(candidate: re.Match) -> str:
        nonlocal masked
        replacement = _replacement(candidate[0])
        masked += replacement != candidate[0]
        return replacement

    return IPV6.sub(mask, IPV4.sub(mask, text)), masked


def _replacement(candidate: str) -> str:
    try:
        address = ipaddress.ip_address(candidate)
    except ValueError:
        return candidate
    if not address.is_global or address.is_multicast:
        return candidate
    if address.version == 4:
        return MASKED_IPV4
    return MASKED_IPV6 if address in GLOBAL_UNICAST else candidate
