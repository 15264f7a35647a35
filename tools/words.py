"""Keeps words out that the glossary of docs/architecture.md has replaced: python tools/words.py"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".md", ".proto", ".yaml", ".toml"}
INSTEAD = {  # what must not be written -> the field's word for it
    r"(?<!in )(?<!in_)\bflights?\b": "sequence state",
    r"\bspoken\b|\bspeak\(": "detokenized output",
    r"\bread(s|ing|ers?)? along\b": "early reservation",
    r"\bon loan\b": "preemptible",
    r"\b(at|left to) rest\b|\brest(s|ed|ing) (from|until|for a)\b|\b_?rest(s|ed|ing)\(": "back-off",
    r"\b(has|have|gets?|given|gives?) (a|its|their) names?\b": "is hashed",
    r"\broads?\b": "path",
    r"\b(has|have|had) word of\b|\blast words?\b|\bword of (a|the) prompt\b": "progress, answer",
    r"\bparked?\b": "waiting",
    r"\bstand-?ins?\b|\bstand_in\b": "fake",
    r"\bletting go\b|\blets? go\b": "release",
    r"\btakes? off\b": "start",
    r"\bunnam(ed|es?|ing)\b|\bnamed (blocks?|ones)\b|\b(full and|cached \() ?named\b|"
    r"\bnames? ((the|its|full|generated) )*blocks?\b|\bblocks? (are|is|stays?) named\b(?! twice)|"
    r"\ba name prefers\b|\bholds? (a|the|its) names?\b": "hashed, cached, evictable",
    r"'s word\b|\bon (that|its|their) word\b": "answer, by",
}
BANNED = re.compile("|".join(f"(?P<w{i}>{word})" for i, word in enumerate(INSTEAD)), re.IGNORECASE)


def banned_words(text: str) -> list[tuple[int, str, str]]:
    """(line, what stands there, what to write instead) of every banned word, in identifiers too."""
    found = set()
    for number, line in enumerate(text.splitlines(), 1):
        for words in (line, line.replace("_", " ")):
            for match in BANNED.finditer(words):
                index = int((match.lastgroup or "w0")[1:])
                found.add((number, match[0], list(INSTEAD.values())[index]))
    return sorted(found)


def main() -> int:
    """Prints each banned word of the tracked files; the exit status is 1 where there is one."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\n")  # fmt: skip
    bad = 0
    for name in listed:
        path = ROOT / name
        if path.suffix not in SUFFIXES or not path.is_file() or path == Path(__file__).resolve():
            continue
        for line, word, instead in banned_words(path.read_text(encoding="utf-8")):
            bad += 1
            print(f"{name}:{line}: {word!r}: say {instead}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
