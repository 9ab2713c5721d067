"""python -m chatterbox_fast: the `chatterbox-fast` command."""

import sys

from .cli import main

sys.exit(main())
