"""A pin: pages of a process that stay where they are, for DMA by devices that cannot fault.

**Source**: Linux mm/gup.c, pin_user_pages(), unpin_user_pages(); proto/hmm_proto/v1/hmm.proto.

**Invariants**: a pin ends with the session of the client that made it, which shows by itself that it lives.

**Absent**: what pinning does (`hmm.pin`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hmm.units import AddressRange
from hmm_client.arguments import names_arguments
from hmm_proto.convert import range_to_proto
from hmm_proto.status import from_call_result
from hmm_proto.v1 import hmm_pb2

if TYPE_CHECKING:
    from hmm_client.process import Process
    from hmm_client.session import Session


@names_arguments
class Pin:
    """Pinned pages.  Made by `Process.pin`; they outlive the process."""

    def __init__(self, session: Session, pin_id: int, span: AddressRange) -> None:
        self.id = pin_id
        self.span = span
        self._session = session

    def __repr__(self) -> str:
        return f"<pin {self.id} of {self.span}>"

    @classmethod
    async def make(cls, process: Process, span: AddressRange, *, write: bool, long_term: bool) -> Pin:
        """As `Process.pin`."""
        session = await process.client.session()
        request = hmm_pb2.PinPagesRequest(
            process_id=process.id, range=range_to_proto(span), write=write, long_term=long_term
        )
        (response,) = await session.call("pin_pages", request)
        error = from_call_result(response.result)
        if error is not None:
            raise error
        return cls(session, response.pin_id, span)

    async def unpin(self) -> None:
        """Let the pages move again.

        Raises:
            NoSuchObjectError: it is unpinned already (ENOENT).
        """
        (response,) = await self._session.call("unpin_pages", hmm_pb2.UnpinPagesRequest(pin_id=self.id))
        error = from_call_result(response.result)
        if error is not None:
            raise error
