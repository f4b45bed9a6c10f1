"""A builder's progress, as a share of the whole."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from l4convert.progress import Task

#: Units of a task that :class:`Steps` advances.
TOTAL = 100.0


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Steps:
    """Turns nested phases of steps into one number that only grows; may be called from any thread.

    A phase of n steps is worth one step of the phase that it runs in.
    """

    def __init__(self, task: Task, title: str) -> None:
        self._task = task
        self._title = title
        self._lock = threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._reported = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, inside of ``parent`` unless it is the outermost."""
        with self._lock:
            self._phases[name] = _Phase(parent if parent in self._phases else None, max(steps, 1))
            self._show(name)

    def step(self, name: str, step: int) -> None:
        """Step number ``step``, from 0, is done."""
        with self._lock:
            if (phase := self._phases.get(name)) is not None:
                phase.done = max(phase.done, step + 1)
                self._report()

    def finish(self, name: str) -> None:
        """A phase ends, and the one that it was in goes on."""
        with self._lock:
            ended = self._phases.pop(name, None)
            if ended is not None and ended.parent is not None:
                self._show(ended.parent)

    def _show(self, name: str) -> None:
        self._task.update(f"{self._title}: {name[:1].lower()}{name[1:]}")

    def _report(self) -> None:
        share = max((self._share(name) for name, phase in self._phases.items() if phase.parent is None), default=0.0)
        now = min(share, 1.0) * TOTAL
        if now > self._reported:
            self._task.advance(now - self._reported)
            self._reported = now

    def _share(self, name: str) -> float:
        phase = self._phases[name]
        inner = max((self._share(child) for child, p in self._phases.items() if p.parent == name), default=0.0)
        return (phase.done + min(inner, 1.0)) / phase.steps


def make_monitor(module: Any, steps: Steps) -> Any:
    """An ``IProgressMonitor`` of the given module that reports to ``steps``."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # the base class is known at run time only
        """What is raised here would be printed by the builder and forgotten, so nothing is."""

        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            steps.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            steps.step(phase_name, step)
            return True  # go on; a build is ended by ending its process

        def phase_finish(self, phase_name: str) -> None:
            steps.finish(phase_name)

    return Monitor()
