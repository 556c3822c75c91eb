"""The verbs: one file each, with its options, what it does and how its result is shown."""
