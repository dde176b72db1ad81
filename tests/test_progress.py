"""Progress on a real terminal (a pseudo one) and in a pipe, in processes of their own."""

import os
import re
import subprocess
import sys

import pytest
import terminal

from cbd_hub.progress import progress_bar

LOOP = "from cbd_hub.progress import *; print(list(progress_bar(range(3), 'counting', unit='number')))"
BYTES = "from cbd_hub.progress import *\nwith counter('fetching', 2_500_000, unit='B') as add: add(2_500_000)"


def environment(**more: str) -> dict[str, str]:
    return {"PATH": "", "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb", **more}


def in_a_pipe(code: str, **more: str) -> str:
    run = [sys.executable, "-c", code]
    return subprocess.run(run, capture_output=True, text=True, check=True, env=environment(**more)).stderr


def on_a_terminal(code: str, **more: str) -> str:
    return terminal.on_a_terminal([sys.executable, "-c", code], environment(**more), subprocess.DEVNULL)


def test_a_terminal_has_a_bar() -> None:
    shown = on_a_terminal(LOOP)
    assert "counting: 100%" in shown and "3/3" in shown


@pytest.mark.parametrize(
    ("code", "line"), [(LOOP, r"counting: 3 numbers, \d+\.\d s\n"), (BYTES, r"fetching: 2\.50MB, \d+\.\d s\n")]
)
def test_a_pipe_has_one_line_a_stage(code: str, line: str) -> None:
    assert re.fullmatch(line, in_a_pipe(code))


def test_a_loop_that_is_left_early_is_a_finished_stage() -> None:
    code = "from cbd_hub.progress import *\nfor i in progress_bar(range(9), 'looking'):\n    if i == 2: break"
    assert re.fullmatch(r"looking: 2 items, \d+\.\d s\n", in_a_pipe(code))


def test_a_stage_that_fails_is_not_called_finished() -> None:
    code = """
from cbd_hub.progress import *
try:
    with counter("writing") as add:
        raise OSError
except OSError:
    pass
"""
    assert in_a_pipe(code) == ""


@pytest.mark.parametrize("show", [in_a_pipe, on_a_terminal])
def test_the_variable_of_the_hub_silences_bars_and_not_decisions(show: object) -> None:
    assert callable(show)
    assert show(LOOP, HF_HUB_DISABLE_PROGRESS_BARS="1") == ""
    code = "from cbd_hub.progress import *; stage_line('a decision')"
    assert show(code, HF_HUB_DISABLE_PROGRESS_BARS="1").strip() == "a decision"


def test_progress_that_is_not_wanted_shows_nothing() -> None:
    code = (
        "from cbd_hub.progress import *; list(progress_bar([1, 2], 'counting', enabled=False)); stage_line('a', False)"
    )
    assert in_a_pipe(code) == ""


def test_a_generator_is_passed_on() -> None:
    assert list(progress_bar((x * x for x in range(4)), "squaring", total=4)) == [0, 1, 4, 9]


LOADED = """
from transformers.utils import logging
from cbd_hub.progress import *
logging.enable_progress_bar()
def load(name): list(logging.tqdm(range(3), desc=name))
with transformers_bars_off():
    load("silent")
    list(progress_bar(range(3), "own", unit="step"))
try:
    with transformers_bars_off():
        1 / 0
except ZeroDivisionError:
    load("again")
with transformers_bars_off(enabled=False):
    load("asked for")
"""


def test_transformers_bars_stay_away_for_a_while_and_ours_do_not() -> None:
    shown = in_a_pipe(LOADED)
    assert "silent" not in shown and "again: 100%" in shown and "asked for: 100%" in shown
    assert re.search(r"^own: 3 steps, \d+\.\d s$", shown, re.MULTILINE)
