"""Non-finite values: found on the device, decided once per optimizer step, counted, never saved."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from ltx2_tuner.errors import UserError

logger = logging.getLogger(__name__)

LIMIT = 10  # dropped windows in a row that end the run


@dataclass
class NonFiniteGuard:
    """Decides whether an accumulation window is stepped. check: `off`, `warn`, `skip` or `error`."""

    check: str = "skip"
    dropped: int = 0
    in_a_row: int = 0
    seen: dict[str, int] = field(default_factory=dict)

    @property
    def drops(self) -> bool:
        """Whether a window that is not finite is not stepped on."""
        return self.check in ("skip", "error")

    def accept(self, finite: bool, items: list[str]) -> bool:
        """Whether the optimizer may step on a window made of `items`.

        Raises:
            UserError: non-finite under `error`, or `LIMIT` windows in a row.
        """
        if finite or self.check == "off":
            self.in_a_row = 0
            return True
        names = ", ".join(items)
        if self.check == "warn":
            logger.warning("loss or gradient is not finite in a step on %s", names)
            return True
        if self.check == "error":
            raise UserError(
                f"loss or gradient is not finite in a step on {names}; lower --learning_rate or look at these items"
            )
        self.dropped += 1
        self.in_a_row += 1
        for item in items:
            self.seen[item] = self.seen.get(item, 0) + 1
        logger.warning("loss or gradient is not finite, the step is skipped (%d so far): %s", self.dropped, names)
        if self.in_a_row >= LIMIT:
            raise UserError(
                f"{LIMIT} steps in a row gave a loss or gradient that is not finite, the last on {names}; "
                "lower --learning_rate, or cache these items again if the loss was never finite"
            )
        return False

    def state(self) -> dict[str, object]:
        return {"dropped": self.dropped, "in_a_row": self.in_a_row, "items": self.seen}

    def load_state(self, state: dict) -> None:
        self.dropped, self.in_a_row, self.seen = state["dropped"], state["in_a_row"], dict(state["items"])
