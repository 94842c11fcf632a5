# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Finds tokens, keys and passwords by the rules of Kingfisher, which MongoDB maintains, and by rules of our own.

Kingfisher 1.5 does not know every vendor, requires a word boundary before a token, and requires both halves of a pair
such as AWS's. Our rules cover these cases. No rule uses entropy alone, because vocabularies and checksums would be
false alarms. Kingfisher scans in this process and offline. The repetitions in our rules are bounded or consume what
they read, so that the time is linear in the length of a text.
"""

import html
import re
from collections.abc import Iterator
from functools import cache
from typing import Any
from urllib.parse import unquote

from huggingface_hub import get_token

SECONDS = 120.0  # time limit for one text
# Matches names of settings that hold a secret, but not the special tokens of a tokenizer.
NAME = (
    r"(?i:(?:api|access|secret|auth|private|account|admin|app|bot|client|license|service)[_-]?(?:key|token|secret)"
    r"|\b(?!(?:bos|eos|unk|pad|cls|sep|mask|image|video|audio|special)_)[a-z]{2,20}[_-](?:key|token|secret)"
    r"|passw(?:or)?d|passphrase)"
)
IS = r"[\"']?\s{0,4}[:=]\s{0,4}[\"']?"
MIXED = r"(?=[\w+/.:~-]{0,80}\d)(?=[\w+/.:~-]{0,80}[A-Za-z])"  # matches if both letters and digits occur
SECRETS = {
    "a Hugging Face token": [r"(?:hf|api_org)_[A-Za-z0-9]{20,}"],
    "an AWS key": [r"(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}"],
    "a GitHub token": [r"gh[pousr]_[A-Za-z0-9]{36,}", r"github_pat_\w{40,}"],
    "a GitLab token": [r"gl(?:pat|rt|dt|ptt|cbt|ft|soat|agent|oas|imt)-[\w-]{20,}"],
    "an API key": [
        r"sk-(?:ant|proj|or|svcacct|admin)-[\w-]{20,}",
        rf"\b(?:sk|pk|rk|pa)[-_]{MIXED}[\w-]{{20,}}",
        r"gsk_\w{40,}",
        r"AIza[\w-]{35}",
        r"(?:pcsk_|xai-|nvapi-|pplx-|tgp_v1_|lsv2_[ps][tk]_|KGAT_|ntn_)[\w-]{20,}",
        rf"\b(?:r8|fw|jina|secret|live|rpa)_{MIXED}[\w-]{{20,}}",
    ],
    "a Weights & Biases key": [
        r"wandb_v1_\w{40,}",
        r"api\.wandb\.ai\s{1,9}login\s{1,9}\w{1,40}\s{1,9}password\s{1,9}[0-9a-f]{40}",
    ],
    "a Slack token": [
        r"xox[abeoprs][.-][A-Za-z0-9.-]{10,}",
        r"xapp-\d-[A-Za-z0-9-]{20,}",
        r"hooks\.slack\.com/\w{1,20}/[\w/]{20,}",
    ],
    "a payment key": [
        r"(?:sk|rk|pk)_(?:live|test)_\w{16,}",
        r"whsec_[\w+/=]{24,}",
        r"sq0(?:atp|csp|idp)-[\w-]{22,}",
        r"\bEAAA[\w-]{60}",
    ],
    "a Google secret": [r"GOCSPX-[\w-]{28}", r"\bya29\.[\w-]{40,}", r"\b1//0[\w-]{40,}"],
    "an Azure secret": [
        r"\b\w{3}\dQ~[\w.~-]{31,34}",
        r"[?&;](?:amp;)?sig=[\w%+/=-]{40,}",
        r"AccountKey=[\w+/=]{80,}",
    ],
    "a bot's token": [
        r"\b\d{8,10}:AA[\w-]{33}",
        r"\b[MNO][\w-]{23,27}\.[\w-]{6,7}\.[\w-]{27,40}",
        r"discord(?:app)?\.com/api/webhooks/\d{15,21}/[\w-]{60,}",
    ],
    "a mail service's key": [
        r"SG\.[\w-]{16,32}\.[\w-]{16,64}",
        r"\bkey-[0-9a-f]{32}",
        r"\b[0-9a-f]{32}-us\d{1,2}\b",
        r"\b(?:AC|SK)[0-9a-f]{32}\b",
    ],
    "a package registry's token": [
        r"pypi-[\w-]{40,}",
        r"npm_[A-Za-z0-9]{36}",
        r"rubygems_[0-9a-f]{48}",
        r"dckr_(?:pat|oat)_[\w-]{20,}",
        r"\boy2[a-z0-9]{43}",
        r"\bcio[A-Za-z0-9]{32}\b",
        r"AKCp[A-Za-z0-9]{60,}",
        r"cmVmdGtu\w{50,}",
    ],
    "a cloud's token": [
        r"dapi[0-9a-f]{32}",
        r"do[opr]_v1_[0-9a-f]{64}",
        r"nfp_\w{36,}",
        r"vercel_\w{20,}",
        r"vc[pikar]_\w{24,}",
        r"tskey-[a-z]{1,20}-[\w-]{20,}",
        r"\bLTAI[A-Za-z0-9]{12,24}\b",
        r"\bAKID[A-Za-z0-9]{32,}",
        r"\bAQVN[\w-]{35,}",
        r"hv[sbr]\.[\w-]{24,}",
        r"\w{14}\.atlasv1\.[\w-]{60,}",
        r"\bms-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
        r"dp\.(?:pt|st|ct|sa)\.\w{40,}",
        r"\ba[ks]-[A-Za-z0-9]{22}\b",
        r"fm[12]_[\w+/=-]{60,}",
    ],
    "a service's token": [
        r"NRAK-[A-Z0-9]{27}",
        r"sntry[su]_[\w+/=-]{40,}",
        r"glsa_\w{32,}",
        r"PMAK-[\w-]{40,}",
        r"lin_api_\w{32,}",
        r"fig[dou]_[\w-]{40,}",
        r"\bpat\w{14}\.[0-9a-f]{64}",
        r"shp(?:at|ca|pa|ss)_[0-9a-f]{32}",
        r"ATATT3[\w=-]{40,}",
        r"\bsl\.[\w-]{100,}",
        r"\bA{20}[\w%]{60,}",
        r"EAACEdEose0cBA\w{10,}",
    ],
    "a signed token": [r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{16,}"],
    "a private key": [r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----", r"AGE-SECRET-KEY-1\w{50,}"],
    "a password in a URL": [r"[a-z0-9+.-]://[^\s/:@\"'<>]{1,100}:[^\s/:@\"'<>{}$]{1,200}@\w"],
    "a password or key": [
        rf"{NAME}{IS}{MIXED}[\w+/.:~-]{{12,}}",
        r"(?i:passw(?:or)?d|passphrase)[\"']?\s{0,4}[:=]\s{0,4}[\"'][^\s\"'<>{}]{8,}[\"']",
        rf"(?i:authorization){IS}(?i:basic|bearer)\s{{1,4}}[\w+/=.~-]{{16,}}",
    ],
}
PATTERNS = {kind: re.compile("|".join(patterns)) for kind, patterns in SECRETS.items()}


@cache
def scanner() -> Any:
    """Returns Kingfisher with its own rules; it stores them compiled in the user's cache folder.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        from kingfisher_sdk import Scanner
    except ImportError as error:
        raise ValueError("Looking for secrets needs kingfisher-secret-scanner: pip install -e '.[publish]'") from error
    return Scanner()


def secrets_in(content: bytes | str) -> list[str]:
    """Returns the kinds of secrets in a text, in words that do not repeat them; it is empty if there are none."""
    *whole, _ = texts = list(readings(content))
    token = get_token()
    found = ["the token that you are logged in with"] if token and any(token in text for text in whole) else []
    found = found or [kind for kind, pattern in PATTERNS.items() if any(pattern.search(text) for text in whole)]
    if found:
        return found[:1]
    findings = [finding for text in texts for finding in scanner().scan(text, timeout=SECONDS) if finding.visible]
    return sorted({f"what looks like a secret ({finding.rule_id})" for finding in findings})


def readings(content: bytes | str) -> Iterator[str]:
    """Yields a text unchanged, with its escapes resolved, and with each word on its own line.

    Zero bytes are removed, because a token in UTF-16 or UTF-32 is ASCII without them.
    """
    content = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
    text = content.decode("utf-8", "replace")
    plain = text.replace("\0", "")
    yield text
    resolved = unescape(plain).encode("utf-8", "replace").decode()  # this removes lone surrogates
    if resolved != text:
        yield resolved
    yield re.sub(r"[^\w+/=.:@%~&?-]+", "\n", resolved)


def unescape(text: str) -> str:
    r"""Resolves `\u0068`, `\x68`, `&#104;`, `%68`, `\n` and the slash of JSON, `\/`."""
    escape = r"\\(?:u([0-9A-Fa-f]{4})|x([0-9A-Fa-f]{2})|U000([0-9A-Fa-f]{5}))"
    text = re.sub(escape, lambda match: chr(int(match[match.lastindex or 0], 16)), text)
    return unquote(html.unescape(text.replace("\\/", "/").replace("\\n", "\n").replace('\\"', '"')))
