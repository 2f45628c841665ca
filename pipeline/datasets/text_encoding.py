"""Decode text files: UTF-8, UTF-16, the encoding that the user names, or plausible Windows-1252."""

from __future__ import annotations

import codecs
import re

from pipeline.utils.errors import UserError

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Possible encodings of text that is neither UTF-8 nor Windows-1252.
CANDIDATES = (
    "gb18030 big5 shift_jis euc_jp cp949 cp1250 cp1251 cp1253 cp1254 cp1255 cp1256 cp1257 cp874 "
    "koi8_r cp866 iso8859_2"
).split()
# Bytes of text that ``_guess`` looks at.
GUESSED_FROM = 20_000
IMPOSSIBLE = re.compile("[\0\ufffd]")
# In Western text accented letters stand alone or in pairs, and signs such as ¿ or ³ do not stand
# between letters. Typographic quotes and dashes prove nothing.
LONG_RUN = re.compile(r"[^\x00-\x7f\u2010-\u2122]{3,}")
SIGN_IN_WORD = re.compile(r"(?<=[^\W\d_])[\xa1-\xb3\xb5\xb6\xb8-\xbf\xd7\xf7](?=[^\W\d_])")


def decode_text(content: bytes, name: str, encoding: str | None = None) -> tuple[str, str]:
    """Decode a file; return its text, and a note on anything doubtful, or "".

    A byte-order mark takes precedence, then ``encoding``, then UTF-8. Other text is read as
    Windows-1252 if that is plausible.

    Raises:
        UserError: it is not in ``encoding``, or no encoding is plausible.
    """
    marked = next((MARKS[mark] for mark in MARKS if content.startswith(mark)), None)
    if encoding and not marked:
        try:
            return content.decode(encoding), ""
        except UnicodeDecodeError as error:
            where = f"byte {error.start:,}: {error.reason}"
            raise UserError(f"{name}: not in --encoding {encoding} ({where})") from error
        except (LookupError, ValueError) as error:
            raise UserError(
                f"--encoding {encoding}: no such text encoding; such as utf-8, cp1252, gb18030"
            ) from error
    # In Latin text, every other byte of UTF-16 is NUL.
    if marked or content.count(0) * 10 < len(content):
        text = content.decode(marked or "utf-8", "replace")
        wrong = text.count("\ufffd")
        if not wrong:
            return text, ""
        if marked or sum(not letter.isascii() for letter in text) > 6 * wrong:
            return text, "file with damaged characters, which became U+FFFD"
    text = content.decode("cp1252", "replace")
    foreign = sum(not letter.isascii() for letter in text)
    in_runs, signs = sum(map(len, LONG_RUN.findall(text))), len(SIGN_IN_WORD.findall(text))
    if not IMPOSSIBLE.search(text) and in_runs <= 0.3 * foreign and signs <= 0.05 * foreign:
        return text, "file not UTF-8, read as Windows-1252, see --encoding"
    guess = _guess(content)
    likely = f"; it is likely {guess}: add --encoding {guess}" if guess else ": add --encoding NAME"
    raise UserError(f"{name}: neither UTF-8 nor Windows-1252{likely}, or save it as UTF-8")


def _guess(content: bytes) -> str | None:
    """Return the likely encoding of text that is neither UTF-8 nor Windows-1252."""
    if b"\0" in content:
        guess = "utf-16-le" if content[1::2].count(0) > content[::2].count(0) else "utf-16-be"
        try:
            return guess if "\n" in content.decode(guess) else None
        except UnicodeDecodeError:
            return None
    from charset_normalizer import from_bytes

    # Image names, which are mostly ASCII, would dilute the evidence.
    lines = b"\n".join(line for line in content.splitlines() if not line.isascii())
    lines = lines[: lines.rfind(b"\n", 0, GUESSED_FROM)] if len(lines) > GUESSED_FROM else lines
    best = from_bytes(lines, cp_isolation=CANDIDATES).best()
    return best.encoding if best else None
