"""The README's commands, flags, files and log keys exist."""

import importlib
import re
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {p.stem: p.read_text() for p in ROOT.glob("*.py")}


def flags_of(script):
    return {"--" + f.name.replace("_", "-") for f in fields(importlib.import_module(script).Args)}


def test_every_command_in_the_readme_names_a_script_and_flags_that_exist():
    commands = re.findall(r"python (\w+)\.py([^\n`]*)", README + "".join(SCRIPTS.values()))
    assert commands
    for script, rest in commands:
        known = flags_of(script)
        for flag in re.findall(r"--[a-z][\w-]*", rest):
            assert flag in known or "--" + flag.removeprefix("--no-") in known, f"{script}.py has no {flag}"


def test_every_flag_in_the_readme_belongs_to_a_script():
    known = {"--help"}.union(*(flags_of(s) for s in SCRIPTS))
    for flag in re.findall(r"`(--[a-z][\w-]*)", README):
        assert flag in known, flag


def test_every_make_target_in_the_readme_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make (\w+)`", README)) | {"demo", "test"} <= targets


def test_every_script_has_a_row_in_the_readme():
    assert all(f"`{name}.py`" in README for name in SCRIPTS)


def test_no_placeholder_is_left():
    assert "<!--" not in README and "TODO" not in README + "".join(SCRIPTS.values())
