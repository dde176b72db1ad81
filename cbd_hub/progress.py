"""What a long job shows on standard error: a bar on a terminal, one line a stage elsewhere.

A log file or a pipe gets no bars, which would be thousands of lines there: it gets a line when a stage is finished,
with what was counted and how long that took. ``HF_HUB_DISABLE_PROGRESS_BARS=1`` and
``huggingface_hub.utils.disable_progress_bars()`` silence both, but not :func:`stage_line`.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub.utils.tqdm import are_progress_bars_disabled, tqdm

__all__ = ["counter", "progress_bar", "stage_line", "transformers_bars_off"]

Item = TypeVar("Item")
_GROUP = "cbd_hub"


@contextmanager
def counter(
    description: str, total: int | None = None, *, unit: str = "item", enabled: bool = True
) -> Iterator[Callable[[int], object]]:
    """Yields a function that advances a progress bar by a number of units.

    Args:
        description: Shown before the bar.
        total: What the bar counts to, where that is known.
        unit: What is counted; ``B`` (bytes) is shown as kB, MB and so on.
        enabled: False shows nothing.
    """
    on_terminal, start = sys.stderr.isatty(), time.monotonic()
    with tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=unit == "B",
        disable=not (enabled and on_terminal),
        name=_GROUP,
    ) as bar:
        count = 0

        def add(number: int = 1) -> None:
            nonlocal count
            count += number
            bar.update(number)

        yield add
    if not (on_terminal or are_progress_bars_disabled(_GROUP)):
        amount = (
            tqdm.format_sizeof(count, "B")
            if unit == "B"
            else f"{count} {unit}{'' if count == 1 else 'es' if unit.endswith('ch') else 's'}"
        )
        stage_line(f"{description}: {amount}, {time.monotonic() - start:.1f} s", enabled)


def progress_bar(
    items: Iterable[Item],
    description: str,
    *,
    total: int | None = None,
    unit: str = "item",
    enabled: bool = True,
) -> Iterator[Item]:
    """Passes items on, showing how many have been passed.

    Args:
        items: What to loop over.
        description: Shown before the bar.
        total: Number of items, where it cannot be asked of `items`.
        unit: What an item is called.
        enabled: False passes the items on silently.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with counter(description, total, unit=unit, enabled=enabled) as add:
        for item in items:
            try:
                yield item
            except GeneratorExit:  # the loop was left early: the stage is finished all the same
                break
            add(1)


@contextmanager
def transformers_bars_off(enabled: bool = True) -> Iterator[None]:
    """Keeps transformers' own bars, of loading and saving a model, away for as long as the context lasts.

    Its switch for them is not used: it is huggingface_hub's as well, which silences the lines of this module.

    Args:
        enabled: False changes nothing.
    """
    if not enabled:
        yield
        return
    from transformers.utils import logging

    def silent(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return factory(*args, **{**options, "disable": True})

    previous = logging.set_tqdm_hook(silent)
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


def stage_line(text: str, enabled: bool = True) -> None:
    """Writes one line about a stage to standard error, whatever is set about bars: it may state a decision."""
    if enabled:
        sys.stderr.write(f"{text}\n")
