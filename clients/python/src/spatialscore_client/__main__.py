"""`python -m spatialscore_client` is the command `spatialscore-client`."""

import sys

from .cli import main

sys.exit(main())
