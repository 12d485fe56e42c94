"""Masking of addresses: what is masked, what is not, and that no document's outcome depends on another."""

import ipaddress
import random
import string

import pytest
from datatrove.data import Document

from training.text_pipeline.pii import (
    MASKED_EMAIL,
    MASKED_IPV4,
    MASKED_IPV6,
    MaskPii,
    PiiArguments,
    mask_emails,
    mask_ip_addresses,
)


def masked(texts, **arguments):
    stage = MaskPii(PiiArguments(**arguments))
    documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
    return [document.text for document in stage.run(documents)], stage.tally


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to jo.doe+list@mail.wikipedia.org.", "Write to EMAIL."),
        ("(a@b.co,c@d.net)", "(EMAIL,EMAIL)"),
        ("mailto:x_y@sub.domain.co.uk?subject=a", "mailto:EMAIL?subject=a"),
        ("a@b@c.org", "a@EMAIL"),
        ("no@domain, @handle, a @ b.com and user@localhost", None),
        ("@" * 300, None),
    ],
)
def test_emails(text, expected):
    expected = text if expected is None else expected.replace("EMAIL", MASKED_EMAIL)
    assert mask_emails(text) == (expected, expected.count(MASKED_EMAIL))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from 8.8.8.8, then 141.12.1.254:80.", "from V4, then V4:80."),
        ("http://93.184.216.34/a", "http://V4/a"),
        ("[2606:4700:4700::1111]:443 and 2001:4860:4860:0:0:0:0:8888", "[V6]:443 and V6"),
        ("192.168.0.1, 10.1.2.3, 127.0.0.1, 0.0.0.0, 224.0.0.1 and ::1, fe80::1", None),
        ("v8.8.8.8, 8.8.8.8.8, 8.8.8, 256.8.8.8, 8.8.8.8a", None),
        ("at 12:30:45, std::vector, abc::def, 00:1b:63:84:45:e6", None),
    ],
)
def test_ip_addresses(text, expected):
    expected = text if expected is None else expected.replace("V4", MASKED_IPV4).replace("V6", MASKED_IPV6)
    assert mask_ip_addresses(text)[0] == expected


def test_masked_are_the_public_addresses():
    """Of random addresses, those that `ipaddress` calls global, and none else."""
    generator = random.Random(0)
    for _ in range(2000):
        address = ipaddress.IPv4Address(generator.getrandbits(32))
        public = address.is_global and not address.is_multicast
        assert mask_ip_addresses(f"({address})") == ((f"({MASKED_IPV4})", 1) if public else (f"({address})", 0))
        address = ipaddress.IPv6Address(generator.getrandbits(125) + (1 << 125))
        assert address.is_global
        for form in (address.compressed, address.exploded):
            assert mask_ip_addresses(f"({form})") == (f"({MASKED_IPV6})", 1)


def test_documents_do_not_depend_on_each_other_and_masking_twice_is_masking_once():
    generator = random.Random(0)
    texts = []
    for _ in range(50):
        names = ["".join(generator.choices(string.ascii_lowercase, k=6)) for _ in range(4)]
        texts.append(f"{names[0]}@{names[1]}.org, {names[2]}@{names[3]}.net, {generator.randint(1, 9)}.8.8.8")
    once, tally = masked(texts)
    assert tally.counts == {"masked e-mail addresses": 100, "masked IP addresses": 50}
    assert masked(reversed(texts))[0] == list(reversed(once))
    assert [masked([text])[0][0] for text in texts] == once
    assert masked(once)[0] == once


def test_each_kind_can_be_switched_off():
    text = "jo@doe.org 8.8.8.8"
    assert masked([text], mask_emails=False)[0] == [f"jo@doe.org {MASKED_IPV4}"]
    assert masked([text], mask_ips=False)[0] == [f"{MASKED_EMAIL} 8.8.8.8"]


def test_long_lines_of_base64_are_searched_at_their_address_only():
    """A line on which an expression that begins anew at every word boundary would take days."""
    line = "ab+/" * 250_000
    assert mask_emails(f"{line} jo@doe.org") == (f"{line} {MASKED_EMAIL}", 1)
    assert mask_ip_addresses("1.1." * 50_000 + "f:" * 50_000)[1] == 0
