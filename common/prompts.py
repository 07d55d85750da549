"""How items, histories and candidates are written for a language model: the lines that all prompts share.

Titles are data. They are written on one line, shortened, and never parsed back: answers are letters, so that a title
that holds `</answer>` or a letter of its own cannot be mistaken for one.
"""

import re

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def item_line(title, categories, limit=80):
    """`The Silent Harbor (mystery, ocean)`: title, then at most 4 categories. Line breaks and length are tamed."""
    title = re.sub(r"\s+", " ", title).strip()
    title = title if len(title) <= limit else title[:limit - 1].rstrip() + "…"
    return f"{title} ({', '.join(categories[:4])})" if categories else title


def history_lines(lines):
    """One `- line` per item, oldest first; says so when there is none, since an empty list reads like a mistake."""
    return "\n".join(f"- {line}" for line in lines) if lines else "- (nothing yet)"


def candidate_lines(lines):
    """One `A. line` per candidate, at most 26."""
    return "\n".join(f"{LETTERS[k]}. {line}" for k, line in enumerate(lines))
