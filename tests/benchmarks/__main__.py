"""The one command: python -m tests.benchmarks --help."""

from tests.benchmarks.runner import main

raise SystemExit(main())
