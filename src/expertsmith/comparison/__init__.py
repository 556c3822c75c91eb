"""Compare many methods: one calibration, one plan and one evaluation per cell, one table and one plot."""
