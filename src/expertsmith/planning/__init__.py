"""Method + budget → plan: the plan's format, how it is made, and choices of other tools."""
