"""What a store has, in lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from fedbiscuit.data.comparisons import COMPARISONS
from fedbiscuit.data.jsonlines import shown
from fedbiscuit.station.queue import Asking, consistency, progress
from fedbiscuit.station.store import Store

__all__ = ["status_lines"]


def status_lines(store: Store, program: str = "fedbiscuit") -> Iterator[str]:
    """Counts; and of each person how much is done and how far it can be relied on."""
    prompts = store.prompts()
    states = {state: sum(prompt.state == state for prompt in prompts) for state in ("waiting", "written", "failed")}
    pairs, blind = len(store.pair_ids(False)), len(store.pair_ids(True))
    told = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    yield f"{store.folder}: {pairs} pairs" + (f", {blind} of a blind test" if blind else "")
    yield f"{len(prompts)} prompts{f' ({told})' if told else ''}"
    for person in store.people():
        done, steady = progress(store, person, Asking()), consistency(store.history(person))
        yield ""
        yield f"{shown(person)}: {done.judged} judged, {done.ties} of them ties; {done.skipped} skipped, {done.left} to come"
        if steady.repeats:
            yield f"  came again: {steady.repeats}; the same answer {steady.same} times"
            if steady.repeats > steady.same:
                yield f"  else the same place: {steady.both_first} times the first, {steady.both_second} times the second"
        if steady.choices:
            share = 100 * steady.first / steady.choices
            yield f"  the answer shown first was preferred {steady.first} of {steady.choices} times ({share:.0f}%)"
    if (store.folder / COMPARISONS).exists():
        yield ""
        yield f"To look at them as training does: {program} data check {store.folder / COMPARISONS}"
