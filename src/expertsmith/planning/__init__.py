"""From method and budget to a plan: the plan format, how plans are built, and other tools' formats."""
