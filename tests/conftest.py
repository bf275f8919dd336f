"""What all tests begin with."""

from __future__ import annotations

import signal

# A run in the background of a script inherits an ignored SIGINT, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
