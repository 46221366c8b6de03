"""The daemon: serves the core over gRPC.

Importing this package sets what grpc reads once, when it is imported itself: without its event engine a round trip
takes half the time (grpcio 1.80 to 1.85; unknown names are ignored, so later versions do no harm).

**Absent**: every rule of memory; `hmm` has them.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

VERSION = "0.1.0"
"""As in the distribution's metadata, whose reader would cost the daemon 3 MB."""
