"""`python -m dl2pa`: the command `dl2pa`."""

import sys

from dl2pa.cli import main

sys.exit(main())
