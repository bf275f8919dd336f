"""What libraries say beside us."""

from __future__ import annotations

import os


def quieten_libraries() -> None:
    """Progress bars and notices of loading libraries would drown our own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers fork after the tokenizer was used
    from transformers.utils import logging as notices

    notices.set_verbosity_error()
    notices.disable_progress_bar()
