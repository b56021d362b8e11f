"""From a comparison to the tokens that a selector reads: templates, truncation, both orders.

A template is filled piece by piece: each literal and each text is tokenized on its own and the ids are joined. So braces
inside people's texts mean nothing, special tokens inside them stay plain text, and both orders of a comparison share all
that stands before the first answer token for token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedbiscuit.types import Comparison, ConfigError, DataError

__all__ = [
    "EXTRA",
    "TEMPLATES",
    "EncodedComparison",
    "Encoder",
    "Template",
    "encode_answers",
    "encode_comparison",
    "extra_fields",
    "load_template",
    "parse_template",
]

Encoder = Callable[[str], Sequence[int]]
"""Text to token ids, without special tokens added or parsed."""

ANSWERS = ("output_a", "output_b")
SHORTENED = ("prompt", "post")
EXTRA = ("subreddit", "title")
MAX_TEMPLATE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Template:
    """Literals and field names in turn: ``pieces[0]`` is a literal, ``pieces[1]`` a field, and so on."""

    name: str
    pieces: tuple[str, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields in the order in which they occur."""
        return self.pieces[1::2]

    @property
    def text(self) -> str:
        """As it was written, with ``{field}`` placeholders."""
        return "".join(f"{{{piece}}}" if i % 2 else piece for i, piece in enumerate(self.pieces))


@dataclass(frozen=True, slots=True)
class EncodedComparison:
    """One comparison as token ids, ready for a selector.

    ``ab`` shows (A, B) and ``ba`` shows (B, A); each ends right before the letter. For a reward model, which reads one answer
    at a time, ``ab`` shows A and ``ba`` shows B. ``cut`` is the number of prompt tokens
    that were left out to fit.
    """

    ab: tuple[int, ...]
    ba: tuple[int, ...]
    choice: int | None
    id: str | None = None
    cut: int = 0


TEMPLATES = {
    "pairwise": (
        "Two responses to the same request are shown. Decide which of them is better.\n\n"
        "Request: {prompt}\n\nResponse A: {output_a}\n\nResponse B: {output_b}\n\nThe better response is:"
    ),
    "choice": "{prompt}\nA: {output_a}\nB: {output_b}\nBetter:",
    "tldr": (
        "A forum post and two summaries of it are shown. Decide which summary tells the important points better.\n\n"
        "Forum: r/{subreddit}\nTitle: {title}\nPost: {post}\n\n"
        "Summary A: {output_a}\n\nSummary B: {output_b}\n\nThe better summary is:"
    ),
    "shp": (
        "A question from a forum and two replies are shown. Decide which reply helps the asker more.\n\n"
        "Question: {prompt}\n\nReply A: {output_a}\n\nReply B: {output_b}\n\nThe more helpful reply is:"
    ),
}


REWARD = (
    "A response to a request is shown. Judge how good it is.\n\nRequest:",
    "\n\nResponse:",
    "\n\nHow good the response is:",
)
"""What stands before the prompt, before the answer and behind it, where a reward model reads one answer."""


def load_template(name_or_path: str) -> Template:
    """A shipped template by name, or a user's from a text file.

    Raises ``ConfigError`` for anything but plain ``{field}`` placeholders, or where an answer or the prompt is missing.
    """
    if name_or_path in TEMPLATES:
        return parse_template(TEMPLATES[name_or_path], name_or_path)
    path = Path(name_or_path)
    if not path.is_file():
        known = ", ".join(sorted(TEMPLATES))
        raise ConfigError(f"data.template: {name_or_path!r} is neither a template ({known}) nor a file")
    raw = path.read_bytes()
    if len(raw) > MAX_TEMPLATE_BYTES:
        raise ConfigError(f"{path}: a template of {len(raw)} bytes; at most {MAX_TEMPLATE_BYTES}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start}: not UTF-8; save the template as UTF-8") from None
    return parse_template(text.rstrip("\n"), str(path))


def parse_template(text: str, name: str) -> Template:
    """Split a template at its ``{field}`` placeholders; only names of fields are allowed between braces."""
    pieces = re.split(r"\{([^{}]*)\}", text)
    allowed = (*SHORTENED, *ANSWERS, *EXTRA)
    for field in pieces[1::2]:
        if field not in allowed:
            raise ConfigError(
                f"template {name}: {{{field}}} is not a field; only plain names are: {', '.join(allowed)}"
            )
    if any("{" in literal or "}" in literal for literal in pieces[::2]):
        raise ConfigError(f"template {name}: a single brace; braces may only enclose a field, such as {{prompt}}")
    counts = {field: pieces[1::2].count(field) for field in allowed}
    wrong = [field for field in ANSWERS if counts[field] != 1]
    if wrong:
        raise ConfigError(f"template {name}: needs each of {{output_a}} and {{output_b}} once; see {wrong}")
    if sum(counts[field] for field in SHORTENED) != 1:
        raise ConfigError(
            f"template {name}: needs {{prompt}} (or {{post}}) exactly once; it is what is shortened to fit"
        )
    if not pieces[-1] or pieces[-1][-1].isspace():
        raise ConfigError(
            f"template {name}: must end in the text right before the letter, without white space at the end"
        )
    return Template(name, tuple(pieces))


def extra_fields(template: Template, kind: str) -> tuple[str, ...]:
    """What a selector of this kind reads beside prompt and answers, such as a title. A reward model has no use for a template."""
    return () if kind == "reward" else tuple(dict.fromkeys(field for field in template.fields if field in EXTRA))


def encode_comparison(
    comparison: Comparison, template: Template, encode: Encoder, max_tokens: int, start: Sequence[int] = ()
) -> EncodedComparison | None:
    """Both orders of a comparison as token ids (at most ``max_tokens`` each); None where the two answers do not fit.

    The prompt is shortened from its end; the answers and the literals never are (mistake 7 of the original).
    ``start`` is what the tokenizer puts before every text (a begin-of-text token, or nothing).
    """
    parts = [list(encode(part)) for part in _texts(comparison, template)]
    shortened = next(i for i, field in enumerate(template.fields) if field in SHORTENED) * 2 + 1
    others = len(start) + sum(len(part) for i, part in enumerate(parts) if i != shortened)
    room = max_tokens - others
    if room < 0:
        return None
    cut = max(0, len(parts[shortened]) - room)
    parts[shortened] = parts[shortened][:room]
    a, b = (template.pieces.index(field) for field in ANSWERS)
    ab = tuple(start) + tuple(token for part in parts for token in part)
    parts[a], parts[b] = parts[b], parts[a]
    ba = tuple(start) + tuple(token for part in parts for token in part)
    return EncodedComparison(ab, ba, comparison.choice, comparison.id, cut)


def encode_answers(
    comparison: Comparison, encode: Encoder, max_tokens: int, start: Sequence[int] = ()
) -> EncodedComparison | None:
    """Each answer by itself below the prompt, for a reward model; None where the longer one does not fit.

    The prompt is shortened from its end, for both answers alike, as in ``encode_comparison``.
    """
    before, between, behind = (list(encode(part)) for part in REWARD)
    prompt, *answers = (
        list(encode(f" {text}")) for text in (comparison.prompt, comparison.output_a, comparison.output_b)
    )
    room = max_tokens - len(start) - len(before) - len(between) - len(behind) - max(map(len, answers))
    if room < 0:
        return None
    a, b = ((*start, *before, *prompt[:room], *between, *answer, *behind) for answer in answers)
    return EncodedComparison(a, b, comparison.choice, comparison.id, max(0, len(prompt) - room))


def _texts(comparison: Comparison, template: Template) -> list[str]:
    """The literals and the comparison's texts in the template's order."""
    extra: Mapping[str, str] = comparison.meta.get("fields", {})
    values = {
        "prompt": comparison.prompt,
        "post": comparison.prompt,
        "output_a": comparison.output_a,
        "output_b": comparison.output_b,
    }
    texts = list(template.pieces)
    for i, field in zip(range(1, len(texts), 2), template.fields, strict=True):
        if field not in values and field not in extra:
            which = f"comparison {comparison.id!r}: " if comparison.id else ""
            raise DataError(
                f"{which}template {template.name} shows {{{field}}}, and a record has none; give it there, as "
                f'"meta": {{"fields": {{"{field}": "..."}}}}, or choose another template (data.template) before training'
            )
        texts[i] = values[field] if field in values else str(extra[field])
        if texts[i - 1].endswith(" "):  # a space belongs to the word after it, as tokenizers have it
            texts[i - 1], texts[i] = texts[i - 1][:-1], " " + texts[i]
    return texts
