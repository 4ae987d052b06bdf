"""`python -m rift` runs the command line."""

import sys

from rift.cli import main

sys.exit(main())
