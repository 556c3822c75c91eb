"""Analyze what the experts do, as numbers and as a page. Reads weights and statistics; changes nothing."""
