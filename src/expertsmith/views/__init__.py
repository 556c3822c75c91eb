"""What users see in the terminal: tables, findings, progress."""
