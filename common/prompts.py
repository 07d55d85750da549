"""How items, histories and candidates are written for a language model: the lines that all prompts share.

Titles are data. They are written on one line, shortened, and never parsed back: answers are letters (in lcft.py
Yes or No), so that a title that holds `</answer>` or a letter of its own cannot be mistaken for one.
"""

import re

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def item_line(title, categories, limit=80):
    """`mystery, ocean: The Silent Harbor`: at most 4 categories, then the title on one line, shortened, `<` and `>`
    replaced: whoever quotes it cannot write a tag by accident."""
    title = re.sub(r"\s+", " ", title).strip()
    title = title if len(title) <= limit else title[:limit - 1].rstrip() + "…"
    line = f"{', '.join(categories[:4])}: {title}" if categories else title
    return line.replace("<", "‹").replace(">", "›")


def history_lines(lines):
    """One `- line` per item, oldest first; says so when there is none, since an empty list reads like a mistake."""
    return "\n".join(f"- {line}" for line in lines) if lines else "- (nothing yet)"


def lettered(line, k):
    return f"{line} [{LETTERS[k]}]"


def candidate_lines(lines):
    """One `* line [A]` per candidate, at most 26. What a reader looks for comes first and the letter last, so that
    quoting the line from left to right finds the letter; the bullet tells them from the history."""
    return "\n".join(f"* {lettered(line, k)}" for k, line in enumerate(lines))
