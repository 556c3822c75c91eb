"""Method + budget → plan: the plan format, how plans are built, and other tools' formats."""
