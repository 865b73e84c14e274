"""What a run tells its user beside its result; and which of it must not go unseen."""

from epmq.errors import InputError


class Notes(list[str]):
    """Notes of a run, in words; they go into the report, in the order in which they came.

    Some say that the result departs from what base and experts are: something was dropped, filled in, renamed or left
    unquantized. `departures` holds those alone; `refuse()` makes errors of them, of those that are there and of those
    that come later (`epmq run --strict`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.departures: list[str] = []
        self._refused = False

    def depart(self, note: str) -> None:
        """Note, once, that something was dropped, filled in, renamed or left unquantized.

        Raises:
            InputError: departures are refused.
        """
        if note in self:
            return
        self.append(note)
        self.departures.append(note)
        if self._refused:
            self.refuse()

    def refuse(self) -> None:
        """Let no departure pass from now on; an InputError names all that there are."""
        self._refused = True
        if self.departures:
            raise InputError(f"strict: {'; '.join(self.departures)}")
