# 4 ---------------------------------------------------------------------------------------------------- prompts
from common.prompts import LETTERS, candidate_lines, history_lines

ALIGN = """A user chose these titles, oldest first:
{history}
Which of these will the user choose next?
{candidates}
Think inside <think></think>, then give one letter inside <answer></answer>."""

PATTERN = """A user chose these titles, oldest first:
{history}
Describe the user's interests in one sentence."""

REASON = """A user chose these titles, oldest first:
{history}
Interests: {pattern}
The user then chose: {item}
Give one reason for this choice in one sentence."""


def align_prompt(history, candidates):
    return ALIGN.format(history=history_lines(history), candidates=candidate_lines(candidates))


def pattern_prompt(history):
    return PATTERN.format(history=history_lines(history))


def reason_prompt(history, pattern, item):
    return REASON.format(history=history_lines(history), pattern=pattern, item=item)
