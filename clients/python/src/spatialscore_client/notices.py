"""What a client tells its log of waits and faults: at once, then at growing intervals."""

from __future__ import annotations

import logging
import threading
import time

_log = logging.getLogger("spatialscore_client")
# Seconds between two notices of one matter: doubling from the first to the second. One that was quiet for longer than
# the second is new.
_FIRST_INTERVAL = 5.0
_LONGEST_INTERVAL = 300.0


class Notices:
    """The notices of one client. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By matter: when it was last raised, when it may be said again, and the interval behind that.
        self._said: dict[str, tuple[float, float, float]] = {}

    def say(self, matter: str, text: str) -> None:
        """Warns, unless this matter was told a short while ago."""
        now = time.monotonic()
        with self._lock:
            raised, due, interval = self._said.get(matter, (now, now, _FIRST_INTERVAL))
            if now - raised > _LONGEST_INTERVAL:
                due, interval = now, _FIRST_INTERVAL
            quiet = now < due
            if not quiet:
                due, interval = now + interval, min(2 * interval, _LONGEST_INTERVAL)
            self._said[matter] = now, due, interval
        if not quiet:
            _log.warning("%s", text)

    def over(self, matter: str, text: str) -> None:
        """Tells the end of a matter, if it was told."""
        with self._lock:
            told = self._said.pop(matter, None)
        if told is not None:
            _log.warning("%s", text)

    def once(self, matter: str, text: str) -> None:
        """Warns once in the life of the client."""
        with self._lock:
            known = matter in self._said
            self._said[matter] = time.monotonic(), float("inf"), _LONGEST_INTERVAL
        if not known:
            _log.warning("%s", text)
