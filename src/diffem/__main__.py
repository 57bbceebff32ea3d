"""`python -m diffem` is the command `diffem`."""

from diffem.cli import main

raise SystemExit(main())
