"""`python -m luthier` is the command line."""

from luthier.faces.cli.main import main

raise SystemExit(main())
