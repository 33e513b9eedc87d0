"""Secrets out of a command: what is named like a secret, what looks like one, and what `detect-secrets` knows.

Works on the whole line, so that a header whose words are several arguments is seen. Three kinds of rules: names of
flags, of `name=value` pairs and of JSON keys; the forms of known tokens, signatures and headers; and, where it is
installed (`pip install hf-longctx[cards]`), the patterns of `detect-secrets`, which are read from its classes: none of
its settings is touched. What is meant to be read stays: model ids, paths, numbers, revisions, words of a vocabulary.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Sequence


REDACTED = "<redacted>"
_BETWEEN = "\x1f"  # stands between arguments while all are one line; `\s` matches it

# Of `detect-secrets`: no secrets, or too short a pattern (ours asks for more letters).
_LEFT_OUT = ("IPPublicDetector", "ArtifactoryDetector")
_SHORTEST = 8
_LONGEST_NAME = 100
_LONGEST_LINE = 10_000  # that its patterns are tried on: some take the square of the length

# Names, in lower case with "_" between words

_SECRET_NAME = re.compile(
    r"pass_?(word|wd|phrase|code)|(user|db|key|store|mail|smtp|proxy|root|admin|ssh)_?pass$|(^|_)(csrf|pw|pwd|psw|pass|secrets?|cred|creds|credentials?|cookies?|bearer|jwt|otp|sas|sig"
    r"|signature|pat|auth|token|authorization|authentication)$|secret|credential|api_?(key|token)s?(_|$)"
    r"|(access|private|signing|encryption|shared|account|master|storage|subscription|license|ssh)_?keys?(_|$)"
    r"|(^|_)(\w*auth|\w*token|key)$|^connection_?string$"
)
# A token or a key of a vocabulary, a table or a count, and what only says where a secret is.
_ORDINARY_NAME = re.compile(
    r"(^|_)(eos|bos|pad|unk|sep|cls|mask|image|video|audio|stop|start|end|think|special|new|first|last|next|prev|per|max|min"
    r"|num|boi|eoi|eot|eom|fim|tool|added|extra|placeholder|separator|newline|space|chat|system|user|assistant|query|doc"
    r"|document|answer|prompt|boundary|delimiter)_token$"
    r"|(^|_)(text|label|sort|group|column|data|dataset|input|output|image|prompt|completion|response|query|answer|primary"
    r"|foreign|json|field|index|id|metric|audio|video|cache|source|target|name|split|shard|row|document|messages|best|time"
    r"|past|state|kv|attention|weight|bias|num|hot|partition|dict|batch)_key$"
    r"|(^|_)(first|second|one|two|num|max|min|last|per)_pass$"
    r"|_(file|path|dir|folder|env|var|field|column|type|length|len|size|count|name|timeout|url|index)$"
)
_VERBS = re.compile(r"^(use|no|allow|skip|has|with|without|enable|disable|trust|require|save|log|is|return|add|do)_")
_PLURAL = re.compile(r"(keys|secrets|passwords|credentials|creds|cookies)$")
_SWITCH = re.compile(r"(true|false|none|null|yes|no|on|off|0|1)", re.IGNORECASE)
_ASSIGNED = re.compile(r"[-+~]*[A-Za-z_][\w.-]*")
_USER = ("-u", "-U", "--user", "--proxy-user", "--userpwd", "--login")

# Values, by what issues them

_NAMED_VALUES = {
    "Hugging Face": r"\bhf_(?=\w*[A-Z0-9])[A-Za-z0-9]{8,}|\bapi_org_\w{16,}",
    "OpenAI, Anthropic, OpenRouter": r"\bsk-[\w-]{16,}",
    "GitHub": r"\bgh[pousr]_\w{16,}|\bgithub_pat_\w{16,}",
    "GitLab": r"\bgl(?:pat|dt|ft|soat|rt|rtr|cbt|imt|ptt|agent|oas|ffct|wt|sbt)-[\w.-]{12,}|\bGR1348941[\w-]{12,}",
    "Slack": r"\bxox[a-z](?:\.xox[a-z])?-[\w-]{8,}|\bxapp-\d-[\w-]{8,}"
    r"|(?<=hooks\.slack\.com/)(?:services|workflows|triggers)/[^\s\"']+",
    "Discord and Teams webhooks": r"(?<=discord\.com/api/webhooks/)[^\s\"']+|(?<=webhook\.office\.com/)[^\s\"']+",
    "AWS": r"\b(?:A3T[A-Z0-9]|A(?:BIA|CCA|GPA|IDA|IPA|KIA|NPA|NVA|ROA|SCA|SIA))[A-Z0-9]{16}\b",
    "Google": r"\bAIza[\w-]{30,}|\bya29\.[\w-]{16,}|\bGOCSPX-[\w-]{16,}",
    "Stripe": r"\b[rsw](?:k|hsec)_(?:live|test)_\w{12,}|\bwhsec_\w{16,}",
    "npm, PyPI, Docker": r"\bnpm_\w{30,}|\bpypi-AgE[\w-]{16,}|\bdckr_(?:pat|oat)_[\w-]{16,}",
    "clouds": r"\bdo[opr]_v1_[0-9a-f]{32,}|\bdapi[0-9a-f]{32}\b|\bATATT3[\w=-]{16,}"
    r"|\bshp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}|\bAKC[A-Za-z0-9]{20,}|\bAP[0-9A-F][A-Za-z0-9]{24,}"
    r"|\bhv[sbr]\.[\w-]{20,}|\bSG\.[\w-]{16,}\.[\w-]{16,}|\bSK[0-9a-f]{32}\b|\bkey-[0-9a-f]{32}\b",
    "models": r"\bgsk_\w{20,}|\bxai-\w{20,}|\bnvapi-[\w-]{20,}|\br8_\w{20,}|\bpplx-\w{20,}|\bfw_\w{20,}"
    r"|\bwandb_v1_\w{16,}|\btgp_v1_[\w-]{16,}|\bcsk-\w{20,}",
    "Telegram, Mailchimp": r"\b\d{8,10}:[\w-]{35}\b|\b[0-9a-f]{32}-us\d{1,2}\b",
    "Notion, Linear": r"\bntn_\w{20,}|\blin_api_\w{16,}",
    "age": r"\bAGE-SECRET-KEY-1\w{16,}",
    "JSON web token": r"\beyJ[\w=-]{8,}\.[\w=-]{8,}(?:\.[\w.+/=-]*)?",
    "private key": r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----.*?"
    r"(?:-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|$)",
    "password of a URL": r"(?<=://)[^/\s:@\"']*:(?!\d{1,5}(?:[/\s]|$))[^\s\"'@]{0,256}(?:@[^/\s\"'@]{0,256}(?=@)){0,8}(?=@)",
    "token as the user of a URL": r"(?<=://)[\w.~%+-]{16,}(?=@)",
}
_VALUE = re.compile("|".join(f"(?:{pattern})" for pattern in _NAMED_VALUES.values()), re.DOTALL)
# Headers: everything that follows in the same argument, or the word after a scheme.
_SCHEME = r"(?:bearer|basic|diges[t]|token|apikey|api-key|negotiate|aws4-hmac-sha256|sharedkey(?:lite)?|key)"
_HEADER = re.compile(
    r"((?:authorization\\*[\"']?\s*[:=]|(?:cookie|\bx-[\w-]{0,40}(?:token|key|auth|secret|signature)[\w-]{0,40}|"
    r"(?:private|job|deploy|api|auth|access)-(?:token|key))\\*[\"']?\s*:)"
    rf"\s*\\*[\"']?(?:{_SCHEME}\s+)?)([^\x1f\n\"'\\}}]+)",
    re.IGNORECASE,
)
_IS_SCHEME = re.compile(_SCHEME, re.IGNORECASE)
_BEARER = re.compile(r"(\bbearer(?:\s+|%20|\+|[:=]\s*))(?!token\b)([\w.~+/=%-]{6,})", re.IGNORECASE)
_BASIC = re.compile(r"(\bbasic(?:\s+|%20))([A-Za-z0-9+/]{8,}={1,2})", re.IGNORECASE)
# `name=value`, `"name": "value"`, `?name=value&`, also inside quoted JSON. Lengths have bounds, and a name begins
# where a word does, so that the time grows with the line and not with its square.
_NAME = re.compile(r"(?<![\w.-])-*(?P<name>[A-Za-z_][\w.-]{0,100})\\*[\"']?\s*(?:=>|:=|[:=])\s*")
_OF_NAME = re.compile(
    r"(?P<quote>\\*[\"'])(?P<quoted>(?:(?!(?P=quote)).){0,4096})(?P=quote)|\[[^\]]{0,4096}\]|[^\s\"',}&;\])]+",
    re.DOTALL,
)
_RANDOM = re.compile(r"(?<![\w+/.-])(?:[A-Za-z0-9/+]{40}|[A-Za-z0-9]{32,})(?![\w+/.-])")


def redact(arguments: Sequence[str]) -> list[str]:
    """Replace the values of secret-looking options, and secret-looking values wherever they stand."""
    line = _BETWEEN.join(argument.replace(_BETWEEN, " ") for argument in _without_flag_values(arguments))
    return redact_text(line).split(_BETWEEN) if arguments else []


def redact_text(text: str) -> str:
    """Replace what looks like a secret, or is named like one, in any text."""
    text = _VALUE.sub(REDACTED, text)
    for pattern in (_HEADER, _BEARER, _BASIC):
        text = pattern.sub(rf"\1{REDACTED}", text)
    text = _without_pair_values(text)
    text = _RANDOM.sub(lambda match: REDACTED if _looks_random(match.group()) else match.group(), text)
    for found in _known_to_library(text[:_LONGEST_LINE].replace(_BETWEEN, " ")):
        text = text.replace(found, REDACTED)
    return text


def is_secret_name(name: str) -> bool:
    """Whether a flag, key or variable of this name holds a secret: `--hub.token`, `apiKey`, `AWS_SECRET`."""
    if len(name) > _LONGEST_NAME:
        return False
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name.lstrip("-+"))
    words = re.sub(r"[\W_]+", "_", words).strip("_").lower()
    return bool(_SECRET_NAME.search(words)) and not _ORDINARY_NAME.search(words)


def _without_flag_values(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments, less what follows a flag with a secret's name: also a value that begins with dashes."""
    flag, may_end = "", False  # whose value comes next, and whether another flag may come instead
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_flag = argument.startswith("-") and not re.fullmatch(r"-+|-\.?\d.*", argument)
        if flag in _USER and ":" in argument:
            yield REDACTED
            flag = ""
        elif flag and flag not in _USER and not (may_end and is_flag):
            is_shown = _IS_SCHEME.fullmatch(argument) or _is_switch(flag, argument)
            yield argument if is_shown else REDACTED
            has_more = _PLURAL.search(flag) or _IS_SCHEME.fullmatch(argument)  # `--auth Bearer ...`
            flag, may_end = (flag if has_more else ""), True
        elif name in _USER or (_ASSIGNED.fullmatch(name) and (is_flag or equals) and is_secret_name(name)):
            is_ordinary = not equals or _is_switch(name, value) or _is_word(name, value)
            is_ordinary = is_ordinary or bool(_IS_SCHEME.fullmatch(value)) or (name in _USER and ":" not in value)
            yield argument if is_ordinary else f"{name}={REDACTED}"
            flag = "" if equals and not _IS_SCHEME.fullmatch(value) else name
            may_end = bool(equals or _VERBS.match(_plain(name)))
        else:
            yield argument
            flag = ""


def _is_word(name: str, value: str) -> bool:
    """`key=length` names a column or a function."""
    return name.lower() == "key" and bool(re.fullmatch(r"[a-z_]{1,20}", value))


def _is_switch(flag: str, value: str) -> bool:
    return bool(_VERBS.match(_plain(flag)) and _SWITCH.fullmatch(value))


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_").lower()


def _without_pair_values(text: str) -> str:
    kept, start = [], 0
    for name in _NAME.finditer(text):
        value = _OF_NAME.match(text, name.end()) if is_secret_name(name["name"]) and name.start() >= start else None
        if value is None:  # it may hold pairs itself: `--kwargs={"token": ...}`, `url=https://...?sig=...`
            continue
        quote = value["quote"] or ""
        bare = value["quoted"] if quote else value[0]
        is_plain = not bare or bare.startswith("<redacted") or _SWITCH.fullmatch(bare) or _IS_SCHEME.fullmatch(bare)
        if not is_plain and not _is_word(name["name"], bare):
            kept.append(text[start : value.start()] + quote + REDACTED + quote)
            start = value.end()
    return "".join(kept) + text[start:]


def _looks_random(word: str) -> bool:
    """Upper case, digits and many short runs of lower case: names and paths have longer ones, hashes no upper case."""
    runs = re.findall("[a-z]+", word)
    is_mixed = bool(re.search("[A-Z]", word) and re.search("[0-9]", word))
    return is_mixed and len(runs) >= 4 and sum(map(len, runs)) < 2.4 * len(runs)


def _known_to_library(line: str) -> list[str]:
    """What the patterns of `detect-secrets` find, the longest first; nothing where it is not installed.

    Left out are its detectors of random strings, which take a revision for a secret, of public addresses, and of any
    word that begins with `APA`. Its checks whether a secret is valid, which would send it away, are never called.
    """
    try:
        from detect_secrets import plugins
        from detect_secrets.plugins.base import RegexBasedDetector
    except ImportError:
        return []
    found: set[str] = set()
    for module in pkgutil.iter_modules(plugins.__path__):
        contents = vars(importlib.import_module(f"{plugins.__name__}.{module.name}")).values()
        detectors = [kind for kind in contents if inspect.isclass(kind) and issubclass(kind, RegexBasedDetector)]
        known = [kind for kind in detectors if kind is not RegexBasedDetector and kind.__name__ not in _LEFT_OUT]
        for pattern in (pattern for kind in known for pattern in vars(kind).get("denylist", ())):
            for match in pattern.finditer(line):
                groups = [group for group in match.groups() if group and len(group) >= _SHORTEST]
                found.update(groups or [match.group().strip(" \t\n=:\"'")])
    return sorted(
        (secret for secret in found if len(secret) >= _SHORTEST and REDACTED not in secret), key=len, reverse=True
    )
